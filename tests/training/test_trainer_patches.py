"""The faults that trainer_patches.py and trainer_steps.py mend: each is still there in plain Trainer.

A test that fails here brings good news: upstream has mended the fault, and the patch that it names is to be deleted.
"""

import json
import math
import re
from importlib.metadata import version
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, SeedableRandomSampler, skip_first_batches
from datasets import Dataset
from tiny_run import rows, tiny_model
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from bmtk.errors import UserError
from bmtk.training.batch_sampler import EpochSampler, EvenBatchSampler
from bmtk.training.optimizers import NamedOptimizer
from bmtk.training.trainer_patches import PatchedTrainer, SetEpoch, StopEarly, look_for_lomo_once
from bmtk.training.trainer_steps import drop_gradients


def no_longer_needed(library: str, patch: str) -> str:
    return f"{library} {version(library)} no longer needs {patch}: delete it"


DATA = [{name: value[0] for name, value in rows([number]).items()} for number in range(8)]


def plain(folder: Path, kind: type[Trainer] = Trainer, *, callbacks=(), dropout=0.0, **settings) -> Trainer:
    """A trainer of two steps an epoch."""
    settings = {"max_steps": 4, "save_strategy": "no", "report_to": "none", "disable_tqdm": True} | settings
    args = TrainingArguments(str(folder), per_device_train_batch_size=4, use_cpu=True, **settings)
    return kind(tiny_model(dropout=dropout), args, train_dataset=DATA, eval_dataset=DATA, callbacks=list(callbacks))


class Counting(PatchedTrainer):
    def count_items_and_units(self, batches):
        return sum(len(batch["labels"]) for batch in batches), 5


def test_trainer_counts_no_labels_that_are_not_one_tensor(tmp_path):
    boxes = [{"labels": [{"class_labels": torch.tensor([1, 2])}, {"class_labels": torch.tensor([0])}]}]
    device = torch.device("cpu")
    assert plain(tmp_path)._get_num_items_in_batch(boxes, device) is None, no_longer_needed(
        "transformers", "PatchedTrainer._get_num_items_in_batch"
    )
    patched = plain(tmp_path, Counting)
    assert patched._get_num_items_in_batch(boxes, device) == 2
    assert patched.state.num_input_tokens_seen == 5


def test_the_optimizer_looks_for_a_package_in_every_step(monkeypatch):
    asked = []
    monkeypatch.setattr(accelerate.utils.imports, "_is_package_available", asked.append)
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = Accelerator(cpu=True).prepare(torch.optim.SGD([parameter]))
    monkeypatch.setattr(accelerate.optimizer, "is_lomo_available", accelerate.utils.is_lomo_available)
    optimizer.step()
    optimizer.step()
    assert len(asked) > 1, no_longer_needed("accelerate", "look_for_lomo_once")
    look_for_lomo_once()
    asked.clear()
    optimizer.step()
    optimizer.step()
    assert len(asked) == 1


def test_trainer_groups_rows_by_length_in_an_order_of_the_processs_own_generator(tmp_path):
    settings = {"train_sampling_strategy": "group_by_length", "seed": 3}
    sampler = plain(tmp_path, **settings)._get_train_sampler()
    needed = no_longer_needed("transformers", "PatchedTrainer._get_train_sampler, EpochSampler")
    assert list(sampler) != list(sampler), needed
    patched = plain(tmp_path, Counting, **settings)._get_train_sampler()
    assert list(patched) == list(patched)
    patched.set_epoch(1)
    assert list(patched) == list(EpochSampler(RandomSampler(range(8)), 4)), "rows of one length are in random order"


def test_trainer_reads_every_row_for_its_length(tmp_path, monkeypatch):
    texts = Dataset.from_dict({"input_ids": [[0] * (row % 5 + 1) for row in range(40)]})
    read = []
    monkeypatch.setattr(Dataset, "__iter__", lambda self: (read.append(row) or self[row] for row in range(len(self))))
    orders = []
    for trainer_class in (Trainer, Counting):
        trainer = plain(tmp_path, trainer_class, train_sampling_strategy="group_by_length", seed=3)
        trainer.train_dataset, trainer.model.main_input_name = texts, "input_ids"
        torch.manual_seed(0)
        sampler = trainer._get_train_sampler()
        orders.append(sampler if trainer_class is Trainer else sampler.sampler)
        if trainer_class is Trainer:
            assert read, no_longer_needed("transformers", "grouped_by_length")
            read.clear()
    assert not read
    assert orders[0].lengths == orders[1].lengths
    assert orders[0].batch_size == orders[1].batch_size


def test_accelerate_resumes_an_epoch_on_several_processes_in_the_order_of_the_first():
    sampler = EpochSampler(RandomSampler(range(8)), 0)
    shard = BatchSamplerShard(EvenBatchSampler(sampler, 2, False, num_processes=2), 2, 0)
    resumed = skip_first_batches(DataLoaderShard(list(range(8)), batch_sampler=shard, _drop_last=False), 1)
    resumed.set_epoch(1)
    assert sampler.epoch == 0, no_longer_needed("accelerate", "the call of set_epoch in PatchedTrainer._run_epoch")


def test_rows_without_lengths_are_not_grouped_by_them(tmp_path):
    rows = [{"pixel_values": torch.ones(1), "labels": torch.ones(1)}] * 8
    trainer = plain(tmp_path, Counting, train_sampling_strategy="group_by_length")
    trainer.train_dataset = rows
    with pytest.raises(UserError, match=r"train_sampling_strategy=group_by_length: the rows .* choose random or sequ"):
        trainer.get_train_dataloader()


class StopAtOnce(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_trainer_trains_a_step_though_it_was_asked_to_stop_before_the_first(tmp_path):
    trainer = plain(tmp_path, callbacks=[StopAtOnce()])
    trainer.train()
    assert trainer.state.global_step > 0, no_longer_needed("transformers", "PatchedTrainer._run_epoch")
    patched = plain(tmp_path, Counting, callbacks=[StopAtOnce()])
    patched.train()
    assert patched.state.global_step == 0


class LooksAtCheckpoint(TrainerCallback):
    """What a checkpoint holds at the first event after a callback could know its folder."""

    def on_save(self, args, state, control, **kwargs):
        self.is_whole = (Path(args.output_dir) / f"checkpoint-{state.global_step}" / "trainer_state.json").exists()


def test_trainer_calls_no_callback_before_a_checkpoint_is_whole(tmp_path):
    look = LooksAtCheckpoint()
    plain(tmp_path, callbacks=[look], max_steps=1, save_strategy="steps", save_steps=1).train()
    assert look.is_whole, no_longer_needed("transformers", "PatchedTrainer._save_checkpoint")


SAVING = {"save_strategy": "steps", "save_steps": 1}


def test_trainer_draws_from_the_start_again_where_another_number_of_processes_saved(tmp_path):
    plain(tmp_path, Counting, **SAVING).train()
    checkpoint = tmp_path / "checkpoint-3"
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    (checkpoint / "batch.json").write_text('{"num_processes": 2, "rows_per_step": 4}')
    states = []
    for kind in (Trainer, Counting):
        trainer = plain(tmp_path, kind)
        before = torch.get_rng_state()
        trainer._load_rng_state(str(checkpoint))
        states.append(torch.equal(torch.get_rng_state(), before))
    assert states[0], no_longer_needed("transformers", "PatchedTrainer._load_rng_state")
    assert not states[1]


def test_trainer_goes_on_with_another_batch_size(tmp_path):
    plain(tmp_path, Counting, **SAVING).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    trainer = plain(tmp_path, gradient_accumulation_steps=2)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 4, no_longer_needed("transformers", "PatchedTrainer._init_training_state")
    with pytest.raises(UserError, match=r"was saved with 4 rows per optimizer step .* and this run has 8 "):
        plain(tmp_path, Counting, gradient_accumulation_steps=2).train(resume_from_checkpoint=checkpoint)


def test_a_clipped_gradient_without_a_norm_looks_finite(tmp_path):
    trainer = plain(tmp_path, Counting)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.full_like(parameter, 1e25)
    norm = trainer._get_grad_norm(trainer.model, trainer._clip_grad_norm(trainer.model))
    gradients = [parameter.grad for parameter in trainer.model.parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients), no_longer_needed(
        "torch", "PatchedTrainer._get_grad_norm"
    )
    assert norm is trainer.grad_norm
    assert norm.isinf()


@pytest.mark.parametrize("kind", [Trainer, Counting])
def test_torch_multiplies_gradients_by_one(kind, tmp_path):
    trainer = plain(tmp_path, kind, max_grad_norm=2.0)
    gradients = [torch.full_like(parameter, 0.5) for parameter in trainer.model.parameters()]
    for size in (1e-3, 10.0):
        for parameter, gradient in zip(trainer.model.parameters(), gradients, strict=True):
            parameter.grad = gradient * size
        before = [parameter.grad._version for parameter in trainer.model.parameters()]
        norm = trainer._clip_grad_norm(trainer.model)
        whole = math.sqrt(sum((gradient.double() * size).square().sum() for gradient in gradients))
        assert norm.item() == pytest.approx(whole, rel=1e-5)
        for parameter, gradient in zip(trainer.model.parameters(), gradients, strict=True):
            assert torch.allclose(parameter.grad, gradient * size * min(1.0, 2.0 / whole), rtol=1e-5)
        after = [parameter.grad._version for parameter in trainer.model.parameters()]
        if size == 1e-3:
            assert (after == before) == (kind is Counting), no_longer_needed("torch", "LeanTrainer._clip_grad_norm")
    parameter.grad.fill_(math.nan)
    assert math.isnan(trainer._clip_grad_norm(trainer.model))


def test_trainer_counts_the_parameters_in_every_step(tmp_path, monkeypatch):
    found = {}
    for kind in (Trainer, Counting):
        trainer, calls = plain(tmp_path, kind), []
        count = trainer.model.num_parameters
        monkeypatch.setattr(
            trainer.model, "num_parameters", lambda count=count, calls=calls, **how: calls.append(1) or count(**how)
        )
        numbers = [trainer.floating_point_ops(rows(numbers)) for numbers in ([1], [1, 2], [3])]
        found[kind] = numbers, len(calls)
    assert found[Trainer][0] == found[Counting][0]
    assert found[Counting][1] == 1
    assert found[Trainer][1] > 1, no_longer_needed("transformers", "LeanTrainer.floating_point_ops")


class Scaled(Counting):
    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss


class ByTrainer(Scaled):
    is_plain = False


class Evaluates(TrainerCallback):
    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 2:
            model.eval()


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}])
def test_trainer_sets_all_modules_to_training_in_every_step(tmp_path, monkeypatch, settings):
    found = {}
    for kind in (ByTrainer, Scaled):
        trainer, calls = plain(tmp_path, kind, callbacks=[Evaluates()], dropout=0.5, **settings), []
        trainer.model.model.eval()  # below a root that is in training, as a loaded model is below a new adapter
        monkeypatch.setattr(
            trainer.model, "train", lambda *mode, of=trainer.model.train, to=calls: to.append(1) or of(*mode)
        )
        trainer.train()
        weights = torch.cat([parameter.flatten() for parameter in trainer.model.parameters()])
        found[kind] = len(calls), weights, all(module.training for module in trainer.model.modules())
    (by_trainer, theirs, _), (ours, same, is_training) = found.values()
    assert torch.equal(theirs, same)
    assert is_training
    assert by_trainer > ours, no_longer_needed("transformers", "LeanTrainer.training_step")


class CountsGradients(TrainerCallback):
    def __init__(self):
        self.counts = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.counts.append(sum(parameter.grad is not None for parameter in model.parameters()))


def test_torch_walks_through_the_model_in_every_step_to_drop_gradients(tmp_path, monkeypatch):
    zero_grad, walks = torch.nn.Module.zero_grad, []
    monkeypatch.setattr(torch.nn.Module, "zero_grad", lambda *model: walks.append(1) or zero_grad(*model))
    found = {}
    for kind in (Trainer, Scaled):
        trainer, callback = plain(tmp_path, kind), CountsGradients()
        trainer.add_callback(callback)
        trainer.train()
        found[kind], walks[:] = len(walks), []
        assert len(callback.counts) == trainer.state.global_step > 1
        assert not any(callback.counts)
        assert "zero_grad" not in vars(trainer.model)
    assert found[Scaled] < trainer.state.global_step
    assert found[Trainer] >= trainer.state.global_step, no_longer_needed("transformers", "LeanTrainer._run_epoch")


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_are_dropped_or_zeroed(to_none):
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    weights[0].sum().backward()
    drop_gradients(weights, to_none)
    assert weights[1].grad is None
    assert weights[0].grad is None if to_none else weights[0].grad.tolist() == [0.0, 0.0]


def test_trainer_makes_each_batch_after_a_step(tmp_path):
    made = {}
    for kind, workers in ((Trainer, 0), (Counting, 0), (Scaled, 2)):
        trainer, seen = plain(tmp_path, kind, dataloader_num_workers=workers), []
        batches = iter({"labels": torch.zeros(1), "seen": seen.append(number)} for number in range(6))
        for _ in range(2):
            trainer.get_batch_samples(batches, 1, trainer.args.device)
        made[kind] = len(seen)
    assert made[Trainer] == 2, no_longer_needed("transformers", "LeanTrainer.get_batch_samples")
    assert made[Counting] == 6
    assert made[Scaled] == 2  # workers make them anyway


def test_accelerate_does_not_see_that_fused_adamw_has_skipped():
    weight = torch.nn.Parameter(torch.ones(1))
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = accelerator.prepare(torch.optim.AdamW([weight], lr=1.0, fused=True))
    accelerator.scaler.scale(weight.sum() * math.inf).backward()
    optimizer.step()
    assert torch.equal(weight, torch.ones(1))
    assert accelerator.scaler.get_scale() == 2.0
    assert not optimizer.step_was_skipped, no_longer_needed("accelerate", "the scales in Guard")


def test_a_schedule_that_is_loaded_leaves_the_rates_of_the_optimizer():
    weight = torch.nn.Parameter(torch.ones(1))

    def schedule() -> torch.optim.lr_scheduler.LambdaLR:
        optimizer = NamedOptimizer([torch.optim.SGD([weight], lr=1.0)], {weight: "weight"})
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    stepped, loaded = schedule(), schedule()
    stepped.optimizer.step()
    stepped.step()
    loaded.load_state_dict(stepped.state_dict())
    loaded.optimizer.load_state_dict(stepped.optimizer.state_dict())
    assert loaded.get_last_lr() == [0.5]
    rates = [group["lr"] for group in loaded.optimizer.param_groups]
    assert rates == [1.0], no_longer_needed("torch", "PatchedTrainer._load_optimizer_and_scheduler")


def shares(*, even: bool, sampler=None) -> list[list[list[int]]]:
    """The batches of two processes over seven rows."""
    batches = sampler or BatchSampler(range(7), 2, drop_last=False)
    return [list(BatchSamplerShard(batches, 2, rank, even_batches=even)) for rank in range(2)]


def test_accelerate_shows_rows_twice_or_lets_processes_wait():
    even = sorted(row for share in shares(even=True) for batch in share for row in batch)
    lengths = {len(share) for share in shares(even=False, sampler=BatchSampler(range(5), 2, drop_last=False))}
    needed = no_longer_needed("accelerate", "PatchedTrainer.get_train_dataloader, EvenBatchSampler")
    assert len(even) > len(set(even)), needed
    assert len(lengths) > 1, needed
    ours = shares(even=False, sampler=EvenBatchSampler(range(7), 2, False, num_processes=2))
    assert sorted(row for share in ours for batch in share for row in batch) == list(range(7))
    assert len({len(share) for share in ours}) == 1


class Rows(list):
    """Rows that are augmented anew in each epoch."""

    epoch = None

    def set_epoch(self, epoch: int):
        self.epoch = epoch


def test_accelerates_loaders_do_not_pass_the_epoch_on():
    """On several processes, and in an epoch that is resumed in its middle."""
    data = Rows(range(8))
    sampler = SeedableRandomSampler(data)
    several = DataLoaderShard(
        data, batch_sampler=BatchSamplerShard(BatchSampler(sampler, 2, drop_last=False), 2, 0), _drop_last=False
    )
    loader = DataLoader(data, batch_sampler=BatchSampler(sampler, 2, drop_last=False))
    for each in (several, skip_first_batches(loader, 1)):
        if hasattr(each, "set_epoch"):
            each.set_epoch(3)
        assert data.epoch != 3, no_longer_needed("accelerate", "SetEpoch")
    SetEpoch(data).on_epoch_begin(None, type("State", (), {"epoch": 3.0}), None)
    assert data.epoch == 3


PATIENT = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
PATIENT |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 1.0}


@pytest.mark.parametrize("kind", [EarlyStoppingCallback, StopEarly])
def test_early_stopping_counts_from_zero_in_a_resumed_run(kind, tmp_path):
    trainer = plain(tmp_path, callbacks=[kind(2)], **PATIENT)
    trainer.train()
    ended = trainer.state.global_step
    assert ended < 6, "the losses never rose, which would prove nothing"
    checkpoint = tmp_path / f"checkpoint-{ended - 1}"
    stored = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"][kind.__name__]
    assert stored["attributes"]["early_stopping_patience_counter"] == 1
    resumed = plain(tmp_path, callbacks=[kind(2)], **PATIENT)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    if kind is StopEarly:
        assert resumed.state.global_step == ended
    else:
        assert resumed.state.global_step > ended, no_longer_needed("transformers", "StopEarly")


def test_trainer_deletes_the_newest_checkpoint_when_it_has_loaded_the_best(tmp_path):
    """Where one is kept: a run that is killed before its final model is saved would go back to the best one."""
    settings = PATIENT | {"learning_rate": 0.0, "max_steps": 2, "save_total_limit": 1}  # the first of equals is best
    for kind, steps in {Trainer: {1}, Counting: {1, 2}}.items():
        folder = tmp_path / kind.__name__
        plain(folder, kind, **settings).train()
        left = {int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*")}
        assert left == steps, no_longer_needed("transformers", "PatchedTrainer._finalize_training")


def test_no_older_library_is_allowed_than_the_one_whose_faults_are_known():
    """`make test` installs what constraints.txt pins, and the patches are tested with nothing older."""
    root = Path(__file__).parents[2]
    pins = re.findall(r"^(transformers|accelerate)==(\d+\.\d+)", (root / "constraints.txt").read_text(), re.MULTILINE)
    floors = re.findall(r'"(transformers|accelerate)>=(\d+\.\d+)', (root / "pyproject.toml").read_text())
    assert len(floors) == 3
    assert sorted(floors) == sorted(pins)
