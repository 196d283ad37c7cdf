"""recipes/finetune.py with a model that is spread over two processes trains, measures, saves and resumes as on one.

As a script it is one of the two processes: test_finetune_sharding.py FOLDER.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_finetune_processes import write_rows
from transformers import AutoModelForSequenceClassification

from bmtk.errors import UserError
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
    "whole": f"{TEXT} --micro_batch_size 2 --ema_decay 0.9 --max_grad_norm 0.1",
    "muon": f"{TEXT} --optimizer muon --l1_penalty 1e-4 --gradient_checkpointing true",
    "best": f"{TEXT} --load_best_model_at_end true --max_grad_norm 0",
    "images": "--task image_classification --norm_type layer_norm --max_steps 4",
    "lora": f"{TEXT} --model {{folder}}/whole --adapter lora",
    "head": f"{TEXT} --model {{folder}}/whole --freeze_backbone true",
    "translation": "--task translation --max_steps 3",
}
RESUMED = ("whole", "lora")


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
    """Of all runs on one process, and spread over two, which are started once."""
    folder = tmp_path_factory.mktemp("sharding")
    write_rows(folder)
    with contextlib.chdir(ROOT), pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizers, "multiplies_bfloat16_fast", lambda *_: False)
        for name in CASES:
            finetune.main(argv_of(name, folder / "one", one=folder / "one", data=folder))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launch, "--main_process_port", str(port), __file__, str(folder)]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "one", folder / "two"


def numbers(folder: Path) -> list[dict[str, float]]:
    """The lines of history.jsonl, without what a clock has measured."""
    clock = ("seconds", "tokens_per_second", "images_per_second", "rows_per_second")
    lines = map(json.loads, (folder / "history.jsonl").read_text(encoding="utf-8").splitlines())
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def assert_same(one: Path, two: Path) -> None:
    for ours, theirs in zip(numbers(two), numbers(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
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
def test_one_process_resumes_what_two_have_saved(folders, tmp_path):
    one, two = folders
    cut(two / "whole", tmp_path / "whole", step=4)
    with contextlib.chdir(ROOT):
        finetune.main(argv_of("whole", tmp_path, one=one, data=one.parent))
    assert_same(one / "whole", tmp_path / "whole")


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


@pytest.mark.slow
def test_a_checkpoint_of_whole_weights_is_not_resumed_in_parts(folders):
    assert (
        "checkpoint-2 was saved without fsdp_size, and its optimizer cannot be spread: leave fsdp_size=2 out, or"
        in ((folders[1] / "refused.txt").read_text(encoding="utf-8"))
    )


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


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    optimizers.multiplies_bfloat16_fast = lambda *_: False  # a rounding to 16 bits would hide what is compared
    one, two = folder / "one", folder / "two"

    def run(name: str, *options: str) -> None:
        finetune.main([*argv_of(name, two, one=one, data=folder), "--fsdp_size", "2", *options])

    def resume(source: Path, copy: str, name: str) -> None:
        if torch.distributed.get_rank() == 0:
            cut(source / name, two / copy, step=2)
        torch.distributed.barrier()
        run(name, "--output_dir", str(two / copy))

    for name in CASES:
        run(name)
        if name in RESUMED:
            resume(two, f"{name} resumed", name)
    try:
        resume(one, "refused", "whole")
    except UserError as error:
        (two / "refused.txt").write_text(str(error), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
