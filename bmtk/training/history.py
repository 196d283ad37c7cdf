"""history.jsonl: what a run has measured, one JSON object a line, in the order of the steps."""

import errno
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bmtk.files import write_text

logger = logging.getLogger(__name__)


class History:
    """The file `history.jsonl` of a run folder; only the main process may write it."""

    def __init__(self, directory: str | Path):
        self.path = Path(directory) / "history.jsonl"

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line; a number that JSON does not know (nan, inf) becomes null."""
        known = {key: None if _is_unknown(value) else value for key, value in record.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(known, allow_nan=False) + "\n"
        with self.path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                written = file.write(line.encode("utf-8"))
                if written < len(line):  # a disk that has just become full takes a part, and refuses the rest
                    raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
            except OSError:
                file.truncate(before)
                raise

    def read(self) -> list[dict[str, Any]]:
        """Return all whole lines; a line that a kill has cut short is left out with a warning."""
        if not self.path.exists():
            return []
        records = []
        for number, line in enumerate(self.path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                logger.warning("%s: line %d is not whole and is left out", self.path, number)
        return records

    def cut(self, *, after: int) -> None:
        """Drop the lines of steps later than `after`, which a resumed run will write again."""
        if not self.path.exists():
            return
        kept = [record for record in self.read() if record["step"] <= after]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))


def _is_unknown(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
