"""Methods that are concluded from finished runs, and temperatures that are fitted on held-out rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_main_job import silent

from varlora import metrics
from varlora.cli import main
from varlora.config import load_settings, settings_from, settings_of
from varlora.demo.run import one_thread
from varlora.errors import ConfigError, DamagedFileError, VarloraError
from varlora.evaluation import evaluate
from varlora.files import file_digest
from varlora.loading import load
from varlora.methods import METHODS
from varlora.posterior import Mixture, Tempered
from varlora.predictions import load_predictions
from varlora.report import build_report
from varlora.sources import WHAT, check_sources, identities, load_sources, recipe_from, recipe_on
from varlora.temperature import fit_temperature
from varlora.training import train

CONCLUDED = ["mc_dropout", "laplace_diag", "laplace_kfac", "tfb", "temperature"]
SPREAD = {"rank": 2, "samples": 3}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def task(bundled, tmp_path_factory) -> Path:
    """A task of the demo with few rows."""
    folder, tasks = tmp_path_factory.mktemp("task"), bundled.parent / "tasks"
    for split, rows in (("train", 24), ("dev", 8)):
        lines = (tasks / f"true_or_false.{split}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"true_or_false.{split}.jsonl").write_text("".join(lines[:rows]))
    return Path(shutil.copy(tasks / "true_or_false.yaml", folder))


@pytest.fixture(scope="module")
def base(bundled, task) -> dict:
    return {
        "task": str(task),
        "model": str(bundled),
        "calibration_fraction": 0.4,
        "steps": 6,
        "method": {"name": "adamw", "lr": 1e-3},
    }


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Runs that no test changes, by a key of method and seed, each trained once."""
    folder = tmp_path_factory.mktemp("sources")

    def get(method: str = "adamw", seed: int = 0, **changes) -> Path:
        run_dir = folder / f"{method}-{seed}-{len(changes)}"
        if not run_dir.exists():
            values = {**base, "run_dir": str(run_dir), "seed": seed, **changes}
            if method != "adamw":
                values["method"] = {"name": method, "lr": 0.1}
            train(settings_from(values), say=silent)
        return run_dir

    return get


def concluded(method: str, sources: list[Path], run_dir: Path, **method_settings):
    recipe = recipe_from(sources, method)
    recipe["method_settings"] |= method_settings
    (settings,) = load_settings(recipe, {"run_dir": str(run_dir)})
    return train(settings, say=silent)


def own(method: str) -> dict:
    """Settings that make the method quick."""
    names = METHODS[method].__dataclass_fields__
    return {name: value for name, value in SPREAD.items() if name in names}


@pytest.mark.parametrize("method", CONCLUDED)
def test_concluded_from_a_run_is_what_training_anew_ends_in(method, base, runs, tmp_path):
    """Bit for bit: the same rows are held out, the same seed draws."""
    concluded(method, [runs()], tmp_path / "from", **own(method))
    settings = {"of": "adamw", "settings": {"lr": 1e-3}} if method == "temperature" else {"lr": 1e-3}
    anew = settings_from(
        {**base, "run_dir": str(tmp_path / "anew"), "method": {"name": method, **settings, **own(method)}}
    )
    train(anew, say=silent)
    for name in ("adapter_model.safetensors", "posterior.safetensors"):
        one, other = ((tmp_path / folder / "adapter" / name).read_bytes() for folder in ("from", "anew"))
        assert one == other
    one, other = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("from", "anew"))
    assert one["settings"]["method_settings"] == other["settings"]["method_settings"]
    assert one["settings"]["sources"] == [str(runs())]
    assert one["rows"] == other["rows"]


def test_an_ensemble_of_finished_runs(runs, tmp_path):
    sources = [runs(seed=0), runs(seed=1), runs("ivon")]
    run_dir = concluded("ensemble", sources, tmp_path / "run")
    _, posterior = load(run_dir)
    assert isinstance(posterior, Mixture)
    assert [member.kind for member in posterior.members] == ["point", "point", "diagonal_gaussian"]
    results = evaluate(run_dir, say=silent)
    assert results["samples"] == 12  # ten, and as many more as give three members equal parts
    assert "temperature" not in results  # what one run held out, another was trained on
    assert json.loads((run_dir / "config.json").read_text())["settings"]["calibration_fraction"] == 0


def test_an_ensemble_of_runs_that_held_out_the_same_rows_can_be_tempered(runs, tmp_path):
    ensemble = concluded("ensemble", [runs(), runs("ivon")], tmp_path / "ensemble")
    assert evaluate(ensemble, say=silent)["temperature"]["draws"] > 0
    _, posterior = load(concluded("temperature", [ensemble], tmp_path / "tempered", samples=3))
    assert isinstance(posterior, Tempered)
    assert isinstance(posterior.inner, Mixture)


def snapshots_of(source: Path, method: str, run_dir: Path, steps: int = 6, **method_settings) -> Path:
    """Train on from a finished run, with a snapshot at every step."""
    recipe = recipe_from([source], method)
    recipe["method_settings"] |= {"every": 1, **method_settings}
    (settings,) = load_settings({**recipe, "steps": steps, "checkpoint_every": 3}, {"run_dir": str(run_dir)})
    return train(settings, say=silent)


def test_averaging_goes_on_where_a_run_ended(runs, tmp_path):
    """With half as many steps again, all averaged; at a learning rate of 0 the average is that run's adapter."""
    recipe = recipe_from([runs()], "swa")
    assert (recipe["steps"], recipe["method_settings"]["start"]) == (3, 0.0)
    mean = load(runs()).posterior.mean
    still = load(snapshots_of(runs(), "swag", tmp_path / "still", average_lr=0.0)).posterior
    assert all(torch.equal(still.mean[name], mean[name]) for name in mean)
    assert not any(deviation.any() for deviation in still.deviations.values())
    moved = load(snapshots_of(runs(), "swag", tmp_path / "moved")).posterior
    assert not any(torch.equal(moved.mean[name], mean[name]) for name in mean)
    assert all(len(deviation) == 6 for deviation in moved.deviations.values())
    assert not any((tmp_path / name / "member-0").exists() for name in ("still", "moved"))


def test_swa_is_the_mean_of_a_finished_swag_as_if_it_had_been_trained(runs, tmp_path):
    swag = snapshots_of(runs(), "swag", tmp_path / "swag")
    trained = snapshots_of(runs(), "swa", tmp_path / "trained")
    given = concluded("swa", [swag], tmp_path / "given")
    one, other = ((folder / "adapter" / "posterior.safetensors").read_bytes() for folder in (trained, given))
    assert one == other
    assert not (given / "training.jsonl").exists()


def test_averaging_from_a_run_is_resumed(runs, tmp_path):
    """Killed after a checkpoint: the same bits as left alone."""
    whole = snapshots_of(runs(), "swag", tmp_path / "whole", steps=6)
    cut = snapshots_of(runs(), "swag", tmp_path / "cut", steps=6)
    for folder in ("adapter", "checkpoint-6"):
        shutil.rmtree(cut / folder)
    assert (cut / "checkpoint-3").is_dir()
    train(settings_of(cut), resume=True, say=silent)
    one, other = ((folder / "adapter" / "posterior.safetensors").read_bytes() for folder in (whole, cut))
    assert one == other


def test_a_run_that_was_concluded_from_others_is_resumed_and_found_done(runs, tmp_path):
    source = Path(shutil.copytree(runs(), tmp_path / "source"))
    run_dir = concluded("mc_dropout", [source], tmp_path / "run")
    (settings,) = load_settings({**recipe_from([source], "mc_dropout"), "run_dir": str(run_dir)})
    shutil.rmtree(source)  # it is needed no more
    said = []
    train(settings, resume=True, say=said.append)
    assert "trained already" in said[0]


def test_an_interrupted_conclusion_is_made_again(runs, tmp_path, monkeypatch):
    recipe = {**recipe_from([runs()], "laplace_diag"), "run_dir": str(tmp_path / "run")}
    (settings,) = load_settings(recipe)
    with monkeypatch.context() as patched:
        patched.setattr("varlora.methods.laplace.best_evidence", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(settings, say=silent)
    assert not (tmp_path / "run" / "adapter").exists()
    train(settings, resume=True, say=silent)
    whole = concluded("laplace_diag", [runs()], tmp_path / "whole")
    name = "adapter/posterior.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


# --- refused before anything runs ---


@pytest.fixture
def nothing_loads(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("varlora.loading.load_model", refuse)


def refusal(method: str, sources: list[Path], run_dir: Path, **settings) -> str:
    with pytest.raises(VarloraError) as error:
        concluded(method, sources, run_dir, **settings)
    assert not run_dir.exists()
    return str(error.value)


def test_laplace_of_an_ivon_run(runs, tmp_path, request):
    ivon = runs("ivon")
    request.getfixturevalue("nothing_loads")
    text = refusal("laplace_kfac", [ivon], tmp_path / "run")
    assert "`laplace_kfac` cannot be concluded from" in text
    assert "a run of `ivon`: it takes adamw. Train one: `varlora train --method adamw`." in text


def test_mc_dropout_of_a_run_without_dropout(base, runs, tmp_path, request):
    without = runs(seed=5, lora={"dropout": 0.0})
    request.getfixturevalue("nothing_loads")
    text = refusal("mc_dropout", [without], tmp_path / "run")
    assert "its rate is 0. Train with `lora.dropout`, 0.1 say." in text


def test_a_method_that_trains_by_itself(runs, tmp_path, request):
    source = runs()
    request.getfixturevalue("nothing_loads")
    text = refusal("ivon", [source], tmp_path / "run")
    assert "`ivon` trains by itself and does not build on finished runs. Leave `--from` out." in text
    assert "or `laplace_diag`?" in refusal("laplace", [source], tmp_path / "run")


def test_how_many_runs(runs, tmp_path, request):
    sources = [runs(), runs("ivon")]
    request.getfixturevalue("nothing_loads")
    assert "Expected one run to conclude tfb from, but got 2" in refusal("tfb", sources, tmp_path / "run")
    assert "Expected two runs or more" in refusal("ensemble", sources[:1], tmp_path / "run")


def test_a_run_that_is_not_finished(runs, tmp_path, request):
    shutil.copytree(runs(), tmp_path / "cut", ignore=lambda *_: ["adapter"])
    request.getfixturevalue("nothing_loads")
    assert "is not finished" in refusal("tfb", [tmp_path / "cut"], tmp_path / "run")


def test_other_settings_than_the_run_has(runs, tmp_path, request):
    source = runs()
    request.getfixturevalue("nothing_loads")
    (settings,) = load_settings(recipe_from([source], "tfb"), {"run_dir": str(tmp_path / "run")}, ["seed=3"])
    with pytest.raises(VarloraError, match="`seed` is 3 and was 0"):
        train(settings, say=silent)


def test_a_source_of_other_rows(task, runs, tmp_path):
    """The data may have changed since; other rows would then be held out."""
    recipe = {**recipe_from([runs()], "mc_dropout"), "run_dir": str(tmp_path / "run")}
    rows = task.with_name("true_or_false.train.jsonl")
    before = rows.read_text()
    try:
        rows.write_text("".join(before.splitlines(keepends=True)[:-2]))
        with pytest.raises(DamagedFileError, match=r"Expected the training rows to be what .* was trained with"):
            train(load_settings(recipe)[0], say=silent)
    finally:
        rows.write_text(before)


@pytest.mark.parametrize(("key", "what"), [*WHAT.items()])
def test_a_source_of_another_base_or_other_rows_by_its_checksums(key, what, runs):
    (settings,) = load_settings(recipe_from([runs(), runs("ivon")], "ensemble"))
    config = json.loads((runs() / "config.json").read_text())
    checksums = {name: config[name] for name in WHAT}
    with pytest.raises(DamagedFileError, match=f"Expected {what} to be what {runs()} was trained with"):
        load_sources(None, settings, {**checksums, key: "0" * 64})
    (apart,) = load_settings(recipe_from([runs(), runs(seed=1)], "ensemble"))  # of which nothing is held out
    with pytest.raises(DamagedFileError, match=f"Expected {WHAT['base']} to be"):
        load_sources(None, apart, {**checksums, "base": "0" * 64})


@pytest.mark.parametrize(
    ("method", "changes", "text"),
    [
        ({"name": "swag", "every": 50}, {"steps": 60}, "60 steps with `start` 0.5 and `every` 50 give 0"),
        ({"name": "swag"}, {"steps": 30}, "Expected snapshots, at least 2"),
        ({"name": "mc_dropout"}, {"lora": {"dropout": 0}}, "its rate is 0. Train with `lora.dropout`"),
        ({"name": "temperature"}, {"calibration_fraction": 0}, "Train with `calibration_fraction`, e.g. 0.1"),
        ({"name": "laplace_diag", "choose_by": "calibration"}, {"calibration_fraction": 0}, "`choose_by: evidence`"),
        ({"name": "laplace_kfac", "curvature": "hessian"}, {}, "Expected `method.curvature` to be one of ggn, fisher"),
        ({"name": "ensemble", "size": 1}, {}, "number of members >= 2 and at most 1000, but got 1"),
        ({"name": "ensemble", "of": "ivonn"}, {}, "Did you mean `ivon`?"),
        ({"name": "ensemble", "of": "ivon", "settings": {"esss": 3}}, {}, "settings.esss` of ivon. Did you mean `ess`"),
        ({"name": "ensemble", "of": "temperature"}, {}, "Train that first"),
        ({"name": "swa", "every": 1}, {"training_arguments": {"warmup_steps": 3}}, "`training_arguments.warmup_steps`"),
        ({"name": "tfb", "bound": 0}, {}, "`bound` to be a relative rise > 0"),
        ({"name": "blob", "prior_std": 0}, {}, "prior_std"),
    ],
)
def test_a_method_that_cannot_work_in_such_a_run(base, method, changes, text):
    with pytest.raises(ConfigError) as error:
        settings_from({**base, **changes, "method": method})
    assert text in str(error.value)


def test_settings_of_the_wrapped_method_are_read_as_its_own(base):
    """Also numbers as YAML reads them, and the defaults filled in."""
    settings = settings_from(
        {**base, "method": {"name": "ensemble", "of": "ivon", "settings": {"ess": "1e5"}, "size": "2"}}
    )
    assert settings.method_settings["settings"]["ess"] == 1e5
    assert settings.to_dict()["method_settings"]["settings"]["hess_init"] == "auto"
    assert settings.to_dict()["method_settings"]["size"] == 2


def test_a_run_directory_that_is_a_source(runs, tmp_path, request):
    """`--overwrite` would delete it first."""
    source = Path(shutil.copytree(runs(), tmp_path / "a" / "source"))
    request.getfixturevalue("nothing_loads")
    for run_dir in (source, source.parent):
        (settings,) = load_settings(recipe_from([source], "tfb"), {"run_dir": str(run_dir)})
        with pytest.raises(VarloraError, match="is or holds"):
            train(settings, overwrite=True, say=silent)
        assert (source / "adapter").is_dir()


def test_the_same_run_twice(runs, tmp_path, request):
    source = runs()
    request.getfixturevalue("nothing_loads")
    assert "one is named twice" in refusal("ensemble", [source, source / ".." / source.name], tmp_path / "run")


@pytest.mark.parametrize("change", [{"max_length": 9}, {"dtype": "bfloat16"}, {"lora": {"rank": 2}}, {"chat": True}])
def test_members_that_were_trained_otherwise_are_refused(change, runs, tmp_path):
    other = Path(shutil.copytree(runs(), tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    for name, value in change.items():
        config["settings"][name] = {**config["settings"][name], **value} if isinstance(value, dict) else value
    (other / "config.json").write_text(json.dumps(config))
    (settings,) = load_settings(recipe_from([runs(), other], "ensemble"), {"run_dir": str(tmp_path / "run")})
    with pytest.raises(VarloraError, match=rf"{other} was trained with, but `{min(change)}` is"):
        check_sources(settings)


@pytest.mark.parametrize(("change", "held_out"), [({}, 0.4), ({"seed": 1}, 0), ({"calibration_fraction": 0.2}, 0)])
def test_members_that_held_out_other_rows_leave_none_held_out(change, held_out, base):
    """What one held out, another was trained on."""
    made = [settings_from({**base, "run_dir": f"runs/{at}", **values}) for at, values in enumerate(({}, change))]
    assert recipe_on(made, "ensemble")["calibration_fraction"] == held_out


def test_an_ensemble_has_as_many_members_as_it_is_of(base):
    made = [settings_from({**base, "run_dir": f"runs/{seed}", "seed": seed}) for seed in range(3)]
    assert recipe_on(made, "ensemble")["method_settings"]["size"] == 3


def test_what_a_source_was_concluded_from_is_remembered(runs, tmp_path):
    """By which runs on ensembles of other members are told apart, after those are gone."""
    source = Path(shutil.copytree(runs(), tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    below = [{"method": "adamw", "method_settings": {"lr": 0.5}}]
    (source / "config.json").write_text(json.dumps({**config, "concluded_from": below}))
    (settings,) = load_settings(recipe_from([source], "temperature"))
    (found,) = identities(settings)
    assert (found["run"], found["method"], found["seed"], found["concluded_from"]) == (str(source), "adamw", 0, below)
    assert found["method_settings"]["lr"] == 1e-3
    assert found["settings"]["steps"] == 6
    assert found["adapter"] == file_digest(source / "adapter" / "manifest.json")


@pytest.mark.parametrize(("steps", "more"), [(6, 3), (5, 3), (1, 1)])
def test_half_as_many_steps_again_are_rounded_up(steps, more, base):
    assert recipe_on([settings_from({**base, "steps": steps, "run_dir": "runs/one"})], "swa")["steps"] == more


@pytest.mark.parametrize("assignment", ["steps=7", "method.lr=0.7", "calibration_fraction=0.2", "lora.rank=2"])
def test_settings_without_effect(runs, tmp_path, request, assignment):
    source = runs()
    request.getfixturevalue("nothing_loads")
    (settings,) = load_settings(recipe_from([source], "tfb"), {"run_dir": str(tmp_path / "run")}, [assignment])
    with pytest.raises(VarloraError, match="a run that builds on another has that one's"):
        train(settings, say=silent)


def test_a_conclusion_is_not_resumed_from_other_runs(runs, tmp_path, monkeypatch):
    def cut(*_):
        raise KeyboardInterrupt

    recipe = {**recipe_from([runs(), runs("ivon")], "ensemble"), "run_dir": str(tmp_path / "run")}
    with monkeypatch.context() as patched:
        patched.setattr("varlora.methods.ensemble.Ensemble.posterior", cut)
        with pytest.raises(KeyboardInterrupt):
            train(load_settings(recipe)[0], say=silent)
    other = {**recipe, "sources": [str(runs()), str(runs("ivon", steps=5))]}
    with pytest.raises(VarloraError):
        train(load_settings(other)[0], resume=True, say=silent)
    train(load_settings(recipe)[0], resume=True, say=silent)


def test_an_ensemble_of_runs_on_other_rows_has_nothing_held_out(task, base, runs, tmp_path):
    """Same seed and fraction, other data: what one held out, the other was trained on."""
    data = Path(shutil.copytree(task.parent, tmp_path / "data"))
    rows = data / "true_or_false.train.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-3]))
    other = tmp_path / "other"
    train(settings_from({**base, "data_dir": str(data), "run_dir": str(other)}), say=silent)
    recipe = {**recipe_from([runs(), other], "ensemble"), "run_dir": str(tmp_path / "run")}
    with pytest.raises(DamagedFileError, match=r"rows to be what .* was trained with"):
        train(load_settings(recipe)[0], say=silent)
    assert not (tmp_path / "run").exists()


def test_reports_tell_ensembles_of_other_members_apart(runs, tmp_path):
    folders = []
    for number, other in enumerate((runs("ivon"), runs(seed=1))):
        folders.append(concluded("ensemble", [runs(), other], tmp_path / str(number)))
        evaluate(folders[-1], samples=2, say=silent)
    report = build_report(folders, tmp_path / "report")
    assert not report.skipped
    assert sum("members=adamw+ivon" in row.differs for row in report.rows) == 4  # mean and draws, with +T
    points = [row.label for row in report.rows if "members=adamw+adamw" in row.differs]
    assert points == ["ensemble x2"]  # which has no other mean


# --- temperatures ---


@pytest.mark.parametrize("method", ["adamw", "ivon"])
def test_evaluation_fits_a_temperature_on_the_held_out_rows(method, runs, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(runs(method), run_dir)
    results = evaluate(run_dir, samples=3, say=silent)
    held_out = load_predictions(run_dir / "predictions-calibration.safetensors")
    found = load_predictions(run_dir / "predictions.safetensors")
    assert not set(held_out.ids) & set(found.ids)
    temperature = fit_temperature(held_out.logits, held_out.labels)
    assert results["temperature"] == {
        "draws": temperature,
        "mean": fit_temperature(held_out.logits_mean[None], held_out.labels),
    }
    probs = metrics.average_probs(found.logits / temperature)
    assert results["draws_tempered"] == metrics.evaluate(probs, found.labels)
    at_mean = metrics.average_probs(found.logits_mean[None] / results["temperature"]["mean"])
    assert results["mean_tempered"] == metrics.evaluate(at_mean, found.labels)
    report = build_report([run_dir], tmp_path / "report")
    labels = {"adamw": ["adamw", "adamw +T"], "ivon": ["ivon@mean", "ivon@mean +T", "ivon x3", "ivon x3 +T"]}[method]
    assert [row.label for row in report.rows] == labels
    assert report.rows[-1].stats["nll"].mean == results["draws_tempered"]["nll"]
    assert "+T:" in (tmp_path / "report" / "report.md").read_text()


def test_the_held_out_rows_are_predicted_once(runs, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    shutil.copytree(runs("ivon"), run_dir)
    evaluate(run_dir, samples=2, say=silent)
    seen = []

    def counted(model, posterior, rows, **settings):
        seen.append(len(rows))
        return predict(model, posterior, rows, **settings)

    from varlora.predict import predict

    monkeypatch.setattr("varlora.evaluation.predict", counted)
    evaluate(run_dir, samples=2, say=silent)
    assert len(seen) == 1
    evaluate(run_dir, samples=3, say=silent)  # other draws
    assert len(seen) == 3
    (run_dir / "predictions-calibration.safetensors").write_bytes(b"damaged")
    evaluate(run_dir, samples=3, say=silent)
    assert len(seen) == 5


def test_without_held_out_rows_or_wish_there_is_no_temperature(runs, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(runs(), run_dir)
    assert "temperature" not in evaluate(run_dir, temperature=False, say=silent)
    assert [row.label for row in build_report([run_dir], tmp_path / "report").rows] == ["adamw"]
    assert not (run_dir / "predictions-calibration.safetensors").exists()


def test_predictions_are_kept_where_no_temperature_can_be_fitted(task, runs, tmp_path):
    """The held-out rows are others now, or gone."""
    run_dir, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(runs("ivon"), run_dir)
    shutil.copytree(task.parent, data)
    rows = data / "true_or_false.train.jsonl"
    lines = rows.read_text().splitlines(keepends=True)
    for text, why in (("".join(lines[1:]), "its checksum differs"), (None, "true_or_false.train.jsonl")):
        rows.write_text(text) if text else rows.unlink()
        said = []
        results = evaluate(run_dir, samples=2, data_dir=str(data), say=said.append)
        assert "temperature" not in results
        assert any("No temperature was fitted" in line and why in line for line in said), said
        assert load_predictions(run_dir / "predictions.safetensors").temperatures is None
    with pytest.raises(VarloraError):
        evaluate(run_dir, split="calibration", data_dir=str(data), say=silent)


@pytest.mark.parametrize(
    ("label", "text"), [(0, "The 5 held-out rows do not set"), (1, "at the end of its range, 50: the 5 held-out rows")]
)
def test_a_temperature_that_rows_do_not_set_is_said(label, text):
    said = []
    fit_temperature(torch.tensor([[[1.0, 0.0]] * 5]), torch.full((5,), label), said.append)
    assert text in said[0]


def test_a_tempered_run_has_its_temperature_already(runs, tmp_path):
    plain, tempered = tmp_path / "plain", concluded("temperature", [runs()], tmp_path / "run")
    shutil.copytree(runs(), plain)
    results = evaluate(tempered, say=silent)
    assert "temperature" not in results
    assert results["mean"]["nll"] == pytest.approx(evaluate(plain, say=silent)["mean_tempered"]["nll"], rel=1e-6)


# --- the command line ---


def test_from_the_command_line(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = str(runs())
    arguments = ["train", "--method", "laplace_kfac", "--from", source, "--run-dir", "run", "--set", "method.rank=3"]
    assert main(arguments) == 0
    assert "The prior precision is" in capsys.readouterr().out
    assert main(["evaluate", "run"]) == 0
    shown = capsys.readouterr()
    assert "mean +T" in shown.out + shown.err
    assert "256 +T" in shown.out + shown.err
    assert main(["train", "--method", "ivon", "--from", source, "--run-dir", "other"]) == 1
    assert "`ivon` trains by itself" in capsys.readouterr().err
    assert main(["train", "recipe.yaml", "--method", "tfb", "--from", source]) == 1
    assert "Expected a recipe or `--from`, but got both" in capsys.readouterr().err
    assert main(["train", "--method", "tfb", "--from", "nowhere"]) == 1
    assert "no run directory nowhere" in capsys.readouterr().err
