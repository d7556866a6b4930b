"""The paper's tables by one command: what a plan becomes, what is shared, searched, refused and reported."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from pathlib import Path

import pytest
from test_main_job import silent

from varlora.cli import main
from varlora.config import load_settings
from varlora.demo.run import one_thread
from varlora.errors import ConfigError, VarloraError
from varlora.evaluation import calibrate, evaluate
from varlora.files import load_tensors, save_tensors
from varlora.grid import Cell, Outcome, run_cell
from varlora.methods import METHODS
from varlora.plan import candidates_of, check, plan_from, reported_rows, run_settings
from varlora.predictions import save_predictions
from varlora.reproduce import _cells, reproduce, tables_of
from varlora.run import alone
from varlora.table import TASKS as TITLES

EVERY = [name for name in METHODS if name not in ("tfb", "blob")]  # these have tests of their own, and are slow


class Here:
    """Runs each cell in this process, and remembers which."""

    def __init__(self, fail: str = "") -> None:
        self.fail, self.begun = fail, []

    def submit(self, cell: Cell) -> Outcome:
        self.begun.append(str(cell.run_dir).rpartition("/runs/")[2])
        if self.fail and self.fail in str(cell.run_dir):
            return Outcome(str(cell.run_dir), 0.0, "no space left on device")
        with one_thread():
            return run_cell(cell.settings, cell.evaluation)

    def __call__(self) -> Here:
        self.ended = []
        submit = self.submit

        class Launched:
            def submit(_, cell: Cell) -> int:
                self.ended.append(submit(cell))
                return id(self.ended[-1])

            def finished(_) -> tuple[int, Outcome]:
                outcome = self.ended.pop()
                return id(outcome), outcome

            def stop(_) -> None: ...

        return Launched()


@pytest.fixture(scope="module")
def world(bundled, tmp_path_factory) -> dict:
    """Two tasks of the demo with few rows, and settings that are quick."""
    folder, tasks = tmp_path_factory.mktemp("tasks"), bundled.parent / "tasks"
    for name in ("true_or_false", "two_choices"):
        for split, rows in (("train", 30), ("dev", 10)):
            lines = (tasks / f"{name}.{split}.jsonl").read_text().splitlines(keepends=True)
            (folder / f"{name}.{split}.jsonl").write_text("".join(lines[:rows]))
        shutil.copy(tasks / f"{name}.yaml", folder)
    return {
        "model": str(bundled),
        "tasks": [str(folder / "two_choices.yaml")],
        "seeds": [3, 4],
        "steps": 6,
        "samples": 2,
        "calibration_fraction": 0.4,
    }


def recipe(folder: Path, **values) -> Path:
    path = folder / "plan.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    return path


def test_all_methods_share_one_adamw_run_a_seed(world, tmp_path):
    """Nothing is trained twice, and a second call runs nothing."""
    methods = {name: {} for name in EVERY} | {"swag": {"every": 1}, "ensemble": {"size": 2}}
    plan = plan_from(None, tmp_path / "runs", {**world, "methods": list(methods)})
    plan.methods.update(methods)
    launcher = Here()
    ended = reproduce(plan, launcher, silent)
    assert not ended.failed
    assert len(ended.runs) == 2 * len(EVERY)
    assert sorted(name for name in launcher.begun if "/adamw/" in name) == [
        f"two_choices/adamw/seed{seed}"
        for seed in (1003, 1004, 3, 4)  # and the ensembles' second members
    ]
    trained = {path.parent.name for path in (tmp_path / "runs" / "two_choices").glob("*/seed3/training.jsonl")}
    sources = {
        path.parents[1].name: json.loads(path.read_text())["settings"]["sources"]
        for path in (tmp_path / "runs" / "two_choices").glob("*/seed3/config.json")
    }
    assert [Path(source).parts[-2:] for source in sources["ensemble"]] == [("adamw", "seed3"), ("adamw", "seed1003")]
    assert [Path(source).parts[-2:] for source in sources["swa"]] == [("swag", "seed3")]
    assert {name for name, of in sources.items() if not of} == {"adamw", "ivon"}
    assert len(trained) == 1
    again = Here()
    assert reproduce(plan, again, silent).runs == ended.runs
    assert again.begun == []


def test_a_search_tries_the_same_number_for_each_and_reports_the_best_on_held_out_rows(world, tmp_path):
    search = {"adamw": {"lr": [1e-5, 3e-3], "steps": [2, 12]}, "ivon": {"lr": [0.001, 0.5], "steps": [2, 12]}}
    plan = plan_from(
        recipe(tmp_path, search=search, search_seeds=2),
        tmp_path / "runs",
        {**world, "methods": ["adamw", "temperature", "ivon"]},
    )
    said: list[str] = []
    launcher = Here()
    ended = reproduce(plan, launcher, said.append)
    for method, variant in ended.chosen["two_choices"].items():
        nll: dict[str, list[float]] = {}
        for path in (tmp_path / "runs" / "two_choices" / method).glob("*/seed*/metrics-calibration.json"):
            results = json.loads(path.read_text())
            nll.setdefault(path.parents[1].name, []).append((results["draws"] or results["mean"])["nll"])
        assert [len(values) for values in nll.values()] == [2] * 4
        best = min(nll, key=lambda name: sum(nll[name]))
        assert variant == best
        assert f"Chosen for {method} on two_choices: {best} of 4." in said
        assert {run.parent.name for run in ended.runs if run.parents[1].name == method} == {best}
    evaluated = {path.parent for path in (tmp_path / "runs").rglob("metrics.json")}
    assert evaluated == set(ended.runs)  # no candidate was looked at on the rows that are reported
    assert json.loads((tmp_path / "runs" / "grid.json").read_text())["chosen"] == ended.chosen


def test_what_a_method_and_its_base_both_try_has_folders_of_its_own(world, tmp_path):
    search = {"adamw": {"steps": [2, 12]}, "swag": {"steps": [4, 8]}}
    plan = plan_from(recipe(tmp_path, search=search, methods={"swag": {"every": 1}}), tmp_path / "runs", world)
    found = candidates_of(plan, *world["tasks"], "swag")
    assert [one.variant for one in found] == [f"adamw.steps={below},steps={own}" for below in (2, 12) for own in (4, 8)]
    for one in found:
        settings = run_settings(plan, one, 3)
        assert settings.steps == one.own["steps"]
        assert Path(settings.sources[0]).parts[-2:] == (f"steps={one.base.own['steps']}", "seed3")


def test_swag_may_train_from_the_beginning_with_as_many_steps_as_the_others(world, tmp_path):
    methods = {"adamw": {}, "swa": {}, "swag": {"from_scratch": True, "every": 1}}
    plan = plan_from(recipe(tmp_path, methods=methods), tmp_path / "runs", world)
    made = {name: run_settings(plan, candidates_of(plan, *world["tasks"], name)[0], 3) for name in methods}
    assert {name: settings.steps for name, settings in made.items()} == {"adamw": 6, "swa": 6, "swag": 6}
    assert made["swag"].sources == ()
    assert [Path(source).parts[-2] for source in made["swa"].sources] == ["swag"]
    ended = reproduce(plan, Here(), silent)
    assert (len(ended.runs), ended.failed) == (6, ())
    for wrong, says in (
        ({"swag": {"from_scratch": "yes"}}, "of swag to be true or false"),
        ({"ivon": methods["swag"]}, ""),
    ):
        with pytest.raises(ConfigError, match=f"`.*from_scratch` {says}"):
            check(plan_from(recipe(tmp_path, methods=wrong), tmp_path / "other", world))


def test_a_candidate_that_fails_loses_though_it_was_evaluated_otherwise_before(world, tmp_path):
    options = {**world, "methods": ["ivon"], "seeds": [3]}
    search = recipe(tmp_path, search={"ivon": {"lr": [0.1, 0.5]}})
    best = reproduce(plan_from(search, tmp_path / "runs", options), Here(), silent).chosen["two_choices"]["ivon"]
    again = reproduce(plan_from(search, tmp_path / "runs", {**options, "samples": 3}), Here(fail=best), silent)
    assert again.chosen["two_choices"]["ivon"] != best
    assert not again.failed


def test_an_ensemble_is_not_searched_and_may_stand_first(world, tmp_path):
    refused = refusal(tmp_path, world, methods=["ensemble"], search={"ensemble": {"size": [2, 3]}})
    assert any("`search.ensemble` would try nothing" in problem and "Search `adamw`" in problem for problem in refused)
    search = recipe(tmp_path, search={"adamw": {"steps": [2, 6]}})
    check(plan_from(search, tmp_path / "runs", {**world, "methods": ["ensemble", "adamw"]}))


def test_a_method_of_which_every_candidate_failed_is_left_out(world, tmp_path):
    search = {"adamw": {"lr": [1e-4, 1e-3]}, "ivon": {"lr": [0.1, 0.5]}}
    plan = plan_from(recipe(tmp_path, search=search), tmp_path / "runs", {**world, "methods": ["adamw", "ivon"]})
    said: list[str] = []
    ended = reproduce(plan, Here(fail="ivon/lr"), said.append)
    assert "Nothing is chosen for ivon on two_choices: every candidate failed." in said
    assert list(ended.chosen["two_choices"]) == ["adamw"]
    assert len(ended.runs) == 2
    assert len(ended.failed) == 2


def test_a_failed_run_is_reported_beside_the_others(world, tmp_path):
    plan = plan_from(None, tmp_path / "runs", {**world, "methods": ["adamw", "mc_dropout", "ivon"]})
    made = tables_of("table1", plan, Here(fail="adamw/seed4"), say=silent)
    assert {Path(skip.run).parts[-2] for skip in made.failed} == {"adamw", "mc_dropout"}
    text = (plan.out / "table1.md").read_text()
    assert "no space left on device" in text
    assert all("\\[" in line for line in text.splitlines() if "MC dropout" in line or ("AdamW" in line and "|" in line))
    assert "no space left on device" in (plan.out / "report" / "report.html").read_text()
    mended = tables_of("table1", plan, Here(), say=silent)
    assert not mended.failed
    assert "\\[" not in "".join(line for line in (plan.out / "table1.md").read_text().splitlines() if "|" in line)
    with pytest.raises(VarloraError, match="All 6 runs failed"):
        tables_of(
            "table1",
            plan_from(None, tmp_path / "none", {**world, "methods": list(plan.methods)}),
            Here("seed"),
            say=silent,
        )


def test_table2_and_rows_of_another_task(world, tmp_path):
    (task,) = world["tasks"]
    other = str(Path(task).with_name("true_or_false.yaml"))
    plan = plan_from(recipe(tmp_path, ood={task: other}), tmp_path / "runs", world)
    (table,) = tables_of("table2", plan, Here(), beside=True, say=silent).tables
    assert [line.label for line in table.blocks[0].lines][:7] == [
        "0 (IVON@mean)", "0.25", "0.5", "0.75", "1 (IVON)", "1.25", "1.5",
    ]  # fmt: skip
    assert (plan.out / "two_choices" / "ivon" / "seed3" / "predictions-ood-true_or_false.safetensors").is_file()
    assert "Out of distribution" in (plan.out / "report-table2" / "report.html").read_text()


def refusal(tmp_path: Path, world: dict, **values) -> list[str]:
    options = {name: value for name, value in values.items() if name in world or name == "methods"}
    others = {name: value for name, value in values.items() if name not in options}
    with pytest.raises(ConfigError) as error:
        reproduce(plan_from(recipe(tmp_path, **others), tmp_path / "runs", {**world, **options}), Here(), silent)
    assert not (tmp_path / "runs").exists()
    return list(error.value.problems)


def test_all_problems_at_once_before_anything_trains(world, tmp_path):
    assert refusal(tmp_path, world, seeds=[1, 1], methods=["ivon", "ivon"], samples="ten", search_seeds=3) == [
        "`ivon` is named twice under `methods`.",
        "Expected `samples` to be a whole number, but got 'ten'.",
        "Expected `search_seeds` to be from 1 to the number of seeds, but got 3.",
        "Expected different `seeds`, but got 1, 1. Name each once.",
    ]
    found = refusal(tmp_path, world, methods=["ivonn", "adamw"], tasks=["boolk", *world["tasks"]], search={"swagg": {}})
    assert "Unknown method `ivonn`. Did you mean `ivon`?" in found
    assert any("boolk" in problem for problem in found)
    assert any("Unknown method `swagg`" in problem for problem in found)
    found = refusal(tmp_path, world, methods=["adamw", "swag"], stepps=3, search={"adamw": {"lr": [-1.0, 0.1]}})
    assert any(problem.startswith("two_choices, adamw: Unknown setting `stepps`") for problem in found)
    found = refusal(tmp_path, world, methods=["adamw", "swag", "temperature"], calibration_fraction=0.0)
    assert any("two_choices, swag: Expected snapshots" in problem for problem in found)
    assert any("two_choices, temperature: " in problem and "held out" in problem for problem in found)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"tasks": {"boolq": 3}}, "Expected `tasks.boolq` to be a mapping of settings, but got 3."),
        ({"seed": 5}, "`seed` is set by the plan: name `seeds`. Leave it out."),
        ({"method": {"ess": 5}}, "`method` is set by the plan: name `methods`. Leave it out."),
        ({"ood": {"boolk": "boolq"}}, "Expected `ood` to name tasks of the plan, but got `boolk`."),
        ({"taus": [-1]}, "Expected `taus` to be 0 or more, but got -1.0."),
        ({"methods": {"ensemble": {"size": 10**9}}}, "members >= 2 and at most 1000, but got 1000000000"),
        ({"methods": {"ensemble": {"size": "two"}}}, "Expected `methods.ensemble.size` to be a number of members >= 2"),
        ({"methods": {"ensemble": {"of": "ivonn"}}}, "Expected `methods.ensemble.of` to be a method that trains by"),
        ({"methods": {"temperature": {"of": "temperature"}}}, "a method that trains by itself, but got `temperature`"),
        ({"search": {"adamw": {"lr": 0.001}}}, "Expected `search.adamw` to be lists of values by setting"),
        ({"search": {"adamw": {"lr": []}}}, "Expected `search.adamw` to be lists of values by setting"),
        ({"search": {"adamw": None}}, "Expected `search.adamw` to be lists of values by setting"),
        (
            {"search": {"ensemble": {"size": [2, 3]}}, "methods": ["ensemble"]},
            "`search.ensemble` would try nothing",
        ),
        ({"search": {1: 2}}, "Unknown method `1`"),
        ({"seeds": [0, 1000], "methods": ["ensemble"]}, "Expected `seeds` whose runs of ensemble share no members"),
        ({"seeds": []}, "Expected `seeds`, but it is missing"),
        ({"tasks": 5}, "Expected `tasks` to map names to settings or to list names, but got 5"),
        ({"methods": 5}, "Expected `methods` to map names to settings or to list names, but got 5"),
        (
            {"tasks": {"boolq": {"methods": ["ivon"]}}},
            "Expected `tasks.boolq.methods` to map names to settings, but got",
        ),
        ({"tasks": {"boolq": {"methods": {"ivon": 3}}}}, "Expected `tasks.boolq.methods.ivon` to be a mapping"),
        (
            {"tasks": {"boolq": {"methods": {"ensemble": {"size": "abc"}}}}, "methods": ["ensemble"]},
            "`methods.ensemble.size` to be a number of members >= 2 and at most 1000, but got 'abc'",
        ),
        ({"tasks": {"boolq": {"methods": {"ivno": {"lr": 1}}}}}, "Unknown method `ivno`. Did you mean `ivon`?"),
        ({"methods": {"pruned": {"of": ["a"]}}}, "Expected `methods.pruned.of` to be a method that trains by itself"),
        ({"taus": [float("inf")]}, "Expected `taus` to be 0 or more, but got inf."),
        ({"ood": {"boolq": ["arc_easy"]}}, "Expected `ood.boolq` to be one task, by name or task file, but got ['arc"),
        ({"ood": {"boolq": None}}, "Expected `ood.boolq` to be one task, by name or task file, but got None"),
    ],
)
def test_a_plan_of_the_wrong_shape(values, problem, world, tmp_path):
    options = {name: value for name, value in world.items() if name not in values}
    with pytest.raises(ConfigError) as error:
        reproduce(plan_from(recipe(tmp_path, **values), tmp_path / "runs", options), Here(), silent)
    assert any(problem in found for found in error.value.problems)


def test_what_is_assigned_has_the_right_shape_too(world, tmp_path):
    for given in ("methods.ivon=3", "methods.ivon=[lr]", f"tasks={{{world['tasks'][0]}: 3}}"):
        with pytest.raises(ConfigError, match=r"to be a mapping of settings, but got"):
            plan_from(None, tmp_path / "runs", {**world, "methods": ["ivon"]}, [given])


def test_runs_do_not_go_where_a_file_is(world, tmp_path):
    (tmp_path / "runs").write_text("x")
    with pytest.raises(ConfigError, match="`--out` to be a folder"):
        reproduce(plan_from(None, tmp_path / "runs", {**world, "methods": ["ivon"]}), Here(), silent)


def test_nothing_said_of_a_task_is_nothing(world, tmp_path):
    (task,) = world["tasks"]
    plan = plan_from(recipe(tmp_path, tasks={task: {"methods": None}}), tmp_path / "runs", {**world, "tasks": None})
    assert plan.tasks == {task: {"methods": {}}}


def test_a_single_name_is_a_list_of_one(world, tmp_path):
    plan = plan_from(recipe(tmp_path, methods="ivon", samples=3), tmp_path / "runs", {**world, "samples": None})
    assert plan.methods == {"ivon": {}}
    with pytest.raises(ConfigError, match="Expected `samples` to be 1 or more, but got -1"):
        plan_from(None, tmp_path / "runs", {**world, "samples": -1})


def test_settings_that_contradict_the_run_that_a_method_builds_on(world, tmp_path):
    methods = {"adamw": {"lr": 1e-3}, "mc_dropout": {"lr": 5e-4}, "laplace_kfac": {"steps": 5, "batch_size": 8}}
    with pytest.raises(ConfigError) as error:
        reproduce(plan_from(recipe(tmp_path, methods=methods), tmp_path / "runs", world), Here(), silent)
    dropout, kfac = error.value.problems
    assert dropout.startswith("two_choices, mc_dropout: ")
    assert "`lr` is 0.0005 and was 0.001" in dropout
    assert kfac.startswith("two_choices, laplace_kfac: ")
    assert "`steps` is 5 and was 6" in kfac


def test_a_base_that_was_moved_is_the_same_and_another_one_is_refused(world, tmp_path):
    options = {**world, "methods": ["adamw"], "seeds": [3]}
    reproduce(plan_from(None, tmp_path / "runs", options), Here(), silent)
    moved, other = (shutil.copytree(world["model"], tmp_path / name) for name in ("moved", "other"))
    begun = Here()
    ended = reproduce(plan_from(None, tmp_path / "runs", {**options, "model": str(moved)}), begun, silent)
    assert (begun.begun, ended.failed) == ([], ())
    tensors, meta = load_tensors(other / "model.safetensors")
    save_tensors(other / "model.safetensors", {name: 2 * tensor for name, tensor in tensors.items()}, meta)
    with pytest.raises(ConfigError, match=r"Expected the base that .* but .*other is another one"):
        reproduce(plan_from(None, tmp_path / "runs", {**options, "model": str(other)}), begun, silent)
    assert begun.begun == []


def test_rows_that_were_changed_are_evaluated_again_or_refused(world, tmp_path):
    (task,) = map(Path, world["tasks"])
    for path in task.parent.glob("two_choices*"):
        shutil.copy(path, tmp_path)
    task = tmp_path / task.name
    plan = plan_from(None, tmp_path / "runs", {**world, "tasks": [str(task)], "methods": ["adamw"], "seeds": [3]})
    (run,) = reproduce(plan, Here(), silent).runs
    dev = tmp_path / "two_choices.dev.jsonl"
    dev.write_text("".join(reversed(dev.read_text().splitlines(keepends=True)[:7])))
    begun = Here()
    reproduce(plan, begun, silent)
    assert len(begun.begun) == 1
    assert json.loads((run / "metrics.json").read_text())["rows"] == 7
    reproduce(plan, begun, silent)
    assert len(begun.begun) == 1
    task.write_text(task.read_text().replace("{question}", "{question} Now,"))
    with pytest.raises(ConfigError, match=r"training rows, and their prompts, .* others now \(1 of 1 runs\)"):
        reproduce(plan, begun, silent)


def test_another_split_is_reported_where_the_plan_names_it(world, tmp_path):
    (task,) = map(Path, world["tasks"])
    for path in task.parent.glob("two_choices*"):
        shutil.copy(path, tmp_path)
    task = tmp_path / task.name
    lines = (tmp_path / "two_choices.train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "two_choices.test.jsonl").write_text("".join(lines[:5]))
    task.write_text(task.read_text().replace("files:\n", "files:\n  test: two_choices.test.jsonl\n"))
    options = {**world, "tasks": [str(task)], "methods": ["adamw"], "seeds": [3]}
    (run,) = reproduce(plan_from(None, tmp_path / "runs", options), Here(), silent).runs
    reproduce(plan_from(None, tmp_path / "runs", {**options, "split": "test"}), Here(), silent)
    found = json.loads((run / "metrics.json").read_text())
    assert (found["split"], found["rows"]) == ("test", 5)
    other = str(Path(world["tasks"][0]).with_name("true_or_false.yaml"))  # which has no such split
    check(plan_from(recipe(tmp_path, ood={str(task): other}), tmp_path / "runs", {**options, "split": "test"}))
    of_task = recipe(tmp_path, tasks={str(task): {"split": "dev"}})
    begun = Here()
    reproduce(plan_from(of_task, tmp_path / "runs", {**options, "split": "test"}), begun, silent)
    assert len(begun.begun) == 1
    assert json.loads((run / "metrics.json").read_text())["split"] == "dev"
    with pytest.raises(ConfigError, match="nothing was trained or chosen on, but got `calibration`"):
        reproduce(plan_from(None, tmp_path / "runs", {**options, "split": "calibration"}), begun, silent)
    (tmp_path / "plan.yaml").write_text(json.dumps({"tasks": {str(task): {"split": ["dev"]}}}))
    with pytest.raises(ConfigError, match="nothing was trained or chosen on, but got `\\['dev'\\]`"):
        reproduce(plan_from(tmp_path / "plan.yaml", tmp_path / "runs", options), begun, silent)


def test_two_reproductions_do_not_share_a_folder(world, tmp_path):
    plan = plan_from(None, tmp_path / "runs", {**world, "methods": ["adamw"]})
    begun = Here()
    with alone(plan.out), pytest.raises(VarloraError, match="Another process"):
        reproduce(plan, begun, silent)
    assert begun.begun == []


def test_a_run_whose_predictions_are_damaged_is_marked_and_told(world, tmp_path):
    plan = plan_from(None, tmp_path / "runs", {**world, "methods": ["adamw"]})
    assert not tables_of("table1", plan, Here(), say=silent).failed
    path = plan.out / "two_choices" / "adamw" / "seed4" / "predictions.safetensors"
    tensors, meta = load_tensors(path)
    save_tensors(path, {**tensors, "labels": tensors["labels"] + 100}, meta)
    made = tables_of("table1", plan, Here(), say=silent)
    assert [Path(skip.run).name for skip in made.failed] == ["seed4"]
    assert "a label is not among" in (plan.out / "table1.md").read_text()
    assert not tables_of("table1", plan, Here(), say=silent).failed


def test_values_of_a_search_stay_within_the_folder_of_the_runs(world, tmp_path):
    search = {"adamw": {"lora": [{"targets": "../../q_proj"}, {"rank": 2}]}}
    plan = plan_from(recipe(tmp_path, search=search), tmp_path / "runs", {**world, "methods": ["adamw"]})
    variants = [candidate.variant for candidate in candidates_of(plan, *world["tasks"], "adamw")]
    assert len(set(variants)) == 2
    assert not any("/" in variant for variant in variants)


def test_a_task_without_rows_for_a_split(world, tmp_path):
    (task,) = map(Path, world["tasks"])
    for name in (task.name, "two_choices.train.jsonl"):
        shutil.copy(task.with_name(name), tmp_path)
    (tmp_path / "two_choices.dev.jsonl").write_text("")
    found = refusal(tmp_path, world, tasks=[str(tmp_path / task.name)], methods=["adamw"])
    assert any("two_choices.dev.jsonl" in problem for problem in found)


def test_runs_that_were_made_with_other_settings(world, tmp_path):
    plan = plan_from(None, tmp_path / "runs", {**world, "methods": ["adamw"], "seeds": [3]})
    reproduce(plan, Here(), silent)
    with pytest.raises(ConfigError, match="`steps` is 7 and was 6"):
        reproduce(plan_from(None, tmp_path / "runs", {**world, "methods": ["adamw"], "steps": 7}), Here(), silent)


def test_a_run_that_is_only_built_upon_was_made_with_other_settings(world, tmp_path):
    """AdamW is in neither plan, and is there from the first when the second would build on it."""
    reproduce(plan_from(None, tmp_path / "runs", {**world, "methods": ["mc_dropout"]}), Here(), silent)
    begun = Here()
    with pytest.raises(ConfigError, match=r"temperature: .*`steps` is 12 and was 6"):
        reproduce(plan_from(None, tmp_path / "runs", {**world, "steps": 12, "methods": ["temperature"]}), begun, silent)
    assert begun.begun == []


def test_an_evaluation_by_hand_is_not_taken_for_the_plans(world, tmp_path):
    """Not at another variance, with another seed or of another split; and what it lacks is made."""
    plan = plan_from(None, tmp_path / "runs", {**world, "seeds": [3], "methods": ["ivon"], "calibrate": True})
    (run,) = reproduce(plan, Here(), silent).runs
    before = {name: json.loads((run / name).read_text()) for name in ("metrics.json", "metrics-calibration.json")}
    for changes in ({"tau": 8.0}, {"seed": 9}, {"split": "train"}, {"split": "calibration", "tau": 2.0}):
        evaluate(run, **{"samples": 2, **changes}, say=silent)
        begun = Here()
        reproduce(plan, begun, silent)
        assert len(begun.begun) == (changes.get("split") != "calibration")
    calibrate(run, say=silent)  # which takes the predictions away that were made as was chosen before
    begun = Here()
    reproduce(plan, begun, silent)
    assert len(begun.begun) == 1
    for name in before:
        now = json.loads((run / name).read_text())
        assert (now["tau"], now["split"]) == (before[name]["tau"], before[name]["split"])
    begun = Here()
    reproduce(plan, begun, silent)
    assert begun.begun == []


def test_where_nothing_is_held_out_calibrated_runs_are_not_repeated(world, tmp_path):
    options = {**world, "seeds": [3], "methods": ["ivon"], "calibrate": True, "calibration_fraction": 0.0}
    plan, begun = plan_from(None, tmp_path / "runs", options), Here()
    reproduce(plan, begun, silent)
    reproduce(plan, begun, silent)
    assert len(begun.begun) == 1


@pytest.mark.parametrize("task", list(TITLES))
def test_the_papers_plan_has_the_settings_of_its_recipes(task, tmp_path):
    """Per task and method; only the adapter's type is the same for all here."""
    recipes = Path(__file__).resolve().parents[1] / "recipes" / "llama2-7b"
    plan = plan_from(recipes / "table1.yaml", tmp_path, {})
    assert list(plan.tasks) == list(TITLES)
    for method in ("adamw", "ivon"):
        ours = run_settings(plan, candidates_of(plan, task, method)[0], 42).to_dict()
        theirs = load_settings(recipes / task / f"{method}.yaml")[1].to_dict()
        for of in (ours, theirs):
            del of["run_dir"], of["lora"]["dtype"]
        assert ours == theirs


def test_a_full_disk_leaves_finished_runs_whole_and_the_grid_resumable(world, tmp_path, monkeypatch):
    """Writing the second run's predictions finds no space; the first one stands, and another call goes on."""

    def full(predictions, path: Path) -> None:
        if "seed4" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save_predictions(predictions, path)

    plan = plan_from(None, tmp_path / "runs", {**world, "methods": ["adamw"]})
    with monkeypatch.context() as patched:
        patched.setattr("varlora.evaluation.save_predictions", full)
        ended = reproduce(plan, Here(), silent)
    assert [run.name for run in ended.runs] == ["seed3"]
    assert "No space left on device" in ended.failed[0].reason
    before = (ended.runs[0] / "predictions.safetensors").read_bytes()
    launcher = Here()
    assert not reproduce(plan, launcher, silent).failed
    assert launcher.begun == ["two_choices/adamw/seed4"]
    assert (ended.runs[0] / "predictions.safetensors").read_bytes() == before


def test_from_the_command_line(world, tmp_path, capsys):
    """Two seeds, short, in two processes: all tables, in every form."""
    model, tasks = world["model"], world["tasks"]
    common = ["--model", model, "--tasks", *tasks, "--seeds", "0", "1", "--steps", "6", "--samples", "3"]
    out = ["--out", str(tmp_path / "runs")]
    few = ["--methods", "adamw", "mc_dropout", "ivon", "--set", "methods.ivon.lr=0.5"]
    assert main(["reproduce", "table1", *common, *few, *out, "--workers", "2", "--compare", "paper"]) == 0
    printed = capsys.readouterr().out
    assert "IVON" in printed
    assert "Average" not in printed
    assert {path.name for path in (tmp_path / "runs").glob("table1.*")} == {
        "table1.md", "table1.tex", "table1.html", "table1.json",
    }  # fmt: skip
    assert "MC dropout" in (tmp_path / "runs" / "report" / "report.html").read_text()
    assert main(["reproduce", "table3", *common, *few, *out]) == 0
    assert "0.5" in (tmp_path / "runs" / "table3.md").read_text()
    assert main(["reproduce", "overhead", *common, *out, "--rounds", "2", "--compare", "paper"]) == 0
    assert "316.3" in capsys.readouterr().out
    assert json.loads((tmp_path / "runs" / "overhead.json").read_text())["task"] == "two_choices"
    assert main(["reproduce", "table1", "--model", model, "--tasks", "two_choices.yml", *out]) == 1
    assert "two_choices.yml" in capsys.readouterr().err


def test_runs_that_read_other_rows_are_looked_at_apart(world, tmp_path):
    """A method of a plan may have a data folder of its own, or keep other rows."""
    (task,) = world["tasks"]
    plan = plan_from(None, tmp_path / "runs", {**world, "methods": ["adamw"]})
    settings = run_settings(plan, candidates_of(plan, task, "adamw")[0], 3)
    known = reported_rows(settings, task, "dev")
    for change in ({"row_filter": True}, {"skip_bad_rows": True}, {"data_dir": "elsewhere"}):
        assert reported_rows(dataclasses.replace(settings, **change), task, "dev") != known
    assert reported_rows(settings, task, "test") != known


def test_the_rows_of_another_task_are_known_by_their_checksum_too(world, tmp_path):
    """So that they are predicted again when they have changed."""
    (task,) = world["tasks"]
    other = str(Path(task).with_name("true_or_false.yaml"))
    plan = plan_from(recipe(tmp_path, ood={task: other}), tmp_path / "runs", {**world, "methods": ["adamw"]})
    (cell,) = _cells(plan, candidates_of(plan, task, "adamw"), [3], check(plan))
    assert list(cell.rows) == ["two_choices", "true_or_false"]
    assert len(set(cell.rows.values())) == 2


def test_only_ivon_is_predicted_at_other_variances(world, tmp_path):
    (task,) = world["tasks"]
    plan = plan_from(recipe(tmp_path, taus=[0.5]), tmp_path / "runs", {**world, "methods": ["adamw", "ivon"]})
    found = [one for method in plan.methods for one in candidates_of(plan, task, method)]
    adamw, ivon = _cells(plan, found, [3], check(plan))
    assert "taus" not in adamw.evaluation
    assert ivon.evaluation["taus"] == [0.5]
