"""Which rows are the same: fingerprints of what a model would read of them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset


def fingerprints(rows: Dataset, columns: Sequence[str]) -> list[bytes]:
    """A hash of each row's values in `columns`; files are read, so a copy under another name counts as the same."""
    values = (rows[column] for column in columns)
    return [_hash(row) for row in zip(*values, strict=True)]


def _hash(values: Sequence[object]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        content = _content(value)
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.digest()


def _content(value: object) -> bytes:
    if isinstance(value, dict) and {"bytes", "path"} <= value.keys():  # an image or a recording that is not decoded
        return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
    return json.dumps(value, default=str, ensure_ascii=False).encode("utf-8", "surrogatepass")
