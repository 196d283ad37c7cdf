"""The boxes of images as tables hold them.

A box is [left, top, width, height] in pixels of its image, as in COCO; other formats become that when they are read.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from bmtk.data.box_transforms import FORMATS, as_ltwh, clip_boxes, likely_format
from bmtk.data.labels import label_name
from bmtk.data.media import image_size
from bmtk.data.tables import check_column
from bmtk.errors import UserError

Objects = tuple[np.ndarray, list[str]]  # of one image: boxes (N, 4), and the names of their N labels


def read_objects(table: Dataset, column: str, where: str, *, names: Sequence[str] | None) -> list[Objects]:
    """Boxes (N, 4) and the N names of their labels, for each row; none where a row has no objects.

    A row holds {"bbox", "category"} as lists, or a list of such pairs.  A name comes from `category_name`, else from
    `names` or the column's own type; else it is the category itself.
    Raises: UserError, naming the row, for everything else.
    """
    check_column(table, column, option="objects_column", where=where)
    names = names or _names_of_type(table.features[column])
    places = (f"objects_column={column!r} of {where} row {row}" for row in range(1, len(table) + 1))
    return [_objects(value, place, names) for value, place in zip(table[column], places, strict=True)]


def _objects(value: Any, place: str, names: Sequence[str] | None) -> Objects:
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = {key: [item.get(key) for item in value] for key in (value[0] if value else ())}
    if not value:
        return np.zeros((0, 4)), []
    kinds = "category_name" if isinstance(value, dict) and value.get("category_name") is not None else "category"
    if not isinstance(value, dict) or not {"bbox", kinds} <= value.keys():
        raise UserError(f"{place} holds {str(value)[:80]}; give bbox and category, a list of each")
    boxes, labels = value["bbox"] or [], value[kinds] or []
    if len(boxes) != len(labels):
        raise UserError(f"{place} has {len(boxes)} bbox and {len(labels)} {kinds}; give one for each object")
    for box in boxes:
        if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(_is_number, box)):
            raise UserError(f"{place} has the bbox {box}; give {FORMATS['ltwh']}")
    named = [label_name(label, names if kinds == "category" else None, f"{kinds} of {place}") for label in labels]
    return np.array(boxes, dtype=float).reshape(-1, 4), named


def _is_number(side: Any) -> bool:
    """Also a number as text, which a column holds where another row has a text."""
    try:
        float(side)
    except (TypeError, ValueError):
        return False
    return True


def _names_of_type(kind: Any) -> list[str] | None:
    """The names of a ClassLabel in {"category": [ClassLabel]} or [{"category": ClassLabel}]."""
    kind = getattr(kind, "feature", kind)
    kind = kind.get("category") if isinstance(kind, dict) else None
    kind = getattr(kind, "feature", kind)
    return kind.names if isinstance(kind, ClassLabel) else None


def sizes_of(images: Iterable[dict[str, Any]], where: str) -> list[tuple[int, int]]:
    """Width and height of each image."""
    return [image_size(image, f"the image of {where} row {row}") for row, image in enumerate(images, 1)]


def in_pixels(
    objects: Sequence[Objects], sizes: Sequence[tuple[int, int]], box_format: str | None, where: str
) -> list[Objects]:
    """Objects with boxes of `box_format`, with boxes as [left, top, width, height].

    Raises: UserError if no format is set, and the boxes look like another than that.
    """
    if box_format is None:
        boxes = np.concatenate([boxes for boxes, _ in objects]) if objects else np.zeros((0, 4))
        of_boxes = np.repeat(np.array(sizes).reshape(-1, 2), [len(boxes) for boxes, _ in objects], axis=0)
        box_format = likely_format(boxes, of_boxes)
        if box_format != "ltwh":
            reason = {
                "ltrb": "reach beyond their image as [left, top, width, height] and fit as [left, top, right, bottom]",
                "yolo": "hold numbers between 0 and 1 only, and look like shares of their image",
            }[box_format]
            raise UserError(
                f"boxes of the {where} data {reason} (the first: {boxes[0].tolist()} in an image of "
                f"{of_boxes[0][0]} x {of_boxes[0][1]}).  If they are {FORMATS[box_format]}, set box_format="
                f"{box_format}; if they are {FORMATS['ltwh']}, set box_format=ltwh"
            )
    return [(as_ltwh(boxes, size, box_format), names) for (boxes, names), size in zip(objects, sizes, strict=True)]


def objects_within_images(
    sizes: Sequence[tuple[int, int]], objects: Sequence[Objects], where: str, notes: list[str]
) -> list[Objects]:
    """The objects, clipped at the edges of their images; notes count them, and those of which nothing is left."""
    kept: list[Objects] = []
    left_out: list[tuple[int, list[float]]] = []
    num_clipped = 0
    for row, (size, (boxes, names)) in enumerate(zip(sizes, objects, strict=True), 1):
        inside = clip_boxes(boxes, *size)
        stays = np.array((inside[:, 2:] > 0).all(1) & np.isfinite(boxes).all(1))
        left_out += [(row, box) for box in boxes[~stays].tolist()]
        num_clipped += int((~np.isclose(inside, boxes).all(1))[stays].sum())
        kept.append((inside[stays], [name for name, stay in zip(names, stays, strict=True) if stay]))
    total = sum(len(boxes) for boxes, _ in objects)
    if left_out:
        row, box = left_out[0]
        notes.append(
            f"{len(left_out):,} of {total:,} {where} boxes have no area within their image: left out (the first "
            f"is {box} in row {row})"
        )
    if num_clipped:
        notes.append(f"{num_clipped:,} of {total:,} {where} boxes reach beyond their image: cut at its edge")
    return kept
