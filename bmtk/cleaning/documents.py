"""The ends of a stage: documents from the files of a corpus, and documents between stages and at last."""

import gzip
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from bmtk.data.corpus_files import CorpusFile, pieces_of
from bmtk.files import replacing

from .record import Record

SECONDS = 20  # between two lines about a shard
ROWS = 1024  # of a batch of Parquet
BETWEEN = "jsonl.gz"  # format of documents between stages


class ReadCorpus(PipelineStep):
    """Reads the files of a shard, and records what could not be read.

    `id` is the name of the file, the first byte or row group of a part, and the number of the document there.
    """

    type, name = "reader", "corpus files"

    def __init__(self, shards: list[tuple[CorpusFile, ...]], folder: Path, num_examples: int):
        super().__init__()
        self.shards, self.folder, self.num_examples = shards, folder, num_examples

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        record, last, count = Record(self.num_examples), time.monotonic(), 0
        for file in self.shards[rank]:
            name = Path(file.path).name + (f"@{file.span[0]}" if file.span else "")
            for number, text in enumerate(_documents(file, record.unreadable), 1):
                yield Document(text, f"{name}/{number}")
                count += 1
                if time.monotonic() > last + SECONDS:
                    sys.stderr.write(f"  shard {rank + 1:,} of {len(self.shards):,}: {count:,} documents so far\n")
                    last = time.monotonic()
        record.save(self.folder, rank)


def _documents(file: CorpusFile, on_bad: Callable[[str], None]) -> Iterator[str]:
    parts: list[str] = []
    for text, ends in pieces_of(file, on_bad):
        parts.append(text)
        if ends:
            yield "".join(parts)
            parts = []


class WriteDocuments(PipelineStep):
    """Writes a shard, whole or not at all, and hands its documents on.

    datatrove's writers put the time into a gzip file, so that no two runs give the same bytes, and leave a file
    half there when they are killed.
    """

    type, name = "writer", "documents"

    def __init__(self, folder: Path, format: str = BETWEEN):
        super().__init__()
        self.folder, self.format = folder, format

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        with replacing(self.folder / f"{rank:05}.{self.format}") as path:
            with closing(_Parquet(path) if self.format == "parquet" else _JsonLines(path)) as rows:
                for doc in data:
                    rows.write({"text": doc.text, "id": doc.id, "language": doc.metadata.get("language", "")})
                    yield doc


class ReadDocuments(PipelineStep):
    """Reads what `WriteDocuments` has written between stages."""

    type, name = "reader", "documents"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        with gzip.open(self.folder / f"{rank:05}.{BETWEEN}", "rt", encoding="utf-8", newline="\n") as lines:
            for line in lines:
                row = json.loads(line)
                yield Document(row["text"], row["id"], metadata={"language": row.get("language", "")})


class _JsonLines:
    def __init__(self, path: Path):
        self.file = path.open("wb")
        self.packed = gzip.GzipFile("", "wb", 6, self.file, mtime=0)  # no name and no time: the same bytes again

    def write(self, row: dict[str, str]) -> None:
        row = {name: value for name, value in row.items() if value}
        self.packed.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    def close(self) -> None:
        self.packed.close()
        self.file.close()


class _Parquet:
    def __init__(self, path: Path):
        import pyarrow.parquet  # slow to import, and only needed here

        self.pyarrow = pyarrow
        self.schema = pyarrow.schema([(name, pyarrow.string()) for name in ("text", "id", "language")])
        self.file = pyarrow.parquet.ParquetWriter(path, self.schema, compression="zstd")
        self.rows: list[dict[str, str]] = []

    def write(self, row: dict[str, str]) -> None:
        self.rows.append(row)
        if len(self.rows) == ROWS:
            self._flush()

    def _flush(self) -> None:
        self.file.write_table(self.pyarrow.Table.from_pylist(self.rows, self.schema))
        self.rows = []

    def close(self) -> None:
        if self.rows:
            self._flush()
        self.file.close()
