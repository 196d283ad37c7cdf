"""What every test shares: no network but loopback, no touch of the user's caches, seeded random numbers."""

import os
import sys
import tempfile

import pytest

# huggingface_hub reads these at import, so they are set before any test module is collected. Child processes inherit.
for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "ACCELERATE_"))]:
    del os.environ[name]
_home = tempfile.TemporaryDirectory(prefix="bmtk-tests-", ignore_cleanup_errors=True)
os.environ |= {
    "HF_HOME": _home.name,
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "agg",
    "OMP_NUM_THREADS": "1",  # sums in one order: what is compared to the last digits is equal on every machine
}

pytest_plugins = ["stand_in_hub", "smoke_runs"]


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    """The same random numbers and no accelerator in every test, whichever tests ran before."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` are skipped, by name, where there is no CUDA device."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_items:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
