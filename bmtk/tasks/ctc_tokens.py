"""The tokens that a CTC model writes: blank, unknown, space, and characters or whole words."""

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, Wav2Vec2CTCTokenizer

BLANK, UNKNOWN, SPACE = "<pad>", "<unk>", "|"
TOKEN_UNITS = ("characters", "words")


class CtcTokens:
    """A CTC tokenizer: `ids` of its characters, or of its words, each of which ends in the space after it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer: Any = tokenizer  # transformers types one id as int | list[int], one text as str | list[str]
        special = set(tokenizer.all_special_tokens)
        self.ids: dict[str, int] = {
            token: index for token, index in tokenizer.get_vocab().items() if token not in special
        }
        self.blank: int = tokenizer.pad_token_id
        self.are_words = any(token.endswith(" ") for token in self.ids)

    def __len__(self) -> int:
        return len(self.tokenizer)

    @property
    def unit(self) -> str:
        """What a token is, in words."""
        return TOKEN_UNITS[self.are_words]

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; the unknown token for what the tokenizer does not have."""
        unknown = self.tokenizer.unk_token_id
        if self.are_words:
            return [self.ids.get(f"{word} ", unknown) for word in text.split()]
        space = self.tokenizer.convert_tokens_to_ids(SPACE)
        return [space if character == " " else self.ids.get(character, unknown) for character in text]

    def decode(self, labels: Iterable[int]) -> str:
        """The text of labels that are already without blanks and repetitions."""
        path = [token for label in labels for token in (label, self.blank)]  # a CTC tokenizer merges repetitions
        return " ".join(self.tokenizer.decode(path).split())

    def unknown_parts(self, texts: Iterable[str]) -> set[str]:
        """Characters or words of the texts that the tokenizer does not have."""
        if self.are_words:
            return {word for text in texts for word in text.split() if f"{word} " not in self.ids}
        return {character for text in texts for character in text if character not in {" ", *self.ids}}


def new_ctc_tokenizer(texts: Sequence[str], *, unit: str) -> Wav2Vec2CTCTokenizer:
    """A tokenizer of the characters or words (`unit`) of `texts`."""
    if unit == "words":
        return ctc_tokenizer(sorted({f"{word} " for text in texts for word in text.split()}))
    return ctc_tokenizer(sorted({character for text in texts for character in text} - {" "}))


def ctc_tokenizer(tokens: Sequence[str]) -> Wav2Vec2CTCTokenizer:
    """Blank, unknown, space and `tokens`, with these ids; it decodes to text without blanks and repetitions."""
    vocabulary = {token: index for index, token in enumerate([BLANK, UNKNOWN, SPACE, *tokens])}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.json"
        path.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        special = {"pad_token": BLANK, "unk_token": UNKNOWN, "word_delimiter_token": SPACE}
        return Wav2Vec2CTCTokenizer(str(path), bos_token=None, eos_token=None, **special)  # type: ignore[no-untyped-call]
