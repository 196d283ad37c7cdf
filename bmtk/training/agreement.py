"""What all processes of a run must agree on before the first step; otherwise all of them stop with one error."""

import hashlib
import json
import secrets
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from bmtk.errors import UserError, installed_version, versions

Result = TypeVar("Result")


def of_all(accelerator: Accelerator, value: Result) -> list[Result]:
    """The values of all processes, in the order of their numbers."""
    if accelerator.num_processes == 1:
        return [value]
    values: list[Result] = gather_object([value])
    return values


def of_main(accelerator: Accelerator, value: Result) -> Result:
    """The value of the main process, on every one."""
    if accelerator.num_processes == 1:
        return value
    values: list[Result] = broadcast_object_list([value])
    return values[0]


def together(accelerator: Accelerator, action: Callable[[], Result]) -> list[Result]:
    """The results of `action` on all processes; if it raises on one, it raises on all: none waits for that one.

    Raises: the process's own error, or OSError with that of another.
    """
    result, error = None, None
    try:
        result = action()
    except Exception as problem:
        error = problem
    outcomes = of_all(accelerator, (result, None if error is None else str(error)))
    if error is not None:
        raise error
    problems = [f"process {number}: {problem}" for number, (_, problem) in enumerate(outcomes) if problem]
    if problems:
        raise OSError("; ".join(problems))
    return [outcome for outcome, _ in outcomes]  # type: ignore[misc]


def check_shared(accelerator: Accelerator, folder: Path) -> None:
    """Raises: UserError on all processes if one of them does not see the files that the main process writes."""
    if accelerator.num_processes == 1:
        return
    sign = folder / of_main(accelerator, f".seen-by-all-{secrets.token_hex(8)}")
    together(accelerator, sign.touch if accelerator.is_main_process else lambda: None)
    seen = of_all(accelerator, (socket.gethostname(), sign.exists()))
    if accelerator.is_main_process:
        sign.unlink(missing_ok=True)
    blind = sorted({f"process {number} on {host}" for number, (host, sees) in enumerate(seen) if not sees})
    if blind:
        raise UserError(
            f"output_dir={str(folder)!r} is another folder for {', '.join(blind)}: checkpoints could not be resumed; "
            "choose a folder that all machines share (NFS, Lustre, ...), or start the processes on one machine"
        )


def check_agreement(accelerator: Accelerator, facts: Mapping[str, str]) -> None:
    """Raises: UserError on all processes that names the first fact in which one differs from the main process."""
    all_facts = of_all(accelerator, (socket.gethostname(), {**installed(), **facts}))
    host, expected = all_facts[0]
    for number, (other, found) in enumerate(all_facts):
        for name, value in found.items():
            if value != expected.get(name):
                raise UserError(
                    f"the processes of this run do not agree on {name}: process 0 on {host} has "
                    f"{expected.get(name)}, process {number} on {other} has {value}; install the same versions, and "
                    "read the same files and settings everywhere"
                )


def installed() -> dict[str, str]:
    """The versions of what computes."""
    return {"the versions": f"{versions()}, accelerate {installed_version('accelerate')}"}


def digest(value: object) -> str:
    """The first digits of the sha256 of what JSON writes of `value`; tensors as lists."""
    text = json.dumps(value, sort_keys=True, default=_as_json)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _as_json(value: Any) -> object:
    return value.tolist() if isinstance(value, torch.Tensor) else str(value)


@torch.no_grad()
def checksum(model: nn.Module) -> str:
    """A number that equal weights have in common."""
    sums = torch.stack([parameter.double().sum() for parameter in model.parameters()])
    positions = torch.arange(1, len(sums) + 1, dtype=torch.double, device=sums.device)
    return f"{float((sums * positions).sum()):.17g}"
