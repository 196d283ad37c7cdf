"""Back to a checkpoint after steps that could not be applied, and on without their data.

The data of optimizer step s (both counted from 0) are those of step s in the order of the data, with the steps that
were left out taken away: a function of s and of the list that the run's state holds, so resuming costs nothing.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from bmtk.files import PARTIAL, delete_partial

from .agreement import of_main
from .checkpoint import PREFIX, Checkpoints, TrainState
from .manifest import damages
from .resume import numbered, step_of
from .run_folder import CHECKPOINTS


def data_step(step: int, left_out: Iterable[int]) -> int:
    """The step in the order of the data that optimizer step `step` takes its rows from.

    >>> [data_step(step, [2, 3, 5]) for step in range(4)]
    [0, 1, 4, 6]
    """
    for number in sorted(left_out):
        step += number <= step
    return step


def roll_back(checkpoints: Checkpoints, at_most: int, above: int) -> TrainState | None:
    """Load the newest whole checkpoint with more than `above` and at most `at_most` steps, and delete all later ones.

    None if there is no such checkpoint; nothing is changed then.  Called by all processes; the main one chooses.
    """
    checkpoints.saver.finish()
    accelerator, directory = checkpoints.prepared.accelerator, Path(checkpoints.directory) / CHECKPOINTS
    fitting = [folder for folder in numbered(directory, PREFIX) if above < step_of(folder) <= at_most]
    is_main = accelerator.is_main_process
    found = of_main(accelerator, next((path for path in fitting if not damages(path)), None) if is_main else None)
    if found is None:
        return None
    state = checkpoints.load(found)
    if is_main:
        _delete_later(directory, step_of(found))
    accelerator.wait_for_everyone()
    return state


def _delete_later(directory: Path, step: int) -> None:
    """Delete checkpoints of steps that are done again, with other data."""
    for folder in numbered(directory, PREFIX):
        if step_of(folder) > step:  # a kill while deleting must not leave half a checkpoint with its final name
            os.replace(folder, folder.with_name(f"{PARTIAL}{folder.name}"))
    delete_partial(directory)
