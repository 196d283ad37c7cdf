"""Documents from text, JSON-lines, CSV, TSV and Parquet files, from folders of them, and from the Hub.

A document is one non-blank string. Local files are read as streams: a corpus may be larger than memory, one document
(or one line of JSON) may not. The order of documents is fixed: sources as given, files of a folder by name.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bmtk.errors import UserError

from .delimited import delimited_rows
from .fingerprints import FileDigests
from .folders import visible_files
from .json_rows import json_rows
from .text_files import COMPRESSED_SUFFIXES, BadRow, TableFormat, Unreadable, opened_text, suffix_of

SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet", ".tsv")
SPLIT_NAMES = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
SAMPLE_BY = ("document", "line")
ROWS_PER_READ = 1024
AS_FOUND = TableFormat()


@dataclass(frozen=True)
class Texts:
    """Documents that can be iterated again and again, in the same order.

    `name` is what error messages call them; `fingerprint` changes whenever the documents may have changed (it is made
    of the names and the content of the files). Blank documents are left out.
    Raises: UserError while iterating, if there is no document at all, or a file is not what its name says.
    """

    name: str
    fingerprint: str
    parts: tuple[Callable[[], Iterator[str]], ...]
    num_bytes: int | None = None  # of the files; None if they are not counted
    marks: tuple[str, ...] = ()  # name and fingerprint of each file or Hub data set

    def __iter__(self) -> Iterator[str]:
        is_empty = True
        for part in self.parts:
            for text in part():
                if text and not text.isspace():
                    is_empty = False
                    yield text
        if is_empty:
            raise UserError(f"the corpus {self.name} is empty: it holds no document with a visible character")

    def without(self, is_left_out: Callable[[str], bool], *, mark: str) -> "Texts":
        """Without the documents that `is_left_out`; `mark` changes whenever other documents are."""
        fingerprint = hashlib.sha256(f"{self.fingerprint} without {mark}".encode()).hexdigest()
        kept = (lambda: (text for text in self if not is_left_out(text)),)
        return Texts(self.name, fingerprint, kept, marks=self.marks)

    def head(self, num_characters: int) -> list[str]:
        """The first documents, the last of them cut, with `num_characters` together; all if they have fewer."""
        found, left = [], num_characters
        for text in self:
            found.append(text[:left])
            left -= len(text)
            if left <= 0:
                break
        return found


def read_texts(
    source: str | Path | Sequence[str | Path],
    *,
    split: str = "train",
    text_column: str = "text",
    sample_by: str = "document",
    layout: TableFormat = AS_FOUND,
    digests: FileDigests | None = None,
) -> Texts:
    """Find the documents of a file, a folder, a Hub data set (`owner/name` or `owner/name:config`), or a list of them.

    `split` selects the files of a folder (`train.txt`, `train-00001.parquet`, `train/...`; all files of a folder
    without such names are "train") or the split of a Hub data set; a file named directly is always read whole.
    `text_column` is the key or column of .jsonl, .csv, .tsv, .parquet and Hub rows. `sample_by` makes one document of
    each .txt file ("document") or of each of its lines ("line"). `digests` knows files that were read before.
    Raises: FileNotFoundError for a path that is not there; UserError for everything else that cannot be read.
    """
    if sample_by not in SAMPLE_BY:
        raise UserError(f"sample_by={sample_by!r} is unknown; choose one of {SAMPLE_BY}")
    sources = [source] if isinstance(source, str | Path) else list(source)
    if not sources:
        raise UserError("source is an empty list; name at least one file, folder or Hub data set")
    digests = digests or FileDigests()
    parts: list[Callable[[], Iterator[str]]] = []
    marks: list[str] = []  # what changes when the documents do
    num_bytes: int | None = 0
    for item in map(str, sources):
        if Path(item).expanduser().exists() or _looks_like_a_path(item):
            files = _files(Path(item).expanduser(), split)
            parts += [_file_part(file, text_column, sample_by, layout) for file in files]
            marks += [f"{file.name} {digests.of(file)}" for file in files]
            is_packed = any(file.suffix.lower() in COMPRESSED_SUFFIXES for file in files)
            sizes = None if is_packed else sum(file.stat().st_size for file in files)
            num_bytes = None if num_bytes is None or sizes is None else num_bytes + sizes
        else:
            part, mark = _hub_part(item, split, text_column)
            parts.append(part)
            marks.append(mark)
            num_bytes = None  # not known before it is read
    is_set = [] if layout == AS_FOUND else [[layout.delimiter, layout.encoding]]
    description = json.dumps([marks, text_column, sample_by, *is_set])
    name = f"{', '.join(map(str, sources))} (split {split!r})"
    return Texts(name, hashlib.sha256(description.encode()).hexdigest(), tuple(parts), num_bytes, tuple(marks))


def has_split(source: str, split: str) -> bool:
    """Whether the folder `source` has files named after `split`; False for other sources."""
    folder, wanted = Path(source).expanduser(), SPLIT_NAMES.get(split, (split,))
    files = visible_files(folder, lambda path: suffix_of(path) in SUFFIXES) if folder.is_dir() else ()
    return any(_is_named_after(path.relative_to(folder), wanted) for path in files)


def text_fingerprint(texts: Texts | Sequence[str]) -> str:
    """What changes when the documents do; a list is hashed whole. Raises: TypeError for a generator or one string."""
    if isinstance(texts, Texts):
        return texts.fingerprint
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise TypeError(f"texts must be a list of strings or come from read_texts, found {type(texts).__name__}")
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def _looks_like_a_path(item: str) -> bool:
    return item.startswith(("/", ".", "~")) or item.count("/") > 1 or "\\" in item or suffix_of(Path(item)) in SUFFIXES


def _files(path: Path, split: str) -> list[Path]:
    """The files that `path` stands for: itself, or the ones in a folder that belong to `split`, by name."""
    if path.is_dir():
        return _files_of_folder(path, split)
    if not path.exists():
        raise FileNotFoundError(f"source={str(path)!r} does not exist (looked in {Path.cwd()})")
    if suffix_of(path) not in SUFFIXES:
        raise UserError(f"source={str(path)!r} ends in {path.suffix!r}; known file types are {', '.join(SUFFIXES)}")
    return [path]


def _files_of_folder(folder: Path, split: str) -> list[Path]:
    files = visible_files(folder, lambda path: suffix_of(path) in SUFFIXES)
    if not files:
        raise UserError(f"source={str(folder)!r} holds no file that ends in {', '.join(SUFFIXES)}")
    wanted = SPLIT_NAMES.get(split, (split,))
    chosen = [f for f in files if _is_named_after(f.relative_to(folder), wanted)]
    known = [name for names in SPLIT_NAMES.values() for name in names]
    if not chosen and split == "train" and not any(_is_named_after(f.relative_to(folder), known) for f in files):
        return files
    if not chosen:
        there = ", ".join(str(f.relative_to(folder)) for f in files[:8]) + (", ..." if len(files) > 8 else "")
        raise UserError(f"split={split!r} is not in {folder}: no file is named after {wanted}; there are {there}")
    return chosen


def _is_named_after(path: Path, names: Sequence[str]) -> bool:
    """Whether the file's stem up to the first of `-_.`, or the first folder on the way to it, is one of `names`."""
    stem = path.name.replace("-", ".").replace("_", ".").split(".")[0]
    return stem in names or (len(path.parts) > 1 and path.parts[0] in names)


def _file_part(path: Path, text_column: str, sample_by: str, layout: TableFormat) -> Callable[[], Iterator[str]]:
    suffix = suffix_of(path)
    if suffix == ".txt":
        return partial(_read_txt, path, sample_by, layout)
    if suffix == ".parquet":
        return partial(_read_parquet, path, text_column)
    return partial(_read_jsonl if suffix == ".jsonl" else _read_delimited, path, text_column, layout)


def _read_txt(path: Path, sample_by: str, layout: TableFormat) -> Iterator[str]:
    is_whole = sample_by == "document"
    try:
        # newline="" keeps "\r\n" of a whole document as it is; lines lose their ends, of either kind
        with opened_text(path, layout.encoding, newline="" if is_whole else None) as file:
            if is_whole:
                yield file.read()
            else:
                yield from (line.removesuffix("\n") for line in file)
    except Unreadable as error:
        kind = f"{layout.encoding or 'UTF-8'} text"
        raise UserError(f"{error.sentence(path, kind)}; or convert it first, for example with iconv") from error


def _read_jsonl(path: Path, text_column: str, layout: TableFormat) -> Iterator[str]:
    try:
        for place, row in json_rows(path, layout):
            where = f"{path}, {place}"
            _check_column(text_column, list(row), where)
            yield _checked_text(row[text_column], text_column, where)
    except BadRow as error:
        raise UserError(error.sentence(path, "JSON lines")) from error
    except Unreadable as error:
        place = "" if error.line is None else f", line {error.line}"
        raise UserError(f"{path}{place}: not a line of JSON ({error.reason})") from error


def _read_delimited(path: Path, text_column: str, layout: TableFormat) -> Iterator[str]:
    kind = f"a {suffix_of(path)[1:].upper()} file in {layout.encoding or 'UTF-8'}"
    try:
        rows = delimited_rows(path, layout)
        _, header = next(rows)
        _check_column(text_column, header, path)
        column = header.index(text_column)
        yield from (cells[column] for _, cells in rows)
    except Unreadable as error:
        raise UserError(error.sentence(path, kind)) from error


def _read_parquet(path: Path, text_column: str) -> Iterator[str]:
    import pyarrow.parquet  # slow to import, and only needed here

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file ({error})") from error
    with table:
        _check_column(text_column, table.schema_arrow.names, path)
        for batch in table.iter_batches(batch_size=ROWS_PER_READ, columns=[text_column]):
            for value in batch.column(0).to_pylist():
                yield _checked_text(value, text_column, path)


def _hub_part(item: str, split: str, text_column: str) -> tuple[Callable[[], Iterator[str]], str]:
    import datasets  # slow to import, and only needed here

    name, _, config = item.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError) as error:
        raise UserError(
            f"source={item!r} is no file or folder here, and loading its split {split!r} from the Hub failed: {error}"
        ) from error
    _check_column(text_column, rows.column_names, item)
    return partial(_read_rows, rows.select_columns([text_column]), text_column, item), f"{item} {rows._fingerprint}"


def _read_rows(rows: Any, text_column: str, where: str) -> Iterator[str]:
    for batch in rows.iter(batch_size=ROWS_PER_READ):
        for value in batch[text_column]:
            yield _checked_text(value, text_column, where)


def _check_column(text_column: str, columns: list[str], where: str | Path) -> None:
    if text_column not in columns:
        raise UserError(f"text_column={text_column!r} is not in {where}; the columns there are {columns}")


def _checked_text(value: object, text_column: str, where: str | Path) -> str:
    """`value` as a text that UTF-8 can hold; a missing value is a blank text."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}: text_column={text_column!r} holds bytes that are not UTF-8 ({error})"
            ) from error
    if not isinstance(value, str):
        raise UserError(f"{where}: text_column={text_column!r} holds {type(value).__name__}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: the text is not Unicode ({error}); repair or remove it") from error
    return value
