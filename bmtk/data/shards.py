"""One shard of a token store: written batch by batch, resumed after a kill, and the same bytes whoever writes it.

`tokens*.bin` holds the ids of its documents end to end, each as bos + text + eos; `offsets*.bin` where each document
that begins in it has its first token, and the number of its tokens; `shard*.json` the counts, once it is finished.
A worker process imports tokenizers and numpy, and neither torch nor transformers.
"""

import dataclasses
import fcntl
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bmtk.errors import UserError
from bmtk.files import flush, read_json, sha256, write_json

from .corpus_files import CorpusFile, Piece, pieces_of
from .encoders import WRONG_IDS, Encoder, Ids, WrongIds
from .text_cuts import cut_pieces

OFFSET = np.dtype("<i8")
MOST_FAULTS = 20  # of a shard that are listed; all are counted
COUNTS = ("documents", "tokens", "bytes")
PlacedPiece = tuple[str, bool, int]  # text, whether the document ends, number of the source


class Encodes(Protocol):
    """What turns texts into ids."""

    def encode(self, texts: Sequence[str]) -> Ids: ...


@dataclass(frozen=True)
class Layout:
    """How a store is written: ids around documents, bytes of an id, characters of a piece (0: never cut) and batch."""

    bos: int
    eos: int
    dtype: str
    piece_characters: int
    batch_characters: int


@dataclass(frozen=True)
class ShardJob:
    """A shard to be written into `folder` from files; `digests` are of their content."""

    folder: str
    number: int
    files: tuple[CorpusFile, ...]
    digests: tuple[str, ...]
    layout: Layout
    identity: str  # of tokenizer and format
    engine: str = "fastokens"

    @property
    def mark(self) -> str:
        """What a shard that is found must have been made from; paths are no part of it, as a corpus may be moved."""
        files = [list(dataclasses.asdict(file).values())[1:] for file in self.files]
        layout = [self.layout.bos, self.layout.eos, self.layout.dtype]
        return hashlib.sha256(json.dumps([self.identity, files, self.digests, layout]).encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> "ShardJob":
        facts = json.loads(text)
        files = [CorpusFile(**{**file, "span": file["span"] and tuple(file["span"])}) for file in facts["files"]]
        facts |= {"files": tuple(files), "digests": tuple(facts["digests"]), "layout": Layout(**facts["layout"])}
        return ShardJob(**facts)


def shard_name(kind: str, number: int, suffix: str = ".bin") -> str:
    """The first shard of a store has plain names, as stores had that were written in one piece."""
    return f"{kind}-{number:05}{suffix}" if number else f"{kind}{suffix}"


def finished_shard(folder: Path, number: int, mark: str) -> dict[str, Any] | None:
    """What is known of a shard that is whole and made from what `mark` names."""
    facts = read_json(folder / shard_name("shard", number, ".json"))
    if not isinstance(facts, dict) or facts.get("mark") != mark:
        return None
    sizes = {name: file["size"] for name, file in facts["files"].items()}
    is_whole = all((folder / name).is_file() and (folder / name).stat().st_size == sizes[name] for name in sizes)
    return facts if is_whole else None


def write_files(job: ShardJob, encoder: Encodes, on_progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Write the shard of `job`, or find it; `on_progress` gets (bytes of text, tokens) after each batch."""
    faults = Faults()
    sources = [partial(pieces_of, file, faults.add) for file in job.files]
    is_inside = not job.files[0].begins
    with closing(ShardWriter(Path(job.folder), job.number, job.layout, job.mark)) as writer:
        if found := writer.finished():
            return found
        writer.write(sources, encoder, on_progress, is_inside=is_inside)
        return writer.finish(faults)


@dataclass
class Faults:
    """What was left out of a shard."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, message: str) -> None:
        self.count += 1
        if len(self.first) < MOST_FAULTS:
            self.first.append(message)


class ShardWriter:
    """Appends documents to an unfinished shard, and resumes one that was interrupted.

    What `progress*.json` counts is flushed to the disk before it is counted; later bytes are cut off on resume.
    """

    def __init__(self, folder: Path, number: int, layout: Layout, mark: str):
        self.folder, self.number, self.layout, self.mark = folder, number, layout, mark
        self.dtype = np.dtype(layout.dtype)
        folder.mkdir(exist_ok=True)
        self.tokens = (folder / shard_name("tokens", number)).open("ab")
        self.offsets = (folder / shard_name("offsets", number)).open("ab")
        # A worker whose parent was killed may still be writing its last batch.
        fcntl.flock(self.tokens, fcntl.LOCK_EX)
        self.progress = folder / shard_name("progress", number, ".json")
        found = read_json(self.progress)
        found = found if isinstance(found, dict) and found.get("mark") == mark else {}
        self.sources: list[list[int]] = found.get("sources", [])  # COUNTS of each source so far
        self.place: int = found.get("place", 0)  # of the source that is being read
        self.num_ends: int = found.get("num_ends", 0)  # documents of it that have ended
        self.num_tokens = sum(counts[1] for counts in self.sources)
        self.num_documents = sum(counts[0] for counts in self.sources)

    def finished(self) -> dict[str, Any] | None:
        return finished_shard(self.folder, self.number, self.mark)

    def write(
        self,
        sources: Sequence[Callable[[], Iterator[Piece]]],
        encoder: Encodes,
        on_progress: Callable[[int, int], None],
        *,
        is_inside: bool = False,
    ) -> None:
        """Add the documents of `sources`, without those that are there; `is_inside` a document begun elsewhere."""
        self.tokens.truncate(self.num_tokens * self.dtype.itemsize)
        self.offsets.truncate(self.num_documents * OFFSET.itemsize)
        self.sources = self.sources or [[0] * len(COUNTS) for _ in sources]
        is_inside = is_inside and not self.num_tokens  # progress is noted where documents end
        stream = self._stream(sources, is_resumed=self.num_tokens > 0)
        for batch in _batches(stream, self.layout.batch_characters):
            self._append(batch, encoder, is_inside=is_inside)
            is_inside = not batch[-1][1]
            on_progress(sum(counts[2] for counts in self.sources), self.num_tokens)

    def _stream(self, sources: Sequence[Callable[[], Iterator[Piece]]], *, is_resumed: bool) -> Iterator[PlacedPiece]:
        """The pieces that are not written yet, each with the number of its source."""
        size = self.layout.piece_characters
        for place, source in enumerate(sources):
            stream = source()
            if is_resumed and place <= self.place:  # what is written is read again, and its faults are found again
                ends = self.num_ends if place == self.place else None
                for _ in islice((end for _, end in stream if end), ends):
                    pass
            for text, end in cut_pieces(stream, size) if size else _joined(stream):
                yield text, end, place

    def _append(self, batch: list[PlacedPiece], encoder: Encodes, *, is_inside: bool) -> None:
        texts, ends = [text for text, _, _ in batch], np.array([end for _, end, _ in batch])
        ids, bounds = encoder.encode(texts)
        begins = np.concatenate([[not is_inside], ends[:-1]])
        marks = np.stack([begins, ends], axis=1)  # whether bos stands before, eos after a piece
        places = np.stack([bounds[:-1], bounds[1:]], axis=1)[marks]
        kinds = np.tile([self.layout.bos, self.layout.eos], (len(batch), 1))[marks]
        tokens = np.insert(ids, places, kinds).astype(self.dtype, copy=False)
        added = np.cumsum(marks.sum(axis=1))  # bos and eos up to the end of each piece
        starts = self.num_tokens + (bounds[:-1] + added - marks.sum(axis=1))[begins]
        self.tokens.write(tokens.data)
        self.offsets.write(starts.astype(OFFSET).data)
        self._count(batch, begins, np.diff(bounds) + marks.sum(axis=1))
        if ends[-1]:  # else a resume would begin within a document
            self._flush()
            facts = {"mark": self.mark, "sources": self.sources, "place": self.place, "num_ends": self.num_ends}
            write_json(self.progress, facts)

    def _count(self, batch: list[PlacedPiece], begins: np.ndarray, lengths: np.ndarray) -> None:
        for (text, end, place), begin, length in zip(batch, begins.tolist(), lengths.tolist(), strict=True):
            counts = self.sources[place]
            counts[0] += begin
            counts[1] += length
            counts[2] += utf8_size(text)
            self.num_ends = end + (self.num_ends if place == self.place else 0)
            self.place = place
        self.num_documents += int(begins.sum())
        self.num_tokens += int(lengths.sum())

    def _flush(self) -> None:
        for file in (self.tokens, self.offsets):
            file.flush()
            flush(Path(file.name))

    def finish(self, faults: Faults | None = None) -> dict[str, Any]:
        self.offsets.write(np.array([self.num_tokens], OFFSET).tobytes())
        self._flush()
        files = {}
        for file in (self.tokens, self.offsets):
            path = Path(file.name)
            files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
        counts = dict(zip(COUNTS, map(sum, zip(*self.sources, strict=True)), strict=True))
        facts = {"mark": self.mark, **counts, "sources": self.sources, "files": files}
        if faults and faults.count:
            facts |= {"left_out": faults.count, "faults": faults.first}
        write_json(self.folder / shard_name("shard", self.number, ".json"), facts)
        self.progress.unlink(missing_ok=True)
        return facts

    def close(self) -> None:
        self.tokens.close()
        self.offsets.close()


def utf8_size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _joined(stream: Iterator[Piece]) -> Iterator[Piece]:
    """Whole documents, for a tokenizer that may read across any cut."""
    parts: list[str] = []
    for text, ends in stream:
        parts.append(text)
        if ends:
            yield "".join(parts), True
            parts = []
    if parts:
        yield "".join(parts), False


def _batches(pieces: Iterator[PlacedPiece], size: int) -> Iterator[list[PlacedPiece]]:
    """Lists of pieces with about `size` characters together."""
    batch: list[PlacedPiece] = []
    held = 0
    for piece in pieces:
        batch.append(piece)
        held += len(piece[0])
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


# ------------------------------------------------------------------------------------------------------ processes


def write_shard(job: ShardJob, tokenizer_json: str, on_progress: Callable[[int, int], None]) -> dict[str, Any]:
    """`write_files` by the fast engine, or, from the beginning of the shard, by `tokenizers` where that disagrees.

    The facts have a "note" about an engine that was not used.
    """
    encoder = Encoder(tokenizer_json, engine=job.engine)
    try:
        facts = write_files(job, encoder, on_progress)
    except WrongIds:
        (Path(job.folder) / shard_name("progress", job.number, ".json")).unlink(missing_ok=True)
        return {**write_files(job, Encoder(tokenizer_json, engine="tokenizers"), on_progress), "note": WRONG_IDS}
    return {**facts, "note": encoder.problem}


def main() -> None:
    """Write the shards whose jobs are lines of standard input; a line of standard output for each event."""
    tokenizer_json = Path(json.loads(sys.stdin.readline())).read_text(encoding="utf-8")
    for line in sys.stdin:
        job = ShardJob.from_json(line)

        def tell(kind: str, value: object, number: int = job.number) -> None:
            sys.stdout.write(json.dumps([number, kind, value]) + "\n")
            sys.stdout.flush()

        try:
            facts = write_shard(job, tokenizer_json, lambda done, tokens: tell("progress", [done, tokens]))
            tell("done", facts)
        except UserError as error:
            tell("refused", str(error))
