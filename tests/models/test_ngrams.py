"""Hashed n-grams against loops over Python's whole numbers, and what the text classifiers with them owe."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from model_cases import BERT, CONVOLUTIONAL, RECURRENT, VOCAB, padding
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification

from bmtk.models.configuration_bm_cnn import BmCnnConfig
from bmtk.models.configuration_bm_rnn import BmRnnConfig
from bmtk.models.configuration_bm_transformer import BmTransformerConfig
from bmtk.models.ngrams_bm import FACTOR, GAP, PRIME, SCALE, SPELLING, NgramReader, bucket_of
from bmtk.tasks.classification import LabelSet
from bmtk.tasks.label_types import OneLabel
from bmtk.tasks.sequence_classification import SequenceClassificationArguments
from bmtk.training.guards import SavedBuffers

FAMILIES = {
    "transformer": lambda **fields: BmTransformerConfig(**{**BERT, **fields}),
    "cnn": lambda **fields: BmCnnConfig(**{**CONVOLUTIONAL, "is_causal": False, **fields}),
    "rnn": lambda **fields: BmRnnConfig(**{**RECURRENT, "is_causal": False, **fields}),
}


def bucket_by_hand(ngram: list[int], buckets: int, skipped: int = 0) -> int:
    """Of token ids counted from 1, 0 where there is no token; `skipped` have been left out between two of them."""
    key = len(ngram) + GAP * skipped
    for token in ngram:
        key = (key * FACTOR + token + 1) % PRIME
    return key % buckets


def read_by_hand(ids: list[int], table: torch.Tensor, sizes: list[int], skip: int = 0) -> torch.Tensor:
    rows = []
    for gap in range(1, skip + 1):
        before = [0] * (gap + 1) + [token + 1 for token in ids]
        rows += [bucket_by_hand([before[i], ids[i] + 1], len(table), gap) for i in range(len(ids))]
    for size in sizes:
        shifted = [0] * (size - 1) + [token + 1 for token in ids]
        rows += [bucket_by_hand(shifted[end : end + size], len(table)) for end in range(len(ids))]
    return SCALE * sum(table[row] for row in rows) / len(rows) ** 0.5


def test_buckets_are_those_of_whole_numbers_without_overflow():
    ids = [0, 2**31 - 2, 151_000, 5, 5]
    for size in (1, 2, 3, 7):
        shifted = [0] * (size - 1) + ids
        expected = [bucket_by_hand(shifted[end : end + size], 1000) for end in range(len(ids))]
        assert bucket_of(torch.tensor([ids]), size, 1000).tolist() == [expected]


def test_ngrams_of_other_lengths_and_orders_have_buckets_of_their_own():
    tokens = torch.tensor([[7, 8, 7, 8]])
    pairs, singles = bucket_of(tokens, 2, 10**6)[0].tolist(), bucket_of(tokens, 1, 10**6)[0].tolist()
    assert pairs[1] == pairs[3] != pairs[2]
    assert not set(pairs) & set(singles)


def test_a_reader_sums_the_rows_of_real_ngrams_on_either_side_of_padding():
    reader = NgramReader([1, 3], buckets=50, outputs=4)
    ids, mask = torch.tensor([[3, 9, 4, 1], [5, 6, 2, 2]]), padding((4, 2), 4)
    expected = torch.stack([read_by_hand(row, reader.table.weight, [1, 3]) for row in ([3, 9, 4, 1], [5, 6])])
    torch.testing.assert_close(reader(ids, mask), expected)
    torch.testing.assert_close(reader(torch.tensor([[0, 8, 5, 6]]), torch.tensor([[0, 0, 1, 1]])), expected[1:])
    torch.testing.assert_close(reader(ids[:1], None), expected[:1])
    assert reader(ids, torch.zeros_like(mask)).abs().sum() == 0


def test_pairs_with_other_numbers_of_tokens_between_have_buckets_of_their_own():
    tokens = torch.tensor([[7, 7, 7, 7]])
    last = [bucket_of(tokens, 2, 10**6, skipped=skipped)[0, -1].item() for skipped in range(3)]
    assert last == [bucket_by_hand([7, 7], 10**6, skipped) for skipped in range(3)]
    assert len(set(last)) == 3


def test_a_reader_also_sums_the_pairs_with_tokens_between():
    reader = NgramReader([1, 2], buckets=50, outputs=4, skip=2)
    torch.nn.init.normal_(reader.table.weight)
    ids, mask = torch.tensor([[3, 9, 4, 1, 7], [5, 6, 2, 2, 2]]), padding((5, 2), 5)
    rows = ([3, 9, 4, 1, 7], [5, 6])
    expected = torch.stack([read_by_hand(row, reader.table.weight, [1, 2], skip=2) for row in rows])
    torch.testing.assert_close(reader(ids, mask), expected)


def test_a_reader_adds_the_rows_of_the_characters_of_real_tokens():
    reader = NgramReader([1], buckets=50, outputs=4, tokens=10, spelling=3)
    ids, mask = torch.tensor([[3, 9, 4], [5, 6, 2]]), padding((3, 2), 3)
    of_tokens = torch.stack([read_by_hand(row, reader.table.weight, [1]) for row in ([3, 9, 4], [5, 6])])
    torch.testing.assert_close(reader(ids, mask), (1 - SPELLING) * of_tokens)  # nobody has written any spelling
    reader.spelling[torch.tensor([3, 4, 5, 2])] = torch.tensor([[1, 50, 0], [7, 7, 9], [8, 0, 0], [2, 3, 4]]).int()
    rows, table = ([0, 49, 6, 6, 8], [7]), reader.table.weight
    of_characters = torch.stack([SCALE * table[row].sum(0) / len(row) ** 0.5 for row in rows])
    torch.testing.assert_close(reader(ids, mask), (1 - SPELLING) * of_tokens + SPELLING * of_characters)
    assert reader(ids, torch.zeros_like(mask)).abs().sum() == 0


@pytest.mark.parametrize("change", [5, -5])
def test_tokens_that_are_added_have_no_spelling(change, tmp_path):
    config = FAMILIES["rnn"](vocab_size=20, ngram_buckets=64, ngram_spelling=5, num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    before = model.ngrams.spelling.random_(1, 65).clone()
    model.resize_token_embeddings(20 + change)
    assert torch.equal(model.ngrams.spelling[:20], before[: 20 + change])
    assert not model.ngrams.spelling[20:].any()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ids = torch.tensor([[1, 14, 19 + change]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_step_that_may_be_undone_copies_no_spelling():
    assert not SavedBuffers(NgramReader([1], buckets=50, outputs=4, tokens=10, spelling=3).modules()).kept
    assert len(SavedBuffers(torch.nn.BatchNorm1d(2).modules()).kept) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_how_tokens_are_spelled_is_saved_with_the_model(family, tmp_path):
    config = FAMILIES[family](ngram_buckets=64, ngram_spelling=5, num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config)
    model.ngrams.spelling.random_(65)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.ngrams.spelling.shape == (config.vocab_size, 5)
    assert torch.equal(loaded.ngrams.spelling, model.ngrams.spelling)
    model.model.save_pretrained(tmp_path / "trunk")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "trunk").ngrams.spelling.abs().max() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_each_reader_learns_from_its_own_loss_and_rows_are_judged_by_both(family):
    config = FAMILIES[family](ngram_buckets=64, num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config).train()
    torch.nn.init.normal_(model.ngrams.table.weight)
    ids, labels = torch.randint(3, VOCAB, (4, 6)), torch.tensor([2, 0, 1, 1])
    outputs = model(ids, labels=labels)
    deep, wide = model.score(model.model(ids).pooler_output), model.ngrams(ids, None)
    torch.testing.assert_close(outputs.reader_logits, (deep, wide))
    torch.testing.assert_close(outputs.logits, (deep + wide) / 2)
    expected = (F.cross_entropy(deep, labels) + F.cross_entropy(wide, labels)) / 2
    torch.testing.assert_close(outputs.loss, expected)
    batch = {"labels": labels}
    kind = OneLabel(SequenceClassificationArguments())
    smooth = [F.cross_entropy(one, labels, reduction="sum", label_smoothing=0.1) for one in (deep, wide)]
    found = LabelSet(kind, list("abc"), {}).criterion(outputs, batch, label_smoothing=0.1)
    torch.testing.assert_close(found, (smooth[0] + smooth[1]) / 2)
    assert model.eval()(ids, labels=labels).reader_logits is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_adds_its_ngrams_to_what_the_network_says(family, tmp_path):
    config = FAMILIES[family](ngram_buckets=64, ngram_sizes=[1, 2], num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    assert model.ngrams.table.weight.abs().max() == 0
    torch.nn.init.normal_(model.ngrams.table.weight)
    ids = torch.randint(3, VOCAB, (2, 6))
    inputs = {"input_ids": ids, "attention_mask": padding((6, 4), 6)}
    with torch.no_grad():
        deep = model.score(model.model(**inputs).pooler_output)
        rows = (ids[0].tolist(), ids[1, :4].tolist())
        wide = torch.stack([read_by_hand(row, model.ngrams.table.weight, [1, 2]) for row in rows])
        torch.testing.assert_close(model(**inputs).logits, (deep + wide) / 2)
        loss = model(**inputs, labels=torch.tensor([2, 0])).loss
        torch.testing.assert_close(loss, F.cross_entropy((deep + wide) / 2, torch.tensor([2, 0])))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match="pass input_ids, not inputs_embeds: this model has ngram_buckets"):
        model(inputs_embeds=model.get_input_embeddings()(ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stored_configuration_without_ngrams_means_none(family, tmp_path):
    config = FAMILIES[family]()
    stored = {name: value for name, value in config.to_dict().items() if not name.startswith("ngram_")}
    assert AutoConfig.for_model(**stored).ngram_buckets == 0
    assert AutoModelForSequenceClassification.from_config(config).ngrams is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "wrong",
    [{"ngram_buckets": -1}, {"ngram_sizes": [0]}, {"ngram_sizes": []}, {"ngram_skip": -1}, {"ngram_spelling": -1}],
)
def test_impossible_ngrams_are_refused(family, wrong):
    with pytest.raises(StrictDataclassClassValidationError, match=f"{next(iter(wrong))}=.* must"):
        FAMILIES[family](**{"ngram_buckets": 8, **wrong})
