"""Masked language modelling: which tokens are hidden, what is measured, and that documents stay apart."""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, pipeline

import bmtk  # noqa: F401
from bmtk.data.masking import MaskedTokens, word_ends
from bmtk.data.packing import PackedRows
from bmtk.data.token_store import build_token_store
from bmtk.data.tokenizers import train_tokenizer
from bmtk.errors import UserError
from bmtk.models.configuration_bm_transformer import BmTransformerConfig
from bmtk.tasks.masked_lm import TASK, MaskedLMArguments
from bmtk.training.updates import LossSum
from recipes import evaluate, finetune, predict, pretrain

LINES = [
    "the cat sat on the mat again",
    "a dog ran over the hill",
    "the old man and the sea",
    "who sat on the cat",
] * 8
TINY = {
    "bm_transformer": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "bm_rnn": {"hidden_size": 16, "num_hidden_layers": 1},
    "bm_cnn": {"input_type": "tokens", "hidden_size": 16, "num_hidden_layers": 2},
}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


def read(text, **settings):
    sources = {"train_file": [str(text)], "validation_file": [str(text)], "sample_by": "line", "leakage": "allow"}
    seed = {"seed": settings.pop("seed")} if "seed" in settings else {}
    args = MaskedLMArguments(**{**sources, "vocab_size": 300, "context_length": 32, **settings})
    return TASK.read(args, folder=text.parent / "run", **seed)


def bind(text, model_type="bm_transformer", **settings):
    data = read(text, **settings)
    return data.bind(data.new_config(model_type, TINY[model_type]))


def new_model(objective):
    return AutoModelForMaskedLM.from_config(objective.config).eval()


def test_hidden_tokens_are_guessed_and_all_others_are_as_they_were(text):
    objective = bind(text, mlm_probability=0.3)
    rows, plain = objective.rows["train"], objective.rows["train"].rows
    batch, original = rows.batch(range(len(rows)), [0] * len(rows)), plain[range(len(rows))]
    hidden = batch["labels"] != -100
    assert torch.equal(batch["labels"][hidden], original["input_ids"][hidden])
    assert torch.equal(batch["input_ids"][~hidden], original["input_ids"][~hidden])
    assert torch.equal(batch["position_ids"], original["position_ids"])
    is_ordinary = ~torch.isin(original["input_ids"], torch.tensor(objective.processor.all_special_ids))
    assert not (hidden & ~is_ordinary).any()
    for row, ordinary in zip(hidden.sum(1).tolist(), is_ordinary.sum(1).tolist(), strict=True):
        assert row == max(1, round(0.3 * ordinary))


def test_of_hidden_tokens_80_percent_are_masks_10_are_others_and_10_stay(text):
    objective = bind(text, mlm_probability=0.5)
    rows, counts, total = objective.rows["train"], np.zeros(3), 0
    for epoch in range(60):
        batch = rows.batch(range(len(rows)), [epoch] * len(rows))
        hidden = batch["labels"] != -100
        shown, truth = batch["input_ids"][hidden], batch["labels"][hidden]
        masks = shown == objective.processor.mask_token_id
        counts += [masks.sum(), (~masks & (shown != truth)).sum(), (shown == truth).sum()]
        total += len(shown)
        assert not torch.isin(shown[~masks], torch.tensor(objective.processor.all_special_ids)).any()
    assert counts / total == pytest.approx([0.8, 0.1, 0.1], abs=4 * math.sqrt(0.16 / total))


def test_training_scores_hidden_tokens_alone(text):
    objective = bind(text)
    model = AutoModelForMaskedLM.from_config(
        BmTransformerConfig(vocab_size=300, is_causal=False, **TINY["bm_transformer"])
    )
    batch = objective.rows["train"].batch([0, 1], [0, 0])
    scored, hidden = [], int((batch["labels"] != -100).sum())
    model.lm_head.register_forward_hook(lambda layer, inputs, outputs: scored.append(outputs.shape[:-1].numel()))
    loss = LossSum(model.eval(), model, torch.device("cpu"))(batch, hidden, torch.tensor(hidden))
    assert scored[-1] == hidden < batch["labels"].numel()
    torch.testing.assert_close(loss, model(**batch).loss)
    batch["labels"][:] = -100  # a process that has nothing to guess
    LossSum(model, model, torch.device("cpu"))(batch, 0, torch.tensor(hidden)).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_a_mask_depends_on_seed_epoch_and_row_alone(text):
    rows = bind(text, seed=1).rows["train"]
    alone = [rows.batch([row], [3]) for row in (4, 1)]
    together = rows.batch([1, 4], [3, 3])
    assert torch.equal(together["labels"], torch.cat([alone[1]["labels"], alone[0]["labels"]]))
    assert torch.equal(together["input_ids"], torch.cat([alone[1]["input_ids"], alone[0]["input_ids"]]))
    assert not torch.equal(rows.batch([1], [4])["labels"], together["labels"][:1])
    rows.set_epoch(3)  # a DataLoader's way
    assert torch.equal(rows.__getitems__([1, 4])["input_ids"], together["input_ids"])
    other = bind(text, seed=2)
    assert not torch.equal(other.rows["train"].batch([1], [3])["labels"], together["labels"][:1])
    measured = [next(each.batches_in_order(each.rows["validation"], batch_size=4)) for each in (other, bind(text))]
    assert torch.equal(measured[0]["labels"], measured[1]["labels"])
    assert torch.equal(measured[0]["input_ids"], measured[1]["input_ids"])


def test_whole_words_are_hidden_or_not(tmp_path):
    line = "abc def, ghi jkl mno"
    tokenizer = train_tokenizer([line], kind="byte_bpe", vocab_size=258, with_mask=True)  # plain bytes
    store = build_token_store([line] * 10, tokenizer, tmp_path / "store")
    packed = PackedRows(store, len(line) + 2)  # a document per row
    rows = MaskedTokens(packed, tokenizer, probability=0.25, whole_words=True, seed=0)
    labels = torch.cat([rows.batch(range(10), [epoch] * 10)["labels"] for epoch in range(10)])
    hidden = (labels != -100)[:, 1:-1]  # without the ends of the document
    for start in (0, 4, 9, 13, 17):
        word = hidden[:, start : start + 3]
        assert torch.equal(word.all(1), word.any(1))
        assert 0 < word.all(1).sum() < len(word)
    assert set(hidden.sum(1).tolist()) <= {5, 6, 7}
    assert set(hidden.any(0).tolist()) == {True}, "blanks and commas are hidden, too"


def test_words_of_wordpiece_go_on_with_what_follows_them():
    class WordPiece:
        all_special_tokens = ["[CLS]"]

        def __len__(self):
            return 4

        def convert_ids_to_tokens(self, ids):
            return ["[CLS]", "new", "##er", "york"]

    continues, may_go_on = word_ends(WordPiece())
    assert continues.tolist() == [False, False, True, False]
    assert may_go_on.tolist() == [False, True, True, True]


@pytest.mark.parametrize("model_type", TINY)
def test_documents_of_one_row_do_not_see_each_other(text, model_type):
    objective = bind(text, model_type)
    model = new_model(objective)
    assert model.config.is_causal is False
    batch = objective.rows["validation"].batch([0], [0])
    inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    second = slice(starts[1], starts[2])
    with torch.no_grad():
        packed = model(**inputs).logits[0, second]
        alone = model(input_ids=batch["input_ids"][:, second]).logits[0]
    assert torch.allclose(packed, alone, atol=1e-5)


def test_metrics_are_those_of_all_hidden_tokens_whatever_the_batches(text):
    objective = bind(text)
    model = new_model(objective)
    rows, scores = objective.rows["validation"], []
    for size in (1, 3, len(rows)):
        batches = objective.batches_in_order(rows, batch_size=size)
        with torch.no_grad():
            predictions = [p for batch in batches for p in objective.scorer.predict(model, batch)]
        scores.append(objective.scorer.score(predictions, rows))
    whole = rows.batch(range(len(rows)), [0] * len(rows))
    with torch.no_grad():
        logits = model(input_ids=whole["input_ids"], position_ids=whole["position_ids"]).logits
    hidden = whole["labels"] != -100
    loss = F.cross_entropy(logits[hidden], whole["labels"][hidden]).item()
    expected = {
        "loss": loss,
        "perplexity": math.exp(loss),
        "masked_accuracy": (logits.argmax(-1) == whole["labels"])[hidden].double().mean().item(),
        "tokens": int(hidden.sum()),
    }
    for score in scores:
        assert score == pytest.approx(expected, rel=1e-5)


def test_bad_settings_and_models_are_one_clear_error(text, tmp_path):
    with pytest.raises(UserError, match=r"mlm_probability=1\.5 is not a share; choose between 0 and 1"):
        read(text, mlm_probability=1.5)
    with pytest.raises(ValueError, match="needs at least 258"):
        _ = read(text, vocab_size=257).tokenizer
    data = read(text)
    with pytest.raises(ValueError, match="needs is_causal=False: a causal trunk does not see what follows"):
        AutoModelForMaskedLM.from_config(
            data.new_config("bm_transformer", {**TINY["bm_transformer"], "is_causal": True})
        )
    row = {"text": ["no mask here", "one <mask>"]}
    objective = data.bind(data.new_config("bm_transformer", {}))
    with pytest.raises(UserError, match="input row 1 has no <mask> to be filled in; write one"):
        objective.encode_inputs(dataset(row))
    with pytest.raises(UserError, match=r"input row 1 has \d+ tokens, this model reads 32; shorten it"):
        objective.encode(dataset({"text": ["one <mask>" + "!?" * 40]}), "input")
    tokenizer = train_tokenizer(LINES, kind="byte_bpe", vocab_size=300)
    tokenizer.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "config.json").write_text("{}")
    args = MaskedLMArguments(train_file=[str(text)], validation_file=[str(text)], leakage="allow")
    with pytest.raises(UserError, match="has no mask token, so that model was not trained to fill one in"):
        _ = TASK.read(args, model=str(tmp_path / "plain"), folder=tmp_path / "other").tokenizer
    data = read(text, tokenizer=str(tmp_path / "plain"))
    new = len(tokenizer)
    assert len(data.tokenizer) == new + 1
    assert data.notes == [f"the tokenizer has no mask token: <mask> (id {new}) is new"]
    assert data.config_fields["vocab_size"] == new + 1
    assert data.tokenizer("cat <mask>")["input_ids"] == [*tokenizer("cat")["input_ids"], new]
    data.bind(BertConfig(vocab_size=400))
    assert data.notes[-1] == "documents that share a row see each other: a bert cannot keep them apart"


def dataset(columns):
    from datasets import Dataset

    return Dataset.from_dict(columns)


@pytest.mark.trains
def test_from_pretraining_to_filling_in(tmp_path, monkeypatch, seed_argv):
    monkeypatch.chdir(finetune.CONFIGS.parents[1])
    folder, short = tmp_path / "run", ["--num_train_steps", "30", "--eval_steps", "0", "--batch_size", "16"]
    pretrain.main(["--task", "masked_lm", "--preset", "smoke", "--output_dir", str(folder), *short, *seed_argv])
    facts = json.loads((folder / "run.json").read_text())
    assert facts["metrics"]["validation/loss"] < 6.0 < math.log(512)
    assert facts["samples"][0]["prompt"] == "To be, or not to <mask>, that is the question"
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert history[-2]["tokens"] == 30 * 16 * 64, "tokens are counted whether they are hidden or not"

    test = ["--test_file", "recipes/data/tiny_shakespeare/validation.txt", "--batch_size", "7"]
    evaluate.main(["--model", str(folder), *test])
    measured = json.loads((folder / "metrics.json").read_text())["metrics"]
    for name in ("loss", "masked_accuracy", "tokens"):
        assert measured[f"test/{name}"] == pytest.approx(facts["metrics"][f"validation/{name}"], rel=1e-5)

    (tmp_path / "in.csv").write_text('text\n"My <mask> lord, <mask>"\nTo <mask>\n')
    predict.main(
        ["--model", str(folder), "--input", str(tmp_path / "in.csv"), "--output", str(tmp_path / "out.jsonl")]
    )
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(lines[0]["guesses"].split(" | ")) == 2
    fill = pipeline("fill-mask", model=str(folder))
    assert fill("To <mask>")[0]["sequence"] == lines[1]["prediction"]


def test_the_trainer_hides_other_tokens_in_every_epoch(text, tmp_path, monkeypatch):
    seen = []
    batch = MaskedTokens.batch
    monkeypatch.setattr(MaskedTokens, "batch", lambda self, i, e: (seen.append((self.seed, *e)), batch(self, i, e))[1])
    monkeypatch.chdir(finetune.CONFIGS.parents[1])
    sizes = [f"--{name}={value}" for name, value in TINY["bm_rnn"].items()]
    files = ["--train_file", str(text), "--validation_file", str(text), "--sample_by", "line", "--vocab_size", "300"]
    files += ["--leakage", "allow"]
    run = ["--output_dir", str(tmp_path / "run"), "--num_train_epochs", "2", "--context_length", "32"]
    quiet = ["--disable_tqdm", "true", "--save_strategy", "no"]
    finetune.main(["--task", "masked_lm", "--model_type", "bm_rnn", *sizes, *files, *run, *quiet])
    assert {epochs for seed, *epochs in map(tuple, seen) if seed == 42 for epochs in epochs} == {0, 1}
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "run").config.model_type == "bm_rnn"
    assert AutoTokenizer.from_pretrained(tmp_path / "run").mask_token == "<mask>"
