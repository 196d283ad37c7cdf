"""The folder of a run: it holds one run only, and one process at a time trains in it."""

import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from bmtk.errors import UserError
from bmtk.files import delete_partial, read_json, write_json

from .arguments import FREE_KEYS

logger = logging.getLogger(__name__)

RUN_CONFIG = "run_config.json"  # resolved configuration of the run that the folder holds
DATA_MARKS = "data_marks.json"  # what the run learns from, by content
DERIVED = "derived.json"  # settings that followed from size, data and speed when the run began
NOTES = ("bad_steps", "micro_batches.json")  # what a run writes down beside its results
LOCK = ".lock"
CHECKPOINTS = "checkpoints"
READS_A_MODEL = ("model", "tokenizer")
LENGTH = {"num_train_epochs", "num_train_steps", "max_steps"}  # over which the learning rate decays
# Setting -> the tasks in which its default does something else than a version that did not know it, and what that did.
CHANGED_DEFAULTS: dict[str, tuple[tuple[str, ...], object]] = {
    "normalize_each_band": (("audio_classification", "speech_recognition"), True),
    "ngram_buckets": (("sequence_classification",), 0),
    "ngram_spelling": (("sequence_classification",), 0),
    "linear_forecast": (("time_series_forecasting",), False),
}
FROM_A_RUN = (
    CHECKPOINTS,
    "history.jsonl",
    RUN_CONFIG,
    DATA_MARKS,
    DERIVED,
    *NOTES,
    "run.json",
    "report.html",
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
    default_keys: Collection[str] = (),
) -> None:
    """Make sure that `directory` is new, or holds the very run that `config` describes; then note `config` in it.

    free_keys may differ, because they do not change what is learned; default_keys have their default values now, and
    may be absent from the record of a former version, which did not know them.  overwrite deletes the former run's
    checkpoints, weights and history first, and no other file.  Only the main process calls this, inside `locked`, so
    that a run which is still going on is never deleted.

    Raises: UserError if the folder holds another run or another model (or any, and `resume` is False), if `config`
    names something in it that would be deleted, or if it cannot be written.
    """
    directory = Path(directory)
    config = json.loads(json.dumps(config))  # tuples become lists, as in the file
    with _as_user_error(directory):
        directory.mkdir(parents=True, exist_ok=True)
        if overwrite:
            _keep_inputs(directory, config)
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
            _refuse_another_run(directory, config, free_keys, default_keys)
        write_json(directory / RUN_CONFIG, config, indent=1, ensure_ascii=True)


@contextmanager
def _as_user_error(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"output_dir={str(directory)!r} cannot be written ({error.strerror}); choose a folder that you may write"
        ) from error


def _refuse_another_run(
    directory: Path, config: Mapping[str, object], free_keys: Collection[str], default_keys: Collection[str]
) -> None:
    try:
        former = json.loads((directory / RUN_CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{directory / RUN_CONFIG} cannot be read ({error}); set overwrite_output_dir to start anew"
        ) from None
    absent = "(absent)"
    former = {**_former_defaults(config), **former}
    lines = {
        key: f"{key}: {former.get(key, absent)!r} there, {config.get(key, absent)!r} now"
        for key in sorted(former.keys() | config.keys())
        if key not in free_keys and former.get(key) != config.get(key)
        if key in former or key not in default_keys  # a newer version knows more keys
    }
    if not lines:
        return
    another = "another output_dir"
    if lines.keys() <= LENGTH:
        another += f" and model={_newest_model(directory)} to train its weights on, with a schedule of their own"
    raise UserError(
        f"output_dir={str(directory)!r} holds another run; it differs in\n  "
        + "\n  ".join(lines.values())
        + f"\nchoose {another}; give the settings of the run that is there to resume it; or set overwrite_output_dir "
        "to delete it"
    )


def _former_defaults(config: Mapping[str, object]) -> dict[str, object]:
    """What a run like `config` did in a version that did not know a setting; it is refused, and says how to go on."""
    if config.get("model") is not None:
        return {}  # which decides these itself
    unread = {"ngram_spelling"} if config.get("ngram_buckets") == 0 else set()
    return {
        key: value
        for key, (tasks, value) in CHANGED_DEFAULTS.items()
        if key in config and config.get("task") in tasks and key not in unread
    }


def _newest_model(directory: Path) -> Path:
    """Where the weights of the run in `directory` can be loaded from: its end, or its newest checkpoint."""
    checkpoints = [*(directory / CHECKPOINTS).glob("*-*[0-9]")]
    newest = max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), default=directory)
    return directory if (directory / "config.json").exists() else newest


class MarkedData(Protocol):
    """What is read of the data of a run, to know them again."""

    @property
    def marks(self) -> Mapping[str, Sequence[str]]:
        """Split -> a mark of each row, or of each file."""

    @property
    def tokenizer_mark(self) -> str | None: ...

    def differences(self, former: Any) -> list[str]:
        """In what the data differ from those with the marks `former`, in words."""


def check_data(directory: str | Path, data: MarkedData, *, is_main: bool) -> None:
    """Make sure that the run in `directory` goes on with the very data that it has learned from, and note them.

    Called before anything is made of the data, inside `held`; only the main process does it.
    Raises: UserError that says in what they differ.
    """
    if not is_main:
        return
    former = read_json(Path(directory) / DATA_MARKS)
    if not _what_would_be_lost(Path(directory)):
        former = None
    elif not isinstance(former, dict):
        former = None
        logger.warning("the run in %s has no record of its data, so they cannot be compared with these", directory)
    elif found := data.differences(former["splits"]):
        raise UserError(_of_other_data(directory, found))
    marks = {split: list(marks) for split, marks in data.marks.items()}
    write_json(Path(directory) / DATA_MARKS, {**(former or {}), "splits": marks}, indent=0)


def check_tokenizer(directory: str | Path, data: MarkedData, *, is_main: bool) -> None:
    """The same for their tokenizer; after `check_data`, since a tokenizer may have to be trained on the data."""
    if not is_main:
        return
    path = Path(directory) / DATA_MARKS
    known: Any = read_json(path)
    if known.get("tokenizer", data.tokenizer_mark) != data.tokenizer_mark:
        raise UserError(_of_other_data(directory, ["another tokenizer"]))
    write_json(path, {**known, "tokenizer": data.tokenizer_mark}, indent=0)


def derived_before(directory: Path) -> dict[str, Any] | None:
    """What `note_derived` has noted of the run in `directory`; None if there is nothing to go on with."""
    found = read_json(directory / DERIVED)
    return found if isinstance(found, dict) and _what_would_be_lost(directory) else None


def note_derived(directory: Path, settings: Mapping[str, object]) -> None:
    """Keep settings that a run has derived at its start, so that it goes on with the very same."""
    write_json(directory / DERIVED, dict(settings), indent=1)


def _of_other_data(directory: str | Path, found: Sequence[str]) -> str:
    return (
        f"output_dir={str(directory)!r} holds a run that has learned from other data:\n  "
        + "\n  ".join(found)
        + f"\nchoose another output_dir and model={_newest_model(Path(directory))} to train its weights on; restore "
        "the former data to resume; or set overwrite_output_dir to delete it"
    )


def _what_would_be_lost(directory: Path) -> list[str]:
    """What a run has left that took time to make: checkpoints, weights, facts."""
    quickly_made = {RUN_CONFIG, DATA_MARKS, DERIVED, *NOTES, "history.jsonl"}
    found = [name for name in _what_is_there(directory) if name not in quickly_made]
    return [name for name in found if name != CHECKPOINTS or any((directory / CHECKPOINTS).iterdir())]


def _what_is_there(directory: Path) -> list[str]:
    return sorted(path.name for pattern in FROM_A_RUN for path in directory.glob(pattern))


def _keep_inputs(directory: Path, config: Mapping[str, object]) -> None:
    """Raises: UserError if the new run reads what overwriting would delete."""
    folder = directory.resolve()
    deleted = [folder / name for name in _what_is_there(folder)]
    for key, value in config.items():
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str) or not text or key in ("output_dir", "corpus_dir"):
                continue
            path = Path(text).expanduser().resolve()
            is_its_model = deleted and key in READS_A_MODEL and path == folder
            if is_its_model or any(path == one or one in path.parents for one in deleted):
                raise UserError(
                    f"{key}={text!r} is in output_dir={str(directory)!r}, which overwrite_output_dir would delete "
                    f"before it is read; choose another output_dir, or copy {path} to another place"
                )


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

    A folder that is made here is deleted again if the body fails before anything else is in it.
    `options` and errors are those of `check_output_dir`.
    """
    if not is_main:
        yield
        return
    is_new = not Path(directory).exists()
    with locked(directory):
        check_output_dir(directory, config, **options)
        try:
            yield
        except BaseException:
            if is_new and {path.name for path in Path(directory).glob("*")} <= {LOCK, RUN_CONFIG}:
                shutil.rmtree(directory, ignore_errors=True)  # the run has not begun
            raise


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
