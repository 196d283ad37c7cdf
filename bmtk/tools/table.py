"""Tables for a terminal."""

import re
from collections.abc import Sequence

NUMBER = re.compile(r"-|[-+]?[\d,]+(\.\d+)?(e[-+]\d+)?( (s|B|kB|MB|GB|TB))?")


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their longest cell, two spaces apart; those that hold numbers only are right-aligned."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    are_numbers = [all(map(NUMBER.fullmatch, column[1:])) for column in columns]
    lines = []
    for row in (header, *rows):
        cells = zip(row, widths, are_numbers, strict=True)
        lines.append("  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells))
    return "\n".join(line.rstrip() for line in lines)


def shown_bytes(number: float) -> str:
    """A size in decimal units: 1,234,567 as "1.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
