"""How this process was started and how bmtk was installed, as somebody else would have to type it."""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from bmtk.process import launcher_options, words_of

from .credentials import without_credentials


def launch_command() -> str:
    """The command line that repeats this run: of the launcher with its own options, if there was one, else of python.

    The launcher's options are read from its process, which Linux alone shows.  Elsewhere, of several processes, only
    their number is known.
    """
    parent = words_of(os.getppid(), "cmdline")
    options = launcher_options(parent, sys.argv)
    variables = words_of(os.getppid() if options else "self", "environ")
    given = sorted(word for word in variables if word.startswith("ACCELERATE_")) if options else []
    started = options or plain_start(sys.argv[0])
    return " ".join(map(quoted, [*given, *started, *program(sys.argv)]))


def plain_start(script: str) -> list[str]:
    """Where no launcher is seen: nothing for a command of its own, else python, or the number of processes."""
    if Path(script).suffix != ".py":
        return []
    processes = os.environ.get("WORLD_SIZE", "1")
    return ["python"] if processes == "1" else ["accelerate", "launch", "--num_processes", processes]


def program(argv: Sequence[str]) -> list[str]:
    """The script and its arguments: the script relative to the working folder, a command by its name."""
    script = Path(argv[0])
    if script.suffix != ".py":
        return [script.name, *argv[1:]]
    if script.is_absolute() and script.is_relative_to(Path.cwd()):
        script = script.relative_to(Path.cwd())
    return [str(script), *argv[1:]]


def quoted(word: str) -> str:
    """A word as a shell reads it; of NAME=value, the value alone is quoted."""
    name, equals, value = word.partition("=")
    return f"{name}={shlex.quote(value)}" if equals and name.isidentifier() else shlex.quote(word)


def install_command() -> str | None:
    """The `pip install` that gives this version, if pip has noted an address on the network that it came from."""
    try:
        noted = json.loads(distribution("big-model-toolkit").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        return None
    url, version = noted.get("url", ""), noted.get("vcs_info", {})
    if not url.startswith("https://"):
        return None
    if version.get("vcs") == "git":
        url = f"git+{url}@{version.get('commit_id', 'HEAD')}"
    return without_credentials(f'pip install "{url}"')
