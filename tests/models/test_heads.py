"""Single heads of bm_transformer by hand; what every head owes is in test_model_contract.py."""

import pytest
import torch
import transformers
from model_cases import BERT, CASES, IMAGES, VOCAB, tokens
from transformers import AutoModel, DynamicCache, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

import bmtk  # noqa: F401  (registers the families)
from bmtk.models.configuration_bm_transformer import BmTransformerConfig

TOLERANCE = 1e-5


def shifted(batch: dict, padded_input: str) -> dict:
    """The same rows with their padding on the left; what is padding holds something else."""
    lengths = batch["attention_mask"].sum(-1)
    moved = dict(batch)
    for name in (padded_input, "attention_mask"):
        rows = zip(batch[name], lengths, strict=True)
        moved[name] = torch.stack([row.roll(len(row) - int(length), 0) for row, length in rows])
    noise = torch.randint_like(moved[padded_input], 3, VOCAB) if padded_input == "input_ids" else 7.0
    hole = moved["attention_mask"].view(*moved["attention_mask"].shape, *[1] * (batch[padded_input].ndim - 2)) == 0
    moved[padded_input] = torch.where(hole, noise, moved[padded_input])
    return moved


def test_masked_lm_ties_its_output_to_the_embedding():
    case = CASES["transformer_bert-MaskedLM"]
    model, untied = case.model(), case.model(tie_word_embeddings=False)
    assert model.lm_head.weight is model.model.stem.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.stem.embed_tokens.weight
    model.resize_token_embeddings(80)
    assert model.lm_head.weight is model.model.stem.embed_tokens.weight
    assert model(torch.tensor([[79]])).logits.shape == (1, 1, 80)


@pytest.mark.parametrize("case", [name for name in CASES if name.endswith("-MaskedLM")])
def test_masked_lm_learns_the_same_where_it_scores_the_masked_tokens_alone(case):
    model = CASES[case].model().eval()  # no dropout
    batch = tokens()
    labels = batch["input_ids"].masked_fill(torch.rand(batch["input_ids"].shape) < 0.7, -100)
    scored, found = [], []
    model.lm_head.register_forward_hook(lambda layer, inputs, outputs: scored.append(inputs[0][..., 0].numel()))
    for skipped in (False, True):
        model.zero_grad()
        outputs = model(**batch, labels=labels, num_items_in_batch=7, skip_logits=skipped)
        outputs.loss.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        found.append({"loss": outputs.loss.detach(), **gradients})
        assert (outputs.logits is None) == skipped
    assert scored == [labels.numel(), int((labels != -100).sum())]
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


@torch.no_grad()
def test_question_answering_loss_by_hand():
    """Mean of start and end, padding excluded from the softmax, positions outside of the row not counted."""
    model = CASES["transformer_bert-QuestionAnswering"].model()
    ids, mask = torch.tensor([[3, 4, 5, 0], [6, 7, 8, 9]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    outputs = model(
        ids, attention_mask=mask, start_positions=torch.tensor([0, 4]), end_positions=torch.tensor([2, -1])
    )
    start, end = outputs.start_logits[0, :3].log_softmax(-1), outputs.end_logits[0, :3].log_softmax(-1)
    assert abs(outputs.loss + (start[0] + end[2]) / 2) <= TOLERANCE
    assert (outputs.start_logits[0].softmax(-1)[3], outputs.end_logits[0].softmax(-1)[3]) == (0, 0)


def test_a_batch_without_labels_to_predict_has_loss_zero():
    for name in ("bert-MaskedLM", "bert-TokenClassification", "translator-Seq2SeqLM"):
        loss = CASES[f"transformer_{name}"].model()(**tokens(), labels=torch.full((4, 12), -100)).loss
        assert loss == 0, name


@pytest.mark.parametrize("pooling", ["first", "last", "mean", "max"])
@torch.no_grad()
def test_pooling_reads_real_positions_only(pooling):
    model = AutoModel.from_config(BmTransformerConfig(**{**BERT, "classifier_pooling": pooling, "with_pooler": False}))
    batch = tokens()
    for given in (batch, shifted(batch, "input_ids")):
        outputs = model.eval()(**given)
        for hidden, mask, pooled in zip(outputs.last_hidden_state, given["attention_mask"], outputs[1], strict=True):
            real = hidden[mask.bool()]
            expected = {"first": real[0], "last": real[-1], "mean": real.mean(0), "max": real.amax(0)}[pooling]
            assert (pooled - expected).abs().max() <= TOLERANCE


@pytest.mark.trains
def test_towers_of_a_dual_encoder_learn_together(tmp_path, training_seed):
    """Text and images by our trunks, contrastive loss by transformers' VisionTextDualEncoderModel."""
    torch.manual_seed(training_seed)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        BmTransformerConfig(**{**IMAGES, "hidden_size": 24}), BmTransformerConfig(**BERT), projection_dim=16
    )
    model = VisionTextDualEncoderModel(config)
    batch = {**tokens(), "pixel_values": torch.randn(4, 3, 16, 16)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        loss = model(**batch, return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    model.eval().save_pretrained(tmp_path)
    loaded = VisionTextDualEncoderModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits_per_image, model(**batch).logits_per_image)
        assert model(**batch).logits_per_image.argmax(-1).tolist() == [0, 1, 2, 3]


def test_bidirectional_trunks_keep_no_cache():
    model = AutoModel.from_config(BmTransformerConfig(**BERT)).eval()
    batch, cache = tokens(), DynamicCache()
    assert model(**batch, use_cache=True).past_key_values is None
    outputs = [model(**batch, past_key_values=cache, use_cache=True).last_hidden_state for _ in range(2)]
    assert torch.equal(*outputs)
    assert cache.get_seq_length() == 0


def test_question_answering_reads_an_answer_from_its_logits():
    """transformers 5 has no question-answering pipeline any more; the head's logits are all that one needs."""
    model, tokenizer = CASES["transformer_bert-QuestionAnswering"].model(), words()
    batch = tokenizer("a", "b c", return_tensors="pt")
    outputs = model(**batch)
    assert outputs.start_logits.shape == outputs.end_logits.shape == batch["input_ids"].shape


def words() -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "a", "b", "c"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]", cls_token="[CLS]",
        sep_token="[SEP]",
    )  # fmt: skip
