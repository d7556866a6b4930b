"""Public names exist and are documented, and every example in a docstring is run."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

import varlora
from varlora.config import Settings
from varlora.model import LoRA
from varlora.plan import Plan

MODULES = [
    "varlora",
    *(
        found.name
        for found in pkgutil.walk_packages(varlora.__path__, "varlora.")
        if found.name != "varlora.optim._native"  # IVON's kernels, in C
    ),
]


@pytest.mark.parametrize("name", varlora.__all__)
def test_public_names_are_documented(name):
    thing = getattr(varlora, name)
    if not isinstance(thing, dict):
        documented = inspect.cleandoc(thing.__doc__ or "")
        assert documented, f"{name} has no docstring"
        assert not documented.startswith(f"{name}("), f"{name} has the docstring that dataclass writes"
        assert ">>>" in documented, f"{name} needs an Example"


def test_public_names_are_those_of_the_package():
    assert sorted(set(varlora.__all__)) == sorted(varlora.__all__)
    lazy = {name for names in varlora._HOMES.values() for name in names}
    assert lazy <= set(varlora.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        varlora.nothing  # noqa: B018


@pytest.mark.parametrize("name", MODULES)
def test_every_example_is_run(name):
    """An example where doctest does not look, such as below a field, would never run."""
    module = importlib.import_module(name)
    written = len(re.findall(r"^\s*>>> ", Path(module.__file__).read_text(encoding="utf-8"), re.MULTILINE))
    found = {}
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, globs={}):
        place = test.filename, test.lineno  # of decorated functions that of the decorator, in the same file's name
        found[place] = max(found.get(place, 0), len(test.examples))
    assert sum(found.values()) == written
    assert module.__doc__


def test_examples_are_collected(pytestconfig):
    assert "--doctest-modules" in pytestconfig.getini("addopts")
    assert "src" in pytestconfig.getini("testpaths")


def test_the_page_of_settings_has_them_all_with_their_defaults() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w.]+)` \| ([^|]*?) ?\|", page, re.MULTILINE))
    fields = {field.name: field for field in dataclasses.fields(Plan) if field.name not in {"out", "common"}}
    fields |= {f"lora.{field.name}": field for field in dataclasses.fields(LoRA)}
    fields |= {field.name: field for field in dataclasses.fields(Settings)}
    assert {name for name in fields if name not in rows} == set()
    assert {name for name in rows if name not in fields} == set()
    for name, field in fields.items():
        if isinstance(field.default, str | int | float) and not isinstance(field.default, bool):
            assert field.default == type(field.default)(rows[name]), name


# --- the pages ---

DOCS = Path(__file__).resolve().parents[1] / "docs"
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = [
    pytest.param(text, id=f"{page}-{number}")
    for page in ("distributed", "inference", "lm_eval")
    for number, text in enumerate(PYTHON.findall((DOCS / f"{page}.md").read_text(encoding="utf-8")))
]


def found(name: str) -> Any:
    """Return what a dotted name of the package leads to; raise if it leads nowhere."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        path, _, leaf = name.rpartition(".")
        return getattr(found(path), leaf) if path else pytest.fail(f"{name} is no module")


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_that_is_not_run_compiles_and_calls_what_there_is(block: str) -> None:
    """Of the package: of others' names only that they compile."""
    tree = ast.parse(block)
    names = {name: getattr(varlora, name) for name in varlora.__all__}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("varlora"):
            names |= {alias.asname or alias.name: found(f"{node.module}.{alias.name}") for alias in node.names}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in names:
            given = {str(keyword.arg): None for keyword in call.keywords}
            inspect.signature(names[call.func.id]).bind(*call.args, **given)  # raises for an unknown or missing one


def test_the_blocks_call_the_package() -> None:
    """Else the test above would check nothing."""
    called = [name for name in ("IVON(", "predict(", "VarloraLM(", "calibration_of(") if name in str(BLOCKS)]
    assert len(called) == 4


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda path: path.stem)
def test_the_packages_names_on_a_page_lead_somewhere(page: Path) -> None:
    for name in re.findall(r"`(varlora(?:\.\w+)+)`", page.read_text(encoding="utf-8")):
        if name != "varlora.json":  # a file
            found(name)
