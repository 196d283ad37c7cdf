"""JSON lines that are too long to be held: their long strings are decoded piece by piece into a file on the disk.

What is left, the line with a name in the place of each of them, is read as any other line, so that the same faults are
found.  It is held: a line of many numbers or short strings needs memory in proportion to them.
"""

import codecs
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

LONG_LINE = 1 << 22  # characters
LONG_STRING = 1 << 16  # characters of a string as it is written, before it goes to the disk
PART = 1 << 18  # characters that are read at a time
UNIT = r'[^"\\]+|\\u[0-9a-fA-F]{4}|\\[^u]'
UNITS = re.compile(f"(?:({UNIT}))*")  # the group is the last one of them
FIRST_OF_PAIR = re.compile(r"\\u[dD][89abAB]")
ESCAPE = 6  # characters of a \uXXXX


@dataclass(frozen=True)
class LongString:
    """A string in a file of UTF-8 from `start` to `end`; `fault` says why it is no Unicode, if it is not."""

    file: BinaryIO
    start: int
    end: int
    fault: str = ""

    def pieces(self) -> Iterator[str]:
        """Raises: UnicodeDecodeError, where the file holds other bytes."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        self.file.seek(self.start)
        while block := self.file.read(min(PART, self.end - self.file.tell())):
            yield decoder.decode(block)
        decoder.decode(b"", final=True)


class LineReader:
    """Takes a line apart: `rest` is the line with short names for its long strings, which `strings` has by name.

    Of a string without an end, `rest` has the quote that opens it: the fault is found there.
    """

    def __init__(self, spool: BinaryIO):
        self.spool, self.strings = spool, dict[str, LongString]()
        self.mark = os.urandom(8).hex()  # no text of the line is taken for a name
        self.outside: list[str] = []
        self.held: list[str] = []  # of a string that is not long yet
        self.num_held, self.start, self.fault = 0, -1, ""
        self.ahead, self.is_inside = "", False  # text that needs the next part, and whether it is of a string

    @property
    def rest(self) -> str:
        return "".join(self.outside)

    def read(self, part: str) -> None:
        """Raises: json.JSONDecodeError for a long string that is not one of JSON."""
        text, place = self.ahead + part, 0
        while place < len(text):
            if self.is_inside:
                end = self._inside(text, place)
                if end == place and self.is_inside:  # an escape that goes on in the next part
                    break
            else:
                quote = text.find('"', place)
                end = len(text) if quote < 0 else quote + 1
                self.outside.append(text[place:end])
                self.is_inside = quote >= 0
            place = end
        self.ahead = text[place:]

    def _inside(self, text: str, place: int) -> int:
        """Take what is certain of a string; up to where."""
        found = UNITS.match(text, place)
        assert found is not None
        end, last = found.end(), found.group(1) or ""
        if text[end : end + 1] == '"':
            self._take(text[place:end])
            self._close()
            return end + 1
        if len(text) - end >= ESCAPE:
            raise json.JSONDecodeError("Invalid \\uXXXX escape", "", 0)
        if FIRST_OF_PAIR.match(last):  # the other half may follow
            end -= len(last)
        self._take(text[place:end])
        return end

    def _take(self, text: str) -> None:
        self.held.append(text)
        self.num_held += len(text)
        if self.start < 0 and self.num_held <= LONG_STRING:
            return
        if self.start < 0:
            self.start = self.spool.seek(0, os.SEEK_END)
        value: str = json.loads(f'"{"".join(self.held)}"')
        try:
            self.spool.write(value.encode())
        except UnicodeEncodeError as error:
            self.fault = self.fault or f"{error.reason}, U+{ord(value[error.start]):04X}"
        self.held, self.num_held = [], 0

    def _close(self) -> None:
        self.is_inside = False
        if self.start < 0:
            self.outside += [*self.held, '"']
        else:
            name = f"{self.mark}-{len(self.strings)}"
            self.outside += [name, '"']
            self.strings[name] = LongString(self.spool, self.start, self.spool.tell(), self.fault)
        self.held, self.num_held, self.start, self.fault = [], 0, -1, ""
