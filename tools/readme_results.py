"""The README's tables of results from bench/results: `python tools/readme_results.py [--write]`.

Without `--write` it only says whether the README is out of date; a test holds it to it.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from dgpo_bench.report.comparison import Comparison, read_comparison
from dgpo_bench.report.leaderboard import leaderboard_tables
from dgpo_bench.report.table import markdown
from dgpo_bench.report.verdict import hindsight
from dgpo_plugin.common.files import write_text_atomically

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- results: made by tools/readme_results.py -->\n", "<!-- end of results -->"
SHOWN = 5
"""Columns: value and gain in domain, the same out of domain, and the guidance."""


def tables() -> str:
    """A caption and a table for each comparison in bench/results, in the order of their names."""
    folders = sorted(path.parent for path in RESULTS.glob("*/results.json"))
    return "\n".join(_section(folder.name, read_comparison(folder)) for folder in folders)


def _section(name: str, comparison: Comparison) -> str:
    (table, *_) = leaderboard_tables([(name, comparison)])
    rows = [replace(row, cells=row.cells[:SHOWN]) for row in table.rows]
    short = replace(table, columns=table.columns[:SHOWN], rows=rows, about="")
    told = f"\n{sentence}\n" if (sentence := hindsight(comparison)) else ""
    return f"{_caption(name, comparison)}\n\n{markdown([short]).partition(chr(10) * 2)[2]}{told}"


def _caption(name: str, comparison: Comparison) -> str:
    """What was run, where and when, and how many iterations its budget came to."""
    results = comparison.results
    done = []
    for entry, record in results.entries.items():
        counts = sorted(cell.checkpoints[-1].iteration for cell in results.cells_of(entry).values() if cell.checkpoints)
        if counts and counts[-1]:
            span = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
            done.append(f"{span} iterations of {record.label}")
    commits = [each[:7] for each in results.git_hash.split(", ")]
    named = " and ".join(filter(None, [", ".join(commits[:-1]), commits[-1]]))
    machine = f"{results.machine['cpu']}, {results.machine['cores']} cores, {results.sampling.precision}"
    return (
        f"**[`{name}`](bench/results/{name})**: `{results.command}`, {results.created[:10]}, "
        f"commit{'s' if len(commits) > 1 else ''} {named}, {machine}. "
        f"{results.budget} of training a run: {', '.join(done)}."
    )


def page() -> str:
    """The README with its tables as they should be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + tables() + END + after


def main() -> None:
    """Write the README, or say that it is out of date."""
    if PAGE.read_text(encoding="utf-8") == page():
        return
    if "--write" not in sys.argv:
        raise SystemExit(f"{PAGE.relative_to(ROOT)}: out of date; run: python tools/readme_results.py --write")
    write_text_atomically(PAGE, page())


if __name__ == "__main__":
    main()
