"""How much faster a step of a masked language model is where the hidden tokens alone are scored (`skip_logits`).

    python benchmarks/masked_lm.py

Passes of both kinds, forward and backward, take turns on one thread; told are median, least and most of their ratios.
"""

import statistics
import time

import torch
from transformers import AutoModelForMaskedLM

from bmtk.models.configuration_bm_transformer import BmTransformerConfig

ROUNDS, SHAPE, HIDDEN = 9, (8, 256), 0.15
SIZES = ({"vocab_size": 6000, "hidden_size": 128, "num_hidden_layers": 2},
         {"vocab_size": 30522, "hidden_size": 256, "num_hidden_layers": 4})  # fmt: skip


def seconds(model, ids: torch.Tensor, labels: torch.Tensor, *, skip_logits: bool) -> float:
    started = time.perf_counter()
    model(input_ids=ids, labels=labels, skip_logits=skip_logits).loss.backward()
    model.zero_grad()
    return time.perf_counter() - started


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for size in SIZES:
        model = AutoModelForMaskedLM.from_config(BmTransformerConfig(**size, num_attention_heads=4, is_causal=False))
        ids = torch.randint(10, size["vocab_size"], SHAPE)
        labels = ids.where(torch.rand(SHAPE) < HIDDEN, -100)
        pairs = [
            [seconds(model, ids, labels, skip_logits=skips) for skips in (False, True)] for _ in range(ROUNDS + 1)
        ]
        ratios = [whole / skipped for whole, skipped in pairs[1:]]  # the first warms up
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{size}: {statistics.median(ratios):.2f} times as fast ({spread}, {ROUNDS} rounds)")


if __name__ == "__main__":
    main()
