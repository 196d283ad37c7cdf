"""A run on two "machines", of which one dies: torchrun ... machine_faults.py FOLDER [kill].

Each launcher stands for a machine.  With `kill`, the second process ends itself by SIGKILL before step 4.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from tiny_run import TinyBatches, arguments, run

from bmtk.errors import UserError


class Dying(TinyBatches):
    """Batches whose second process dies before step 4 is trained."""

    def __getitem__(self, step: int):
        if step == 3 and self.share.start:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(step)


def main(folder: Path, *, is_killed: bool) -> None:
    torch.set_num_threads(1)
    kind = Dying if is_killed else TinyBatches
    args = arguments(folder, fsdp_size=2, adam_epsilon=1e-4)
    run(args, dropout=0.0, batches=lambda **share: kind(0, **share))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), is_killed=sys.argv[2:] == ["kill"])
    except UserError as error:
        sys.exit(f"error: {error}")
