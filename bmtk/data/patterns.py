"""Names that stand for several files: `{000..017}` and `{a,b}`, `*`, `?`, `[...]`, and `**` for any depth."""

import glob
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from bmtk.errors import UserError

from .text_files import suffix_of

BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{},]*(?:,[^{},]*)+))\}")  # a range of numbers, or words
WILDCARDS = re.compile(r"[*?]|\[.+\]")


def is_pattern(name: str) -> bool:
    """Whether a name may stand for several files; a file of this very name is one file all the same."""
    return bool(WILDCARDS.search(name) or BRACES.search(name))


def without_braces(name: str) -> list[str]:
    """The names that braces stand for, in order: "{08..10}" keeps the zeros, as in WebDataset and shells."""
    found = BRACES.search(name)
    if found is None:
        return [name]
    first, last, words = found.groups()
    if words is None:
        step = 1 if int(first) <= int(last) else -1
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        choices = [f"{number:0{width}}" for number in range(int(first), int(last) + step, step)]
    else:
        choices = words.split(",")
    head, tail = name[: found.start()], name[found.end() :]
    return [one for choice in choices for one in without_braces(f"{head}{choice}{tail}")]


def matching_files(name: str, suffixes: Sequence[str], *, option: str) -> list[Path]:
    """The files that a pattern stands for: those of braces in the order given, those of wildcards by name.

    Names without a wildcard are not looked for.  Raises: UserError for wildcards that match nothing.
    """
    if Path(name).expanduser().exists():
        return [Path(name).expanduser()]
    return list(dict.fromkeys(chain.from_iterable(_matches(one, suffixes, option) for one in without_braces(name))))


def _matches(name: str, suffixes: Sequence[str], option: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.exists() or not WILDCARDS.search(name):
        return [path]
    found = sorted(match for match in glob.glob(str(path), recursive=True) if suffix_of(Path(match)) in suffixes)
    if not found:
        raise UserError(
            f"{option}={name!r} matches no file that ends in {', '.join(suffixes)} (looked in {Path.cwd()})"
        )
    return [Path(match) for match in found]
