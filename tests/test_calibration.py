"""Choosing how a posterior is used: the search on problems whose answer is known, and the way through a run."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from varlora import evaluation
from varlora.calibration import (
    BEARABLE,
    MOST_CHOSEN,
    SEARCH_DRAWS,
    Calibration,
    Search,
    Trial,
    _share,
    calibrate,
    load_calibration,
    save_calibration,
)
from varlora.cli import main
from varlora.config import settings_from
from varlora.data import encode_all
from varlora.drawing import Drawing
from varlora.errors import DamagedFileError, VarloraError
from varlora.evaluation import answer_rows, evaluate
from varlora.evaluation import calibrate as calibrate_run
from varlora.loading import load
from varlora.metrics import average_probs, nll
from varlora.posterior import DiagonalGaussian, Point, Posterior, Tempered
from varlora.predict import Predictor, predict
from varlora.predictions import load_predictions
from varlora.report import build_report
from varlora.tasks import get_task, load_rows
from varlora.temperature import fit_temperature
from varlora.training import train

ROWS, WEIGHTS = 400, 40
SMALL = 0.03


class Linear:
    """Logits that are linear in the weights, of rows whose labels follow a softmax of other weights.

    Of the first half of the weights the posterior may be unsure, rightly so; half of the rows do without them.
    """

    def __init__(self, noise: float, useless: int = 0, seed: int = 0, unsure: float = 0.0) -> None:
        source = torch.Generator().manual_seed(seed)
        self.x = torch.randn(ROWS, WEIGHTS, generator=source) / math.sqrt(WEIGHTS)
        if unsure:
            self.x[: ROWS // 2, : WEIGHTS // 2] = 0.0
        truth = 3 * torch.randn(WEIGHTS, 3, generator=source)
        truth[:useless] = 0.0
        self.labels = torch.multinomial((self.x @ truth).softmax(-1), 1, generator=source)[:, 0]
        mean = truth + noise * torch.randn(WEIGHTS, 3, generator=source)
        std = torch.full_like(mean, SMALL)
        std[:useless] = 10 * mean.abs().max()
        if unsure:
            mean[: WEIGHTS // 2] += unsure * torch.randn(WEIGHTS // 2, 3, generator=source)
            std[: WEIGHTS // 2] = unsure
        self.posterior = DiagonalGaussian({"w": mean}, {"w": std})
        self.draws = 0

    def logits(self, weights: Mapping[str, Tensor]) -> Tensor:
        return self.x @ weights["w"]

    def draw(self, posterior: Posterior, n: int) -> tuple[Tensor, Tensor]:
        """What `predict` does, without a model: the same noise for each posterior."""
        source = torch.Generator().manual_seed(1)
        assert not isinstance(posterior, Tempered)
        if n == 0 or isinstance(posterior, Point):
            self.draws += 1
            return self.logits(posterior.mean)[None], self.labels
        self.draws += n
        return torch.stack([self.logits(posterior.draw(source)) for _ in range(n)]), self.labels


def at_best_temperature(logits: Tensor, labels: Tensor) -> float:
    return nll(average_probs(logits.double() / fit_temperature(logits, labels)), labels)


@pytest.mark.parametrize("seed", range(3))
def test_the_factor_is_the_best_of_all_powers_of_two(seed: int) -> None:
    """With noise in the mean that the posterior knows a hundredth of, more variance is better, but not any amount."""
    problem = Linear(noise=0.5, seed=seed)
    search = calibrate(problem.posterior, problem.draw)
    found = {trial.tau: trial.nll for trial in search.trials if trial.samples == SEARCH_DRAWS and not trial.pruned}
    every = {}
    for power in range(-6, 5):
        every[2.0**power] = at_best_temperature(*problem.draw(problem.posterior.scale(2.0**power), SEARCH_DRAWS))
    assert all(value == pytest.approx(every[tau], abs=1e-9) for tau, value in found.items())
    assert min(found.values()) == pytest.approx(min(every.values()), rel=2e-3)
    assert search.chosen.tau == min(found, key=lambda tau: found[tau])


@pytest.mark.parametrize("unsure", [0.0, 5.0])
def test_nothing_is_chosen_that_no_trial_has_and_every_pass_is_counted(unsure: float) -> None:
    problem = Linear(noise=0.5, unsure=unsure)
    search = calibrate(problem.posterior, problem.draw)
    chosen = search.chosen
    drawn = [trial for trial in search.trials if (trial.tau, trial.pruned) == (chosen.tau, chosen.pruned)]
    assert chosen.temperature in [trial.temperature for trial in drawn]
    mean = [trial for trial in search.trials if (trial.tau, trial.pruned) == (0.0, chosen.pruned)]
    assert [chosen.temperature_mean] == [trial.temperature for trial in mean]
    assert chosen.samples in [trial.samples for trial in (drawn if unsure else mean)]
    assert (search.rows, search.passes) == (ROWS, problem.draws)
    assert search.passes < 100
    again = calibrate(problem.posterior, problem.draw)
    assert again == search


def test_the_mean_is_taken_if_it_does_as_well() -> None:
    """Noise that is much the same in each row does no more than a temperature; draws may be asked for all the same."""
    problem = Linear(noise=0.3)
    search = calibrate(problem.posterior, problem.draw)
    chosen = search.chosen
    assert chosen.samples == 0
    assert chosen.tau > 0
    drawn, mean = (problem.draw(chosen.applied(problem.posterior).inner, n) for n in (16, 0))
    assert at_best_temperature(*mean) <= (1 + BEARABLE) * at_best_temperature(*drawn)
    assert chosen.temperature == fit_temperature(*drawn)
    assert chosen.temperature_mean == fit_temperature(*mean)


def test_fewer_draws_are_taken_if_they_do_as_well() -> None:
    problem = Linear(noise=0.3, unsure=5.0)
    search = calibrate(problem.posterior, problem.draw, samples=32)
    assert search.chosen.samples > 0
    assert at_best_temperature(*problem.draw(problem.posterior, 0)) > (1 + BEARABLE) * min(
        trial.nll for trial in search.trials
    )
    posterior = search.chosen.applied(problem.posterior).inner
    logits, labels = problem.draw(posterior, 32)
    all_of_them = at_best_temperature(logits, labels)

    def expected(n: int) -> float:
        return sum(at_best_temperature(group, labels) for group in logits.split(n)) * n / 32

    assert expected(search.chosen.samples) <= (1 + BEARABLE) * all_of_them
    if search.chosen.samples > 1:
        assert expected(search.chosen.samples // 2) > (1 + BEARABLE) * all_of_them


def test_a_lucky_draw_is_not_taken_alone() -> None:
    """The first draw is the truth, the others are far from it, and the mean knows nothing."""
    problem = Linear(noise=0.0)

    def draw(posterior: Posterior, n: int) -> tuple[Tensor, Tensor]:
        if n == 0:
            return torch.zeros(1, ROWS, 3), problem.labels
        noise = torch.randn(n, ROWS, 3, generator=torch.Generator().manual_seed(2))
        noise[:1] = 0.0
        return problem.logits(problem.posterior.mean) + 3 * noise, problem.labels

    logits, labels = draw(problem.posterior, 16)
    assert at_best_temperature(logits[:1], labels) < at_best_temperature(logits, labels)
    search = calibrate(problem.posterior, draw)
    assert search.chosen.samples > 2


@pytest.mark.parametrize("samples", [1, 16])
def test_one_draw_is_taken_if_it_does_as_well_as_all_and_the_mean_does_not(samples: int) -> None:
    problem = Linear(noise=0.0)

    def draw(posterior: Posterior, n: int) -> tuple[Tensor, Tensor]:
        logits = problem.logits(problem.posterior.mean)
        return (torch.stack([logits] * n) if n else torch.zeros(1, ROWS, 3)), problem.labels

    chosen = calibrate(problem.posterior, draw, samples).chosen
    assert (chosen.tau, chosen.samples) == (1.0, 1)


def test_few_draws_are_taken_only_if_they_do_as_well_when_they_are_made() -> None:
    """One or two of the many would do, but made by themselves they know nothing, as the mean."""
    problem = Linear(noise=0.0)

    def draw(posterior: Posterior, n: int) -> tuple[Tensor, Tensor]:
        logits = problem.logits(problem.posterior.mean)
        return torch.stack([logits * (n > 2)] * max(n, 1)), problem.labels

    search = calibrate(problem.posterior, draw)
    chosen, found = search.chosen, {(trial.tau, trial.samples): trial.nll for trial in search.trials}
    assert {1, 2} <= {samples for _, samples in found}
    assert found[chosen.tau, chosen.samples] <= (1 + BEARABLE) * found[chosen.tau, 16]
    assert chosen.samples == 4


def test_weights_that_are_noise_alone_are_pruned() -> None:
    """Half of the rows' features say nothing, and the posterior is unsure of their weights."""
    useless = Linear(noise=1.0, useless=WEIGHTS // 2)
    search = calibrate(useless.posterior, useless.draw)
    assert search.chosen.pruned in (0.2, 0.4, 0.6)
    pruned = search.chosen.applied(useless.posterior).inner
    assert (pruned.mean["w"][: WEIGHTS // 2] == 0).float().mean() > 0.35
    assert (pruned.mean["w"][WEIGHTS // 2 :] == 0).float().mean() < 0.25


def test_the_temperatures_are_those_of_what_is_left_after_pruning() -> None:
    useless = Linear(noise=1.0, useless=WEIGHTS // 2)
    chosen = calibrate(useless.posterior, useless.draw).chosen
    assert chosen.pruned > 0
    pruned = chosen.applied(useless.posterior).inner
    assert chosen.temperature_mean == fit_temperature(*useless.draw(pruned, 0))
    assert chosen.temperature == fit_temperature(*useless.draw(pruned, chosen.samples or MOST_CHOSEN))


def test_more_is_pruned_of_a_posterior_that_is_pruned_already() -> None:
    """The first shares that are tried change nothing."""
    useless = Linear(noise=1.0, useless=WEIGHTS // 2)
    search = calibrate(useless.posterior.prune(0.3), useless.draw)
    assert search.chosen.pruned in (0.4, 0.6)


def test_without_draws_to_choose_on_those_that_are_asked_for_later_are_as_trained() -> None:
    problem = Linear(noise=0.3)
    search = calibrate(problem.posterior, problem.draw, samples=0)
    temperature = fit_temperature(*problem.draw(problem.posterior, 0))
    assert search.chosen == Calibration(1.0, 0.0, temperature, temperature, 0)
    assert {trial.samples for trial in search.trials} == {0}
    assert search.chosen.applied(problem.posterior).inner is problem.posterior


def test_of_a_point_only_the_temperature_is_chosen() -> None:
    problem = Linear(noise=1.0)
    point = Point(problem.posterior.mean)
    search = calibrate(point, problem.draw)
    temperature = fit_temperature(*problem.draw(point, 0))
    assert search.chosen == Calibration(0.0, 0.0, temperature, temperature, 0)
    assert search.passes <= 2


def test_draws_that_overflow_are_passed_over() -> None:
    problem = Linear(noise=0.3)
    wide = DiagonalGaussian(problem.posterior.mean, {"w": torch.full((WEIGHTS, 3), 3e38)})
    search = calibrate(wide, problem.draw)
    assert search.chosen.tau == 0.0
    assert math.isinf(next(trial.nll for trial in search.trials if trial.tau == 1.0))


def test_a_factor_is_found_below_two_that_overflow() -> None:
    problem = Linear(noise=0.3)

    def draw(posterior: Posterior, n: int) -> tuple[Tensor, Tensor]:
        logits, labels = problem.draw(posterior, n)
        wide = not isinstance(posterior, Point) and posterior.marginal_std()["w"].max() > std / 3  # type: ignore[attr-defined]
        return (logits * math.nan if n and wide else logits), labels

    std = problem.posterior.std["w"].max()
    search = calibrate(problem.posterior, draw)
    assert any(math.isfinite(trial.nll) and 0 < trial.tau <= 1 / 16 for trial in search.trials)


def test_a_negative_number_of_draws_is_refused() -> None:
    problem = Linear(noise=0.3)
    with pytest.raises(VarloraError, match="Expected `samples`"):
        calibrate(problem.posterior, problem.draw, samples=-1)


def test_applied_it_scales_prunes_and_divides() -> None:
    posterior = DiagonalGaussian({"w": torch.tensor([1.0, 0.1, 3.0, 4.0])}, {"w": torch.ones(4)})
    used = Calibration(4.0, 0.25, 2.0, 1.5, 8).applied(posterior)
    assert (used.temperature, used.temperature_mean) == (2.0, 1.5)
    assert used.inner.marginal_std()["w"].tolist() == [2.0, 0.0, 2.0, 2.0]


# --- in a run ---


@pytest.fixture(scope="module")
def run(tmp_path_factory, bundled) -> Path:
    folder = tmp_path_factory.mktemp("calibration") / "run"
    tasks = Path(__file__).resolve().parents[1] / "src" / "varlora" / "demo" / "bundled" / "tasks"
    task = folder.parent / "questions.yaml"
    text = (tasks / "two_choices.yaml").read_text(encoding="utf-8")
    task.write_text(text.replace("two_choices.", f"{tasks}/two_choices.") + "limit: {train: 60, dev: 20}\n")
    settings = {"task": str(task), "model": str(bundled), "steps": 30, "batch_size": 8, "calibration_fraction": 0.4}
    method = {"name": "ivon", "lr": 0.5, "ess": 1e6, "hess_init": 2e-4}
    return train(settings_from({**settings, "method": method, "run_dir": str(folder)}), say=lambda text: None)


@pytest.fixture
def copy(run, tmp_path) -> Path:
    import shutil

    return Path(shutil.copytree(run, tmp_path / "run"))


def test_what_is_chosen_is_stored_with_the_adapter_and_used(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in (copy / "adapter").iterdir()}
    assert load(copy).calibration is None
    assert main(["calibrate", str(copy), "--samples", "4"]) == 0
    said = capsys.readouterr().out
    assert "Chosen on 24 held-out rows" in said
    after = {path.name: path.read_bytes() for path in (copy / "adapter").iterdir()}
    assert {name: after[name] for name in before} == before
    stored = json.loads(after["calibration.json"])
    loaded = load(copy)
    assert loaded.calibration == Calibration(
        *(stored[name] for name in ("tau", "pruned", "temperature", "temperature_mean", "samples")), noise="latin"
    )
    assert loaded.used()[-1] == Drawing(noise="latin")
    assert {"commit", "versions", "trials", "rows", "passes"} <= stored.keys()
    assert isinstance(loaded.posterior, DiagonalGaussian)  # what was trained, as ever
    assert isinstance(loaded.calibrated, Tempered)


def test_draws_on_request_differ_where_only_the_mean_was_looked_at(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", str(copy), "--samples", "0"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "passes over them: the mean; 0% pruned" in said
    loaded = load(copy)
    task = get_task(loaded.settings.task)
    (row,) = answer_rows(loaded, load_rows(task, task.evaluation, None).examples[:1], samples=8)
    assert row["uncertainty"]["epistemic"] > 0


def test_the_last_layers_are_chosen_for_and_drawn_from_then_on(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", str(copy), "--samples", "4", "--last-layers", "1"]) == 0
    loaded = load(copy)
    assert loaded.calibration is not None
    assert loaded.calibration.last_layers == 1
    posterior, samples, _, how = loaded.used()
    assert how == Drawing(noise="latin", last_layers=1)
    task = get_task(loaded.settings.task)
    examples = load_rows(task, task.evaluation, None).examples[:3]
    (row, *_) = answer_rows(loaded, examples, samples=4)
    encoded = encode_all(loaded.tokenizer, examples).rows
    found = {
        layers: predict(
            loaded.model, posterior, encoded, pad_token_id=0, samples=4, how=Drawing(noise="latin", last_layers=layers)
        ).probs[0]
        for layers in (None, 1)
    }
    assert list(row["probabilities"].values()) == pytest.approx(found[1].tolist(), abs=1e-6)
    assert (found[1] - found[None]).abs().max() > 1e-5 or samples == 0
    main(["evaluate", str(copy), "--samples", "2"])
    assert load_predictions(copy / "predictions-calibrated.safetensors").meta["last_layers"] == "1"
    assert load_predictions(copy / "predictions-calibrated.safetensors").meta["noise"] == "latin"
    assert "last_layers" not in load_predictions(copy / "predictions.safetensors").meta


def test_predict_uses_it_unless_told_otherwise(copy: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        (Path(__file__).resolve().parents[1] / "src/varlora/demo/bundled/tasks/two_choices.dev.jsonl")
        .read_text()
        .splitlines()[0]
        + "\n"
    )

    def probabilities(*options: str) -> list[float]:
        assert main(["predict", str(copy), "--input", str(tmp_path / "rows.jsonl"), *options]) == 0
        return list(json.loads(capsys.readouterr().out.splitlines()[-1])["probabilities"].values())

    plain = probabilities("--tau", "1", "--samples", "4")
    before = probabilities("--samples", "4")
    assert before == plain
    main(["calibrate", str(copy), "--samples", "4"])
    capsys.readouterr()
    assert probabilities("--tau", "1", "--samples", "4") == plain
    path = copy / "adapter" / "calibration.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tau": 1.0, "samples": 4}))
    assert probabilities() == probabilities("--noise", "latin") != probabilities("--noise", "independent")
    assert probabilities() != plain
    path = copy / "adapter" / "calibration.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "tau": 0.0, "pruned": 0.0, "samples": 0, "temperature_mean": 1e6}))
    assert probabilities() == pytest.approx([0.5, 0.5], abs=1e-3)


def test_the_report_shows_it_beside_what_was_trained(copy: Path, tmp_path: Path) -> None:
    results = evaluate(copy, samples=4, calibrated=True, say=lambda text: None)
    assert {"accuracy", "nll", "ece", "brier"} <= results["calibrated"].keys()
    assert (copy / "adapter" / "calibration.json").is_file()
    report = build_report([copy], tmp_path / "report")
    assert [row.label for row in report.rows][-1] == "ivon calibrated"
    assert report.rows[-1].stats["nll"].mean == pytest.approx(results["calibrated"]["nll"])
    assert "chosen on the held-out rows" in report.files["report.md"].read_text()
    assert "calibrated" in report.files["report.html"].read_text()
    (copy / "adapter" / "calibration.json").unlink()
    evaluate(copy, samples=4, say=lambda text: None)
    assert not (copy / "predictions-calibrated.safetensors").exists()
    evaluate(copy, samples=4, calibrated=True, say=lambda text: None)
    assert main(["calibrate", str(copy), "--samples", "0"]) == 0  # after which that is no longer what `predict` does
    assert [row.label for row in build_report([copy], tmp_path / "again").rows if row.calibrated] == []


def test_evaluated_calibrated_it_answers_as_predict_does(copy: Path) -> None:
    """By the draws that were chosen, whatever those are that are made of what was trained."""
    calibrate_run(copy, samples=2, say=lambda text: None)
    path = copy / "adapter" / "calibration.json"
    chosen = {"tau": 16.0, "samples": 4, "last_layers": 1, "noise": "latin"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **chosen}))
    evaluate(copy, samples=2, tau=0.1, temperature=False, say=lambda text: None)
    found, loaded = load_predictions(copy / "predictions-calibrated.safetensors"), load(copy)
    task = get_task(loaded.settings.task)
    rows = answer_rows(loaded, load_rows(task, task.evaluation, None).examples)
    for probs, row in zip(found.probs.tolist(), rows, strict=True):
        assert probs == pytest.approx(list(row["probabilities"].values()), abs=1e-6)


def test_other_rows_than_those_held_out_are_not_taken_for_them(copy: Path) -> None:
    """As a data folder may have been changed since: the model was trained on them."""
    config = json.loads((copy / "config.json").read_text())
    config["settings"]["seed"] += 1  # by which rows are held out
    (copy / "config.json").write_text(json.dumps(config))
    before, said = files_of(copy), list[str]()
    for verb in (lambda **how: evaluate(copy, split="calibration", **how), lambda **how: calibrate_run(copy, **how)):
        with pytest.raises(VarloraError, match="held-out rows"):
            verb(samples=2, say=said.append)
    assert files_of(copy) == before
    assert "temperature" not in evaluate(copy, samples=2, say=said.append)
    assert any("No temperature was fitted" in words for words in said)


def test_what_an_early_stop_saved_is_said(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(copy), "--samples", "8", "--tolerance", "0.5", "--no-temperature"]) == 0
    passes = json.loads((copy / "metrics.json").read_text())["passes_a_row"]
    assert 4 <= passes < 8
    assert f"{passes:.1f} of 8 draws were made of a row" in " ".join(capsys.readouterr().out.split())


def files_of(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


def test_a_full_disk_costs_no_results(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where some of the new files found room."""
    evaluate(copy, samples=2, calibrated=True, say=lambda text: None)
    before = files_of(copy)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(evaluation, "write_json", Mock(side_effect=full))
    with pytest.raises(VarloraError, match=r"No space left.*was there before is whole"):
        evaluate(copy, samples=3, say=lambda text: None)
    assert files_of(copy) == before
    monkeypatch.setattr(evaluation, "save_calibration", Mock(side_effect=full))
    with pytest.raises(VarloraError, match="No space left"):
        calibrate_run(copy, samples=2, say=lambda text: None)
    assert files_of(copy) == before


def test_no_pass_is_made_at_the_mean_where_draws_are_tried(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, at_mean = Predictor.at_mean, []

    def counted(self: Predictor, batch: Any) -> Any:
        at_mean.append(len(batch["labels"]))
        return inner(self, batch)

    monkeypatch.setattr(Predictor, "at_mean", counted)
    search = calibrate_run(copy, samples=4, say=lambda text: None)
    assert sum(at_mean) == search.rows * sum(trial.samples == 0 for trial in search.trials)
    assert search.passes == sum(max(trial.samples, 1) for trial in search.trials)


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("verb", [evaluate, calibrate_run])
def test_of_an_adapter_that_was_replaced_meanwhile_nothing_is_written(
    copy: Path, verb: Any, gone: bool, monkeypatch: Any
) -> None:
    evaluate(copy, samples=2, calibrated=True, say=lambda text: None)
    before, manifest, inner = files_of(copy), copy / "adapter" / "manifest.json", Predictor._of_rows

    def slowly(*args: Any, **settings: Any) -> Any:
        if gone:  # as `train --overwrite` begins
            shutil.rmtree(copy / "adapter", ignore_errors=True)
        else:
            manifest.write_text(manifest.read_text() + " ")
        return inner(*args, **settings)

    monkeypatch.setattr(Predictor, "_of_rows", slowly)
    with pytest.raises(VarloraError, match="trained anew meanwhile"):
        verb(copy, samples=2, say=lambda text: None)
    assert files_of(copy) == before


def test_what_cannot_be_calibrated_costs_no_predictions(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried before the hours of predicting, on the base that is loaded already."""
    (copy / "adapter" / "calibration.json").unlink(missing_ok=True)
    loads, predicts = Mock(wraps=evaluation.load), Mock(wraps=evaluation._predict)
    refusing = Mock(side_effect=VarloraError("no"))
    for name, mock in (("load", loads), ("_predict", predicts), ("search_calibration", refusing)):
        monkeypatch.setattr(evaluation, name, mock)
    with pytest.raises(VarloraError, match="no"):
        evaluate(copy, samples=2, calibrated=True, say=lambda text: None)
    assert (loads.call_count, refusing.call_count, predicts.call_count) == (1, 1, 0)


@pytest.mark.parametrize("wrong", [["--taus", "2", "nan"], ["--tau", "-1"], ["--samples", "-1"]])
def test_a_wrong_factor_costs_no_results(copy: Path, wrong: list[str]) -> None:
    evaluate(copy, samples=2, calibrated=True, say=lambda text: None)
    before = files_of(copy)
    assert main(["evaluate", str(copy), "--split", "train", *wrong]) != 0
    assert files_of(copy) == before


def test_what_so_few_rows_do_not_set_is_said() -> None:
    chosen = Calibration(tau=16.0, pruned=0.0, temperature=50.0, temperature_mean=1.0, samples=2)
    doubts = Search(chosen, (), rows=1, passes=1, told=("Of the temperature. Hold out more rows",)).doubts()
    assert len(doubts) == 3
    assert all("Hold out more rows" in words for words in doubts)
    assert Search(replace(chosen, tau=1.0, temperature=2.0), (), rows=100, passes=1).doubts() == []


@pytest.mark.parametrize(("gain", "pruned"), [(0.05, 0.0), (0.09, 0.0), (0.11, 0.05), (0.3, 0.05)])
def test_a_gain_within_its_standard_error_prunes_nothing(gain: float, pruned: float) -> None:
    """Some share of the weights is always better to leave out on few rows, by chance."""
    swing = torch.tensor([1.0, -1.0] * 50)  # of 100 rows: a standard error of 0.1
    losses = {0.0: torch.full((100,), 2.0), 0.05: 2.0 - gain + swing, 0.1: torch.full((100,), 3.0)}

    class Trials:
        posterior = Linear(noise=0.0).posterior

        def made(self, tau: float, pruned: float = 0.0) -> Trial:
            return Trial(tau, pruned, SEARCH_DRAWS, 1.0, losses[pruned].mean().item())

        def losses(self, trial: Trial) -> Tensor:
            return losses[trial.pruned]

    assert _share(Trials(), 1.0) == pruned  # type: ignore[arg-type]


@pytest.mark.parametrize(("gains", "pruned"), [((0.0, 0.3), 0.1), ((0.3, 0.3), 0.05), ((0.0, 0.0), 0.0)])
def test_a_share_that_changes_nothing_does_not_end_the_search(gains: tuple[float, float], pruned: float) -> None:
    losses = {
        share: 2.0 - gain for share, gain in zip((0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8), (0.0, *gains, *[-1.0] * 4))
    }

    class Trials:
        posterior = Linear(noise=0.0).posterior

        def made(self, tau: float, pruned: float = 0.0) -> Trial:
            return Trial(tau, pruned, SEARCH_DRAWS, 1.0, losses[pruned])

        def losses(self, trial: Trial) -> Tensor:
            return torch.full((100,), losses[trial.pruned])

    assert _share(Trials(), 1.0) == pruned  # type: ignore[arg-type]


def test_rows_that_are_all_right_are_doubted() -> None:
    problem = Linear(noise=0.0)
    right = problem.draw(problem.posterior, 0)[0][0].argmax(1)
    search = calibrate(problem.posterior, lambda posterior, n: (problem.draw(posterior, n)[0], right), samples=4)
    assert any("do not set the temperature" in words for words in search.doubts())


def test_one_row_prunes_nothing() -> None:
    problem = Linear(noise=0.0, useless=20)
    found = calibrate(problem.posterior, lambda posterior, n: one_row(*problem.draw(posterior, n)), samples=4)
    assert found.chosen.pruned == 0.0
    assert found.rows == 1


def one_row(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits[:, :1], labels[:1]


def test_without_held_out_rows_it_says_so(run: Path, tmp_path: Path) -> None:
    settings = json.loads((run / "config.json").read_text())["settings"]
    bare = {**settings, "calibration_fraction": 0.0, "steps": 2, "run_dir": str(tmp_path / "bare")}
    train(settings_from(bare), say=lambda text: None)
    assert main(["calibrate", str(tmp_path / "bare")]) == 1
    assert "calibrated" not in evaluate(tmp_path / "bare", samples=2, calibrated=True, say=lambda text: None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tau": -1}, "make no sense"),
        ({"temperature": 0}, "make no sense"),
        ({"temperature": math.nan}, "make no sense"),
        ({"temperature_mean": 0}, "make no sense"),
        ({"pruned": 2}, "make no sense"),
        ({"samples": "many"}, "missing or wrong"),
        ({"last_layers": 0}, "make no sense"),
        ({"noise": "white"}, "make no sense"),
        ({"last_layers": "all"}, "missing or wrong"),
        ({"samples": 10**9}, "make no sense"),
        ({"samples": math.inf}, "missing or wrong"),
        ({"tau": None}, "missing or wrong"),
        ({"adapter": "other"}, "of another adapter"),
    ],
)
def test_a_damaged_calibration_is_refused_by_name(copy: Path, change: Mapping[str, object], said: str) -> None:
    problem = Linear(noise=0.3)
    save_calibration(calibrate(problem.posterior, problem.draw), copy / "adapter")
    assert load_calibration(copy / "adapter") is not None
    path = copy / "adapter" / "calibration.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DamagedFileError, match=said) as error:
        load(copy)
    assert str(path) in str(error.value)
    for broken in ("[]", "{"):
        path.write_text(broken)
        with pytest.raises(DamagedFileError, match="Run `varlora calibrate` again") as error:
            load(copy)
        assert str(error.value).count("again") == 1
    assert load(copy, calibrated=False).calibration is None
    calibrate_run(copy, samples=2, say=lambda text: None)  # the cure that is named
    assert load(copy).calibration is not None
