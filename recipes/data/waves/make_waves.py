"""Writes waves.csv: three made-up hourly series of 1,000 steps, the same file every time.

Each is a day's wave, a week's wave and a slow trend with a little noise; `total` is the sum of the other two.
"""

import csv
import math
import random
from datetime import datetime, timedelta
from pathlib import Path

NUM_STEPS = 1000


def main(folder: Path) -> None:
    draw, start = random.Random(0), datetime(2024, 1, 1)
    with (folder / "waves.csv").open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["date", "north", "south", "total"])
        for step in range(NUM_STEPS):
            day, week = 2 * math.pi * step / 24, 2 * math.pi * step / 168
            north = 20 + 6 * math.sin(day) + 3 * math.sin(week) + step / 200 + draw.gauss(0, 0.3)
            south = 200 - 30 * math.cos(day) + 20 * math.cos(week) - step / 50 + draw.gauss(0, 2)
            values = [f"{value:.3f}" for value in (north, south, north + south)]
            lines.writerow([start + timedelta(hours=step), *values])


if __name__ == "__main__":
    main(Path(__file__).parent)
