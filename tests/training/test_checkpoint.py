"""Checkpoints survive kills, bad disks and full disks, and are Hugging Face repositories at every moment."""

import functools
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_run import Stopping, arguments, digest, read_history, run, tiny_model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from bmtk.training.arguments import LoopArguments
from bmtk.training.checkpoint import TrainState, load_checkpoint, newest_checkpoint, save_checkpoint, save_model
from bmtk.training.manifest import damages
from bmtk.training.prepared import prepare
from bmtk.training.rng_state import RngState, preserved_rng_state, set_rng_state

WRITES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """Folder of a finished run with checkpoints after steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("whole")
    run(arguments(folder))
    return folder


@pytest.fixture
def run_folder(whole_run, tmp_path) -> Path:
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def in_child(body) -> int:
    """Wait status of a forked process that calls `body`; 0 if it returns."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # Python 3.12 warns of threads, none of which the child needs
        child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            torch.set_num_threads(1)
            body()
            os._exit(0)
        finally:
            os._exit(99)
    return os.waitpid(child, 0)[1]


def run_until_write(number: int, args: LoopArguments):
    """Train, and be killed right before the `number`-th change below the run's folder."""
    left = [number]

    def watch(event: str, details: tuple):
        if event == "open":
            path, mode, flags = details
            if not (mode and mode[0] in "wa") and not (flags or 0) & (os.O_WRONLY | os.O_RDWR):
                return
        elif event in WRITES:
            path = details[0]
        else:
            return
        if args.output_dir in str(path) or not os.path.isabs(str(path)):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    run(args)


def test_a_kill_at_any_write_costs_at_most_the_steps_since_the_last_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a kill takes nothing from the system's caches
    settings = dict(num_train_steps=2, save_steps=1, eval_steps=0, save_total_limit=1)
    straight = run(arguments(tmp_path / "straight", **settings))
    history = read_history(tmp_path / "straight")
    for number in range(1, 1000):
        folder = tmp_path / f"killed-{number}"
        args = arguments(folder, **settings)
        status = in_child(functools.partial(run_until_write, number, args))
        if status == 0:
            break
        assert status == signal.SIGKILL
        assert not any(damages(checkpoint) for checkpoint in folder.glob("checkpoints/step-*"))
        assert run(args) == straight
        assert read_history(folder) == history
        assert "step-00000002" in steps(folder)
        assert set(steps(folder)) <= {"step-00000001", "step-00000002"}  # an older one may have outlived its deletion
        shutil.rmtree(folder)
    assert number > 30  # two checkpoints of some ten files each, and the final model


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("flip", "another xxh3_128 than"),
        ("cut", "bytes instead of"),
        ("empty", "has 0 bytes"),
        ("delete", "is missing"),
    ],
)
def test_damage_to_any_file_is_named_and_the_checkpoint_passed_over(run_folder, damage, told, caplog):
    newest = run_folder / "checkpoints" / "step-00000006"
    listed = json.loads((newest / "manifest.json").read_text())["files"]
    assert {"model.safetensors", "training_state/optimizer.safetensors", "training_state/state.json"} <= set(listed)
    for name in listed:
        path = newest / name
        content = path.read_bytes()
        for place in {0, len(content) // 2, len(content) - 1}:
            if damage == "flip":
                path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            elif damage == "cut":
                path.write_bytes(content[:place])
            elif damage == "empty":
                path.write_bytes(b"")
            else:
                path.unlink(missing_ok=True)
            (problem,) = damages(newest)
            assert problem.startswith(name)
            assert told in problem
        caplog.clear()
        assert newest_checkpoint(run_folder) == run_folder / "checkpoints" / "step-00000004"
        assert f"step-00000006 is damaged: {name}" in caplog.text
        path.write_bytes(content)
    assert newest_checkpoint(run_folder) == newest


def test_a_manifest_that_is_gone_or_damaged_is_not_trusted(run_folder):
    manifest = run_folder / "checkpoints" / "step-00000006" / "manifest.json"
    content = manifest.read_bytes()
    for changed in (
        b"",
        content[:-9],
        content.replace(b'"files"', b'"fires"'),
        content.replace(b'"bytes"', b'"bites"'),
    ):
        manifest.write_bytes(changed)
        assert damages(manifest.parent)[0].startswith("manifest.json cannot be read")
    manifest.unlink()
    assert damages(manifest.parent) == ["manifest.json is missing"]


def test_a_run_resumes_from_an_older_checkpoint_and_replaces_the_damaged_one(run_folder):
    whole = digest(AutoModelForCausalLM.from_pretrained(run_folder))
    weights = run_folder / "checkpoints" / "step-00000006" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert run(arguments(run_folder))["digest"] == whole
    assert damages(weights.parent) == []
    assert steps(run_folder) == ["step-00000002", "step-00000004", "step-00000006"]


def test_a_damaged_later_checkpoint_never_pushes_out_the_one_just_written(run_folder):
    for name in ("step-00000004", "step-00000006"):
        (run_folder / "checkpoints" / name / "config.json").unlink()
    with pytest.raises(SystemExit):
        run(arguments(run_folder, save_total_limit=1), batches=Stopping(2))
    assert newest_checkpoint(run_folder) == run_folder / "checkpoints" / "step-00000003"


def test_if_every_checkpoint_is_damaged_the_run_does_not_start_anew_unasked(run_folder):
    for folder in (run_folder / "checkpoints").iterdir():
        (folder / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"no checkpoint .* is whole:(.|\n)*model\.safetensors is missing(.|\n)*overwrite"
    ):
        run(arguments(run_folder))


def test_a_full_disk_leaves_the_older_checkpoints_and_no_rubbish(tmp_path):
    args = arguments(tmp_path, save_total_limit=1)

    def fill_the_disk():
        run(arguments(tmp_path, num_train_steps=2, schedule="constant"))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))  # bytes that a file may have
        try:
            run(args)
        except OSError as error:
            Path(tmp_path / "told.txt").write_text(str(error))

    assert in_child(fill_the_disk) == 0
    told = (tmp_path / "told.txt").read_text()
    assert "step-00000004 could not be written" in told
    assert "It needs about 0.1 MB" in told
    assert "Older checkpoints are whole" in told
    assert steps(tmp_path) == ["step-00000002"]
    assert damages(tmp_path / "checkpoints" / "step-00000002") == []


def test_any_other_error_while_saving_leaves_no_rubbish_either(tmp_path):
    prepared = prepare(tiny_model(), LoopArguments(), Accelerator(cpu=True))
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, TrainState(step=1), prepared, config={"key": object()})
    assert steps(tmp_path) == []


def test_a_checkpoint_is_a_repository_without_any_pickle(whole_run):
    folder = whole_run / "checkpoints" / "step-00000004"
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert names == [
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "training_state/config.json",
        "training_state/optimizer.safetensors",
        "training_state/randomness.safetensors",
        "training_state/state.json",
    ]
    with safe_open(folder / "training_state" / "optimizer.safetensors", "pt") as stored:
        assert "exp_avg_sq/model.layers.1.mlp.up_proj.weight" in stored.keys()


def test_every_file_is_on_the_disk_before_the_checkpoint_gets_its_name(tmp_path, monkeypatch):
    events = []

    def fsync(descriptor: int):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    def replace(source: Path, target: Path):
        events.append("rename")
        os.rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    prepared = prepare(tiny_model(), LoopArguments(), Accelerator(cpu=True))
    final = save_checkpoint(tmp_path, TrainState(step=1), prepared)
    *flushed, renamed, parent = events
    assert renamed == "rename"
    beside = final.with_name(".partial-step-00000001")
    assert set(flushed) == {beside, *(beside / path.relative_to(final) for path in final.rglob("*"))}
    assert parent == final.parent


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run(arguments(tmp_path, save_steps=1, save_total_limit=2))
    assert steps(tmp_path) == ["step-00000005", "step-00000006"]


@pytest.mark.parametrize(("tied", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_weights_come_back_bit_by_bit(tmp_path, tied, dtype):
    model = tiny_model(tied=tied).to(dtype)
    prepared = prepare(model, LoopArguments(), Accelerator(cpu=True))
    folder = save_checkpoint(tmp_path, TrainState(step=5, tokens=9), prepared)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.zero_()
    state = load_checkpoint(folder, prepared)
    assert (state.step, state.tokens) == (5, 9)
    assert all(torch.equal(value, kept[name]) and value.dtype == dtype for name, value in model.state_dict().items())


def test_a_checkpoint_of_another_model_is_refused(whole_run):
    other = tiny_model()
    other.config.num_hidden_layers = 3
    prepared = prepare(type(other)(other.config), LoopArguments(), Accelerator(cpu=True))
    folder = whole_run / "checkpoints" / "step-00000002"
    with pytest.raises(RuntimeError, match=r"Missing key(.|\n)*layers\.2"):
        load_checkpoint(folder, prepared)


def test_weights_that_are_not_all_there_are_refused_instead_of_drawn_anew(run_folder):
    folder = run_folder / "checkpoints" / "step-00000002"
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    prepared = prepare(tiny_model(), LoopArguments(), Accelerator(cpu=True))
    with pytest.raises(ValueError, match=r"do not fit LlamaForCausalLM: \{'missing_keys'.*lm_head\.weight"):
        load_checkpoint(folder, prepared)


def test_the_final_model_is_saved_with_its_processor_and_nothing_else(tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    for _ in range(2):  # also over an older one
        save_model(tmp_path, prepare(tiny_model(), LoopArguments(), Accelerator(cpu=True)), tokenizer)
    assert digest(AutoModelForCausalLM.from_pretrained(tmp_path)) == digest(tiny_model())
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == {"a": 0, "b": 1}
    assert not list(tmp_path.glob(".partial*"))


def draw() -> list[float]:
    return [random.gauss(0, 1), random.random(), *np.random.randn(3), *torch.rand(2).tolist()]


def test_generators_of_python_numpy_and_torch_go_on_where_they_were():
    random.gauss(0, 1), np.random.randn()  # each keeps half of a pair for the next call
    state = {name: value.clone() for name, value in RngState().items()}
    expected = draw()
    set_rng_state(state)
    assert draw() == expected
    set_rng_state(state)
    with preserved_rng_state():
        draw()
    assert draw() == expected


def test_checkpoints_of_former_versions_are_verified_by_the_sha256_of_their_manifest(run_folder):
    newest = run_folder / "checkpoints" / "step-00000006"
    manifest = newest / "manifest.json"
    files = json.loads(manifest.read_text())["files"]
    assert all(
        facts["xxh3_128"] == xxhash.xxh3_128_hexdigest((newest / name).read_bytes()) for name, facts in files.items()
    )
    old = {
        name: {"bytes": facts["bytes"], "sha256": hashlib.sha256((newest / name).read_bytes()).hexdigest()}
        for name, facts in files.items()
    }
    manifest.write_text(json.dumps({"files": old}))
    assert damages(newest) == []
    weights = newest / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert damages(newest) == ["model.safetensors has another sha256 than when it was written"]
    weights.write_bytes(content)
    manifest.write_text(json.dumps({"files": {"config.json": {"bytes": old["config.json"]["bytes"]}}}))
    assert damages(newest)[0].startswith("manifest.json cannot be read")  # a file without any hash proves nothing
