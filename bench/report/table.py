"""A table as data, and as Markdown and LaTeX; the page lays it out in HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TableCell:
    """One entry of a table: the value, under it what is to be known of it, and whether it stands out."""

    value: str
    note: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Column:
    """The head of a column.

    Attributes:
        group: what several columns side by side have in common; empty for none.
        note: under the label: which way is better, whether it was trained on.
    """

    label: str
    group: str = ""
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A line of a table; its color is that of an entry (``entry-0``, ...) or empty."""

    label: str
    cells: Sequence[TableCell]
    note: str = ""
    color: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under columns; ``first`` is the head of the rows' labels."""

    title: str
    first: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    about: str = field(default="", kw_only=True)

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The columns' groups in order, each with how many columns it spans; empty if no column has one."""
        found: list[tuple[str, int]] = []
        for column in self.columns:
            if found and found[-1][0] == column.group:
                found[-1] = column.group, found[-1][1] + 1
            else:
                found.append((column.group, 1))
        return found if any(name for name, _ in found) else []


def markdown(tables: Iterable[Table]) -> str:
    """All tables under each other, with their titles."""
    parts = []
    for table in tables:
        heads = [f"{column.group}: {column.label}" if column.group else column.label for column in table.columns]
        notes = [f" ({column.note})" if column.note else "" for column in table.columns]
        lines = [_line([table.first, *(head + note for head, note in zip(heads, notes, strict=True))])]
        lines.append("|" + "---|" * (len(heads) + 1))
        for row in table.rows:
            lines.append(_line([_noted(row.label, row.note), *(_markdown_cell(cell) for cell in row.cells)]))
        about = f"{_escaped(table.about)}\n\n" if table.about else ""
        parts.append(f"## {_escaped(table.title)}\n\n{about}" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def latex(tables: Iterable[Table]) -> str:
    """All tables as ``table`` environments for booktabs, in the order given."""
    parts = ["% \\usepackage{booktabs}"]
    for table in tables:
        lines = ["\\begin{table}", f"\\caption{{{_tex(table.title)}}}"]
        lines += [f"\\begin{{tabular}}{{l{'r' * len(table.columns)}}}", "\\toprule"]
        if table.groups:
            spans = [f"\\multicolumn{{{width}}}{{c}}{{{_tex(name)}}}" for name, width in table.groups]
            lines.append(" & ".join(["", *spans]) + " \\\\")
        lines.append(" & ".join([_tex(table.first), *(_tex(column.label) for column in table.columns)]) + " \\\\")
        lines.append("\\midrule")
        for row in table.rows:
            lines.append(" & ".join([_tex(row.label), *(_tex_cell(cell) for cell in row.cells)]) + " \\\\")
        lines += ["\\bottomrule", "\\end{tabular}", "\\end{table}"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is; only the strong marks of our own are made after it."""
    safe = re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(text.split()))
    return safe.replace("\ue000", "**")


def _markdown_cell(cell: TableCell) -> str:
    return _noted(f"\ue000{cell.value}\ue000" if cell.strong else cell.value, cell.note)


def _noted(text: str, note: str) -> str:
    return f"{text} ({note})" if note else text


_TEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{EN DASH}": "--",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    **{character: f"\\{character}" for character in "&%$#_"},
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in " ".join(text.split()))


def _tex_cell(cell: TableCell) -> str:
    value = f"\\textbf{{{_tex(cell.value)}}}" if cell.strong else _tex(cell.value)
    return f"{value} {{\\scriptsize ({_tex(cell.note)})}}" if cell.note else value
