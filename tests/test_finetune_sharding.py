"""recipes/finetune.py with a model that is spread over processes trains, measures, saves and resumes as on one."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked import forked
from safetensors.torch import load_file
from test_finetune_processes import write_rows
from transformers import AutoModelForSequenceClassification

from bmtk.errors import UserError
from bmtk.tasks import image_classification
from bmtk.training import optimizers
from bmtk.training.finetuning_arguments import FineTuningArguments
from bmtk.training.manifest import damages
from bmtk.training.trained_model import TrainedModel
from recipes import finetune

ROOT = Path(__file__).parent.parent
# Three steps an epoch: the last one has 3 rows on one process, and on two 1 and 2; 5 and 7 rows to measure.
EXACT = "--preset smoke --disable_tqdm true --batch_size 8 --num_train_epochs 2 --warmup_steps 0 --logging_steps 1"
EXACT += " --save_total_limit 9 --adam_epsilon 1e-4 --precision fp32"
TEXT = "--task sequence_classification --tokenizer word --dataset {data}"
CASES = {
    "whole": f"{TEXT} --micro_batch_size 2 --ema_decay 0.9 --max_grad_norm 0.1 --per_device_eval_batch_size 1",
    "muon": f"{TEXT} --optimizer muon --l1_penalty 1e-4 --gradient_checkpointing true",
    "best": f"{TEXT} --load_best_model_at_end true --max_grad_norm 0",
    "images": "--task image_classification --norm_type layer_norm --max_steps 4",
    "lora": f"{TEXT} --model {{folder}}/whole --adapter lora",
    "head": f"{TEXT} --model {{folder}}/whole --freeze_backbone true",
    "translation": "--task translation --dataset {data}-pairs --max_steps 3 --per_device_eval_batch_size 1",
}
RESUMED = ("whole", "lora")
ON_TWO = ("whole", "muon")  # saved by one process, and resumed by two
COPIED = ("whole", "translation")  # in two copies, each of which is spread over two processes


def write_pairs(folder: Path) -> None:
    """Pairs of sentences, of which those to measure do not come out even."""
    folder.mkdir()
    for name, count in {"train": 40, "validation": 5, "test": 7}.items():
        lines = (ROOT / f"recipes/data/numbers/{name}.csv").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.csv").write_text("".join(lines[: count + 1]), encoding="utf-8")


def argv_of(name: str, folder: Path, *, one: Path, data: Path) -> list[str]:
    case = CASES[name].format(data=data, folder=one)
    steps = ["--eval_steps", "3", "--save_steps", "3" if name == "best" else "2"]
    return [*f"{EXACT} {case}".split(), *steps, "--output_dir", str(folder / name)]


def cut(whole: Path, half: Path, *, step: int) -> None:
    """A copy of the folder of a run, as it was after `step`."""
    shutil.copytree(whole, half)
    for path in half.iterdir():
        if path.name in ("config.json", "run.json", "adapter_config.json") or path.suffix == ".safetensors":
            path.unlink()
    for path in (half / "checkpoints").iterdir():
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Of all runs on one process, and spread over two, which are forked once."""
    folder = tmp_path_factory.mktemp("sharding")
    write_rows(folder)
    write_pairs(folder.with_name(f"{folder.name}-pairs"))
    with contextlib.chdir(ROOT), pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizers, "multiplies_bfloat16_fast", lambda *_: False)
        patch.setattr(image_classification, "image_grid", lambda *_: {})  # seconds for a picture
        for name in CASES:
            finetune.main(argv_of(name, folder / "one", one=folder / "one", data=folder))
    assert forked(lambda rank: run_on_two(folder), seconds=300) == [0, 0]
    cut(folder / "two" / "whole", folder / "two on one" / "whole", step=2)
    with contextlib.chdir(ROOT):
        finetune.main(argv_of("whole", folder / "two on one", one=folder / "one", data=folder))
    assert forked(lambda rank: run_on_four(folder), 4, seconds=300) == [0] * 4
    return folder / "one", folder / "two"


def numbers(folder: Path, *, but: tuple[str, ...] = ()) -> list[dict[str, float]]:
    """The lines of history.jsonl, without what a clock has measured."""
    clock = ("seconds", "tokens_per_second", "images_per_second", "rows_per_second")
    lines = map(json.loads, (folder / "history.jsonl").read_text(encoding="utf-8").splitlines())
    return [{key: value for key, value in line.items() if key not in (*clock, *but)} for line in lines]


def assert_same(one: Path, two: Path, *, rel: float = 1e-5, but: tuple[str, ...] = ()) -> None:
    for ours, theirs in zip(numbers(two, but=but), numbers(one, but=but), strict=True):
        assert ours == pytest.approx(theirs, rel=rel, abs=1e-6)
    records = [json.loads((folder / "run.json").read_text(encoding="utf-8")) for folder in (one, two)]
    assert records[1]["metrics"] == pytest.approx(records[0]["metrics"], rel=1e-5, nan_ok=True)
    assert records[1]["model"]["class"] == records[0]["model"]["class"]
    (name,) = (path.name for path in one.glob("*model.safetensors"))
    torch.testing.assert_close(load_file(two / name), load_file(one / name), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_model_that_is_spread_learns_and_is_measured_as_a_whole_one(folders, name):
    one, two = folders
    assert_same(one / name, two / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_it_is_resumed_as_exactly(folders, name):
    one, two = folders
    assert_same(one / name, two / f"{name} resumed")


@pytest.mark.slow
@pytest.mark.parametrize("name", COPIED)
def test_copies_of_a_model_that_is_spread_learn_and_are_measured_as_one(folders, name):
    """But for Trainer's counts: of epochs, in micro-batches, and of three rows that each of the four processes has."""
    assert_same(folders[0] / name, folders[0].parent / "four" / name, rel=1e-6, but=("epoch", "tokens"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_TWO)
def test_two_processes_resume_what_one_has_saved(folders, name):
    one, two = folders
    assert_same(one / name, two / f"{name} of one")


@pytest.mark.slow
def test_one_process_resumes_what_two_have_saved_and_then_four(folders):
    one, folder = folders[0], folders[0].parent
    assert_same(one / "whole", folder / "two on one" / "whole")
    assert_same(one / "whole", folder / "four" / "whole of two on one", but=("epoch", "tokens"))


@pytest.mark.slow
def test_what_is_saved_is_read_with_the_projects_own_code(folders):
    one, two = folders
    checkpoint = two / "whole" / "checkpoints" / "checkpoint-6"
    assert damages(checkpoint) == []
    assert len(list(checkpoint.glob("model-*-of-00002.safetensors"))) == 2
    for folder in (two / "whole", checkpoint):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = [*config["auto_map"].values(), *config["architectures"]]
        assert names == [*json.loads((one / "whole" / "config.json").read_text())["auto_map"].values(), *names[-1:]]
        assert "FSDP" not in " ".join(names)
        assert "distributed_config" not in config
        AutoModelForSequenceClassification.from_pretrained(folder)
    assert json.loads((two / "lora" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    TrainedModel(str(two / "lora")).load(AutoModelForSequenceClassification)


@pytest.mark.parametrize(
    ("options", "variable", "message"),
    [
        ({}, "ACCELERATE_USE_FSDP", "accelerate's FSDP is for GPUs: .* set fsdp_size$"),
        ({"fsdp_size": 2}, None, "fsdp_size=2 x tp_size=1 needs 2 processes or a multiple, and 1 were started"),
    ],
)
def test_sharding_that_would_not_be_done_is_refused(options, variable, message, tmp_path, monkeypatch):
    if variable:
        monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=message):
        FineTuningArguments(output_dir=str(tmp_path), use_cpu=True, **options).check_engines()


def test_an_adapter_is_not_merged_into_weights_that_are_cut(tmp_path, monkeypatch):
    args = FineTuningArguments(output_dir=str(tmp_path), use_cpu=True, fsdp_size=2)
    monkeypatch.setattr(FineTuningArguments, "world_size", 2)
    with pytest.raises(UserError, match="merge_adapter needs whole weights, and fsdp_size=2 cuts them: leave one out"):
        args.check_engines(merges=True)


def run_on_two(folder: Path) -> None:
    run = begin(folder, folder / "two", "--fsdp_size", "2")
    for name in CASES:
        run(name)
        if name in RESUMED:
            run(name, f"{name} resumed", of=folder / "two" / name, step=2)
        if name in ON_TWO:
            run(name, f"{name} of one", of=folder / "one" / name, step=2)
    torch.distributed.destroy_process_group()


def run_on_four(folder: Path) -> None:
    sizes = "--fsdp_size 2 --dp_replicate_size 2 --micro_batch_size 1"
    run = begin(folder, folder / "four", *sizes.split())
    for name in COPIED:
        run(name)
    run("whole", "whole of two on one", of=folder / "two on one" / "whole", step=4)
    torch.distributed.destroy_process_group()


def begin(folder: Path, several: Path, *options: str) -> Callable[..., None]:
    """A function that runs a case in `several`, from the beginning or from where a run stands after a step."""
    os.chdir(ROOT)
    optimizers.multiplies_bfloat16_fast = lambda *_: False  # a rounding to 16 bits would hide what is compared
    image_classification.image_grid = lambda *_: {}

    def run(name: str, copy: str = "", *, of: Path | None = None, step: int = 0) -> None:
        if of and torch.distributed.get_rank() == 0:
            cut(of, several / copy, step=step)
        if of:
            torch.distributed.barrier()
        argv = argv_of(name, several, one=folder / "one", data=folder)
        finetune.main([*argv, *options, "--output_dir", str(several / (copy or name))])

    return run
