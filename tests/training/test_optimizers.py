"""Which parameter goes to which optimizer, with which decay, and a state that is found again by name."""

import pytest
import torch
from tiny_run import TinyBatches, num_items, tiny_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from bmtk.errors import UserError
from bmtk.models.configuration_bm_cnn import BmCnnConfig
from bmtk.models.modeling_bm_cnn import BmCnnForImageClassification
from bmtk.training import optimizers
from bmtk.training.adapters import AdapterArguments, add_adapter
from bmtk.training.arguments import LoopArguments
from bmtk.training.optimizers import build_optimizer

LAYER = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{x}_proj" for x in "koqv")]
HIDDEN = {f"model.layers.{layer}.{name}.weight" for layer in range(2) for name in LAYER}


def groups(optimizer) -> list[set[str]]:
    return [{optimizer.names[parameter] for parameter in group["params"]} for group in optimizer.param_groups]


def backward(model, step: int = 0):
    for batch in TinyBatches(0)[step]:
        model(**batch, use_cache=False, num_items_in_batch=num_items(batch)).loss.backward()


def test_adamw_decays_matrices_and_nothing_else():
    optimizer = build_optimizer(tiny_model(), LoopArguments(weight_decay=0.3))
    decayed, others = groups(optimizer)
    assert decayed == HIDDEN | {"lm_head.weight"}
    assert others == {name for name, _ in tiny_model().named_parameters()} - decayed
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert all(group["fused"] for group in optimizer.param_groups)


def test_sgd_is_torchs_with_momentum_and_decays_matrices_only():
    model, args = tiny_model(), LoopArguments(optimizer="sgd", learning_rate=0.5, weight_decay=0.1, sgd_momentum=0.8)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer, gradients = build_optimizer(model, args), []
    for step in range(2):
        backward(model, step)
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    for name, start in before.items():
        decay, momentum, value = 0.1 if name in HIDDEN | {"lm_head.weight"} else 0.0, 0.0, start
        for gradient in gradients:  # Nesterov: the gradient is looked at from where the momentum leads
            total = gradient[name] + decay * value
            momentum = total if isinstance(momentum, float) else 0.8 * momentum + total
            value = value - 0.5 * (total + 0.8 * momentum)
        torch.testing.assert_close(model.get_parameter(name).detach(), value, rtol=1e-5, atol=1e-6)
    other = build_optimizer(tiny_model(), args)
    other.load_state_dict(optimizer.state_dict())
    assert all(
        torch.equal(state["momentum_buffer"], other.state_dict()["state"][name]["momentum_buffer"])
        for name, state in optimizer.state_dict()["state"].items()
    )


def test_muon_takes_the_hidden_matrices_and_leaves_embedding_and_head_to_adamw():
    optimizer = build_optimizer(tiny_model(), LoopArguments(optimizer="muon", muon_learning_rate=0.05))
    head, others, hidden = groups(optimizer)
    assert hidden == HIDDEN
    assert head == {"lm_head.weight"}
    assert "model.embed_tokens.weight" in others
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1e-3, 1e-3, 0.05]
    assert isinstance(optimizer.optimizers[1], torch.optim.Muon)


def test_muon_keeps_the_share_of_former_gradients_that_muon_momentum_names():
    model, share = tiny_model(), 0.6
    optimizer, gradients = build_optimizer(model, LoopArguments(optimizer="muon", muon_momentum=share)), []
    for step in range(2):
        backward(model, step)
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    first, second = gradients
    for name in HIDDEN:
        expected = share * (1 - share) * first[name] + (1 - share) * second[name]
        torch.testing.assert_close(optimizer.state_dict()["state"][name]["momentum_buffer"], expected)


def test_a_momentum_of_muon_that_never_forgets_is_refused():
    with pytest.raises(
        UserError, match=r"muon_momentum=1\.0 is out of range; give a number of at least 0 and below 1"
    ):
        LoopArguments(optimizer="muon", muon_momentum=1.0)


@pytest.mark.parametrize(("fast", "tolerance"), [(True, 0.05), (False, 0.05)], ids=["bfloat16", "float32"])
def test_muon_makes_the_updates_of_torchs(fast, tolerance, monkeypatch):
    """torch's works in bfloat16, so its updates are known to two digits; several shapes, wide and tall, two steps."""
    monkeypatch.setattr(optimizers, "multiplies_bfloat16_fast", lambda device: fast)
    torch.manual_seed(0)
    shapes = [(8, 24), (24, 8), (8, 24), (16, 16), (24, 8)]
    ours, theirs = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.2}
    one, other = optimizers.Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for _ in range(2):
        for mine, expected in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape)
            expected.grad = mine.grad.clone()
        one.step()
        other.step()
    for mine, expected in zip(ours, theirs, strict=True):
        moved = (expected - 1).abs().max()
        assert (mine - expected).abs().max() < tolerance * moved
        torch.testing.assert_close(one.state[mine]["momentum_buffer"], other.state[expected]["momentum_buffer"])


def test_filters_move_as_the_matrix_of_their_rows_does_in_any_layout(monkeypatch):
    # Torch's own rounds to bfloat16 and refuses filters.
    monkeypatch.setattr(optimizers, "multiplies_bfloat16_fast", lambda device: False)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor)
    torch.manual_seed(0)
    shapes = [(6, 8, 3, 3), (90, 8, 3, 3), (6, 8, 1, 1)]
    filters = [nn.Parameter(torch.randn(shape).to(memory_format=torch.channels_last)) for shape in shapes]
    matrices = [nn.Parameter(one.detach().flatten(1).clone()) for one in filters]
    settings = {"lr": 0.1, "weight_decay": 0.2}
    one, other = optimizers.Muon(filters, **settings), torch.optim.Muon(matrices, **settings)
    for _ in range(2):
        for mine, expected in zip(filters, matrices, strict=True):
            mine.grad = torch.randn_like(mine)
            expected.grad = mine.grad.flatten(1)
        one.step()
        other.step()
    for mine, expected in zip(filters, matrices, strict=True):
        torch.testing.assert_close(mine.flatten(1), expected, rtol=1e-5, atol=1e-6)


def test_orthogonal_moves_singular_values_to_about_one_and_leaves_singular_vectors(monkeypatch):
    monkeypatch.setattr(optimizers, "multiplies_bfloat16_fast", lambda device: False)
    group = torch.optim.Muon([nn.Parameter(torch.ones(2, 2))]).param_groups[0]
    torch.manual_seed(0)
    for matrix in (torch.randn(6, 10), torch.randn(10, 6)):
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        inside = left.T @ optimizers.orthogonal(matrix[None], group)[0] @ right.T
        torch.testing.assert_close(inside, inside.diagonal().diag(), rtol=0, atol=1e-5)
        assert 0.6 < inside.diagonal().min() <= inside.diagonal().max() < 1.25


def test_a_table_that_embedding_and_head_share_goes_to_adamw_without_decay():
    optimizer = build_optimizer(tiny_model(tied=True), LoopArguments(optimizer="muon"))
    others, hidden = groups(optimizer)
    assert hidden == HIDDEN
    assert "model.embed_tokens.weight" in others
    assert optimizer.param_groups[0]["weight_decay"] == 0.0


def test_muon_takes_the_matrices_of_gpt2_but_not_its_learned_positions():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=8, n_positions=4))
    *_, hidden = groups(build_optimizer(model, LoopArguments(optimizer="muon")))
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert hidden == {f"transformer.h.0.{name}.weight" for name in names}


def test_muon_leaves_the_head_of_a_classifier_to_adamw():
    model = LlamaForSequenceClassification(LlamaConfig.from_dict(tiny_model().config.to_dict() | {"pad_token_id": 0}))
    *_, hidden = groups(build_optimizer(model, LoopArguments(optimizer="muon")))
    assert hidden == HIDDEN


def test_muon_takes_filters_but_neither_those_of_pixels_nor_depthwise_ones():
    sizes = {"image_size": 8, "stem_type": "conv", "stem_width": 8, "hidden_sizes": [16], "depths": [1]}
    basic = BmCnnForImageClassification(BmCnnConfig(block_type="basic", **sizes))
    *_, hidden = groups(build_optimizer(basic, LoopArguments(optimizer="muon")))
    names = ("body.0.0", "body.1.0", "shortcut.0")
    assert hidden == {f"model.stages.0.blocks.0.{name}.weight" for name in names}

    convnext = BmCnnForImageClassification(BmCnnConfig(block_type="convnext", **sizes))
    *_, hidden = groups(build_optimizer(convnext, LoopArguments(optimizer="muon")))
    names = ("downsample.1", "blocks.0.up", "blocks.0.down")
    assert hidden == {f"model.stages.0.{name}.weight" for name in names}


def test_muon_takes_the_updates_of_an_adapter_and_leaves_its_head_to_adamw():
    model = LlamaForSequenceClassification(LlamaConfig.from_dict(tiny_model().config.to_dict() | {"pad_token_id": 0}))
    adapted = add_adapter(model, AdapterArguments(adapter="lora", lora_rank=2), task_type=None)
    head, hidden = groups(build_optimizer(adapted, LoopArguments(optimizer="muon")))
    assert head == {"base_model.model.score.modules_to_save.default.weight"}
    assert len(hidden) == 2 * len(HIDDEN)
    assert all("lora_" in name for name in hidden)


class Flat(PreTrainedModel):
    """A model without a trunk of its own."""

    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(5, 4)
        self.mixer = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 5)
        self.post_init()


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_of_a_model_without_a_trunk_goes_to_adamw_too(tied):
    model = Flat(PreTrainedConfig())
    if tied:
        model.lm_head.weight = model.embed_tokens.weight
    *_, hidden = groups(build_optimizer(model, LoopArguments(optimizer="muon")))
    assert hidden == {"mixer.weight"}


def test_frozen_parameters_are_in_no_group():
    model = tiny_model()
    model.model.layers[0].requires_grad_(False)
    *_, hidden = groups(build_optimizer(model, LoopArguments(optimizer="muon")))
    assert hidden == {name for name in HIDDEN if ".layers.1." in name}


def test_the_two_optimizers_step_as_torchs_own_do(monkeypatch):
    # Torch's own always rounds to bfloat16, where the order of sums decides.  In float32 both are the formula itself.
    monkeypatch.setattr(optimizers, "multiplies_bfloat16_fast", lambda device: False)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor)
    model, oracle = tiny_model(), tiny_model()
    args = LoopArguments(optimizer="muon", weight_decay=0.2)
    optimizer = build_optimizer(model, args)
    named = dict(oracle.named_parameters())
    rest = [parameter for name, parameter in named.items() if name not in HIDDEN | {"lm_head.weight"}]
    settings = dict(lr=1e-3, betas=(0.9, 0.95))
    oracles = [
        torch.optim.Muon([named[name] for name in named if name in HIDDEN], lr=0.02, weight_decay=0.2),
        torch.optim.AdamW([named["lm_head.weight"]], weight_decay=0.2, **settings),
        torch.optim.AdamW(rest, weight_decay=0.0, **settings),
    ]
    for step in range(3):
        for own in (model, oracle):
            own.zero_grad()
            backward(own, step)
        for each in (optimizer, *oracles):
            each.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_state_is_found_again_by_name(kind):
    first, second = tiny_model(), tiny_model()
    optimizer = build_optimizer(first, LoopArguments(optimizer=kind))
    backward(first)
    optimizer.step()
    state = optimizer.state_dict()["state"]
    assert set(state) == {name for name, _ in first.named_parameters()}
    shuffled = {"state": {name: state[name] for name in sorted(state, reverse=True)}}

    second.load_state_dict(first.state_dict())
    resumed = build_optimizer(second, LoopArguments(optimizer=kind))
    resumed.load_state_dict(shuffled)
    for model, each in ((first, optimizer), (second, resumed)):
        model.zero_grad()
        backward(model, 1)
        each.step()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_state_of_a_torch_optimizer_that_numbers_its_parameters_is_read_by_name():
    model = tiny_model()
    optimizer = build_optimizer(model, LoopArguments())
    alone = torch.optim.AdamW([{"params": group["params"]} for group in optimizer.param_groups])
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(number))
    alone.step()
    optimizer.load_state_dict(alone.state_dict())
    for number, parameter in enumerate(model.parameters()):
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], torch.full_like(parameter, 0.1 * number))


def test_a_state_of_numbers_in_other_groups_is_refused():
    model = tiny_model()
    alone = torch.optim.AdamW(model.parameters())
    optimizer = build_optimizer(model, LoopArguments())
    with pytest.raises(UserError, match=r"has groups of \[\d+\] parameters, this run has \[\d+, \d+\]; resume"):
        optimizer.load_state_dict(alone.state_dict())


def test_a_state_of_another_model_is_refused_by_name():
    optimizer = build_optimizer(tiny_model(), LoopArguments())
    with pytest.raises(ValueError, match=r"does not train: other\.weight; resume with the model"):
        optimizer.load_state_dict({"state": {"other.weight": {}}})
    wrong = {"exp_avg": torch.zeros(3, 4)}
    with pytest.raises(ValueError, match=r"exp_avg of lm_head\.weight has the shape \(3, 4\).*\(23, 16\)"):
        optimizer.load_state_dict({"state": {"lm_head.weight": wrong}})


def test_a_model_without_anything_to_train_is_refused():
    model = tiny_model()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(model, LoopArguments())
    model.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match=r"found no trainable matrix.*use 'adamw'"):
        build_optimizer(model, LoopArguments(optimizer="muon"))


def test_accelerate_takes_it_for_one_optimizer():
    from accelerate import Accelerator

    model = tiny_model()
    optimizer = build_optimizer(model, LoopArguments(optimizer="muon"))
    prepared = Accelerator(cpu=True).prepare(optimizer)
    before = [parameter.clone() for parameter in model.parameters()]
    backward(model)
    prepared.step()
    prepared.zero_grad()
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(changed)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert isinstance(model.lm_head, nn.Linear)


@pytest.mark.parametrize(("kernels", "fast"), [("AVX512", True), ("AVX2", False), ("DEFAULT", False)])
def test_bfloat16_is_fast_only_where_torch_has_kernels_for_the_instructions(kernels, fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kernels)
    assert optimizers.multiplies_bfloat16_fast("cpu") is fast
