"""A process dies in the middle of a run, or two machines (launchers on loopback) share no folder."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import arguments, read_history, run

import bmtk

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("machine_faults.py")
ENVIRONMENT = os.environ | {
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(bmtk.__file__).parents[1]),
}


def launchers(*words_of_each: list[str], processes: int) -> list[tuple[int, str]]:
    """Exit status and standard error of a launcher for each list of words, which starts as many processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    count = str(len(words_of_each))
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", count, "--nproc_per_node", str(processes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    started = [
        subprocess.Popen([*command, str(SCRIPT), *words], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        for words in words_of_each
    ]
    try:
        errors = [launcher.communicate(timeout=120)[1] for launcher in started]
    finally:
        for launcher in started:
            launcher.terminate()
    return [(launcher.returncode, error) for launcher, error in zip(started, errors, strict=True)]


def test_a_process_that_dies_ends_the_others_and_the_same_command_goes_on(tmp_path):
    run(arguments(tmp_path / "one", adam_epsilon=1e-4), dropout=0.0)
    ((status, error),) = launchers([str(tmp_path / "two"), "kill"], processes=2)
    assert status == 1
    assert "exitcode: -9" in error
    ((status, error),) = launchers([str(tmp_path / "two")], processes=2)
    assert status == 0, error
    for one, other in zip(read_history(tmp_path / "one"), read_history(tmp_path / "two"), strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6)
    weights = load_file(tmp_path / "one" / "model.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "two" / "model.safetensors"), weights, rtol=1e-5, atol=3e-6)


def test_a_process_that_waits_too_long_says_for_what_and_for_whom(tmp_path):
    ((status, error),) = launchers([str(tmp_path), "sleep"], processes=2)
    assert status == 1
    (line,) = [line for line in error.splitlines() if line.startswith("error: waited")]
    assert "waited 3 seconds (timeout_minutes=0.05) for other processes, in step 4 (" in line
    assert "process 1 of 2 has not come; look at what they print" in line
    assert line.endswith("raise timeout_minutes")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_machines_that_share_no_folder_stop_with_one_error_and_leave_no_checkpoint(tmp_path):
    done = launchers([str(tmp_path / "here")], [str(tmp_path / "there")], processes=1)
    assert all(status for status, _ in done)
    assert any("is another folder for process 1 on" in error for _, error in done)
    assert not list(tmp_path.rglob("step-*"))
