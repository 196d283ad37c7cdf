"""Which checkpoint a run goes on from: the newest whole one, of the project's own loop or of Trainer."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from bmtk.errors import UserError

from .run_folder import CHECKPOINTS

logger = logging.getLogger(__name__)


def numbered(directory: Path, prefix: str) -> list[Path]:
    """The folders in `directory` that are called `prefix` and a number, the highest number first."""
    found = [path for path in directory.glob(f"{prefix}*") if path.name.removeprefix(prefix).isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(prefix)), reverse=True)


def newest_whole(
    folders: Sequence[Path], damages: Callable[[Path], list[str]]
) -> tuple[Path | None, dict[Path, list[str]]]:
    """The first of `folders` without damages, and the damages of those before it."""
    passed_over: dict[Path, list[str]] = {}
    for folder in folders:
        if not (problems := damages(folder)):
            return folder, passed_over
        passed_over[folder] = problems
    return None, passed_over


def checkpoint_to_resume(directory: str | Path, wanted: str | None) -> str | None:
    """The checkpoint folder `wanted`, or the newest whole one of the run (None or "true"); None to start anew.

    Trainer writes `trainer_state.json` last: a folder without a readable one was cut short and is passed over.
    Raises: UserError if `wanted` is not a whole checkpoint.
    """
    choice = (wanted or "true").lower()
    if choice == "false":
        return None
    if wanted and choice != "true":
        if _damages(Path(wanted)):
            raise UserError(
                f"resume_from_checkpoint={wanted!r} is not a folder with a whole checkpoint of Trainer; name one, or "
                "say true (the newest of output_dir) or false (start anew)"
            )
        return wanted
    newest, passed_over = newest_whole(numbered(Path(directory) / CHECKPOINTS, "checkpoint-"), _damages)
    for folder in passed_over:
        logger.warning("%s was not written to its end and is passed over", folder)
    return str(newest) if newest else None


def _damages(checkpoint: Path) -> list[str]:
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [str(error)]
    return [] if "global_step" in state else ["no global_step"]
