"""Low-rank updates of every kind of trunk: they train, are saved alone, load, and merge to the same outputs."""

import pytest
import torch
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from bmtk.models.configuration_bm_cnn import BmCnnConfig
from bmtk.models.configuration_bm_rnn import BmRnnConfig
from bmtk.models.configuration_bm_transformer import BmTransformerConfig
from bmtk.training.adapters import AdapterArguments, add_adapter, load_adapter

TEXT = {"vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0, "num_labels": 3}
MODELS = {
    "cnn": lambda: AutoModelForImageClassification.from_config(
        BmCnnConfig(input_type="pixels", block_type="basic", hidden_sizes=[8, 8], depths=[1, 1], image_size=8)
    ),
    "lstm": lambda: AutoModelForSequenceClassification.from_config(BmRnnConfig(**TEXT)),
    "mingru": lambda: AutoModelForSequenceClassification.from_config(BmRnnConfig(**TEXT, cell_type="mingru")),
    "transformer": lambda: AutoModelForSequenceClassification.from_config(
        BmTransformerConfig(**TEXT, num_attention_heads=2)
    ),
}
ADAPTED = {
    "cnn": "model.stages.0",
    "lstm": "recurrence",
    "mingru": "recurrence",
    "transformer": "self_attn.q_proj",
}


def built(name: str, seed: int = 0):
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    inputs = (
        {"pixel_values": torch.randn(4, 3, 8, 8)} if name == "cnn" else {"input_ids": torch.arange(1, 13).view(4, 3)}
    )
    return model, {**inputs, "labels": torch.tensor([0, 1, 1, 0])}


def trained(model, batch):
    """A few steps; in eval mode, so that running statistics stay as the base has them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(16):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.trains
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "adapter"), [*((name, "lora") for name in MODELS), ("cnn", "dora"), ("transformer", "dora")]
)
def test_an_adapter_trains_loads_and_merges_to_the_same_outputs(name, adapter, tmp_path, training_seed):
    model, batch = built(name, training_seed)
    frozen = {key: value.clone() for key, value in model.base_model.state_dict().items()}
    adapted = add_adapter(model, AdapterArguments(adapter=adapter, lora_rank=2), task_type=None)
    updates = [key for key, p in adapted.named_parameters() if p.requires_grad and "modules_to_save" not in key]
    assert updates
    assert all("lora_" in key for key in updates)
    assert any(ADAPTED[name] in key for key in updates)
    losses = trained(adapted, batch)
    assert losses[-1] < losses[0]
    moved = [key for key in updates if "lora_B" in key and adapted.get_parameter(key).abs().sum() > 0]
    assert moved
    assert any(ADAPTED[name] in key for key in moved)
    with torch.no_grad():
        expected = adapted(**batch).logits
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > 0
    again, _ = built(name, training_seed)
    assert all(torch.equal(value, frozen[key]) for key, value in again.base_model.state_dict().items())
    loaded = load_adapter(again, str(tmp_path)).eval()
    merged = loaded.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    assert type(merged) is type(model)


def test_what_an_adapter_cannot_do_is_refused():
    model, _ = built("lstm")
    with pytest.raises(ValueError, match="adapter=dora knows no recurrent layers; choose lora"):
        add_adapter(model, AdapterArguments(adapter="dora"), task_type=None)
    with pytest.raises(ValueError, match=r"lora_dropout=0\.1 does not reach recurrent matrices; leave it out"):
        add_adapter(model, AdapterArguments(adapter="lora", lora_dropout=0.1), task_type=None)
    model = AutoModelForImageClassification.from_config(BmCnnConfig.from_preset("mlp-784-128-10"))
    with pytest.raises(ValueError, match="adapter=lora: a BmCnnForImageClassification has no matrices; leave adapter"):
        add_adapter(model, AdapterArguments(adapter="lora"), task_type=None)
