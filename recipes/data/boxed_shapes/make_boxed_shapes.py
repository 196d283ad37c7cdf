"""Write the made-up pictures beside this file: python recipes/data/boxed_shapes/make_boxed_shapes.py

Every picture shows one to four filled circles and squares on a plain ground, placed by a seeded draw so that their
boxes do not overlap; one training picture shows nothing.  `metadata.jsonl` holds their boxes.
"""

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 64  # pixels
SPLITS = {"train": 48, "validation": 12, "test": 12}
GROUNDS = ["#f4f1e8", "#e8eef4", "#eaf4e8", "#f4e8ee"]
INKS = ["#b3261e", "#1e5fb3", "#2e7d32", "#6a1b9a", "#37474f"]


def boxes_apart(draw: random.Random, count: int) -> list[list[int]]:
    """Up to `count` boxes [left, top, width, height], at least 2 pixels apart."""
    boxes = []
    for _ in range(20 * count):
        size = draw.randint(12, 24)
        left, top = draw.randint(0, SIDE - size), draw.randint(0, SIDE - size)
        if all(
            left > x + w + 2 or x > left + size + 2 or top > y + h + 2 or y > top + size + 2 for x, y, w, h in boxes
        ):
            boxes.append([left, top, size, size])
        if len(boxes) == count:
            break
    return boxes


def picture(draw: random.Random, count: int) -> tuple[Image.Image, dict[str, list]]:
    image = Image.new("RGB", (SIDE, SIDE), draw.choice(GROUNDS))
    pen = ImageDraw.Draw(image)
    boxes = boxes_apart(draw, count)
    names = [draw.choice(["circle", "square"]) for _ in boxes]
    for (left, top, width, height), name in zip(boxes, names, strict=True):
        shape = pen.ellipse if name == "circle" else pen.rectangle
        shape((left, top, left + width - 1, top + height - 1), fill=draw.choice(INKS))
    return image, {"bbox": boxes, "category": names}


def main() -> None:
    draw = random.Random(0)
    for split, count in SPLITS.items():
        folder = Path(__file__).parent / split
        folder.mkdir(exist_ok=True)
        lines = []
        for number in range(count):
            nothing = split == "train" and number == 7
            image, objects = picture(draw, 0 if nothing else draw.randint(1, 4))
            image.save(folder / f"{number:02}.png", optimize=True)
            lines.append(json.dumps({"file_name": f"{number:02}.png", "objects": objects}) + "\n")
        (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
