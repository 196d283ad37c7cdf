"""Fields of a configuration, with their help text."""

import dataclasses
from typing import Any


def described(default: object, help: str) -> Any:
    """A configuration field with its help text: what it is, and its unit.

    `help` ends in "default: ..." where `default` is None, because None then stands for a value that is computed.
    """
    return dataclasses.field(default=default, metadata={"help": help})


class AudioTimes:
    """Base of a configuration with `hop_length`: how far apart the positions of a recording are."""

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Samples from one position to the next, four frames; pipelines compute word times and chunks with it."""
        return 4 * self.hop_length


__all__ = ["AudioTimes", "described"]
