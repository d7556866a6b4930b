"""Imports go downward only: this reads every import in src/varlora."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "varlora"

LAYERS = {
    0: {
        "errors",
        "optim",
        "params",
        "blocks",
        "prefix",
        "drawing",
        "stack",
        "gradients",
        "posterior",
        "curvature",
        "metrics",
        "bootstrap",
        "temperature",
        "scale",
        "draws",
        "client",
    },
    1: {"plain_yaml", "tasks", "prompt", "data", "adapter", "model"},
    2: {"methods"},
    3: {"files", "run", "predictions", "checkpoint", "trainer", "fit", "overhead", "predict", "calibration"},
    4: {
        "config",
        "sources",
        "loading",
        "training",
        "evaluation",
        "progress",
        "quiet",
        "evaluated",
        "results",
        "table",
        "tables",
        "paper",
        "templating",
        "typeset",
        "diagram",
        "curves",
        "disagreement",
        "diagnosis",
        "charts",
        "page",
        "report",
        "grid",
        "plan",
        "reproduce",
        "export",
        "card",
        "hub",
        "demo",
        "serve",
        "integrations",
        "arguments",
        "cli",
    },
}
"""Every file or folder of the package, by its name, and its layer."""

WITHIN = {
    "params": {"errors"},
    "gradients": {"errors", "params"},
    "drawing": {"errors"},
    "prefix": {"blocks"},
    "stack": {"errors", "params", "blocks", "prefix", "drawing"},
    "posterior": {"errors", "params", "gradients", "drawing", "stack"},
    "curvature": {"errors", "params", "drawing", "posterior"},
    "bootstrap": {"metrics"},
    "temperature": {"metrics"},
    "draws": {"drawing", "posterior"},
    "metrics": {"errors"},
    "tasks": {"plain_yaml"},
    "prompt": {"tasks"},
    "data": {"tasks", "prompt"},
    "model": {"adapter"},
    "run": {"files"},
    "checkpoint": {"files"},
    "predictions": {"files"},
    "calibration": {"files", "run"},
    "predict": {"predictions"},
    "trainer": {"checkpoint", "files"},
    "fit": {"checkpoint", "files", "predict", "trainer"},
    "overhead": {"trainer"},
    "sources": {"config"},
    "loading": {"config"},
    "training": {"config", "sources", "loading", "curves", "diagnosis"},
    "evaluation": {"config", "loading"},
    "results": {"evaluated"},
    "tables": {"evaluated", "results", "table"},
    "paper": {"table", "tables"},
    "typeset": {"table", "templating"},
    "curves": {"evaluated", "results"},
    "disagreement": {"evaluated", "results", "curves"},
    "charts": {"results", "curves", "diagram"},
    "page": {"evaluated", "results", "table", "templating", "typeset", "curves", "diagnosis", "disagreement", "charts"},
    "report": {
        *("evaluated", "results", "table", "tables", "paper", "curves", "diagnosis"),
        *("templating", "typeset", "diagram", "page"),
    },
    "grid": {"config", "training", "evaluation", "quiet"},
    "plan": {"config", "sources", "loading", "training"},
    "reproduce": {"config", "plan", "training", "grid", "evaluated", "table", "tables", "paper", "typeset", "report"},
    "export": {"config", "templating", "loading"},
    "card": {"config", "diagram", "evaluated", "results", "templating"},
    "hub": {"card", "config", "loading"},
    "serve": {"templating", "loading", "evaluation"},
    "demo": {"config", "training", "evaluation", "progress", "results", "report"},
    "integrations": {"loading"},
    "cli": {
        "arguments",
        "config",
        "diagram",
        "sources",
        "loading",
        "training",
        "evaluation",
        "progress",
        "quiet",
        "results",
        "tables",
        "paper",
        "typeset",
        "report",
        "grid",
        "plan",
        "reproduce",
        "export",
        "hub",
        "demo",
        "serve",
    },
}
"""What a file imports from its own layer: the base modules of its kind, and nothing else."""

TORCH_ONLY = {"torch", *sys.stdlib_module_names}
LEVEL = {name: level for level, names in LAYERS.items() for name in names}


def imports(tree: ast.AST, function: str = "", typing_only: bool = False) -> Iterator[tuple[str, str, bool]]:
    """Yield (module, enclosing function, under TYPE_CHECKING) of each import, `from varlora import x` as varlora.x.

    A relative import begins with its dots.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, function, typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "." * node.level + (node.module or ""), function, typing_only
            elif node.module == "varlora":
                yield from ((f"varlora.{alias.name}", function, typing_only) for alias in node.names)
            else:
                yield node.module or "", function, typing_only
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports(node, function, True)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(node, node.name, typing_only)
        else:
            yield from imports(node, function, typing_only)


def problems(name: str, source: str) -> list[str]:
    """Return what is wrong with the imports of the file that `name` means: tasks.arc is varlora/tasks/arc.py."""
    found = []
    top, _, leaf = name.partition(".")
    for module, function, typing_only in imports(ast.parse(source)):
        package, _, target = module.partition(".")
        other, _, other_leaf = target.partition(".")
        where = f"{name} imports {module}"
        if module.startswith("."):
            if top != "optim" or module.startswith(".."):
                found.append(f"{where}, which is relative")
        elif package != "varlora":
            triton = name == "optim.gpu" and package == "triton"  # which torch brings where it is needed
            if LEVEL[top] == 0 and package not in TORCH_ONLY and not triton:
                found.append(f"{where}, but layer 0 needs torch alone")
        elif other == "__version__":
            continue
        elif top == "optim":
            if not typing_only and (name, function) != ("optim.ivon", "posterior"):
                found.append(f"{where}, but the folder has to work when copied alone into another project")
        elif other not in LEVEL:
            found.append(f"{where}, which is in no layer")
        elif other == top:  # within tasks/, methods/
            registry = leaf == "base" and not other_leaf and function  # what is in it, looked up when it is needed
            if leaf and not (other_leaf == "base" or registry):
                found.append(f"{where}, but within a folder only its base module is imported")
        elif LEVEL[other] > LEVEL[top]:
            found.append(f"{where}, which is in a higher layer")
        elif LEVEL[other] == LEVEL[top] and other not in WITHIN.get(top, set()) and not typing_only:
            found.append(f"{where}, which is in the same layer and no base of it")
    return found


def names() -> list[str]:
    """Return the dotted name below varlora of every file; a folder's __init__ has the folder's name."""
    paths = sorted(path.relative_to(SRC).with_suffix("") for path in SRC.rglob("*.py"))
    return [".".join(part for part in path.parts if part != "__init__") for path in paths]


def source_of(name: str) -> str:
    path = SRC.joinpath(*name.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in names() if name])
def test_imports_go_downward(name):
    assert name.partition(".")[0] in LEVEL, f"{name} is in no layer: add it to LAYERS"
    assert problems(name, source_of(name)) == []


def test_the_package_itself_imports_the_torch_only_layer():
    eager = {module for module, _, typing_only in imports(ast.parse(source_of(""))) if not typing_only}
    ours = {module.split(".")[1] for module in eager if module.startswith("varlora.")}
    assert ours <= LAYERS[0]
    assert {module.split(".")[0] for module in eager} <= {"varlora", *sys.stdlib_module_names}


@pytest.mark.parametrize(
    ("name", "source", "why"),
    [
        ("metrics", "import transformers", "torch alone"),
        ("metrics", "from varlora.model import LoRA", "higher layer"),
        ("metrics", "from varlora.posterior import Point", "same layer"),
        ("params", "def f():\n    from varlora import fit", "higher layer"),
        ("tasks.arc", "from varlora.tasks.boolq import BOOLQ", "base module"),
        ("tasks.arc", "from varlora.methods import METHODS", "higher layer"),
        ("methods.ivon", "from varlora.methods.adamw import AdamW", "base module"),
        ("methods.base", "from varlora.methods import METHODS", "base module"),
        ("methods.ivon", "import varlora.predict", "higher layer"),
        ("report", "from varlora.loading import load", "same layer"),
        ("fit", "from varlora.future import x", "no layer"),
        ("optim.ivon", "from varlora.errors import VarloraError", "copied alone"),
        ("optim.ivon", "from varlora.optim.noise import mix", "copied alone"),
        ("optim.bucket", "def posterior():\n    from varlora.posterior import Point", "copied alone"),
        ("optim.ivon", "from ..errors import VarloraError", "relative"),
        ("metrics", "from .errors import VarloraError", "relative"),
        ("optim.ivon", "import numpy", "torch alone"),
        ("optim.ivon", "import triton", "torch alone"),
    ],
)
def test_a_wrong_import_is_found(name, source, why):
    (problem,) = problems(name, source)
    assert why in problem


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("methods.base", "def f():\n    from varlora.methods import METHODS"),
        ("methods", "from varlora.methods.ivon import Ivon"),
        ("optim.ivon", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from varlora.posterior import Point"),
        ("optim.ivon", "class A:\n    def posterior(self):\n        from varlora.posterior import Point"),
        ("optim.ivon", "from .noise import mix"),
        ("cli", "from varlora import __version__"),
    ],
)
def test_a_right_import_is_not(name, source):
    assert problems(name, source) == []
