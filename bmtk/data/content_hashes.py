"""What a data set holds, as one SHA-256 a file or folder: the same however Parquet and PNG were compressed."""

import hashlib
import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from bmtk.files import sha256

ROWS_PER_READ = 256


def content_hash(path: Path) -> str:
    """Of the bytes of a text file; of the rows of a Parquet file; of names and bytes of the files in a folder."""
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()} {sha256(file)}\n".encode())
        return digest.hexdigest()
    if path.suffix != ".parquet":
        return sha256(path)
    digest = hashlib.sha256()
    for row in _rows(path):
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as table:
        for batch in table.iter_batches(batch_size=ROWS_PER_READ):
            for row in batch.to_pylist():
                yield {name: _plain(name, value) for name, value in row.items()}


def _plain(column: str, value: Any) -> Any:
    """An image as a hash of its pixels, other files as one of their bytes."""
    if not isinstance(value, dict) or "bytes" not in value:
        return value
    content = value["bytes"]
    if column == "image":
        from PIL import Image

        with Image.open(BytesIO(content)) as image:
            pixels = image.convert("RGBA")
            content = b"%d %d " % pixels.size + pixels.tobytes()
    return hashlib.sha256(content).hexdigest()
