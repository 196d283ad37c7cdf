"""How well a tokenizer fits a text: tokens a word, bytes a token, what it does not know, how much of it is used."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from .text_cuts import PIECE_CHARACTERS, pieces

MEASURED_CHARACTERS = 2 << 20  # of each text: enough for three digits
HAN_AND_KANA = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
WORD = re.compile(f"[{HAN_AND_KANA}]|[^\\s{HAN_AND_KANA}]+")
EXPLANATION = """\
  tokens a word    fewer are better; a word is what stands between blanks, and each Han or kana character
  bytes a token    of UTF-8; more are better: a model of the same context length sees more text
  coverage         share of the visible characters that the tokenizer knows; the others become its unknown token
  vocabulary used  share of the vocabulary that occurs in the text; a short text uses little of a large one
  exact            whether decoding gives back the text, character by character"""


@dataclass
class Measures:
    """Counts over one text; what they come to is asked for by name."""

    vocabulary: int
    num_bytes: int = 0
    words: int = 0
    tokens: int = 0
    visible: int = 0  # characters
    unknown: int = 0  # of the visible characters; those of a text where a slow tokenizer had any are not known: -1
    is_exact: bool = True
    used: set[int] = field(default_factory=set)

    @property
    def fertility(self) -> float:
        """Tokens a word."""
        return self.tokens / max(1, self.words)

    @property
    def bytes_a_token(self) -> float:
        return self.num_bytes / max(1, self.tokens)

    @property
    def coverage(self) -> float | None:
        return None if self.unknown < 0 else 1 - self.unknown / max(1, self.visible)

    @property
    def vocabulary_used(self) -> float:
        return len(self.used) / self.vocabulary

    def as_record(self) -> dict[str, object]:
        counts = {name: value for name, value in asdict(self).items() if name not in ("used", "unknown")}
        shares = {"fertility": self.fertility, "bytes_a_token": self.bytes_a_token, "coverage": self.coverage}
        return {**counts, **shares, "vocabulary_used": self.vocabulary_used}


def measure(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Measures:
    """Count over texts, without special tokens; texts that spell one are read as ordinary characters.

    Long texts are encoded in pieces of PIECE_CHARACTERS, cut after lines or words.
    """
    encode = _encoder(tokenizer)
    found = Measures(len(tokenizer))
    for text in texts:
        found.words += sum(1 for _ in WORD.finditer(text))
        for piece in pieces(text, PIECE_CHARACTERS):
            ids, unknown = encode(piece)
            found.num_bytes += len(piece.encode())
            found.tokens += len(ids)
            found.visible += _visible(piece)
            found.unknown = -1 if unknown < 0 or found.unknown < 0 else found.unknown + unknown
            found.used.update(ids)
            found.is_exact = found.is_exact and _decoded(tokenizer, ids) == piece
    return found


def _encoder(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A function from a text to its ids, and how many visible characters are unknown; -1 if it cannot be seen."""
    unknown_id = tokenizer.unk_token_id
    if not tokenizer.is_fast:

        def encode_slowly(text: str) -> tuple[list[int], int]:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return ids, -1 if unknown_id in ids else 0

        return encode_slowly
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()

    def encode(text: str) -> tuple[list[int], int]:
        encoding = backend.encode(text, add_special_tokens=False)
        ids = encoding.ids
        if unknown_id is None or unknown_id not in ids:
            return ids, 0
        spans = {span for token, span in zip(ids, encoding.offsets, strict=True) if token == unknown_id}
        return ids, sum(_visible(text[start:end]) for start, end in spans)

    return encode


def _visible(text: str) -> int:
    return sum(map(len, text.split()))


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def table(measures: Mapping[str, Measures]) -> Iterator[str]:
    """Lines, a text each; then what the columns are."""
    width = max(map(len, ["text", *measures]))
    titles = ("bytes", "words", "tokens", "tokens a word", "bytes a token", "coverage", "vocabulary used", "exact")
    yield "  ".join([f"{'text':{width}}", *(f"{title:>{max(9, len(title))}}" for title in titles)])
    for name, found in measures.items():
        coverage = "not known" if found.coverage is None else f"{found.coverage:.2%}"
        cells = [f"{found.num_bytes:,}", f"{found.words:,}", f"{found.tokens:,}", f"{found.fertility:.2f}"]
        cells += [f"{found.bytes_a_token:.2f}", coverage, f"{found.vocabulary_used:.1%}"]
        cells.append("yes" if found.is_exact else "no")
        yield "  ".join(
            [f"{name:{width}}", *(f"{cell:>{max(9, len(title))}}" for cell, title in zip(cells, titles, strict=True))]
        )
    yield from ("", EXPLANATION)
