"""Fields of the dataclasses that a config file and the command line fill in."""

import dataclasses
from typing import Any


def setting(default: object, help: str) -> Any:
    """A dataclass field with its help text; a mutable default is copied for each instance."""
    if isinstance(default, list | dict | set):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})
