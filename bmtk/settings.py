"""Fields of the dataclasses that a config file and the command line fill in."""

import dataclasses
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

_files: dict[str, Path] = {}  # setting -> the config file that this process has read it from


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


def set_in_file(path: Path | None, names: Collection[str]) -> None:
    """Note that the settings `names` are those of a config file, for `origin_of_value`; former notes are forgotten."""
    _files.clear()
    if path is not None:
        _files.update(dict.fromkeys(names, path))


def origin_of_value(message: str) -> str:
    """A line that names the config file which has set the values that `message` is about; "" if none has."""
    named = [name for name in re.findall(r"\b(\w+)=", message) if name in _files]
    return f"\n  ({named[0]} is set by {_files[named[0]]})" if named else ""
