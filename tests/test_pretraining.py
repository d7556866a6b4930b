"""The bundled base: its world keeps its secrets, its script reproduces and resumes, and its files are the script's.

The scores of the committed weights are recomputed here; that a whole pretraining reaches them again is checked by
`make pretrain`.
"""

from __future__ import annotations

import doctest
import importlib
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from varlora.demo import TASKS, load
from varlora.demo.base import BUNDLED
from varlora.prompt import encode
from varlora.tasks import get_task, load_rows

FOLDER = Path(__file__).resolve().parents[1] / "pretraining"


@pytest.fixture(scope="module")
def scripts():
    """The modules `world` and `pretrain`, as the script sees itself when it is run."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("world"), importlib.import_module("pretrain")
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("world", "pretrain"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def world(scripts):
    return scripts[0].make_world(written()["settings"]["seed"])


def written() -> dict:
    return json.loads((BUNDLED / "base" / "pretraining.json").read_text())


# --- the world


def test_the_examples_of_the_world_are_run(scripts):
    assert doctest.testmod(scripts[0]) == (0, 3)


def test_a_world_is_a_function_of_its_seed(scripts):
    make_world = scripts[0].make_world
    assert make_world(3) == make_world(3) != make_world(4)


def test_no_text_tells_what_is_never_told(scripts, world):
    facts = {(fact.property, fact.person): fact for fact in (*world.practised, *world.asked)}
    source, seen, shown = random.Random(0), set(), set()
    for _ in range(30_000):
        for stage in range(len(scripts[0].STAGES)):
            document = scripts[0].random_document(world, source, stage)
            for key in re.findall(r"(\w+) of (\w+)", document.text):
                assert facts[key].told, document
                seen.add(facts[key])
                if document.text.endswith(("Letter:", "Verdict:")):
                    shown.add(facts[key])
    assert seen == set(world.told)
    assert shown == set(world.practised_and_told)
    assert not {fact.person for fact in shown} & {fact.person for fact in world.asked}


def test_documents_are_true(scripts, world):
    facts = {(fact.property, fact.person): fact.value for fact in world.told}
    source, endings = random.Random(0), set()
    for _ in range(5000):
        document = scripts[0].random_document(world, source)
        text, answer = document.text, document.answer
        choices = dict(re.findall(r"([A-D1-4])\. (\w+)", text))
        value = next((facts[key] for key in re.findall(r"(\w+) of (\w+)", text)), None)
        ending = text.rpartition(" ")[2]
        endings.add(ending)
        if text.startswith("Which is"):
            value = text.split()[2].strip("?")
        if text.startswith("What is") and value is None:
            assert answer == choices[text.split()[2].strip("?")]
        elif ending in ("Letter:", "Number:"):
            assert choices[answer] == value
            assert " ".join(choices) == " ".join("ABCD" if ending == "Letter:" else "1234")[: 2 * len(choices) - 1]
        elif ending in ("Answer:", "is"):
            assert answer == value
        else:
            claim = re.search(r"(\w+)\? \w+:$", text)[1]
            assert (answer in ("True", "right")) == (claim == value)
            assert answer in {"Verdict:": ("True", "False"), "Check:": ("right", "wrong")}[ending]
    assert endings == {"is", "Answer:", "Letter:", "Number:", "Verdict:", "Check:"}


def test_the_committed_tasks_are_those_of_the_script(scripts, world, tmp_path):
    scripts[1].write_tasks(tmp_path, world)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_text() for path in (BUNDLED / "tasks").iterdir()}
    assert {name.partition(".")[0] for name in made} == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_tasks_ask_about_facts_of_their_own_and_say_which_are_known(world, name):
    told = {f"{fact.person}-{fact.property}": fact.told for fact in world.asked}
    task = get_task(BUNDLED / "tasks" / f"{name}.yaml")
    facts = {}
    for split in ("train", "dev"):
        rows = load_rows(task, split).examples
        assert len({row.id for row in rows}) == len(rows) == 600
        assert Counter(row.slice for row in rows) == {"told": 420, "never told": 180}
        assert len({row.prompt for row in rows}) == 600
        facts[split] = {row.id.rpartition("-")[0] for row in rows}
        for row in rows:
            assert row.slice == ("told" if told[row.id.rpartition("-")[0]] else "never told")
        share = sum(row.label == 0 for row in rows) / len(rows)
        assert share == pytest.approx(1 / len(rows[0].answers), abs=0.06)
    assert not facts["train"] & facts["dev"]
    assert facts["train"] | facts["dev"] == told.keys()


# --- the base


def test_the_base_fits_its_tasks():
    demo = load(lora=None)
    for task in demo.tasks.values():
        for example in load_rows(task, "dev").examples[:50]:
            row = encode(demo.tokenizer, example)
            assert len(row.input_ids) < demo.model.config.max_position_embeddings // 2
            assert demo.tokenizer.decode(row.input_ids, skip_special_tokens=True) == example.prompt
            answers = demo.tokenizer.convert_ids_to_tokens(list(row.label_tokens))
            assert answers == [f"Ġ{answer}" for answer in example.answers]


def test_the_base_is_small():
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) < 8e6


def test_the_committed_scores_are_those_of_the_committed_weights(scripts, world):
    demo = load(lora=None)
    assert demo.model.num_parameters() == written()["parameters"]
    found = scripts[1].scores(demo.model, demo.tokenizer, world, BUNDLED / "tasks")
    assert found == pytest.approx(written()["scores"], abs=0.01)  # rounding may turn a few of 600 answers


def test_the_base_knows_what_it_was_told_and_is_zero_shot_near_chance():
    scores = written()["scores"]
    assert scores["which"] > 0.95
    assert scores["letter_practised"] > 0.9
    assert scores["letter_told"] > 0.8
    assert scores["number_told"] > 0.9
    assert scores["letter_never_told"] == pytest.approx(0.25, abs=0.08)
    assert scores["zero_shot_four_choices"] == pytest.approx(0.25, abs=0.1)
    assert scores["zero_shot_two_choices"] == pytest.approx(0.5, abs=0.1)
    assert scores["zero_shot_true_or_false"] == pytest.approx(0.5, abs=0.1)


# --- the script


@pytest.fixture
def small(scripts, tmp_path, monkeypatch):
    """Pretrain for four steps of four rows; returns the weights and the numbers of the steps that were made."""
    pretrain, steps = scripts[1], []
    for name, value in (("PROBES", 20), ("ROWS", 4), ("SAVE_EVERY", 2)):
        monkeypatch.setattr(pretrain, name, value)
    original = pretrain.Pretrainer.training_step

    def run(name: str, *options: str, stop: int = 9):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == stop:
                raise KeyboardInterrupt
            steps.append(self.state.global_step)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(pretrain.Pretrainer, "training_step", training_step)
        out = tmp_path / name
        steps.clear()
        arguments = ["--out", str(out), "--work", str(tmp_path / f"{name}-work"), "--steps", "4", *options]
        assert pretrain.main(arguments) == 0
        assert not (tmp_path / f"{name}-work").exists()
        return load_file(out / "base" / "model.safetensors"), list(steps)

    return run


def test_pretraining_reproduces_and_resumes(small, tmp_path):
    whole, steps = small("whole")
    assert steps == [0, 1, 2, 3]
    with pytest.raises(KeyboardInterrupt):
        small("resumed", stop=3)
    assert not (tmp_path / "resumed").exists()  # base and tasks are put in place together
    resumed, steps = small("resumed")
    assert steps == [2, 3]
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    other, _ = small("other", "--seed", "1")
    assert not torch.equal(whole["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_pretraining_goes_on_with_nothing_else(small, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        small("mine", stop=3)
    with pytest.raises(SystemExit, match=r"holds checkpoints of .*'seed': 0.*, not of .*'seed': 1"):
        small("mine", "--seed", "1")
    (tmp_path / "thesis-work").mkdir()
    (tmp_path / "thesis-work" / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match="holds no checkpoints of this script"):
        small("thesis")
    assert (tmp_path / "thesis-work" / "thesis.txt").read_text() == "mine"


def test_scores_that_differ_are_named(scripts, capsys):
    compare, tolerance = scripts[1].compare, scripts[1].TOLERANCE
    expected = {"a": 0.5, "b": 0.5, "letter_never_told": 0.5}
    assert compare({"a": 0.5, "b": 0.5 + 0.9 * tolerance, "letter_never_told": 0.5 - 1.5 * tolerance}, expected) == 0
    assert compare({"a": 0.5 - 1.1 * tolerance, "b": float("nan")}, expected) == 3
    found = capsys.readouterr().err
    assert "a: expected 0.500" in found
    assert "letter_never_told: expected 0.500 within 0.16, but got nothing" in found
