"""Token files of datatrove (.ds with .ds.index) opened as a token store, without copying the tokens."""

import hashlib
import os
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from bmtk.errors import UserError
from bmtk.files import replacing_folder, sha256, write_json, write_text

from .shards import COUNTS, OFFSET, shard_name, utf8_size
from .token_store import FORMAT, TOKENIZER, TokenStore
from .tokenizers import tokenizer_fingerprint

DECODED = 1000  # documents at a time
DTYPES = {2: "<u2", 4: "<u4"}  # datatrove takes four bytes where two do not hold the vocabulary


def store_of_datatrove(source: Path, directory: Path, tokenizer: PreTrainedTokenizerBase) -> TokenStore:
    """Make the token store `directory` of a .ds file, or of those in a folder, that `tokenizer` has encoded.

    Tokens are linked where the file system can.  They are decoded once, in order to count bytes of text, which bits
    per byte need.  Raises: UserError for files that are damaged or of another tokenizer.
    """
    files = sorted(source.glob("**/*.ds")) if source.is_dir() else [source]
    if not files:
        raise UserError(f"{source} holds no .ds file; datatrove's DocumentTokenizer writes them")
    with replacing_folder(directory) as folder:
        shards = [_shard(file, number, folder, tokenizer) for number, file in enumerate(files)]
        if len(dtypes := {dtype for facts in shards if (dtype := facts.pop("dtype"))}) > 1:
            raise UserError(f"the .ds files in {source} have tokens of 2 and of 4 bytes; make a store of each kind")
        write_text(folder / TOKENIZER, tokenizer.backend_tokenizer.to_str())
        sources = [
            {"name": str(file), **{name: facts[name] for name in COUNTS}}
            for file, facts in zip(files, shards, strict=True)
        ]
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        manifest = {
            "format": FORMAT,
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
            "source_fingerprint": hashlib.sha256(" ".join(facts["mark"] for facts in shards).encode()).hexdigest(),
            **{f"num_{name}": sum(facts[name] for facts in shards) for name in COUNTS},
            "dtype": dtypes.pop() if dtypes else DTYPES[2],
            "pad_token_id": pad or 0,
            "files": {name: file for facts in shards for name, file in facts["files"].items()},
            "sources": sources,
            "shards": shards,
        }
        write_json(folder / "manifest.json", manifest, indent=1)
    return TokenStore(directory)


def _shard(source: Path, number: int, folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Put a .ds file into `folder` as a shard; the facts of it, as a manifest has them."""
    offsets, dtype = _documents(source)
    paths = [folder / shard_name(kind, number) for kind in ("tokens", "offsets")]
    _link(source, paths[0])
    offsets.tofile(paths[1])
    tokens = np.memmap(source, dtype, mode="r") if source.stat().st_size else np.empty(0, DTYPES[2])
    if len(tokens) and tokens.max() >= len(tokenizer):
        raise UserError(f"{source} has the id {tokens.max()}, and the tokenizer {len(tokenizer)}: it is another one")
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in paths}
    counts = [len(offsets) - 1, len(tokens), _num_bytes(tokens, offsets, tokenizer)]
    mark = "".join(str(file["sha256"]) for file in files.values())
    return {
        "mark": mark,
        **dict(zip(COUNTS, counts, strict=True)),
        "sources": [counts],
        "files": files,
        "dtype": dtype,
    }


def _documents(source: Path) -> tuple[np.ndarray, str]:
    """Where documents begin, and the end of the last; the type of the tokens."""
    index = source.with_name(f"{source.name}.index")
    if not index.is_file():
        raise UserError(
            f"{index} is missing: without it nobody knows where documents end; tokenise with save_index=True"
        )
    ends = np.fromfile(index, "<u8").astype(OFFSET)
    size, num_tokens = source.stat().st_size, int(ends[-1]) if len(ends) else 0
    width = size // max(1, num_tokens)
    if num_tokens * width != size or (size and width not in DTYPES) or np.any(np.diff(ends, prepend=0) < 0):
        raise UserError(
            f"{source} has {size:,} bytes, and {index.name} speaks of {num_tokens:,} tokens: one is damaged"
        )
    return np.concatenate([[0], ends]).astype(OFFSET), DTYPES.get(width, "")  # "": it has no token


def _num_bytes(tokens: np.ndarray, offsets: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> int:
    documents = (tokens[a:b].tolist() for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    total = 0
    while batch := list(islice(documents, DECODED)):
        total += sum(map(utf8_size, tokenizer.batch_decode(batch, skip_special_tokens=True)))
    return total


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or a file system without hard links
        shutil.copyfile(source, target)
