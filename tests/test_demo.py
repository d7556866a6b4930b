"""The demo: it runs from nothing to a report, says what it does, and replaces nothing but an earlier demo."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import varlora.demo
from varlora.demo.run import METHOD_SETTINGS, QUICK_STEPS, run_demo
from varlora.errors import VarloraError
from varlora.evaluation import answer_rows
from varlora.loading import load
from varlora.report import Report
from varlora.tasks import load_rows


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report, str]:
    """A quick demo: folder, report, and what it printed. A file of the user's lay in the earlier demo."""
    out = tmp_path_factory.mktemp("demo") / "out"
    (out / "runs" / "adamw").mkdir(parents=True)
    (out / "runs" / "adamw" / "config.json").write_text("left by an earlier demo")
    (out / "demo.json").write_text('{"varlora_demo": "0"}')
    (out / "notes.txt").write_text("mine")
    text = io.StringIO()
    report = run_demo(out, quick=True, console=Console(file=text, width=80))
    return out, report, text.getvalue()


def test_demo_writes_everything(quick) -> None:
    out, report, _ = quick
    names = (
        "config.json",
        "metrics.json",
        "predictions.safetensors",
        "training.jsonl",
        "adapter/posterior.safetensors",
    )
    expected = [out / "runs" / method / name for method in METHOD_SETTINGS for name in names]
    expected += [out / "tasks" / name for name in ("four_choices.train.jsonl", "four_choices.yaml")]
    expected += [out / "base" / name for name in ("config.json", "model.safetensors", "tokenizer.json")]
    expected += report.files.values()
    assert [path for path in expected if not path.is_file()] == []
    assert [row.label for row in report.rows] == ["adamw", "ivon@mean", "ivon x10"]
    assert [[part.name for part in row.slices] for row in report.rows] == 3 * [["never told", "told"]]
    assert {"slices.png", "report.md"} <= report.files.keys()


def test_demo_says_what_it_does(quick) -> None:
    _, report, text = quick
    words = " ".join(text.split())
    for part in (
        "in no text",
        "IVON@mean",
        "IVON x10",
        "Llama-2-7B",
        "76.1",
        "10.6",
        "quick demo",
        "guessing is right",
    ):
        assert part in words
    assert str(report.files["report.html"]) in text
    assert "  told: Select one of the choices" in text
    assert "  never told: Select one of the choices" in text
    assert "varlora train --task my-task.yaml --model path/to/my-model --method ivon" in text


def test_the_question_to_ask_can_be_asked(quick) -> None:
    out, _, text = quick
    line = next(line for line in text.splitlines() if line.startswith("Ask the model: echo '"))
    row = json.loads(line.partition("'")[2].rpartition("'")[0])
    loaded = load(out / "runs" / "ivon")
    assert (loaded.settings.steps, loaded.settings.calibration_fraction) == (QUICK_STEPS, 0)
    task = varlora.demo.load().tasks["four_choices"]
    (answer,) = answer_rows(loaded, [task.example(row, 0)])
    assert answer["answer"] in "ABCD"


def test_demo_replaces_an_earlier_demo_and_nothing_else(quick) -> None:
    out = quick[0]
    assert (out / "notes.txt").read_text() == "mine"
    assert json.loads((out / "runs" / "adamw" / "config.json").read_text())["settings"]["method"] == "adamw"


@pytest.mark.parametrize("marker", [None, "[]", '{"steps": 3}'])
def test_demo_refuses_another_folder(tmp_path: Path, marker: str | None) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "thesis.txt").write_text("mine")
    if marker is not None:
        (tmp_path / "demo.json").write_text(marker)
    before = contents(tmp_path)
    with pytest.raises(VarloraError, match="no earlier demo"):
        run_demo(tmp_path, quick=True, console=Console(file=io.StringIO()))
    assert contents(tmp_path) == before


def test_demo_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(VarloraError, match="no earlier demo"):
        run_demo(tmp_path / "file", quick=True, console=Console(file=io.StringIO()))


def test_demo_refuses_another_task(tmp_path: Path) -> None:
    with pytest.raises(VarloraError, match="Did you mean `four_choices`"):
        run_demo(tmp_path / "out", task="four_choice", console=Console(file=io.StringIO()))
    assert not (tmp_path / "out").exists()


def test_load_gives_a_pretrained_base_with_its_tasks() -> None:
    demo, again, other = varlora.demo.load(), varlora.demo.load(), varlora.demo.load(seed=1)
    assert tuple(demo.tasks) == varlora.demo.TASKS
    assert all(len(load_rows(task, split).examples) == 600 for task in demo.tasks.values() for split in task.files)
    weights, same, differ = (dict(each.model.named_parameters()) for each in (demo, again, other))
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    changed = {name for name in weights if not torch.equal(weights[name], differ[name])}
    assert changed == {name for name in weights if "lora_A" in name}
