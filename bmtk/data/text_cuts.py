"""Places where a long text may be cut, so that the ids of its pieces are those of the whole.

A pre-tokenizer that splits by a regular expression is certain to split
- after a newline with a visible character on both sides, and
- between a letter or digit and a space or punctuation mark: a word ends there, and what follows begins anew,
and neither looks back nor ahead from there.  This holds for the expressions named here and for no others: GPT-2's,
GPT-4's, Llama 3's, Qwen2's and ours.  Letters are those of scripts that every version of Unicode knows as letters;
an apostrophe is no place, as "'s" may belong to the word.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .corpus_files import Piece

PIECE_CHARACTERS = 1 << 16  # of a piece, at least
PATIENCE = 16  # pieces: so far newlines are looked for before other places are
LETTERS = (
    "a-zA-Z0-9\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0391-\u03a1\u03a3-\u03c9\u0410-\u044f\u05d0-\u05ea\u0621-\u063a"
    "\u0641-\u064a\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
)
MARKS = (
    r""" ,.;:!?()\[\]{}"\u3001\u3002\uff0c\uff1b\uff1a\uff1f\uff01\u300c\u300d\u300e\u300f\uff08\uff09"""
    r"""\u300a\u300b\u2026"""
)
NEWLINE = r"(?<=\S\n)(?=\S)"
WORD_END = rf"(?<=[{LETTERS}])(?=[{MARKS}])"
NEWLINE_OR_WORD_END = re.compile(f"{NEWLINE}|{WORD_END}")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4 = (  # also Llama 3's; Qwen2's takes one digit at a time
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KNOWN = (GPT2, GPT4, GPT4.replace("{1,3}", ""))


def is_certain(facts: Mapping[str, Any], known: tuple[str, ...]) -> bool:
    """Whether a tokenizer (the JSON of `tokenizers`) splits at these places; `known` are more such expressions."""
    if facts["normalizer"] is not None or any(map(_may_span, facts["added_tokens"])):
        return False
    words = facts["pre_tokenizer"]
    if words is None:
        model = facts["model"]  # a token for each character, unless several unknown ones become one
        return model["type"] == "BPE" and not model["merges"] and not model["fuse_unk"]
    if words["type"] == "ByteLevel":
        return bool(words["use_regex"]) and not words["add_prefix_space"]
    parts = words.get("pretokenizers", []) if words["type"] == "Sequence" else []
    if [part["type"] for part in parts] != ["Split", "ByteLevel"]:
        return False
    split, to_bytes = parts
    is_known = split["pattern"].get("Regex") in (*KNOWN, *known)
    is_plain = not to_bytes["use_regex"] and not to_bytes["add_prefix_space"]
    return is_known and is_plain and split["behavior"] == "Isolated" and not split["invert"]


def _may_span(token: Mapping[str, Any]) -> bool:
    """Whether an added token that texts can spell may hold a cut, or look beyond its ends."""
    if token["special"]:  # texts that spell one are read as ordinary characters
        return False
    is_word = re.fullmatch(r"\w+", token["content"]) is not None
    return not is_word or token["lstrip"] or token["rstrip"] or token["single_word"]


def cut_place(text: str, start: int, size: int, *, known: int = 0) -> int | None:
    """The first place for a cut at or after `start`: after a newline if there is one soon, else at the end of a word.

    The ends of words before `known` were looked at already.
    """
    place = _after_newline(text, start, start + PATIENCE * size)
    if place is not None:
        return place
    found = NEWLINE_OR_WORD_END.search(text, max(start, known))
    return found.start() if found else None


def _after_newline(text: str, first: int, last: int) -> int | None:
    """The first place in [first, last) that the expression NEWLINE finds, many times as fast."""
    place = text.find("\n", max(1, first - 1), last - 1)
    while place >= 0:
        if place + 1 < len(text) and not text[place - 1].isspace() and not text[place + 1].isspace():
            return place + 1
        place = text.find("\n", place + 1, last - 1)
    return None


def pieces(text: str, size: int) -> Iterator[str]:
    """Cut a text into pieces of at least `size` characters, but for the last."""
    start = 0
    while (cut := cut_place(text, start + size, size)) is not None:
        yield text[start:cut]
        start = cut
    yield text[start:]


def cut_pieces(stream: Iterator[Piece], size: int) -> Iterator[Piece]:
    """The same of documents that come in pieces themselves: where these end makes no difference."""
    held, known = "", 0
    enough = (PATIENCE + 1) * size + 1  # beyond it, nothing that follows can move the cut
    for text, ends in stream:
        held = held + text if held else text
        start = 0
        while ends or len(held) - start > enough:
            if (cut := cut_place(held, start + size, size, known=known)) is None:
                known = len(held) - 1  # a text without places for a cut is searched once
                break
            yield held[start:cut], False
            start, known = cut, 0
        if start:
            held, known = held[start:], max(0, known - start)
        if ends:
            yield held, True
            held, known = "", 0
    if held:  # the document goes on in another shard, which begins at a cut
        yield from ((text, False) for text in pieces(held, size))
