"""Which checkpoint a run goes on from: the newest whole one, of the project's own loop or of Trainer."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

from bmtk.errors import UserError
from bmtk.files import PARTIAL, delete_partial

from .manifest import MANIFEST, damages
from .run_folder import CHECKPOINTS

logger = logging.getLogger(__name__)

PREFIX = "checkpoint-"  # how Trainer calls its checkpoints
BATCH = "batch.json"  # in a checkpoint of Trainer: what made its steps, as `batch_facts` reads it
# What a checkpoint of Trainer cannot do without; one of each line.
NEEDED = (
    ("trainer_state.json",),
    ("*.safetensors",),
    # With fsdp_size; of accelerate's FSDP; of DeepSpeed.
    ("optimizer.pt", "optimizer.bin", "optimizer*.safetensors", "optimizer_*", "global_step*"),
    ("rng_state*.pth",),
)


def numbered(directory: Path, prefix: str) -> list[Path]:
    """The folders in `directory` that are called `prefix` and a number, the highest number first."""
    found = [path for path in directory.glob(f"{prefix}*") if path.name.removeprefix(prefix).isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(prefix)), reverse=True)


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints in the folder of a run of either recipe, the oldest first; without unfinished ones."""
    return sorted((run / CHECKPOINTS).glob("[!.]*-*[0-9]"), key=step_of)


def newest_whole(directory: Path, prefix: str, damages: Callable[[Path], list[str]]) -> Path | None:
    """The newest folder without damages of those that `numbered` finds, or None if there are no such folders at all.

    Damaged ones are named in a warning, with their files, and passed over.

    Raises: UserError if there are folders, and all of them are damaged.
    """
    reports: list[str] = []
    for folder in numbered(directory, prefix):
        if not (problems := damages(folder)):
            return folder
        reports.append(f"{folder} is damaged: {'; '.join(problems)}")
        logger.warning("%s; it is passed over", reports[-1])
    if reports:
        raise UserError(
            "no checkpoint of this run is whole:\n  " + "\n  ".join(reports) + "\nrestore one of them from a copy, or "
            "delete the folder (or set overwrite_output_dir) to start the run anew"
        )
    return None


def delete_older(directory: Path, prefix: str, *, step: int, keep: int, best: int | None) -> None:
    """Delete each checkpoint that `keep` newer whole ones make superfluous, but that of the step `best`; keep=0: none.

    So one that has lost a file, or a part of one, does not count.  Later ones than `step` are left alone: they are
    damaged, or they would have been resumed.
    """
    num_newer = 0
    for folder in numbered(directory, prefix) if keep else []:
        if step_of(folder) > step:
            continue
        is_whole = not damages(folder, contents=False)
        if num_newer >= keep and step_of(folder) != best:
            # A kill while deleting must not leave half a checkpoint with its final name.
            os.replace(folder, folder.with_name(f"{PARTIAL}{folder.name}"))
        num_newer += is_whole
    delete_partial(directory)


def step_of(folder: Path) -> int:
    """The optimizer steps that a checkpoint was saved after, by the number in its name."""
    return int(folder.name.rpartition("-")[2])


def checkpoint_to_resume(directory: str | Path, wanted: str | None) -> str | None:
    """The checkpoint folder `wanted`, or the newest whole one of the run (None or "true"); None to start anew.

    Every file of it has the hash of its manifest, so nothing else is ever loaded.  Checkpoints of former versions
    have no manifest: one that `wanted` names is accepted with a warning, if no file is missing.

    Raises: UserError if `wanted` is not a whole checkpoint, or if there are checkpoints and none is whole.
    """
    choice = (wanted or "true").lower()
    if choice == "false":
        return None
    if not wanted or choice == "true":
        newest = newest_whole(Path(directory) / CHECKPOINTS, PREFIX, _damages)
        return str(newest) if newest else None
    if problems := _missing(Path(wanted)) or (damages(Path(wanted)) if (Path(wanted) / MANIFEST).exists() else []):
        raise UserError(
            f"resume_from_checkpoint={wanted!r} is not a folder with a whole checkpoint of Trainer; name one, or "
            f"say true (the newest of output_dir) or false (start anew): {'; '.join(problems)}"
        )
    if not (Path(wanted) / MANIFEST).exists():
        logger.warning("%s has no %s: whether its files are as they were written is not known", wanted, MANIFEST)
    return wanted


def check_best(folder: Path) -> None:
    """Raises: UserError if the checkpoint of a run's best evaluation is damaged."""
    if problems := damages(folder):
        raise UserError(f"the best checkpoint {folder} is damaged: {'; '.join(problems)}; restore it, or start anew")


def batch_facts(checkpoint: str | Path) -> dict[str, int]:
    """`num_processes` and `rows_per_step` of the run that saved a checkpoint; nothing if it is of a former version."""
    path = Path(checkpoint) / BATCH
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _damages(checkpoint: Path) -> list[str]:
    if (checkpoint / MANIFEST).exists():
        return damages(checkpoint)
    problems = [f"{MANIFEST} is missing"]
    if not _missing(checkpoint):
        problems.append(
            f"if a version of bmtk made it that wrote none, name it by resume_from_checkpoint={str(checkpoint)!r}"
        )
    return problems


def _missing(checkpoint: Path) -> list[str]:
    """What a folder lacks of a checkpoint of Trainer; its files may still be damaged."""
    problems = [f"{names[0]} is missing" for names in NEEDED if not any(_found(checkpoint, name) for name in names)]
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        problems += [] if "global_step" in state else ["trainer_state.json has no global_step"]
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        problems.append(f"trainer_state.json cannot be read ({error})")
    return problems


def _found(checkpoint: Path, pattern: str) -> bool:
    return any(checkpoint.glob(pattern))
