"""Write the made-up images beside this file: python recipes/data/shapes/make_shapes.py

Every image is one filled shape in one colour on another, placed by a seeded draw; the shape is the label.
"""

import colorsys
import io
import random
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pictures
from PIL import ImageDraw

LABELS = ["circle", "cross", "square", "triangle"]
SIDE, FINER = 20, 4  # pixels; drawn so many times larger, so that edges are smooth
SIZES = {"train": 320, "validation": 60, "test": 60}


def drawn(label: str, draw: random.Random) -> bytes:
    """A PNG file."""
    hue = draw.random()
    colours = [_colour(hue, draw.uniform(0.75, 1)), _colour(hue + draw.uniform(0.3, 0.7), draw.uniform(0.2, 0.5))]
    draw.shuffle(colours)
    picture = Pictures.new("RGB", (SIDE * FINER,) * 2, colours[0])
    half = draw.uniform(0.26, 0.38) * SIDE * FINER
    x, y = (draw.uniform(half, SIDE * FINER - half) for _ in range(2))
    pen, box = ImageDraw.Draw(picture), (x - half, y - half, x + half, y + half)
    if label == "circle":
        pen.ellipse(box, fill=colours[1])
    elif label == "square":
        pen.rectangle(box, fill=colours[1])
    elif label == "triangle":
        pen.polygon([(x, y - half), (x + half, y + half), (x - half, y + half)], fill=colours[1])
    else:
        third = half / 3
        pen.rectangle((x - half, y - third, x + half, y + third), fill=colours[1])
        pen.rectangle((x - third, y - half, x + third, y + half), fill=colours[1])
    content = io.BytesIO()
    picture.resize((SIDE, SIDE), Pictures.Resampling.BOX).save(content, "png")
    return content.getvalue()


def _colour(hue: float, value: float) -> tuple[int, int, int]:
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue % 1, 0.7, value))


def main(folder: Path) -> None:
    draw, seen = random.Random(0), set()
    for split, size in SIZES.items():
        labels, images = [], []
        while len(labels) < size:
            label = LABELS[len(labels) % len(LABELS)]
            image = drawn(label, draw)
            if image not in seen:
                seen.add(image)
                labels.append(label)
                images.append({"bytes": image, "path": None})
        kinds = Features({"image": Image(), "label": ClassLabel(names=LABELS)})
        Dataset.from_dict({"image": images, "label": labels}, features=kinds).to_parquet(folder / f"{split}.parquet")


if __name__ == "__main__":
    main(Path(__file__).parent)
