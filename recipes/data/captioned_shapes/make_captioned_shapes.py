"""Make small pictures of one shape each, for smoke runs: `python make_captioned_shapes.py` writes the three files.

Made up for this project (CC0 1.0): a circle, square, triangle or cross of one colour on a background that fades from
one colour to another, with its name and a caption.  The same rows every time.
"""

import io
import random
from pathlib import Path

import datasets
import numpy as np
import PIL.Image

LABELS = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (230, 60, 50),
    "green": (60, 170, 80),
    "blue": (60, 90, 220),
    "yellow": (240, 200, 60),
    "white": (250, 250, 250),
}
SIZE = 24  # pixels per side
ROWS = {"train": 240, "validation": 40, "test": 40}
STEPS = 6  # shades of a background; few, so that the files stay small


def inside(label: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points belong to the shape of radius 1 around 0."""
    if label == "circle":
        return x**2 + y**2 <= 1
    if label == "square":
        return np.maximum(abs(x), abs(y)) <= 0.85
    if label == "triangle":
        return (y <= 0.8) & (abs(x) <= (y + 1) * 0.55)
    return (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 1)


def picture(label: str, colour: str, draw: random.Random) -> bytes:
    """A PNG of the shape, somewhere, in some size."""
    radius = draw.uniform(5, 8)
    centre_x, centre_y = (draw.uniform(radius, SIZE - radius) for _ in range(2))
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    colours = [np.array([draw.randrange(256) for _ in range(3)]) for _ in range(2)]
    shape = np.array(COLOURS[colour])
    fade = (x if draw.random() < 0.5 else y)[..., None] * STEPS // SIZE / (STEPS - 1)
    pixels = colours[0] * (1 - fade) + colours[1] * fade
    pixels[inside(label, (x - centre_x) / radius, (y - centre_y) / radius)] = shape
    content = io.BytesIO()
    PIL.Image.fromarray(pixels.round().astype(np.uint8)).quantize(16).save(content, "png", optimize=True)
    return content.getvalue()


def main() -> None:
    draw = random.Random(0)
    labels = datasets.ClassLabel(names=list(LABELS))
    kinds = {"image": datasets.Image(), "label": labels, "caption": datasets.Value("string")}
    for split, count in ROWS.items():
        labels = [number % len(LABELS) for number in range(count)]
        draw.shuffle(labels)
        colours = [draw.choice(list(COLOURS)) for _ in labels]
        names = [LABELS[label] for label in labels]
        pictures = [picture(name, colour, draw) for name, colour in zip(names, colours, strict=True)]
        columns = {
            "image": [{"bytes": content, "path": None} for content in pictures],
            "label": labels,
            "caption": [f"a {colour} {name}" for colour, name in zip(colours, names, strict=True)],
        }
        rows = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
        rows.to_parquet(Path(__file__).parent / f"{split}.parquet")


if __name__ == "__main__":
    main()
