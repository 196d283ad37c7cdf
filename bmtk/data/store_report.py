"""A token store in words: what it holds, how it is packed, samples of it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from bmtk.errors import UserError
from bmtk.files import read_json

from .best_fit import BestFitRows
from .mixture import MIXTURE, Mixture
from .token_store import TOKENIZER, TokenStore

SAMPLE_TOKENS = 60
SHOWN = 70  # characters of a document
MOST_SOURCES = 40


def stores_in(folder: Path) -> list[Path]:
    """The store `folder`, or those of the folder of a corpus or a run.  Raises: UserError if there are none."""
    for parent in (folder, folder / "corpus"):
        found = [parent] if (parent / "manifest.json").is_file() else sorted(parent.glob("*/manifest.json"))
        if found:
            return [path.parent if path.name == "manifest.json" else path for path in found]
    raise UserError(f"{folder} holds no token store; `bmtk prepare --config FILE` writes one to <output_dir>/corpus")


def report(directory: Path, *, context_length: int, num_samples: int, seed: int = 0) -> str:
    """Counts, sources, packing, the longest documents and sample rows of a store."""
    store, path = TokenStore(directory), directory / TOKENIZER
    decoder = Tokenizer.from_file(str(path)) if path.is_file() else None
    parts = [_counts(store), _sources(store), _packing(store, context_length), _longest(store, decoder)]
    if num_samples:
        parts.append(_samples(store, decoder, context_length, np.random.default_rng(seed), num_samples))
    return "\n\n".join("\n".join(lines) for lines in map(list, parts) if lines) + "\n"


def mixture_report(folder: Path, *, context_length: int) -> str:
    """The corpora that are mixed in training, in an epoch of as many rows as they have; "" if there is one."""
    facts = read_json(folder / MIXTURE)
    if not isinstance(facts, list) or not all((folder / one["store"] / "manifest.json").is_file() for one in facts):
        return ""
    names = [one["store"] for one in facts]
    sizes = [rows_of(TokenStore(folder / name), context_length) for name in names]
    mixture = Mixture(names, [one["weight"] for one in facts], sizes, [one["repeat"] for one in facts])
    num_rows = min(mixture.num_rows, mixture.limit or mixture.num_rows)
    head = f"mixture, in the first {num_rows:,} rows of {context_length} tokens:"
    return "\n  ".join([head, *mixture.described(num_rows)]) + "\n"


def rows_of(store: TokenStore, context_length: int) -> int:
    return -(-(store.num_tokens - 1) // context_length)


def _counts(store: TokenStore) -> Iterator[str]:
    size, tokens = store.tokens.dtype.itemsize, max(1, store.num_tokens)
    yield f"{store.directory}"
    rows = {
        "documents": f"{store.num_documents:,}",
        "tokens": f"{store.num_tokens:,} of {size} bytes, in {store.num_shards} shard{'s' * (store.num_shards != 1)}",
        "text": f"{store.num_bytes / 1e6:,.1f} MB, {store.num_bytes / tokens:.2f} bytes a token",
        "tokenizer": store.tokenizer_fingerprint[:16],
        "corpus": store.source_fingerprint[:16],
    }
    yield from (f"  {name:12}{value}" for name, value in rows.items())
    if store.left_out:
        yield f"  {'left out':12}{store.left_out:,} rows or ends of files that could not be read:"
        yield from (f"    {line}" for line in store.faults)


def _sources(store: TokenStore) -> Iterator[str]:
    if not store.sources:
        return
    yield f"{'source':44}{'documents':>12}{'tokens':>16}{'share':>8}{'bytes a token':>15}"
    for source in store.sources[:MOST_SOURCES]:
        name, tokens = source["name"], source["tokens"]
        name = name if len(name) <= 42 else f"...{name[-39:]}"
        share, density = tokens / max(1, store.num_tokens), source["bytes"] / max(1, tokens)
        yield f"{name:44}{source['documents']:>12,}{tokens:>16,}{share:>8.1%}{density:>15.2f}"
    if len(store.sources) > MOST_SOURCES:
        yield f"... and {len(store.sources) - MOST_SOURCES:,} more"


def _packing(store: TokenStore, length: int) -> Iterator[str]:
    rows = rows_of(store, length)
    pads = rows * length - (store.num_tokens - 1)
    places = np.asarray(store.offsets[:], np.int64)
    divided = int(((places[:-1] // length) != ((places[1:] - 1) // length)).sum())
    yield f"in rows of {length} tokens: {rows:,} rows"
    yield f"  {'padding':12}{pads:,} tokens ({pads / max(1, rows * length):.3%}), at the end of the last row"
    yield f"  {'divided':12}{divided:,} of {store.num_documents:,} documents lie in more than one row"
    yield f"  {'best_fit':12}{BestFitRows(store, length, is_kept=False).described}"


def _longest(store: TokenStore, decoder: Tokenizer | None, count: int = 5) -> Iterator[str]:
    lengths = np.diff(np.asarray(store.offsets[:], np.int64))
    yield "longest documents:"
    for place in np.argsort(-lengths, kind="stable")[:count]:
        beginning = _text(store.document(int(place))[1 : 1 + SAMPLE_TOKENS], decoder)
        yield f"  document {place:,}: {lengths[place]:,} tokens, {beginning}"


def _samples(
    store: TokenStore, decoder: Tokenizer | None, length: int, draw: np.random.Generator, count: int
) -> Iterator[str]:
    rows = rows_of(store, length)
    yield "sample rows:"
    for row in sorted(draw.choice(rows, min(count, rows), replace=False).tolist()):
        yield f"  row {row:,}: {_text(store.tokens[row * length : (row + 1) * length][:SAMPLE_TOKENS], decoder)}"


def _text(ids: np.ndarray, decoder: Tokenizer | None) -> str:
    if decoder is None:
        return " ".join(map(str, ids[:12].tolist()))
    text = decoder.decode(ids.tolist(), skip_special_tokens=False)
    return repr(text[:SHOWN]) + (" ..." if len(text) > SHOWN else "")
