"""Lists, dictionaries and bytes that were printed into the cells of a text table, as by pandas: made values again."""

import ast
import contextlib
import io
import json
import re
import tokenize
from collections.abc import Sequence
from typing import Any

# How printed values begin; "[deleted]", "[0, 10)" and "(sic)" do not.
PRINTED = re.compile(r"""\s*(\[\s*(['"{]|\[|array\()|[({]\s*['"]|b'|b"|array\(\[)""")
NUMBERS = re.compile(r"\[[\s\d.eE+-]*\]")  # as numpy prints them: no comma between
ENDS = {"[": "]", "{": "}", "(": ")"}
SHOWN = 60  # characters of a cell


def looks_printed(cell: object) -> bool:
    """Whether a text looks like a list, a dictionary or bytes that were printed."""
    return isinstance(cell, str) and PRINTED.match(cell) is not None


def printed_values(cells: Sequence[str]) -> list[Any] | None:
    """The values of a column whose every cell is a printed one, or empty (then None); None for other columns."""
    kinds = printed_kinds(cells)
    return [printed_value(cell) for cell in cells] if kinds is not None and len(kinds) == 1 else None


def printed_kinds(cells: Sequence[str]) -> set[str] | None:
    """The names of the types of cells that are all printed values, or empty; None if another is among them."""
    kinds = set()
    for cell in cells:
        value = printed_value(cell)
        if value is not None:
            kinds.add(_kind(value))
        elif cell.strip():
            return None
    return kinds


def printed_value(cell: str) -> Any:
    """What a cell was before it was printed: a list, a dictionary, or the text of bytes; None for other cells."""
    text = cell.strip()
    if text[:2] in ("b'", 'b"') or (text and ENDS.get(text[0]) == text[-1]):
        with contextlib.suppress(ValueError):
            value = json.loads(text)
            return value if isinstance(value, list | dict) else None
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError):
            return _python_value(text)
    return None


def _python_value(text: str) -> Any:
    """Raises: ValueError or SyntaxError for what is no literal."""
    if NUMBERS.fullmatch(text):
        return [ast.literal_eval(number) for number in text[1:-1].split()]
    tokens = list(tokenize.generate_tokens(io.StringIO(" ".join(text.split("\n"))).readline))
    strings = [token.string for token in tokens if token.type == tokenize.STRING]
    tree = ast.parse(text, mode="eval")
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    if len(strings) > len(constants) > 0:  # numpy prints no commas, and Python would join 'a' 'b' to one word
        is_flat = all(token.string in "[]" or token.type != tokenize.OP for token in tokens)
        return [ast.literal_eval(string) for string in strings] if is_flat else None
    value = ast.literal_eval(tree)
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, list | dict) else None


def _kind(value: Any) -> str:
    return type(value).__name__
