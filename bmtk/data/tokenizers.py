"""Training of tokenizers, their identity, and those that are kept beside a corpus.

`byte_bpe`: byte-level byte-pair encoding, lossless on any text.
Source: Sennrich et al. 2016, arXiv:1508.07909 (BPE); Radford et al. 2019, GPT-2 (on bytes); the split into
words follows GPT-4's (numbers in groups of three, a newline ends a word), with combining marks counted as letters, and
no word longer than about 64 characters.
`unigram`: pieces of bytes with probabilities, of which the likeliest split is taken; lossless on any text, with the
words of `byte_bpe`.  Source: Kudo 2018, arXiv:1804.10959.
`wordpiece`: words and marks as BERT divides them, long words in parts ("##ing"); blanks and ends of lines are lost.
Source: Devlin et al. 2019, arXiv:1810.04805.
`bytes`: one token per byte of UTF-8, lossless on any text.
`char`: one token per Unicode character, lossless on the characters it was trained on.
`word`: what stands between blanks is a token, and so is the end of a line; for text that is already tokenised.
`uncased_word`: lower-cased words, punctuation marks and Han characters, a token each; for classifiers of small data.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from bmtk.errors import UserError
from bmtk.files import read_json, replacing_folder, write_json

from . import text_cuts

logger = logging.getLogger(__name__)

TRAINED_ON = "trained_on.json"  # beside a kept tokenizer: how it was made, and its fingerprint
END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"
MASK = "<mask>"
NUM_BYTES = 256
WITHIN_WORD = "##"  # how WordPiece marks a part of a word that is not its first
BYTE_KINDS = ("byte_bpe", "unigram", "bytes")  # they know every text: no token stands for what is unknown
CUT_KINDS = (*BYTE_KINDS, "char")  # whose texts may be cut at the places of `text_cuts`
WORDS = "|".join(  # repeats are bounded: the time to train is quadratic in the length of one word
    [
        r"'(?i:[sdmt]|ll|ve|re)",  # English contractions
        r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]{1,64}",  # letters, with the space or quote before them
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{M}\p{N}]{1,64}[\r\n]{0,64}",  # punctuation, with the ends of line after it
        r"\s{0,64}[\r\n]{1,64}",
        r"\s{1,64}(?!\S)",  # all blanks but the last, which belongs to the word after them
        r"\s{1,64}",
    ]
)
LINES_OF_WORDS = r"\n|\S+"
UNCASED_WORDS = r"\p{Han}|[^\s\p{P}\p{S}\p{Han}]+|[\p{P}\p{S}]"
SCORE_DIGITS = 6  # after the point, of the logarithms of Unigram's probabilities
PIECE_CHARACTERS = text_cuts.PIECE_CHARACTERS


def train_tokenizer(
    texts: Iterable[str],
    *,
    kind: str,
    vocab_size: int,
    lower_case: bool = False,
    adds_end: bool = False,
    with_mask: bool = False,
    special_tokens: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """Train a tokenizer whose special token `<|endoftext|>` (id 0) is bos, eos and pad.

    `kind` is "byte_bpe" or "unigram" (at most `vocab_size` tokens; fewer if the text has no more pairs or pieces),
    "bytes" (256, in the order of their values), "char" (a token per character), "wordpiece", "word" or "uncased_word"
    (the most frequent ones); those that do not read bytes have `<unk>` for what is not in their vocabulary. With
    `lower_case` every text is read in lower case, with `adds_end` every text ends with `<|endoftext|>`; `with_mask`
    adds `<mask>`, as `mask_token` makes it, and `special_tokens` are more that no text is split into. The result
    depends on the texts only, not on the number of threads.
    Raises: UserError for an unknown kind, no text at all, a special token that is blank or there twice, or a
    `vocab_size` below what the kind needs.
    """
    check_kind(kind)
    _check_special(special_tokens)
    mask = [mask_token(words_hold_blanks=kind in ("byte_bpe", "unigram"))] if with_mask else []
    special = [_special(END_OF_TEXT), *mask, *map(_special, special_tokens)]
    tokenizer = KINDS[kind](map(str.lower, texts) if lower_case else texts, vocab_size, special)
    if lower_case:
        before = [tokenizer.normalizer] if tokenizer.normalizer is not None else []
        lower = normalizers.Lowercase()
        tokenizer.normalizer = normalizers.Sequence([*before, lower]) if before else lower
    if adds_end:
        end = (END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END_OF_TEXT}", special_tokens=[end])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=None if kind in BYTE_KINDS else UNKNOWN,
        mask_token=mask[0] if mask else None,
        extra_special_tokens=list(special_tokens),
        model_input_names=["input_ids", "attention_mask"],  # generate() refuses the default token_type_ids
    )


def mask_token(*, words_hold_blanks: bool) -> AddedToken:
    """`<mask>`; where a word's token holds the blank before it, the mask that stands for one takes that blank, too."""
    return AddedToken(MASK, lstrip=words_hold_blanks, normalized=False, special=True)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash everything that decides which ids a text gets; not padding and truncation, which each call may change."""
    if tokenizer.is_fast:
        facts = json.loads(tokenizer.backend_tokenizer.to_str())
        del facts["padding"], facts["truncation"]
    else:
        facts = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps([facts, ends], sort_keys=True).encode()).hexdigest()


def pieces(text: str) -> Iterator[str]:
    """Cut a long text where no token of a tokenizer with `has_newline_cuts` spans the cut.

    Pieces have at least `PIECE_CHARACTERS` characters, but for the last.
    """
    return text_cuts.pieces(text, PIECE_CHARACTERS)


def has_newline_cuts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether encoding the `pieces` of a text is known to give the ids of the whole: our tokenizers, GPT-2's, ..."""
    if not tokenizer.is_fast:
        return False
    return text_cuts.is_certain(json.loads(tokenizer.backend_tokenizer.to_str()), (WORDS,))


def _of_bytes(model: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _train_byte_bpe(texts: Iterable[str], vocab_size: int, special: list[AddedToken]) -> Tokenizer:
    _check_room_for_bytes("byte_bpe", vocab_size, special)
    tokenizer = _of_bytes(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in _at_least_one(texts) for piece in pieces(text)), trainer)
    return tokenizer


def _train_unigram(texts: Iterable[str], vocab_size: int, special: list[AddedToken]) -> Tokenizer:
    _check_room_for_bytes("unigram", vocab_size, special)
    tokenizer = _of_bytes(models.Unigram())
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in _at_least_one(texts) for piece in pieces(text)), trainer)
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"][len(special) :]
    tokenizer.model = models.Unigram([*((str(token), 0.0) for token in special), *_settled(vocabulary)])
    return tokenizer


def _settled(vocabulary: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Tokens and their scores without what the trainer leaves to chance, the likeliest first.

    It adds up counts in another order each time, so the last digits differ; bytes that it has not kept get the lowest
    score and steps of 0.0001 above it, in any order.
    """
    lowest = min(score for _, score in vocabulary)
    beyond = lowest + 1e-4 * NUM_BYTES
    found = ((token, lowest if len(token) == 1 and score <= beyond else score) for token, score in vocabulary)
    rounded = ((token, round(score, SCORE_DIGITS)) for token, score in found)
    return sorted(rounded, key=lambda pair: (-pair[1], pair[0]))


def _train_bytes(texts: Iterable[str], vocab_size: int, special: list[AddedToken]) -> Tokenizer:
    _check_room_for_bytes("bytes", vocab_size, special)
    for _ in _at_least_one(texts):  # what they are makes no difference
        pass
    vocabulary = {str(token): i for i, token in enumerate(special)}
    vocabulary |= {token: len(special) + byte for byte, token in enumerate(_byte_tokens())}
    tokenizer = _of_bytes(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(special)
    return tokenizer


def _byte_tokens() -> list[str]:
    """How byte-level tokenizers write each byte: as the character of that number in Latin-1, or one from 256 on."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    stand_ins = iter(range(NUM_BYTES, 2 * NUM_BYTES))
    return [chr(byte) if byte in shown else chr(next(stand_ins)) for byte in range(NUM_BYTES)]


def _check_room_for_bytes(kind: str, vocab_size: int, special: list[AddedToken]) -> None:
    needed = NUM_BYTES + len(special)
    if vocab_size < needed:
        raise UserError(
            f"vocab_size={vocab_size} is too small for kind={kind!r}; it needs at least {needed} "
            f"({NUM_BYTES} bytes and {', '.join(map(str, special))})"
        )


def _train_wordpiece(texts: Iterable[str], vocab_size: int, special: list[AddedToken]) -> Tokenizer:
    special = _with_unknown(special)
    _check_room_for_words(vocab_size, special, needed=2)
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=WITHIN_WORD, cleanup=False)
    kept = list(_at_least_one(texts))
    # Each character may be needed twice, as the first of a word and within one.  The trainer's own limit of the
    # alphabet leaves out another one of equally frequent characters each time.
    rare = _rare_characters(map(tokenizer.normalizer.normalize_str, kept), (vocab_size - len(special)) // 2)
    kept = [text.translate(rare) for text in kept]
    # It numbers the characters within words in any order, which decides between pairs that are equally frequent: the
    # first training merges nothing and finds them, the second gets them in order, in front.
    within = sorted(token for token in _wordpieces(tokenizer, kept, 0, special) if token.startswith(WITHIN_WORD))
    found = _wordpieces(tokenizer, kept, vocab_size, [*special, *within])
    tokenizer.model = models.WordPiece(found, unk_token=UNKNOWN, continuing_subword_prefix=WITHIN_WORD)
    tokenizer.add_special_tokens(special)
    return tokenizer


def _wordpieces(
    tokenizer: Tokenizer, texts: Sequence[str], vocab_size: int, first: Sequence[AddedToken | str]
) -> dict[str, int]:
    """The vocabulary that training gives, `first` in front."""
    trained = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    trained.normalizer, trained.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=list(map(str, first)),
        continuing_subword_prefix=WITHIN_WORD,
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    vocabulary: dict[str, int] = trained.get_vocab()
    return vocabulary


def _rare_characters(texts: Iterable[str], num_kept: int) -> dict[int, str]:
    """All visible characters but the most frequent ones, each to be read as a blank."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    visible = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    return dict.fromkeys(map(ord, visible[num_kept:]), " ")


def _train_char(texts: Iterable[str], vocab_size: int, special: list[AddedToken]) -> Tokenizer:
    characters: set[str] = set()
    for text in _at_least_one(texts):
        characters.update(text)
    special = _with_unknown(special)
    tokens = [*map(str, special), *sorted(characters)]
    if len(tokens) > vocab_size:
        raise UserError(
            f"vocab_size={vocab_size} is too small for kind='char': the text has {len(characters)} different "
            f"characters; set vocab_size to at least {len(tokens)}, or use kind='byte_bpe'"
        )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # BPE without merges leaves characters as they are, faster than a word-level model split at every character
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    tokenizer.add_special_tokens(special)
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _train_word(texts: Iterable[str], vocab_size: int, special: list[AddedToken]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(LINES_OF_WORDS), behavior="removed", invert=True)
    return _with_most_frequent_words(tokenizer, texts, vocab_size, _with_unknown(special))


def _train_uncased_word(texts: Iterable[str], vocab_size: int, special: list[AddedToken]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(UNCASED_WORDS), behavior="removed", invert=True)
    return _with_most_frequent_words(tokenizer, texts, vocab_size, _with_unknown(special))


def _with_most_frequent_words(
    tokenizer: Tokenizer, texts: Iterable[str], vocab_size: int, special: list[AddedToken]
) -> Tokenizer:
    _check_room_for_words(vocab_size, special)
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(_at_least_one(texts), trainer)
    # The trainer counts a special token that the text spells as a word once more, and leaves a hole in the ids.
    ids = tokenizer.get_vocab()
    names = list(map(str, special))
    words = sorted(ids.keys() - set(names), key=ids.__getitem__)
    tokenizer.model = models.WordLevel({token: i for i, token in enumerate(names + words)}, unk_token=UNKNOWN)
    return tokenizer


def _check_room_for_words(vocab_size: int, special: list[AddedToken], *, needed: int = 1) -> None:
    if vocab_size < len(special) + needed:
        raise UserError(
            f"vocab_size={vocab_size} is too small for a kind of words; it needs at least {len(special) + needed} "
            f"({', '.join(map(str, special))} and a word)"
        )


def _check_special(tokens: Sequence[str]) -> None:
    own = (END_OF_TEXT, UNKNOWN, MASK)
    for place, token in enumerate(tokens):
        if not token.strip() or token != token.strip():
            raise UserError(f"special_tokens: {token!r} is blank, or begins or ends with a blank; choose another")
        if token in own or token in tokens[:place]:
            why = "is made by bmtk itself" if token in own else "is there twice"
            raise UserError(f"special_tokens: {token!r} {why}; leave it out")


def _special(token: str) -> AddedToken:
    return AddedToken(token, normalized=False, special=True)


def _with_unknown(special: list[AddedToken]) -> list[AddedToken]:
    return [special[0], _special(UNKNOWN), *special[1:]]


def _at_least_one(texts: Iterable[str]) -> Iterator[str]:
    is_empty = True
    for text in texts:
        is_empty = is_empty and not text
        yield text
    if is_empty:
        raise UserError("cannot train a tokenizer on an empty corpus; give at least one document with text")


def check_kind(kind: str) -> None:
    """Raises: UserError for a kind of tokenizer that there is not."""
    if kind not in KINDS:
        raise UserError(f"kind={kind!r} is unknown; choose one of {', '.join(sorted(KINDS))}")


KINDS = {
    "byte_bpe": _train_byte_bpe,
    "unigram": _train_unigram,
    "wordpiece": _train_wordpiece,
    "bytes": _train_bytes,
    "char": _train_char,
    "word": _train_word,
    "uncased_word": _train_uncased_word,
}


def load_tokenizer(source: str, **loading: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id.  Raises: UserError if there is none that can be loaded."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **loading)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"no tokenizer can be loaded from {source!r}: {reason}; name one with tokenizer") from error
    return tokenizer


def kept_tokenizer(folder: Path, identity: Mapping[str, object]) -> PreTrainedTokenizerBase | None:
    """The tokenizer that `keep_tokenizer` saved for the same `identity`; None if there is none, or it is damaged."""
    stamp = read_json(folder / TRAINED_ON)
    if not isinstance(stamp, dict) or any(stamp.get(key) != value for key, value in identity.items()):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        if tokenizer_fingerprint(tokenizer) == stamp.get("fingerprint"):
            return tokenizer
        problem = "it is another one than was saved"
    except Exception as error:  # tokenizers raises bare Exceptions
        problem = str(error)
    logger.warning("the tokenizer in %s is damaged (%s); training it again on the same text", folder, problem)
    return None


def keep_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    identity: Mapping[str, object],
    *,
    check: Callable[[Path], None] = lambda saved: None,
) -> None:
    """Save it with how it was made, unless `check` raises about the folder that it was saved to at first."""
    with replacing_folder(folder) as beside:
        tokenizer.save_pretrained(beside)
        check(beside)
        write_json(beside / TRAINED_ON, {**identity, "fingerprint": tokenizer_fingerprint(tokenizer)})
