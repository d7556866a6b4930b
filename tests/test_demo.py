"""The demo: it runs from nothing to a report, is deterministic, and replaces nothing but an earlier demo."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from varlora.demo import KNOWN, METHOD_SETTINGS, NEW, NOISE, run_demo, write_base, write_task
from varlora.errors import VarloraError
from varlora.model import load_model
from varlora.prompt import encode
from varlora.report import Report
from varlora.tasks import get_task, load_rows
from varlora.workflow import load


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def reviews(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report, str]:
    """A quick demo: its folder, its report, and what it printed. A file of the user's lay in the earlier demo."""
    out = tmp_path_factory.mktemp("demo") / "out"
    (out / "runs" / "adamw").mkdir(parents=True)
    (out / "runs" / "adamw" / "config.json").write_text("left by an earlier demo")
    (out / "demo.json").write_text('{"varlora_demo": "0"}')
    (out / "notes.txt").write_text("mine")
    text = io.StringIO()
    report = run_demo(out, quick=True, console=Console(file=text, width=80))
    return out, report, text.getvalue()


def test_demo_writes_everything(quick: tuple[Path, Report, str]) -> None:
    out, report, _ = quick
    names = (
        "config.json",
        "metrics.json",
        "predictions.safetensors",
        "training.jsonl",
        "adapter/posterior.safetensors",
    )
    expected = [out / "runs" / method / name for method in METHOD_SETTINGS for name in names]
    expected += [out / "data" / name for name in ("train.jsonl", "dev.jsonl", "reviews.yaml")]
    expected += [out / "base" / name for name in ("config.json", "model.safetensors", "tokenizer.json")]
    expected += report.files.values()
    assert [path for path in expected if not path.is_file()] == []
    assert [row.label for row in report.rows] == ["adamw", "ivon@mean", "ivon x10"]


def test_demo_says_what_it_does(quick: tuple[Path, Report, str]) -> None:
    _, report, text = quick
    for words in ("random weights", "IVON@mean", "IVON x10", "Llama-2-7B", "76.1", "10.6", "quick demo"):
        assert words in " ".join(text.split())
    assert str(report.files["report.md"]) in text
    assert "varlora train --task my-task.yaml --model path/to/my-model --method ivon" in text


def test_demo_runs_can_be_loaded(quick: tuple[Path, Report, str]) -> None:
    loaded = load(quick[0] / "runs" / "ivon")
    assert loaded.settings.steps == 60
    assert loaded.settings.calibration_fraction == 0


def test_demo_replaces_an_earlier_demo_and_nothing_else(quick: tuple[Path, Report, str]) -> None:
    out = quick[0]
    assert (out / "notes.txt").read_text() == "mine"
    assert json.loads((out / "runs" / "adamw" / "config.json").read_text())["settings"]["method"] == "adamw"


@pytest.mark.parametrize("marker", [None, "[]", '{"steps": 3}'])
def test_demo_refuses_another_folder(tmp_path: Path, marker: str | None) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("mine")
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


def test_generation_is_deterministic(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("again", 3), ("other", 4)):
        write_base(tmp_path / name, seed)
        write_task(tmp_path / name, seed, train=20, dev=10)
    assert contents(tmp_path / "a") == contents(tmp_path / "again")
    for file in ("model.safetensors", "tokenizer.json", "train.jsonl", "dev.jsonl"):
        assert contents(tmp_path / "a")[file] != contents(tmp_path / "other")[file]


def test_task_keeps_new_words_out_of_training_and_is_noisy(tmp_path: Path) -> None:
    write_task(tmp_path, 0, train=3000, dev=3000)
    train, dev = reviews(tmp_path / "train.jsonl"), reviews(tmp_path / "dev.jsonl")
    known = {word for row in train for word in row["review"].split()}
    words = {word for row in dev for word in row["review"].split()}
    assert (len(known), len(words - known)) == (KNOWN, NEW)
    for row in dev:
        assert row["new_words"] == sum(word not in known for word in row["review"].split())
    assert 0.35 < sum(row["label"] == "good" for row in train) / len(train) < 0.65
    # The same words in another order have the same sum, so where such labels differ one of them is wrong:
    # two independent labels of one review differ with probability 2 p (1 - p).
    by_words: dict[tuple[str, ...], list[str]] = {}
    for row in train:
        by_words.setdefault(tuple(sorted(row["review"].split())), []).append(row["label"])
    pairs = [labels[0] != label for labels in by_words.values() for label in labels[1:]]
    assert sum(pairs) / len(pairs) == pytest.approx(2 * NOISE * (1 - NOISE), abs=0.1)


def test_tokenizer_knows_every_word(tmp_path: Path) -> None:
    write_base(tmp_path / "base", 0)
    task = get_task(write_task(tmp_path / "data", 0, train=50, dev=50))
    _, tokenizer = load_model(tmp_path / "base", lora=None, device="cpu")
    for split in ("train", "dev"):
        for example in load_rows(task, split).examples:
            row = encode(tokenizer, example)
            assert row.input_ids[0] == tokenizer.bos_token_id
            assert tokenizer.unk_token_id not in row.input_ids
            assert tokenizer.convert_ids_to_tokens(list(row.label_tokens)) == ["bad", "good"]
