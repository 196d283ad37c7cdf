"""Who runs the stages: processes of this machine, Slurm, or Ray.

A task that is completed is marked so by a file, so that the same command goes on at the tasks that are not.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import dill
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from filelock import FileLock
from loguru import logger

from bmtk.data.workers import default_workers
from bmtk.errors import UserError

from .arguments import Cleaning
from .stages import Stage

Log = Callable[[str], None]


class LocalExecutor(LocalPipelineExecutor):
    """Runs single tasks of a stage, in whatever process.

    datatrove's own way to run all of them waits forever for a worker that was killed (for want of memory, say), and
    forgets the counts of tasks that were completed before.
    """

    def __init__(self, stage: Stage, folder: Path):
        super().__init__(stage.steps, stage.num_tasks, logging_dir=str(folder))
        self.folder = folder

    def run_task(self, rank: int) -> None:
        logger.disable("datatrove")
        # What a kill leaves behind may still be at this task; when it is done, there is nothing left to do.
        with FileLock(self.folder / f"{rank:05}.lock"):
            self._run_for_rank(rank, local_rank=1)  # 0 would print to the terminal


def _run_pickled(executor: bytes, rank: int) -> None:
    """Run a task by a copy of its own, as some steps keep what they have read of a shard."""
    dill.loads(executor).run_task(rank)


def _in_this_process(executor: bytes, ranks: list[int]) -> Iterator[None]:
    for rank in ranks:
        _run_pickled(executor, rank)
        yield


def _in_processes(pool: ProcessPoolExecutor, executor: bytes, ranks: list[int]) -> Iterator[None]:
    for future in as_completed([pool.submit(_run_pickled, executor, rank) for rank in ranks]):
        yield future.result()


def _end_with_parent() -> None:
    """End this worker when the process that gives it tasks is killed: it would wait for the next one forever."""
    parent = parent_process()
    assert parent is not None  # as this is a child

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Progress:
    """Says how many tasks of a stage are done, when some seconds have passed, and at the end."""

    SECONDS = 5

    def __init__(self, purpose: str, num_tasks: int, num_before: int, log: Log):
        self.purpose, self.num_tasks, self.num_before, self.num_done, self.log = purpose, num_tasks, num_before, 0, log
        self.start = self.last = time.monotonic()

    def add(self) -> None:
        self.num_done += 1
        now, left = time.monotonic(), self.num_tasks - self.num_before - self.num_done
        if left and now > self.last + self.SECONDS:
            seconds = (now - self.start) / self.num_done * left
            self.log(
                f"{self.purpose}: {self.num_before + self.num_done:,} of {self.num_tasks:,}, {seconds:,.0f} s left"
            )
            self.last = now

    def finish(self) -> None:
        before = f", {self.num_before:,} of them before" if self.num_before else ""
        self.log(
            f"{self.purpose}: {self.num_tasks:,} of {self.num_tasks:,}{before}, {time.monotonic() - self.start:.1f} s"
        )


def run_locally(stages: list[Stage], folder: Path, settings: Cleaning, log: Log) -> None:
    workers = settings.run.workers or default_workers()
    pool = ProcessPoolExecutor(workers, get_context("forkserver"), _end_with_parent)
    try:
        for stage in stages:
            executor = LocalExecutor(stage, folder / stage.name)
            task = dill.dumps(executor)  # some steps of datatrove hold functions that pickle does not know
            ranks = executor.get_incomplete_ranks()
            progress = _Progress(stage.purpose, stage.num_tasks, stage.num_tasks - len(ranks), log)
            is_small = workers == 1 or len(ranks) < 2
            for _ in _in_this_process(task, ranks) if is_small else _in_processes(pool, task, ranks):
                progress.add()
            progress.finish()
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process was killed while it did this: {stage.purpose}. If memory ran out, set fewer workers; "
            "the same command goes on where this one stopped"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def run_by_ray(stages: list[Stage], folder: Path, settings: Cleaning, log: Log) -> None:
    """On the cluster that RAY_ADDRESS names, else on this machine."""
    try:
        import ray
    except ImportError as error:
        raise UserError("executor=ray needs the package ray: pip install ray") from error
    logger.disable("datatrove")
    workers = settings.run.workers or default_workers()
    ray.init(log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
    try:
        for stage in stages:
            start, logs = time.monotonic(), folder / stage.name
            executor = RayPipelineExecutor(
                stage.steps,
                stage.num_tasks,
                min(workers, stage.num_tasks),
                logging_dir=str(logs),
                mem_per_cpu_gb=settings.run.memory_gb,
            )
            executor.run()
            _check_completed(stage, executor, logs)  # tasks that failed are only counted by datatrove
            log(f"{stage.purpose}: {stage.num_tasks:,} of {stage.num_tasks:,}, {time.monotonic() - start:.1f} s")
    finally:
        ray.shutdown()


def _check_completed(stage: Stage, executor: Any, logs: Path) -> None:
    if left := executor.get_incomplete_ranks(skip_completed=True):
        raise UserError(
            f"{len(left):,} of {stage.num_tasks:,} tasks failed while they did this: {stage.purpose}. "
            f"{_last_line(logs / 'logs' / f'task_{left[0]:05}.log')}; the same command goes on where this one stopped"
        )


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").strip().splitlines() if path.is_file() else []
    return f"{path} ends: {lines[-1]}" if lines else f"{path} would say why, but is empty"


def submit_to_slurm(stages: list[Stage], folder: Path, settings: Cleaning, log: Log) -> None:
    """Submit all stages; each begins when the one before it has succeeded."""
    logger.disable("datatrove")
    last: Any = None
    for stage in stages:
        last = SlurmPipelineExecutor(
            stage.steps,
            stage.num_tasks,
            time=settings.slurm.slurm_time,
            partition=settings.slurm.slurm_partition,
            qos=settings.slurm.slurm_qos,
            mem_per_cpu_gb=max(1, round(settings.run.memory_gb)),
            workers=settings.run.workers or -1,
            job_name=f"bmtk-clean-{stage.name}",
            env_command=settings.slurm.slurm_setup or f"export PATH={Path(sys.executable).parent}:$PATH",
            logging_dir=str(folder / stage.name),
            depends=last,
        )
    try:
        last.run()
    except FileNotFoundError as error:
        raise UserError("executor=slurm needs the command sbatch; run it on a login node of the cluster") from error
    log(f"{len(stages)} stages are submitted; `squeue --me` shows them, {folder}/STAGE/slurm_logs what they print")


RUN: dict[str, Callable[[list[Stage], Path, Cleaning, Log], None]] = {
    "local": run_locally,
    "ray": run_by_ray,
    "slurm": submit_to_slurm,
}
