"""The fields that both recipes share, as `transformers.TrainingArguments` calls them.

Trainer's own names keep working beside them.  A setting that is given under both names has to be the same.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from bmtk.errors import UserError

ROWS_PER_DEVICE = 8  # Trainer's default
SCHEDULER_TYPES = {  # our schedules warm up, all of them
    "constant": "constant_with_warmup",
    "linear": "linear",
    "cosine": "cosine",
    "wsd": "warmup_stable_decay",
}
# A key of the command line, and the keys of a config file that it replaces, because they decide the same thing.
REPLACED_IN_FILE = {
    "batch_size": {"per_device_train_batch_size", "gradient_accumulation_steps"},
    "per_device_train_batch_size": {"batch_size", "micro_batch_size"},
    "gradient_accumulation_steps": {"micro_batch_size"},
    "num_train_steps": {"max_steps"},
    "max_steps": {"num_train_steps"},
    "schedule": {"lr_scheduler_type"},
    "lr_scheduler_type": {"schedule"},
    "precision": {"bf16", "fp16"},
    "bf16": {"precision"},
    "fp16": {"precision"},
    "eval_steps": {"eval_strategy"},
    "eval_strategy": {"eval_steps"},
    "save_steps": {"save_strategy"},
    "save_strategy": {"save_steps"},
}


def without_replaced(file_values: Mapping[str, object], cli_values: Mapping[str, object]) -> dict[str, object]:
    """The values of a config file without those that the command line gives under their other name."""
    replaced = {name for key in cli_values for name in REPLACED_IN_FILE.get(key, ())}
    for kind in ("eval", "save"):
        if cli_values.get(f"{kind}_strategy") == "steps" and file_values.get(f"{kind}_steps"):  # their number
            replaced.discard(f"{kind}_steps")
    return {key: value for key, value in file_values.items() if key not in replaced}


@dataclass(frozen=True)
class BatchSizes:
    """The sizes of batches as they were given, each None where it was not."""

    batch_size: int | None
    micro_batch_size: int | None  # 0: the share of a process; AUTO: too, until it is known what fits
    per_device: int | None
    accumulation: int | None

    def resolve(self, processes: int) -> tuple[int, int]:
        """Rows per device, and accumulation steps, on this number of processes.

        Raises: UserError for sizes that contradict each other, or do not divide.
        """
        if self._rows_given and self.per_device and self._rows_given != self.per_device:
            raise UserError(
                f"micro_batch_size={self.micro_batch_size} and per_device_train_batch_size={self.per_device} are two "
                "names of one setting, and contradict each other; leave one of them out"
            )
        rows = self.per_device or self._rows_given
        if self.batch_size is None and (self.per_device or self.accumulation or not rows):
            return rows or ROWS_PER_DEVICE, self.accumulation or 1
        share = self._share(self.batch_size or ROWS_PER_DEVICE * processes, processes)
        if self.per_device and share != self.per_device * (self.accumulation or 1):
            raise UserError(self._contradiction(processes))
        rows = rows or _divided(share, self.accumulation or 1, f"gradient_accumulation_steps={self.accumulation}")
        steps = _divided(share, rows, f"micro_batch_size={rows}")
        if self.accumulation and self.accumulation != steps:
            raise UserError(self._contradiction(processes))
        return rows, steps

    @property
    def _rows_given(self) -> int:
        return max(0, self.micro_batch_size or 0)

    def _share(self, batch_size: int, processes: int) -> int:
        share, rest = divmod(batch_size, processes)
        if rest:
            raise UserError(
                f"batch_size={batch_size} does not divide over {processes} processes; give a multiple of {processes}"
            )
        return share

    def _contradiction(self, processes: int) -> str:
        given = {
            "batch_size": self.batch_size,
            "micro_batch_size": self.micro_batch_size,
            "per_device_train_batch_size": self.per_device,
            "gradient_accumulation_steps": self.accumulation,
        }
        values = " and ".join(f"{name}={value}" for name, value in given.items() if value)
        return (
            f"{values} contradict each other on {processes} process{'es' if processes > 1 else ''}: batch_size is the "
            "product of rows, accumulation steps and processes; leave one of them out"
        )


def _divided(share: int, parts: int, setting: str) -> int:
    if share % parts:
        raise UserError(
            f"{setting} does not divide the {share} rows of an optimizer step on each process; change it or batch_size"
        )
    return share // parts


def strategy_of(steps: float | None) -> str | None:
    """Trainer's strategy for `eval_steps` or `save_steps`; None: it was not given."""
    if steps is None:
        return None
    return "steps" if steps else "no"


def contradiction(given: str, meaning: object, trainer: str, value: object) -> Iterator[str]:
    """A sentence, if the setting `given` means something else than `value`, which was given under Trainer's name."""
    if meaning is not None and value is not None and meaning != value:
        yield f"{given} and {trainer}={value} contradict each other; leave one of them out"
