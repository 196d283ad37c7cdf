"""Class labels: what a value in a column is called, in which order labels stand, and which id a model gives them."""

import math
from collections.abc import Collection, Iterable, Sequence

from bmtk.errors import UserError

from .printed import looks_printed


def label_name(value: object, names: Sequence[str] | None, where: str) -> str:
    """The label as a word: a string without the blanks around it, an integer by `names` if these are given, else as
    its digits.

    Raises: UserError, naming the place `where`, for a missing value, a fraction, a number that has no name, or what
    is no word.
    """
    value = value.strip() if isinstance(value, str) else value
    if isinstance(value, float) and value.is_integer():  # how a column of integers with a gap is read
        value = int(value)
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise UserError(f"{where} is empty; label the row or take it out")
    if isinstance(value, float):
        raise UserError(f"{where} holds {value}; a label is a string or an integer")
    if looks_printed(value) or isinstance(value, list | dict | bytes):
        raise UserError(
            f"{where} holds {str(value)[:60]}, and a label is one word or number; several labels of a row are a list: "
            "in CSV every cell of the column must then be such a list, whole and with commas"
        )
    name = str(value)
    names = [known.strip() for known in names or ()]
    if not names or name in names:
        return name
    if not is_integer(name) or not 0 <= int(name) < len(names):
        raise UserError(
            f"{where} holds {name!r}, which is neither one of label_names ({some(names)}) nor the number of one"
        )
    return names[int(name)]


def note_blanks(values: Iterable[object], notes: list[str], *, option: str, where: str) -> None:
    """Note how many labels, or lists of them, have blanks around them, which `label_name` takes off."""
    flat = (item for value in values for item in (value if isinstance(value, list) else [value]))
    found = [item for item in flat if isinstance(item, str) and item != item.strip() and item.strip()]
    if found:
        notes.append(f"{option}: {len(found):,} {where} labels have blanks around them, taken off: {found[0]!r}")


def in_order(names: Collection[str]) -> list[str]:
    """Numbers by size, words by alphabet."""
    return sorted(names, key=int) if all(map(is_integer, names)) else sorted(names)


def ids_of_known(names: Collection[str], known: Sequence[str]) -> dict[str, int] | None:
    """Name -> id for a model that knows the labels `known`: by name, else by number; None if `names` are others.

    >>> ids_of_known({"bad", "good"}, ["good", "bad"])
    {'good': 0, 'bad': 1}
    >>> ids_of_known({"0", "1"}, ["good", "bad"])
    {'0': 0, '1': 1}
    """
    known = [name.strip() for name in known]  # a model may have been trained on labels with blanks
    if set(names) <= set(known):
        return {name: index for index, name in enumerate(known)}
    if known and all(is_integer(name) and 0 <= int(name) < len(known) for name in names):
        return {str(index): index for index in range(len(known))}
    return None


def agreed_labels(
    found: Collection[str], known: Sequence[str], names: Sequence[str], *, is_trained: bool
) -> tuple[list[str], dict[str, int]]:
    """The labels of a model in order, and the id of each name: what it knows already, else `names`, those of the data.

    `found` are the names in all rows.
    Raises: UserError if a model that is not trained any more knows none of them.
    """
    ids = ids_of_known(found, known)
    if ids is None and known and not is_trained:
        raise UserError(f"the data has labels {some(names)}, and the model knows others: {some(known)}")
    labels = list(known if ids else names)
    return labels, ids or {name: index for index, name in enumerate(labels)}


def is_integer(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def some(names: Iterable[str]) -> str:
    """The first ten of `names`, for an error message."""
    names = sorted(names) if isinstance(names, set) else list(names)
    return ", ".join(map(repr, names[:10])) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")
