"""Train, load, evaluate and predict from Python, on a small real model and a few rows."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from helpers import same
from transformers import PreTrainedTokenizerBase

import varlora
from varlora import metrics
from varlora.calibration import Calibration
from varlora.config import Settings, settings_from, settings_of
from varlora.drawing import PLAIN
from varlora.errors import ConfigError, DamagedFileError, TaskError, VarloraError
from varlora.evaluation import answer_rows, evaluate
from varlora.files import write_json
from varlora.loading import digest_of, load, revision_of, rows_of_split
from varlora.predictions import load_predictions
from varlora.tasks import Example, get_task, load_rows
from varlora.training import check_run_dir, train, validate

ASSETS = Path(__file__).parent / "assets"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(bundled, one_thread) -> dict:
    return {
        "task": "boolq",
        "model": str(bundled),
        "data_dir": str(ASSETS),
        "calibration_fraction": 0.0,
        "steps": 3,
    }


@pytest.fixture(scope="module")
def run_dir(base, tmp_path_factory) -> Path:
    """A trained run that no test changes, except for its predictions."""
    folder = tmp_path_factory.mktemp("workflow") / "run"
    train(settings_from({**base, "run_dir": str(folder)}), say=silent)
    return folder


def silent(text: str) -> None:
    pass


def test_the_run_directory_holds_what_the_architecture_says(run_dir):
    config = json.loads((run_dir / "config.json").read_text())
    assert config["settings"]["method_settings"]["ess"] == "auto"  # the method's defaults are filled in
    assert config["settings"]["seed"] == 0
    assert {"versions", "commit", "machine", "time", "task_version", "prompt_version"} <= config.keys()
    assert (config["training_rows"], config["cut"]) == (3, 0)
    adapter = {path.name for path in (run_dir / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "posterior.safetensors"} <= adapter
    logged = [json.loads(line) for line in (run_dir / "training.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logged if "loss" in entry] == [1, 2, 3]
    assert all(entry["sigma"] > 0 for entry in logged if "loss" in entry)


def test_each_prompt_is_tokenised_once_however_many_epochs_there_are(base, tmp_path, monkeypatch):
    prompts: list[str] = []
    call = PreTrainedTokenizerBase.__call__

    def spy(self, text, *args, **kwargs):
        prompts.extend([text] if isinstance(text, str) else text)
        return call(self, text, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", spy)
    train(settings_from({**base, "run_dir": str(tmp_path / "run"), "steps": 7, "batch_size": 2}), say=silent)
    long = Counter(prompt for prompt in prompts if "Context:" in prompt)
    assert len(long) == 3
    assert set(long.values()) == {1}


def test_signs_that_a_scale_does_not_suit_are_said_at_the_end(base, tmp_path):
    """Also of a scale that was given."""
    said: list[str] = []
    given = {"ess": 100.0, "hess_init": 1e-3, "lr": 1e-6}  # sigma 3
    settings = {**base, "run_dir": str(tmp_path / "run"), "steps": 15, "method_settings": given}
    train(settings_from(settings), say=said.append)
    assert [words for words in said if "raise sigma" in words.lower() or "lower sigma" in words.lower()]
    assert "hardly anything was learned" in " ".join(said)


def test_load_gives_model_and_posterior(run_dir):
    model, posterior = varlora.load(run_dir)
    assert isinstance(posterior, varlora.DiagonalGaussian)
    assert not model.training
    loaded = load(run_dir)
    assert loaded.settings == settings_of(run_dir)
    assert loaded.tokenizer.padding_side == "left"


def test_evaluation_writes_predictions_and_metrics_of_them(run_dir):
    results = varlora.evaluate(run_dir, samples=3, say=silent)
    predictions = load_predictions(run_dir / "predictions.safetensors")
    assert predictions.logits.shape == (3, 2, 2)
    assert predictions.meta["task"] == "boolq"
    assert predictions.meta["split"] == "dev"
    assert results["mean"] == metrics.evaluate(predictions.probs_mean, predictions.labels)
    assert results["draws"] == metrics.evaluate(predictions.probs, predictions.labels)
    assert (results["rows"], results["samples"], results["cut"]) == (2, 3, 0)
    written = json.loads((run_dir / "metrics.json").read_text())
    assert {name: written[name] for name in results} == results


def test_evaluation_gives_the_same_bits_each_time(run_dir):
    bits = []
    for _ in range(2):
        evaluate(run_dir, samples=2, say=silent)
        bits.append(load_predictions(run_dir / "predictions.safetensors"))
    assert torch.equal(bits[0].logits, bits[1].logits)
    assert torch.equal(bits[0].logits_mean, bits[1].logits_mean)
    assert (bits[0].ids, bits[0].meta) == (bits[1].ids, bits[1].meta)


def test_at_the_mean_there_are_no_draws(run_dir):
    results = evaluate(run_dir, samples=0, say=silent)
    assert results["samples"] == 0
    assert results["draws"] is None


def test_other_prompts_than_were_trained_on_are_said(run_dir, tmp_path):
    older = shutil.copytree(run_dir, tmp_path / "older")
    config = json.loads((older / "config.json").read_text())
    (older / "config.json").write_text(json.dumps({**config, "prompt_version": "1", "task_version": "0"}))
    said: list[str] = []
    evaluate(older, samples=0, say=said.append)
    assert f"Prompts are of version 2 now, and were of 1 when {older} was trained." in said
    assert any(words.endswith(f"and was of 0 when {older} was trained.") for words in said)
    evaluate(run_dir, samples=0, say=said.append)
    assert not any(str(run_dir) in words for words in said)


def test_a_point_has_one_draw(base, tmp_path):
    folder = train(settings_from({**base, "method": "adamw", "run_dir": str(tmp_path / "run")}), say=silent)
    results = evaluate(folder, samples=4, say=silent)
    assert results["samples"] == 1  # what it was averaged over, not what was asked for
    assert results["draws"] == results["mean"]


def test_the_progress_is_told_of_every_row(run_dir):
    from contextlib import contextmanager

    told = []

    @contextmanager
    def progress(rows):
        told.append(rows)
        yield told.append

    evaluate(run_dir, split="train", samples=1, token_budget=1, say=silent, progress=progress)
    assert told == [3, 1, 1, 1]


def test_answers_have_probabilities_and_uncertainty(run_dir):
    examples = load_rows(get_task("boolq"), "dev", ASSETS).examples
    unknown = [dataclasses.replace(example, label=None) for example in examples]
    answers = list(answer_rows(load(run_dir), unknown, samples=3, say=silent))
    assert [answer["id"] for answer in answers] == [example.id for example in examples]
    for answer in answers:
        assert list(answer["probabilities"]) == ["False", "True"]
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        assert answer["probabilities"][answer["answer"]] == max(answer["probabilities"].values())
        parts = answer["uncertainty"]
        assert parts["total"] == pytest.approx(parts["aleatoric"] + parts["epistemic"])
        assert parts["epistemic"] >= 0
    evaluate(run_dir, samples=3, say=silent)
    saved = load_predictions(run_dir / "predictions.safetensors").probs
    given = torch.tensor([list(answer["probabilities"].values()) for answer in answers])
    torch.testing.assert_close(given, saved.float(), rtol=1e-5, atol=1e-6)


# --- splits ----------------------------------------------------------------------------------------------------------


def test_a_posterior_is_used_as_was_chosen_unless_its_variance_is_given(run_dir):
    plain = load(run_dir)
    chosen = Calibration(tau=0.25, pruned=0.5, temperature=1.5, temperature_mean=2.0, samples=4)
    calibrated = dataclasses.replace(plain, calibration=chosen)
    for loaded, given, expected in (
        (plain, (None, None), (plain.posterior, 10, 1.0)),
        (plain, (3, 2.0), (plain.posterior.scale(2.0), 3, 2.0)),
        (calibrated, (None, None), (chosen.applied(plain.posterior), 4, 0.25)),
        (calibrated, (0, None), (chosen.applied(plain.posterior), 0, 0.25)),
        (calibrated, (None, 1.0), (plain.posterior, 10, 1.0)),
    ):
        posterior, samples, tau, how = loaded.used(*given)
        assert how.noise in (None, "independent")
        assert dataclasses.replace(how, noise=None) == PLAIN
        assert (type(posterior), samples, tau) == (type(expected[0]), *expected[1:])
        assert same(posterior.tensors(), expected[0].tensors())


def test_calibration_rows_are_never_trained_on_nor_reported(base, tmp_path):
    lines = [
        json.dumps({"question": f"is {i} even", "passage": f"Number {i}.", "answer": i % 2 == 0}) for i in range(40)
    ]
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "boolq" / "dev.jsonl").write_text(lines[0].replace("0", "40"))
    values = {**base, "data_dir": str(tmp_path), "calibration_fraction": 0.25, "run_dir": str(tmp_path / "run")}
    settings = settings_from(values)
    task = get_task("boolq")
    calibration = rows_of_split(task, "calibration", settings, silent)
    folder = train(settings, say=silent)
    config = json.loads((folder / "config.json").read_text())
    assert 0 < len(calibration) < 40
    assert config["training_rows"] == 40 - len(calibration)
    assert len(rows_of_split(task, "dev", settings, silent)) == 1
    trained = {example.id for example in rows_of_split(task, "train", settings, silent)}
    assert trained.isdisjoint(example.id for example in calibration)  # what is chosen on rows is not shown on them
    results = evaluate(folder, split="calibration", samples=1, say=silent)
    assert results["rows"] == len(calibration)
    assert (folder / "metrics-calibration.json").is_file()
    assert not (folder / "predictions.safetensors").exists()  # which a report would read


def test_without_calibration_rows_there_is_no_such_split(run_dir):
    with pytest.raises(VarloraError, match="held no rows out"):
        evaluate(run_dir, split="calibration", say=silent)
    with pytest.raises(VarloraError, match="Did you mean `dev`"):
        evaluate(run_dir, split="deev", say=silent)


def test_validate_says_what_it_found(base):
    found = "\n".join(validate(settings_from(base)))
    for text in (
        "3 training, 0 calibration and 2 dev rows",
        "16,384 trainable",
        "Longest prompt: 78",
        "'False' 'ĠFalse'",
    ):
        assert text in found
    found = "\n".join(validate(settings_from({**base, "max_length": 20})))
    assert "5 of 5 prompts were longer than 20 tokens" in found


def test_a_max_length_beyond_the_context_is_said(base, tmp_path):
    said = []
    train(settings_from({**base, "max_length": 5000, "steps": 1, "run_dir": str(tmp_path / "r")}), say=said.append)
    assert any("`max_length` 5000 is more than the model's context; 512 tokens are used." in text for text in said)


# --- run directories -------------------------------------------------------------------------------------------------


def test_settings_of_a_run_are_those_that_it_was_started_with(run_dir, base):
    assert settings_of(run_dir).to_dict() == settings_from({**base, "run_dir": str(run_dir)}).to_dict()


def test_an_existing_run_is_refused_before_anything_is_loaded(run_dir, base):
    settings = settings_from({**base, "model": "nowhere/at/all", "run_dir": str(run_dir)})
    with pytest.raises(VarloraError, match=r"exists already. Pass `--resume`"):
        train(settings, say=silent)


def test_a_run_is_not_resumed_with_other_settings(run_dir, base):
    same = {**base, "run_dir": str(run_dir)}
    check_run_dir(settings_from(same), resume=True)
    check_run_dir(settings_from({**same, "model": "moved", "data_dir": "moved"}), resume=True)
    with pytest.raises(VarloraError, match="`steps` is 4 and was 3"):
        check_run_dir(settings_from({**same, "steps": 4}), resume=True)
    with pytest.raises(VarloraError, match="`method` is 'adamw' and was 'ivon'"):
        check_run_dir(settings_from({**same, "method": "adamw"}), resume=True)


def test_a_finished_run_is_left_alone(run_dir):
    said = []
    before = (run_dir / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert train(settings_of(run_dir), resume=True, say=said.append) == run_dir
    assert "trained already" in said[0]
    assert (run_dir / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "posterior.safetensors", "manifest.json"])
def test_a_finished_run_that_is_damaged_is_made_again_from_its_checkpoint(run_dir, tmp_path, name):
    copy, said = shutil.copytree(run_dir, tmp_path / "copy"), []
    file = copy / "adapter" / name
    file.write_bytes(file.read_bytes()[:-10])
    settings = dataclasses.replace(settings_of(copy), run_dir=str(copy))
    train(settings, resume=True, say=said.append)
    assert "made again, from the last checkpoint" in said[0]
    assert same(load(copy).posterior.tensors(), load(run_dir).posterior.tensors())


def test_what_is_no_run_is_refused_before_anything_is_loaded(base, tmp_path, monkeypatch):
    """To go on with, and to overwrite: of several seeds before the first one is trained."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".notes.01234567.old").write_text("notes")
    monkeypatch.setattr("varlora.loading.load_model", None)
    for how in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(VarloraError, match="not a run directory"):
            check_run_dir(settings_from({**base, "run_dir": str(tmp_path / "mine")}), **how)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [".notes.01234567.old"]


def test_what_a_run_reads_is_not_overwritten_with_it(run_dir, base, tmp_path):
    """A task file, data or a model that lie in the run directory would be deleted before they are read."""
    copied = shutil.copytree(run_dir, tmp_path / "copy")
    task = shutil.copy(Path(base["model"]).parent / "tasks" / "two_choices.yaml", copied / "task.yaml")
    before = sorted(copied.rglob("*"))
    for name, path in (("task", task), ("data_dir", copied), ("model", copied / "adapter")):
        with pytest.raises(VarloraError, match=f"`--overwrite` would delete .*which is `{name}` of the run"):
            train(settings_from({**base, name: str(path), "run_dir": str(copied)}), overwrite=True, say=silent)
        assert sorted(copied.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "adamw", "lora": {"dtype": "float16"}}, "`eps` that float16 can hold"),
        ({"batch_size": 1000, "training_arguments": {"dataloader_drop_last": True}}, "drops all of 3 rows"),
    ],
)
def test_what_cannot_be_trained_does_not_cost_the_run_before(run_dir, base, tmp_path, change, says):
    copied = shutil.copytree(run_dir, tmp_path / "copy")
    before = sorted(copied.rglob("*"))
    with pytest.raises(VarloraError, match=says):
        train(settings_from({**base, **change, "run_dir": str(copied)}), overwrite=True, say=silent)
    assert sorted(copied.rglob("*")) == before


def test_a_run_that_fails_early_leaves_no_directory(base, tmp_path):
    for change in ({"model": str(tmp_path / "none")}, {"data_dir": str(tmp_path)}, {"chat": True}):
        with pytest.raises(VarloraError):
            train(settings_from({**base, **change, "run_dir": str(tmp_path / "run")}), say=silent)
        assert not (tmp_path / "run").exists()


def test_what_is_no_finished_run_is_refused(run_dir, tmp_path):
    with pytest.raises(VarloraError, match="There is no run directory"):
        load(tmp_path / "none")
    with pytest.raises(DamagedFileError, match=r"config.json, but it is absent"):
        load(tmp_path)
    shutil.copy(run_dir / "config.json", tmp_path)
    with pytest.raises(VarloraError, match="training is not finished"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"settings": 5}')
    with pytest.raises(DamagedFileError, match="Expected settings"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"settings": {"task": "bolq", "model": "m"}}')
    with pytest.raises(ConfigError, match="bolq"):
        load(tmp_path)


def test_a_damaged_posterior_is_refused(run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    file = copy / "adapter" / "posterior.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DamagedFileError, match=r"posterior.safetensors is damaged"):
        load(copy)
    file.unlink()
    with pytest.raises(DamagedFileError, match=r"posterior.safetensors is absent"):
        load(copy)


def test_a_posterior_of_another_model_is_refused(run_dir, shared):
    with pytest.raises(DamagedFileError, match="to be of this model"):
        load(run_dir, model=str(shared / "models" / "tinyllama-3m"))


def test_a_run_directory_can_be_moved(run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "elsewhere")
    assert settings_of(copy).folder == copy
    assert evaluate(copy, samples=1, say=silent)["rows"] == 2
    assert (copy / "metrics.json").is_file()


def test_a_run_outlives_its_task_file(base, bundled, tmp_path):
    shutil.copytree(bundled.parent / "tasks", tmp_path / "here")
    task = tmp_path / "here" / "four_choices.yaml"
    mine = {**base, "task": str(task), "data_dir": None, "run_dir": str(tmp_path / "run")}
    run = train(settings_from(mine), say=silent)
    moved = (tmp_path / "here").rename(tmp_path / "there")
    assert load(run).posterior is not None
    with pytest.raises(TaskError, match=r"Point `data_dir`"):
        evaluate(run, samples=1, say=silent)
    assert evaluate(run, samples=1, data_dir=moved, say=silent)["rows"] > 2
    elsewhere = {**mine, "task": str(moved / task.name)}
    assert train(settings_from(elsewhere), resume=True, say=silent) == run
    with pytest.raises(VarloraError, match=r"`task` is .*two_choices\.yaml' and was .*task\.yaml'"):
        train(settings_from({**mine, "task": str(moved / "two_choices.yaml")}), resume=True, say=silent)


def test_settings_may_come_from_python_alone(base, tmp_path):
    settings = Settings(**base, run_dir=str(tmp_path / "run"), row_filter=True)
    assert (varlora.train(settings, say=silent) / "adapter").is_dir()


def test_settings_made_in_python_are_checked(base, tmp_path):
    wrong = Settings(task="boolqq", model=base["model"], method="ivn", steps=0, run_dir=str(tmp_path / "run"))
    with pytest.raises(ConfigError) as caught:
        train(wrong, say=silent)
    assert len(caught.value.problems) == 3
    assert not (tmp_path / "run").exists()


def test_a_run_finds_its_data_from_any_folder(base, tmp_path, monkeypatch):
    shutil.copytree(ASSETS / "boolq", tmp_path / "here" / "boolq")
    monkeypatch.chdir(tmp_path / "here")
    folder = train(Settings(**{**base, "data_dir": ".", "run_dir": str(tmp_path / "run")}), say=silent)
    monkeypatch.chdir(tmp_path)
    assert evaluate(folder, samples=0, say=silent)["rows"] == 2


def test_another_base_of_the_same_shapes_is_refused(run_dir, base, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = AutoModelForCausalLM.from_pretrained(base["model"])
    other.get_input_embeddings().weight.data.mul_(1.01)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(base["model"]).save_pretrained(tmp_path / "other")
    with pytest.raises(DamagedFileError, match=r"the base model .*other to be what .* was trained with"):
        load(run_dir, model=str(tmp_path / "other"))
    shutil.copytree(base["model"], tmp_path / "copy")
    load(run_dir, model=str(tmp_path / "copy"))


def test_a_run_is_not_resumed_with_other_rows(run_dir, base, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.copytree(ASSETS / "boolq", tmp_path / "data" / "boolq")
    rows = (tmp_path / "data" / "boolq" / "train.jsonl").read_text().splitlines()
    (tmp_path / "data" / "boolq" / "train.jsonl").write_text("\n".join(reversed(rows)) + "\n")
    changed = settings_from({**base, "run_dir": str(tmp_path / "run"), "data_dir": str(tmp_path / "data")})
    with pytest.raises(DamagedFileError, match="the training rows of boolq"):
        train(changed, resume=True, say=silent)


def test_a_task_of_another_version_is_said(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "task_version": "0"}))
    said: list[str] = []
    evaluate(tmp_path / "run", samples=0, say=said.append)
    assert any("was of 0" in text for text in said)


def test_choices_that_no_prompt_has_are_said(base, bundled, tmp_path):
    text = (bundled.parent / "tasks" / "four_choices.yaml").read_text()
    said: list[str] = []
    for prompt in ("{question} Choices: {choices} Answer:", "{question} Answer:"):
        (tmp_path / "task.yaml").write_text(yaml.safe_dump({**yaml.safe_load(text), "prompt": prompt}))
        there = {"task": str(tmp_path / "task.yaml"), "data_dir": str(bundled.parent / "tasks")}
        said.append(" ".join(validate(settings_from({**base, **there}))))
    assert ["Write {choices} into the task file's `prompt`" in found for found in said] == [False, True]


def test_a_task_file_that_was_changed_is_said(base, bundled, tmp_path):
    text = (bundled.parent / "tasks" / "four_choices.yaml").read_text()
    (tmp_path / "task.yaml").write_text(text)
    there = {"task": str(tmp_path / "task.yaml"), "data_dir": str(bundled.parent / "tasks")}
    run = train(settings_from({**base, **there, "run_dir": str(tmp_path / "run")}), say=silent)
    said: list[str] = []
    evaluate(run, samples=0, say=said.append)
    assert not any("changed" in line for line in said)
    (tmp_path / "task.yaml").write_text(text + "# another\n")
    evaluate(run, samples=0, say=said.append)
    assert any(f"{tmp_path / 'task.yaml'} was changed since {run} was trained" in line for line in said)


def test_an_evaluation_that_fails_leaves_the_one_before(run_dir, tmp_path):
    run = shutil.copytree(run_dir, tmp_path / "run")
    evaluate(run, samples=2, say=silent)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for wrong in ({"split": "tset"}, {"token_budget": 0}, {"data_dir": str(tmp_path)}, {"ood": ["arc_easy", "nope"]}):
        with pytest.raises(VarloraError):
            evaluate(run, **{"samples": 3, "say": silent, **wrong})
    for twice in ({"ood": ["arc_easy", "arc_easy"]}, {"taus": [0.5, 0.50000001]}):
        with pytest.raises(VarloraError, match="to differ, as files are named by them"):
            evaluate(run_dir, **twice, say=silent)
    with pytest.raises(VarloraError, match="neither `ood` nor `taus` nor `calibrated`"):
        evaluate(run, split="calibration", taus=[0.5], say=silent)
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_slice_that_no_row_has_is_said(base, bundled, tmp_path):
    text = (bundled.parent / "tasks" / "four_choices.yaml").read_text().replace("slice: fact", "slice: fcat")
    (tmp_path / "task.yaml").write_text(text)
    settings = settings_from({**base, "task": str(tmp_path / "task.yaml"), "data_dir": str(bundled.parent / "tasks")})
    assert any("No row of four_choices has the field `fcat`" in line for line in validate(settings))


def test_a_run_is_not_resumed_on_another_base(run_dir, base, tmp_path):
    """Whose adapter would fit, and be of neither."""
    config = json.loads((run_dir / "config.json").read_text())
    changed = settings_from({**base, "run_dir": str(tmp_path / "run")})
    stored = {**config, "settings": changed.to_dict(), "base": "0" * 64}
    write_json(tmp_path / "run" / "config.json", stored)
    with pytest.raises(DamagedFileError, match=r"the base model .* to be what .* was trained with"):
        train(changed, resume=True, say=silent)


def test_a_base_in_another_place_has_its_own_revision(base):
    settings = dataclasses.replace(settings_from(base), revision="v1")
    assert [revision_of(settings, model) for model in (None, base["model"], "a/copy")] == ["v1", "v1", None]


def test_rows_are_known_by_all_that_they_say_in_whatever_order():
    rows = [Example(str(i), "", "a question", "", ("yes", "no"), 0) for i in range(2)]
    changes = ({"id": "x"}, {"context": "another"}, {"answers": ("no", "yes")}, {"label": 1})
    others = [[dataclasses.replace(rows[0], **change), rows[1]] for change in changes]
    assert digest_of(rows[::-1]) == digest_of(rows)
    assert len({digest_of(found) for found in (rows, rows[:1], *others)}) == 6
