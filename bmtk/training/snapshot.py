"""The tensors of a run at one moment: references to them at first, and then copies, so that training can go on.

Of several processes, each keeps the tensors that it will write, and of those that are spread over processes its own
parts, which are gathered while they are written.  For that the processes have connections of their own: what a thread
sends must not come between what training sends.
"""

import os
import resource
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from .averaging import AVERAGES
from .guards import STATISTICS, is_broken
from .memory import available_memory, peak_memory
from .prepared import Prepared
from .sharding import is_dtensor, tied_weights
from .tensor_files import owners_of
from .waits import set_timeouts, timeout_of

Tensors = dict[str, torch.Tensor]
OPTIMIZER = "optimizer"  # stem of its state's files in a checkpoint


class Connections:
    """Connections between the processes for what is exchanged while training goes on: by gloo, in their memory."""

    def __init__(self, prepared: Prepared):
        """Called by all processes at the same time."""
        self.accelerator, self.group = prepared.accelerator, None
        self.meshes: dict[Any, Any] = {}  # of training -> like it, with connections of its own
        if self.accelerator.num_processes > 1:
            self.group = torch.distributed.new_group(backend="gloo", timeout=timeout_of(self.accelerator))

    def connect(self, tensors: Iterable[torch.Tensor]) -> None:
        """Connect the processes that tensors are spread over.  Called by all processes at the same time."""
        spread: list[Any] = [tensor for tensor in tensors if is_dtensor(tensor)]
        for root in dict.fromkeys(tensor.device_mesh._get_root_mesh() for tensor in spread):
            if root in self.meshes:
                continue
            from torch.distributed.device_mesh import init_device_mesh

            used = {name for tensor in spread for name in tensor.device_mesh.mesh_dim_names}
            sizes = dict(zip(root.mesh_dim_names, root.shape, strict=True))
            sizes = {name: size for name, size in sizes.items() if size > 1 or name in used}  # a group costs time
            over_gloo: dict[Any, Any] = dict.fromkeys(sizes, "gloo")  # else a group of all processes is the old one
            self.meshes[root] = init_device_mesh(
                "cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes), backend_override=over_gloo
            )
            set_timeouts(self.accelerator)

    def on_host(self, tensor: torch.Tensor, *, copies: bool) -> torch.Tensor:
        """The tensor in the host's memory; of one that is spread over processes, this one's part.

        copies: also where it is there already.
        """
        if tensor.device.type == "meta":
            return tensor
        if not is_dtensor(tensor):
            return tensor.to("cpu", copy=copies)
        from torch.distributed.tensor import DTensor

        spread: Any = tensor
        mesh, sizes = spread.device_mesh, {"shape": spread.shape, "stride": spread.stride()}
        mirror = self.meshes[mesh._get_root_mesh()]
        mirror = mirror if mesh.mesh_dim_names == mirror.mesh_dim_names else mirror[mesh.mesh_dim_names]
        part = spread.to_local().to("cpu", copy=copies)
        made: torch.Tensor = DTensor.from_local(part, mirror, spread.placements, run_check=False, **sizes)
        return made


@dataclass(frozen=True)
class Snapshot:
    """The tensors of a run.  One that another process writes is on the device "meta": its size alone is known."""

    weights: Tensors  # without those that are another's
    states: dict[str, Tensors]  # stem of the files -> tensors by name
    trained: frozenset[str]  # weights that have to be finite

    @classmethod
    def of(cls, prepared: Prepared) -> "Snapshot":
        """What a run holds now: references, but for buffers, which the next forward pass changes."""
        model, optimizer, accelerator = prepared.unwrapped, prepared.optimizer, prepared.accelerator
        weights = _own(stored_weights(model), accelerator)
        for name, _ in model.named_buffers():
            if name in weights:
                weights[name] = weights[name].clone()
        states = {OPTIMIZER: _own(flat(optimizer.state_dict()["state"]), accelerator)}
        if optimizer.average:
            states[AVERAGES] = _own(optimizer.average.state_dict(), accelerator)
        parameters = {name for name, _ in model.named_parameters()}
        return cls(weights, states, frozenset(parameters | {name for name in weights if name.endswith(STATISTICS)}))

    def move_to_host(self, connections: Connections, *, copies: bool) -> None:
        """Have all tensors in the host's memory, and with `copies` in a part of it that training does not change."""
        for tensors in self._groups:
            for name, tensor in tensors.items():
                tensors[name] = connections.on_host(tensor, copies=copies)

    @property
    def num_bytes(self) -> int:
        """What all processes write."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def memory_for_copies(self) -> int:
        """Bytes that this process needs for copies; and to gather what is spread, once more."""
        needed = 0
        for tensor in self.tensors:
            part: Any = tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
            needed += part.numel() * part.element_size() * (1 + is_dtensor(tensor)) * (part.device.type != "meta")
        return needed

    @property
    def tensors(self) -> Iterator[torch.Tensor]:
        """All of them."""
        return (tensor for tensors in self._groups for tensor in tensors.values())

    @property
    def _groups(self) -> list[Tensors]:
        return [self.weights, *self.states.values()]

    def broken_weights(self) -> list[str]:
        """The names of weights of which this process holds a number that is not finite."""
        parts: dict[str, Any] = {name: self.weights[name] for name in self.weights if name in self.trained}
        local = {name: part.to_local() if is_dtensor(part) else part for name, part in parts.items()}
        return [name for name, part in local.items() if part.device.type != "meta" and is_broken(part)]


def stored_weights(model: PreTrainedModel) -> Tensors:
    """The state of a model without what is tied to another weight, which safetensors does not store twice."""
    tied = tied_weights(model)
    return {name: value for name, value in model.state_dict().items() if name not in tied}


def has_memory(num_bytes: int) -> bool:
    """Whether this machine has memory for `num_bytes` more in each of its processes, while a step is computed.

    Between two steps a process has less than in them, so what it has had at most is left to it.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError):
        return True
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    in_a_step = max(0, peak_memory() - pages * resource.getpagesize())
    return (num_bytes + in_a_step) * processes <= available_memory()


def _own(tensors: Tensors, accelerator: Accelerator) -> Tensors:
    """The tensors with those that another process writes on "meta"; what is spread over processes stays."""
    rank, owners = accelerator.process_index, owners_of(tensors, accelerator.num_processes)
    detached = {name: tensor.detach() for name, tensor in tensors.items()}
    return {
        name: tensor if owners[name] == rank or is_dtensor(tensor) else tensor.to("meta")
        for name, tensor in detached.items()
    }


def flat(by_parameter: dict[str, Tensors]) -> Tensors:
    """Turn {"weight": {"exp_avg": tensor}} into {"exp_avg/weight": tensor}."""
    return {f"{key}/{name}": value for name, values in by_parameter.items() for key, value in values.items()}
