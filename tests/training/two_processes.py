"""What test_loop checks with several processes, in one launch of them: python two_processes.py FOLDER.

FOLDER/one holds a run of one process without dropout, and FOLDER/resumed a copy of it that stopped half-way.
"""

import contextlib
import json
import sys
from math import inf
from pathlib import Path

import torch
from faults import BACK, Scaled, SmallMemory
from tiny_run import Stopping, Stream, arguments, run, tiny_model, tiny_recurrent

FROZEN = {"unfreeze_epochs": 0.4, "l1_penalty": 1e-3, "ema_decay": 0.9, "layer_lr_decay": 0.8}
CARRIED = {"optimizer": "sgd", "learning_rate": 1.0}


def main(folder: Path):
    torch.set_num_threads(1)
    facts = {}
    facts["without dropout"] = run(arguments(folder / "two", micro_batch_size=2), dropout=0.0)
    facts["resumed"] = run(arguments(folder / "resumed"), dropout=0.0)
    run(arguments(folder / "two frozen", **FROZEN), dropout=0.0)
    run(arguments(folder / "two carried", micro_batch_size=2, **CARRIED), model=tiny_recurrent(), batches=two_streams)
    run(arguments(folder / "resumed carried", **CARRIED), model=tiny_recurrent(), batches=two_streams)
    facts["straight"] = run(arguments(folder / "straight"), dropout=0.2)
    with contextlib.suppress(SystemExit):
        run(arguments(folder / "stopped"), dropout=0.2, batches=lambda **share: Stopping(3, only_rank=1, **share))
    facts["stopped at"] = sorted(path.name for path in (folder / "stopped" / "checkpoints").iterdir())
    facts["stopped"] = run(arguments(folder / "stopped"), dropout=0.2)
    with contextlib.suppress(FloatingPointError):
        model = tiny_model()
        model.register_forward_hook(lambda *_: poison_one_process(model, *_))
        run(arguments(folder / "poisoned"), model=model)
    facts["poisoned"] = (folder / "poisoned" / "checkpoints").exists()
    model = tiny_model()
    SmallMemory(model, 3 if torch.distributed.get_rank() == 1 else 99)
    run(arguments(folder / "halved", micro_batch_size=4), model=model)
    facts["limits"] = json.loads((folder / "halved" / "micro_batches.json").read_text())["limits"]
    model = tiny_model()
    steps = [9, 10, 11] if torch.distributed.get_rank() == 1 else []  # the other's own loss is sound
    run(arguments(folder / "rolled back", **BACK), model=model, batches=lambda **s: Scaled(model, steps, inf, **s))
    facts["bundles"] = sorted(str(path.relative_to(folder)) for path in (folder / "rolled back").glob("bad_steps/*/*"))
    if torch.distributed.get_rank() == 0:
        sys.stdout.write(json.dumps(facts) + "\n")
    torch.distributed.destroy_process_group()


def two_streams(**share) -> Stream:
    return Stream(0, **share)


def poison_one_process(model, module, inputs, outputs):
    if torch.distributed.get_rank() == 1 and model.training:
        outputs.loss = outputs.loss + float("inf")
    return outputs


if __name__ == "__main__":
    main(Path(sys.argv[1]))
