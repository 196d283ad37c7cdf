"""What every head owes, whatever it reads and says: padding, losses, saving, checkpointing, learning."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from head_cases import BERT, CASES, IMAGES, PADDED, SEQ2SEQ, TRUNK, VOCAB, output_of, rows_of, tokens, without_labels
from transformers import AutoModel, DynamicCache, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

import bmtk  # noqa: F401  (registers the families)
from bmtk.models.configuration_bm_transformer import BmTransformerConfig

TOLERANCE = 1e-5


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


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


@pytest.mark.parametrize("name", PADDED)
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(name):
    case = PADDED[name]
    model, batch = case.model(), without_labels(case.batch())
    right = output_of(model(**batch))
    left = output_of(model(**shifted(batch, case.padded_input)))
    for i, length in enumerate(batch["attention_mask"].sum(-1).tolist()):
        row = {**rows_of(batch, slice(i, i + 1))}
        row |= {
            case.padded_input: row[case.padded_input][:, :length],
            "attention_mask": row["attention_mask"][:, :length],
        }
        alone = output_of(model(**row))[0]
        found_right, found_left = right[i][: len(alone)], left[i][: len(alone)]
        if case.padded_input == "input_ids" and right[i].ndim == alone.ndim and len(right[i]) == 12:
            found_left = left[i][12 - len(alone) :]
        assert alone.std() > 1e-3
        assert (found_right - alone).abs().max() <= TOLERANCE
        assert (found_left - alone).abs().max() <= TOLERANCE


def test_the_loss_is_a_sum_over_items(case):
    """Micro-batches with the count of the whole batch add up to the loss and the gradient of the whole batch."""
    model, batch = case.model(), case.batch()
    whole = model(**batch).loss
    whole.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    num_items, total = case.num_items(model, batch), 0.0
    for rows in (slice(0, 1), slice(1, 4)):
        loss = model(**rows_of(batch, rows), num_items_in_batch=num_items).loss
        loss.backward()
        total += loss.item()
    assert num_items > 1
    assert abs(total - whole.item()) <= TOLERANCE * max(1, abs(whole.item()))
    for name, parameter in model.named_parameters():
        if name in gradients:
            scale = max(1, gradients[name].abs().max().item())
            assert (parameter.grad - gradients[name]).abs().max() <= TOLERANCE * scale, name


def test_every_parameter_gets_a_gradient(case):
    """Otherwise DistributedDataParallel waits for it forever."""
    model, batch = case.model(), case.batch()
    model(**batch).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == (["mask_token"] if "mask_token" in without and "bool_masked_pos" not in batch else [])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_gradients_are_the_same(case, use_reentrant):
    model, batch = case.model(), case.batch()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            assert model.is_gradient_checkpointing
        model.train().zero_grad()
        model(**batch).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert (plain - checkpointed).abs().max() <= TOLERANCE * max(1, plain.abs().max().item())


def test_one_batch_is_learned_by_heart(case):
    model, batch = case.model(), case.batch()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(150):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if loss.item() < case.largest_loss:
            return
    pytest.fail(f"the loss is still {loss.item():.3f}")


# ------------------------------------------------------------------------------------ saved models

LOADED_ELSEWHERE = """
import json, sys, torch, transformers
sys.modules["bmtk"] = None
for directory, auto_class in json.loads(sys.argv[1]):
    model = getattr(transformers, auto_class).from_pretrained(directory, trust_remote_code=True).eval()
    batch = torch.load(f"{directory}/batch.pt")
    with torch.no_grad():
        outputs = model(**batch["inputs"])
    names = ("logits", "start_logits", "reconstruction", "prediction")
    found = next(outputs[name] for name in names if outputs.get(name) is not None)
    assert torch.equal(found, batch["output"]), directory
    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=True)
    print(auto_class, len(config.auto_map))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every case saved, with a batch and what its model said of it."""
    directory = tmp_path_factory.mktemp("saved")
    for name, case in CASES.items():
        model, inputs = case.model(), without_labels(case.batch())
        model.save_pretrained(directory / name)
        with torch.no_grad():
            torch.save({"inputs": inputs, "output": output_of(model(**inputs))}, directory / name / "batch.pt")
    return directory


@torch.no_grad()
def test_loaded_outputs_equal_the_saved_ones_exactly(saved):
    for name, case in CASES.items():
        model, info = getattr(transformers, case.auto_class).from_pretrained(saved / name, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), name
        batch = torch.load(saved / name / "batch.pt")
        assert torch.equal(output_of(model.eval()(**batch["inputs"])), batch["output"]), name


def test_uploaded_code_loads_without_bmtk(saved, tmp_path):
    wanted = [(str(saved / name), case.auto_class) for name, case in CASES.items()]
    environment = {
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "PATH": "",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, "-c", LOADED_ELSEWHERE, json.dumps(wanted)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert [line.split()[0] for line in result.stdout.splitlines()] == [case.auto_class for case in CASES.values()]


# ------------------------------------------------------------------------------------ single heads


def test_masked_lm_ties_its_output_to_the_embedding():
    model = CASES["masked-lm"].model()
    assert model.lm_head.weight is model.model.stem.embed_tokens.weight
    assert (
        CASES["masked-lm"].model(tie_word_embeddings=False).lm_head.weight is not model.model.stem.embed_tokens.weight
    )
    model.resize_token_embeddings(40)
    assert model.lm_head.weight is model.model.stem.embed_tokens.weight
    assert model(torch.tensor([[39]])).logits.shape == (1, 1, 40)


@torch.no_grad()
def test_question_answering_loss_by_hand():
    """Mean of start and end, padding excluded from the softmax, positions outside of the row not counted."""
    model = CASES["question-answering"].model()
    ids, mask = torch.tensor([[3, 4, 5, 0], [6, 7, 8, 9]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    outputs = model(
        ids, attention_mask=mask, start_positions=torch.tensor([0, 4]), end_positions=torch.tensor([2, -1])
    )
    start, end = outputs.start_logits[0, :3].log_softmax(-1), outputs.end_logits[0, :3].log_softmax(-1)
    assert abs(outputs.loss + (start[0] + end[2]) / 2) <= TOLERANCE
    assert (outputs.start_logits[0].softmax(-1)[3], outputs.end_logits[0].softmax(-1)[3]) == (0, 0)


def test_labels_that_ask_nothing_cost_nothing():
    for name in ("masked-lm", "token-classification", "seq2seq-lm"):
        loss = CASES[name].model()(**tokens(), labels=torch.full((4, 12), -100)).loss
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


def test_towers_of_a_dual_encoder_learn_together(tmp_path):
    """Text and images by our trunks, contrastive loss by transformers' VisionTextDualEncoderModel."""
    torch.manual_seed(0)
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


@torch.no_grad()
def test_packed_rows_of_an_encoder_equal_rows_alone():
    model = CASES["token-classification"].model()
    ids = torch.randint(3, VOCAB, (1, 9))
    packed = model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])).logits
    alone = torch.cat((model(ids[:, :4]).logits, model(ids[:, 4:]).logits), dim=1)
    assert (packed - alone).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("task", "name", "text", "check"),
    [
        (
            "fill-mask",
            "masked-lm",
            "a [MASK] b",
            lambda said: len(said) == 5 and {"token_str", "score"} <= set(said[0]),
        ),
        (
            "token-classification",
            "token-classification",
            "a b c",
            lambda said: [row["word"] for row in said] == list("abc"),
        ),
        ("text-classification", "sequence-classification", "a b", lambda said: said[0]["label"].startswith("LABEL_")),
    ],
)
def test_pipelines_run(task, name, text, check, tmp_path):
    pipe = transformers.pipeline(task, model=CASES[name].model(), tokenizer=words())
    assert check(pipe(text))


def test_question_answering_reads_an_answer_from_its_logits():
    """transformers 5 has no question-answering pipeline any more; the head's logits are all that one needs."""
    model, tokenizer = CASES["question-answering"].model(), words()
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


@pytest.mark.parametrize(
    ("field", "value", "auto_class", "config"),
    [
        ("type_vocab_size", 0, "AutoModel", BERT),
        ("embedding_norm", False, "AutoModel", BERT),
        ("with_pooler", False, "AutoModel", BERT),
        ("decoder_layers", 1, "AutoModelForSeq2SeqLM", SEQ2SEQ),
        ("num_channels", 1, "AutoModel", IMAGES),
        ("image_size", 20, "AutoModel", IMAGES),
        ("patch_size", 8, "AutoModel", IMAGES),
        ("fpn_size", 96, "AutoModelForObjectDetection", IMAGES),
        ("num_feature_levels", 2, "AutoModelForObjectDetection", IMAGES),
        ("num_detection_layers", 2, "AutoModelForObjectDetection", IMAGES),
        ("input_type", "audio", "AutoModel", TRUNK),
    ],
)
def test_fields_change_the_parameters(field, value, auto_class, config):
    shapes = []
    for changed in ({}, {field: value}):
        with torch.device("meta"):
            model = getattr(transformers, auto_class).from_config(BmTransformerConfig(**{**config, **changed}))
        shapes.append({name: tuple(p.shape) for name, p in model.named_parameters()})
    assert shapes[0] != shapes[1]


@pytest.mark.parametrize(
    ("field", "value"),
    [("box_loss", "iou"), ("focal_alpha", 0.5), ("focal_gamma", 1.0), ("center_sampling_radius", 0.5)],
)
def test_fields_change_the_detection_loss(field, value):
    case = CASES["object-detection"]
    losses = [case.model(**changes)(**case.batch()).loss for changes in ({}, {field: value})]
    assert losses[0] != losses[1]


def test_decoder_start_token_is_what_generation_starts_with():
    for start in (1, 5):
        model = CASES["seq2seq-lm"].model(decoder_start_token_id=start)
        assert model.generate(tokens()["input_ids"], max_new_tokens=2)[:, 0].tolist() == [start] * 4
