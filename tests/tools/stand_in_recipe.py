"""A recipe that counts in place of training: seconds become milliseconds, and its faults can be chosen.

It writes what the real ones write: a history, checkpoints beside their place that are then renamed, final weights.
"""

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Run:
    search: str | None = None
    output_dir: str = "outputs/stand_in"
    batch_size: int = 4


@dataclass
class Architecture:
    hidden_dropout: float | None = None


def read_arguments(argv):
    return [Run(), Architecture()]


def weights(value: float) -> bytes:
    """A safetensors file with one number, made by hand: importing the library would take longer than the run."""
    import struct

    header = json.dumps({"w": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    return len(header).to_bytes(8, "little") + header + struct.pack("<d", value)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    for name in ("--output_dir", "--num_train_steps", "--save_steps", "--fault", "--config"):
        parser.add_argument(name)
    args, _ = parser.parse_known_args(argv)
    folder, total, every = Path(args.output_dir), int(args.num_train_steps), int(args.save_steps)
    if args.fault == "fails":
        sys.exit("error: the disk is on fire")
    time.sleep(0.05)
    history, checkpoints = folder / "history.jsonl", folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    for left in checkpoints.glob(".partial-*"):
        shutil.rmtree(left)
    saved = sorted(checkpoints.glob("step-*"))
    step = int(saved[-1].name[5:]) if saved else 0
    value = float((saved[-1] / "value").read_text()) if saved else 0.0
    if args.fault == "forgets" and saved:
        value = 0.0
    lines = history.read_text().splitlines()[:step] if history.exists() else []
    Path(f"{history}.new").write_text("".join(line + "\n" for line in lines))
    os.replace(f"{history}.new", history)
    noise = time.time() if args.fault == "noise" else 0.0
    while step < total:
        time.sleep(0.01)
        step, value = step + 1, value + step + noise
        with history.open("a") as file:
            file.write(json.dumps({"step": step, "loss": value, "seconds": time.time()}) + "\n")
        if step % every == 0 or step == total:
            beside = checkpoints / f".partial-step-{step:08d}"
            beside.mkdir()
            (beside / "value").write_text(str(value))
            (beside / "model.safetensors").write_bytes(weights(value))
            time.sleep(0.02)
            os.replace(beside, checkpoints / f"step-{step:08d}")
    time.sleep(0.05)
    (folder / "model.safetensors").write_bytes(weights(value))


if __name__ == "__main__":
    main(sys.argv[1:])
