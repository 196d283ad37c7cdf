import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from bmtk.data import tokenizers
from bmtk.data.tokenizers import has_newline_cuts, pieces, tokenizer_fingerprint, train_tokenizer
from bmtk.errors import UserError

ENGLISH = ["We know what we are, but know not what we may be.\n", "To be, or not to be: that is the question.\n\n"] * 9
STRANGE = [*"aB \n\r\t\x85\u2028\x1c1'.!é\u0301中\u3000😀\u200d", "'s", "123", "<|endoftext|>", "<unk>", "e\u0301"]


def strange_texts(seed, count, length):
    draw = random.Random(seed)
    return ["".join(draw.choices(STRANGE, k=length)) for _ in range(count)]


def gpt2_like(**settings):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **settings)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False)
    backend.train_from_iterator(strange_texts(1, 200, 40), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


@pytest.mark.parametrize("kind", list(tokenizers.KINDS))
def test_the_one_special_token_is_bos_eos_and_pad_and_is_never_added(kind):
    tokenizer = train_tokenizer(ENGLISH, kind=kind, vocab_size=300)
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.bos_token_id == 0
    assert 0 not in tokenizer("To be")["input_ids"]
    assert set(tokenizer("To be")) == {"input_ids", "attention_mask"}


def test_byte_bpe_has_the_size_asked_for_and_stops_when_nothing_is_left_to_merge():
    assert len(train_tokenizer(ENGLISH, kind="byte_bpe", vocab_size=280)) == 280
    assert len(train_tokenizer(["ab ab"], kind="byte_bpe", vocab_size=280)) == 259  # "ab" and " ab"
    assert len(train_tokenizer(ENGLISH, kind="byte_bpe", vocab_size=257)) == 257  # plain bytes


@pytest.mark.parametrize("kind", ["byte_bpe", "unigram", "bytes"])
def test_kinds_of_bytes_give_back_any_text(kind):
    tokenizer = train_tokenizer(ENGLISH, kind=kind, vocab_size=300)
    assert tokenizer.unk_token is None
    for text in strange_texts(2, 300, 50):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_bytes_has_the_bytes_in_their_order_after_the_special_tokens():
    tokenizer = train_tokenizer(["any"], kind="bytes", vocab_size=1000, special_tokens=["<|user|>"])
    text = "a\x00 \n~é中😀"
    assert tokenizer(text)["input_ids"] == [2 + byte for byte in text.encode()]
    assert len(tokenizer) == 258
    every_byte = [bytes([byte]).decode("latin-1") for byte in range(256)]
    ids = {number for character in every_byte for number in tokenizer(character)["input_ids"]}
    assert ids <= set(range(2, 258))


def test_unigram_takes_the_likeliest_split():
    """By hand: every split of a word into pieces of the vocabulary, and the sum of their logarithms."""
    tokenizer = train_tokenizer(ENGLISH, kind="unigram", vocab_size=300)
    scores = dict(json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"])

    def splits(word):
        yield from (
            [word[:cut], *rest] for cut in range(1, len(word)) if word[:cut] in scores for rest in splits(word[cut:])
        )
        if word in scores:
            yield [word]

    for word in ("know", "question", "that", "zeal"):
        best = max(splits(word), key=lambda parts: sum(scores[part] for part in parts))
        assert tokenizer.tokenize(word) == best
    assert len(tokenizer) <= 300
    found = list(scores.values())[1:]
    assert found == sorted(found, reverse=True)


def test_unigram_is_the_same_however_its_counts_are_added_up():
    texts = strange_texts(4, 300, 60)
    first, second = (train_tokenizer(texts, kind="unigram", vocab_size=400) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_wordpiece_parts_words_and_marks_as_bert_does():
    tokenizer = train_tokenizer(["hug hugs hug, bun!"] * 3, kind="wordpiece", vocab_size=40)
    assert tokenizer.tokenize("Hugs  bun,\nhug") == ["<unk>", "bun", ",", "hug"]  # no capital was seen
    assert tokenizer.tokenize("bug") == ["bu", "##g"] or tokenizer.tokenize("bug") == ["b", "##ug"]
    assert tokenizer.decode(tokenizer("hugs, bun!")["input_ids"]) == "hugs , bun !"
    assert tokenizer.convert_ids_to_tokens([0, 1]) == ["<|endoftext|>", "<unk>"]


def test_wordpiece_leaves_rare_characters_out_and_keeps_its_size():
    han = "".join(chr(0x4E00 + number) for number in range(300))
    texts = [han[: 3 * place] for place in range(1, 101)]  # the first characters are the most frequent ones
    for size in (52, 101):
        found = [train_tokenizer(texts, kind="wordpiece", vocab_size=size) for _ in range(2)]
        assert found[0].get_vocab() == found[1].get_vocab()
        assert len(found[0]) <= size
        kept = (size - 2) // 2
        ids = found[0](han)["input_ids"]
        assert [number == 1 for number in ids] == [place >= kept for place in range(300)]


@pytest.mark.parametrize("kind", list(tokenizers.KINDS))
def test_more_special_tokens_are_single_tokens_that_no_text_is_split_into(kind, tmp_path):
    chat = ["<|user|>", "<|assistant|>"]
    train_tokenizer(ENGLISH, kind=kind, vocab_size=300, special_tokens=chat).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in chat]
    assert tokenizer("<|user|><|assistant|>")["input_ids"] == ids
    assert set(chat) <= set(tokenizer.all_special_tokens)
    assert tokenizer.decode(ids, skip_special_tokens=True) == ""
    assert len(tokenizer) <= 300


@pytest.mark.parametrize(("token", "why"), [(" a", "begins or ends"), ("", "is blank"), ("<unk>", "by bmtk itself")])
def test_a_special_token_that_cannot_be_is_refused(token, why):
    with pytest.raises(UserError, match=why):
        train_tokenizer(ENGLISH, kind="bytes", vocab_size=300, special_tokens=[token])
    with pytest.raises(UserError, match="'<a>' is there twice"):
        train_tokenizer(ENGLISH, kind="bytes", vocab_size=300, special_tokens=["<a>", "<a>"])


def test_char_has_one_token_per_character_and_unk_for_strangers():
    tokenizer = train_tokenizer(["ba\n", "中 b"], kind="char", vocab_size=100)
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == [
        *["<|endoftext|>", "<unk>"],
        *["\n", " ", "a", "b", "中"],
    ]
    assert tokenizer("ab 中?\n")["input_ids"] == [4, 5, 3, 6, 1, 2]
    assert tokenizer.decode([4, 5, 3, 6, 2]) == "ab 中\n"


def test_word_has_the_most_frequent_words_between_blanks():
    tokenizer = train_tokenizer(["It 's a a dog .", "It 's <unk> ."], kind="word", vocab_size=6)
    tokens = ["<|endoftext|>", "<unk>", "'s", ".", "It", "a"]  # two each, in the order of their characters; no dog
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == tokens
    assert tokenizer("a  It dog it <unk>")["input_ids"] == [5, 4, 1, 1, 1]


def test_a_special_token_that_the_text_spells_leaves_no_hole_in_the_ids():
    tokenizer = train_tokenizer(["<unk> of <unk> is <unk> <|endoftext|> of"], kind="word", vocab_size=10)
    assert tokenizer.get_vocab() == {"<|endoftext|>": 0, "<unk>": 1, "of": 2, "is": 3}
    assert tokenizer("is <unk> of that")["input_ids"] == [3, 1, 2, 1]
    assert tokenizer.unk_token_id == 1


def test_word_has_a_token_for_the_end_of_a_line():
    tokenizer = train_tokenizer(["no it was n't \n black monday \r\n\n"], kind="word", vocab_size=10)
    tokens = ["<|endoftext|>", "<unk>", "\n", "black", "it", "monday", "n't", "no", "was"]
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == tokens
    assert tokenizer("it\n\n black")["input_ids"] == [4, 2, 2, 3]


def test_uncased_word_parts_words_marks_and_han_characters_and_knows_where_they_were():
    text = "It's 3.5 %: NAÏVE\n中国re"
    tokenizer = train_tokenizer([text], kind="uncased_word", vocab_size=100)
    encoded = tokenizer(text, return_offsets_mapping=True)
    parts = ["it", "'", "s", "3", ".", "5", "%", ":", "naïve", "中", "国", "re"]
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"]) == parts
    assert [text[start:end].lower() for start, end in encoded["offset_mapping"]] == parts
    assert tokenizer("a stranger")["input_ids"] == [1, 1]


def test_char_gives_back_any_text_of_its_characters():
    tokenizer = train_tokenizer(STRANGE, kind="char", vocab_size=100)
    for text in strange_texts(3, 300, 50):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_no_word_is_long_enough_to_make_training_slow():
    """One word of a million letters took ten minutes before words were bounded; it is now a matter of its length."""
    tokenizer = train_tokenizer(["ab" * 1000, "-" * 999, " " * 999], kind="byte_bpe", vocab_size=1000)
    assert max(len(token) for token in tokenizer.get_vocab() if token != "<|endoftext|>") <= 64


@pytest.mark.parametrize("kind", ["byte_bpe", "char"])
def test_a_saved_tokenizer_comes_back_the_same(tmp_path, kind):
    tokenizer = train_tokenizer(ENGLISH, kind=kind, vocab_size=300)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert dict(loaded("we are")) == dict(tokenizer("we are"))
    assert loaded.decode(loaded("we  are , not")["input_ids"]) == "we  are , not"
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 0, 0)
    assert loaded.unk_token == tokenizer.unk_token == ("<unk>" if kind == "char" else None)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)


def test_training_twice_gives_the_same_tokenizer():
    texts = strange_texts(4, 500, 60)
    first, second = (train_tokenizer(texts, kind="byte_bpe", vocab_size=700) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_the_fingerprint_tells_vocabularies_apart_and_ignores_padding():
    tokenizer = train_tokenizer(ENGLISH, kind="byte_bpe", vocab_size=280)
    mark = tokenizer_fingerprint(tokenizer)
    tokenizer(["To", "be or not"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == mark
    assert tokenizer_fingerprint(train_tokenizer(ENGLISH, kind="byte_bpe", vocab_size=281)) != mark
    tokenizer.bos_token = "b"
    assert tokenizer_fingerprint(tokenizer) != mark


def test_a_tokenizer_written_in_python_has_a_fingerprint_too():
    assert tokenizer_fingerprint(ByT5Tokenizer()) == tokenizer_fingerprint(ByT5Tokenizer())
    assert tokenizer_fingerprint(ByT5Tokenizer(extra_ids=5)) != tokenizer_fingerprint(ByT5Tokenizer())
    assert not has_newline_cuts(ByT5Tokenizer())


def test_pieces_are_cut_after_lone_newlines_only(monkeypatch):
    monkeypatch.setattr(tokenizers, "PIECE_CHARACTERS", 4)
    assert list(pieces("ab\ncd\nef\n\ngh\n ij\nkl")) == ["ab\ncd\n", "ef\n\ngh\n ij\n", "kl"]
    assert list(pieces("ab\n")) == ["ab\n"]
    assert list(pieces("")) == [""]


@pytest.mark.parametrize("name", ["byte_bpe", "unigram", "bytes", "char", "gpt2"])
def test_encoding_pieces_gives_the_ids_of_the_whole(monkeypatch, name):
    monkeypatch.setattr(tokenizers, "PIECE_CHARACTERS", 3)
    trained_on = strange_texts(5, 300, 40)
    tokenizer = gpt2_like() if name == "gpt2" else train_tokenizer(trained_on, kind=name, vocab_size=600)
    assert has_newline_cuts(tokenizer)
    num_cuts = 0
    for text in strange_texts(6, 2000, 60):
        cut = list(pieces(text))
        num_cuts += len(cut) - 1
        parts = [tokenizer(piece, split_special_tokens=True)["input_ids"] for piece in cut]
        assert [i for part in parts for i in part] == tokenizer(text, split_special_tokens=True)["input_ids"]
    assert num_cuts > 500


def test_tokenizers_that_may_reach_across_a_newline_are_not_cut():
    assert not has_newline_cuts(gpt2_like(use_regex=False))
    lowered = gpt2_like()
    lowered.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert not has_newline_cuts(lowered)
    assert not has_newline_cuts(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram())))


@pytest.mark.parametrize(
    ("texts", "kind", "vocab_size", "message"),
    [
        (ENGLISH, "byte_bpe", 256, r"vocab_size=256 is too small for kind='byte_bpe'; it needs at least 257"),
        (["abc"], "char", 4, r"vocab_size=4 is too small .* 3 different characters; set vocab_size to at least 5"),
        ([], "byte_bpe", 300, "cannot train a tokenizer on an empty corpus"),
        ([""], "char", 300, "cannot train a tokenizer on an empty corpus"),
        (
            ENGLISH,
            "words",
            300,
            r"kind='words' is unknown; choose one of byte_bpe, bytes, char, uncased_word, unigram, word, wordpiece$",
        ),
        (ENGLISH, "word", 2, r"vocab_size=2 is too small for a kind of words; it needs at least 3 \(<\|endoftext\|>,"),
    ],
)
def test_what_cannot_be_trained_says_why(texts, kind, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts, kind=kind, vocab_size=vocab_size)


@pytest.mark.parametrize("kind", ["byte_bpe", "char"])
def test_a_tokenizer_may_read_lower_case_and_end_every_text(tmp_path, kind):
    train_tokenizer(["Ein Hund", "ÄPFEL"], kind=kind, vocab_size=300, lower_case=True, adds_end=True).save_pretrained(
        tmp_path
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("Äpfel Hund")["input_ids"]
    assert tokenizer.decode(ids) == "äpfel hund<|endoftext|>"
    assert (ids[-1], tokenizer("")["input_ids"]) == (0, [0])
    assert not {"E", "H", "Ä"} & set(tokenizer.get_vocab()) or kind == "byte_bpe"
    plain = train_tokenizer(["Ein Hund"], kind=kind, vocab_size=300)
    assert plain.decode(plain("Ein Hund")["input_ids"]) == "Ein Hund"
