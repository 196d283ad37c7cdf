"""Memory of a training on a CPU: what a step frees stays with the process, in huge pages."""

import subprocess
import sys
from pathlib import Path

import pytest

from bmtk.training.allocation import addresses_are_free
from bmtk.training.memory import available_memory

CHOICE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")

SIZES = """
import sys, torch
from pathlib import Path
from bmtk.training.allocation import keep_freed_memory

def megabytes(file, name):
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

at_first = megabytes("status", "VmRSS")
if sys.argv[1] != "no":
    keep_freed_memory(torch.device(sys.argv[1]))
before = megabytes("status", "VmRSS")
block = torch.ones(64 * 2**20)  # 256 MB
huge = megabytes("smaps_rollup", "AnonHugePages")
del block
print(before - at_first, megabytes("status", "VmRSS") - before, huge)
"""


@pytest.fixture(scope="module")
def sizes():
    """For each device: megabytes taken by the call, left of 256 after they were freed, and of them in huge pages."""
    found = {}
    for device in ("no", "cuda", "cpu"):
        done = subprocess.run([sys.executable, "-c", SIZES, device], capture_output=True, text=True, check=True)
        found[device] = [float(word) for word in done.stdout.split()]
    return found


def test_a_freed_block_is_kept_where_a_cpu_trains_and_given_back_elsewhere(sizes):
    left = {device: found[1] for device, found in sizes.items()}
    assert left["cpu"] > 200
    assert max(left["no"], left["cuda"]) < 100


@pytest.mark.skipif(not CHOICE.exists() or "[never]" in CHOICE.read_text(), reason="this kernel grants none")
@pytest.mark.skipif(not addresses_are_free() or available_memory() < 2**31, reason="no room for them")
def test_blocks_lie_in_huge_pages_where_a_cpu_trains_and_none_is_taken_in_advance(sizes):
    taken, _, huge = sizes["cpu"]
    assert huge > 200
    assert taken < 20
