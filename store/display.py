"""What notebooks show of a store, its moments and its bases: a title and a table."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

SHOWN = 12  # rows of a table; the others are counted


def html_table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]], count: int) -> str:
    """A table of the first rows of `count`, in HTML; every text is escaped, since a store may come from a stranger."""
    lines = [f"<p><b>{html.escape(title)}</b></p><table><thead><tr>"]
    lines += [f"<th>{html.escape(name)}</th>" for name in head]
    lines.append("</tr></thead><tbody>")
    for row, _ in zip(rows, range(SHOWN), strict=False):
        lines.append("".join(["<tr>", *(f"<td>{html.escape(str(cell))}</td>" for cell in row), "</tr>"]))
    lines.append("</tbody></table>")
    lines += [f"<p>and {count - SHOWN:,} more</p>"] if count > SHOWN else []
    return "".join(lines)
