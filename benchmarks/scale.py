"""How step, save and resume grow with the number of processes, whole (DDP) and sharded (FSDP2); on CPUs over gloo.

    python benchmarks/scale.py                                 # 1, 2, 4 and 8 processes, two minutes
    python benchmarks/scale.py --processes 1 2 --steps 10
    python benchmarks/scale.py --saving 25                     # what a save costs training: 25 M parameters

One tiny model and one global batch for all, so times show what processes cost each other, not what they gain: on a CPU
with fewer cores than processes they also wait for a core.  The rows of 64 and 1,024 processes are those of a model of
1.17 B parameters in torch's "fake" process group: what one of them holds, and how many bytes and names it writes.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

import bmtk  # noqa: F401  registers the model families
from bmtk.training.allocation import keep_freed_memory
from bmtk.training.arguments import LoopArguments
from bmtk.training.checkpoint import Checkpoints, TrainState
from bmtk.training.prepared import build_accelerator, prepare
from bmtk.training.sharding import ProcessLayout, shard
from bmtk.training.snapshot import stored_weights
from bmtk.training.tensor_files import file_name, owners_of, write_index
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

    def of_all(action) -> float:
        accelerator.wait_for_everyone()
        return seconds(lambda: (action(), accelerator.wait_for_everyone()))

    times = [of_all(lambda: updater.step(batch)) for _ in range(steps)][2:]
    checkpoints, waits = Checkpoints(folder, prepared, in_background=True), []

    def save_whole(step: int) -> None:
        checkpoints.save(TrainState(step=step))
        checkpoints.saver.finish()

    save_whole(1)  # connects the processes
    save = of_all(lambda: save_whole(2))
    updater.before_update = lambda: waits.append(seconds(checkpoints.saver.wait_for_copy))
    stall = seconds(lambda: checkpoints.save(TrainState(step=3)))
    updater.step(batch)
    path = checkpoints.newest()
    resume = of_all(lambda: checkpoints.load(checkpoints.newest()))
    if accelerator.is_main_process:
        files = [file.stat().st_size for file in path.rglob("*.safetensors")]
        facts = {"step": median(times), "save": save, "stall": stall + sum(waits), "resume": resume}
        facts["largest file"] = max(files)
        print(json.dumps(facts | {"manifest": (path / "manifest.json").stat().st_size}), flush=True)
    if accelerator.num_processes > 1:
        torch.distributed.destroy_process_group()


def measure_saving(millions: float, folder: Path, saves: int = 4) -> None:
    """Print how long training stands still for a save, beside how long the save takes, in both ways of saving."""
    set_seed(0)
    width, layers = 512, max(1, round(millions / 3.15))  # a layer of this width has 3.15 M
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 8, "vocab_size": VOCABULARY}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bm_transformer", **sizes))
    args = LoopArguments(output_dir=str(folder), precision="fp32")
    keep_freed_memory(torch.device("cpu"))  # as the loop does
    prepared = prepare(model, args, build_accelerator(args))
    updater = Updater(prepared, Losses(lambda batch: batch["labels"].numel()), max_grad_norm=1.0)
    batch = [{name: rows[:8] for name, rows in batch_of(0, 1)[0].items()}]

    print(f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.1f} M parameters, times in ms, medians")
    print("saving            save  stall  of a save   step alone  step beside a save")
    for name, in_background in (("in foreground", False), ("in background", True)):
        checkpoints = Checkpoints(folder / name, prepared, keep=1, in_background=in_background)
        first, *found = [one_save(checkpoints, updater, batch, step) for step in range(1, 1 + saves)]
        whole, stall, alone, beside = (1000 * median(values) for values in zip(*found, strict=True))
        print(f"{name} {whole:9.0f} {stall:6.0f} {stall / whole:10.1%} {alone:12.0f} {beside:19.0f}")
        print(f"  the first one {1000 * first[0]:6.0f} {1000 * first[1]:6.0f}", flush=True)


def one_save(checkpoints: Checkpoints, updater: Updater, batch: list, step: int) -> tuple[float, float, float, float]:
    """Seconds: the whole save, what training stood still for it, and a step before and beside it."""
    saver, waits, ends = checkpoints.saver, [], []
    updater.before_update = lambda: waits.append(seconds(saver.wait_for_copy))
    alone = median(seconds(lambda: updater.step(batch)) for _ in range(6))
    started = time.perf_counter()
    stall, beside = seconds(lambda: checkpoints.save(TrainState(step=step))), []
    watch = threading.Thread(target=lambda: (saver.thread and saver.thread.join(), ends.append(time.perf_counter())))
    watch.start()
    waits.clear()
    while not ends:
        beside.append(seconds(lambda: updater.step(batch)))
    watch.join()
    saver.finish()
    return ends[0] - started, stall + sum(waits), alone, median(beside or [alone])


def seconds(action) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


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
    parser.add_argument("--saving", type=float, metavar="M", help="measure the saves of M million parameters instead")
    parser.add_argument("--simulated", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--fsdp_size", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.simulated:
        return simulate(args.simulated, args.fsdp_size)
    if args.worker:
        torch.set_num_threads(1)
        return measure(Path(args.worker), args.steps, args.fsdp_size)
    if args.saving:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            return measure_saving(args.saving, Path(folder))
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {ROWS} rows of {LENGTH} tokens a step")
    print("processes   layout   step ms   save ms  stall ms  resume ms  largest file  manifest")
    for count in args.processes:
        for fsdp_size in (1, count) if count > 1 else (1,):
            found = launch(count, args.steps, fsdp_size)
            step, save, stall, resume = (1000 * found[name] for name in ("step", "save", "stall", "resume"))
            sizes = f"{found['largest file'] / 1e6:10.2f} MB {found['manifest'] / 1e3:6.1f} kB"
            layout = "FSDP2" if fsdp_size > 1 else "DDP" if count > 1 else "-"
            print(f"{count:9} {layout:>8} {step:9.1f} {save:9.1f} {stall:9.1f} {resume:10.1f} {sizes}", flush=True)
    print("\n1.17 B parameters on processes that are simulated: what one holds and writes (AdamW, float32)")
    print("processes   layout   holds GB  writers  writes GB  index kB  manifest kB  sharding s")
    for count, fsdp_size in ((64, 8), (64, 64), (1024, 8), (1024, 1024)):
        command = [sys.executable, __file__, "--simulated", str(count), "--fsdp_size", str(fsdp_size)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        print(done.stdout.splitlines()[-1] if done.returncode == 0 else done.stderr[-3000:], flush=True)


def simulate(count: int, fsdp_size: int) -> None:
    """Print what one of `count` processes holds and writes: memory and metadata, nothing is computed or sent."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    FSDPParamGroup._validate_no_meta_params = lambda self: None  # no memory for weights is needed here
    sizes = {"hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 16, "vocab_size": 32_000}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bm_transformer", **sizes))
    layout = ProcessLayout(fsdp_size=fsdp_size, dp_replicate_size=count // fsdp_size)
    spent = seconds(lambda: shard(model, layout, torch.device("meta")))
    held = 16 * sum(parameter.to_local().numel() for parameter in model.parameters()) / 1e9
    weights = stored_weights(model)
    moments = {f"{key}/{name}": value for key in ("exp_avg", "exp_avg_sq") for name, value in weights.items()}
    written, listed = [0] * count, {}
    for stem, tensors in (("model", weights), ("training_state/optimizer", moments)):
        for name, owner in owners_of(tensors, count).items():
            written[owner] += 4 * tensors[name].numel()
            listed[file_name(stem, owner, count)] = {"bytes": 10**9, "xxh3_128": 32 * "0"}
    with tempfile.TemporaryDirectory() as folder:
        write_index(Path(folder), "model", weights, count)
        index = (Path(folder) / "model.safetensors.index.json").stat().st_size
    writers, most = sum(map(bool, written)), max(written) / 1e9
    kind = f"{count // fsdp_size} x {fsdp_size}"
    manifest = len(json.dumps({"files": listed}, indent=1)) / 1e3
    print(
        f"{count:9} {kind:>8} {held:10.3f} {writers:8} {most:10.3f} {index / 1e3:9.1f} {manifest:12.1f} {spent:11.2f}"
    )


if __name__ == "__main__":
    main()
