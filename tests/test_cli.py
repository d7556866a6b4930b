"""The command line as its users see it: what it prints, writes, refuses and returns."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import helpers
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import varlora
from varlora.cli import main
from varlora.config import load_settings
from varlora.errors import Interrupted
from varlora.methods.base import Prepared
from varlora.predict import Predictor
from varlora.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
ASSETS = Path(__file__).parent / "assets"
pytestmark = pytest.mark.usefixtures("one_thread")
VERBS = (
    *("train", "tune", "calibrate", "evaluate", "predict", "serve", "report", "reproduce", "ls", "validate", "demo"),
    *("export", "push"),
)


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def varlora_(capsys, monkeypatch):
    """Run the command line in this process: `varlora_("ls", "tasks", stdin="...")`."""

    def run(*arguments, stdin: str | None = None) -> Result:
        if stdin is not None:
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            code = stop.code or 0
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def model(bundled) -> str:
    return str(bundled)


@pytest.fixture(scope="module")
def options(model) -> list[str]:
    """A training of three steps on three rows."""
    data = ["--task", "boolq", "--data-dir", str(ASSETS), "--model", model]
    return [*data, "--calibration-fraction", "0", "--steps", "3"]


@pytest.fixture(scope="module")
def trained(options, tmp_path_factory) -> Path:
    """A trained run that no test changes."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", *options, "--run-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of a trained run, for a test to change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def in_subprocess(*arguments, **more) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, **more)


def error_of(result: Result) -> str:
    """Return the message of a refusal: there is one, on standard error, and the exit code says so."""
    assert result.code == 1
    assert result.err.count("error: ") == 1
    return result.err[result.err.index("error: ") :]


# --- the whole way ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["adamw", "ivon"])
def test_train_evaluate_report_predict(varlora_, options, tmp_path, method):
    run = tmp_path / "run"
    result = varlora_("train", *options, "--method", method, "--run-dir", run)
    assert result.code == 0
    lines = result.out.splitlines()
    assert f"{method} on boolq" in lines[0]
    steps = [line for line in lines if re.search(r"step \d/3 +loss \d\.\d{3}", line)]
    assert len(steps) == 3
    assert all(bool(re.search(r"σ \d\.\d\de-\d\d", line)) == (method == "ivon") for line in steps)
    assert ("Found by a look at the training rows" in result.out) == (method == "ivon")
    assert lines[-2] == f"The adapter and its posterior are in {run / 'adapter'}."
    assert lines[-1] == f"Next: varlora evaluate {run}"
    assert "\x1b" not in result.out  # no terminal, no colours

    result = varlora_("evaluate", run, "--samples", "4")
    assert result.code == 0
    assert "ECE x100" in result.out
    assert result.out.splitlines()[-2].startswith("Written: predictions.safetensors and metrics.json in ")
    assert json.loads((run / "metrics.json").read_text())["split"] == "dev"

    result = varlora_("report", run, "--out", tmp_path / "report")
    assert result.code == 0
    written = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"report.md", "report.json", "reliability.png", "reliability.svg"} <= written
    assert ("ivon@mean" in result.out and "ivon x4" in result.out) if method == "ivon" else "adamw" in result.out
    assert result.out.splitlines()[-1].startswith("Written: ")

    result = varlora_("predict", run, "--input", ASSETS / "boolq" / "dev.jsonl")
    assert result.code == 0
    assert [json.loads(line)["id"] for line in result.out.splitlines()] == ["0", "1"]


@pytest.mark.parametrize("task", [*TASKS, "recipes/local/sst2.yaml"])
def test_every_task_on_real_rows(varlora_, shared, model, tmp_path, monkeypatch, task):
    monkeypatch.chdir(ROOT)
    data = helpers.first_rows(shared, tmp_path / "data", 30)
    run = tmp_path / "run"
    where = ["--data-dir", data, "--model", model, "--run-dir", run]
    assert varlora_("train", "--task", task, *where, "--steps", 3, "--row-filter").code == 0
    assert varlora_("evaluate", run, "--samples", 2).code == 0
    assert json.loads((run / "metrics.json").read_text())["draws"]["nll"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("task", [*TASKS, "recipes/local/sst2.yaml"])
def test_every_task_on_all_rows(varlora_, shared, tmp_path, monkeypatch, task):
    monkeypatch.chdir(ROOT)
    run = tmp_path / "run"
    where = ["--data-dir", shared / "data", "--model", shared / "models" / "tinyllama-3m", "--run-dir", run]
    assert varlora_("train", "--task", task, *where, "--steps", 20, "--method", "ivon").code == 0
    assert varlora_("evaluate", run, "--samples", 1).code == 0
    assert varlora_("report", run, "--out", tmp_path / "report").code == 0


def test_a_recipe_with_seeds_gives_a_run_for_each(varlora_, options, model, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"task: boolq\nmodel: {model}\ndata_dir: {ASSETS}\ncalibration_fraction: 0\nsteps: 1\n")
    with recipe.open("a") as file:
        file.write(f"seeds: [21, 42]\nrun_dir: {tmp_path / 'runs'}\n")
    result = varlora_("train", recipe)
    assert result.code == 0
    runs = [tmp_path / "runs" / "seed21", tmp_path / "runs" / "seed42"]
    assert result.out.splitlines()[-1] == f"Next: varlora evaluate {runs[0]} {runs[1]}"
    assert [json.loads((run / "config.json").read_text())["settings"]["seed"] for run in runs] == [21, 42]
    weights = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in runs]
    assert weights[0] != weights[1]

    assert varlora_("train", recipe, "--seed", 7, "--run-dir", tmp_path / "seven").code == 0
    assert json.loads((tmp_path / "seven" / "config.json").read_text())["settings"]["seed"] == 7

    shutil.rmtree(runs[0])  # the second is refused before the first is trained
    assert "seed42 exists already" in error_of(varlora_("train", recipe))
    assert not runs[0].exists()
    result = varlora_("train", recipe, "--resume")  # one is new, one is finished
    assert result.code == 0
    assert "seed42 is trained already" in result.out
    assert (runs[0] / "adapter" / "adapter_model.safetensors").read_bytes() == weights[0]

    assert varlora_("evaluate", *runs, "--samples", 1).code == 0
    result = varlora_("report", *runs, "--out", tmp_path / "report")
    assert "±" in result.out


def test_any_setting_can_be_set(varlora_, options, tmp_path):
    more = ["--set", "lora.rank=2", "--set", "method.ess=1e7", "training_arguments.max_grad_norm=1e-1"]
    assert varlora_("train", *options, *more, "--run-dir", tmp_path / "run").code == 0
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert settings["lora"]["rank"] == 2
    assert settings["method_settings"]["ess"] == 1e7
    assert settings["training_arguments"] == {"max_grad_norm": 0.1}


# --- run directories that exist --------------------------------------------------------------------------------------


def test_an_interrupted_run_is_resumed_to_the_same_bits(varlora_, options, tmp_path, monkeypatch):
    options = [*options, "--steps", "6", "--checkpoint-every", "2"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert varlora_("train", *options, "--run-dir", whole).code == 0

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("varlora.progress.TrainingProgress.on_step_end", interrupt)
        result = varlora_("train", *options, "--run-dir", broken)
    assert result.code == 130
    assert "Stopped at step" in result.err
    assert "Run the same command with `--resume`" in result.err
    assert not (broken / "adapter").exists()

    assert "not finished" in error_of(varlora_("evaluate", broken))
    assert "exists already" in error_of(varlora_("train", *options, "--run-dir", broken))
    changed = varlora_("train", *options, "--batch-size", 2, "--run-dir", broken, "--resume")
    assert "`batch_size` is 2 and was 4" in error_of(changed)

    result = varlora_("train", "--resume", "--run-dir", broken)  # the directory knows the rest
    assert result.code == 0
    assert re.search(r"Going on from step [34]\.", result.out)
    for name in ("adapter_model.safetensors", "posterior.safetensors"):
        assert (broken / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes()

    result = varlora_("train", *options, "--run-dir", broken, "--resume")
    assert result.code == 0
    assert "trained already" in result.out


def test_an_existing_run_is_refused_or_replaced(varlora_, options, run):
    message = error_of(varlora_("train", *options, "--run-dir", run))
    assert all(text in message for text in (str(run), "--resume", "--overwrite"))
    assert varlora_("train", *options, "--run-dir", run, "--steps", 1, "--overwrite").code == 0
    assert json.loads((run / "config.json").read_text())["settings"]["steps"] == 1
    assert varlora_("train", *options, "--run-dir", run, "--overwrite", "--resume").code == 2


def test_a_folder_that_is_no_run_is_never_deleted(varlora_, options, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "not a run directory" in error_of(varlora_("train", *options, "--run-dir", tmp_path, "--overwrite"))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    message = error_of(varlora_("train", *options, "--run-dir", tmp_path / "thesis.tex"))
    assert "thesis.tex is a file" in message


def test_resuming_what_is_not_there(varlora_, tmp_path):
    assert "There is no run directory" in error_of(varlora_("train", "--resume", "--run-dir", tmp_path / "none"))
    assert "Expected `--run-dir` with `--resume`" in error_of(varlora_("train", "--resume"))


@pytest.mark.parametrize("seeds", [("--seed", 1, 2), ("--set", "seeds=[1,2]")])
def test_one_run_is_not_gone_on_with_as_several(varlora_, run, seeds):
    before = sorted(run.rglob("*"))
    message = error_of(varlora_("train", "--resume", "--run-dir", run, *seeds))
    assert f"Expected one run to go on with in {run}, but got 2 seeds. Leave the seeds out" in message
    assert sorted(run.rglob("*")) == before


def test_a_recipe_in_the_run_directory_is_not_deleted(varlora_, options, run):
    (run / "recipe.yaml").write_text("steps: 1\n")
    message = error_of(varlora_("train", run / "recipe.yaml", *options, "--run-dir", run, "--overwrite"))
    assert f"would delete {run / 'recipe.yaml'}, which is `recipe` of the run" in message
    assert (run / "recipe.yaml").is_file()


def test_a_rank_but_the_first_leaves_the_run_directory_to_that_one(varlora_, options, tmp_path, monkeypatch):
    """It comes late here, when the first one has made it."""
    run, done = tmp_path / "run", []

    def met(*arguments) -> None:
        assert not run.exists()
        (run / "adapter").mkdir(parents=True)
        done.append("met")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("varlora.training.ranks", lambda: (1, 2))
    monkeypatch.setattr("varlora.training.meet", met)
    monkeypatch.setattr("varlora.training.wait_for_ranks", lambda: done.append("waited"))
    monkeypatch.setattr("varlora.training.fit", lambda *arguments, **settings: done.append("trained"))
    assert varlora_("train", *options, "--run-dir", run) == Result(0, "", "")
    assert done == ["met", "waited", "trained"]
    assert [path.name for path in run.iterdir()] == ["adapter"]


LATE = """
import os, sys, time
from varlora import cli, training

load_base = training.load_base

def slowly(*arguments):
    time.sleep(2 * int(os.environ["RANK"]))
    return load_base(*arguments)

training.load_base = slowly
sys.exit(cli.main())
"""


@pytest.mark.slow
def test_two_ranks_make_one_run_for_each_seed(options, tmp_path):
    """The second one comes late, when the first could have made the run directory."""
    script = tmp_path / "rank.py"
    script.write_text(LATE)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, script)
    settings = (*options, "--method", "adamw", "--run-dir", tmp_path / "runs", "--seed", 1, 2)
    for more in ((), ("--overwrite",)):
        result = in_subprocess(*torchrun, "train", *settings, *more)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("Training adamw on boolq") == 2
        assert result.stdout.count("Next: ") == 1
        for seed in (1, 2):
            run = tmp_path / "runs" / f"seed{seed}"
            steps = [json.loads(line).get("step") for line in (run / "training.jsonl").read_text().splitlines()]
            assert steps == [1, 2, 3, 3]
            assert (run / "adapter" / "posterior.safetensors").is_file()


# --- wrong input -----------------------------------------------------------------------------------------------------


def test_all_problems_of_a_configuration_at_once(varlora_, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task: bolq\nstepps: 5\nmethod: {name: ivn}\nlora: {rank: none}\n")
    message = error_of(varlora_("train", recipe, "--dtype", "float64", "--set", "nonsense"))
    assert "7 problems in the configuration" in message
    for text in ("`boolq`?", "`steps`", "`ivon`?", "`lora.rank`", "`model`, but it is missing", "float64", "nonsense"):
        assert text in message
    assert error_of(varlora_("validate", recipe)).count("\n  - ") == 5
    assert "Did you mean `recipe.yaml`?" in error_of(varlora_("train", tmp_path / "recpie.yaml"))
    assert "Give the path of a YAML file, or" in error_of(varlora_("train", tmp_path / "nowhere" / "recipe.yaml"))


def test_an_option_of_another_method(varlora_, options):
    typed = ("--learning-rate-like-adamw", 5e-5)
    message = error_of(varlora_("train", *options, "--method", "adamw", *typed))
    assert "Expected `--learning-rate-like-adamw` with `--method ivon` alone" in message
    assert "lr_like_adamw`" not in message.replace("--learning-rate-like-adamw", "")


def test_what_to_make_of_finished_runs_is_asked_for(varlora_, run):
    message = error_of(varlora_("train", "--from", run))
    assert "Expected `--method` with `--from`" in message
    assert "laplace_kfac" in message
    assert "ivon" not in message.partition("builds on")[2]


def test_an_unknown_model(varlora_, options, bundled, tmp_path):
    near = bundled.with_name("bas")
    message = error_of(varlora_("train", *options, "--model", near, "--run-dir", tmp_path / "run"))
    assert f"Did you mean `{bundled}`" in message
    assert "Give another `--model`." in message
    message = error_of(varlora_("train", *options, "--model", "nobody/nothing", "--run-dir", tmp_path / "run"))
    assert "hf download nobody/nothing" in message
    assert not (tmp_path / "run").exists()


def test_data_that_are_not_there(varlora_, options, tmp_path):
    message = error_of(varlora_("train", *options, "--data-dir", tmp_path, "--run-dir", tmp_path / "run"))
    assert "boolq/train.jsonl" in message
    assert "--data-dir" in message


@pytest.fixture
def bad_data(tmp_path) -> Path:
    """Three good rows, and one whose answer is no truth value, on line 2."""
    shutil.copytree(ASSETS / "boolq", tmp_path / "data" / "boolq")
    path = tmp_path / "data" / "boolq" / "train.jsonl"
    lines = path.read_text().splitlines()
    lines.insert(1, json.dumps({"question": "is it so", "passage": "It is.", "answer": "perhaps"}))
    path.write_text("\n".join(lines) + "\n")
    return tmp_path / "data"


def test_a_malformed_row(varlora_, options, bad_data, tmp_path):
    options = [*options, "--data-dir", bad_data, "--run-dir", tmp_path / "run"]
    message = error_of(varlora_("train", *options))
    for text in (f"{bad_data / 'boolq' / 'train.jsonl'}, line 2", "`answer`", "'perhaps'", "--skip-bad-rows"):
        assert text in message
    result = varlora_("train", *options, "--skip-bad-rows")
    assert result.code == 0
    assert "1 malformed rows were left out; the first: " in result.out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["training_rows"] == 3


def test_a_prompt_longer_than_the_context(varlora_, options, tmp_path):
    shutil.copytree(ASSETS / "boolq", tmp_path / "data" / "boolq")
    row = {"question": "is it long", "passage": "It is very long. " * 300, "answer": True}
    for split in ("train", "dev"):
        with (tmp_path / "data" / "boolq" / f"{split}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    run = tmp_path / "run"
    result = varlora_("train", *options, "--data-dir", tmp_path / "data", "--run-dir", run)
    assert result.code == 0
    assert "1 of 4 prompts were longer than 512 tokens and have been cut." in result.out
    assert json.loads((run / "config.json").read_text())["cut"] == 1
    result = varlora_("evaluate", run, "--samples", 1)
    assert "1 of 3 prompts were longer than 512 tokens" in result.out
    assert json.loads((run / "metrics.json").read_text())["cut"] == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--split", "deev"], "Did you mean `dev`?"),
        (["--split", "foo"], "Known: calibration, dev, train."),
        (["--split", "calibration"], "held no rows out for calibration"),
        (["--samples", "-1"], "number of draws >= 0, but got -1"),
        (["--tau", "-1"], "factor >= 0 of the posterior variance, but got -1"),
        (["--tau", "nan"], "factor >= 0 of the posterior variance, but got nan"),
        (["--data-dir", "nowhere"], "nowhere/boolq/dev.jsonl"),
        (["--model", "nowhere/at/all"], "nowhere/at/all does not exist"),
    ],
)
def test_evaluate_refuses(varlora_, trained, arguments, text):
    assert text in error_of(varlora_("evaluate", trained, *arguments))


def test_a_batch_has_a_token_at_least(varlora_, trained):
    for verb in ("evaluate", "calibrate"):
        result = varlora_(verb, trained, "--token-budget", "0")
        assert result.code == 2
        assert "argument --token-budget: expected a whole number >= 1, but got 0" in result.err


def test_a_posterior_of_another_model(varlora_, trained, shared):
    message = error_of(varlora_("evaluate", trained, "--model", shared / "models" / "tinyllama-3m"))
    assert "to be of this model" in message
    assert str(trained) in message


@pytest.fixture(scope="module")
def other_weights(bundled, tmp_path_factory) -> Path:
    """A base like the one that was trained on, but for its weights."""
    folder = shutil.copytree(bundled, tmp_path_factory.mktemp("other") / "base")
    weights = load_file(folder / "model.safetensors")
    save_file({name: 1.5 * value for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("verb", ["serve", "export"])
def test_another_base_is_neither_served_nor_exported(varlora_, trained, other_weights, verb, tmp_path, monkeypatch):
    monkeypatch.setattr("varlora.serve.process.Server.run", lambda self, **settings: pytest.fail("it is served"))
    more = {"serve": ["--port", "0"], "export": ["--to", tmp_path / "out"]}[verb]
    for model, reason in ((helpers.base_folder(), "to be of this model"), (other_weights, "its checksum differs")):
        message = error_of(varlora_(verb, trained, "--model", model, *more))
        assert reason in message
        assert str(trained) in message
        assert not any(tmp_path.iterdir())


def test_a_posterior_cut_short(varlora_, run):
    file = run / "adapter" / "posterior.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    for verb in (["evaluate", run], ["predict", run, "--input", ASSETS / "boolq" / "dev.jsonl"]):
        assert f"{file} is damaged" in error_of(varlora_(*verb))


def test_what_is_no_run(varlora_, tmp_path):
    for verb in ("evaluate", "predict"):
        assert "no run directory" in error_of(varlora_(verb, tmp_path / "none", stdin="{}"))
    assert "none" in error_of(varlora_("report", tmp_path / "none", "--out", tmp_path / "report"))


def test_later_runs_are_looked_at_before_the_first_is_worked_on(varlora_, run, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for verb in ("evaluate", "calibrate"):
        assert "There is no run directory" in error_of(varlora_(verb, run, tmp_path / "typo"))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_place_that_cannot_be_written_to(varlora_, options, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in error_of(varlora_("train", *options, "--run-dir", tmp_path / "file" / "run"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_too_little_memory(error, varlora_, options, tmp_path, monkeypatch):
    def full(*arguments, **more):
        raise error

    monkeypatch.setattr("varlora.training.fit", full)
    message = error_of(varlora_("train", *options, "--run-dir", tmp_path / "run"))
    assert "batch_size" in message


# --- predict ---------------------------------------------------------------------------------------------------------

QUESTIONS = '{"question": "can fish swim", "passage": "Fish swim."}\n{"question": "is é a letter", "passage": "é"}\n'


def test_predict_from_a_file_to_a_file(varlora_, trained, tmp_path):
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "deep" / "answers.jsonl"
    questions.write_text(QUESTIONS)
    result = varlora_("predict", trained, "--input", questions, "--output", answers, "--samples", 4)
    assert result.code == 0
    assert result.out == ""
    assert f"2 rows are in {answers}." in result.err
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["id"] for row in rows] == ["0", "1"]
    for row in rows:
        assert row.keys() == {"id", "answer", "probabilities", "uncertainty"}
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["answer"] in row["probabilities"]
        parts = row["uncertainty"]
        assert 0 < parts["epistemic"] < parts["total"]
        assert parts["total"] == pytest.approx(parts["aleatoric"] + parts["epistemic"])


def raise_full() -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("stop", "code"),
    [
        (lambda: signal.raise_signal(signal.SIGINT), 130),
        (lambda: signal.raise_signal(signal.SIGTERM), 130),
        (raise_full, 1),
    ],
    ids=["SIGINT", "SIGTERM", "full"],
)
def test_answers_that_are_there_are_kept_when_predict_stops(stop, code, varlora_, trained, tmp_path, monkeypatch):
    """They lie beside the output, as what is there under its own name is whole."""
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions.write_text(QUESTIONS)
    together = varlora_("predict", trained, "--input", questions).out
    monkeypatch.setattr("varlora.evaluation.AT_ONCE", 1)
    whole = varlora_("predict", trained, "--input", questions).out
    for one, other in zip(together.splitlines(), whole.splitlines(), strict=True):  # the same draws of each row
        assert json.loads(one)["probabilities"] == pytest.approx(json.loads(other)["probabilities"], abs=1e-6)
    passes, original = [], Predictor.logits_of

    def stops(*args, **settings):
        passes.append(1)
        if len(passes) == 2:
            stop()
        return original(*args, **settings)

    monkeypatch.setattr(Predictor, "logits_of", stops)
    answers.write_text("older\n")
    result = varlora_("predict", trained, "--input", questions, "--output", answers)
    assert result.code == code
    part = tmp_path / "answers.jsonl.part"
    assert f"1 of 2 rows are in {part}." in result.err
    assert part.read_text() == whole.splitlines(keepends=True)[0]
    assert answers.read_text() == "older\n"
    assert varlora_("predict", trained, "--input", questions, "--output", answers).code == 0
    assert answers.read_text() == whole
    assert part.read_text() == whole.splitlines(keepends=True)[0]


def test_predict_that_stops_before_the_first_answer_leaves_nothing(varlora_, trained, tmp_path, monkeypatch):
    def stops(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(Predictor, "logits_of", stops)
    result = varlora_("predict", trained, "--output", tmp_path / "answers.jsonl", stdin=QUESTIONS)
    assert result.code == 130
    assert "rows are in" not in result.err
    assert not list(tmp_path.iterdir())


def test_predict_does_not_write_over_what_it_reads(varlora_, trained, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(QUESTIONS)
    before = rows.read_bytes()
    result = varlora_("predict", trained, "--input", rows, "--output", tmp_path / "." / "rows.jsonl")
    assert result.code == 1
    assert "another file than `--input`" in result.err
    assert rows.read_bytes() == before


def test_what_was_evaluated_is_shown_though_another_run_fails(varlora_, run, trained, tmp_path):
    good = tmp_path / "good"
    shutil.copytree(trained, good)
    (run / "adapter" / "posterior.safetensors").unlink()
    result = varlora_("evaluate", good, run, "--samples", "2", "--calibrate")
    assert result.code == 1
    assert "posterior.safetensors" in result.err
    assert f"{good} held no rows out, so it is not calibrated" in result.out
    table = result.out[result.out.index("ACC %") :]
    assert str(good) in "".join(line.split("│")[1].strip() for line in table.splitlines() if line.count("│") > 2)


def test_commands_to_go_on_with_can_be_pasted(varlora_, options, tmp_path):
    folder = tmp_path / "my runs" / "one"
    result = varlora_("train", *options, "--run-dir", folder)
    assert f"Next: varlora evaluate '{folder}'" in result.out


def test_predict_from_standard_input(varlora_, trained):
    result = varlora_("predict", trained, stdin=QUESTIONS)
    assert result.code == 0
    assert len([json.loads(line) for line in result.out.splitlines()]) == 2
    again = varlora_("predict", trained, "--seed", 0, stdin=QUESTIONS)
    assert again.out == result.out
    assert varlora_("predict", trained, "--seed", 1, stdin=QUESTIONS).out != result.out
    mean = varlora_("predict", trained, "--samples", 0, stdin=QUESTIONS)
    assert json.loads(mean.out.splitlines()[0])["uncertainty"]["epistemic"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("stream", "name"), [("<&-", "standard input"), (">&-", "standard output")])
def test_predict_where_a_stream_is_closed(trained, stream, name):
    command = f"exec {sys.executable} -m varlora.cli predict {trained} {stream}"
    found = subprocess.run(["sh", "-c", command], capture_output=True, text=True, input=QUESTIONS, cwd=ROOT)
    assert f"{name}, but it is closed" in found.stderr
    assert (found.returncode, found.stdout, "Traceback" in found.stderr) == (1, "", False)


def test_predict_to_a_file_needs_no_standard_output(trained, tmp_path):
    command = f"exec {sys.executable} -m varlora.cli predict {trained} --output {tmp_path / 'answers.jsonl'} >&-"
    found = subprocess.run(["sh", "-c", command], capture_output=True, text=True, input=QUESTIONS, cwd=ROOT)
    assert (found.returncode, "Traceback" in found.stderr) == (0, False)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2


def test_predict_reads_tables(varlora_, trained):
    result = varlora_("predict", trained, "--format", "csv", stdin='question,passage\n"is it, so",It is.\n')
    assert result.code == 0
    assert len(result.out.splitlines()) == 1


def test_predict_answers_the_rest_of_rows_that_overflow(varlora_, trained, tmp_path, monkeypatch):
    """One that is finite alone, as its neighbours' padding is not, has its answer."""
    questions = QUESTIONS + '{"question": "is this", "passage": "Last."}\n'
    output, logits_of = tmp_path / "answers.jsonl", Predictor.logits_of

    def overflows(self, rows, **settings):
        found = logits_of(self, rows, **settings)
        for i, row in enumerate(rows):
            if row.id == "0" or (row.id == "2" and len(rows) > 1):
                found[-1, i] = math.nan
        return found

    expected = varlora_("predict", trained, "--samples", 4, stdin=questions).out.splitlines()
    monkeypatch.setattr(Predictor, "logits_of", overflows)
    message = error_of(varlora_("predict", trained, "--samples", 4, "--output", output, stdin=questions))
    assert "1 of 3 rows have no answer, as their logits are not finite" in message
    first, *rest = output.read_text().splitlines()
    assert json.loads(first) == {"id": "0", "error": "Its logits are not finite: the model overflows."}
    assert [json.loads(line)["answer"] for line in rest] == [json.loads(line)["answer"] for line in expected[1:]]


def test_a_tolerance_that_stops_nothing_is_said(varlora_, trained):
    for samples, more, said in ((7, [], True), (10, ["--noise", "antithetic"], True), (8, [], False)):
        result = varlora_("predict", trained, "--samples", samples, "--tolerance", 0.05, *more, stdin=QUESTIONS)
        assert result.code == 0
        assert (f"`tolerance` leaves out none of {samples} draws" in result.err) == said


def test_predict_a_malformed_row(varlora_, trained, tmp_path):
    rows = QUESTIONS + "{not json\n" + '{"question": "no passage"}\n'
    output = tmp_path / "answers.jsonl"
    message = error_of(varlora_("predict", trained, "--output", output, stdin=rows))
    assert "standard input, line 3: Expected one JSON object a line" in message
    assert not output.exists()
    result = varlora_("predict", trained, "--skip-bad-rows", stdin=rows)
    assert result.code == 0
    assert len(result.out.splitlines()) == 2
    assert "2 malformed rows were left out" in result.err


@pytest.mark.parametrize(
    ("arguments", "stdin", "text"),
    [
        ([], "", "Expected rows in standard input, but none is left"),
        ([], "[1, 2]\n", "Expected a JSON object, but got list"),
        (["--skip-bad-rows"], "[1, 2]\n", "none is left (1 malformed"),
        (["--input", "none.jsonl"], None, "none.jsonl, but it cannot be read (No such file or directory)"),
        (["--input", str(ASSETS)], None, "it cannot be read (Is a directory)"),
        (["--input", __file__], None, "Expected a .jsonl, .csv or .tsv file, but got `.py`"),
        (["--output", str(ASSETS)], QUESTIONS, "is a folder"),
        (["--output", f"{__file__}/x.jsonl", "--samples", "-2"], QUESTIONS, "x.jsonl could not be written"),  # first
        (["--samples", "-2"], QUESTIONS, "number of draws >= 0"),
    ],
)
def test_predict_refuses(varlora_, trained, arguments, stdin, text):
    assert text in error_of(varlora_("predict", trained, *arguments, stdin=stdin))


NOT_UTF8 = os.fsdecode(b"caf\xe9")


def test_names_that_are_not_utf8_are_refused_before_the_base_is_loaded(varlora_, options, tmp_path, monkeypatch):
    monkeypatch.setattr("varlora.training.load_base", None)
    monkeypatch.chdir(tmp_path)
    for more in (["--run-dir", NOT_UTF8], ["--model", NOT_UTF8], ["--data-dir", NOT_UTF8]):
        assert r"whose name is UTF-8, but got 'caf\udce9'. Rename it." in error_of(varlora_("train", *options, *more))
    assert not list(tmp_path.iterdir())


# --- ls, validate, help ----------------------------------------------------------------------------------------------


def test_ls(varlora_, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = varlora_("ls")
    assert result.code == 0
    assert all(name in result.out for name in (*TASKS, "adamw", "ivon", "none under recipes/", "none under runs/"))
    shutil.copytree(trained, tmp_path / "runs" / "one")
    (tmp_path / "runs" / "two" / "checkpoint-40").mkdir(parents=True)
    (tmp_path / "runs" / "two" / "config.json").write_text('{"settings": {}}')
    (tmp_path / "runs" / "base").mkdir()
    (tmp_path / "runs" / "base" / "config.json").write_text("{}")  # a model's, not a run's
    assert varlora_("ls", "runs").out.split("\n")[1:3] == ["  runs/one  trained", "  runs/two  at step 40"]
    assert varlora_("ls", "nothing").code == 2
    monkeypatch.chdir(ROOT)
    assert "recipes/llama2-7b/boolq/ivon.yaml" in varlora_("ls", "recipes").out
    assert "recipes/local/sst2.yaml" in varlora_("ls", "tasks").out


def test_validate(varlora_, options, bad_data, model):
    result = varlora_("validate", *options)
    assert result.code == 0
    assert "3 training, 0 calibration and 2 dev rows" in result.out
    assert "line 2" in error_of(varlora_("validate", *options, "--data-dir", bad_data))
    recipe = ROOT / "recipes" / "llama2-7b" / "boolq" / "ivon.yaml"
    more = ["--data-dir", ASSETS, "--model", model, "--set", "quantization=null", "dtype=float32"]
    result = varlora_("validate", recipe, *more)
    assert result.code == 0
    assert "Looked at with seed 21, of 21, 42, 87." in result.out


def test_validate_says_how_many_prompts_are_trained_on(varlora_, options, tmp_path):
    assert "2 of 2 dev prompts are trained on, word for word." in varlora_("validate", *options).out
    data = Path(shutil.copytree(ASSETS / "boolq", tmp_path / "boolq"))
    (data / "dev.jsonl").write_text('{"question": "is ice made of water", "passage": "It is.", "answer": true}\n')
    result = varlora_("validate", *options, "--data-dir", tmp_path)
    assert result.code == 0
    assert "word for word" not in result.out


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples(varlora_, verb):
    result = varlora_(verb, "--help")
    assert result.code == 0
    assert f"examples:\n  varlora {verb}" in result.out
    assert f"  {verb}" in varlora_("--help").out


def test_the_examples_of_the_help_can_be_parsed(varlora_, monkeypatch):
    """So that no example has an option that is gone; what it names need not exist."""
    from varlora import arguments

    texts = [text for name, text in vars(arguments).items() if name.endswith("EXAMPLES")]
    commands = [line.split("| ")[-1].split()[1:] for text in texts for line in text.splitlines() if "varlora " in line]
    assert {command[0] for command in commands} == set(VERBS)
    for command in commands:
        arguments.command_line().parse_args(command)


def test_export_and_push_write_what_they_say(varlora_, run, model, tmp_path):
    result = varlora_("export", run, "--to", tmp_path / "out", "--samples", "2")
    assert result.code == 0
    assert "its client averages draw-00, draw-01." in result.out
    assert (tmp_path / "out" / "client.py").is_file()
    assert "--overwrite" in error_of(varlora_("export", run, "--to", tmp_path / "out"))
    assert varlora_("export", run, "--to", tmp_path / "out", "--samples", "0", "--overwrite").code == 0
    assert not (tmp_path / "out" / "draw-00").exists()

    assert "--base-model" in error_of(varlora_("push", run, "me/mine"))
    result = varlora_("push", run, "me/mine", "--base-model", "me/base", "--folder", tmp_path / "pushed")
    assert result.out.splitlines()[-1] == f"Written: {tmp_path / 'pushed'}"
    assert isinstance(varlora.from_pretrained(tmp_path / "pushed", model=model).posterior, varlora.DiagonalGaussian)


def test_an_answer_that_is_given_twice_is_not_exported(varlora_, trained, tmp_path):
    message = error_of(varlora_("export", trained, "--to", tmp_path / "out", "--answers", "a", "b", "a"))
    assert "answers that begin with different tokens" in message
    assert "'a' -> 'a'" in message
    assert not any(tmp_path.iterdir())


def test_version(varlora_):
    assert varlora_("--version") == Result(0, f"varlora {varlora.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments", [[], ["trian"], ["train", "--stepps", "3"], ["train", "--steps", "x"], ["train", "--seed", "-1"]]
)
def test_wrong_arguments(varlora_, arguments):
    result = varlora_(*arguments)
    assert result.code == 2
    assert "usage: varlora" in result.err


@pytest.mark.parametrize(
    ("arguments", "usage", "text"),
    [
        (["trian"], "usage: varlora [-h]", "invalid choice: 'trian'. Did you mean `train`"),
        (["ls", "rnus"], "usage: varlora ls", "invalid choice: 'rnus'. Did you mean `runs`?"),
        (["train", "--taks", "boolq"], "usage: varlora train", "unrecognized arguments: --taks. Did you mean `--task`"),
        (["train", "--batchsize=3"], "usage: varlora train", "Did you mean `--batch-size`"),
        (["ls", "runs", "more"], "usage: varlora ls", "unrecognized arguments: more."),
    ],
)
def test_misspelt_names_are_answered_with_near_ones(varlora_, arguments, usage, text):
    result = varlora_(*arguments)
    assert result.code == 2
    assert result.err.startswith(usage)
    assert text in result.err


# --- a process of its own --------------------------------------------------------------------------------------------


def test_importing_varlora_and_asking_for_help_loads_no_language_models():
    slow = "{'transformers', 'peft', 'datasets', 'accelerate', 'matplotlib'} & set(sys.modules)"
    code = f"""
import sys, varlora
varlora.IVON
assert not {slow}, {slow}
from varlora.cli import main
for arguments in (['--help'], ['train', '--help'], ['--version']):
    try:
        main(arguments)
    except SystemExit as stop:
        assert not stop.code
assert not {slow}, {slow}
assert main(['ls']) == 0
assert not {{'transformers', 'peft'}} & set(sys.modules)
"""
    result = in_subprocess("-c", code)
    assert result.returncode == 0, result.stderr


def test_exit_code_pipe_and_clean_output_of_a_process(trained):
    result = in_subprocess("-m", "varlora.cli", "predict", trained, "--samples", "2", input=QUESTIONS)
    assert result.returncode == 0, result.stderr
    assert [json.loads(line)["id"] for line in result.stdout.splitlines()] == ["0", "1"]  # JSON lines and nothing else
    assert "Traceback" not in result.stderr
    result = in_subprocess("-m", "varlora.cli", "report", trained / "none")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")


def test_a_terminal_without_unicode(options, tmp_path):
    command = ["-X", "utf8=0", "-m", "varlora.cli", "train", *options, "--run-dir", tmp_path / "run"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    assert re.search(rb"\? \d\.\d\de-\d\d", result.stdout)


def test_tune_writes_a_recipe_that_trains_with_what_was_found(varlora_, options, tmp_path):
    out = tmp_path / "found.yaml"
    result = varlora_("tune", *options, "--out", out, "--learning-rate-like-adamw", 1e-3)
    assert result.code == 0, result.err
    assert "change of the predictions" in result.out
    recipe = yaml.safe_load(out.read_text())
    assert {"lr", "ess", "hess_init", "noise_warmup"} <= recipe["method"].keys()
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    assert "exists already" in error_of(varlora_("tune", *options, "--out", out))
    assert varlora_("tune", *options, "--out", out, "--overwrite").code == 0
    assert varlora_("train", out, "--run-dir", tmp_path / "run").code == 0
    assert not (tmp_path / "run" / "tuned.json").exists()  # nothing was left to find
    assert "picture goes" in error_of(varlora_("tune", *options, "--out", tmp_path / "found.png", "--overwrite"))
    nothing = error_of(varlora_("tune", *options, "--method", "adamw", "--out", tmp_path / "other.yaml"))
    assert "Nothing is left to `adamw` to find" in nothing


def test_tune_keeps_all_seeds(varlora_, options, tmp_path):
    out, recipe = tmp_path / "found.yaml", tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"seeds": [21, 42], "run_dir": str(tmp_path / "runs")}))
    result = varlora_("tune", recipe, *options, "--out", out)
    assert result.code == 0, result.err
    assert "Found with seed 21, for all of 21, 42." in result.out
    runs = load_settings(out)
    assert [(run.seed, run.folder) for run in runs] == [(n, tmp_path / "runs" / f"seed{n}") for n in (21, 42)]
    assert "ess" in runs[1].method_settings


@pytest.mark.parametrize(
    "method",
    [["--method", "pruned"], ["--method", "temperature", "--set", "method.of=ivon"]],
    ids=lambda words: words[1],
)
def test_tune_finds_for_a_method_below_another(varlora_, options, tmp_path, method):
    out = tmp_path / "found.yaml"
    options = [*options, "--calibration-fraction", "0.67"]  # for the temperature
    result = varlora_("tune", *options, *method, "--out", out)
    assert result.code == 0, result.err
    assert re.search(r"layer\W+sigma", result.out)
    found = yaml.safe_load(out.read_text())["method"]["settings"]
    assert {"lr", "ess", "hess_init", "sigma_by_layer"} <= found.keys()
    assert varlora_("train", out, "--run-dir", tmp_path / "run").code == 0
    assert not (tmp_path / "run" / "tuned.json").exists()


@pytest.mark.parametrize(
    ("most", "reach", "says"),
    [
        (0.06, 0.02, "a change of 0.05 is borne."),
        (0.04, 0.02, "a change of 0.05 is borne."),  # no noise that was tried comes to it, but the change still grows
        (0.06, 0.03, "a change of 0.05 is borne."),  # it stops growing, a little above
        (0.02, 0.03, "which no noise comes to."),
    ],
)
def test_tune_says_whether_any_noise_changes_as_much_as_is_borne(
    most, reach, says, varlora_, options, tmp_path, monkeypatch
):
    trials = [{"sigma": 0.01, "kl": 0.01}, {"sigma": 0.03, "kl": most}, {"sigma": 1.0, "kl": None}]
    found = {"trials": trials, "draws": 8, "rows": 4, "bound": 0.05, "epochs": 3.0, "sigma": 0.02, "reach": reach}
    prepared = Prepared({"sigma_by_layer": {}}, found, 9.0)
    monkeypatch.setattr("varlora.training.tune", lambda settings, say: (settings, prepared))
    result = varlora_("tune", *options, "--out", tmp_path / "found.yaml")
    assert says in result.out
    assert re.search(r"│ 1 +│ inf", result.out)


def test_the_demo_refuses_another_task(varlora_, tmp_path):
    assert "Did you mean `true_or_false`?" in error_of(varlora_("demo", "--task", "true_or_fals", "--out", tmp_path))


def test_an_interrupted_demo_says_how_to_start_again(varlora_, tmp_path, monkeypatch):
    def stopped(*args, **kwargs):
        raise Interrupted("Stopped at step 3 of 60.")

    monkeypatch.setattr("varlora.demo.run.train", stopped)
    result = varlora_("demo", "--quick", "--out", tmp_path / "out")
    assert (result.code, result.err.strip()) == (
        130,
        "Stopped at step 3 of 60. Run the same command to start the demo again.",
    )
