"""Rows of whole documents: each document goes into the row that it fills best, and the rest of a row is padded.

Cutting documents end to end leaves most rows with a part of a document whose beginning the model cannot see.  Source:
Ding et al. 2024, "Fewer truncations improve language modeling", arXiv:2404.10830, sec. 3 (best-fit decreasing).
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from bmtk.files import replacing_folder

from .packing import PackedRows
from .token_store import TokenStore


def best_fit_bins(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """A bin for each item (N,): the longest item first, each into the fullest bin that has room for it.

    Sizes (N,) are 1 to `capacity`.  Items of one size and bins of one room are placed together, so the loops are over
    sizes and not over items: 10**7 of them take seconds.  Bins are numbered from 0; ties go to the earlier item.
    """
    counts = np.bincount(sizes, minlength=capacity + 1)
    order = np.argsort(capacity - sizes, kind="stable")
    bins = np.empty(len(sizes), np.int64)
    room, first = _Room(capacity), 0
    for size in np.flatnonzero(counts)[::-1].tolist():
        last = first + int(counts[size])
        bins[order[first:last]] = room.place(size, last - first)
        first = last
    return bins


class _Room:
    """Bins by the room that they have left."""

    def __init__(self, capacity: int):
        self.capacity, self.num_bins = capacity, 0
        self.bins: defaultdict[int, list[np.ndarray]] = defaultdict(list)
        self.has_bins = np.zeros(capacity + 1, bool)
        self.has_bins[capacity] = True  # a new bin

    def place(self, size: int, count: int) -> np.ndarray:
        """The bins (count,) of `count` items of one size."""
        found = []
        while count:
            room = size + int(np.argmax(self.has_bins[size:]))
            fit = room // size  # once it holds one of them, a bin is the fullest with room for the next
            bins = self._taken(room, -(-count // fit))
            placed = min(count, len(bins) * fit)
            full, more = divmod(placed, fit)
            self._put(room - fit * size, bins[:full])
            self._put(room - more * size, bins[full:])
            found.append(np.repeat(bins, fit)[:placed])
            count -= placed
        return np.concatenate(found)

    def _taken(self, room: int, count: int) -> np.ndarray:
        """At most `count` bins with so much room, no longer kept."""
        if room == self.capacity:
            self.num_bins += count
            return np.arange(self.num_bins - count, self.num_bins)
        parts = self.bins[room]
        last = parts.pop()
        if len(last) > count:
            parts.append(last[count:])
        self.has_bins[room] = bool(parts)
        return last[:count]

    def _put(self, room: int, bins: np.ndarray) -> None:
        if room and len(bins):
            self.bins[room].append(bins)
            self.has_bins[room] = True


@dataclass(frozen=True)
class RowIndex:
    """Which parts of documents the rows of L tokens hold.

    A document of n tokens fills n // L rows alone; the n % L tokens at its end share a row with others.  `long` has
    the documents with such full rows, `long_ends` how many of these there are up to and with each; `shared` has
    documents in the order of the rows that their ends are in, `shared_ends` how many up to the end of each such row.
    """

    long: np.ndarray
    long_ends: np.ndarray
    shared: np.ndarray
    shared_ends: np.ndarray

    @property
    def num_full(self) -> int:
        return int(self.long_ends[-1]) if len(self.long_ends) else 0

    def __len__(self) -> int:
        return self.num_full + len(self.shared_ends)


ARRAYS = ("long", "long_ends", "shared", "shared_ends")


def new_index(offsets: np.ndarray, length: int) -> RowIndex:
    """The rows of documents that begin at `offsets` (N + 1,)."""
    sizes = np.diff(offsets)
    long = np.flatnonzero(sizes >= length)
    long_ends = np.cumsum(sizes[long] // length)
    rest = (sizes % length).astype(np.uint16 if length < 1 << 16 else np.int64)  # sorting 16 bits is faster
    shared = np.flatnonzero(rest)
    if not len(shared):
        return RowIndex(long, long_ends, shared, np.empty(0, np.int64))
    bins = best_fit_bins(rest[shared], length)
    return RowIndex(long, long_ends, shared[np.argsort(bins, kind="stable")], np.cumsum(np.bincount(bins)))


def index_of(store: TokenStore, length: int, *, is_kept: bool = True) -> RowIndex:
    """The rows of a store, made once and kept in its folder, unless `is_kept` is False."""
    folder = store.directory / f"best_fit-{length}"
    if not is_kept and not folder.is_dir():
        return new_index(np.asarray(store.offsets), length)
    if not folder.is_dir():
        with FileLock(store.directory / f".{folder.name}.lock"):
            if not folder.is_dir():  # another process made it meanwhile
                _write(new_index(np.asarray(store.offsets), length), folder)
    return RowIndex(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS))


def _write(index: RowIndex, folder: Path) -> None:
    with replacing_folder(folder) as partial:
        for name in ARRAYS:
            np.save(partial / f"{name}.npy", getattr(index, name))


class BestFitRows(PackedRows):
    """The same tokens as `PackedRows` has, with whole documents in a row where they are no longer than one.

    Longer documents are cut into full rows and a rest.  Every token is an input once, and all but the first of a
    document are a target once.  `position_ids` count from 0 where a document begins, or goes on after a cut.
    """

    def __init__(self, store: TokenStore, context_length: int, *, is_kept: bool = True):
        super().__init__(store, context_length)
        self.index = index_of(store, context_length, is_kept=is_kept)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def num_pads(self) -> int:
        """Positions of all rows that hold no token."""
        return len(self) * self.context_length - int(self.store.num_tokens)

    @property
    def described(self) -> str:
        """Rows, padding and cuts, in words."""
        share = self.num_pads / (len(self) * self.context_length)
        cut = int((np.diff(np.asarray(self.store.offsets)) > self.context_length).sum())
        rows = f"{len(self):,} rows of {self.context_length} tokens, {share:.2%} of them padding"
        return f"{rows}; documents longer than a row, which are cut: {cut:,}"

    def piece(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        number = row - self.index.num_full
        return self._full(row) if number < 0 else self._shared(number)

    def inputs(self, row: int) -> np.ndarray:
        return np.asarray(self.piece(row)[0][: self.context_length], np.int64)

    def _full(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        place = int(np.searchsorted(self.index.long_ends, row, side="right"))
        before = int(self.index.long_ends[place - 1]) if place else 0
        first = int(self.store.offsets[int(self.index.long[place])]) + (row - before) * self.context_length
        last = first + self.context_length + 1
        return self.store.tokens[first:last], self.store.starts(first, last)

    def _shared(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        begin, end = (int(self.index.shared_ends[i]) if i >= 0 else 0 for i in (number - 1, number))
        parts = []
        for document in self.index.shared[begin:end].tolist():
            first, last = self.store.offsets[document : document + 2].tolist()
            parts.append(self.store.tokens[last - (last - first) % self.context_length : last])
        return np.concatenate(parts), np.cumsum([0, *map(len, parts)])  # the end of the last starts the padding
