"""What a folder of data holds.  Hidden files are no data; what is not read is counted in a note."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# What systems put beside people's files, besides names that begin with a point.
SYSTEM_NAMES = {"__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir", "$RECYCLE.BIN", "lost+found"}
DOCUMENTS = {".md", ".rst", ".pdf", ".html"}  # beside data, they are about the data
DOCUMENT_NAMES = {"readme", "license", "licence", "citation", "notice", "checksums", "sha256sums", "md5sums"}
SHOWN = 6  # names or suffixes of a note


@dataclass(frozen=True)
class Listing:
    """The files in and below a folder, by name, and the hidden ones: how many files are in each that was found."""

    folder: Path
    files: tuple[Path, ...]
    hidden: dict[str, int] = field(default_factory=dict)

    @property
    def hidden_note(self) -> str:
        """The hidden names that were left out, in a sentence; those of a single point file are too usual."""
        odd = {name: count for name, count in self.hidden.items() if name not in (".DS_Store", ".gitattributes")}
        if not odd:
            return ""
        names = [f"{name} ({count:,} files)" if count > 1 else name for name, count in odd.items()]
        return f"{self.folder}: hidden files and folders are left out: {_some(names)}"

    def left_out_note(self, read: Sequence[Path], kind: str) -> str:
        """The files that are neither read nor documents, counted by suffix; nothing if there are none."""
        known = set(read)
        left = [path for path in self.files if path not in known and not _is_document(path)]
        counts = Counter(path.suffix.lower() or "without a suffix" for path in left).most_common()
        if not counts:
            return ""
        kinds = _some([f"{count:,} {suffix}" for suffix, count in counts])
        files = "1 file is" if len(left) == 1 else f"{len(left):,} files are"
        return f"{self.folder} is read as a folder of {kind}; {files} left out: {kinds} (the first: {left[0].name})"


def list_folder(folder: Path) -> Listing:
    """Every visible file below a folder.  Links are followed, each folder is entered once."""
    hidden: Counter[str] = Counter()
    seen: set[str] = set()
    return Listing(folder, tuple(sorted(_walk(folder, hidden, seen))), dict(sorted(hidden.items())))


def visible_files(folder: Path, is_wanted: Callable[[Path], bool] = lambda path: True) -> list[Path]:
    """Those files in and below a folder that are wanted, by name; none of them hidden or in a hidden folder."""
    return [path for path in list_folder(folder).files if is_wanted(path)]


def _walk(folder: Path, hidden: Counter[str], seen: set[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name in SYSTEM_NAMES:
            is_appledouble = path.name.startswith("._")  # a Mac writes one beside each file of an archive
            name = "._*" if is_appledouble else path.name
            hidden[name] += sum(len(names) for _, _, names in os.walk(path)) if path.is_dir() else 1
        elif path.is_dir():
            yield from _walk(path, hidden, seen)
        elif path.is_file():
            yield path


def _is_document(path: Path) -> bool:
    return path.suffix.lower() in DOCUMENTS or path.stem.lower().split(".")[0] in DOCUMENT_NAMES


def _some(words: Sequence[str]) -> str:
    return ", ".join(words[:SHOWN]) + (", ..." if len(words) > SHOWN else "")
