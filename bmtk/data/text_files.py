"""Text as it lies on disk: compressed or not, in whatever encoding, with errors that name the line and the byte."""

import bz2
import codecs
import gzip
import io
import logging
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from bmtk.errors import UserError

COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
# What compressed files begin with: names say less, as servers and browsers unpack files and keep their names.
MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
NO_TEXT = {
    b"PK\x03\x04": "it is a zip archive or an Excel workbook; unpack it, or save the sheet as CSV",
    b"PAR1": "it is a Parquet file; let its name end in .parquet",
}
# The first four bytes of UTF-32 begin as UTF-16 does: the longer marks come first.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
OFFERED = ("windows-1252", "gbk", "big5", "shift_jis", "euc-kr", "windows-1251")  # where a file is not UTF-8
NAMED_DELIMITERS = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}
HEAD_BYTES = 4096
AROUND = 12  # characters that are shown on either side of a byte
UTF8 = ("utf-8", "utf8", "utf-8-sig")
DAMAGED = re.compile("[\udc80-\udcff]")  # how "surrogateescape" writes bytes that are not UTF-8
logger = logging.getLogger(__name__)
Span = tuple[int, int]  # bytes of a file that is not compressed: the first, and the one after the last
SURE = 3  # characters beyond ASCII
PIECE = 1 << 16  # bytes of a line, which may be the whole file, by which encodings are tried


@dataclass(frozen=True)
class TableFormat:
    """How text tables are written, as far as it is set; the rest is found in each file."""

    delimiter: str | None = None  # one character, or its name
    encoding: str | None = None

    def __post_init__(self) -> None:
        if self.delimiter is not None and (len(self.character) != 1 or self.character in '"\n\r'):
            raise UserError(
                f"delimiter={self.delimiter!r} is not a single character; give one such as ';', or a name: "
                f"{', '.join(name for name in NAMED_DELIMITERS if name.isalpha())}"
            )
        if self.encoding is not None:
            try:
                is_of_text = codecs.lookup(self.encoding)._is_text_encoding
            except LookupError:
                is_of_text = False
            if not is_of_text:
                raise UserError(
                    f"encoding={self.encoding!r} is unknown; give a name such as utf-8, utf-16, {', '.join(OFFERED)}"
                )

    @property
    def character(self) -> str:
        """The delimiter; empty if it is to be found."""
        return NAMED_DELIMITERS.get(self.delimiter or "", self.delimiter or "")


class Unreadable(Exception):
    """Why a file is not what its name says; whoever opened it makes a UserError of `sentence`."""

    def __init__(self, reason: str, line: int | None = None):
        super().__init__(reason if line is None else f"line {line}: {reason}")
        self.reason, self.line = reason, line

    def sentence(self, path: Path, kind: str) -> str:
        """`kind` is what the file should be."""
        return f"{path} is not {kind} ({self})"


class BadRow(Unreadable):
    """Why one row of a file that is of the right kind cannot be used."""

    def sentence(self, path: Path, kind: str) -> str:
        return f"{path}, {self}" if self.line else f"{path}: {self}"


def suffix_of(path: Path) -> str:
    """The suffix in lower case, without that of a compression: ".csv" of "Rows.CSV.gz"."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED_SUFFIXES else suffix


def is_compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return _compression(file.read(HEAD_BYTES)) is not None


class _Stretch(io.RawIOBase):
    """Some bytes of a file."""

    def __init__(self, path: Path, span: Span):
        self.file = path.open("rb")
        self.file.seek(span[0])
        self.left = span[1] - span[0]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self.file.read(min(len(buffer), self.left))
        buffer[: len(piece)] = piece
        self.left -= len(piece)
        return len(piece)

    def close(self) -> None:
        self.file.close()
        super().close()


@contextmanager
def opened_bytes(path: Path, span: Span | None = None) -> Iterator[BinaryIO]:
    """The unpacked content.  Raises: Unreadable, also while it is read, for a damaged archive."""
    if span is not None:
        with io.BufferedReader(_Stretch(path, span), 1 << 20) as stretch:
            yield cast(BinaryIO, stretch)
        return
    with path.open("rb") as file:
        kind = _compression(file.read(HEAD_BYTES))
    try:
        with _unpacked(path, kind) as content:
            yield content
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise Unreadable(f"the compressed file ({kind}) is damaged: {error}") from error
    except OSError as error:
        if kind is None or error.errno is not None:  # of the disk, not of an archive
            raise
        raise Unreadable(f"the compressed file ({kind}) is damaged: {error}") from error


@contextmanager
def opened_text(
    path: Path,
    encoding: str | None = None,
    *,
    newline: str | None = "",
    span: Span | None = None,
    marks_faults: bool = False,
) -> Iterator[TextIO]:
    """The text of a file.  A byte-order mark decides its encoding, else `encoding`, else it is UTF-8.

    `newline` is that of `open`; only the bytes of `span` are read, if it is given, and lines are counted from there.
    With `marks_faults`, bytes that are not UTF-8 become what `is_damaged` finds.
    Raises: Unreadable, also while it is read, that names the line and the byte.
    """
    with opened_bytes(path) as content:
        head = content.read(HEAD_BYTES if encoding is None else PIECE)
    known = found_encoding(head, encoding)
    refuse_other_kinds(head[:HEAD_BYTES], known)
    if known == encoding and _is_surely_utf8(head) and not codecs.lookup(known).name.startswith("utf-8"):
        _warn_of_utf8(path, encoding)
    if span is not None and span[0]:
        known = known.replace("-sig", "")
    try:
        errors = "surrogateescape" if marks_faults and known in UTF8 else "strict"
        with opened_bytes(path, span) as content, io.TextIOWrapper(content, known, errors, newline) as text:
            yield text
    except UnicodeDecodeError as error:
        raise _place_of_fault(path, known, error, span) from error


def _is_surely_utf8(head: bytes) -> bool:
    """Whether the beginning of a file is UTF-8 with several characters beyond ASCII: by chance no other text is."""
    if head.isascii():
        return False
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return sum(character > "\x7f" for character in text) >= SURE


@cache
def _warn_of_utf8(path: Path, encoding: str) -> None:
    """Once a process: a file is opened several times."""
    logger.warning(
        "%s reads as UTF-8 without a fault, but encoding=%s is set: if letters look wrong, leave encoding out",
        path,
        encoding,
    )


def is_damaged(text: str) -> bool:
    return not text.isascii() and DAMAGED.search(text) is not None


def found_encoding(head: bytes, encoding: str | None) -> str:
    """That of a byte-order mark at the beginning of a file, else `encoding`, else UTF-8."""
    return next((name for mark, name in MARKS.items() if head.startswith(mark)), encoding) or "utf-8"


def refuse_other_kinds(head: bytes, encoding: str) -> None:
    """Raise Unreadable for what is no text, or text in UTF-16 without a mark, which UTF-8 would read with NULs."""
    reason = next((reason for magic, reason in NO_TEXT.items() if head.startswith(magic)), None)
    if reason:
        raise Unreadable(reason)
    if head.count(0) > len(head) // 4 and not encoding.lower().replace("_", "-").startswith(("utf-16", "utf-32")):
        side = "le" if head[1::2].count(0) >= head[::2].count(0) else "be"
        raise Unreadable(f"every second byte is 0, as in UTF-16 without a byte-order mark: set encoding=utf-16-{side}")


def _compression(head: bytes) -> str | None:
    kind = next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)
    if kind == ".bz2" and head[4:10] not in (b"1AY&SY", b"\x17rE8P\x90"):  # a text may begin with BZh
        return None
    return kind


def _unpacked(path: Path, kind: str | None) -> BinaryIO:
    if kind is None:
        return path.open("rb")
    if kind == ".zst":
        import pyarrow  # slow to import, and only needed here

        class Unpacked(io.RawIOBase):  # what pyarrow opens lacks methods that a TextIOWrapper calls
            source = pyarrow.input_stream(str(path), compression="zstd")

            def readable(self) -> bool:
                return True

            def readinto(self, buffer: Any) -> int:
                piece = self.source.read(len(buffer))
                buffer[: len(piece)] = piece
                return len(piece)

        return cast(BinaryIO, io.BufferedReader(Unpacked()))
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[kind]
    return cast(BinaryIO, opener(path, "rb"))


def _place_of_fault(path: Path, encoding: str, error: UnicodeDecodeError, span: Span | None) -> Unreadable:
    """Where the first byte is that `encoding` does not have, and what the place would be in other encodings."""
    if encoding.lower().replace("_", "-").startswith(("utf-16", "utf-32")):  # lines do not end in one byte
        return Unreadable(f"can't decode it as {encoding} ({error.reason}); set encoding to the right one")
    offset = span[0] if span else 0
    with opened_bytes(path, span) as content:
        for number, line in enumerate(content, 1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError as found:
                byte = f"can't decode 0x{line[found.start]:02x} (byte {offset + found.start + 1:,} of the file)"
                name = "UTF-8" if encoding.startswith("utf-8") else encoding
                return Unreadable(f"{byte} as {name}; {_offer(line, found.start, encoding)}", number)
            offset += len(line)
    return Unreadable(f"can't decode it as {encoding} ({error.reason})")


def _offer(line: bytes, start: int, tried: str) -> str:
    first = max(0, start - PIECE // 2)
    piece, readings = line[first : first + PIECE], []
    for name in OFFERED:
        try:
            text = piece.decode(name)
        except UnicodeDecodeError:
            continue
        place = len(piece[: start - first].decode(name, errors="ignore"))
        readings.append(f"{text[max(0, place - AROUND) : place + AROUND].strip()!r} with --encoding {name}")
    if not readings or not tried.startswith("utf-8"):
        return f"set encoding to the right one ({', '.join(OFFERED)}, ...), or mend the file"
    return f"the place reads {', '.join(readings)}: choose one of them, or another encoding"
