"""How step, save and resume grow with the number of processes, whole (DDP) and sharded (FSDP2); on CPUs over gloo.

    python benchmarks/scale.py                                 # 1, 2, 4 and 8 processes, two minutes
    python benchmarks/scale.py --processes 1 2 --steps 10

One tiny model and one global batch for all, so times show what processes cost each other, not what they gain: on a CPU
with fewer cores than processes they also wait for a core.  The rows of 64 and 1,024 processes are computed: how many
bytes each process writes, and the size of the index that one process writes for all.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

import bmtk  # noqa: F401  registers the model families
from bmtk.training.arguments import LoopArguments
from bmtk.training.checkpoint import Checkpoints, TrainState
from bmtk.training.prepared import build_accelerator, prepare
from bmtk.training.tensor_files import owners_of
from bmtk.training.updates import Losses, Updater

ROWS, LENGTH, VOCABULARY = 64, 64, 2048


def tiny_model() -> torch.nn.Module:
    set_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("bm_transformer", **sizes))


def batch_of(rank: int, world_size: int) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    rows = tokens[rank::world_size]
    return [{"input_ids": rows, "labels": rows}]


def measure(folder: Path, steps: int, fsdp_size: int) -> None:
    """One process of a run: the main one prints what it took."""
    args = LoopArguments(output_dir=str(folder), precision="fp32", fsdp_size=fsdp_size)
    accelerator: Accelerator = build_accelerator(args)
    prepared = prepare(tiny_model(), args, accelerator)
    updater = Updater(prepared, Losses(lambda batch: batch["labels"].numel()), max_grad_norm=1.0)
    batch = batch_of(**prepared.share)

    def seconds(action) -> float:
        accelerator.wait_for_everyone()
        started = time.perf_counter()
        action()
        accelerator.wait_for_everyone()
        return time.perf_counter() - started

    times = [seconds(lambda: updater.step(batch)) for _ in range(steps)][2:]
    checkpoints = Checkpoints(folder, prepared)
    save = seconds(lambda: checkpoints.save(TrainState(step=1)))
    path = checkpoints.newest()
    resume = seconds(lambda: checkpoints.load(checkpoints.newest()))
    if accelerator.is_main_process:
        files = [file.stat().st_size for file in path.rglob("*.safetensors")]
        facts = {"step": median(times), "save": save, "resume": resume, "largest file": max(files)}
        print(json.dumps(facts | {"manifest": (path / "manifest.json").stat().st_size}), flush=True)
    if accelerator.num_processes > 1:
        torch.distributed.destroy_process_group()


def launch(count: int, steps: int, fsdp_size: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        several = ["--multi_gpu", "--num_processes", str(count), "--main_process_port", str(port)]
        command = [sys.executable, "-m", "accelerate.commands.launch", *(several if count > 1 else ["--cpu"])]
        command += [__file__, "--worker", folder, "--steps", str(steps), "--fsdp_size", str(fsdp_size)]
        env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        shutil.rmtree(folder, ignore_errors=True)
        Path(folder).mkdir(exist_ok=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8], help="how many to start")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of a run; the first two do not count")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--fsdp_size", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        torch.set_num_threads(1)
        return measure(Path(args.worker), args.steps, args.fsdp_size)
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {ROWS} rows of {LENGTH} tokens a step")
    print("processes   layout   step ms   save ms  resume ms  largest file  manifest")
    for count in args.processes:
        for fsdp_size in (1, count) if count > 1 else (1,):
            found = launch(count, args.steps, fsdp_size)
            step, save, resume = (1000 * found[name] for name in ("step", "save", "resume"))
            sizes = f"{found['largest file'] / 1e6:10.2f} MB {found['manifest'] / 1e3:6.1f} kB"
            layout = "FSDP2" if fsdp_size > 1 else "DDP" if count > 1 else "-"
            print(f"{count:9} {layout:>8} {step:9.1f} {save:9.1f} {resume:10.1f} {sizes}", flush=True)
    with torch.device("meta"):
        weights = dict(tiny_model().named_parameters())
    for count in (64, 1024):
        owners = list(owners_of(weights, count).values())
        most = max(
            sum(w.numel() * 4 for w, owner in zip(weights.values(), owners, strict=True) if owner == rank)
            for rank in set(owners)
        )
        print(f"{count:10} computed: {len(set(owners))} processes write weights, at most {most / 1e6:.2f} MB each")


if __name__ == "__main__":
    main()
