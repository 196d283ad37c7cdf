"""The memory of this process and its machine: what a process has had, and what there is left."""

import os
import resource
import sys
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")  # of a container its own


def peak_memory() -> int:
    """The most bytes that this process has held at a time."""
    try:  # ru_maxrss of a child is, on Linux, at least what its parent held when it started it
        facts = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
        return int(facts["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_memory() -> int:
    """Bytes of memory that this machine, or container, could still give; all that it has, where it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            facts = dict(line.split(":") for line in file)
        return min(int(facts["MemAvailable"].split()[0]) * 1024, _left_to_group(CONTROL_GROUPS))
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _left_to_group(folder: Path) -> int:
    """Bytes below the limit of a control group (cgroup v2), as a container has; a large number where there is none."""
    try:
        limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))  # or "max"
        facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return limit - used + int(facts["inactive_file"])  # which the system takes back when it needs to
    except (OSError, KeyError, ValueError):
        return sys.maxsize
