"""What a benchmark is: rows of a table, contestants that take turns, and ratios with their spread.

A row is a function that measures and returns lines: what was measured of ours and of a peer, turn by turn.  A ratio is
the median over the turns, ours over the peer's of the same turn, with the least and the most: what else the machine
does meets both.  A line has a target, which its ratio (or, without a peer, the value itself) has to keep.
"""

import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "numpy", "tokenizers")
COLUMNS = ("work", "ours", "peer", "ratio (least to most; turns)", "target", "reached", "note")


@dataclass(frozen=True)
class Settings:
    """What the command line says of all rows."""

    folder: Path  # for what a row writes
    repeats: int = 5  # turns of each contestant
    quick: bool = False  # tiny sizes and one turn: to see that a row runs, not to measure
    clock: str = "wall"  # or processor: CPU seconds of this process and its children, on a machine that is shared
    data: Path | None = None  # folder of real data sets
    nanogpt: Path | None = None  # a clone of nanoGPT

    @property
    def turns(self) -> int:
        return 1 if self.quick else self.repeats

    def now(self) -> float:
        """Seconds of the chosen clock."""
        if self.clock == "wall":
            return time.perf_counter()
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used)


@dataclass(frozen=True)
class Target:
    """A bound that a median has to keep."""

    bound: float
    is_least: bool = False  # at least, else at most

    def __str__(self) -> str:
        return f"{'>=' if self.is_least else '<='} {self.bound:.3g}"

    def holds(self, value: float) -> bool:
        return value >= self.bound if self.is_least else value <= self.bound


def at_least(bound: float) -> Target:
    return Target(bound, is_least=True)


def at_most(bound: float) -> Target:
    return Target(bound)


@dataclass
class Line:
    """One line of the table: `ours` and `peer` hold a value for each turn, in `unit`."""

    work: str
    unit: str
    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)
    peer_name: str = ""
    target: Target | None = None
    mfu: float | None = None  # of ours
    note: str = ""  # what a reader has to know: a run that did not get there, why it was not run
    did_not_get_there: bool = False  # ours missed what the time is measured to

    @property
    def ratios(self) -> list[float]:
        return [one / other for one, other in zip(self.ours, self.peer, strict=True)] if self.peer else []

    @property
    def is_reached(self) -> bool | None:
        """None where nothing was measured, or there is no target."""
        if self.target is None or not self.ours:
            return None
        return not self.did_not_get_there and self.target.holds(statistics.median(self.ratios or self.ours))

    def cells(self) -> list[str]:
        if not self.ours:
            return [self.work, "-", "-", "-", str(self.target or ""), "", self.note]
        mfu = f", MFU {self.mfu:.1%}" if self.mfu is not None else ""
        peer = f"{number(statistics.median(self.peer))} {self.unit}, {self.peer_name}" if self.peer else ""
        reached = {True: "yes", False: "no", None: ""}[self.is_reached]
        return [
            self.work,
            f"{number(statistics.median(self.ours))} {self.unit}{mfu}",
            peer,
            spread(self.ratios or self.ours),
            str(self.target or ""),
            reached,
            self.note,
        ]


def not_run(work: str, reason: str, target: Target | None = None) -> Line:
    return Line(work, "", target=target, note=f"not run: {reason}")


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def spread(values: Sequence[float]) -> str:
    return f"{number(statistics.median(values))} ({number(min(values))} to {number(max(values))}; {len(values)})"


# ---------------------------------------------------------------------------------------------------------------- rows

Measure = Callable[[Settings], Line | list[Line]]


@dataclass(frozen=True)
class Row:
    """A named function of some lines; `summary` is the first line of its docstring."""

    name: str
    measure: Measure
    summary: str
    is_gpu: bool = False


ROWS: dict[str, Row] = {}


def row(measure: Measure) -> Measure:
    """Enter a function into the table, under its own name."""
    return _entered(measure, is_gpu=False)


def gpu_row(measure: Measure) -> Measure:
    """Likewise, of a function that needs a CUDA device: `make gpu` runs it, and `run.py --all` does not."""
    return _entered(measure, is_gpu=True)


def _entered(measure: Measure, *, is_gpu: bool) -> Measure:
    name = measure.__name__
    ROWS[name] = Row(name, measure, (measure.__doc__ or "").splitlines()[0], is_gpu)
    return measure


def measured(
    chosen: Sequence[Row],
    settings: Settings,
    *,
    minutes: float = math.inf,
    apart: bool = False,
    keep: Callable[[dict[str, list[Line]]], None] = lambda found: None,
) -> dict[str, list[Line]]:
    """The lines of each row; one that fails is a line that says so, and the others go on.

    No row begins when more than `minutes` are over.  `apart`: each in a process of its own, so that what one leaves
    behind (settings of the allocator, precision, memory) does not meet the next.  `keep` gets what there is after
    each row.
    """
    begun = time.perf_counter()
    found: dict[str, list[Line]] = {}
    for number_of_row, one in enumerate(chosen, 1):
        print(f"[{number_of_row} of {len(chosen)}] {one.name}: {one.summary}", file=sys.stderr, flush=True)
        started = time.perf_counter()
        try:
            is_late = started - begun > 60 * minutes
            measure = _lines_apart if apart else _lines
            lines = not_run(one.name, f"{minutes:g} minutes are over") if is_late else measure(one, settings)
        except (Exception, SystemExit) as error:  # a long table is not lost to one of its rows
            traceback.print_exc()
            lines = [Line(one.name, "", note=f"failed: {' '.join(str(error).split())[-160:] or type(error).__name__}")]
        found[one.name] = lines if isinstance(lines, list) else [lines]
        for line in found[one.name]:
            print(f"    {'  |  '.join(line.cells())}", file=sys.stderr, flush=True)
        print(f"    took {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        keep(found)
    return found


def _lines_apart(one: Row, settings: Settings) -> Line | list[Line]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_lines, one, settings).result()


def _lines(one: Row, settings: Settings) -> Line | list[Line]:
    import torch

    if one.is_gpu and not settings.quick and not torch.cuda.is_available():
        return not_run(one.name, "needs a CUDA device")
    return one.measure(settings)


def take_turns(
    contestants: Mapping[str, Callable[[], float]], turns: int, *, warm_up: bool = True
) -> dict[str, list[float]]:
    """What each contestant returns, `turns` times, forth and back, so that none always comes after the same other."""
    if warm_up:
        for run in contestants.values():
            run()
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(turns):
        for name in contestants if turn % 2 == 0 else reversed(list(contestants)):
            found[name].append(contestants[name]())
    return found


@contextmanager
def in_a_process(make: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Callable[[], Any]]:
    """A function that returns the next value of `make(*arguments)`, which runs in a process of its own meanwhile."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(there, make, arguments))
    process.start()
    there.close()

    def ask() -> Any:
        time.sleep(0.01)  # threads of the process that had its turn before may still be waiting for work
        try:
            here.send(None)
            return here.recv()
        except (EOFError, BrokenPipeError) as error:
            process.join()
            raise RuntimeError(f"{make.__name__}{arguments[:1]} ended with {process.exitcode}") from error

    try:
        yield ask
    finally:
        here.close()
        process.join()


def _answer(pipe: Connection, make: Callable[..., Iterator[Any]], arguments: Sequence[Any]) -> None:
    """Send a value whenever the other end asks for one, until it is closed."""
    values = make(*arguments)
    with suppress(EOFError, BrokenPipeError):
        while True:
            pipe.recv()
            pipe.send(next(values))


def timed(command: Sequence[str], *, cwd: Path = ROOT, settings: Settings) -> tuple[str, float]:
    """What a command prints, and its seconds.  Exits with its output if it fails."""
    started = settings.now()
    with started_command(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        printed, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{printed[-1000:]}{errors[-2000:]}")
    return printed, settings.now() - started


def started_command(command: Sequence[str], *, cwd: Path, **streams: Any) -> "subprocess.Popen[str]":
    """A process that imports the project in `cwd`, and reaches no Hub."""
    environment = {**os.environ, "PYTHONPATH": str(cwd), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True, **streams)


# ------------------------------------------------------------------------------------------------------------- results


def table(found: Mapping[str, Sequence[Line]]) -> str:
    """All lines, aligned."""
    cells = [list(COLUMNS), *(line.cells() for lines in found.values() for line in lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    ruled = [cells[0], ["-" * width for width in widths], *cells[1:]]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in ruled
    )


def record(found: Mapping[str, Sequence[Line]], settings: Settings) -> dict[str, Any]:
    """Everything that was measured, for a file of JSON."""

    def entry(line: Line) -> dict[str, Any]:
        return {**asdict(line), "target": str(line.target or ""), "ratios": line.ratios, "reached": line.is_reached}

    return {
        "machine": machine(),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "settings": {"repeats": settings.turns, "quick": settings.quick, "clock": settings.clock},
        "rows": {name: [entry(line) for line in lines] for name, lines in found.items()},
    }


def machine() -> dict[str, Any]:
    """The hardware, as far as it is known."""
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "devices": devices,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def processor() -> str:
    """Its name, where the system says it."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def hardware_line(facts: Mapping[str, Any]) -> str:
    devices = f"; {', '.join(facts['devices'])}" if facts["devices"] else ""
    return (
        f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads, {facts['instructions']}{devices}; "
        f"load {facts['load']}"
    )


def show(found: Mapping[str, Sequence[Line]], settings: Settings) -> dict[str, Any]:
    """Print the machine, versions and table; return the record."""
    facts = record(found, settings)
    print(f"{hardware_line(facts['machine'])}\n{', '.join(f'{name} {of}' for name, of in facts['versions'].items())}")
    remark = "; quick: no figures to quote" if settings.quick else ""
    print(f"{settings.clock} seconds{remark}\n\n{table(found)}")
    return facts


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
