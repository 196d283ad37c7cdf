"""Documents from text, JSON-lines, CSV, TSV, Parquet and Arrow files, from folders and patterns of them, from URLs and
from the Hub.

A document is one non-blank string. Files are read as streams: a corpus may be larger than memory, and so may a text
file that is one document, where it is read in pieces. The order of documents is fixed: sources as given, files of a
folder or a pattern by name.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bmtk.errors import UserError

from .corpus_files import SUFFIXES, CorpusFile, Piece, check_column, checked_text, documents, pieces_of
from .downloads import fetched, is_url, matching_urls
from .fingerprints import FileDigests
from .folders import visible_files
from .patterns import is_pattern, matching_files
from .text_files import COMPRESSED_SUFFIXES, TableFormat, suffix_of

SPLIT_NAMES = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
SAMPLE_BY = ("document", "line")
ON_CORRUPT = ("stop", "skip")
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
    files: tuple[CorpusFile, ...] = ()  # that hold the documents, each with its mark; none if there are other parts

    def __iter__(self) -> Iterator[str]:
        is_empty = True
        for part in self.parts:
            for text in part():
                if text and not text.isspace():
                    is_empty = False
                    yield text
        if is_empty:
            raise self.emptiness

    @property
    def emptiness(self) -> UserError:
        return UserError(f"the corpus {self.name} is empty: it holds no document with a visible character")

    def pieces(self) -> Iterator[Piece]:
        """The documents in pieces (text, whether the document ends), which are small where files are read."""
        if not self.files:
            yield from ((text, True) for text in self)
            return
        is_empty = True
        for file in self.files:
            for piece in pieces_of(file):
                is_empty = False
                yield piece
        if is_empty:
            raise self.emptiness

    def without(self, is_left_out: Callable[[str], bool], *, mark: str) -> "Texts":
        """Without the documents that `is_left_out`; `mark` changes whenever other documents are."""
        fingerprint = hashlib.sha256(f"{self.fingerprint} without {mark}".encode()).hexdigest()
        kept = (lambda: (text for text in self if not is_left_out(text)),)
        return Texts(self.name, fingerprint, kept, marks=self.marks)

    def head(self, num_characters: int) -> list[str]:
        """The first documents, the last of them cut, with `num_characters` together; all if they have fewer."""
        found, left = [""], num_characters
        for text, ends in self.pieces():
            found[-1] += text[:left]
            left -= len(text)
            if left <= 0:
                break
            if ends:
                found.append("")
        return [text for text in found if text]


@dataclass
class _Found:
    """What the sources of a corpus hold: a part and a mark of each file or Hub data set."""

    parts: list[Callable[[], Iterator[str]]] = field(default_factory=list)
    marks: list[str] = field(default_factory=list)
    files: list[CorpusFile] = field(default_factory=list)
    num_bytes: int | None = 0

    def add_file(self, file: CorpusFile, mark: str) -> None:
        path = Path(file.path)
        self.parts.append(partial(documents, file))
        self.files.append(file)
        self.marks.append(mark)
        is_packed = path.suffix.lower() in COMPRESSED_SUFFIXES
        self.num_bytes = None if self.num_bytes is None or is_packed else self.num_bytes + path.stat().st_size

    def add_hub(self, part: Callable[[], Iterator[str]], mark: str) -> None:
        self.parts.append(part)
        self.marks.append(mark)
        self.num_bytes = None  # not known before it is read


def read_texts(
    source: str | Path | Sequence[str | Path],
    *,
    split: str = "train",
    text_column: str = "text",
    sample_by: str = "document",
    layout: TableFormat = AS_FOUND,
    digests: FileDigests | None = None,
    on_corrupt: str = "stop",
) -> Texts:
    """Find the documents of a file, a folder, a Hub data set (`owner/name` or `owner/name:config`), or a list of them.

    Also of a pattern of names (`*`, `?`, `[...]`, `**` for any depth, `{000..017}`, `{a,b}`), and of a URL, which is
    copied to a cache.
    `split` selects the files of a folder (`train.txt`, `train-00001.parquet`, `train/...`; all files of a folder
    without such names are "train") or the split of a Hub data set; a file named directly is always read whole.
    `text_column` is the key or column of .jsonl, .csv, .tsv, .parquet, .arrow and Hub rows. `sample_by` makes one
    document of each .txt file ("document") or of each of its lines ("line"). `digests` knows files that were read
    before. With `on_corrupt` "skip", rows and ends of files that cannot be read are left out.
    Raises: FileNotFoundError for a path that is not there; UserError for everything else that cannot be read.
    """
    for name, value, allowed in (("sample_by", sample_by, SAMPLE_BY), ("on_corrupt", on_corrupt, ON_CORRUPT)):
        if value not in allowed:
            raise UserError(f"{name}={value!r} is unknown; choose one of {allowed}")
    sources = [source] if isinstance(source, str | Path) else list(source)
    if not sources:
        raise UserError("source is an empty list; name at least one file, folder or Hub data set")
    digests, skips, found = digests or FileDigests(), on_corrupt == "skip", _Found()
    how = (text_column, sample_by, layout.delimiter, layout.encoding, skips)
    for item in map(str, sources):
        if is_url(item) or Path(item).expanduser().exists() or _looks_like_a_path(item):
            for path in _paths(item, split):
                found.add_file(CorpusFile(str(path), *how), f"{path.name} {digests.of(path)}")
        else:
            found.add_hub(*_hub_part(item, split, text_column))
    is_set = [] if layout == AS_FOUND else [[layout.delimiter, layout.encoding]]
    description = json.dumps([found.marks, text_column, sample_by, *is_set, *([on_corrupt] if skips else [])])
    name, fingerprint = f"{', '.join(map(str, sources))} (split {split!r})", hashlib.sha256(description.encode())
    files = tuple(found.files) if len(found.files) == len(found.parts) else ()
    return Texts(name, fingerprint.hexdigest(), tuple(found.parts), found.num_bytes, tuple(found.marks), files)


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
    return (
        is_pattern(item)
        or item.startswith(("/", ".", "~"))
        or item.count("/") > 1
        or "\\" in item
        or suffix_of(Path(item)) in SUFFIXES
    )


def _paths(item: str, split: str) -> list[Path]:
    """The files of a source, in order; those of URLs are fetched."""
    if is_url(item):
        return [fetched(url) for url in matching_urls(item, SUFFIXES)]
    path = Path(item).expanduser()
    if path.exists() or not is_pattern(item):
        return _files(path, split)
    return [file for found in matching_files(item, SUFFIXES, option="source") for file in _files(found, split)]


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


def _hub_part(item: str, split: str, text_column: str) -> tuple[Callable[[], Iterator[str]], str]:
    import datasets  # slow to import, and only needed here

    name, _, config = item.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError) as error:
        raise UserError(
            f"source={item!r} is no file or folder here, and loading its split {split!r} from the Hub failed: {error}"
        ) from error
    check_column(text_column, rows.column_names, item)
    return partial(_read_rows, rows.select_columns([text_column]), text_column, item), f"{item} {rows._fingerprint}"


def _read_rows(rows: Any, text_column: str, where: str) -> Iterator[str]:
    for batch in rows.iter(batch_size=ROWS_PER_READ):
        for value in batch[text_column]:
            yield checked_text(value, text_column, where)
