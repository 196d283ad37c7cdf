"""What every test shares: no network but loopback, no touch of the user's caches, seeded random numbers."""

import os
import sys
import tempfile

import pytest

# huggingface_hub reads these at import, so they are set before any test module is collected. Child processes inherit.
for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "ACCELERATE_"))]:
    del os.environ[name]
_home = tempfile.TemporaryDirectory(prefix="bmtk-tests-", ignore_cleanup_errors=True)
# Workers of one call share what torch.compile finds out once (instructions, compiled headers).
_inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR") if "PYTEST_XDIST_WORKER" in os.environ else None
os.environ |= {
    "HF_HOME": _home.name,
    # torch.compile reuses kernels from here, also those that were made for another ATEN_CPU_CAPABILITY.
    "TORCHINDUCTOR_CACHE_DIR": _inductor or f"{_home.name}/inductor",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # more are processes, which import torch for one kernel or two
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "agg",
    # One thread sums in one order, so what is compared to the last digits is equal; sweep_training.py asks for more.
    "OMP_NUM_THREADS": os.environ.get("BMTK_TEST_THREADS", "1"),
    "MKL_NUM_THREADS": os.environ.get("BMTK_TEST_THREADS", "1"),  # which counts for products, where it is set
}

pytest_plugins = ["stand_in_hub", "smoke_runs"]


def pytest_addoption(parser):
    parser.addoption("--training-seeds", type=int, default=1, metavar="N", help="run tests marked `trains` N times")


def pytest_generate_tests(metafunc):
    """With --training-seeds N: every test marked `trains`, and the runs that it looks at, once for each of N seeds."""
    count = metafunc.config.getoption("training_seeds")
    if count > 1 and metafunc.definition.get_closest_marker("trains"):
        seeds = range(first_seed(), first_seed() + count)
        metafunc.parametrize("training_seed", seeds, indirect=True, scope="session", ids="seed{}".format)


def first_seed() -> int:
    return int(os.environ.get("BMTK_TEST_SEED", "0"))


@pytest.fixture(scope="session")
def training_seed(request) -> int:
    """What a test that trains adds to its seeds: 0, or what BMTK_TEST_SEED or the repetition says.

    Of the scope of a session, so that whatever is kept for several tests is made anew for the next seed.
    """
    return getattr(request, "param", first_seed())


@pytest.fixture(scope="session")
def seed_argv(training_seed) -> list[str]:
    """The same for the command line of a recipe, whose own default is 42; nothing at all with the first seed."""
    return ["--seed", str(42 + training_seed)] if training_seed else []


@pytest.fixture(autouse=True)
def fresh_process(request, training_seed, monkeypatch):
    """The same random numbers and no accelerator in every test, whichever tests ran before."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(training_seed if request.node.get_closest_marker("trains") else 0)
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that no worker ends long after the others.

    Tests marked `gpu` are skipped, by name, where there is no CUDA device.
    """
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_items:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
