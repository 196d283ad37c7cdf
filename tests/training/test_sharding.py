"""A model that is spread over processes learns what it learns on one, in every layout, resumed by any number."""

import json
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import forked
from safetensors.torch import load_file, save_file
from sharded_processes import CASES, LAYOUTS, RESUMED, fits, model_of, run_cases, train
from tiny_run import arguments, read_history, tiny_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForMaskedLM

from bmtk.errors import UserError
from bmtk.training import agreement, optimizers
from bmtk.training.manifest import damages
from bmtk.training.prepared import build_accelerator
from bmtk.training.sharding import ProcessLayout, shard
from bmtk.training.tensor_files import file_name, opened, owners_of, write_index

SIZES = {layout: sizes for layouts in LAYOUTS.values() for layout, sizes in layouts.items()}
RUNS = [(layout, name) for layout, sizes in SIZES.items() for name in CASES if fits(name, sizes)]
HALVES = [(layout, name) for layout, name in RUNS if name in RESUMED]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The runs of one process, and those that two and four processes made, or resumed half-way."""
    folder = tmp_path_factory.mktemp("sharded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizers, "multiplies_bfloat16_fast", lambda *_: False)
        for name in CASES:
            train(folder / f"one-{name}", name)
    for layout, name in HALVES:
        stopped_half_way(folder / f"one-{name}", folder / f"half of {layout}-{name}")
    assert forked(lambda rank: run_cases(folder), 4, seconds=300) == [0] * 4
    stopped_half_way(folder / "fsdp 4-untied", folder / "four then two")
    assert forked(lambda rank: run_cases(folder), 2, seconds=300) == [0] * 2
    return folder


def stopped_half_way(whole: Path, half: Path) -> None:
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints" / "step-00000004")


def same(left: Path, right: Path) -> None:
    histories = read_history(left), read_history(right)
    for one, other in zip(*histories, strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6)
    weights = load_file(left / "model.safetensors")
    torch.testing.assert_close(load_file(right / "model.safetensors"), weights, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize(("layout", "name"), RUNS)
def test_every_layout_trains_the_model_of_one_process(folder, layout, name):
    """Losses, gradient norms, evaluations (of batches that do not come out even) and weights."""
    same(folder / f"one-{name}", folder / f"{layout}-{name}")


COMPILED = {"num_train_steps": 6, "micro_batch_size": 1, "save_steps": 0}


def compiled(folder: Path) -> None:
    from torch._inductor import config  # seconds, for one test

    config.compile_threads = 1  # without processes of its own, which a fork has no use for
    train(folder, "untied", fsdp_size=2, torch_compile=True, **COMPILED)


@pytest.mark.slow
def test_a_sharded_model_that_is_compiled_learns_the_same(tmp_path):
    train(tmp_path / "one", "untied", **COMPILED)
    assert forked(lambda rank: compiled(tmp_path / "two"), seconds=300) == [0, 0]
    same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(("layout", "name"), HALVES)
def test_every_layout_resumes_what_one_process_has_saved(folder, layout, name):
    same(folder / f"one-{name}", folder / f"half of {layout}-{name}")


def test_two_processes_resume_what_four_have_saved(folder):
    same(folder / "one-untied", folder / "four then two")


@pytest.mark.parametrize("layout", ["fsdp 4", "hsdp 2x2", "tp 2", "fsdp 2 x tp 2"])
def test_one_process_resumes_what_several_have_saved(folder, layout, tmp_path):
    stopped_half_way(folder / f"{layout}-untied", tmp_path / "run")
    train(tmp_path / "run", "untied")
    same(folder / "one-untied", tmp_path / "run")


def moved_filters(*, is_sharded: bool) -> list[torch.Tensor]:
    """Filters of 8, 6 and 5 rows after three steps of Muon."""
    torch.manual_seed(0)
    model, pixels = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 5, 1)), torch.randn(4, 8, 9, 9)
    if is_sharded:
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    filters = [parameter for parameter in model.parameters() if parameter.ndim == 4]
    muon = optimizers.Muon(filters, lr=0.02, weight_decay=0.1)
    for _ in range(3):
        model(pixels).square().mean().backward()
        muon.step()
        model.zero_grad()
    return [one.full_tensor() if is_sharded else one for one in filters]


def compare_filters() -> None:
    torch.distributed.init_process_group("gloo")
    optimizers.multiplies_bfloat16_fast = lambda *_: False
    for one, other in zip(moved_filters(is_sharded=True), moved_filters(is_sharded=False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_muon_moves_sharded_filters_as_whole_ones():
    assert forked(lambda rank: compare_filters()) == [0, 0]


@pytest.mark.parametrize(("layout", "name"), [("fsdp 4", "untied"), ("tp 2", "tied"), ("fsdp 2", "lstm")])
def test_a_checkpoint_of_several_processes_is_a_repository_that_from_pretrained_reads(folder, layout, name):
    checkpoint = folder / f"{layout}-{name}" / "checkpoints" / "step-00000004"
    assert damages(checkpoint) == []
    assert len(list(checkpoint.glob("model-*.safetensors"))) == int(re.search(r"\d", layout)[0])
    config = json.loads((checkpoint / "config.json").read_text())
    expected = type(model_of(name)).__name__
    assert config["architectures"] == [expected]
    assert config["auto_map"]["AutoModelForCausalLM"].endswith(f".{expected}")
    assert (checkpoint / f"{config['auto_map']['AutoModelForCausalLM'].partition('.')[0]}.py").exists()
    assert "distributed_config" not in config
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    averaged = "ema_decay" in CASES[name][0]  # which the final model is, and a checkpoint has beside the weights
    stored = load_file(folder / f"{layout}-{name}" / "model.safetensors")
    if averaged:
        with opened(checkpoint / "training_state", "averages") as files:
            loaded |= {key: files.read(key) for key in files if key in loaded}
    assert all(torch.equal(loaded[key], value) for key, value in stored.items())


def test_a_damaged_part_is_found_by_whichever_process_looks_at_it(folder, tmp_path):
    stopped_half_way(folder / "fsdp 4-untied", tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    part = checkpoint / "model-00003-of-00004.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    found = [damages(checkpoint, rank=rank, world_size=4) for rank in range(4)]
    assert sorted(map(len, found)) == [0, 0, 0, 1]
    assert damages(checkpoint) == [problem for each in found for problem in each]


# Who holds what ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "count", "replicas", "shares"),
    [({}, 4, 4, 4), ({"fsdp_size": 2}, 4, 2, 4), ({"fsdp_size": 4}, 4, 1, 4), ({"tp_size": 2}, 4, 2, 2),
     ({"fsdp_size": 2, "tp_size": 2}, 4, 1, 2), ({"fsdp_size": 2, "dp_replicate_size": 3}, 6, 3, 6)],
)  # fmt: skip
def test_all_processes_are_used_and_those_of_one_matrix_read_the_same_rows(sizes, count, replicas, shares):
    layout = ProcessLayout.of(arguments("none", **sizes), count)
    assert (layout.dp_replicate_size, layout.num_shares) == (replicas, shares)
    ranks = [layout.share(index)["rank"] for index in range(count)]
    assert ranks == sorted(ranks)
    assert [ranks.count(rank) for rank in range(shares)] == [layout.tp_size] * shares
    assert [layout.is_copy(index) for index in range(count)].count(False) == shares


@pytest.mark.parametrize(
    ("sizes", "count", "message"),
    [
        ({"fsdp_size": 2}, 1, "fsdp_size=2 x tp_size=1 needs 2 processes or a multiple, and 1 were started"),
        ({"fsdp_size": 2, "dp_replicate_size": 2}, 2, "x dp_replicate_size=2 needs 4 processes, and 2 were started"),
        ({"tp_size": 3}, 4, "fsdp_size=1 x tp_size=3 needs 3 processes or a multiple, and 4"),
    ],
)
def test_processes_that_do_not_divide_are_refused(sizes, count, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ProcessLayout.of(arguments("none", **sizes), count)


def test_sizes_that_do_not_fit_are_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match="fsdp_size=2 x tp_size=1 needs 2 processes"):
        build_accelerator(arguments(tmp_path, fsdp_size=2))


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_the_engines_of_accelerate_are_refused_with_the_remedy(monkeypatch, tmp_path, name):
    monkeypatch.setenv(name, "true")
    with pytest.raises(UserError, match=r"leave --use_fsdp and --use_deepspeed out of .* set fsdp_size$"):
        build_accelerator(arguments(tmp_path))


def recurrent():
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("bm_rnn", vocab_size=8, hidden_size=8))


def bert():
    config = BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8, vocab_size=8)
    return BertForMaskedLM(config)


@pytest.mark.parametrize(
    ("model", "layout", "message"),
    [
        (recurrent, ProcessLayout(tp_size=2), "tp_size=2: BmRnnForCausalLM has no plan for tensor parallelism"),
        (bert, ProcessLayout(fsdp_size=2), "fsdp_size=2: the plan of BertForMaskedLM .* names none of its modules"),
        (tiny_model, ProcessLayout(tp_size=4), "tp_size=4 does not divide num_attention_heads=2; choose a divisor"),
    ],
)
def test_models_that_no_plan_fits_are_refused_by_name(model, layout, message):
    with pytest.raises(UserError, match=message):
        shard(model(), layout, torch.device("cpu"))


def test_tensors_are_divided_by_their_bytes_and_read_from_all_files(tmp_path):
    tensors = {f"w{number}": torch.full((number + 1, 3), float(number)) for number in range(9)}
    owners = owners_of(tensors, 3)
    assert list(owners.values()) == sorted(owners.values())
    sizes = [sum(tensors[name].numel() for name in tensors if owners[name] == rank) for rank in range(3)]
    assert max(sizes) - min(sizes) <= tensors["w8"].numel()
    for rank in range(3):
        own = {name: tensor for name, tensor in tensors.items() if owners[name] == rank}
        save_file(own, tmp_path / file_name("model", rank, 3))
    write_index(tmp_path, "model", tensors, 3)
    with opened(tmp_path, "model") as files:
        assert set(files) == set(tensors)
        assert all(torch.equal(files.read(name), tensor) for name, tensor in tensors.items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert all(name in load_file(tmp_path / file) for name, file in index.items())


# Agreement -----------------------------------------------------------------------------------------------------------


def as_processes(monkeypatch, work, *, count: int = 2) -> list[Exception | None]:
    """Run `work(accelerator)` in threads that stand for processes; return what each raised."""
    barrier, values, outcomes = threading.Barrier(count, timeout=20), {}, [None] * count

    def exchange(value):
        rank = int(threading.current_thread().name)
        values[rank] = value
        barrier.wait()
        found = [item for number in range(count) for item in values[number]]
        barrier.wait()
        return found

    monkeypatch.setattr(agreement, "gather_object", exchange)
    monkeypatch.setattr(agreement, "broadcast_object_list", lambda value: [exchange(value)[0]])

    def process(rank: int) -> None:
        try:
            work(SimpleNamespace(num_processes=count, process_index=rank, is_main_process=rank == 0))
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=process, args=(rank,), name=str(rank)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_a_folder_that_is_not_shared_stops_all_processes(monkeypatch, tmp_path):
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    errors = as_processes(monkeypatch, lambda a: agreement.check_shared(a, folders[a.process_index]))
    assert [type(error) for error in errors] == [UserError, UserError]
    assert "is another folder for process 1 on" in str(errors[0])
    assert as_processes(monkeypatch, lambda a: agreement.check_shared(a, folders[0])) == [None, None]
    assert not any(path for folder in folders for path in folder.iterdir())


def test_processes_with_other_files_or_versions_stop_all_with_what_differs(monkeypatch):
    def work(accelerator):
        agreement.check_agreement(accelerator, {"the rows": str(accelerator.process_index)})

    errors = as_processes(monkeypatch, work)
    assert [type(error) for error in errors] == [UserError, UserError]
    assert "do not agree on the rows: process 0 on" in str(errors[1])
    assert as_processes(monkeypatch, lambda a: agreement.check_agreement(a, {"the rows": "same"})) == [None, None]
    other = {"the versions": "torch 0"}
    errors = as_processes(monkeypatch, lambda a: agreement.check_agreement(a, other if a.process_index else {}))
    assert "the versions: process 0 on" in str(errors[0])


def test_what_fails_in_one_process_fails_in_all(monkeypatch):
    def work(accelerator):
        def action():
            if accelerator.process_index:
                raise OSError("no space left")
            return 3

        agreement.together(accelerator, action)

    errors = as_processes(monkeypatch, work)
    assert [str(error) for error in errors] == ["process 1: no space left", "no space left"]


def test_equal_weights_have_equal_checksums_and_others_have_not():
    assert agreement.checksum(tiny_model()) == agreement.checksum(tiny_model())
    assert agreement.checksum(tiny_model()) != agreement.checksum(tiny_model(seed=8))
