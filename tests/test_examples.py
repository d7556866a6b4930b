"""The examples run, are short, and differ from their AdamW version by what docs/works_everywhere.md shows."""

from __future__ import annotations

import dataclasses
import math
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import trainers_afresh

import varlora

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGE = (ROOT / "docs" / "works_everywhere.md").read_text(encoding="utf-8")
DIFFS = dict(re.findall(r"^`(examples/\w+\.py)`\n\n```diff\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
PRINTED = re.compile(r"^ ?(\d+) draws: accuracy ([\d.]+)%, NLL ([\d.]+)$", re.MULTILINE)

every_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # which Lightning sets, and here it is unset again
    with trainers_afresh():
        yield


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few enough to evaluate in no time."""
    load_rows = varlora.load_rows

    def limited(task, split):
        rows = load_rows(task, split)
        return dataclasses.replace(rows, examples=rows.examples[:40])

    monkeypatch.setattr(varlora, "load_rows", limited, raising=False)


def hunks(path: Path) -> list[tuple[str, str]]:
    """Return the hunks of an example's diff, as they are with AdamW and with IVON."""
    parts = DIFFS[str(path.relative_to(ROOT))].split(" ...\n")
    lines = [part.splitlines(keepends=True) for part in parts]
    return [tuple("".join(line[1:] for line in hunk if line[0] in f" {sign}") for sign in "-+") for hunk in lines]


def run(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str) -> list:
    monkeypatch.setattr(sys, "argv", [path.name, *args])
    monkeypatch.chdir(path.parent)
    runpy.run_path(str(path), run_name="__main__")
    return PRINTED.findall(capsys.readouterr().out)


@every_example
def test_an_example_is_short_and_its_change_is_shown(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    diff = DIFFS[str(path.relative_to(ROOT))]
    added = re.findall(r"^\+ *(.*)", diff, re.MULTILINE)
    assert len(added) == 2
    # The AdamW versions do without it; a loop of one's own has to draw by itself as well.
    assert added[0] == "from varlora import IVON" or added[1] == "optimizer.train()"
    for _, ivon in hunks(path):
        assert text.count(ivon) == 1


def test_every_diff_is_of_an_example():
    assert sorted(DIFFS) == [str(path.relative_to(ROOT)) for path in EXAMPLES]


@every_example
@pytest.mark.usefixtures("few_rows")
def test_an_example_runs_with_both_optimizers(path, capsys, monkeypatch, tmp_path):
    copy, text = tmp_path / path.name, path.read_text(encoding="utf-8")
    copy.write_text(text, encoding="utf-8")
    mean, drawn = run(copy, capsys, monkeypatch, "--steps", "3")
    assert (mean[0], drawn[0]) == ("0", "10")
    assert mean[1:] != drawn[1:]
    for adamw, ivon in hunks(path):
        text = text.replace(ivon, adamw)
    copy.write_text(text, encoding="utf-8")
    mean, drawn = run(copy, capsys, monkeypatch, "--steps", "3")
    assert mean[1:] == drawn[1:]
    assert list(tmp_path.iterdir()) == [copy]  # nothing is left behind


@pytest.mark.slow
@every_example
def test_an_example_learns(path, capsys, monkeypatch, tmp_path):
    copy = tmp_path / path.name
    copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    for _, accuracy, nll in run(copy, capsys, monkeypatch):
        assert float(accuracy) > 75
        assert float(nll) < math.log(2)
