"""The folder of a run: it holds one run only, and one process at a time trains in it."""

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bmtk.errors import UserError
from bmtk.files import delete_partial, write_json

from .arguments import FREE_KEYS

RUN_CONFIG = "run_config.json"  # resolved configuration of the run that the folder holds
LOCK = ".lock"
CHECKPOINTS = "checkpoints"
FROM_A_RUN = (
    CHECKPOINTS,
    "history.jsonl",
    RUN_CONFIG,
    "run.json",
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "trials",  # these three of a search
    "study.journal",
    "best.yaml",
)


def check_output_dir(
    directory: str | Path,
    config: Mapping[str, object],
    *,
    overwrite: bool,
    resume: bool = True,
    free_keys: Collection[str] = FREE_KEYS,
) -> None:
    """Make sure that `directory` is new, or holds the very run that `config` describes; then note `config` in it.

    free_keys may differ, because they do not change what is learned.  overwrite deletes the former run's checkpoints,
    weights and history first, and no other file.  Only the main process calls this, inside `locked`, so that a run
    which is still going on is never deleted.

    Raises: UserError if the folder holds another run or another model (or any, and `resume` is False), or cannot be
    written.
    """
    directory = Path(directory)
    config = json.loads(json.dumps(config))  # tuples become lists, as in the file
    with _as_user_error(directory):
        directory.mkdir(parents=True, exist_ok=True)
        if overwrite:
            _delete_run(directory)
        elif not (found := _what_would_be_lost(directory)):
            pass  # nothing yet, or a run that ended before its first checkpoint: mended settings may replace it
        elif not (directory / RUN_CONFIG).exists():
            raise UserError(
                f"output_dir={str(directory)!r} holds {', '.join(found)}, but not a run that could be resumed; choose "
                "another output_dir, or set overwrite_output_dir to replace them"
            )
        elif not resume:
            raise UserError(
                f"output_dir={str(directory)!r} holds {', '.join(found)} of a run, which resume_from_checkpoint=false "
                "would not go on with; leave that out to resume it, set overwrite_output_dir to delete it, or choose "
                "another output_dir"
            )
        else:
            _refuse_another_run(directory, config, free_keys)
        write_json(directory / RUN_CONFIG, config, indent=1, ensure_ascii=True)


@contextmanager
def _as_user_error(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"output_dir={str(directory)!r} cannot be written ({error.strerror}); choose a folder that you may write"
        ) from error


def _refuse_another_run(directory: Path, config: Mapping[str, object], free_keys: Collection[str]) -> None:
    try:
        former = json.loads((directory / RUN_CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{directory / RUN_CONFIG} cannot be read ({error}); set overwrite_output_dir to start anew"
        ) from None
    absent = "(absent)"
    lines = [
        f"{key}: {former.get(key, absent)!r} there, {config.get(key, absent)!r} now"
        for key in sorted(former.keys() | config.keys())
        if key not in free_keys and former.get(key) != config.get(key)  # a newer version knows more keys, all unset
    ]
    if lines:
        raise UserError(
            f"output_dir={str(directory)!r} holds another run; it differs in\n  "
            + "\n  ".join(lines)
            + "\nchoose another output_dir, give the settings of the run that is there to resume it, or set "
            "overwrite_output_dir to delete it"
        )


def _what_would_be_lost(directory: Path) -> list[str]:
    """What a run has left that took time to make: checkpoints, weights, facts."""
    found = [name for name in _what_is_there(directory) if name not in (RUN_CONFIG, "history.jsonl")]
    return [name for name in found if name != CHECKPOINTS or any((directory / CHECKPOINTS).iterdir())]


def _what_is_there(directory: Path) -> list[str]:
    return sorted(path.name for pattern in FROM_A_RUN for path in directory.glob(pattern))


def _delete_run(directory: Path) -> None:
    for name in _what_is_there(directory):
        path = directory / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def held(
    directory: str | Path, config: Mapping[str, object], *, is_main: bool = True, **options: Any
) -> Iterator[None]:
    """Lock `directory` and check that it is this run's, as long as the body runs; only the main process does.

    `options` and errors are those of `check_output_dir`.
    """
    if not is_main:
        yield
        return
    with locked(directory):
        check_output_dir(directory, config, **options)
        yield


@contextmanager
def locked(directory: str | Path) -> Iterator[None]:
    """Keep other processes from training in `directory` while the body runs; only the main process locks.

    What a killed process has left half-written there is deleted.

    The system takes the lock away from a process that dies, however it dies, so a lock never goes stale.  (POSIX
    only; a process does not lock a folder twice.)

    Raises: UserError that names the process which holds the folder, or if the folder cannot be written.
    """
    path = Path(directory) / LOCK
    with _as_user_error(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"output_dir={str(directory)!r} is in use by {file.read().strip() or 'another process'}; "
                "wait until it ends, stop it, or choose another output_dir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        for folder in (path.parent, path.parent / CHECKPOINTS):
            delete_partial(folder)
        try:
            yield
        finally:
            file.truncate(0)
