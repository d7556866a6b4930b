"""Write the tables of benchmarks/results/evidence.json into docs/evidence.md and the README, between their markers.

A marker names a part and a table, `<!-- evidence: demo-long table1 -->`, and optionally the columns and labels to keep:
`<!-- evidence: demo-long table1 | Average | AdamW, IVON@mean, IVON x10 -->`. What follows up to `<!-- end -->` is made.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import RESULTS, ROOT

from varlora.run import read_json, write_text
from varlora.tables import ResultTable
from varlora.typeset import from_json, to_markdown

DOCUMENTS = (ROOT / "docs" / "evidence.md", ROOT / "README.md")
MARKER = re.compile(r"(<!-- evidence: ([^\n]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def documented(text: str, evidence: dict[str, Any]) -> str:
    """Return a document with what stands between its markers made anew."""

    def made(found: re.Match[str]) -> str:
        what, *kept = (part.strip() for part in found[2].split("|"))
        part, name = what.split()
        table = from_json(evidence["parts"][part]["tables"][name])
        if kept:
            columns, labels = ([one.strip() for one in part.split(",")] for part in kept)
            table = selected(table, columns, labels)
        return f"{found[1]}\n{to_markdown(table)}\n{found[3]}"

    return MARKER.sub(made, text)


def selected(table: ResultTable, columns: list[str], labels: list[str]) -> ResultTable:
    """Return some columns and lines of a table."""
    if missing := {*columns} - {*table.columns} | {*labels} - {line.label for line in table.blocks[0].lines}:
        raise SystemExit(f"the table {table.name} has no {', '.join(sorted(missing))}")
    blocks = tuple(
        replace(block, lines=tuple(line for line in block.lines if line.label in labels)) for block in table.blocks
    )
    return replace(table, columns=tuple(columns), blocks=blocks)


if __name__ == "__main__":
    for path in DOCUMENTS:
        write_text(path, documented(path.read_text(encoding="utf-8"), read_json(RESULTS / "evidence.json")))
        print(f"wrote {path.relative_to(ROOT)}")
