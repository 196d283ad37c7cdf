"""Characters of tiny Shakespeare to a validation loss of 1.88: whole processes, from the command to its end, in turns.

    python benchmarks/time_to_loss.py --nanogpt DIR        # DIR: a clone of github.com/karpathy/nanoGPT
    python benchmarks/time_to_loss.py --only ours llama --rounds 5

    ours       recipes/pretrain.py with causal_lm/tiny_shakespeare_char.yaml and as many steps as it takes (--steps)
    llama      LlamaForCausalLM of the same size in transformers' Trainer, AdamW, a cosine of --llama_steps steps
    nanogpt    the command for a CPU of nanoGPT's README: 2,000 steps of 12 rows

All train on the first nine tenths of the text, in rows of 64 characters, with about 0.8 M parameters.  Ours and llama
are measured on the whole of the last tenth, nanoGPT on 20 random batches of it, as it does.  A contestant that ends
above the loss is marked: its time is that of a run which did not get there.
"""

import argparse
import json
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "recipes" / "data" / "tiny_shakespeare"
CONFIG = "recipes/configs/causal_lm/tiny_shakespeare_char.yaml"
TARGET = 1.88
README_COMMAND = (
    "--device=cpu --compile=False --eval_iters=20 --log_interval=100 --block_size=64 --batch_size=12 --n_layer=4 "
    "--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
).split()


@dataclass(frozen=True)
class Lap:
    """One process: wall seconds of it and of its training, its processor seconds, and the loss in the end."""

    whole: float
    training: float
    processor: float
    loss: float


def ours(args: argparse.Namespace, folder: Path) -> Lap:
    out = folder / "run"
    words = [str(ROOT / "recipes" / "pretrain.py"), "--config", CONFIG, "--output_dir", str(out)]
    words += ["--num_train_steps", str(args.steps), "--sample_tokens", "0"]
    _, whole, processor = timed([sys.executable, *words], cwd=ROOT)
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    return Lap(whole, run["train_seconds"], processor, run["metrics"]["validation/loss"])


def llama(args: argparse.Namespace, folder: Path) -> Lap:
    words = [__file__, "--child", str(folder / "run"), "--llama_steps", str(args.llama_steps)]
    printed, whole, processor = timed([sys.executable, *words], cwd=ROOT)
    training, loss = map(float, printed.split()[-2:])
    return Lap(whole, training, processor, loss)


def nanogpt(args: argparse.Namespace, folder: Path) -> Lap:
    clone, data = folder / "nanoGPT", folder / "nanoGPT" / "data" / "shakespeare_char"
    shutil.copytree(args.nanogpt, clone, ignore=shutil.ignore_patterns(".git", "assets"))
    train, validation, num_tokens = ids_of_text()
    for name, ids in (("train", train), ("val", validation)):
        ids.astype("uint16").tofile(data / f"{name}.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": num_tokens}))
    words = ["train.py", "config/train_shakespeare_char.py", *README_COMMAND]
    printed, whole, processor = timed([sys.executable, *words], cwd=clone)
    loss = float(re.findall(r"val loss ([\d.]+)", printed)[-1])
    steps = [float(ms) for ms in re.findall(r"iter \d+: loss [\d.]+, time ([\d.]+)ms", printed)]
    return Lap(whole, statistics.median(steps) * 2, processor, loss)  # of 2,000 steps, in seconds


def ids_of_text():
    """The two parts of the text as numbers of its characters, and how many characters there are."""
    import numpy as np

    parts = [(TEXT / f"{name}.txt").read_text(encoding="utf-8") for name in ("train", "validation")]
    known = {character: number for number, character in enumerate(sorted(set("".join(parts))))}
    return *(np.array([known[character] for character in part]) for part in parts), len(known)


def train_llama(folder: str, steps: int) -> None:
    """Print the seconds of training and the loss of the last tenth: what the child of `llama` does."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    train, validation, num_tokens = ids_of_text()
    rows = [
        [{"input_ids": row, "labels": row} for row in torch.tensor(part[: len(part) // 64 * 64]).view(-1, 64)]
        for part in (train, validation)
    ]
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
    torch.manual_seed(42)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=num_tokens, max_position_embeddings=64, **sizes))
    settings = {"learning_rate": 3e-3, "adam_beta2": 0.99, "lr_scheduler_type": "cosine", "warmup_steps": 100}
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=12, per_device_eval_batch_size=64, weight_decay=0.1,
        use_cpu=True, bf16=True, report_to="none", save_strategy="no", disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows[0], eval_dataset=rows[1])
    found = trainer.train()
    print(found.metrics["train_runtime"], trainer.evaluate()["eval_loss"])


def timed(command: list[str], *, cwd: Path) -> tuple[str, float, float]:
    """What a command prints, and its wall and processor seconds.  Exits with its output if it fails."""
    before, started = os.times(), time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    wall, after = time.perf_counter() - started, os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return done.stdout, wall, processor


CONTESTANTS: dict[str, Callable[[argparse.Namespace, Path], Lap]] = {"ours": ours, "llama": llama, "nanogpt": nanogpt}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="clone of nanoGPT; without one it is left out")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=320, help="optimizer steps of ours (default: 320)")
    parser.add_argument("--llama_steps", type=int, default=1000, help="of llama (default: 1000)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return train_llama(args.child, args.llama_steps)
    names = [name for name in args.only if name != "nanogpt" or args.nanogpt]
    laps: dict[str, list[Lap]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                laps[name].append(CONTESTANTS[name](args, Path(folder)))
                print(name, laps[name][-1], flush=True)
    figures = {name: [vars(lap) for lap in found] for name, found in laps.items()}
    print(f"\n{'':10}{'whole s':>22}{'training s':>22}{'processor s':>12}{'loss':>8}   whole / ours")
    for name, found in laps.items():
        loss = max(lap.loss for lap in found)
        ratio = shown([lap.whole / first.whole for lap, first in zip(found, laps[names[0]], strict=True)])
        columns = [shown([lap.whole for lap in found]), shown([lap.training for lap in found])]
        processor = statistics.median(lap.processor for lap in found)
        mark = "" if loss <= TARGET else f"   above {TARGET}"
        print(f"{name:10}{columns[0]:>22}{columns[1]:>22}{processor:12.1f}{loss:8.3f}   {ratio}{mark}")
    if args.json:
        args.json.write_text(json.dumps({"target": TARGET, "laps": figures}, indent=1) + "\n", encoding="utf-8")


def shown(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
