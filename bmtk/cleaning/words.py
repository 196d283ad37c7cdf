"""Words and sentences of any language without a model, and how they are hashed.

datatrove's tokenizers need spaCy for English and for languages without one of their own, and other packages or
downloads for the rest.  Its rules only count words and compare runs of them, for which what stands between spaces is
enough, and in scripts that are written without spaces single characters.
"""

import regex
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
LETTERS = rf"[\p{{L}}\p{{M}}\p{{N}}--[{UNSPACED}]]"
# A character of such a script with its marks; a word, with apostrophes and hyphens inside; any other character.
WORD = regex.compile(rf"(?V1)[{UNSPACED}]\p{{M}}*+|{LETTERS}++(?:['’-]{LETTERS}++)*+|\S")
# The end of a sentence: marks and closing quotes, before a space; those of Chinese and Japanese need no space.
SENTENCE_END = regex.compile(r"[.!?…]+[\"'”’)\]]*+(?=\s|$)|[。！？]+[”’」』）]*+|\n+")


def hashes() -> HashConfig:
    """64 bits of SHA-1: datatrove's default, xxhash, takes no strings from its version 4 on, which we have."""
    return HashConfig(precision=64, hash_fc="sha1")


class Words(WordTokenizer):
    """Stands for a language wherever datatrove asks for one."""

    def word_tokenize(self, text: str) -> list[str]:
        return WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return [sentence for first, last in self.span_tokenize(text) if (sentence := text[first:last].strip())]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """The first character of each sentence and the one after its last; white space belongs to what follows it."""
        spans, first = [], 0
        for last in (*(match.end() for match in SENTENCE_END.finditer(text)), len(text)):
            if text[first:last].strip():
                spans.append((first, last))
                first = last
        return spans

    # datatrove keeps the words of the last texts by (text, language): all of these are one language.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Words)

    def __hash__(self) -> int:
        return hash(Words)
