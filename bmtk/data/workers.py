"""Processes that write shards.  Each imports tokenizers and numpy only, and takes one shard after another."""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bmtk.errors import UserError

from .shards import ShardJob

PROGRAM = "import sys; sys.path[:] = {path!r}; from bmtk.data.shards import main; main()"
OnEvent = Callable[[int, str, Any], None]  # number of the shard, kind ("progress", "done") and value


def default_workers() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_in_processes(jobs: Sequence[ShardJob], tokenizer: Path, *, workers: int, on_event: OnEvent) -> None:
    """Write every shard; `tokenizer` is its JSON file.

    Raises: UserError of the first file that cannot be read; finished shards, and the progress of others, stay.
    """
    waiting: queue.SimpleQueue[ShardJob] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    events: queue.SimpleQueue[tuple[int, str, Any]] = queue.SimpleQueue()
    crew = [_Worker(tokenizer, waiting, events) for _ in range(min(workers, len(jobs)))]
    left = len(jobs)
    try:
        while left:
            number, kind, value = events.get()
            if kind == "refused":
                raise UserError(value)
            if kind == "lost":
                raise RuntimeError(value)
            left -= kind == "done"
            on_event(number, kind, value)
    finally:
        for worker in crew:
            worker.end()


class _Worker:
    """A process, and the thread that feeds it."""

    def __init__(
        self,
        tokenizer: Path,
        waiting: "queue.SimpleQueue[ShardJob]",
        events: "queue.SimpleQueue[tuple[int, str, Any]]",
    ):
        self.waiting, self.events = waiting, events
        self.errors = tempfile.TemporaryFile()
        program = PROGRAM.format(path=[path or os.getcwd() for path in sys.path])
        one_thread = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env={**os.environ, **one_thread},
            text=True,
            encoding="utf-8",
        )
        self.thread = threading.Thread(target=self._feed, args=(tokenizer,), daemon=True)
        self.thread.start()

    def _feed(self, tokenizer: Path) -> None:
        number = -1
        try:
            self._send(json.dumps(str(tokenizer)))
            while True:
                job = self.waiting.get_nowait()
                number = job.number
                self._send(job.to_json())
                while (event := self._receive())[1] == "progress":
                    self.events.put(event)
                self.events.put(event)
        except queue.Empty:
            pass
        except (EOFError, OSError, ValueError):  # the process has ended, or its pipes were closed
            self.events.put((number, "lost", self._last_words(number)))

    def _send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _receive(self) -> tuple[int, str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EOFError
        number, kind, value = json.loads(line)
        return number, kind, value

    def _last_words(self, number: int) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        words = self.errors.read().decode(errors="replace").strip()[-2000:]
        problem = f"the process that wrote shard {number} has ended with code {code}"
        return f"{problem}; run the command again to go on\n{words}"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.thread.join()
        for stream in (self.process.stdin, self.process.stdout):
            with suppress(OSError):  # what was still to be sent
                if stream is not None:
                    stream.close()
        self.errors.close()
