"""Back to a checkpoint after steps that could not be applied, and on without their data.

The data of optimizer step s (both counted from 0) are those of step s in the order of the data, with the steps that
were left out taken away: a function of s and of the list that the run's state holds, so resuming costs nothing.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from accelerate import Accelerator

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


def data_done(step: int, left_out: Iterable[int]) -> int:
    """The steps in the order of the data that are behind after `step` optimizer steps, left-out ones among them.

    >>> [data_done(step, [2, 3, 5]) for step in range(5)]
    [0, 1, 2, 5, 7]
    """
    return data_step(step - 1, left_out) + 1 if step else 0


def roll_back(checkpoints: Checkpoints, at_most: int, above: int) -> TrainState | None:
    """Load the newest whole checkpoint with more than `above` and at most `at_most` steps, and delete all later ones.

    None if there is no such checkpoint; nothing is changed then.  Called by all processes; the main one chooses.
    """
    checkpoints.saver.finish()
    accelerator, directory = checkpoints.prepared.accelerator, Path(checkpoints.directory) / CHECKPOINTS
    found = checkpoint_between(accelerator, directory, PREFIX, at_most=at_most, above=above)
    if found is None:
        return None
    state = checkpoints.load(found)
    delete_later(accelerator, directory, PREFIX, step=step_of(found))
    return state


def checkpoint_between(
    accelerator: Accelerator, directory: Path, prefix: str, *, at_most: int, above: int
) -> Path | None:
    """The newest whole checkpoint with more than `above` and at most `at_most` steps, as the main process sees it."""
    is_main = accelerator.is_main_process
    fitting = [folder for folder in numbered(directory, prefix) if above < step_of(folder) <= at_most]
    return of_main(accelerator, next((path for path in fitting if not damages(path)), None) if is_main else None)


def delete_later(accelerator: Accelerator, directory: Path, prefix: str, *, step: int) -> None:
    """Delete checkpoints of steps after `step`, which are done again with other data; all processes call it."""
    for folder in numbered(directory, prefix) if accelerator.is_main_process else ():
        if step_of(folder) > step:  # a kill while deleting must not leave half a checkpoint with its final name
            os.replace(folder, folder.with_name(f"{PARTIAL}{folder.name}"))
    if accelerator.is_main_process:
        delete_partial(directory)
    accelerator.wait_for_everyone()
