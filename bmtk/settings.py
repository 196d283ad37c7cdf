"""Fields of the dataclasses that a config file and the command line fill in."""

import dataclasses
from typing import Any


def setting(default: object, help: str) -> Any:
    """A dataclass field with its help text; a mutable default is copied for each instance."""
    if isinstance(default, list | dict | set):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


class FactHelp(str):
    """The help text of a `fact`.  (argparse takes no other metadata than it knows.)"""


def fact(default: object, help: str) -> Any:
    """The same for a setting that is about certain data: a config file's value does not hold for other data."""
    return setting(default, FactHelp(help))


def about_data(settings: type) -> frozenset[str]:
    """The names of the fields of a dataclass that are made by `fact`."""
    return frozenset(f.name for f in dataclasses.fields(settings) if isinstance(f.metadata.get("help"), FactHelp))
