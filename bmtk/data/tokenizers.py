"""Training of tokenizers, their identity, and those that are kept beside a corpus.

`byte_bpe`: byte-level byte-pair encoding, lossless on any text.
Source: Sennrich et al. 2016, arXiv:1508.07909 (BPE); Radford et al. 2019, GPT-2 (on bytes); the split into
words follows GPT-4's (numbers in groups of three, a newline ends a word), with combining marks counted as letters, and
no word longer than about 64 characters.
`char`: one token per Unicode character, lossless on the characters it was trained on.
`word`: what stands between blanks is a token, and so is the end of a line; for text that is already tokenised.
`uncased_word`: lower-cased words, punctuation marks and Han characters, a token each; for classifiers of small data.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

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
PIECE_CHARACTERS = text_cuts.PIECE_CHARACTERS


def train_tokenizer(
    texts: Iterable[str],
    *,
    kind: str,
    vocab_size: int,
    lower_case: bool = False,
    adds_end: bool = False,
    with_mask: bool = False,
) -> PreTrainedTokenizerFast:
    """Train a tokenizer whose one special token `<|endoftext|>` (id 0) is bos, eos and pad.

    `kind` is "byte_bpe" (at most `vocab_size` tokens; fewer if the text has no more pairs to merge), "char" (a token
    per character), "word" or "uncased_word" (the most frequent ones); all but the first have `<unk>` for what is not
    in their vocabulary. With `lower_case` every text is read in lower case, with `adds_end` every text ends with
    `<|endoftext|>`; `with_mask` adds `<mask>`, as `mask_token` makes it. The result depends on the texts only, not on
    the number of threads.
    Raises: UserError for an unknown kind, no text at all, or a `vocab_size` below what the kind needs.
    """
    if kind not in KINDS:
        raise UserError(f"kind={kind!r} is unknown; choose one of {sorted(KINDS)}")
    mask = [mask_token(words_hold_blanks=kind == "byte_bpe")] if with_mask else []
    special = [_special(END_OF_TEXT), *mask]
    tokenizer = KINDS[kind](map(str.lower, texts) if lower_case else texts, vocab_size, special)
    if lower_case:
        tokenizer.normalizer = normalizers.Lowercase()
    if adds_end:
        end = (END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END_OF_TEXT}", special_tokens=[end])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=None if kind == "byte_bpe" else UNKNOWN,
        mask_token=mask[0] if mask else None,
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


def _byte_bpe(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _train_byte_bpe(texts: Iterable[str], vocab_size: int, special: list[AddedToken]) -> Tokenizer:
    if vocab_size < NUM_BYTES + len(special):
        raise UserError(
            f"vocab_size={vocab_size} is too small for kind='byte_bpe'; it needs at least {NUM_BYTES + len(special)} "
            f"({NUM_BYTES} bytes and {', '.join(map(str, special))})"
        )
    tokenizer = _byte_bpe(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in _at_least_one(texts) for piece in pieces(text)), trainer)
    return tokenizer


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
    if vocab_size <= len(special):
        raise UserError(
            f"vocab_size={vocab_size} is too small for a kind of words; it needs at least {len(special) + 1} "
            f"({', '.join(map(str, special))} and a word)"
        )
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(_at_least_one(texts), trainer)
    # The trainer counts a special token that the text spells as a word once more, and leaves a hole in the ids.
    ids = tokenizer.get_vocab()
    names = list(map(str, special))
    words = sorted(ids.keys() - set(names), key=ids.__getitem__)
    tokenizer.model = models.WordLevel({token: i for i, token in enumerate(names + words)}, unk_token=UNKNOWN)
    return tokenizer


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


KINDS = {"byte_bpe": _train_byte_bpe, "char": _train_char, "word": _train_word, "uncased_word": _train_uncased_word}


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


def keep_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, identity: Mapping[str, object]) -> None:
    with replacing_folder(folder) as beside:
        tokenizer.save_pretrained(beside)
        write_json(beside / TRAINED_ON, {**identity, "fingerprint": tokenizer_fingerprint(tokenizer)})
