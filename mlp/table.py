"""Text tables."""

from collections.abc import Iterable, Sequence


def as_text(fields: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of aligned columns, with the names of the fields in its first line."""
    table = [fields, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(fields))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )
