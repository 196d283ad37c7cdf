"""`bmtk info`: class, size and results of a saved model, from its JSON and the headers of its weights only.

So it is quick for a model of any size, and imports no library that takes seconds.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from bmtk.errors import UserError


def describe(directory: str | Path) -> str:
    """What a model folder holds, in two columns.

    Raises: UserError if it is no model folder, or one of its files is not JSON.
    """
    directory = Path(directory)
    holders = [directory / name for name in ("config.json", "adapter_config.json") if (directory / name).is_file()]
    if not holders:
        raise UserError(f"{directory} holds neither config.json nor adapter_config.json")
    config = read_json(holders[0])
    tensors = {name: facts for path in directory.glob("*.safetensors") for name, facts in read_header(path).items()}
    rows = {
        "model": ", ".join(config.get("architectures") or [config.get("peft_type", "unknown")]),
        "model type": config.get("model_type"),
        "base model": config.get("base_model_name_or_path"),
        "parameters": f"{sum(prod(facts['shape']) for facts in learned(tensors)):,}",
        "stored as": ", ".join(sorted({facts["dtype"] for facts in learned(tensors)})) or "no safetensors file here",
        "own code": code_files(directory),
    }
    run = directory / "run.json"
    if run.is_file():
        rows |= read_json(run).get("metrics", {})
    shown = {name: _in_words(value) for name, value in rows.items() if value not in (None, "")}
    width = max(map(len, shown))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in shown.items())


def _in_words(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def code_files(directory: Path) -> str:
    """The modules of a folder in a line: those of its model first."""
    names = sorted(
        (path.name for path in directory.glob("*.py")), key=lambda name: (not name.startswith("modeling_"), name)
    )
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_json(path: Path) -> dict[str, Any]:
    """Raises: UserError for a file that is not JSON."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    return content


def learned(tensors: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameters; not the statistics of batch norm, nor tables of whole numbers, which are saved with them."""
    return [
        facts
        for name, facts in tensors.items()
        if facts["dtype"] not in ("I32", "I64") and not name.endswith((".running_mean", ".running_var"))
    ]


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """The tensors in the header of a safetensors file, by name: dtype, shape, offsets."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: facts for name, facts in header.items() if name != "__metadata__"}
