"""Steps of transformers' Trainer without what nothing needs: on a CPU, a tenth of the time of a step of short texts.

What is computed stays the same to the bit.  As in `trainer_patches`, each override says what is at fault.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple, cast

import torch
from accelerate import DistributedType
from transformers import Trainer
from transformers.training_args import OptimizerNames

from .gradients import gradient_norm
from .protocols import Batch
from .read_ahead import ReadAhead


class OfModel(NamedTuple):
    """All modules and parameters of a model, in its order."""

    model: torch.nn.Module
    modules: list[torch.nn.Module]
    parameters: list[torch.nn.Parameter]


def drop_gradients(parameters: Sequence[torch.nn.Parameter], set_to_none: bool = True) -> None:
    """What `Module.zero_grad` does."""
    for parameter in parameters:
        if parameter.grad is not None and set_to_none:
            parameter.grad = None
        elif parameter.grad is not None:
            parameter.grad.detach_().zero_()


class LeanTrainer(Trainer):
    """`transformers.Trainer` with shorter steps."""

    reading: ReadAhead | None = None  # the batches of this epoch
    size: int = 0  # of the model, embeddings left out, once it was counted
    listed: OfModel | None = None  # once it was asked for

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | int | None]:
        """Fault (transformers 5.23): makes a batch after each step, when its Python is in no cache; see ReadAhead."""
        args = self.args
        if device.type != "cpu" or args.dataloader_num_workers or args.world_size > 1:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.reading is None or self.reading.source is not epoch_iterator:
            self.reading = ReadAhead(epoch_iterator)
        return super().get_batch_samples(self.reading, num_batches, device)

    @cached_property
    def is_plain(self) -> bool:
        """Whether a backward pass of one process on a CPU is all there is to a micro-batch, whose loss is scaled."""
        accelerator, args = self.accelerator, self.args
        if not self.loss_is_scaled_for_ga:
            return False
        is_alone = accelerator.distributed_type == DistributedType.NO and accelerator.gradient_accumulation_steps == 1
        uses = accelerator.scaler, accelerator.parallelism_config, args.torch_empty_cache_steps
        own_backward = (OptimizerNames.LOMO, OptimizerNames.ADALOMO)
        return args.device.type == "cpu" and is_alone and not any(uses) and args.optim not in own_backward

    def training_step(
        self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Fault (transformers 5.23): sets all modules to training, one inside the other, in every micro-batch.

        It also enters contexts that nothing uses, and accelerate divides the loss by 1, for autograd to undo.
        """
        if not self.is_plain:
            return super().training_step(model, inputs, num_items_in_batch)
        # Also below a root that is in training, as that of a new adapter is.
        if not all(module.training for module in self.of_model.modules):
            model.train()
        if callable(getattr(self.optimizer, "train", None)):
            cast(Any, self.optimizer).train()
        with self.compute_loss_context_manager():
            batch = self._prepare_inputs(inputs)
            loss = self.compute_loss(model, batch, num_items_in_batch=num_items_in_batch)
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        return loss.detach()

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        """Fault (torch 2.13): multiplies every gradient by 1 where their norm is below the limit.

        On a GPU the host would have to wait for the norm in order to see that.
        """
        is_plain = self.accelerator.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU)
        if not is_plain or self.args.device.type != "cpu" or self.accelerator.scaler is not None:
            return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        parameters = [parameter for parameter in self.of_model.parameters if parameter.grad is not None]
        norm = gradient_norm(parameter.grad for parameter in parameters)
        if not norm <= self.args.max_grad_norm:  # also where it is not a number
            torch.nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
        return norm

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]
        """Fault (torch 2.13): `zero_grad` walks through the model in every step."""
        model: Any = kwargs["model"]
        is_wrapped = model is not self.model
        if not is_wrapped:
            model.zero_grad = partial(drop_gradients, self.of_model.parameters)
        try:
            super()._run_epoch(**kwargs)  # type: ignore[no-untyped-call]
        finally:
            if not is_wrapped:
                del model.zero_grad

    @property
    def of_model(self) -> OfModel:
        """A walk through the model in every step would take time."""
        if self.listed is None or self.listed.model is not self.model:
            model = cast(torch.nn.Module, self.model)
            self.listed = OfModel(model, list(model.modules()), list(model.parameters()))
        return self.listed

    def floating_point_ops(self, inputs: Batch) -> int:
        """Fault (transformers 5.23): counts the parameters of the model anew in every step."""
        model: Any = self.model
        name = getattr(model, "main_input_name", "input_ids")
        if name not in inputs or not hasattr(model, "num_parameters"):
            return 0
        self.size = self.size or int(model.num_parameters(exclude_embeddings=True))
        return 6 * inputs[name].numel() * self.size
