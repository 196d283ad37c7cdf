import math

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import bmtk  # noqa: F401  registers the model families
from bmtk.tasks.causal_lm import CausalLM, CausalLMArguments
from recipes import finetune

TEXT = "the cat sat \n on the mat \n and the dog sat \n on the cat \n"


def task_of(folder, **settings) -> CausalLM:
    for split in ("train", "validation"):
        (folder / f"{split}.txt").write_text(TEXT)
    files = {"train_file": [str(folder / "train.txt")], "validation_file": [str(folder / "validation.txt")]}
    return CausalLM(CausalLMArguments(**files, tokenizer="word", vocab_size=50, **settings), folder=folder)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_longer_rows_of_an_evaluation_give_the_perplexity_of_the_unbroken_text(tmp_path, batch_size):
    task = task_of(tmp_path, context_length=4, eval_context_length=64)
    fields = task.new_config("bm_rnn", {"hidden_size": 8, "num_hidden_layers": 1, "initializer_range": 0.7}).to_dict()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).eval()
    store = task.rows["validation"].store
    tokens = torch.tensor(store.tokens.astype("int64"))[None]
    with torch.no_grad():
        logits = model(input_ids=tokens[:, :-1]).logits
    whole = F.cross_entropy(logits[0], tokens[0, 1:]).item()

    def measured(task):
        batches = task.batches_in_order(task.rows["validation"], batch_size=batch_size)
        with torch.no_grad():
            predictions = [one for batch in batches for one in task.predict(model, batch)]
        return task.score(predictions, task.rows["validation"])

    metrics = measured(task)
    assert metrics["loss"] == pytest.approx(whole, abs=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(whole), rel=1e-6)
    assert metrics["tokens"] == len(TEXT.split(" ")) + 1  # every word and end of line, and the end of the text
    assert {len(row) for row in task.rows["train"][[0, 1]]["input_ids"]} == {4}
    assert measured(task_of(tmp_path, context_length=4))["loss"] != pytest.approx(whole, abs=1e-4)  # short rows forget


def test_an_empty_prompt_is_continued_alone_as_beside_others(tmp_path):
    task = task_of(tmp_path, context_length=16, sample_tokens=3)
    config = task.new_config("bm_transformer", {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2})
    task.configure(config)
    model = AutoModelForCausalLM.from_config(config).eval()
    rows = list(task.encode_inputs(Dataset.from_dict({"text": ["the cat", ""]})))
    together = task.predict(model, task.collator()(rows))
    assert [task.predict(model, task.collator()([row]))[0] for row in rows] == together


def test_a_new_model_reads_the_longest_row(tmp_path):
    longer = task_of(tmp_path, context_length=4, eval_context_length=16)
    assert longer.config_fields["max_position_embeddings"] == 16
    assert longer.processor.model_max_length == 16
    with pytest.raises(ValueError, match="context_length=16 exceeds max_position_embeddings=8; lower it"):
        longer.configure(AutoConfig.for_model("bm_transformer", max_position_embeddings=8))
    with pytest.raises(ValueError, match="eval_context_length=0 must be at least 1 token"):
        CausalLMArguments(eval_context_length=0)


def test_rows_that_carry_a_state_come_in_the_order_of_the_text(tmp_path):
    task = task_of(tmp_path, context_length=4, carry_state=True)
    batches = task.train_batches(batch_size=2, micro_batch_size=0, seed=1)
    assert batches.carries_state
    tokens = task.rows["train"].store.tokens.tolist()
    lanes = torch.cat([batches[step][0]["input_ids"] for step in range(int(batches.steps_per_epoch))], dim=1)
    assert lanes.flatten().tolist()[: len(tokens) - 1] == tokens[:-1]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (["--carry_state", "true"], r"Trainer shuffles the rows; carry_state=True is for recipes/pretrain\.py"),
        (["--label_smoothing_factor", "0.1"], r"label_smoothing_factor=0\.1 has no effect on causal_lm"),
        (["--load_best_model_at_end", "true", "--metric_for_best_model", "f1"], "metric_for_best_model='f1' is not"),
    ],
)
def test_a_plan_of_fine_tuning_refuses_what_the_run_would(tmp_path, setting, message):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be\n" * 20, encoding="utf-8")
    files = ["--task", "causal_lm", "--train_file", str(text), "--validation_file", str(text)]
    sizes = ["--vocab_size", "300", "--context_length", "8", "--model_type", "bm_rnn", "--hidden_size", "8"]
    with pytest.raises(ValueError, match=message):
        finetune.main([*files, *sizes, "--output_dir", str(tmp_path / "run"), "--dry_run", *setting])
