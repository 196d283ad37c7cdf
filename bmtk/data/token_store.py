"""A corpus as token ids on disk: written once, then memory-mapped.

A store is a folder of three files. `tokens.bin` holds the ids of all documents end to end, each as bos + text + eos;
`offsets.bin` the place of every document's first token, and the end of the last; `manifest.json` what they are.
While it is being written it stands beside its final place, in `<directory>.partial`.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from bmtk.errors import UserError
from bmtk.files import flush, move_folder, sha256, write_json

from .sources import Texts, text_fingerprint
from .tokenizers import has_newline_cuts, pieces, tokenizer_fingerprint

FORMAT = 1
OFFSET = np.dtype("<i8")
BATCH_CHARACTERS = 1 << 22  # characters tokenised at a time; progress is saved after each batch
REMEDY = "delete the folder and build the store again"
logger = logging.getLogger(__name__)


class TokenStore:
    """A finished store, opened in O(1): sizes are checked, contents are not (see `verify`).

    `tokens` (num_tokens,) uint16 or uint32 and `offsets` (num_documents + 1,) int64 are memory maps; `num_bytes` is
    the size of the texts in UTF-8, for bits per byte.
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
        self.tokens = np.memmap(self.directory / "tokens.bin", manifest["dtype"], mode="r")
        self.offsets = np.memmap(self.directory / "offsets.bin", OFFSET, mode="r")

    def __reduce__(self) -> tuple[type["TokenStore"], tuple[Path]]:
        return TokenStore, (self.directory,)  # a process that receives the store maps the files anew

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document, with its bos and eos."""
        return self.tokens[int(self.offsets[index]) : int(self.offsets[index + 1])]

    def verify(self) -> None:
        """Read everything and compare it with the manifest. Raises: UserError naming the file that differs."""
        for name, facts in _read_manifest(self.directory)["files"].items():
            if sha256(self.directory / name) != facts["sha256"]:
                raise UserError(f"{self.directory / name} is damaged: its sha256 is not the manifest's; {REMEDY}")


def build_token_store(
    texts: Texts | Sequence[str], tokenizer: PreTrainedTokenizerBase, directory: str | Path
) -> TokenStore:
    """Tokenise `texts` into `directory`, or open what is there if it came from the same texts and tokenizer.

    Text that spells a special token is tokenised as ordinary characters. An interrupted build is
    resumed; another store in the folder is replaced; processes that call this at once wait for the first.
    Raises: UserError if there is no document, or the tokenizer has neither bos nor eos token; FileExistsError if
    `directory` holds something other than a store.
    """
    directory = Path(directory)
    identity = {
        "format": FORMAT,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "source_fingerprint": text_fingerprint(texts),
    }
    if store := _open_if_same(directory, identity):
        return store
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_name(f".{directory.name}.lock")):
        if store := _open_if_same(directory, identity):  # another process built it meanwhile
            return store
        partial = directory.with_name(f"{directory.name}.partial")
        try:
            _write_store(texts, tokenizer, partial, identity)
        except ValueError:  # corrected texts have another fingerprint, so this part could never be resumed
            shutil.rmtree(partial, ignore_errors=True)
            raise
        move_folder(partial, directory)
        (directory / "progress.json").unlink()
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


def _open_if_same(directory: Path, identity: dict[str, Any]) -> TokenStore | None:
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
    if all(manifest.get(key) == value for key, value in identity.items()):
        return TokenStore(directory)
    logger.info("%s was made from other texts or with another tokenizer; building it again", directory)
    return None


def _write_store(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, folder: Path, identity: dict[str, Any]
) -> None:
    bos, eos = _document_ends(tokenizer)
    encode = _document_encoder(tokenizer)
    dtype = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with closing(_Writer(folder, identity, dtype)) as writer:
        for batch in _batches(islice(texts, writer.num_documents, None)):
            writer.append([[bos, *ids, eos] for ids in encode(batch)], sum(len(text.encode()) for text in batch))
            logger.info("tokenised %d documents, %d tokens", writer.num_documents, writer.num_tokens)
        if writer.num_documents == 0:
            raise UserError("cannot store an empty corpus; give at least one document")
        writer.finish(pad_token_id=pad)


def _document_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Ids of the tokens around a document; a tokenizer with one of the two uses it for both."""
    ends = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    if not ends:
        raise UserError("the tokenizer has neither bos nor eos token; set one of them: it separates documents")
    return ends[0], ends[-1]


def _document_encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[list[int]]]:
    """A function from texts to ids without special tokens, on all cores; `tokenizer` itself is not changed."""
    if not tokenizer.is_fast:
        return lambda texts: tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    cut = pieces if has_newline_cuts(tokenizer) else lambda text: [text]

    def encode(texts: list[str]) -> list[list[int]]:
        cuts = [list(cut(text)) for text in texts]
        encoded = iter(backend.encode_batch_fast([piece for c in cuts for piece in c], add_special_tokens=False))
        return [[i for _ in c for i in next(encoded).ids] for c in cuts]

    return encode


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of documents with about BATCH_CHARACTERS characters together."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Writer:
    """Appends documents to an unfinished store, and resumes one that was interrupted.

    What `progress.json` counts is flushed to the disk before it is counted; later bytes are cut off on resume.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], dtype: np.dtype):
        self.folder, self.dtype = folder, dtype
        self.counts = {**identity, "num_documents": 0, "num_tokens": 0, "num_bytes": 0}
        found = _read_progress(folder / "progress.json")
        if all(found.get(key) == value for key, value in identity.items()):
            self.counts = found
            logger.info("resuming after %d documents that are already tokenised", self.num_documents)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        self.tokens = self._open("tokens.bin", self.num_tokens * dtype.itemsize)
        self.offsets = self._open("offsets.bin", self.num_documents * OFFSET.itemsize)

    @property
    def num_documents(self) -> int:
        return self.counts["num_documents"]

    @property
    def num_tokens(self) -> int:
        return self.counts["num_tokens"]

    def _open(self, name: str, size: int) -> BinaryIO:
        file = (self.folder / name).open("ab")
        file.truncate(size)
        return file

    def append(self, documents: list[list[int]], num_bytes: int) -> None:
        lengths = np.array([len(ids) for ids in documents], OFFSET)
        ends = self.num_tokens + np.cumsum(lengths)
        self.offsets.write((ends - lengths).astype(OFFSET).tobytes())
        self.tokens.write(np.array([i for ids in documents for i in ids], self.dtype).tobytes())
        for file in (self.tokens, self.offsets):
            file.flush()
            flush(Path(file.name))
        self.counts["num_documents"] += len(documents)
        self.counts["num_tokens"] = int(ends[-1])
        self.counts["num_bytes"] += num_bytes
        write_json(self.folder / "progress.json", self.counts)

    def finish(self, *, pad_token_id: int) -> None:
        self.offsets.write(np.array([self.num_tokens], OFFSET).tobytes())
        files = {}
        for file in (self.tokens, self.offsets):
            file.flush()
            path = Path(file.name)
            files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
        facts = {"dtype": self.dtype.str, "pad_token_id": pad_token_id, "files": files}
        write_json(self.folder / "manifest.json", {**self.counts, **facts})

    def close(self) -> None:
        self.tokens.close()
        self.offsets.close()


def _read_progress(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
