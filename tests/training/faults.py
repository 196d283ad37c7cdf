"""What goes wrong in runs of tiny_run.py: losses that spike or are not finite, and memory that is too little."""

import torch
from tiny_run import TinyBatches, digest

TOO_LITTLE = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
BACK = {"num_train_steps": 16, "save_steps": 4, "eval_steps": 8, "nonfinite": "skip", "rollback_after": 3}


class Scaled(TinyBatches):
    """Batches whose loss is multiplied in some steps of the data, counted from 0; `factor` inf: not finite."""

    def __init__(self, model, steps, factor: float = 1e3, **share):
        super().__init__(0, **share)
        self.steps, self.factor, self.now = set(steps), factor, -1
        self.model, self.before = model, {}  # step -> weights and generator before it
        model.register_forward_hook(self.scale)

    def __getitem__(self, step: int):
        self.now, self.before[step] = step, (digest(self.model), torch.get_rng_state())
        return super().__getitem__(step)

    def places(self, step: int):
        """Rows of the step, and their epochs: what GlobalBatches knows."""
        numbers = [8 * step + place for place in self.share]
        return numbers, [0] * len(numbers)

    def scale(self, model, inputs, outputs):
        if self.now in self.steps and model.training:
            outputs.loss = outputs.loss * self.factor
        return outputs


class Without(TinyBatches):
    """Batches without some steps of the data."""

    def __init__(self, left_out):
        super().__init__(0)
        self.order = [step for step in range(200) if step not in left_out]

    def __getitem__(self, step: int):
        return super().__getitem__(self.order[step])


class SmallMemory:
    """Makes a model raise `error` for more than `rows` rows in training, from step `first` of the batches on."""

    def __init__(self, model, rows: int, error: Exception | None = None, *, first: int = 0, in_backward: bool = False):
        self.rows, self.error = rows, error or RuntimeError(TOO_LITTLE)
        self.first, self.in_backward = first, in_backward
        self.batches, self.calls = None, []
        model.register_forward_hook(self.refuse, with_kwargs=True)

    def of(self, batches):
        """The batches that say which step it is."""
        self.batches, get = batches, type(batches).__getitem__

        class Watched(type(batches)):
            def __getitem__(this, step: int):
                this.now = step
                return get(this, step)

        batches.__class__ = Watched
        return batches

    def refuse(self, model, inputs, kwargs, outputs):
        if not model.training:
            return
        self.calls.append(count := len(kwargs["input_ids"]))
        if count <= self.rows or (self.batches and self.batches.now < self.first):
            return
        if not self.in_backward:
            raise self.error
        outputs.loss.register_hook(self.fail)

    def fail(self, gradient):
        raise self.error
