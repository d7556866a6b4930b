"""Settings from recipes and the command line; the paper's recipes."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path

import pytest
import yaml

from varlora.config import Settings, load_settings, read_recipe, settings_from
from varlora.errors import ConfigError
from varlora.model import LoRA
from varlora.plan import plan_from
from varlora.tasks import TASKS, get_task
from varlora.training import check_unchanged

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
BASE = {"task": "boolq", "model": "m"}

TABLE_3 = {  # effective sample size, initial Hessian
    "winogrande_s": (1e7, 3e-4),
    "arc_challenge": (1e6, 1e-3),
    "arc_easy": (1e6, 1e-3),
    "winogrande_m": (1e8, 3e-4),
    "openbookqa": (1e6, 1e-3),
    "boolq": (1e7, 3e-4),
}


def problems_of(values=None, **more) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_settings({**BASE, **(values or {})}, **more)
    return caught.value.problems


@pytest.mark.parametrize(
    "method", [{"name": "ivon"}, {"name": "pruned", "of": "ivon"}], ids=lambda method: method["name"]
)
def test_layers_by_number_are_what_a_run_reads_back(method, tmp_path):
    """JSON has texts for keys; a run of other settings could not be resumed."""
    layers = {"sigma_by_layer": {0: 0.5}}
    own = layers if method["name"] == "ivon" else {"settings": layers}
    (settings,) = load_settings({**BASE, "method": {**method, **own}, "run_dir": str(tmp_path)})
    assert json.loads(json.dumps(settings.to_dict())) == settings.to_dict()
    (tmp_path / "config.json").write_text(json.dumps({"settings": settings.to_dict()}))
    check_unchanged(settings)
    inner = settings.build_method() if method["name"] == "ivon" else settings.build_method().inner()
    assert inner._given_by_layer() == {"0": 0.5}


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_there_is_a_recipe_for_each_task_and_method_of_the_paper():
    found = {path.relative_to(RECIPES / "llama2-7b").as_posix() for path in (RECIPES / "llama2-7b").glob("*/*.yaml")}
    assert found == {f"{task}/{method}.yaml" for task in TASKS for method in ("adamw", "ivon")}
    assert set(TABLE_3) == set(TASKS)


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.relative_to(RECIPES).as_posix())
def test_every_recipe_is_valid(path):
    if path.parent.name == "local":
        assert get_task(path).files["train"]
    elif path.name == "table1.yaml":
        assert set(plan_from(path, Path("runs"), {}).tasks) == set(TASKS)
    else:
        assert load_settings(path)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", ["adamw", "ivon"])
def test_the_recipes_are_the_papers(task, method):
    runs = load_settings(RECIPES / "llama2-7b" / task / f"{method}.yaml")
    assert [run.seed for run in runs] == [21, 42, 87]
    assert len({run.folder for run in runs}) == 3
    for run in runs:
        assert (run.task, run.method, run.model) == (task, method, "meta-llama/Llama-2-7b-hf")
        assert (run.steps, run.batch_size, run.accumulation) == (10_000, 4, 1)
        assert (run.quantization, run.row_filter, run.calibration_fraction) == ("8bit", True, 0.0)
        assert run.lora == LoRA(
            rank=8, alpha=16, dropout=0.1, targets=None, dtype="bfloat16" if method == "ivon" else "float32"
        )
        own = run.to_dict()["method_settings"]
        if method == "adamw":
            assert (own["lr"], own["weight_decay"]) == (5e-5, 0.0)
        else:
            assert (own["ess"], own["hess_init"]) == TABLE_3[task]
            assert (own["lr"], own["beta1"], own["beta2"], own["clip_radius"]) == (0.03, 0.9, 1 - 1e-5, 1e-3)
            assert own["mc_samples"] == 1
            assert not own["rescale_lr"]
        assert "lr_scheduler_type" not in run.training_arguments  # linear, as `fit` has it


@pytest.mark.parametrize("path", sorted((RECIPES / "llama2-7b").glob("*/*.yaml")), ids=lambda path: path.parent.name)
def test_recipes_hold_differences_from_the_defaults_only(path):
    recipe = read_recipe(path)
    defaults = settings_from({"task": recipe["task"], "model": recipe["model"]}).to_dict()
    for name, value in recipe.items():
        if name not in ("task", "model", "method", "seeds"):
            assert defaults[name] != value, name


# --- combining -------------------------------------------------------------------------------------------------------


def test_later_settings_win(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("task: boolq\nmodel: m\nsteps: 1\nbatch_size: 1\nlora: {rank: 4}\n")
    (run,) = load_settings(recipe, {"steps": 2, "batch_size": None}, ["steps=3", "lora.alpha=32", "chat=yes"])
    assert (run.steps, run.batch_size, run.chat) == (3, 1, True)
    assert run.lora == LoRA(rank=4, alpha=32)


def test_a_mapping_that_is_passed_in_is_left_alone():
    values = {**BASE, "method": {"name": "ivon", "ess": 5.0}, "lora": {"rank": 2}}
    copy = json.loads(json.dumps(values))
    load_settings(values, {"seeds": [1, 2]}, ["method.ess=7", "lora.rank=3"])
    assert values == copy


def test_numbers_may_be_written_as_yaml_does_not_read_them():
    run = settings_from(
        {**BASE, "steps": "1e3", "method": {"ess": "1e7"}, "training_arguments": {"max_grad_norm": "1e-1"}}
    )
    assert run.steps == 1000
    assert run.method_settings == {"ess": 1e7}
    assert run.training_arguments == {"max_grad_norm": 0.1}


@pytest.mark.parametrize("name", ["method", "method.name"])
def test_settings_of_one_method_mean_nothing_to_another(name):
    recipe = {**BASE, "method": {"name": "ivon", "ess": 1e7}}
    (run,) = load_settings(recipe, None, ["method.lr=0.5", f"{name}=adamw"])
    assert (run.method, run.method_settings) == ("adamw", {"lr": 0.5})
    (run,) = load_settings(recipe, {"method": "ivon"})
    assert run.method_settings == {"ess": 1e7}


def test_the_defaults_are_the_papers():
    run = settings_from(BASE)
    assert (run.method, run.seed, run.steps, run.batch_size) == ("ivon", 0, 10_000, 4)
    assert (run.lora.rank, run.lora.alpha, run.lora.dropout) == (8, 16, 0.1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 0.003}},
        {"save_only_model": False},
        {"bf16": True},
        {"eval_strategy": "no", "save_strategy": "epoch", "train_sampling_strategy": "sequential", "run_name": "false"},
    ],
)
def test_training_arguments_that_are_right_are_taken(arguments):
    method = {"name": "adamw", "lr": 1e-4}
    assert settings_from({**BASE, "method": method, "training_arguments": arguments}).training_arguments == arguments


def test_the_trainers_schedule_is_for_learning_rates_that_are_given():
    values = {**BASE, "training_arguments": {"lr_scheduler_type": "cosine"}}
    (problem,) = problems_of({"training_arguments": values["training_arguments"]})
    assert problem.endswith("has its own schedule. Leave it out, or give `lr` and leave out `lr_decay`.")
    for name in ("temperature", "pruned"):
        method = {"name": name, "of": "ivon"}
        (problem,) = problems_of({"method": method, "training_arguments": values["training_arguments"]})
        assert problem.endswith("or give `lr` and leave out `lr_decay`.")
    for method in ({"lr": 0.1}, {"lr_like_adamw": 1e-4}):
        assert settings_from({**values, "method": method}).training_arguments == values["training_arguments"]
    assert problems_of({**values, "method": {"name": "blob"}})[0].endswith("own schedule. Leave it out.")
    assert settings_from(values, stored=True).training_arguments == values["training_arguments"]  # of a run of before


def test_what_is_refused_now_is_read_from_a_run_of_before():
    arguments = {"save_only_model": True, "bf16": "false"}
    assert settings_from({**BASE, "training_arguments": arguments}, stored=True).training_arguments == arguments


def test_tokens_are_not_stored():
    run = settings_from({**BASE, "training_arguments": {"hub_token": "hf_1"}})
    assert run.training_arguments == {"hub_token": "hf_1"}
    assert run.to_dict()["training_arguments"] == {}


def test_what_config_json_holds_gives_the_same_settings_again():
    changes = {"lora": {"targets": ["q_proj"]}, "method": {"name": "adamw", "lr": 1e-4}, "quantization": "4bit"}
    run = settings_from({**BASE, **changes, "training_arguments": {"bf16": True}})
    stored = json.loads(json.dumps(run.to_dict()))
    again = settings_from(stored)
    assert again.to_dict() == run.to_dict()
    assert again.build_method() == run.build_method()
    (changed,) = load_settings(stored, None, ["method.lr=3"])  # also where config.json keeps method and settings apart
    assert changed.method_settings["lr"] == 3


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_seeds_give_a_run_each():
    runs = load_settings({**BASE, "seeds": [21, 42], "run_dir": "runs/x"})
    assert [(run.seed, run.folder) for run in runs] == [(21, Path("runs/x/seed21")), (42, Path("runs/x/seed42"))]
    runs = load_settings({**BASE, "seeds": [21, 42]})
    assert [run.folder.name for run in runs] == ["boolq-m-ivon-seed21", "boolq-m-ivon-seed42"]


def test_the_last_of_seed_and_seeds_wins():
    recipe = {**BASE, "seeds": [21, 42, 87], "run_dir": "x"}
    assert [(run.seed, run.folder) for run in load_settings(recipe, {"seeds": [5]})] == [(5, Path("x"))]
    assert [run.seed for run in load_settings(recipe, None, ["seed=5"])] == [5]
    assert [run.seed for run in load_settings({**BASE, "seed": 3}, {"seeds": [1, 2]})] == [1, 2]


@pytest.mark.parametrize("seeds", [[], 5, "21", [1, 1], [1, "1"]])
def test_seeds_that_are_no_list_of_seeds(seeds):
    assert problems_of({"seeds": seeds}) == (
        f"Expected `seeds` to be a list of different whole numbers, but got {seeds!r}.",
    )


def test_a_seed_that_is_none():
    assert problems_of({"seeds": [1, "x"]}) == ("Expected `seed` to be a whole number, but got 'x'.",)
    assert "both" in problems_of({"seeds": [1], "seed": 2})[0]


# --- problems --------------------------------------------------------------------------------------------------------


def test_all_problems_are_reported_at_once():
    found = problems_of(
        {
            "task": "bolq",
            "stepps": 5,
            "batch_size": "many",
            "method": {"name": "ivn", "ess": 3},
            "lora": {"rnk": 8, "dropout": 2},
            "training_arguments": {"logging_step": 5, "learning_rate": 1e-3},
            "calibration_fraction": 1.5,
        },
        assignments=["no equals sign"],
    )
    expected = [
        "`no equals sign`",
        "`stepps`. Did you mean `steps`",
        "`batch_size` to be a whole number, but got 'many'",
        "method `ivn`. Did you mean `ivon`?",
        "`lora.rnk`",
        "`dropout` to be in [0, 1)",
        "`bolq`. Did you mean `boolq`?",
        "`calibration_fraction` to be within 0 and 1",
        "`training_arguments.logging_step`. Did you mean `logging_steps`",
        "`training_arguments.learning_rate` is set by `method.lr`",
    ]
    assert len(found) == len(expected)
    for text in expected:
        assert sum(text in problem for problem in found) == 1, text


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"steps": 0}, "`steps` to be at least 1, but got 0. Raise it, or leave it out."),
        ({"steps": 2.5}, "`steps` to be a whole number, but got 2.5"),
        ({"steps": float("inf")}, "`steps` to be a whole number"),
        ({"steps": True}, "`steps` to be a whole number, but got True"),
        ({"seed": -1}, "`seed` to be at least 0"),
        ({"seed": 2**32}, "`seed` to be less than 2**32"),
        ({"max_length": 3}, "`max_length` to be at least 8"),
        ({"chat": "maybe"}, "`chat` to be true or false, but got 'maybe'"),
        ({"dtype": "float64"}, "`dtype` to be one of float32, bfloat16, float16, but got 'float64'"),
        ({"quantization": "2bit"}, "`quantization` to be one of 8bit, 4bit or nothing"),
        ({"training_arguments": {"logging_steps": math.inf}}, "`training_arguments.logging_steps` cannot be inf: "),
        (
            {"method": "adamw", "training_arguments": {"warmup_steps": math.inf, "bf16": False}},
            "`training_arguments.warmup_steps` cannot",
        ),
        (
            {"training_arguments": {"accelerator_config": "abc"}},
            "`training_arguments.accelerator_config` cannot be 'abc'",
        ),
        ({"training_arguments": 5}, "`training_arguments` to be a mapping, but got 5"),
        ({"training_arguments": {"logging_steps": "zero"}}, "`training_arguments.logging_steps` to be a number"),
        ({"method": "adamw", "training_arguments": {"lr_scheduler_type": "foo"}}, "foo is not a valid SchedulerType"),
        (
            {"method": "adamw", "training_arguments": {"lr_scheduler_type": "cosine_with_min_lr"}},
            "One of min_lr or min_lr_rate",
        ),
        ({"training_arguments": {"dataloader_num_workers": -1}}, "num_workers"),
        ({"training_arguments": {"save_only_model": True}}, "leaves no checkpoint to go on from"),
        ({"training_arguments": {"eval_strategy": "steps"}}, "nothing is evaluated while training"),
        ({"training_arguments": {"eval_on_start": True}}, "nothing is evaluated while training"),
        ({"training_arguments": {"save_strategy": "best"}}, "nothing is evaluated while training"),
        ({"training_arguments": {"train_sampling_strategy": "group_by_length"}}, "to be random or sequential, but got"),
        ({"training_arguments": {"train_sampling_strategy": "batch_rebalance"}}, "to be random or sequential, but got"),
        ({"training_arguments": {"bf16": "false"}}, "`training_arguments.bf16` to be true or false, but got the text"),
        ({"training_arguments": {"tf32": "no"}}, "`training_arguments.tf32` to be true or false, but got the text"),
        ({"training_arguments": {"run_name": datetime.date(2024, 1, 1)}}, "datetime.date(2024, 1, 1). Put quotes"),
        ({"lora": 5}, "`lora` to be a mapping, but got 5"),
        ({"lora": {"targets": "q_proj"}}, "`lora.targets` to be a list or all-linear or nothing"),
        ({"lora": {"dtype": "int8"}}, "`lora.dtype` to be one of float32"),
        ({"method": 5}, "`method` to be a name or a mapping, but got 5"),
        ({"method": {"name": ["x"]}}, "Unknown method `['x']`"),
        ({"method": {"ess": "much"}}, "`method.ess` to be a number or auto, but got 'much'"),
        ({"method": {"es": 1}}, "Unknown setting `method.es` of ivon. Did you mean `ess`"),
        ({"method": {"name": "adamw", "lr_like_adamw": 1e-4}}, "Unknown setting `method.lr_like_adamw` of adamw."),
        ({"method": {"lr": -1}}, "`method`: Expected `lr` to be a learning rate >= 0"),
        ({"method": {"hess_approx": "foo"}}, "`method`: Expected `hess_approx`"),
        ({"method": {"name": "adamw", "eps": -1}}, "`method`: Invalid epsilon"),
        ({"model": None}, "Expected `model`, but it is missing"),
        ({"task": ""}, "Expected `task`, but it is missing"),
        ({"task": ["boolq"]}, "`task` to be text, but got ['boolq']"),
        ({"task": "none.yaml"}, "none.yaml"),
        ({5: 3}, "Unknown setting `5`"),
    ],
)
def test_one_problem(values, text):
    (problem,) = problems_of(values)
    assert text in problem


def test_assignments_that_cannot_be_made():
    assert "cannot be set: `steps` is no mapping" in problems_of({"steps": 3}, assignments=["steps.x=3"])[0]
    assert "not YAML" in problems_of(assignments=["steps=[1"])[0]
    assert "not YAML. Put quotes around it" in problems_of(assignments=["revision=2024-99-99"])[0]
    assert "Expected `key=value`" in problems_of(assignments=["=3"])[0]


def test_a_method_may_be_named_alone_or_left_empty_and_assigned_after(tmp_path):
    for written in ("method: ivon", "method:", ""):
        (tmp_path / "r.yaml").write_text(f"task: boolq\nmodel: m\n{written}\n")
        (settings,) = load_settings(tmp_path / "r.yaml", {}, ["method.ess=5"])
        assert (settings.method, settings.method_settings) == ("ivon", {"ess": 5.0})
        (settings,) = load_settings(tmp_path / "r.yaml", {}, ["method=adamw"])
        assert settings.method == "adamw"


def test_a_task_file_in_the_place_of_a_recipe(tmp_path):
    (tmp_path / "mine.yaml").write_text("{name: t, prompt: '{x}', label: y, answers: [a, b], files: {dev: d.csv}}")
    with pytest.raises(ConfigError, match=r"mine\.yaml is a task file\. Pass it by `--task "):
        read_recipe(tmp_path / "mine.yaml")


def test_a_recipe_that_is_absent_or_wrong(tmp_path):
    (tmp_path / "ivon.yaml").write_text("- a list")
    with pytest.raises(ConfigError, match=r"Did you mean `ivon.yaml`\?"):
        read_recipe(tmp_path / "ivn.yaml")
    with pytest.raises(ConfigError, match=r"Expected a mapping of settings in .*ivon.yaml, but got list"):
        read_recipe(tmp_path / "ivon.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path)
    (tmp_path / "ivon.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        read_recipe(tmp_path / "ivon.yaml")
    (tmp_path / "ivon.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        read_recipe(tmp_path / "ivon.yaml")
    with pytest.raises(ConfigError, match="There is no recipe"):
        read_recipe(tmp_path / "nowhere" / "ivon.yaml")


ALIASES = "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(8))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (ALIASES, "without aliases"),
        ("[" * 2000 + "]" * 2000, "of at most 20 levels"),
        ('{"a": ' * 2000 + "1" + "}" * 2000, "of at most 20 levels"),
        ("#" * 300_000, "at most 262,144 bytes"),
        ("seed: 2020-99-99", "cannot be read as YAML"),
    ],
    ids=["aliases", "lists", "mappings", "large", "date"],
)
def test_a_strangers_recipe_or_plan_is_refused_in_few_words(tmp_path, text, why):
    (tmp_path / "r.yaml").write_text(text)
    for read in (load_settings, lambda path: plan_from(path, tmp_path, {})):
        with pytest.raises(ConfigError, match=why) as raised:
            read(tmp_path / "r.yaml")
        assert len(str(raised.value)) < 500


def test_yaml_runs_no_code(tmp_path):
    (tmp_path / "r.yaml").write_text("task: !!python/object/apply:os.getcwd []\nmodel: m\n")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_settings(tmp_path / "r.yaml")
    assert "not YAML" in problems_of(assignments=["task=!!python/object/apply:os.getcwd []"])[0]


def test_settings_are_frozen_and_plain():
    run = settings_from(BASE)
    with pytest.raises(AttributeError):
        run.steps = 3
    assert yaml.safe_load(yaml.safe_dump(json.loads(json.dumps(run.to_dict()))))["task"] == "boolq"
    assert Settings(task="boolq", model="m") == run
