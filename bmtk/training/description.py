"""What from_pretrained reads of a model beside its weights: configuration, code, and what prepares inputs."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

from .prepared import Prepared
from .sharding import plain_class


class Processor(Protocol):
    """A tokenizer, image processor or feature extractor."""

    def save_pretrained(self, save_directory: Any) -> Any:
        """Write its files into a folder."""


class Description:
    """Copies of what training uses, which a thread can write meanwhile."""

    def __init__(self, prepared: Prepared, processor: Processor | None):
        """Only that of the main process is written."""
        self.model = plain_twin(prepared.unwrapped) if prepared.accelerator.is_main_process else None
        self.processor = copy.deepcopy(processor)

    def write(self, folder: Path, weights: Mapping[str, torch.Tensor] | None) -> None:
        """Write configuration, code and processor; and `weights`, if they are not written by several processes."""
        assert self.model is not None
        with no_bars():
            self.model.save_pretrained(folder, state_dict=dict(weights or {}))
        if weights is None:
            (folder / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)  # with no tensor in it
        if self.processor is not None:
            self.processor.save_pretrained(folder)


def plain_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model like it without weights, of the class that it had before fully_shard gave it one of its own."""
    config = copy.deepcopy(model.config)
    vars(config).pop("distributed_config", None)  # of a sharded model
    with torch.device("meta"):
        twin: PreTrainedModel = plain_class(model)._from_config(config, dtype=model.dtype)
    if model.can_generate():
        twin.generation_config = copy.deepcopy(model.generation_config)
    if (conversions := getattr(model, "_weight_conversions", None)) is not None:  # of the names that were loaded
        twin._weight_conversions = conversions
    return twin


@contextmanager
def no_bars() -> Iterator[None]:
    """Keep the bars of transformers from tearing the run's own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
