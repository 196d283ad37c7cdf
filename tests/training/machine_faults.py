"""A run on two "machines", of which one dies: torchrun ... machine_faults.py FOLDER [kill|sleep].

Each launcher stands for a machine.  With `kill`, the second process ends itself by SIGKILL before step 4; with
`sleep` it comes to that step too late: the other one waits for three seconds.
"""

import os
import signal
import sys
import time
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


class Sleeping(TinyBatches):
    """Batches whose second process gets those of step 4 too late."""

    def __getitem__(self, step: int):
        if step == 3 and self.share.start:
            time.sleep(16)
        return super().__getitem__(step)


def main(folder: Path, fault: str) -> None:
    torch.set_num_threads(1)
    kind = {"kill": Dying, "sleep": Sleeping}.get(fault, TinyBatches)
    timeout = {"timeout_minutes": 0.05} if fault == "sleep" else {}
    args = arguments(folder, fsdp_size=2, adam_epsilon=1e-4, **timeout)
    run(args, dropout=0.0, batches=lambda **share: kind(0, **share))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), "".join(sys.argv[2:]))
    except UserError as error:
        sys.exit(f"error: {error}")
