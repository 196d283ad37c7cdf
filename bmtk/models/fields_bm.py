"""Fields of a configuration, with their help text."""

import dataclasses
from typing import Any


def described(default: object, help: str) -> Any:
    """A configuration field with its help text: what it is, and its unit.

    `help` ends in "default: ..." where `default` is None, because None then stands for a value that is computed.
    """
    return dataclasses.field(default=default, metadata={"help": help})


__all__ = ["described"]
