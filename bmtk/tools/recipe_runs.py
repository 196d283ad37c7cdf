"""A user's own recipe in child processes: shortened, in a folder of its own, watched and killed from outside.

    recipe = Recipe.read("my.yaml", None, recipes=Path("recipes"))
    run = recipe.run(Path("scratch/whole"), recipe.shortened(Path("scratch/whole"), steps=8), steps=8, log=print)
    run.code, run.step                                      # as the process ended, and how far it was

The child is started as from a shell: `python recipes/NAME.py ...`, or by `accelerate launch` on several processes.
"""

import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import bmtk
from bmtk.arguments import read_yaml
from bmtk.errors import UserError
from bmtk.files import PARTIAL
from bmtk.training.run_folder import CHECKPOINTS

RECIPES = ("pretrain", "finetune")
NAMED = re.compile(rf"recipes/({'|'.join(RECIPES)})\.py|bmtk ({'|'.join(RECIPES)})\b")
LINE_SECONDS = 20.0  # between two lines of progress
SLOW_LOOK, FAST_LOOK = 0.05, 0.002  # seconds between two looks at a run; the latter where it is to be killed or timed
# What would send a run elsewhere, begin it anew, or end it before its time; `null` is as if the config did not set it.
ALONE: dict[str, object] = {"push_to_hub": None, "max_minutes": None, "search": None, "overwrite_output_dir": False}
ALONE_OF_TRAINER: dict[str, object] = {"resume_from_checkpoint": None, "report_to": "none", "disable_tqdm": True}

Log = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """A recipe file, and the settings that a config gives it."""

    path: Path
    argv: list[str]  # --config FILE, and what the user gave besides
    settings: Mapping[str, Any]
    architecture: frozenset[str]  # which of them are fields of the model's configuration

    @classmethod
    def read(cls, config: str, name: str | None, *, recipes: Path, options: Sequence[str] = ()) -> "Recipe":
        """The recipe `name`, or the one that runs `config`, with its settings checked as it checks them itself.

        options: further ones of the recipe, as on its command line.
        Raises: whatever the recipe raises for them, and UserError as `recipe_of`.
        """
        path = recipes / f"{name or recipe_of(Path(config))}.py"
        argv = ["--config", config, *options]
        groups = runpy.run_path(str(path), run_name="bmtk_verify")["read_arguments"](argv)
        settings = {key: value for group in groups for key, value in vars(group).items()}
        if settings["search"]:
            raise UserError(f"search={settings['search']} makes many runs, and one is verified; leave it out")
        return cls(path, argv, settings, frozenset(f.name for f in fields(groups[-1])))

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def is_pretraining(self) -> bool:
        return self.name == "pretrain"

    @property
    def output_dir(self) -> Path:
        """Where the user's own run is, which is neither read nor written."""
        return Path(self.settings["output_dir"])

    def shortened(self, folder: Path, *, steps: int, **changes: object) -> list[str]:
        """The command line of this run in `folder`, cut to `steps`, each of which is logged; `changes` override it."""
        given = {**ALONE, **({} if self.is_pretraining else ALONE_OF_TRAINER)}
        given |= {"skip_test": True, "output_dir": folder, "num_train_steps": steps, "logging_steps": 1}
        if "corpus_dir" in self.settings and not self.settings["corpus_dir"]:
            given["corpus_dir"] = folder.parent / "corpus"  # so that it is tokenised once
        return [*self.argv, *(word for key, value in {**given, **changes}.items() for word in _words(key, value))]

    def command(self, argv: Sequence[str], *, processes: int = 1) -> list[str]:
        if processes == 1:
            return [sys.executable, str(self.path), *argv]
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        return [*launch, "--main_process_port", str(_free_port()), str(self.path), *argv]


def recipe_of(config: Path) -> str:
    """The recipe that runs a config file: of its first lines, or of the run that left it as recipe.yaml.

    Raises: UserError if neither says it, and as `read_yaml`.
    """
    read_yaml(config)
    record = config.with_name("run.json")
    if record.is_file() and (name := json.loads(record.read_text(encoding="utf-8")).get("recipe")) in RECIPES:
        return str(name)
    comments = [line for line in config.expanduser().read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    if found := NAMED.search("\n".join(comments)):
        return found[1] or found[2]
    raise UserError(f"{config} does not say which recipe it is for; give --recipe {' or --recipe '.join(RECIPES)}")


@dataclass(frozen=True)
class Kill:
    """When a run is killed: `delay` seconds after it is first seen in a phase."""

    phase: str  # starting, training, saving or ending
    step: int = 0  # at the earliest, of training and saving
    delay: float = 0.0

    def __str__(self) -> str:
        return f"{self.phase}, step {self.step} or later" if self.phase in ("training", "saving") else self.phase


@dataclass
class Watch:
    """What can be seen of a run from outside, in seconds since its process was started."""

    folder: Path
    steps: int
    started: float = field(default_factory=time.monotonic)
    step: int = 0  # the last that the process has logged
    first_step: float | None = None  # when it had logged a line
    last_step: float | None = None  # when it had logged that of the last step
    seconds: float = 0.0  # when it ended
    saving: float | None = None  # since when it has been writing a checkpoint
    saves: list[float] = field(default_factory=list)  # how long each took
    code: int | None = None  # exit code, minus the signal that ended it
    seen: tuple[int, ...] = ()  # inode, size and time of history.jsonl

    def __post_init__(self) -> None:
        self.seen = self._history_mark()  # what an earlier process has left is not this one's progress

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def look(self) -> None:
        """Take note of how far the run is."""
        if (mark := self._history_mark()) != self.seen:
            self.seen, self.step = mark, last_step(self.folder)
            self.first_step = self.first_step or self.elapsed
            if self.step >= self.steps and self.last_step is None:
                self.last_step = self.elapsed
        is_saving = self.first_step is not None and any((self.folder / CHECKPOINTS).glob(f"{PARTIAL}*"))
        if is_saving and self.saving is None:
            self.saving = self.elapsed
        elif self.saving is not None and not is_saving:
            self.saves.append(self.elapsed - self.saving)
            self.saving = None

    def is_in(self, kill: Kill) -> bool:
        """Whether the run has come to the phase in which it is to be killed."""
        return {
            "starting": True,
            "training": self.step >= kill.step > 0,
            "saving": self.saving is not None and self.step >= kill.step,
            "ending": self.last_step is not None,
        }[kill.phase]

    def _history_mark(self) -> tuple[int, ...]:
        try:
            facts = (self.folder / "history.jsonl").stat()
        except FileNotFoundError:
            return ()
        return facts.st_ino, facts.st_size, facts.st_mtime_ns


def last_step(folder: Path) -> int:
    """The step of the last whole line of history.jsonl; 0 if there is none."""
    try:
        lines = (folder / "history.jsonl").read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0


def run_child(
    command: Sequence[str], folder: Path, *, steps: int, log: Log, kill: Kill | None = None, on_cpu: bool = False
) -> Watch:
    """Run a command that trains in `folder` to its end, or until it is killed with all processes of its group.

    Its output is added to `<folder>.log`.  log: gets a line about its progress each `LINE_SECONDS`.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(_import_path())}
    if on_cpu:
        environment |= {"ACCELERATE_USE_CPU": "true"}
    with log_of(folder).open("ab") as output:
        options: dict[str, Any] = {"stdout": output, "stderr": subprocess.STDOUT, "start_new_session": True}
        watch = Watch(folder, steps)
        process = subprocess.Popen(command, env=environment, **options)
        try:
            _follow(process, watch, kill, log)
        finally:  # also where this process is interrupted
            watch.code = end(process)
            watch.seconds = watch.elapsed
    return watch


def _follow(process: subprocess.Popen[bytes], watch: Watch, kill: Kill | None, log: Log) -> None:
    said, due = time.monotonic(), None
    while process.poll() is None:
        watch.look()
        now = time.monotonic()
        if kill and due is None and watch.is_in(kill):
            due = now + kill.delay
        if due is not None and now >= due:
            return
        if now - said > LINE_SECONDS:
            log(f"    {f'step {watch.step} of {watch.steps}' if watch.step else 'starting'}, {watch.elapsed:.0f} s")
            said = now
        wait = SLOW_LOOK if kill and kill.phase == "starting" else FAST_LOOK
        time.sleep(wait if due is None else min(wait, max(0.0, due - now)))


def end(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a process, which is killed with its group if it has not ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def log_of(folder: Path) -> Path:
    """Where the output of the processes that train in `folder` goes."""
    return folder.with_name(f"{folder.name}.log")


def last_lines(folder: Path, *, count: int = 12) -> str:
    """The end of that output, for a message about a process that failed."""
    lines = log_of(folder).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return "\n".join(f"    {line}" for line in lines[-count:])


@contextmanager
def scratch_folder(output_dir: Path, work_dir: str | None, *, purpose: str) -> Iterator["Scratch"]:
    """A folder for the runs of a verification: a new one beside `output_dir`, or `work_dir`, which stays.

    The former is deleted unless the body sets `is_kept`.  Raises: UserError if `work_dir` is not empty.
    """
    if work_dir:
        folder = Path(work_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"work_dir={work_dir!r} is not empty; give a new or empty folder")
    else:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{output_dir.name}-{purpose}-", dir=output_dir.parent))
    scratch = Scratch(folder, is_kept=bool(work_dir))
    try:
        yield scratch
    finally:
        if not scratch.is_kept:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Scratch:
    """The folder of a verification, and whether it stays."""

    folder: Path
    is_kept: bool


def _words(key: str, value: object) -> list[str]:
    if value is None or isinstance(value, bool):
        return [f"--{key}", "null" if value is None else str(value).lower()]
    return [f"--{key}", str(value)]


def _import_path() -> list[str]:
    """The children import the bmtk that is running, from wherever it is."""
    former = os.environ.get("PYTHONPATH")
    return [str(Path(bmtk.__file__).parents[1]), *([former] if former else [])]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
