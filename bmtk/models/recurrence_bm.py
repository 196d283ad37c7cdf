"""Recurrent cells.  B rows, L positions, D input width, U units of one layer.

Elman, GRU and LSTM use torch's kernels (cuDNN, oneDNN).  minGRU is a gated linear recurrence whose gates do not
depend on the state, so that all positions are computed in parallel.
Sources: Elman 1990; Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000; Cho et al. 2014,
arXiv:1406.1078; minGRU: Feng et al. 2024, arXiv:2410.01201; weight drop: Merity et al. 2017, arXiv:1708.02182, sec. 2.
"""

from functools import cached_property

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from .eager_cpu_bm import is_eager_on_cpu
from .products_bm import project
from .scans_bm import GatedScan, LinearScan

MOST_PADDING = 4  # largest size of padded documents, in multiples of their tokens
CLOSED = 1e4  # a sigmoid is exactly 1 here and exactly 0 at its negative; float16 can hold it


def are_whole_rows(is_real: torch.Tensor, is_start: torch.Tensor, *, has_state: bool) -> bool:
    """Whether there is neither padding nor a boundary between documents; reads the data, as no graph can."""
    first = 0 if has_state else 1  # without an initial state, a start in the first column changes nothing
    return bool(is_real.all() and not is_start[:, first:].any())


class Documents:
    """Masks (B, L) of the positions that are not padding, and of the first position of each document.

    Padding must not change the state, and the first token of a document must not depend on it.  `keeps_state`: whether
    the state after the row is needed; `may_start`: whether any position may start a document; `has_state`: whether
    rows go on from an earlier state.
    """

    def __init__(
        self, is_real: torch.Tensor, is_start: torch.Tensor, *, keeps_state=True, may_start=True, has_state=True
    ):
        self.is_real, self.is_start = is_real, is_start
        self.keeps_state, self.may_start, self.has_state = keeps_state, may_start, has_state

    @classmethod
    def find(
        cls, attention_mask, position_ids, like: torch.Tensor, *, has_state: bool, keeps_state: bool = True
    ) -> "Documents | None":
        """From the last L columns of an attention mask and position ids that restart at 0; `like` (B, L, D).

        None without padding and document boundaries: then the kernel can read the rows unchanged.  While a graph is
        made (torch.compile, torch.export) the data are unknown, so whatever may hold padding counts as padded.
        """
        has_mask = attention_mask is not None and attention_mask.ndim == 2
        if not has_mask and position_ids is None:
            return None
        batch, length = like.shape[:2]
        is_real = torch.ones(batch, length, dtype=torch.bool, device=like.device)
        is_start = torch.zeros_like(is_real)
        if has_mask:
            is_real = attention_mask[:, -length:].to(torch.bool)
        if position_ids is not None:
            is_start = (position_ids == 0) & is_real
        if not torch.compiler.is_compiling() and are_whole_rows(is_real, is_start, has_state=has_state):
            return None
        may_start = position_ids is not None
        return cls(is_real, is_start, keeps_state=keeps_state, may_start=may_start, has_state=has_state)

    @cached_property
    def are_whole_rows(self) -> bool:
        """Known after all where a graph is left; all layers ask once."""
        return are_whole_rows(self.is_real, self.is_start, has_state=self.has_state)

    @cached_property
    def packing(self) -> "Packing":
        return Packing(self.is_real, self.is_start)

    def turned(self) -> "Documents":
        """The same documents read backwards: the state is forgotten one position before each start."""
        ends = F.pad(self.is_start[:, 1:], (0, 1))
        return Documents(self.is_real.flip(1), ends.flip(1))


class Packing:
    """Index arrays that rearrange the N real tokens by document, longest first; S documents, T tokens in the longest.

    For each token, row by row: its `position` in (B * L), its `slot` in a padded array (S, T) with one document per
    row, and its `turned` slot if documents are reversed.  For each document: the index of its row (`rows`), the slot
    of its `last` token, whether its state `is_fresh` (zero), and whether it `is_last` in its row.
    """

    def __init__(self, is_real: torch.Tensor, is_start: torch.Tensor):
        length = is_real.shape[1]
        self.position = is_real.flatten().nonzero()[:, 0]  # (N,)
        row = self.position // length
        label = row * (length + 1) + is_start.cumsum(1).flatten()[self.position]
        _, document, lengths = label.unique_consecutive(return_inverse=True, return_counts=True)
        first = lengths.cumsum(0) - lengths  # (S,)
        by_length = lengths.argsort(descending=True, stable=True)
        self.step = torch.arange(len(document), device=document.device) - first[document]
        self.shape = len(lengths), max(lengths.tolist(), default=0)
        start = by_length.argsort()[document] * self.shape[1]
        self.slot = start + self.step
        self.turned = start + lengths[document] - 1 - self.step
        self.rows = row[first][by_length]
        self.is_fresh = is_start.flatten()[self.position[first]][by_length]
        self.is_last = (torch.diff(row[first], append=row.new_tensor([-1])) != 0)[by_length]
        self.last = torch.arange(len(lengths), device=row.device) * self.shape[1] + lengths[by_length] - 1

    @cached_property
    def by_step(self) -> torch.Tensor:
        """The order of tokens in torch's PackedSequence."""
        return (self.step * self.shape[0] + self.slot // max(1, self.shape[1])).argsort()

    @cached_property
    def batch_sizes(self) -> torch.Tensor:
        """Number of documents that have a token at each step."""
        return self.step.bincount().cpu()


class RecurrentLayer(nn.RNNBase):
    """One layer of nn.RNN, nn.GRU or nn.LSTM with weight drop: the same kernels and parameters.

    The drop is part of the module itself, because an adapter (LoRA) wraps the module and replaces its weights.  No
    subclass of nn.LSTM: torch.compile refuses those (torch 2.13), but not their kernels.
    """

    def __init__(self, mode: str, input_size: int, units: int, *, weight_drop: float, bidirectional: bool):
        super().__init__(mode, input_size, units, batch_first=True, bidirectional=bidirectional)
        self.weight_drop = weight_drop
        names = {"RNN_TANH": "rnn_tanh", "GRU": "gru", "LSTM": "lstm"}
        self.kernel, self.cell = getattr(torch, names[mode]), getattr(torch, f"{names[mode]}_cell")

    def forward(self, x: torch.Tensor | PackedSequence, state, *, holds=False):
        """Rows (B, L, D), packed rows, or (directions, B, L, D): the rows in the order of each direction.

        With `holds`, rows of the last kind have one column more: an LSTM's cell stays as it is where that is 1.
        """
        directions = self.weights()
        if isinstance(x, torch.Tensor) and x.ndim == 4:
            pair = isinstance(state, tuple)
            starts = zip(*(s.split(1) for s in state), strict=True) if pair else state.split(1)
            runs = [
                self.kernel(
                    rows, start, with_hold(weights) if holds else weights, True, 1, 0.0, self.training, False, True
                )
                for rows, start, weights in zip(x.unbind(), starts, directions, strict=True)
            ]
            y, *after = (torch.stack(parts) for parts in zip(*runs, strict=True))
            after = [s.flatten(0, 1) for s in after]
        else:
            weights = [weight for direction in directions for weight in direction]
            # has biases, layers, dropout, training, bidirectional
            settings = True, 1, 0.0, self.training, self.bidirectional
            if isinstance(x, PackedSequence):
                y, *after = self.kernel(x.data, x.batch_sizes, state, weights, *settings)
                y = PackedSequence(y, x.batch_sizes)
            else:
                y, *after = self.kernel(x, state, weights, *settings, True)
        return y, tuple(after) if len(after) == 2 else after[0]

    def weights(self) -> list[list[torch.Tensor]]:
        """For each direction: input weights, recurrent weights (dropped in training) and their biases."""
        directions = []
        for suffix in ("_l0", "_l0_reverse")[: 2 if self.bidirectional else 1]:
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            weight_ih, weight_hh, *biases = (getattr(self, name + suffix) for name in names)
            if self.training and self.weight_drop:
                weight_hh = F.dropout(weight_hh, self.weight_drop)
            directions.append([weight_ih, weight_hh, *biases])
        return directions


def with_hold(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """Weights of an LSTM with one more input: where it is 1, the input gate is shut and the forget gate open."""
    weight_ih, *others = weights
    sizes = (-CLOSED, CLOSED, 0.0, 0.0)  # torch's order of gates is i, f, g, o
    hold = torch.cat([weight_ih.new_full((weight_ih.shape[0] // 4, 1), size) for size in sizes])
    return [torch.cat((weight_ih, hold), dim=1), *others]


MODES = {"elman": "RNN_TANH", "gru": "GRU", "lstm": "LSTM"}


class TorchRecurrence(nn.Module):
    """One layer of torch's own cells, in one direction or both."""

    def __init__(self, cell_type: str, input_size: int, units: int, *, bidirectional=False, weight_drop=0.0):
        super().__init__()
        self.num_directions = 2 if bidirectional else 1
        self.units = units
        self.rnn = RecurrentLayer(
            MODES[cell_type],
            input_size,
            units // self.num_directions,
            bidirectional=bidirectional,
            weight_drop=weight_drop,
        )
        self.has_cell = cell_type == "lstm"

    def forward(self, x: torch.Tensor, state=None, documents: Documents | None = None):
        """x (B, L, D), state ((B, U), (B, U or 0)) -> y (B, L, U), state after the last real token of each row."""
        if self.has_cell and torch.is_autocast_enabled(x.device.type):
            # Autocast alone does not cast here: torch passes float32 rows and bfloat16 weights to oneDNN, which fails.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if state is None:
            state = (x.new_zeros(x.shape[0], units) for units in (self.units, self.units if self.has_cell else 0))
            state = tuple(state)
        if not torch.compiler.is_compiling():
            return self._read(x, state, documents)
        if self.training and not torch.compiler.is_exporting():
            # A compiler unrolls a kernel position by position, which takes it minutes for forward and backward.
            return self._read_outside_of_graphs(x, state, documents)
        if documents is None:
            return self._run(x, state)
        return (self._run_steps if documents.may_start else self._run_to_the_left)(x, state, documents)

    def _read(self, x: torch.Tensor, state, documents: Documents | None):
        """By the kernel that is fastest for these data."""
        if documents is None or documents.are_whole_rows:
            return self._run(x, state)
        packing, (batch, length) = documents.packing, x.shape[:2]
        y = x.new_zeros(batch * length, self.units)
        if len(packing.position):
            before = tuple(s[packing.rows].masked_fill(packing.is_fresh[:, None], 0) for s in state)
            run = self._run_side_by_side if self._prefers_rows(documents, x.device) else self._run_packed
            tokens, after = run(x.flatten(0, 1)[packing.position], before, packing)
            y = y.to(tokens.dtype).index_copy(0, packing.position, tokens)
            rows = packing.rows[packing.is_last]
            state = tuple(
                s.to(a.dtype).index_copy(0, rows, a[packing.is_last]) for s, a in zip(state, after, strict=True)
            )
        return y.view(batch, length, self.units), state

    _read_outside_of_graphs = torch.compiler.disable(_read)

    def _prefers_rows(self, documents: Documents, device: torch.device) -> bool:
        """Whether padded documents are faster than a PackedSequence.

        They are on a CPU, where the training time of a PackedSequence grows with the square of its length.  A padded
        LSTM does not return the cell state after the last token of each document.
        """
        num_documents, longest = documents.packing.shape
        is_dense = num_documents * longest <= MOST_PADDING * len(documents.packing.position)
        return device.type == "cpu" and is_dense and not (self.has_cell and documents.keeps_state)

    def _run_packed(self, tokens: torch.Tensor, state, packing: Packing):
        """Tokens (N, D) and states (S, U) before each document -> (N, U), and the states after it."""
        y, after = self._run(PackedSequence(tokens[packing.by_step], packing.batch_sizes), state)
        return torch.empty_like(y.data).index_copy(0, packing.by_step, y.data), after

    def _run_side_by_side(self, tokens: torch.Tensor, state, packing: Packing):
        """As `_run_packed`, with documents padded to one length; cell states after a document are not returned."""
        slots = (packing.slot, packing.turned)[: self.num_directions]
        empty = tokens.new_zeros(packing.shape[0] * packing.shape[1], tokens.shape[1])
        padded = torch.stack([empty.index_copy(0, slot, tokens) for slot in slots])
        y, _ = self._run(padded.unflatten(1, packing.shape), state)
        y = y.flatten(1, 2)  # (directions, S * T, U / directions)
        after = y[:, packing.last].transpose(0, 1).flatten(1)
        y = torch.cat([rows[slot] for rows, slot in zip(y, slots, strict=True)], dim=-1)
        return y, (after, after.new_zeros(after.shape[0], state[1].shape[1]))

    def _run_to_the_left(self, x: torch.Tensor, state, documents: Documents):
        """Rows with padding, by a graph that is the same for all data: real tokens first, in either direction."""
        is_real, (batch, length) = documents.is_real, x.shape[:2]
        rank, count = is_real.long().cumsum(1) - 1, is_real.long().sum(1, keepdim=True)
        slots = (rank, count - 1 - rank)[: self.num_directions]
        holds = self.has_cell and documents.keeps_state
        if holds:
            x = F.pad(x, (0, 1))  # the column that holds the cell
        moved = []
        for slot in slots:
            target = slot.where(is_real, length)[..., None].expand(-1, -1, x.shape[2])  # padding goes behind the end
            moved.append(x.new_zeros(batch, length + 1, x.shape[2]).scatter(1, target, x)[:, :length])
        rows = torch.stack(moved)
        if holds:
            is_after = torch.arange(length, device=x.device)[None] >= count
            rows = torch.cat((rows[..., :-1], is_after[..., None].to(x.dtype).expand(rows.shape[0], -1, -1, 1)), -1)
        y, (_, cell) = self._run(rows, state, holds=holds)
        last = (count - 1).clamp(min=0)
        found, ends = [], []
        for one, slot in zip(y.unbind(), slots, strict=True):
            found.append(one.gather(1, slot.clamp(min=0)[..., None].expand_as(one)))
            ends.append(one.gather(1, last[..., None].expand(-1, 1, one.shape[2]))[:, 0])
        hidden = torch.cat(ends, dim=-1)
        after = torch.where(count > 0, hidden, state[0].to(hidden.dtype))
        if not holds:
            cell = hidden.new_zeros(batch, state[1].shape[1])
        return torch.cat(found, dim=-1).where(is_real[..., None], 0), (after, cell)

    def _run_steps(self, x: torch.Tensor, state, documents: Documents):
        """Rows of several documents, by a graph that is the same for all data: one cell after another."""
        dtype, outputs, ends = x.dtype, [], []
        state = [self._split(s, like=x) for s in state]
        for direction, weights in enumerate(self.rnn.weights()):
            turned = documents if direction == 0 else documents.turned()
            steps = x if direction == 0 else x.flip(1)
            hidden, cell, found = state[0][direction], state[1][direction], []
            for t in range(x.shape[1]):
                is_real, is_start = turned.is_real[:, t, None], turned.is_start[:, t, None]
                # Also at padding, which backwards may stand where a document is left.
                before = hidden.masked_fill(is_start, 0), cell.masked_fill(is_start, 0)
                after = self.rnn.cell(steps[:, t], before if self.has_cell else before[0], *weights)
                after = after if self.has_cell else (after, cell)
                hidden, cell = (a.to(dtype).where(is_real, b) for a, b in zip(after, before, strict=True))
                found.append(hidden.masked_fill(~is_real, 0))
            outputs.append(torch.stack(found if direction == 0 else found[::-1], dim=1))
            ends.append((hidden, cell))
        return torch.cat(outputs, dim=-1), tuple(torch.cat(parts, dim=-1) for parts in zip(*ends, strict=True))

    def _run(self, x: torch.Tensor | PackedSequence, state, *, holds=False):
        """Call the kernel on rows, or on packed documents, whose state is in the packed order."""
        state = tuple(self._split(s, like=x) for s in (state if self.has_cell else state[:1]))
        y, after = self.rnn(x, state if self.has_cell else state[0], holds=holds)
        after = tuple(s.transpose(0, 1).flatten(1) for s in (after if self.has_cell else (after,)))
        return y, after if self.has_cell else (after[0], after[0].new_zeros(after[0].shape[0], 0))

    def _split(self, state: torch.Tensor, *, like) -> torch.Tensor:
        """(B, U) -> (directions, B, U / directions), contiguous as the kernels require."""
        dtype = (like.data if isinstance(like, PackedSequence) else like).dtype
        return state.to(dtype).unflatten(1, (self.num_directions, -1)).transpose(0, 1).contiguous()


class GatedProjection(nn.Linear):
    """Candidates and gates of MinGRU: for each direction, the rows of the candidates and then those of the gates.

    A class of its own, because transformers calls `_init_weights` only on modules that own parameters.
    """

    def __init__(self, input_size: int, units: int, num_directions: int):
        super().__init__(input_size, 2 * units)
        self.num_directions = num_directions


class MinGRU(nn.Module):
    """h_t = (1 - z_t) h_{t-1} + z_t g(W_h x_t), z_t = sigmoid(W_z x_t), in one direction or both.

    g(v) = v + 1/2 for v >= 0, else sigmoid(v): positive and continuous (Feng et al. 2024, appendix B).
    """

    def __init__(self, input_size: int, units: int, *, bidirectional=False):
        super().__init__()
        self.num_directions = 2 if bidirectional else 1
        self.units = units
        self.in_proj = GatedProjection(input_size, units, self.num_directions)

    def forward(self, x: torch.Tensor, state=None, documents: Documents | None = None):
        """x (B, L, D), state ((B, U), (B, 0)) -> y (B, L, U), state after the last real token of each row."""
        projected = project(self.in_proj, x)
        # In float32: 16 bits would round the state at every position, and the errors add up.
        dtype = torch.promote_types(projected.dtype, torch.float32)
        directions = projected.chunk(self.num_directions, dim=-1)
        start = None if state is None else state[0].to(dtype)
        y = self._scan(directions[0], start, documents)
        after = y[:, -1]  # padding keeps the state unchanged
        if self.num_directions == 2:
            backward = self._scan(directions[1].flip(1), None, documents and documents.turned()).flip(1)
            y, after = torch.cat((y, backward), -1), torch.cat((after, backward[:, 0]), -1)
        if documents is not None:
            y = y * documents.is_real[..., None]
        return y.to(x.dtype), (after.to(x.dtype), x.new_zeros(x.shape[0], 0))

    @staticmethod
    def _scan(values_and_gates: torch.Tensor, start: torch.Tensor | None, documents: Documents | None) -> torch.Tensor:
        if documents is None and is_eager_on_cpu(values_and_gates):
            return GatedScan.apply(values_and_gates, start)
        wide = values_and_gates.to(torch.promote_types(values_and_gates.dtype, torch.float32))
        values, gates = wide.chunk(2, dim=-1)
        keep = torch.sigmoid(-gates)  # 1 - z, exact also where z is close to 1
        new = torch.sigmoid(gates) * torch.where(values >= 0, values + 0.5, torch.sigmoid(values))
        if documents is not None:
            is_real = documents.is_real[..., None]
            keep = keep.where(is_real, 1).masked_fill(documents.is_start[..., None], 0)
            new = new.where(is_real, 0)
        if start is not None:
            new = torch.cat((new[:, :1] + keep[:, :1] * start[:, None], new[:, 1:]), dim=1)
        return LinearScan.apply(keep, new)


__all__ = ["Documents", "GatedProjection", "MinGRU", "TorchRecurrence"]
