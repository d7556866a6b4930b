"""Write the tables of benchmarks/results/evidence.json into docs/evidence.md and the README, between their markers.

A marker names a part and a table, `<!-- evidence: demo-long table1 -->`. With a column and labels as well,
`<!-- evidence: demo-long table1 | Average | AdamW; IVON x10 -->`, it is a short table of that column, with the metrics
side by side. ` without ` and a metric after the table's name leaves that metric out. What follows up to `<!-- end -->`
is made.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import RESULTS, ROOT

from varlora.files import read_json, write_text
from varlora.table import Block, Cell, Line, ResultTable
from varlora.typeset import from_json, to_markdown

DOCUMENTS = (ROOT / "docs" / "evidence.md", ROOT / "README.md")
MARKER = re.compile(r"(<!-- evidence: ([^\n]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def documented(text: str, evidence: dict[str, Any]) -> str:
    """Return a document with what stands between its markers made anew."""

    def made(found: re.Match[str]) -> str:
        what, *kept = (part.strip() for part in found[2].split("|"))
        what, _, without = what.partition(" without ")
        part, name = what.split()
        table = from_json(evidence["parts"][part]["tables"][name])
        table = replace(table, blocks=tuple(block for block in table.blocks if block.title != without))
        if kept:
            column, labels = kept
            table = short(table, column, [label.strip() for label in labels.split(";")])
        return f"{found[1]}\n{to_markdown(table)}\n{found[3]}"

    return MARKER.sub(made, text)


def short(table: ResultTable, column: str, labels: list[str]) -> ResultTable:
    """Return one column of some lines, a column for each metric."""
    blocks = {block.title: {line.label: line for line in block.lines} for block in table.blocks}
    if missing := [label for label in labels if label not in next(iter(blocks.values()))]:
        raise SystemExit(f"{table.name} has no {', '.join(missing)}")

    def text(block: Block, label: str) -> str:
        metric, cell = block.metric, blocks[block.title][label].cells[column]
        assert metric is not None
        error = f" ± {metric.text(cell.stderr)}" if cell.stderr is not None else ""
        noise = "~" if metric.verdict(cell) == "noise" else ""
        change = f" ({metric.text(cell.change, '+')}{noise})" if cell.change is not None else ""
        return f"{metric.text(cell.mean)}{error}{change}"

    lines = [
        Line(label, {block.title: Cell(text=text(block, label)) for block in table.blocks}, first.starred)
        for label in labels
        for first in [blocks[table.blocks[0].title][label]]
    ]
    return replace(
        table, caption=f"{table.caption} ~: noise.", columns=tuple(blocks), blocks=(Block("", tuple(lines)),), notes=()
    )


if __name__ == "__main__":
    for path in DOCUMENTS:
        write_text(path, documented(path.read_text(encoding="utf-8"), read_json(RESULTS / "evidence.json")))
        print(f"wrote {path.relative_to(ROOT)}")
