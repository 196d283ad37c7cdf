"""What `make gpu` does on a machine with a CUDA card: the tests marked `gpu`, and the rows that need one.

python benchmarks/gpu.py                # at most ten minutes; without a card it says so and ends with status 0
python benchmarks/gpu.py --data DIR     # also CIFAR-10 (DIR/cifar10, train/ and test/ with a folder for each label)
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project; a script has only its own folder

import torch

from benchmarks.rows import ROOT, ROWS, Line, Settings, at_least, at_most, gpu_row, measured, not_run, show, write_json
from benchmarks.steps import QUICK, Shape, mfu, peak_line, step_lines, tokens_per_second
from benchmarks.time_to_loss import CHARACTERS, FEW_EPOCHS, data_folder, recipe_lap

BABY = (
    "--hidden_size 384 --num_hidden_layers 6 --num_attention_heads 6 --context_length 256 --hidden_dropout 0.2 "
    "--batch_size 64 --sample_tokens 0 --learning_rate 3e-3 --muon_momentum 0.95"
).split()
BABY_STEPS, BABY_LOSS = 1000, 1.4697  # loss: nanoGPT's README, after 5,000 steps and 3 minutes on an A100
MINUTES = 10  # all together


@gpu_row
def gpu_step(settings: Settings) -> list[Line]:
    """6 layers, width 384, context 256, vocabulary 8,192, bf16 on the card: tokens/s beside Trainer and bare loops."""
    return step_lines("6L/384/256/8k, GPU", shape_of(settings, Shape(rows=64)), settings)


@gpu_row
def gpu_gpt2(settings: Settings) -> list[Line]:
    """GPT-2 small's shape at context 1,024, bf16: tokens/s beside Trainer, and MFU."""
    gpt2 = Shape(layers=12, width=768, heads=12, context=1024, vocabulary=50_304, rows=16)
    shape = shape_of(settings, gpt2)
    rates = tokens_per_second(("ours", "trainer"), shape, settings)
    share = [mfu({"ours": [rate]}, shape) for rate in rates["ours"]]
    return [
        Line("GPT-2 small, GPU", "tokens/s", rates["ours"], rates["trainer"], "Trainer + Llama", mfu=max(share)),
        Line("GPT-2 small, GPU: MFU", "of the peak", share, target=at_least(0.55)),
    ]


@gpu_row
def gpu_peak(settings: Settings) -> Line:
    """The peak that MFU divides by, bf16, beside a benchmark of matrix products on the card."""
    return peak_line("bfloat16, GPU", torch.bfloat16, settings, device_of())


@gpu_row
def gpu_baby(settings: Settings) -> Line:
    """nanoGPT's baby model (6 layers, width 384, context 256) to its validation loss of 1.4697: whole process."""
    steps = ["2", "--warmup_steps", "0"] if settings.quick else [str(BABY_STEPS)]
    words = ["--config", CHARACTERS, *BABY, "--num_train_steps", *steps]
    words += ["--hidden_size", "24", "--context_length", "8"] if settings.quick else []
    lap = recipe_lap("pretrain", words, settings.folder / "baby", settings, metric="validation/loss")
    note = f"1 turn, reached {lap.reached:.4f}, {lap.training:.1f} s of training; 180 s on an A100 by nanoGPT's README"
    missed = lap.reached > BABY_LOSS
    return Line("baby GPT to 1.4697", "s", [lap.whole], target=at_most(30), note=note, did_not_get_there=missed)


@gpu_row
def gpu_sharded(settings: Settings) -> Line:
    """The baby model over all cards: training with `fsdp_size` (FSDP2 over NCCL) beside whole models (DDP)."""
    work, count = "baby GPT, sharded", torch.cuda.device_count()
    if count < 2 and not settings.quick:
        return not_run(work, "needs two cards: on one, nothing is sharded")
    os.environ |= {} if count else {"ACCELERATE_USE_CPU": "true"}  # quick, to see that it runs
    processes = str(max(2, count))
    words = ["--config", CHARACTERS, *BABY, "--warmup_steps", "1", "--num_train_steps"]
    words += ["2", "--hidden_size", "24", "--context_length", "8"] if settings.quick else ["200"]
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", processes]
    how = {"metric": "validation/loss", "launcher": launcher}
    whole = recipe_lap("pretrain", words, settings.folder / "whole", settings, **how)
    words += ["--fsdp_size", processes]
    sharded = recipe_lap("pretrain", words, settings.folder / "sharded", settings, **how)
    note = f"1 turn, reached {sharded.reached:.4f} and {whole.reached:.4f}"
    return Line(work, "s", [sharded.training], [whole.training], f"whole models, {processes} processes", note=note)


@gpu_row
def gpu_images(settings: Settings) -> Line:
    """CIFAR-10 to a test accuracy of 0.94: training time beside airbench's 2.6 s on an A100 (needs --data)."""
    folder = data_folder(settings, "cifar10")
    if not folder:
        return not_run("CIFAR-10 to 0.94", "needs --data DIR with cifar10", at_most(2.6))
    config = "recipes/configs/image_classification/cifar10_mini.yaml"
    words = ["--config", config, "--dataset", str(folder), "--horizontal_flip", "true", "--num_train_epochs", "12"]
    words += ["--batch_size", "512", *FEW_EPOCHS, *(["--num_train_steps", "2"] if settings.quick else [])]
    lap = recipe_lap("finetune", words, settings.folder / "cifar10", settings, metric="test/accuracy")
    note, missed = f"1 turn, reached {lap.reached:.3f}", lap.reached < 0.94
    return Line("CIFAR-10 to 0.94", "s", [lap.training], target=at_most(2.6), note=note, did_not_get_there=missed)


def device_of() -> str:
    """The card; the CPU where a row is only to be seen running."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def shape_of(settings: Settings, shape: Shape) -> Shape:
    return replace(QUICK if settings.quick else shape, device=device_of())


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of cifar10")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contestant (default: 5)")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"), help="folder of gpu.json")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        return print("not run: no CUDA device; the tests marked gpu and the GPU rows need one")
    started = time.perf_counter()
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu"], cwd=ROOT)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(Path(folder), args.repeats, data=args.data and args.data.resolve())
        left = MINUTES - (time.perf_counter() - started) / 60
        chosen = [one for one in ROWS.values() if one.is_gpu]
        facts = show(measured(chosen, settings, minutes=left - 2), settings)  # two: what the last row may take
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(args.output / "gpu.json", {**facts, "tests_passed": tests.returncode == 0})
    print(
        f"\ntests marked gpu: {'passed' if tests.returncode == 0 else 'FAILED'}\nwritten: {args.output / 'gpu.json'}"
    )
    sys.exit(tests.returncode)


if __name__ == "__main__":
    main(sys.argv[1:])
