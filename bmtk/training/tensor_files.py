"""Named tensors in safetensors files: in one, or in one for each process, which writes and reads its own part.

    optimizer.safetensors                                       by one process
    optimizer-00001-of-00002.safetensors, optimizer-00002-...   by two: each holds some of the tensors whole

Any number of processes reads either.  The weights of a model are stored in the same way, as Hugging Face repositories
are: the index that from_pretrained reads is beside them.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file

from .sharding import is_dtensor, whole


def file_name(stem: str, number: int, count: int) -> str:
    """The file of process `number`, counted from 0."""
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"


def write_share(folder: Path, stem: str, tensors: Mapping[str, torch.Tensor], accelerator: Accelerator) -> list[str]:
    """Write this process's file of `tensors`, and return its name; all processes must call this.

    Those that are spread over processes are gathered one after another, and each process keeps what it writes.  They
    have no gradient; any operation on them could come from torch's cache with another mesh that looks the same.
    """
    rank, owners = accelerator.process_index, owners_of(tensors, accelerator.num_processes)
    own: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor)
        if owners[name] == rank:
            own[name] = gathered.cpu().contiguous()
    if not own and rank:
        return []
    name = file_name(stem, rank, accelerator.num_processes)
    save_file(own, folder / name, metadata={"format": "pt"})
    return [name]


def owners_of(tensors: Mapping[str, torch.Tensor], num_processes: int) -> dict[str, int]:
    """Which process writes each tensor: about the same number of bytes each, in the order of the names."""
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    total, before, owners = max(1, sum(sizes.values())), 0, {}
    for name, size in sizes.items():
        owners[name] = min(num_processes - 1, (2 * before + size) * num_processes // (2 * total))
        before += size
    return owners


def write_index(folder: Path, stem: str, tensors: Mapping[str, torch.Tensor], num_processes: int) -> None:
    """Write the index of the files of all processes, by which from_pretrained finds each tensor."""
    owners = owners_of(tensors, num_processes)
    weight_map = {name: file_name(stem, owner, num_processes) for name, owner in owners.items()}
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors.values()]
    content = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


class TensorFiles:
    """The tensors in the files of one stem; see `opened`."""

    def __init__(self, files: Mapping[str, Any]):
        self.files = files  # the open file that holds each tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def read(self, name: str, *, like: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor; of one that is spread over processes as `like` is, the part that this process holds.

        Only that part is read from the disk.  A tensor of another shape than `like` is read whole.
        """
        stored = self.files[name].get_slice(name)
        if like is None or not is_dtensor(like) or tuple(stored.get_shape()) != tuple(like.shape):
            tensor: torch.Tensor = self.files[name].get_tensor(name)
            return tensor
        from torch.distributed.tensor import DTensor
        from transformers.distributed.sharding_utils import DtensorShardOperation

        spread: Any = like
        part: Any = DtensorShardOperation(spread).shard_tensor(stored, device=like.device)
        sizes = {"shape": spread.shape, "stride": spread.stride()}
        made: torch.Tensor = DTensor.from_local(part.contiguous(), spread.device_mesh, spread.placements, **sizes)
        return made


@contextmanager
def opened(folder: Path, stem: str) -> Iterator[TensorFiles]:
    """Open the files of `stem`, by however many processes they were written.

    Raises: FileNotFoundError if there are none.
    """
    paths = sorted([*folder.glob(f"{stem}.safetensors"), *folder.glob(f"{stem}-*-of-*.safetensors")])
    if not paths:
        raise FileNotFoundError(folder / f"{stem}.safetensors")
    with ExitStack() as stack:
        files: list[Any] = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        yield TensorFiles({name: file for file in files for name in file.keys()})
