"""From texts to one array of ids, by the fastest engine whose ids are those of `tokenizers`.  For worker processes.

`fastokens` (an extra) is used where it reads the tokenizer and agrees with `tokenizers` on a sample of every shard;
its ids come as bytes.  `tokenizers` hands out lists of Python integers, which become an array piece by piece.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

CHECKED_CHARACTERS = 1 << 17  # of the beginning of each shard, by both engines
CHECKED_LATER = 1 << 12  # of each batch after the first
ENGINES = ("fastokens", "tokenizers")
WRONG_IDS = "fastokens gives other ids than tokenizers on this text; tokenizers is used, which is slower"
Ids = tuple[np.ndarray, np.ndarray]  # ids of all texts, uint32, and where each begins, and the end: int64


class WrongIds(Exception):
    """The fast engine gives other ids than `tokenizers`."""


class Encoder:
    """Ids of texts without special tokens; text that spells one is read as ordinary characters.

    `engine` is the one that is used, `problem` why it is not the fast one ("" if nothing is amiss).
    """

    def __init__(self, tokenizer_json: str, *, engine: str = "fastokens"):
        self.exact = Tokenizer.from_str(tokenizer_json)
        self.exact.encode_special_tokens = True
        self.exact.no_truncation()
        self.exact.no_padding()
        self.fast: Any
        self.fast, self.problem = _fast_engine(tokenizer_json) if engine == "fastokens" else (None, "")
        self.is_checked = False

    @property
    def engine(self) -> str:
        return ENGINES[self.fast is None]

    def encode(self, texts: Sequence[str]) -> Ids:
        """Raises: WrongIds if the fast engine disagrees on a sample."""
        if self.fast is None:
            return self._exactly(texts)
        self._check(texts)
        ids, offsets = self.fast.encode_batch_flat(list(texts), add_special_tokens=False, split_special_tokens=True)
        return np.frombuffer(ids, "<u4"), np.frombuffer(offsets, "<u8").astype(np.int64)

    def _check(self, texts: Sequence[str]) -> None:
        left = CHECKED_LATER if self.is_checked else CHECKED_CHARACTERS
        sample: list[str] = []
        for text in texts:
            sample.append(text[:left])
            left -= len(text)
            if left <= 0:
                break
        wanted, _ = self._exactly(sample)
        found, _ = self.fast.encode_batch_flat(sample, add_special_tokens=False, split_special_tokens=True)
        if wanted.tobytes() != found:
            raise WrongIds
        self.is_checked = True

    def _exactly(self, texts: Sequence[str]) -> Ids:
        found = self.exact.encode_batch_fast(list(texts), add_special_tokens=False)
        arrays = [np.array(encoding.ids, "<u4") for encoding in found]
        ends = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
        return np.concatenate(arrays) if arrays else np.empty(0, "<u4"), ends


def _fast_engine(tokenizer_json: str) -> tuple[Any, str]:
    """An encoder of fastokens and "", or None and why there is none."""
    try:
        import fastokens
    except ImportError:
        return None, ""
    facts = json.loads(tokenizer_json)
    facts["truncation"] = facts["padding"] = None
    try:
        return fastokens.Tokenizer.from_json_str(json.dumps(facts)), ""
    except BaseException as error:  # a panic of its Rust code is a BaseException
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return None, f"fastokens cannot read this tokenizer ({str(error)[:100]}); tokenizers is used, which is slower"
