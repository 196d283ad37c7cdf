"""What a packed row is to a model: each document alone, whatever stands beside it, in all three families."""

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import bmtk  # noqa: F401  registers the model families
from bmtk.data.best_fit import BestFitRows
from bmtk.errors import UserError
from bmtk.tasks.causal_lm import TASK, CausalLMArguments
from bmtk.tasks.masked_lm import TASK as MASKED
from bmtk.tasks.masked_lm import MaskedLMArguments

DOCUMENTS = ["a", "bcd ef", "the cat", "sat on a mat and slept", "dog " * 12, "fox", "owl and owlet", "x y z"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.5}
FAMILIES = {
    "bm_transformer": {"num_attention_heads": 2},
    "bm_rnn": {},
    "bm_cnn": {"input_type": "tokens", "block_type": "gated", "kernel_size": 3},
}


def objective_of(folder, family, task=TASK, arguments=CausalLMArguments, **settings):
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS), encoding="utf-8")
    files = {"train_file": [str(path)], "validation_file": [str(path)], "leakage": "allow"}
    settings = {"tokenizer": "char", "context_length": 32, "packing": "best_fit", **settings}
    data = task.read(arguments(**files, **settings), folder=folder / "run")
    return data.bind(data.new_config(family, {**SIZES, **FAMILIES[family]}))


def spans(positions):
    """(row, first, last) of everything that begins with position 0."""
    begins = (positions == 0).nonzero().tolist()
    ends = [first for row, first in begins[1:]] + [0]
    return [(row, first, end or positions.shape[1]) for (row, first), end in zip(begins, ends, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
def test_another_document_changes_nothing(tmp_path, family, task):
    is_causal = task == "causal_lm"
    how = {} if is_causal else {"task": MASKED, "arguments": MaskedLMArguments}
    objective = objective_of(tmp_path, family, **how)
    torch.manual_seed(0)
    model = (AutoModelForCausalLM if is_causal else AutoModelForMaskedLM).from_config(objective.config).eval()
    rows = objective.rows["train"]
    batch = rows.batch(range(len(rows)), [0] * len(rows))
    ids, positions = batch["input_ids"], batch["position_ids"]

    @torch.no_grad()
    def logits(ids):
        return model(input_ids=ids, position_ids=positions).logits

    before, found = logits(ids), spans(positions)
    assert len(found) > len(ids) + 4  # most rows hold several documents
    for row, first, last in found:
        changed = ids.clone()
        changed[row, first:last] = (changed[row, first:last] + 1) % len(objective.tokenizer)
        inside = torch.zeros_like(ids, dtype=torch.bool)
        inside[row, first:last] = True
        after = logits(changed)
        assert torch.equal(after[~inside], before[~inside])
        assert not torch.equal(after[inside], before[inside])
        alone = model(input_ids=ids[row : row + 1, first:last]).logits[0]
        torch.testing.assert_close(alone, before[row, first:last], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_mean_over_the_documents_alone(tmp_path, family):
    """Pads have no part in it, neither in its sum nor in what it is divided by."""
    objective = objective_of(tmp_path, family)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(objective.config).eval()
    rows = objective.rows["train"]
    assert isinstance(rows, BestFitRows)
    assert rows.num_pads > 0
    losses = []
    for i in range(rows.store.num_documents):
        document = torch.tensor(rows.store.document(i).astype("int64"))
        for first in range(0, len(document), 32):  # a long one is cut into full rows and a rest
            ids, targets = document[first : first + 32], document[first + 1 : first + 33]
            scores = model(input_ids=ids[None]).logits[0, : len(targets)]
            losses += F.cross_entropy(scores, targets, reduction="none").tolist()
    batch = rows[range(len(rows))]
    assert objective.num_items(batch) == len(losses) == rows.store.num_tokens - rows.store.num_documents
    loss = model(**batch, num_items_in_batch=objective.num_items(batch)).loss
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_packing_is_of_training_rows_and_counted(tmp_path):
    objective = objective_of(tmp_path, "bm_rnn")
    rows = objective.rows["train"]
    share = rows.num_pads / (32 * len(rows))
    rows_and_pads = f"{len(rows)} rows of 32 tokens, {share:.2%} of them padding"
    assert objective.notes[-1] == (
        f"packing=best_fit, train: {rows_and_pads}; documents longer than a row, which are cut: 1"
    )
    assert not isinstance(objective.rows["validation"], BestFitRows)
    assert not isinstance(objective_of(tmp_path, "bm_rnn", packing="cut").rows["train"], BestFitRows)
    with pytest.raises(UserError, match="packing='fit' is unknown; choose one of cut, best_fit"):
        CausalLMArguments(packing="fit")
    with pytest.raises(
        UserError, match="carry_state reads the text in its order; leave it out, or set packing to cut"
    ):
        CausalLMArguments(packing="best_fit", carry_state=True)
