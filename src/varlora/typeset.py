"""A table as it is read: in the terminal, in Markdown, LaTeX and HTML, and as JSON.

All show the same: `(+5.6) 72.1` with the standard error behind. A change that may be noise has a `~`, one without
interval a `?`; colours say it as well where there are any. Runs that failed are numbered, with the reasons below.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from varlora.table import Block, Cell, Line, Metric, ResultTable, Verdict
from varlora.templating import environment

__all__ = ["STYLE", "from_json", "to_html", "to_json", "to_latex", "to_markdown", "to_terminal"]

ABSENT = "–"
MARKS: dict[Verdict, str] = {"noise": "~", "untested": "?"}
COLOURS: dict[Verdict, str] = {"better": "blue", "worse": "red", "noise": "gray", "untested": "gray"}
TERMINAL: dict[Verdict, str] = {"better": "bright_blue", "worse": "red", "noise": "dim", "untested": "dim"}
WIDTH = 80  # of a terminal
SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")

STYLE = """\
table.results { border-collapse: collapse; font-variant-numeric: tabular-nums; }
table.results caption { text-align: left; padding-bottom: 0.5em; }
table.results th, table.results td { padding: 0.2em 0.6em; text-align: right; white-space: nowrap; }
table.results thead th:nth-child(2), table.results tbody th { text-align: left; }
table.results th[scope=row] { font-weight: normal; }
table.results th[scope=rowgroup] { vertical-align: top; }
table.results thead tr, table.results tbody { border-bottom: 1px solid currentColor; }
table.results .section { font-style: italic; }
table.results .better { color: #0550ae; }
table.results .worse { color: #b3261e; }
table.results .noise, table.results .untested { color: #6e6e6e; }
"""
"""CSS for what `to_html` returns."""

TEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"$\sim$",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "`": r"\textasciigrave{}",
    "[": "{[}",  # behind \\ and \item it would begin an argument
    "]": "{]}",
    "*": "{*}",
    "-": "{-}",  # no ligatures
    "–": "--",
    "τ": r"$\tau$",
    "×": r"$\times$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
}
PREAMBLE = r"""\documentclass{article}
\usepackage[a3paper,margin=1cm]{geometry}
\usepackage{booktabs}
\usepackage{xcolor}
\begin{document}
"""


@dataclass(frozen=True)
class Shown:
    """The texts of a cell."""

    value: str
    """The mean, a text, `failed`, `–`, or nothing."""
    stderr: str = ""
    change: str = ""
    """With its sign and mark."""
    verdict: Verdict = ""
    """What the change is worth."""
    best: bool = False
    note: str = ""
    """Number of the reason why a run failed."""
    tooltip: str = ""
    """The change's interval and the seeds."""


def to_terminal(table: ResultTable) -> Table:
    """Return the table for a terminal; where it is wider than 80 columns, changes stand in lines of their own.

    Args:
        table: the table.
    """
    reasons = _reasons(table)
    found = Table(
        title=Text(table.title, style="bold"),
        caption=Text("\n".join([_caption(table, colour=True), *_notes(table)])),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=0,
    )
    found.add_column(Text(table.head), overflow="fold")
    for column in table.columns:
        found.add_column(Text(table.heading(column)), justify="right", overflow="fold")

    blocks = [
        (block, [(heading, line, _cells(table, block, line, reasons)) for heading, line in _with_headings(block)])
        for block in table.blocks
    ]

    def cell(shown: Shown, between: str) -> Text:
        text = Text(shown.value, style="bold" if shown.best else "")
        text.append(f"±{shown.stderr}" if shown.stderr else "", style="not bold")
        if shown.change:
            text.append(between)
            text.append(shown.change, style=TERMINAL[shown.verdict])
        text.append(shown.note.translate(SUPERSCRIPT))
        return text

    lines = [[_label(line), *(cell(shown, " ").plain for shown in cells)] for _, of in blocks for _, line, cells in of]
    width = sum(max(map(len, column)) + 1 for column in zip(*lines)) - 1
    between = "\n" if width > WIDTH else " "
    for block, of_block in blocks:
        found.add_section()
        found.add_row(Text(_block_title(block), style="bold"))
        for heading, line, cells in of_block:
            if heading:
                found.add_row(Text(heading, style="italic"))
            found.add_row(Text(_label(line)), *(cell(shown, between) for shown in cells))
    return found


def to_markdown(table: ResultTable) -> str:
    """Return the table in Markdown, the standard errors as subscripts.

    Args:
        table: the table.
    """
    reasons = _reasons(table)

    def cell(shown: Shown) -> str:
        change = f"({_md(shown.change)}) " if shown.change else ""
        value = f"**{_md(shown.value)}**" if shown.best else _md(shown.value)
        note = f" \\[{shown.note}\\]" if shown.note else ""
        return change + value + (f"<sub>{shown.stderr}</sub>" if shown.stderr else "") + note

    def row(*texts: str) -> str:
        return f"| {' | '.join(texts)} |"

    width = len(table.columns)
    lines = [f"**{_md(table.title)}.** {_md(_caption(table, colour=False))}", ""]
    lines.append(row("", _md(table.head), *(_md(table.heading(column)) for column in table.columns)))
    lines.append(row("---", "---", *["---:"] * width))
    for block in table.blocks:
        title = _md(_block_title(block))
        for heading, line in _with_headings(block):
            if heading:
                lines.append(row("", f"*{_md(heading)}*", *[""] * width))
            cells = _cells(table, block, line, reasons)
            lines.append(row(title, _md(_label(line)), *map(cell, cells)))
            title = ""
    notes = [f"- {_md(note)}" for note in _notes(table)]
    return "\n".join([*lines, *(["", *notes] if notes else [])]) + "\n"


def to_latex(table: ResultTable, *, document: bool = False) -> str:
    r"""Return the table in LaTeX, for a document that uses booktabs and xcolor.

    Names are escaped; letters that are not of western Europe lose their accents or become `?`, as pdfLaTeX has no font
    for them.

    Args:
        table: the table.
        document: whether to return a document that compiles as it is, rather than a `table` environment.
    """
    reasons = _reasons(table)

    def cell(shown: Shown) -> str:
        signed = _tex(shown.change).replace("{-}", "$-$")
        change = f"\\textcolor{{{COLOURS[shown.verdict]}}}{{({signed})}} " if shown.change else ""
        value = f"\\textbf{{{_tex(shown.value)}}}" if shown.best else _tex(shown.value)
        note = f"\\textsuperscript{{{{[}}{shown.note}{{]}}}}" if shown.note else ""
        return change + value + (f"$_{{{shown.stderr}}}$" if shown.stderr else "") + note

    def row(*texts: str) -> str:
        return f"{' & '.join(texts)} \\\\"

    width = len(table.columns)
    lines = [
        r"\begin{table}",
        r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
        f"\\caption{{{_tex(f'{table.title}. {_caption(table, colour=True)}')}}}",
        f"\\begin{{tabular}}{{ll{'r' * width}}}",
        r"\toprule",
        row("", _tex(table.head), *(_tex(table.heading(column)) for column in table.columns)),
    ]
    for block in table.blocks:
        lines.append(r"\midrule")
        title = _tex(_block_title(block))
        for heading, line in _with_headings(block):
            if heading:
                lines.append(row("", f"\\textit{{{_tex(heading)}}}", *[""] * width))
            cells = _cells(table, block, line, reasons)
            lines.append(row(title, _tex(_label(line)), *map(cell, cells)))
            title = ""
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [f"\\par\\raggedright {_tex(note)}" for note in _notes(table)]
    text = "\n".join([*lines, r"\end{table}"]) + "\n"
    return f"{PREAMBLE}{text}\\end{{document}}\n" if document else text


def to_html(table: ResultTable) -> str:
    """Return the table as a fragment of HTML; `STYLE` has the CSS of its classes, and intervals are tooltips.

    Args:
        table: the table.
    """
    reasons = _reasons(table)
    blocks = [
        {
            "title": _block_title(block),
            "lines": [
                {
                    "heading": heading,
                    "label": _label(line),
                    "cells": _cells(table, block, line, reasons),
                }
                for heading, line in _with_headings(block)
            ],
        }
        for block in table.blocks
    ]
    return (
        environment(autoescape=True)
        .get_template("table.html.jinja")
        .render(
            title=table.title,
            caption=_caption(table, colour=True),
            head=table.head,
            columns=[table.heading(column) for column in table.columns],
            blocks=blocks,
            notes=_notes(table),
        )
    )


def to_json(table: ResultTable) -> dict[str, Any]:
    """Return the table as plain values, numbers unrounded and in the metrics' own units.

    Args:
        table: the table.
    """
    plain = dataclasses.asdict(table)
    for block, of_block in zip(plain["blocks"], table.blocks):
        for line, of_line in zip(block["lines"], of_block.lines):
            line["cells"] = {column: _cell_json(of_block, cell) for column, cell in of_line.cells.items()}
    return plain


def from_json(plain: Mapping[str, Any]) -> ResultTable:
    """Return the table that `to_json` made plain values of.

    Args:
        plain: the values.
    """

    def line(values: Mapping[str, Any]) -> Line:
        cells = {
            column: Cell(**{name: value for name, value in cell.items() if name != "verdict"})
            for column, cell in values["cells"].items()
        }
        return Line(**{**values, "cells": cells})

    def block(values: Mapping[str, Any]) -> Block:
        metric = Metric(**values["metric"]) if values["metric"] else None
        return Block(**{**values, "lines": tuple(map(line, values["lines"])), "metric": metric})

    blocks = tuple(map(block, plain["blocks"]))
    return ResultTable(**{**plain, "blocks": blocks, **{name: tuple(plain[name]) for name in ("columns", "notes")}})


def _cell_json(block: Block, cell: Cell) -> dict[str, Any]:
    if block.metric is None:
        return {"text": cell.text}
    numbers = {name: value for name, value in dataclasses.asdict(cell).items() if name != "text"}
    return {**numbers, "verdict": block.metric.verdict(cell)}


# --- what all of them show


def _cells(table: ResultTable, block: Block, line: Line, reasons: list[str]) -> list[Shown]:
    return [_shown(block, line.cells.get(column, Cell()), reasons) for column in table.columns]


def _shown(block: Block, cell: Cell, reasons: list[str]) -> Shown:
    if block.metric is None:
        return Shown(cell.text)
    note = str(reasons.index(cell.failed) + 1) if cell.failed else ""
    if cell.mean is None:
        return Shown("failed" if note else ABSENT, note=note)
    metric, verdict = block.metric, block.metric.verdict(cell)
    tooltip = f"{cell.seeds} seed{'s' if cell.seeds != 1 else ''}"
    if cell.low is not None and cell.high is not None:
        tooltip += f"; 95 % interval of the change: {metric.text(cell.low, '+')} to {metric.text(cell.high, '+')}"
    return Shown(
        value=metric.text(cell.mean),
        stderr="" if cell.stderr is None else metric.text(cell.stderr),
        change="" if cell.change is None else metric.text(cell.change, "+") + MARKS.get(verdict, ""),
        verdict=verdict,
        best=cell.best,
        note=note,
        tooltip=tooltip,
    )


def _with_headings(block: Block) -> Iterator[tuple[str, Line]]:
    """Yield each line, with the heading of its section if it is the first one."""
    section = ""
    for line in block.lines:
        yield line.section if line.section != section else "", line
        section = line.section


def _block_title(block: Block) -> str:
    if block.metric is None:
        return block.title
    return f"{block.title} {'↑' if block.metric.larger_is_better else '↓'}"


def _label(line: Line) -> str:
    return line.label + ("*" if line.starred else "")


def _reasons(table: ResultTable) -> list[str]:
    cells = (cell for block in table.blocks for line in block.lines for cell in line.cells.values())
    return list(dict.fromkeys(cell.failed for cell in cells if cell.failed))


def _notes(table: ResultTable) -> list[str]:
    return [*(f"[{i}] {reason}" for i, reason in enumerate(_reasons(table), 1)), *table.notes]


def _caption(table: ResultTable, colour: bool) -> str:
    """Return the caption, with what colours and marks mean if there are any."""
    changes = any(
        cell.change is not None for block in table.blocks for line in block.lines for cell in line.cells.values()
    )
    marks = "~: noise; ?: without interval." if changes else ""
    colours = "Blue: better; red: worse; grey: either of the next two." if changes and colour else ""
    return " ".join(filter(None, (table.caption, colours, marks)))


def _md(text: str) -> str:
    """Return a text as one line that Markdown shows as it is."""
    return "".join(f"\\{char}" if char in "\\`*_|<>[]~#" else char for char in " ".join(text.split()))


def _tex(text: str) -> str:
    """Return a text as LaTeX that shows it as it is, as far as pdfLaTeX has a font for it."""

    def shown(char: str) -> str:
        if char in TEX:
            return TEX[char]
        if (char.isascii() and char.isprintable()) or ("À" <= char <= "ÿ" and char not in "ÐÞðþ÷"):
            return char
        plain = unicodedata.normalize("NFKD", char).encode("ascii", "ignore").decode()
        return "".join(TEX.get(each, each) for each in plain) or "?"

    return "".join(map(shown, " ".join(text.split())))
