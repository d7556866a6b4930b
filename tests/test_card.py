"""The model card: what the hub reads of it, numbers with their errors, and text that stays text."""

from __future__ import annotations

import dataclasses
import html
import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, metadata_eval_result
from markdown_it import MarkdownIt

from varlora import metrics
from varlora.bootstrap import standard_errors
from varlora.card import escaped, model_card
from varlora.config import Settings
from varlora.evaluated import read_run
from varlora.files import write_json
from varlora.predictions import Predictions, save_predictions
from varlora.results import rows_of_runs

NAME, BASE = "me/my-adapter", "someone/tiny-base"
NASTY = "<script>alert(1)</script>\n---\n# [x](http://x) | `a` *b*"


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Settings]:
    """An evaluated run of BoolQ, without an adapter: the card reads none."""
    settings = Settings(task="boolq", model=BASE, run_dir=str(tmp_path), method_settings={"lr": 0.1})
    config = {"settings": settings.to_dict(), "task_version": "1", "training_rows": 100}
    write_json(tmp_path / "config.json", config)
    source = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 50, 2, generator=source)
    labels = torch.randint(2, (50,), generator=source)
    meta = {"samples": "4", "tau": "1.0", "task": "boolq", "split": "dev", "cut": "0"}
    answers = (("False", "True"),) * 49 + ((NASTY, "True"),)
    predictions = Predictions(
        logits, logits.mean(0), labels, tuple(map(str, range(50))), prompts=("?",) * 50, answers=answers, meta=meta
    )
    save_predictions(predictions, tmp_path / "predictions.safetensors")
    return tmp_path, settings


def test_the_hub_reads_the_metadata(run: tuple[Path, Settings]) -> None:
    run_dir, settings = run
    text, picture = model_card(run_dir, NAME, settings)
    card = ModelCard(text)
    assert (card.data.base_model, card.data.library_name, card.data.datasets) == (BASE, "peft", ["google/boolq"])
    assert {"varlora", "lora", "ivon"} <= set(card.data.tags)
    assert picture is not None
    assert picture.startswith(b"\x89PNG")
    found = {result.metric_type: result for result in card.data.eval_results}
    assert set(found) == set(card.data.metrics) == {"accuracy", "ece", "nll", "brier"}
    drawn = rows_of_runs([read_run(run_dir)])[0][-1]
    ((probs, labels),) = drawn.answers
    for name, value in metrics.evaluate(probs, labels).items():
        assert found[name].metric_value == pytest.approx(value, abs=1e-6)
        assert found[name].metric_args["standard_error"] > 0
    one = found["accuracy"]
    wanted = metadata_eval_result(
        model_pretty_name=NAME, task_pretty_name=one.task_name, task_id=one.task_type,
        metrics_pretty_name=one.metric_name,
        metrics_id="accuracy", metrics_value=one.metric_value, dataset_pretty_name="boolq", dataset_id="google/boolq",
        dataset_split="dev",
    )  # fmt: skip
    ((theirs,), (ours,)) = (
        made["model-index"][0]["results"] for made in (wanted, yaml.safe_load(text.split("---\n")[1]))
    )
    assert ours["task"] == theirs["task"]
    assert {key: ours["dataset"][key] for key in theirs["dataset"] if key in ours["dataset"]} == {
        key: value for key, value in theirs["dataset"].items() if key in ours["dataset"]
    }
    (accuracy,) = (metric for metric in ours["metrics"] if metric["type"] == "accuracy")
    assert accuracy["value"] == theirs["metrics"][0]["value"]


def test_numbers_have_their_errors_and_text_stays_text(run: tuple[Path, Settings]) -> None:
    run_dir, settings = run
    text, _ = model_card(run_dir, NAME, settings)
    page = MarkdownIt("commonmark").enable("table").render(text.split("---\n", 2)[2])
    assert page.count("<table>") == 2
    assert "<script" not in page
    assert 'href="http://x"' not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; --- # [x](http://x) | `a` *b*" in page
    rows = [line for line in page.splitlines() if "±" in line]
    assert len(rows) == 8  # four metrics at the mean, four drawn
    assert 'from_pretrained("me/my-adapter")' in text
    assert '<img src="reliability.png"' in page
    for language, code in ((t.info, t.content) for t in MarkdownIt().parse(text) if t.type == "fence"):
        assert language == "python"
        compile(code, "card", "exec")


def test_what_was_found_is_told_and_how_many_rows_were_held_out(run: tuple[Path, Settings]) -> None:
    run_dir, settings = run
    settings = dataclasses.replace(settings, method="ivon", method_settings={"lr": "auto", "ess": "auto", "beta1": 0.9})
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps({**config, "held_out_rows": 17}))
    (run_dir / "tuned.json").write_text(json.dumps({"settings": {"lr": 0.43219, "ess": 891.7}}))
    text = model_card(run_dir, NAME, settings)[0].replace("\\", "")
    assert "| lr | 0.4322 (found) |" in text
    assert "| ess | 891.7 (found) |" in text
    assert "| beta1 | 0.9 |" in text
    assert "17 more were held out" in text


def test_without_predictions_there_are_no_numbers(run: tuple[Path, Settings]) -> None:
    run_dir, settings = run
    (run_dir / "predictions.safetensors").unlink()
    text, picture = model_card(run_dir, NAME, dataclasses.replace(settings, calibration_fraction=0.0))
    card = ModelCard(text)
    assert picture is None
    assert card.data.eval_results is None
    assert "Not evaluated." in text
    assert "reliability" not in text
    assert "held out" not in text


@pytest.mark.parametrize("text", [NASTY, "a_b_c 1. &amp; <b> ~~x~~ ![i](j) $x$ \\n", "https://x.y me@x.y www.x.y a@b"])
def test_escaped_text_is_shown_as_it_is(text: str) -> None:
    shown = MarkdownIt("gfm-like", {"linkify": False}).renderInline(escaped(text))
    assert html.unescape(shown) == " ".join(text.split())
    for link in ("http://", "https://", "me@x", "www."):
        assert link not in escaped(text)


def test_bootstrap_errors_are_those_of_the_binomial_and_of_the_mean() -> None:
    source = torch.Generator().manual_seed(0)
    probs = torch.rand(400, 3, generator=source).softmax(-1).double()
    labels = torch.randint(3, (400,), generator=source)
    found = standard_errors(probs, labels, replicates=4000, generator=torch.Generator().manual_seed(1))
    right = metrics.accuracy(probs, labels)
    assert found["accuracy"] == pytest.approx((right * (1 - right) / 400) ** 0.5, rel=0.05)
    losses = -probs.gather(1, labels[:, None]).log()
    assert found["nll"] == pytest.approx(losses.std(correction=0).item() / 20, rel=0.05)
    with pytest.raises(metrics.MetricError, match="replicates"):
        standard_errors(probs, labels, replicates=1, generator=source)
