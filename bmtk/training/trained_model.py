"""A finished model, as evaluation and prediction open it: a whole one, or an adapter on its base."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from bmtk.errors import UserError

from .adapters import ADAPTER_CONFIG, load_adapter
from .starting_weights import load_for_task, read_config

if TYPE_CHECKING:
    from peft import PeftModel


class TrainedModel:
    """A finished model: a whole one, or an adapter whose base is named in `adapter_config.json`.

    The labels of an adapter, its pooling and the quantisation of its base are recorded in its run.json alone.
    Raises: UserError if it, or its base, cannot be found.
    """

    def __init__(self, name: str, **loading: Any):
        """`name` is a folder or a Hub id; `loading` are arguments of `from_pretrained`."""
        self.name, self.loading = name, loading
        self.base, head = name, {}
        self.labels: list[str] = []
        self.quantize: str | None = None
        if (adapter := Path(name) / ADAPTER_CONFIG).is_file():
            self.base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
            record = Path(name) / "run.json"
            run = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
            self.labels = run.get("data", {}).get("labels", [])
            settings = run.get("config", {})
            self.quantize = settings.get("quantize")
            head = {k: value for k, value in settings.items() if k.startswith("classifier_") and value is not None}
        self.config, _ = read_config(self.base, head, **loading)

    def load(self, auto_class: Any) -> "PreTrainedModel | PeftModel":
        """The model with its head.  Raises: UserError if it was saved without one."""
        model, notes = load_for_task(auto_class, self.base, self.config, quantize=self.quantize, **self.loading)
        if self.base != self.name:
            return load_adapter(model, self.name)
        if notes:
            raise UserError(f"{self.name} was not trained for this task: {'; '.join(notes)}")
        return model
