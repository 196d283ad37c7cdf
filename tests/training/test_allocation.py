"""Freed memory stays with the process where a CPU trains."""

import subprocess
import sys

import pytest

LEFT = """
import sys, torch
from pathlib import Path
from bmtk.training.allocation import keep_freed_memory

def megabytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

if sys.argv[1] != "no":
    keep_freed_memory(torch.device(sys.argv[1]))
before = megabytes()
block = torch.ones(64 * 2**20)  # 256 MB
del block
print(megabytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_a_freed_block_is_kept_where_a_cpu_trains_and_given_back_elsewhere():
    left = {}
    for device in ("no", "cuda", "cpu"):
        done = subprocess.run([sys.executable, "-c", LEFT, device], capture_output=True, text=True, check=True)
        left[device] = float(done.stdout)
    assert left["cpu"] > 200
    assert max(left["no"], left["cuda"]) < 100
