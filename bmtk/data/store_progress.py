"""How far the tokenising of a corpus is, in lines: bytes, tokens, speed and the time that is left."""

import time
from collections.abc import Callable, Mapping
from typing import Any

SECONDS = 10.0  # between two lines


class Progress:
    """Counts what several shards report; `sizes` are their bytes of files."""

    def __init__(self, log: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic):
        self.log, self.clock = log, clock
        self.sizes: dict[int, int] = {}
        self.found: set[int] = set()  # shards that were there
        self.now: dict[int, tuple[int, int]] = {}  # bytes of text and tokens of each shard that is being written
        self.done: set[int] = set()
        self.notes: set[str] = set()
        self.began = self.shown = clock()

    def start(self, sizes: Mapping[int, int], found: Mapping[int, Any]) -> None:
        self.sizes, self.found = dict(sizes), set(found)
        self.began = self.shown = self.clock()
        if found and len(found) < len(sizes):
            self.log(f"going on: {len(found)} of {len(sizes)} shards are there already")

    def of_shard(self, number: int) -> Callable[[int, int], None]:
        return lambda done, tokens: self.update(number, "progress", (done, tokens))

    def update(self, number: int, kind: str, value: Any) -> None:
        if kind == "done":
            self.done.add(number)
            self.now[number] = (value["bytes"], value["tokens"])
            if (note := value.get("note")) and note not in self.notes:
                self.notes.add(note)
                self.log(f"note: {note}")
        else:
            self.now[number] = (value[0], value[1])
        if self.clock() - self.shown >= SECONDS:
            self.shown = self.clock()
            self.log(self.line())

    def finish(self) -> None:
        """A last line, if there was time for one before."""
        if self.shown > self.began:
            self.log(self.line())

    def line(self) -> str:
        """Of what was read since the start; the rest is judged by the sizes of files."""
        seconds = max(self.clock() - self.began, 1e-3)
        text, tokens = (sum(pair[place] for pair in self.now.values()) for place in (0, 1))
        read = sum(
            self.sizes.get(number, 0) if number in self.done else min(pair[0], self.sizes.get(number, 0))
            for number, pair in self.now.items()
        )
        total = sum(size for number, size in self.sizes.items() if number not in self.found)
        parts = [
            f"tokenised {read / 1e6:,.0f} of {total / 1e6:,.0f} MB" if total else f"tokenised {text / 1e6:,.0f} MB",
            f"{tokens / 1e6:,.1f} M tokens",
            f"{text / 1e6 / seconds:,.1f} MB/s",
            f"{tokens / 1e6 / seconds:,.2f} M tokens/s",
        ]
        if read and total:
            parts.append(f"{clock_time(seconds * (total - read) / read)} left")
        return ", ".join(parts)


def clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
