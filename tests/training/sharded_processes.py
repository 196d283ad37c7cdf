"""The runs that test_sharding compares: on one process, and in each layout on several that are forked once."""

import os
from functools import cache
from pathlib import Path

import torch
from tiny_run import Stream, arguments, run
from transformers import AutoConfig, AutoModelForCausalLM

from bmtk.training import optimizers

VOCABULARY = 24
LAYOUTS = {
    2: {"fsdp 2": {"fsdp_size": 2}, "tp 2": {"tp_size": 2}},
    4: {"fsdp 4": {"fsdp_size": 4}, "hsdp 2x2": {"fsdp_size": 2, "dp_replicate_size": 2},
        "fsdp 2 x tp 2": {"fsdp_size": 2, "tp_size": 2}},
}  # fmt: skip
MUON = {"optimizer": "muon", "muon_learning_rate": 0.02}
# name -> settings of the run, model_type, changes of the configuration
CASES = {
    "tied": ({}, "bm_transformer", {"tie_word_embeddings": True}),
    "untied": ({"ema_decay": 0.9, "max_grad_norm": 0.1}, "bm_transformer", {"tie_word_embeddings": False}),
    "muon": (MUON, "bm_transformer", {"tie_word_embeddings": False, "qk_norm": False, "hidden_act": "relu2"}),
    "checkpointing": ({"gradient_checkpointing": True}, "bm_transformer", {"tie_word_embeddings": False}),
    "convolutions": ({}, "bm_cnn", {"input_type": "tokens"}),
    "lstm": ({"optimizer": "sgd", "learning_rate": 1.0}, "bm_rnn", {}),
    "mingru": (MUON, "bm_rnn", {"cell_type": "mingru"}),
}
RESUMED = ("untied", "lstm")  # also from the middle of the run of one process
CARRIED = ("lstm",)  # the rows go on from the state of the step before


def fits(name: str, layout: dict[str, int]) -> bool:
    """Whether a case can have a layout: only Transformers are cut."""
    return layout.get("tp_size", 1) == 1 or CASES[name][1] == "bm_transformer"


def model_of(name: str):
    """A model with two layers of width 16, equal at every call."""
    torch.manual_seed(7)
    _, kind, changes = CASES[name]
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.2}
    if kind == "bm_transformer":
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **changes))


def train(folder: Path, name: str, *, batches=None, **changes):
    """The run of a case in `folder`, to its end or from where it was."""
    # Every process has two micro-batches a step: a step of few rows costs each of them as much as one of many.
    num_shares = int(os.environ.get("WORLD_SIZE", "1")) // changes.get("tp_size", 1)
    sizes = {"num_train_steps": 4, "micro_batch_size": 4 // num_shares}
    # Gradients that are rounding errors of 0 would move their weights by a whole step with a smaller epsilon.
    settings = {**sizes, "adam_epsilon": 1e-4, **CASES[name][0], **changes}
    if name in CARRIED:
        batches = batches or (lambda **share: Stream(settings["micro_batch_size"], **share))
    return run(arguments(folder, **settings), model=model_of(name), batches=batches)


def run_cases(folder: Path) -> None:
    """All cases in the layouts of as many processes as there are; those that were stopped half-way go on."""
    optimizers.multiplies_bfloat16_fast = lambda *_: False  # a rounding to 16 bits would hide what is compared
    # The groups of processes of a layout, and what torch has found out about operations in it, serve all its cases.
    torch.distributed.init_device_mesh = cache(torch.distributed.init_device_mesh)
    for layout, sizes in LAYOUTS[int(os.environ["WORLD_SIZE"])].items():
        for name in (name for name in CASES if fits(name, sizes)):
            saved = {} if name in RESUMED else {"save_steps": 0}
            train(folder / f"{layout}-{name}", name, **sizes, **saved)
            if name in RESUMED:
                train(folder / f"half of {layout}-{name}", name, **sizes)
    if (folder / "four then two").exists():
        train(folder / "four then two", "untied", fsdp_size=2)
    torch.distributed.destroy_process_group()
