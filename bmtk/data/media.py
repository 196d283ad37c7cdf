"""Images and recordings: folders of them as rows, and their decoding, with errors that name the row.

A folder is laid out as for ImageFolder and AudioFolder of `datasets`: `class/file`, or files with a `metadata.csv` or
`metadata.jsonl` beside them whose column `file_name` names them (its other columns are kept).  Values stay undecoded,
{"bytes", "path"}, until a row is needed, so that one broken file costs one row and not the whole run.
"""

import contextlib
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import pyarrow
import soundfile
import soxr

from bmtk.errors import UserError

from .archives import member_bytes
from .columns import first_missing
from .delimited import delimited_rows
from .folders import visible_files
from .json_rows import json_rows
from .text_files import TableFormat, Unreadable

# What browsers, cameras and editors write; those that the installed Pillow and libsndfile can read.
PICTURES = ".jpg .jpeg .jpe .jfif .png .apng .bmp .dib .gif .webp .tif .tiff .avif .ppm .pgm .pbm .pnm .jp2 .tga"
IMAGE_SUFFIXES = tuple(
    suffix for suffix in PICTURES.split() if PIL.Image.registered_extensions().get(suffix) in PIL.Image.OPEN
)
SOUNDS = {
    **dict.fromkeys((".wav", ".flac", ".mp3", ".ogg", ".oga", ".aiff", ".aif", ".aifc", ".au", ".caf", ".w64"), ""),
    ".opus": "OPUS",  # of Ogg, in libsndfile 1.0.29 and later
}
AUDIO_SUFFIXES = tuple(
    suffix for suffix, kind in SOUNDS.items() if not kind or kind in soundfile.available_subtypes("OGG")
)
MEDIA_SUFFIXES = (*IMAGE_SUFFIXES, *AUDIO_SUFFIXES)
KIND_OF_SUFFIX = {**dict.fromkeys(IMAGE_SUFFIXES, "image"), **dict.fromkeys(AUDIO_SUFFIXES, "audio")}
ON_CORRUPT = ("stop", "skip")  # what to do about a file that cannot be read
Found = TypeVar("Found")
METADATA = ("metadata.jsonl", "metadata.csv")
Media = Mapping[str, Any]  # {"bytes", "path"}: one of them, or a path that is kept for error messages
FILE_NAME = "file_name"  # the column of metadata that names a file


def media_kind(path: Path) -> str:
    """Of a file, by its suffix: image, audio, or nothing."""
    suffix = path.suffix.lower()
    return "image" if suffix in IMAGE_SUFFIXES else "audio" if suffix in AUDIO_SUFFIXES else ""


def majority_kind(files: Sequence[Path], folder: Path) -> str:
    """The kind of most of the files: image or audio; nothing if none is either.  Raises: UserError if none wins."""
    counts = Counter(kind for kind in map(media_kind, files) if kind).most_common()
    if len(counts) == 2 and counts[0][1] == counts[1][1]:
        raise UserError(f"{folder} holds {counts[0][1]:,} image and as many audio files; give a folder of one kind")
    return counts[0][0] if counts else ""


def media_rows(folder: Path, files: Sequence[Path]) -> datasets.Dataset:
    """A row for each file: `image` or `audio`, and the columns of metadata, or `label`, the name of its own folder.

    Raises: UserError if there are no files, or metadata name files that are not there.
    """
    kinds = {media_kind(path) for path in files}
    if len(kinds) != 1:
        raise UserError(f"{folder} holds {' and '.join(sorted(kinds)) or 'no'} files; give a folder of one kind")
    (kind,) = kinds
    tables = metadata_files(folder)
    if tables:
        chosen = set(files)
        rows = [row for table in tables for row in _metadata(table) if row[FILE_NAME] in chosen]
        paths = [row.pop(FILE_NAME) for row in rows]
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [row.get(name) for row in rows] for name in names if name != kind}
    else:
        paths = list(files)
        is_sorted_by_class = all(path.parent != folder for path in files)
        columns = {"label": [path.parent.name for path in files]} if is_sorted_by_class else {}
    values = [{"bytes": None, "path": str(path)} for path in paths]
    return datasets.Dataset.from_dict({kind: values, **columns})


def metadata_files(folder: Path) -> list[Path]:
    """Tables below a folder that name the files beside them."""
    found = visible_files(folder, lambda path: path.name in METADATA)
    return sorted(found, key=lambda path: METADATA.index(path.name))


def _metadata(table: Path) -> list[dict[str, Any]]:
    """The rows of one file of metadata, with `file_name` as a path."""
    try:
        if table.suffix == ".csv":
            (_, columns), *lines = delimited_rows(table, TableFormat())
            rows = [dict[str, Any](zip(columns, cells, strict=True)) for _, cells in lines]
        else:
            rows = [row for _, row in json_rows(table, TableFormat())]
    except Unreadable as error:
        raise UserError(error.sentence(table, "a table in UTF-8")) from error
    for number, row in enumerate(rows, 1):
        if FILE_NAME not in row:
            raise UserError(
                f"{table}, row {number}: no column {FILE_NAME}, which names the file; there is {list(row)}"
            )
        row[FILE_NAME] = table.parent / row[FILE_NAME]
        if not row[FILE_NAME].is_file():
            raise UserError(
                f"{table}, row {number}: {row[FILE_NAME]} does not exist; correct the name or remove the row"
            )
    return rows


def undecoded(rows: datasets.Dataset) -> datasets.Dataset:
    """The same rows, with images and recordings as {"bytes", "path"}."""
    for name, kind in rows.features.items():
        if isinstance(kind, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
        elif isinstance(kind, datasets.Audio):
            plain = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
            # Audio(decode=False) would still need torchcodec; the stored values are these two fields
            rows = with_features(rows, {name: plain})
    return rows


def with_features(rows: datasets.Dataset, kinds: Mapping[str, Any]) -> datasets.Dataset:
    """`rows` whose stored values in some columns are taken for other kinds; a file that is mapped stays mapped."""
    features = datasets.Features({**rows.features, **kinds})
    info = datasets.DatasetInfo(features=features)
    return datasets.Dataset(rows.data.cast(features.arrow_schema), info=info, indices_table=rows._indices)


def media_column(table: datasets.Dataset, column: str, kind: str, where: str) -> datasets.Dataset:
    """The images (kind "image") or recordings ("audio") of a table, in a column of that name; nothing is copied.

    Raises: UserError if a row holds something else.
    """
    rows = table.select_columns(column)
    held = rows.data.schema.field(column).type
    is_media = pyarrow.types.is_struct(held) and {"bytes", "path"} <= {field.name for field in held}
    row = first_missing(rows, column) if is_media else 0
    if row is not None:
        noun = {"image": "image", "audio": "recording"}[kind]
        found = type(rows[row][column]).__name__
        raise UserError(f"{kind}_column={column!r} of {where} row {row + 1} holds a {found}, no {noun}")
    return rows if column == kind else rows.rename_column(column, kind)


def decode_image(value: Media, where: str) -> PIL.Image.Image:
    """The image of a row, the right way up.  Raises: UserError that says `where` and what is wrong with it."""
    with _opened(value, where) as image:
        image.load()
        return PIL.ImageOps.exif_transpose(
            image
        )  # cameras record how they were held, and transformers' pipelines apply it, too


def image_size(value: Media, where: str) -> tuple[int, int]:
    """Width and height of the image of a row the right way up; nothing is decoded.  Raises: as `decode_image`."""
    with _opened(value, where) as image:
        is_on_its_side = image.getexif().get(PIL.ExifTags.Base.Orientation, 1) >= 5
        return image.size[::-1] if is_on_its_side else image.size


@contextlib.contextmanager
def _opened(value: Media, where: str) -> Iterator[PIL.Image.Image]:
    try:
        with PIL.Image.open(_source(value)) as image:
            yield image
    except (OSError, SyntaxError, ValueError, TypeError, PIL.Image.DecompressionBombError) as error:
        raise UserError(f"{where} is not an image that can be read: {_named(value)}{error}") from error


def _source(value: Media) -> Any:
    """What can be opened as a file: a path, or the bytes of a row or of a place in an archive."""
    content = value["bytes"] if value["bytes"] is not None else member_bytes(str(value["path"]))
    return value["path"] if content is None else io.BytesIO(content)


def in_colour(image: PIL.Image.Image) -> PIL.Image.Image:
    """Red, green and blue; what is transparent shows white."""
    if image.has_transparency_data:
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def image_header(value: Media) -> tuple[tuple[int, int], str, bool]:
    """Width and height, Pillow's mode, and whether it may be transparent, of an image that can be read."""
    with PIL.Image.open(_source(value)) as image:
        return image.size, image.mode, image.has_transparency_data


def decode_audio(value: Media, where: str, *, sampling_rate: int) -> np.ndarray:
    """The samples of a recording, one channel at `sampling_rate` Hz, float32 in [-1, 1].

    Raises: UserError that says `where` and what is wrong with it.
    """
    samples, rate = _read_audio(value, where, lambda source: soundfile.read(source, dtype="float32", always_2d=True))
    samples = samples.mean(axis=1)  # of (N, channels)
    if not len(samples):
        raise UserError(f"{where} is a recording without a sample: {_named(value)}leave it out")
    return samples if rate == sampling_rate else resampled(samples, rate, sampling_rate)


def audio_seconds(value: Media, where: str) -> float:
    """Length of a recording according to its header; samples are not read.  Raises: as `decode_audio`."""
    info = _read_audio(value, where, soundfile.info)
    if not info.frames:
        raise UserError(f"{where} is a recording without a sample: {_named(value)}leave it out")
    return info.frames / info.samplerate


def _read_audio(value: Media, where: str, read: Callable[[Any], Found]) -> Found:
    try:
        return read(_source(value))
    except (OSError, RuntimeError, TypeError) as error:
        raise UserError(f"{where} is not a recording that can be read: {_named(value)}{error}") from error


def resampled(samples: np.ndarray, rate: float, wanted: float) -> np.ndarray:
    """Samples (N,) of `rate` Hz at `wanted` Hz; frequencies above half of either rate are filtered out."""
    return soxr.resample(samples, rate, wanted).astype(np.float32)


def _named(value: Media) -> str:
    path = value.get("path") if isinstance(value, dict) else None  # a row may hold anything
    return f"{path}: " if path else ""
