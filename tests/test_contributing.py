"""What CONTRIBUTING.md says of a new method: its example runs and has its place, and every method has its page."""

from __future__ import annotations

import dataclasses
import doctest
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import helpers
import pytest
import torch
from transformers import TrainerCallback

import varlora.methods
from varlora.config import settings_from
from varlora.demo.run import one_thread
from varlora.errors import ConfigError
from varlora.methods import METHODS
from varlora.methods.base import AdamWTraining, Method
from varlora.posterior import Point

ROOT = Path(__file__).resolve().parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
NAME = "last_weights_ema"
PAGES = {"laplace_diag": "laplace", "laplace_kfac": "laplace"}
"""Methods whose page has another name."""


def blocks(language: str) -> list[str]:
    found = re.findall(r"^(```+)(\w*)\n(.*?)^\1$", CONTRIBUTING, re.DOTALL | re.MULTILINE)
    return [text for _, name, text in found if name == language]


def page(name: str) -> Path:
    return ROOT / "docs" / "methods" / f"{PAGES.get(name, name)}.md"


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


# --- the example ---


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class of the example, as if it were in its file, and in METHODS."""
    (source,) = blocks("python")
    module = ModuleType(f"varlora.methods.{NAME}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, "CONTRIBUTING.md", "exec"), vars(module))
    (public,) = vars(module)["__all__"]
    made = vars(module)[public]
    assert made.name == NAME
    monkeypatch.setitem(METHODS, NAME, made)
    return made


class Record(TrainerCallback):
    """Keeps the adapter after each step."""

    def __init__(self) -> None:
        self.iterates: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.iterates.append(helpers.bits(kwargs["model"]))


def test_the_example_keeps_the_average_of_the_iterates(example: Any, tmp_path: Path) -> None:
    record, model = Record(), helpers.tiny_model()
    posterior = helpers.run_fit(model, example(lr=2e-2, decay=0.5), tmp_path, callbacks=[record])
    assert type(posterior) is Point
    weights = torch.tensor([2**-5, 2**-5, 2**-4, 2**-3, 2**-2, 2**-1], dtype=torch.float64)  # add up to one
    assert len(record.iterates) == len(weights)
    for name, mean in posterior.mean.items():
        path = torch.stack([iterate[name].double() for iterate in record.iterates])
        torch.testing.assert_close(mean.double(), torch.tensordot(weights, path, 1), rtol=1e-5, atol=1e-7)
        assert not torch.equal(mean, record.iterates[-1][name])
    assert helpers.same(helpers.bits(model), posterior.mean)


def test_the_example_goes_on_from_a_checkpoint(example: Any, tmp_path: Path) -> None:
    method = example(lr=2e-2, decay=0.5)
    helpers.run_fit(helpers.tiny_model(), method, tmp_path / "whole")
    helpers.run_fit(helpers.tiny_model(), method, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "adapter")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-6")  # so that the one of step 4 is the last
    helpers.run_fit(helpers.tiny_model(), method, tmp_path / "cut", resume=True)
    assert helpers.outcome(tmp_path / "cut") == helpers.outcome(tmp_path / "whole")


def test_the_examples_example_is_right(example: Any) -> None:
    names = vars(sys.modules[example.__module__])
    (test,) = doctest.DocTestFinder(recurse=False).find(example, globs=names)
    assert doctest.DocTestRunner().run(test).failed == 0 < len(test.examples)


def test_the_examples_setting_is_checked(example: Any) -> None:
    given = {"task": "boolq", "model": "m"}
    assert settings_from({**given, "method": {"name": NAME, "decay": "0.9"}}).build_method() == example(decay=0.9)
    with pytest.raises(ConfigError, match=r"Expected `decay` to be within \[0, 1\), but got 1.0"):
        settings_from({**given, "method": {"name": NAME, "decay": 1}})


def test_the_examples_row_learns_by_heart(example: Any, tmp_path: Path) -> None:
    row = blocks("diff")[1]
    (call,) = re.findall(r"^\+\s*Row\((.*)\),$", row, re.MULTILINE)
    name, method = eval(f"({call})", {example.__name__: example})
    assert name == NAME
    helpers.run_fit(helpers.tiny_model(), method, tmp_path, steps=60, checkpoint_every=60)
    losses = [line["loss"] for line in helpers.logged(tmp_path)]
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(
    ("number", "path"), enumerate(("src/varlora/methods/__init__.py", "tests/conformance/test_methods.py"))
)
def test_the_examples_lines_have_their_place(number: int, path: str) -> None:
    """The lines around them are in that file, next to each other."""
    (lines,) = [block.splitlines() for block in blocks("diff")[number : number + 1]]
    for part in "\n".join(line[1:] for line in lines if line[0] == " ").split("...\n"):
        assert part.rstrip("\n") in (ROOT / path).read_text(encoding="utf-8")


# --- what every method has ---


def protocol(made: Any = Method) -> list[str]:
    """Return the names of the protocol that a class writes, in its order."""
    calls = {name for name, value in vars(Method).items() if callable(value) and not name.startswith("_")}
    return [name for name in vars(made) if name in calls]


def test_the_pages_list_the_protocol_in_its_order() -> None:
    rows = re.findall(r"^   \| (`.*?) \|", CONTRIBUTING, re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"`(\w+)(?:\(.*?\))?`", row)]
    assert [name for name in listed if name in protocol()] == protocol()
    architecture = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^class Method\(Protocol\):\n(.*?)^```", architecture, re.DOTALL | re.MULTILINE)
    assert re.findall(r"^    def (\w+)", block, re.MULTILINE) == protocol()
    assert set(re.findall(r"^    (\w+): ", block, re.MULTILINE)) == set(Method.__annotations__) <= set(listed)


@pytest.mark.parametrize("name", METHODS)
def test_every_class_has_an_example_and_says_where_it_is_from(name: str) -> None:
    assert ">>>" in METHODS[name].__doc__
    assert "References:" in METHODS[name].__doc__


@pytest.mark.parametrize("name", METHODS)
def test_every_class_keeps_the_protocols_order(name: str) -> None:
    for made in METHODS[name].__mro__:
        written = protocol(made)
        assert written == [other for other in protocol() if other in written], made.__name__


def test_every_file_has_its_entry() -> None:
    files = {path.stem for path in Path(str(varlora.methods.__file__)).parent.glob("*.py")} - {"__init__", "base"}
    entered = {str(method.__module__).rpartition(".")[2] for method in METHODS.values()}
    assert files == entered, "add an entry to METHODS for each file of methods/"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_page(name: str) -> None:
    """Which names every setting, but for AdamW's own where it says so."""
    assert page(name).is_file(), f"`{name}` has no page: write {page(name).relative_to(ROOT)}"
    text, made = page(name).read_text(encoding="utf-8"), METHODS[name]
    shared = {field.name for field in dataclasses.fields(AdamWTraining)} if "[AdamW](adamw.md)" in text else set()
    settings = {field.name for field in dataclasses.fields(made)} - shared  # type: ignore[arg-type]
    missing = {name for name in settings if f"`{name}`" not in text}
    assert not missing, f"{page(name).name} does not say what these settings do: {sorted(missing)}"


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "methods").glob("*.md")), ids=lambda path: path.stem)
def test_every_page_is_of_a_method_and_linked(path: Path) -> None:
    assert path in {page(name) for name in METHODS}, f"{path.name} is of no method"
    linked = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert f"docs/methods/{path.name}" in linked, f"README.md has no link to docs/methods/{path.name}"


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "methods").glob("*.md")), ids=lambda path: path.stem)
def test_links_between_pages_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).is_file(), f"{path.name} links to {target}, which is absent"
