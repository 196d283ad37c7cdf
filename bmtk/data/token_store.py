"""A corpus as token ids on disk: written once, then memory-mapped.

A store is a folder of shards and `manifest.json`, which says what they are.  A shard is a file of ids and a file of
the places where documents begin (see `shards`); all of them are read as if they were one, so that how a corpus is
divided changes nothing.  While it is being written a store stands beside its final place, in `<directory>.partial`.
"""

import bisect
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from bmtk.errors import UserError
from bmtk.files import move_folder, read_json, sha256, write_json, write_text

from . import tokenizers
from .encoders import WRONG_IDS, Encoder, Ids, WrongIds
from .shard_plan import Group, plan_shards
from .shards import COUNTS, OFFSET, Encodes, Layout, ShardJob, ShardWriter, finished_shard, shard_name, write_shard
from .sources import Texts, text_fingerprint
from .store_progress import Progress
from .tokenizers import has_newline_cuts, tokenizer_fingerprint
from .workers import default_workers, write_in_processes

FORMAT = 2
READ_FORMATS = (1, FORMAT)  # 1 had one shard, of the same bytes
BATCH_CHARACTERS = 1 << 22  # characters tokenised at a time; progress is saved after each batch
SMALL_BYTES = 1 << 23  # of text: less is tokenised before a worker process has started
TOKENIZER = ".tokenizer.json"  # of a store: what its ids mean
REMEDY = "delete the folder and build the store again"
logger = logging.getLogger(__name__)


class TokenStore:
    """A finished store, opened in O(1): sizes are checked, contents are not (see `verify`).

    `tokens` (num_tokens,) uint16 or uint32 and `offsets` (num_documents + 1,) int64 are memory maps, or `Joined` ones;
    `num_bytes` is the size of the texts in UTF-8, for bits per byte.
    Raises: FileNotFoundError if there is no store; UserError if it is damaged.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        manifest = _read_manifest(self.directory)
        self.num_tokens: int = manifest["num_tokens"]
        self.num_documents: int = manifest["num_documents"]
        self.num_bytes: int = manifest["num_bytes"]
        self.pad_token_id: int = manifest["pad_token_id"]
        self.tokenizer_fingerprint: str = manifest["tokenizer_fingerprint"]
        self.source_fingerprint: str = manifest["source_fingerprint"]
        self.sources: list[dict[str, Any]] = manifest.get("sources", [])  # name and COUNTS of each file
        self.left_out: int = manifest.get("left_out", 0)  # rows and ends of files that could not be read
        self.faults: list[str] = manifest.get("faults", [])  # the first of these, in words
        self.num_shards = len(manifest.get("shards", [None]))
        tokens = [self._map("tokens", number, manifest["dtype"]) for number in range(self.num_shards)]
        offsets = [self._map("offsets", number, OFFSET) for number in range(self.num_shards)]
        self.tokens: Any = tokens[0] if self.num_shards == 1 else Joined(tokens)
        self.offsets: Any = offsets[0] if self.num_shards == 1 else _joined_offsets(tokens, offsets)

    def _map(self, kind: str, number: int, dtype: Any) -> np.ndarray:
        path = self.directory / shard_name(kind, number)
        if not path.stat().st_size:  # a shard without a visible character; an empty file cannot be mapped
            return np.empty(0, dtype)
        return np.memmap(path, dtype, mode="r")

    def __reduce__(self) -> tuple[type["TokenStore"], tuple[Path]]:
        return TokenStore, (self.directory,)  # a process that receives the store maps the files anew

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document, with its bos and eos."""
        return self.tokens[int(self.offsets[index]) : int(self.offsets[index + 1])]

    def starts(self, first: int, last: int) -> np.ndarray:
        """Where documents begin among the tokens [first, last), as distances from `first`.

        The end of the last document counts as a beginning: that of the padding.
        """
        if isinstance(self.offsets, Joined):
            places = self.offsets.between(first, last)
        else:
            begin, end = np.searchsorted(self.offsets, (first, last))
            places = self.offsets[begin:end]
        return places - first

    def verify(self) -> None:
        """Read everything and compare it with the manifest. Raises: UserError naming the file that differs."""
        for name, facts in _read_manifest(self.directory)["files"].items():
            if sha256(self.directory / name) != facts["sha256"]:
                raise UserError(f"{self.directory / name} is damaged: its sha256 is not the manifest's; {REMEDY}")


class Joined:
    """Several arrays read as one, without copying more than is asked for; `added` is what their values lack."""

    def __init__(self, parts: Sequence[np.ndarray], added: Sequence[int] | None = None):
        self.parts = list(parts)
        self.added = list(added) if added else [0] * len(parts)
        self.ends = np.cumsum([len(part) for part in self.parts]).tolist()
        self.dtype = self.parts[0].dtype

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            place = range(len(self))[index]
            return self[place : place + 1][0]
        start, stop, step = index.indices(len(self))
        part = bisect.bisect_right(self.ends, start)
        found = []
        while start < stop and part < len(self.parts):
            begin = self.ends[part] - len(self.parts[part])
            found.append(self._values(part, start - begin, stop - begin))
            start, part = self.ends[part], part + 1
        joined = found[0] if len(found) == 1 else np.concatenate([np.empty(0, self.dtype), *found])
        return joined[::step] if step != 1 else joined

    def _values(self, part: int, first: int, last: int) -> np.ndarray:
        values = self.parts[part][first:last]
        return values + self.added[part] if self.added[part] else values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def astype(self, dtype: Any) -> np.ndarray:
        return np.asarray(self, dtype)

    def tolist(self) -> list[int]:
        return self[:].tolist()

    def between(self, first: int, last: int) -> np.ndarray:
        """Of values that rise, those in [first, last)."""
        found = []
        for part in range(max(0, bisect.bisect_right(self.added, first) - 1), len(self.parts)):
            if self.added[part] >= last:
                break
            begin, end = np.searchsorted(self.parts[part], (first - self.added[part], last - self.added[part]))
            found.append(self._values(part, begin, end))
        return np.concatenate(found)


def _joined_offsets(tokens: Sequence[np.ndarray], offsets: Sequence[np.ndarray]) -> Joined:
    """Places in the whole store; the ends of all shards but the last are no beginnings."""
    before = np.cumsum([0, *map(len, tokens)])[:-1].tolist()
    return Joined([*(part[:-1] for part in offsets[:-1]), offsets[-1]], before)


def build_token_store(
    texts: Texts | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    *,
    workers: int | None = None,
    log: Callable[[str], None] = logger.info,
) -> TokenStore:
    """Tokenise `texts` into `directory`, or open what is there if it came from the same texts and tokenizer.

    Text that spells a special token is tokenised as ordinary characters. An interrupted build is resumed at its shard;
    shards of another store in the folder are used again where they hold the same, and the rest of it is replaced;
    processes that call this at once wait for the first. Files are tokenised by `workers` processes (default: one for
    each processor; 0: in this one); `log` is called with lines of progress.
    Raises: UserError if there is no document, or the tokenizer has neither bos nor eos token; FileExistsError if
    `directory` holds something other than a store.
    """
    directory = Path(directory)
    identity = {
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "source_fingerprint": text_fingerprint(texts),
    }
    if store := _open_if_same(directory, identity):
        return store
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_name(f".{directory.name}.lock")):
        if store := _open_if_same(directory, identity):  # another process built it meanwhile
            return store
        build = _Build(texts, tokenizer, directory, identity, log)
        if not build.is_finished():
            build.write(default_workers() if workers is None else workers)
        build.clean()
        move_folder(build.partial, directory)
    return TokenStore(directory)


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / "manifest.json"
    if not path.exists():
        raise FileNotFoundError(f"{directory} holds no token store: there is no {path.name}; build it first")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: it is not the manifest of a token store; {REMEDY}") from error
    for name, facts in files.items():
        file = directory / name
        found = file.stat().st_size if file.exists() else None
        if found != facts["size"]:
            raise UserError(f"{file} is damaged: it has {found} bytes, the manifest says {facts['size']}; {REMEDY}")
    return manifest


def _open_if_same(directory: Path, identity: dict[str, str]) -> TokenStore | None:
    """The store in `directory` if it is whole and has this identity; None if one may be written there."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return None
    if not (directory / "manifest.json").exists():
        raise FileExistsError(f"{directory} holds something that is not a token store; name another folder")
    try:
        manifest = _read_manifest(directory)
    except ValueError as error:
        logger.warning("%s; building it again", error)
        return None
    is_known = manifest.get("format") in READ_FORMATS
    if is_known and all(manifest.get(key) == value for key, value in identity.items()):
        return TokenStore(directory)
    logger.info("%s was made from other texts or with another tokenizer; building it again", directory)
    return None


class _Build:
    """A store that is being written into `partial`."""

    def __init__(
        self,
        texts: Texts | Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        directory: Path,
        identity: dict[str, str],
        log: Callable[[str], None],
    ):
        self.texts, self.tokenizer, self.directory, self.identity = texts, tokenizer, directory, identity
        self.partial = directory.with_name(f"{directory.name}.partial")
        self.progress = Progress(log)
        self.has_cuts = has_newline_cuts(tokenizer)
        bos, eos = _document_ends(tokenizer)
        self.pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # Two bytes suffice for ids below 65,536; little-endian, whatever the machine, so that a store can be moved.
        dtype = "<u2" if len(tokenizer) <= 1 << 16 else "<u4"
        self.layout = Layout(bos, eos, dtype, tokenizers.PIECE_CHARACTERS if self.has_cuts else 0, BATCH_CHARACTERS)

    def is_finished(self) -> bool:
        """Whether only the last move is missing."""
        manifest = read_json(self.partial / "manifest.json")
        return isinstance(manifest, dict) and all(manifest.get(key) == value for key, value in self.identity.items())

    def write(self, workers: int) -> None:
        self.partial.mkdir(exist_ok=True)
        (self.partial / "manifest.json").unlink(missing_ok=True)
        files = self.texts.files if isinstance(self.texts, Texts) and self.tokenizer.is_fast else ()
        try:
            shards = self._write_files(workers) if files else [self._write_texts()]
            if not sum(facts["documents"] for facts in shards):
                raise self.texts.emptiness if isinstance(self.texts, Texts) else _emptiness()
        except ValueError:  # finished shards are kept: those of the corrected corpus are the same
            if not any(self.partial.glob("shard*.json")) or _is_empty(self.partial):
                shutil.rmtree(self.partial, ignore_errors=True)
            raise
        self._finish(shards)

    # ------------------------------------------------------------------------------------------------ from files

    def _write_files(self, workers: int) -> list[dict[str, Any]]:
        """Write the shards of files, in this process if there is little to do; the facts of each, in order."""
        (self.partial / TOKENIZER).write_text(self.tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
        groups = self._plan()
        jobs = [self._job(number, group) for number, group in enumerate(groups)]
        found = {job.number: facts for job in jobs if (facts := finished_shard(self.partial, job.number, job.mark))}
        sizes = {job.number: sum(unit.size for unit in group) for job, group in zip(jobs, groups, strict=True)}
        left = [job for job in jobs if job.number not in found]
        self.progress.start(sizes, found)

        def on_event(number: int, kind: str, value: Any) -> None:
            if kind == "done":
                found[number] = value
            self.progress.update(number, kind, value)

        is_small = sum(sizes[job.number] for job in left) < SMALL_BYTES
        if workers == 0 or is_small or len(left) < 2:
            text = (self.partial / TOKENIZER).read_text(encoding="utf-8")
            for job in left:
                update = self.progress.of_shard(job.number)
                on_event(job.number, "done", write_shard(job, text, update))
        else:
            write_in_processes(left, self.partial / TOKENIZER, workers=workers, on_event=on_event)
        self.progress.finish()
        return [found[number] for number in range(len(jobs))]

    def _job(self, number: int, group: Group, folder: Path | None = None) -> ShardJob:
        files, digests = tuple(unit.file for unit in group), tuple(unit.digest for unit in group)
        mark = self.identity["tokenizer_fingerprint"]
        return ShardJob(str(folder or self.partial), number, files, digests, self.layout, mark)

    def _plan(self) -> list[Group]:
        """The shards; those that the former store has already are put into this one."""
        assert isinstance(self.texts, Texts)
        former = self._former_shards()
        pairs = list(zip(self.texts.files, self.texts.marks, strict=True))
        groups = plan_shards(
            pairs,
            has_cuts=self.has_cuts,
            is_kept=lambda group: self._job(0, group).mark in former,
            kept_sizes=sorted({len(facts["sources"]) for _, facts in former.values()}, reverse=True),
        )
        for number, group in enumerate(groups):
            mark = self._job(number, group).mark
            if mark in former and not finished_shard(self.partial, number, mark):
                self._take_over(number, *former[mark])
        return groups

    def _former_shards(self) -> dict[str, tuple[int, dict[str, Any]]]:
        try:
            shards = _read_manifest(self.directory).get("shards", [])
        except (FileNotFoundError, ValueError):
            return {}
        return {facts["mark"]: (number, facts) for number, facts in enumerate(shards)}

    def _take_over(self, number: int, former: int, facts: dict[str, Any]) -> None:
        files = {}
        for kind in ("tokens", "offsets"):
            name, before = shard_name(kind, number), shard_name(kind, former)
            (self.partial / name).unlink(missing_ok=True)
            _link(self.directory / before, self.partial / name)
            files[name] = facts["files"][before]
        write_json(self.partial / shard_name("shard", number, ".json"), {**facts, "files": files})

    # ------------------------------------------------------------------------------------------------ from memory

    def _write_texts(self) -> dict[str, Any]:
        """One shard of what is no file (a list, the Hub, a part of a corpus), in this process."""
        if not self.tokenizer.is_fast:
            return self._write_with(_SlowEncoder(self.tokenizer))
        text = self.tokenizer.backend_tokenizer.to_str()
        write_text(self.partial / TOKENIZER, text)
        encoder = Encoder(text)
        if encoder.problem:
            self.progress.log(f"note: {encoder.problem}")
        try:
            return self._write_with(encoder)
        except WrongIds:
            (self.partial / shard_name("progress", 0, ".json")).unlink(missing_ok=True)
            self.progress.log(f"note: {WRONG_IDS}")
            return self._write_with(Encoder(text, engine="tokenizers"))

    def _write_with(self, encoder: Encodes) -> dict[str, Any]:
        mark = json.dumps(self.identity)
        texts = self.texts
        source = texts.pieces if isinstance(texts, Texts) else lambda: ((t, True) for t in texts if t.strip() or t)
        with closing(ShardWriter(self.partial, 0, self.layout, mark)) as writer:
            if found := writer.finished():
                return found
            if writer.num_documents:
                logger.info("resuming after %d documents that are already tokenised", writer.num_documents)
            writer.write([source], encoder, self.progress.of_shard(0))
            return writer.finish()

    # ------------------------------------------------------------------------------------------------ the end

    def _finish(self, shards: list[dict[str, Any]]) -> None:
        """Write the manifest."""
        totals = {name: sum(facts[name] for facts in shards) for name in COUNTS}
        logger.info("tokenised %d documents, %d tokens", totals["documents"], totals["tokens"])
        manifest = {
            "format": FORMAT,
            **self.identity,
            **{f"num_{name}": count for name, count in totals.items()},
            "dtype": self.layout.dtype,
            "pad_token_id": self.pad,
            "files": {name: file for facts in shards for name, file in facts["files"].items()},
            "sources": self._sources(shards),
            "shards": [{key: facts[key] for key in ("mark", *COUNTS, "sources", "files")} for facts in shards],
        }
        if left_out := sum(facts.get("left_out", 0) for facts in shards):
            manifest |= {
                "left_out": left_out,
                "faults": [line for facts in shards for line in facts.get("faults", [])],
            }
        write_json(self.partial / "manifest.json", manifest, indent=1)

    def clean(self) -> None:
        """Delete what only an unfinished store needs."""
        kept = {"manifest.json", TOKENIZER, *_read_manifest(self.partial)["files"]}
        for path in self.partial.iterdir():
            if path.name not in kept:
                path.unlink()

    def _sources(self, shards: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """COUNTS of each file, those of its parts together."""
        if not (isinstance(self.texts, Texts) and self.texts.files):
            return []
        found: dict[str, list[int]] = {}
        groups = self._plan()
        for group, facts in zip(groups, shards, strict=True):
            for unit, counts in zip(group, facts["sources"], strict=True):
                held = found.setdefault(unit.file.path, [0, 0, 0])
                found[unit.file.path] = [a + b for a, b in zip(held, counts, strict=True)]
        return [{"name": name, **dict(zip(COUNTS, counts, strict=True))} for name, counts in found.items()]


def _emptiness() -> UserError:
    return UserError("cannot store an empty corpus; give at least one document")


def _is_empty(partial: Path) -> bool:
    facts: Iterator[Any] = (read_json(path) for path in partial.glob("shard*.json"))
    return not sum(found["documents"] for found in facts if isinstance(found, dict))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _document_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Ids of the tokens around a document; a tokenizer with one of the two uses it for both."""
    ends = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    if not ends:
        raise UserError("the tokenizer has neither bos nor eos token; set one of them: it separates documents")
    return ends[0], ends[-1]


class _SlowEncoder:
    """A tokenizer that is written in Python."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> Ids:
        found = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ends = np.cumsum([0, *map(len, found)], dtype=np.int64)
        return np.array([i for ids in found for i in ids], "<u4"), ends
