"""What tables look like: every form shows the same, names cannot break it, and LaTeX compiles."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console
from tables_helpers import evaluated, failure, rows, seeds, settings_of

from varlora.paper import beside_paper, paper
from varlora.table import PAPER_METRICS, Block, Cell, Line, ResultTable
from varlora.tables import beyond, table1, table2, table3
from varlora.typeset import STYLE, from_json, to_html, to_json, to_latex, to_markdown, to_terminal

HOSTILE = r"""<b>&amp; 50% of $x_1^2$ | \input{a} #1 ~[red]{} `c` "q" * naïve Łódź τ 猫 þ"""
ACCURACY = PAPER_METRICS[0]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    lost = evaluated("boolq", "ivon", seed=9, folder=folder)
    runs = [
        run
        for task in ("winogrande_s", "arc_easy", "boolq")
        for run in [*seeds(task, temperature=2.0), *seeds(task, "ivon", skill=0.8, noise=3.0, own=0.5)]
    ]
    failed = [failure(lost, "out of memory on gpu_0 & more")]
    found = rows(*runs)
    made = [
        table1(found, failed=failed, replicates=50),
        beyond(found, replicates=50),
        table2(runs),
        table3(settings_of(runs)),
    ]
    return {table.name: beside_paper(table) for table in made}


@pytest.fixture(scope="module")
def hostile():
    lines = (
        Line(HOSTILE, {HOSTILE: Cell(0.5, 0.1, 0.1, 0.05, 0.2, 3)}),
        Line("- item", {HOSTILE: Cell(failed=HOSTILE)}, section=HOSTILE),
    )
    blocks = (
        Block("ACC", lines, ACCURACY),
        Block(HOSTILE, (Line("[x] setting", {HOSTILE: Cell(text=HOSTILE)}),)),
    )
    return ResultTable("table1", HOSTILE, HOSTILE, HOSTILE, (HOSTILE,), blocks, (HOSTILE,))


@pytest.fixture(scope="module")
def shades():
    """One cell of each kind."""
    cells = {
        "better": Cell(0.721, 0.005, 0.056, 0.03, 0.08, 3),
        "worse": Cell(0.663, 0.006, -0.04, -0.06, -0.01, 3),
        "noise": Cell(0.7, 0.005, 0.003, -0.01, 0.02, 3),
        "untested": Cell(0.7, 0.005, 0.003, seeds=3),
        "one seed": Cell(0.7, seeds=1),
        "failed": Cell(failed="run 1 failed: out of memory"),
        "partly": Cell(0.7, 0.005, 0.003, -0.01, 0.02, 2, failed="run 2 failed: cut"),
        "best": Cell(0.8, 0.001, seeds=3, best=True),
    }
    lines = (Line("IVON@mean", cells, True), Line("+ SWA", {}))
    return ResultTable("table1", "Title", "Caption.", "Method", tuple(cells), (Block("ACC (%)", lines, ACCURACY),))


def printed(table, width=80):
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(to_terminal(table))
    return console.export_text()


def markdown_cells(text):
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def html_rows(text):
    tree = ElementTree.fromstring(f"<div>{text}</div>")
    return [list(row) for row in tree.iter("tr")]


# --- each kind of cell


def test_markdown_shows_each_kind_of_cell(shades):
    text = to_markdown(shades)
    _, _, mine, other = markdown_cells(text)
    assert mine == [
        "ACC (%) ↑",
        r"IVON@mean\*",
        "(+5.6) 72.1<sub>0.5</sub>",
        "(-4.0) 66.3<sub>0.6</sub>",
        r"(+0.3\~) 70.0<sub>0.5</sub>",
        "(+0.3?) 70.0<sub>0.5</sub>",
        "70.0",
        r"failed \[1\]",
        r"(+0.3\~) 70.0<sub>0.5</sub> \[2\]",
        "**80.0**<sub>0.1</sub>",
    ]
    assert other == ["", "+ SWA", *["–"] * 8]
    assert "- \\[1\\] run 1 failed: out of memory\n- \\[2\\] run 2 failed: cut\n" in text
    assert "noise" in text
    assert "Blue" not in text  # Markdown has no colours


def test_latex_shows_each_kind_of_cell(shades):
    lines = to_latex(shades).splitlines()
    (mine,) = [line for line in lines if "IVON@mean" in line]
    assert mine.removesuffix(r" \\").split(" & ") == [
        r"ACC (\%) $\uparrow$",
        "IVON@mean{*}",
        r"\textcolor{blue}{(+5.6)} 72.1$_{0.5}$",
        r"\textcolor{red}{($-$4.0)} 66.3$_{0.6}$",
        r"\textcolor{gray}{(+0.3$\sim$)} 70.0$_{0.5}$",
        r"\textcolor{gray}{(+0.3?)} 70.0$_{0.5}$",
        "70.0",
        r"failed\textsuperscript{{[}1{]}}",
        r"\textcolor{gray}{(+0.3$\sim$)} 70.0$_{0.5}$\textsuperscript{{[}2{]}}",
        r"\textbf{80.0}$_{0.1}$",
    ]


def test_html_shows_each_kind_of_cell_by_class_and_the_interval_as_tooltip(shades):
    text = to_html(shades)
    mine = html_rows(text)[1]
    assert ["".join(cell.itertext()) for cell in mine] == [
        "ACC (%) ↑",
        "IVON@mean*",
        *("(+5.6) 72.10.5", "(-4.0) 66.30.6", "(+0.3~) 70.00.5", "(+0.3?) 70.00.5"),
        *("70.0", "failed[1]", "(+0.3~) 70.00.5[2]", "80.00.1"),
    ]
    assert [cell.find("span").get("class") for cell in mine[2:6]] == ["better", "worse", "noise", "untested"]
    assert [cell.find("sub").text for cell in mine[2:4]] == ["0.5", "0.6"]
    assert mine[2].get("title") == "3 seeds; 95 % interval of the change: +3.0 to +8.0"
    assert mine[6].get("title") == "1 seed"
    assert mine[9].find("strong").text == "80.0"
    assert "style=" not in text
    classes = set(re.findall(r'class="(\w+)"', text)) - {"notes"}
    assert classes == {"results", "better", "worse", "noise", "untested"}
    assert all(f".{name}" in STYLE for name in classes)


def test_the_terminal_shows_each_kind_of_cell_with_its_colour(shades):
    text = printed(shades, 200)
    (mine,) = [line for line in text.splitlines() if "IVON@mean" in line]
    values = "IVON@mean* 72.1±0.5 66.3±0.6 70.0±0.5 70.0±0.5 70.0 failed¹ 70.0±0.5 80.0±0.1"
    assert mine.split() == values.split()
    assert text.splitlines()[text.splitlines().index(mine) + 1].split() == ["+5.6", "-4.0", "+0.3~", "+0.3?", "+0.3~²"]
    console = Console(width=200, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(to_terminal(shades))
    coloured = console.file.getvalue()
    assert "\x1b[94m+5.6" in coloured
    assert "\x1b[31m-4.0" in coloured
    assert "\x1b[2m+0.3~" in coloured
    assert "\x1b[1m80.0\x1b[0m±0.1" in coloured


def test_json_has_the_numbers_unrounded_and_what_they_are_worth(shades):
    plain = json.loads(json.dumps(to_json(shades), allow_nan=False))
    cells = plain["blocks"][0]["lines"][0]["cells"]
    assert cells["better"] == {
        "mean": 0.721,
        "stderr": 0.005,
        "change": 0.056,
        "low": 0.03,
        "high": 0.08,
        "seeds": 3,
        "failed": "",
        "best": False,
        "verdict": "better",
    }
    assert cells["failed"]["mean"] is None
    assert plain["blocks"][0]["metric"] == dataclasses.asdict(ACCURACY)
    assert to_json(paper()["table3"])["blocks"][0]["lines"][2]["cells"] == {"All tasks": {"text": "0.03"}}


# --- whole tables


@pytest.mark.parametrize("name", ["table1", "beyond", "table2", "table3"])
def test_a_table_comes_back_from_json(tables, name):
    table = tables[name]
    back = from_json(json.loads(json.dumps(to_json(table))))
    assert (back.columns, back.notes, to_json(back)) == (table.columns, table.notes, to_json(table))
    assert to_markdown(back) == to_markdown(table)


@pytest.mark.parametrize("name", ["table1", "beyond", "table2", "table3"])
def test_all_forms_show_the_same(tables, name):
    """Markdown's and LaTeX's cells, and HTML's, but for markup."""
    table = tables[name]
    markdown = [
        [re.sub(r"</?sub>|\*\*|(?<!\\)\*", "", cell).replace("\\", "") for cell in row]
        for row in markdown_cells(to_markdown(table))
    ]
    header, _, *body = markdown
    in_html = [["".join(cell.itertext()) for cell in row] for row in html_rows(to_html(table))]
    plain = [[cell.replace(" [", "[") for cell in row] for row in body]
    assert in_html[0] == header
    assert [row + [""] * (len(header) - len(row)) for row in in_html[1:]] == plain
    assert {len(row) for row in markdown} == {2 + len(table.columns)}
    latex = [line.split(" & ") for line in to_latex(table).splitlines() if line.endswith(r" \\")]
    assert len(latex) == 1 + len(body)
    assert {len(row) for row in latex} == {2 + len(table.columns)}


@pytest.mark.parametrize("name", ["table1", "beyond", "table2", "table3"])
def test_three_tasks_are_readable_in_80_columns(tables, name):
    text = printed(tables[name])
    assert max(map(len, text.splitlines())) <= 80
    for block in tables[name].blocks:
        for line in block.lines:
            assert line.label in text
            for cell in line.cells.values():
                if block.metric is None:
                    assert cell.text in text
                elif cell.mean is not None:
                    value = block.metric.text(cell.mean)
                    assert (value if cell.stderr is None else f"{value}±{block.metric.text(cell.stderr)}") in text
                if cell.change is not None:
                    assert block.metric.text(cell.change, "+") in text
    assert "…" not in text


def test_notes_and_reasons_are_in_every_form(tables):
    table = tables["table1"]
    for text in (to_markdown(table), to_latex(table), to_html(table), printed(table)):
        assert "out of memory on gpu" in " ".join(text.split())
        assert "50 bootstrap replicates" in " ".join(text.split())


# --- names that would be read as markup


def test_names_cannot_break_html(hostile):
    texts = ["".join(cell.itertext()) for row in html_rows(to_html(hostile)) for cell in row]
    assert texts.count(HOSTILE) >= 4


def test_names_cannot_break_markdown(hostile):
    found = markdown_cells(to_markdown(hostile))
    assert {len(row) for row in found} == {3}
    assert not re.search(r"(?<!\\)<(?!/?sub>)", to_markdown(hostile))


def test_names_cannot_break_the_terminal(hostile):
    assert "[red]{}" in printed(hostile, 400)


def syntax_problems(text):
    """Return what is wrong with LaTeX as our tables use it: braces, environments, columns, characters."""
    found = []
    bare = re.sub(r"\\[\\{}$&%#_]", "", text)  # escaped
    depth = 0
    for char in bare:
        depth += (char == "{") - (char == "}")
        if depth < 0:
            found.append("a brace closes nothing")
            break
    if depth > 0:
        found.append("a brace is not closed")
    opened = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if kind == "begin":
            opened.append(name)
        elif not opened or opened.pop() != name:
            found.append(f"\\end{{{name}}} ends nothing")
    found += [f"{name} does not end" for name in opened]
    (columns,) = re.findall(r"\\begin\{tabular\}\{([lr]+)\}", text)
    for line in text.split("\\toprule")[1].split("\\bottomrule")[0].splitlines():
        if line.endswith("\\\\") and len(re.findall(r"(?<!\\)&", line)) != len(columns) - 1:
            found.append(f"{line} has other columns than {columns}")
    for line in bare.splitlines():
        if line.count("$") % 2:
            found.append(f"{line} has an odd number of $")
    outside = re.sub(r"\$[^$]*\$", "", bare)
    found += [f"a bare {char}" for char in "_^#%~" if char in outside]
    found += [f"{char} has no font" for char in sorted(set(text)) if ord(char) > 255]
    return found


@pytest.mark.parametrize("name", ["table1", "beyond", "table2", "table3", "hostile"])
def test_latex_has_no_syntax_errors(tables, hostile, name):
    table = tables.get(name, hostile)
    assert syntax_problems(to_latex(table)) == []
    assert syntax_problems(to_latex(table, document=True)) == []


@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        (r"\end{table}", "", "does not end"),
        (r"\textbf{", r"\textbf", "closes nothing"),
        (" & ", " ", "other columns"),
        (r"(\%)", "(%)", "bare %"),
        (r"$_{", "$$_{", "odd number"),
        ("IVON", "IV☃N", "no font"),
    ],
)
def test_the_syntax_check_finds_errors(tables, right, wrong, problem):
    text = to_latex(tables["table2"])
    assert right in text
    assert any(problem in found for found in syntax_problems(text.replace(right, wrong)))


@pytest.mark.parametrize("name", ["table1", "beyond", "table2", "table3", "hostile"])
def test_latex_compiles(tables, hostile, name, tmp_path):
    if shutil.which("pdflatex") is None:
        pytest.skip("pdflatex is absent: install TeX to compile what the syntax check has read")
    (tmp_path / "table.tex").write_text(to_latex(tables.get(name, hostile), document=True), encoding="utf-8")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "table.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "table.pdf").stat().st_size > 1000
    assert "Float too large" not in done.stdout


def test_a_table_without_lines_can_be_written(tmp_path):
    empty = table2([])
    assert "ACC (%) ↑" in printed(empty)
    assert markdown_cells(to_markdown(empty)) == [["", "τ"], ["---", "---"]]
    assert len(html_rows(to_html(empty))) == 1
    assert syntax_problems(to_latex(empty)) == []
