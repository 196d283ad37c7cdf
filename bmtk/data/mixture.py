"""Which corpus each row of a mixture comes from: looked up, never replayed.

The j-th row (from 1) of a corpus with share w takes one of the positions floor((j-1) / w) to ceil(j / w) - 1.  Then
its count is less than one row from w * position at every position.  Serving what is due first keeps all windows.
Source: Baruah et al. 1996, "Proportionate progress: a notion of fairness in resource allocation".
"""

import difflib
import heapq
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np

from bmtk.errors import UserError

from .corpus_files import SUFFIXES
from .text_files import COMPRESSED_SUFFIXES

MIXTURE = "mixture.json"  # of a corpus folder: stores, weights and repeats of what was mixed last
MOST_PARTS = 1 << 16  # whole parts that weights are expressed in: the length of the period that is kept in memory


@dataclass(frozen=True)
class Corpus:
    """An item of the setting `corpora`."""

    path: str
    weight: float = 1.0
    text_column: str | None = None
    repeat: float | None = None


def read_corpora(items: Sequence[str]) -> list[Corpus]:
    """The corpora of a setting: each item is a JSON object, or a JSON list of them.

    Raises: UserError for what is none, an unknown key, and a weight or `repeat` that is not above 0.
    """
    found = []
    for item in items:
        try:
            value = json.loads(item)
        except ValueError as error:
            raise UserError(
                f"corpora={item} is not JSON ({error}); give each corpus as "
                '{"path": "texts/a.jsonl", "weight": 2, "text_column": "text", "repeat": 4}'
            ) from error
        found += [_corpus(one) for one in (value if isinstance(value, list) else [value])]
    if not found:
        raise UserError("corpora is empty; name at least one corpus, or leave it out")
    return found


def _corpus(value: object) -> Corpus:
    known = [f.name for f in fields(Corpus)]
    if not isinstance(value, dict):
        raise UserError(f"corpora={json.dumps(value)} is not a corpus; give its {', '.join(known)}")
    for key in value.keys() - set(known):
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise UserError(f"corpora: unknown key {key!r}; {hint}")
    for key in ("path", "text_column"):
        if not isinstance(value.get(key, ""), str | None) or (key == "path" and not value.get(key)):
            raise UserError(f"corpora: {key}={json.dumps(value.get(key))} is not a text; every corpus needs a path")
    for key in ("weight", "repeat"):
        number = value.get(key, 1)
        is_number = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
        if not (is_number and number > 0) and not (key == "repeat" and number is None):
            raise UserError(f"corpora: {key}={json.dumps(number)} of {value['path']} must be a number above 0")
    return Corpus(**value)


def to_text(corpus: Corpus) -> str:
    """The same item in one way of writing, so that runs can be compared."""
    return json.dumps(asdict(corpus), ensure_ascii=False)


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Weights as whole numbers of the same ratio, with a sum of MOST_PARTS at most; if need be they are rounded.

    A rounded share differs from the one asked for by less than one part, and no corpus gets less than one.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(number.denominator for number in exact))
    numbers = [int(number * scale) for number in exact]
    numbers = [number // math.gcd(*numbers) for number in numbers]
    total = sum(numbers)
    if total <= MOST_PARTS:
        return numbers
    parts = [max(1, number * MOST_PARTS // total) for number in numbers]
    lacks = sorted(range(len(parts)), key=lambda i: parts[i] * total - numbers[i] * MOST_PARTS)
    for i in lacks[: max(0, MOST_PARTS - sum(parts))]:
        parts[i] += 1
    return parts


class Period:
    """One period of the order of corpora with whole weights (k,): sum(weights) positions; a weight may be 0."""

    def __init__(self, weights: Sequence[int]):
        self.weights = np.array(weights, np.int64)
        self.length = int(self.weights.sum())
        self.corpus = _earliest_deadline_first(weights)  # (length,)
        order = np.argsort(self.corpus, kind="stable")
        self.place = np.split(order, np.cumsum(self.weights)[:-1])  # of each corpus: its positions, in order
        self.rank = np.empty(self.length, np.int64)  # rows of the same corpus before it
        for places in self.place:
            self.rank[places] = np.arange(len(places))

    def at(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The corpus at each position, and how many rows of it came before."""
        period, place = np.divmod(position, self.length)
        corpus = self.corpus[place]
        return corpus, period * self.weights[corpus] + self.rank[place]

    def position(self, corpus: int, row: int) -> int:
        """Where the row of a corpus stands, counted from 0."""
        period, rank = divmod(row, int(self.weights[corpus]))
        return period * self.length + int(self.place[corpus][rank])

    def counts(self, position: int) -> np.ndarray:
        """Rows of each corpus (k,) before `position`."""
        period, place = divmod(position, self.length)
        return period * self.weights + np.bincount(self.corpus[:place], minlength=len(self.weights))


def _earliest_deadline_first(weights: Sequence[int]) -> np.ndarray:
    length = sum(weights)
    waiting = [(0, i) for i, weight in enumerate(weights) if weight]  # position from which its next row may come
    due: list[tuple[int, int]] = []  # position before which it must
    done = [0] * len(weights)
    corpus = np.empty(length, np.int64)
    for position in range(length):
        while waiting and waiting[0][0] <= position:
            _, i = heapq.heappop(waiting)
            heapq.heappush(due, (-(-(done[i] + 1) * length // weights[i]), i))
        _, i = heapq.heappop(due)
        corpus[position] = i
        done[i] += 1
        heapq.heappush(waiting, (done[i] * length // weights[i], i))
    return corpus


@dataclass(frozen=True)
class Phase:
    """Positions between two ends of corpora: where it starts, what was read of each corpus before, and its order."""

    start: int
    counts: np.ndarray
    period: Period


class Mixture:
    """The corpus of every position in an endless order of rows, by weights.

    A corpus may be read `repeats` times (None: any number).  When it is used up, the others go on with their weights
    among themselves; when all are, the order ends, at `limit`.  From the start to the first such end, and from one to
    the next, the rows of a corpus are less than one row from its share of them, at every position.
    """

    def __init__(
        self,
        names: Sequence[str],
        weights: Sequence[float],
        sizes: Sequence[int],
        repeats: Sequence[float | None] | None = None,
    ):
        """`sizes` are the rows of each corpus."""
        self.names, self.weights = list(names), list(weights)
        self.sizes = np.array(sizes, np.int64)
        self.repeats = list(repeats) if repeats else [None] * len(self.names)
        self.most = [
            None if repeat is None else max(1, round(repeat * size))
            for repeat, size in zip(self.repeats, sizes, strict=True)
        ]
        self.first_rows = np.cumsum([0, *sizes])[:-1]  # of each corpus, where all are numbered in one row

    @property
    def num_rows(self) -> int:
        """Rows of all corpora together: what counts as an epoch."""
        return int(self.sizes.sum())

    @property
    def limit(self) -> int | None:
        """How many rows there are until all corpora are used up."""
        return None if None in self.most else sum(most for most in self.most if most)

    @cached_property
    def phases(self) -> list[Phase]:
        whole = np.array(whole_weights(self.weights))
        phases = [Phase(0, np.zeros(len(whole), np.int64), Period(whole.tolist()))]
        while end := self._end(phases[-1]):
            last = phases[-1]
            counts = last.counts + last.period.counts(end - last.start)
            is_left = [most is None or read < most for most, read in zip(self.most, counts, strict=True)]
            if not any(is_left):
                break
            left = np.where(is_left, whole, 0)
            phases.append(Phase(end, counts, Period((left // np.gcd.reduce(left)).tolist())))
        return phases

    def _end(self, phase: Phase) -> int | None:
        """The position after the row that is the last of its corpus, if there is one."""
        ends = [
            phase.start + phase.period.position(i, most - int(phase.counts[i]) - 1) + 1
            for i, most in enumerate(self.most)
            if most is not None and phase.period.weights[i]
        ]
        return min(ends, default=None)

    def at(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The corpus at each position (N,), and how many rows of it came before.

        Raises: UserError for a position behind the end.
        """
        if self.limit is not None and position.size and position.max() >= self.limit:
            raise UserError(self._is_used_up(int(position.max()) + 1))
        starts = np.array([phase.start for phase in self.phases])
        number = np.searchsorted(starts, position, side="right") - 1
        corpus, row = np.empty(len(position), np.int64), np.empty(len(position), np.int64)
        for i in np.unique(number):
            phase, here = self.phases[i], number == i
            corpus[here], since = phase.period.at(position[here] - phase.start)
            row[here] = since + phase.counts[corpus[here]]
        return corpus, row

    def counts(self, num_rows: int) -> np.ndarray:
        """How many of the first `num_rows` rows are of each corpus (k,)."""
        phase = [phase for phase in self.phases if phase.start <= num_rows][-1]
        return phase.counts + phase.period.counts(num_rows - phase.start)

    def check(self, num_rows: int) -> None:
        """Raise UserError if a run of `num_rows` rows is longer than all corpora with their repeats."""
        if self.limit is not None and num_rows > self.limit:
            raise UserError(self._is_used_up(num_rows))

    def _is_used_up(self, num_rows: int) -> str:
        ends = ", ".join(f"repeat={repeat:g} of {name}" for name, repeat in zip(self.names, self.repeats, strict=True))
        return (
            f"corpora: all are used up after {self.limit:,} rows ({ends}), and {num_rows:,} are asked for; train for "
            "fewer steps, or raise or leave out repeat"
        )

    def epochs(self, num_rows: int) -> dict[str, float]:
        """How often each corpus has been read after `num_rows` rows."""
        return dict(zip(self.names, (self.counts(num_rows) / self.sizes).tolist(), strict=True))

    def record(self, num_rows: int) -> list[dict[str, Any]]:
        """Weight, rows, share and epochs of each corpus in the first `num_rows` rows."""
        epochs, counts = self.epochs(num_rows), self.counts(num_rows).tolist()
        return [
            {"name": name, "weight": weight, "rows": rows, "share": rows / num_rows, "epochs": epochs[name]}
            for name, weight, rows in zip(self.names, self.weights, counts, strict=True)
        ]

    def described(self, num_rows: int) -> list[str]:
        """The corpora in a run of `num_rows` rows, in words."""
        lines = []
        for facts, size, repeat in zip(self.record(num_rows), self.sizes.tolist(), self.repeats, strict=True):
            end = f" of at most {repeat:g}" if repeat is not None else ""
            share = f"weight {facts['weight']:g}, {facts['share']:.2%} of the rows"
            lines.append(f"{facts['name']}: {share}, {facts['epochs']:.3g} epochs{end} of {size:,} rows")
        return lines


class Reading:
    """What a run reads of each corpus of a mixture; without one, nothing is counted or said.

    `whole` is the mixture with the sizes that the corpora have, where a plan has read a part of each.
    """

    def __init__(self, mixture: Mixture | None = None, whole: Mixture | None = None):
        self.mixture, self.whole = mixture, whole or mixture
        self.num_rows = 0  # that are read in training, or will be

    def shares(self, num_rows: int) -> list[str]:
        """The corpora in a run of `num_rows` rows, in words.  Raises: UserError if there are not that many rows."""
        if self.whole is None:
            return []
        self.whole.check(num_rows)
        self.num_rows = num_rows
        return self.whole.described(num_rows)

    def account(self, num_rows: int) -> dict[str, float]:
        """Note that `num_rows` rows have been read; how often each corpus was, as values of a line of history."""
        self.num_rows = num_rows
        found = self.mixture.epochs(num_rows) if self.mixture else {}
        return {f"epochs/{name}": epochs for name, epochs in found.items()}

    def record(self) -> dict[str, Any]:
        """What training has read, for the record of a run."""
        return {"corpora": self.mixture.record(self.num_rows)} if self.mixture and self.num_rows else {}


def share_names(paths: Sequence[str]) -> list[str]:
    """A short name for each path, all different, which can be part of the name of a folder."""
    names: list[str] = []
    for path in paths:
        stem = path.rstrip("/").rpartition("/")[2]
        for suffix in (*COMPRESSED_SUFFIXES, *SUFFIXES):
            stem = stem.removesuffix(suffix)
        name = "".join(c if c.isalnum() or c in "-_" else "-" for c in stem).strip("-") or "corpus"
        tries = (name if number == 1 else f"{name}-{number}" for number in count(1))
        names.append(next(one for one in tries if one not in names))
    return names
