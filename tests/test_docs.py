"""Public names exist and are documented, and every example in a docstring is run."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

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
NO_EXAMPLE = {
    "LoRA": "settings: `load_model` shows them",
    "METHODS": "a dictionary",
    "TASKS": "a dictionary",
    "build_report": "needs evaluated runs: tests/test_cli.py and tests/test_report.py",
    "evaluate": "needs a trained run: tests/test_main_job.py",
    "from_pretrained": "needs a pushed run: tests/test_hub.py",
    "load": "needs a trained run: tests/test_main_job.py",
    "load_posterior": "needs what `save_adapter` wrote: tests/test_plain_trainer.py",
    "load_rows": "needs data: `make_examples` shows the rows",
    "push_to_hub": "needs a trained run: tests/test_hub.py",
    "save_adapter": "needs a base with an adapter: tests/test_plain_trainer.py",
    "train": "needs a model and data: tests/test_main_job.py",
    "Posterior": "a protocol: its implementations show it",
}
"""Public names without an example in their docstring, and why."""


@pytest.mark.parametrize("name", varlora.__all__)
def test_public_names_are_documented(name):
    thing = getattr(varlora, name)
    if not isinstance(thing, dict):
        documented = inspect.cleandoc(thing.__doc__ or "")
        assert documented, f"{name} has no docstring"
        assert not documented.startswith(f"{name}("), f"{name} has the docstring that dataclass writes"
        example = ">>>" in documented or name in NO_EXAMPLE
        assert example, f"{name} needs an Example, or a reason in NO_EXAMPLE"


def test_public_names_are_those_of_the_package():
    assert sorted(set(varlora.__all__)) == sorted(varlora.__all__)
    lazy = {name for names in varlora._HOMES.values() for name in names}
    assert lazy <= set(varlora.__all__)
    assert set(NO_EXAMPLE) <= set(varlora.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        varlora.nothing  # noqa: B018


@pytest.mark.parametrize("name", MODULES)
def test_every_example_is_run(name):
    """An example where doctest does not look, such as below a field, would never run."""
    module = importlib.import_module(name)
    written = len(re.findall(r"^\s*>>> ", Path(module.__file__).read_text(encoding="utf-8"), re.MULTILINE))
    found = {}
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, globs={}):
        found[test.filename, test.lineno] = len(test.examples)
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
