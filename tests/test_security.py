"""Nothing in the package unpickles, evaluates text or runs a shell or a model's own code: this reads the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src"

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "torch.load", "torch.hub.load", "numpy.load", "np.load", "os.system", "os.popen", "subprocess.getoutput",
    "subprocess.getstatusoutput", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle",
}  # fmt: skip
SAFE_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader", "SafeLoader", "CSafeLoader"}
MUST_BE = {"trust_remote_code": False, "shell": False, "allow_pickle": False, "weights_only": True}
"""Keyword arguments and dictionary keys that have one safe value."""


def problems(source: str) -> Iterator[str]:
    """Yield what a source does that it must not do."""
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            members = [f"{module}.{alias.name}" for module in modules for alias in node.names]
            yield from (f"line {line}: import of {name}" for name in modules if name.split(".")[0] in MODULES)
            yield from (f"line {line}: import of {name}" for name in members if name in CALLS)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in BUILTINS or name in CALLS:
                yield f"line {line}: {name}()"
            if name == "yaml.load":
                loaders = [*node.args[1:], *(k.value for k in node.keywords if k.arg == "Loader")]
                if [ast.unparse(loader) for loader in loaders if ast.unparse(loader) in SAFE_LOADERS] == []:
                    yield f"line {line}: yaml.load() without a safe loader"
            yield from (f"line {k.value.lineno}: {k.arg}" for k in node.keywords if is_unsafe(k.arg, k.value))
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values):
                if isinstance(key, ast.Constant) and is_unsafe(key.value, value):
                    yield f"line {line}: {key.value}"


def is_unsafe(name: object, value: ast.expr) -> bool:
    return name in MUST_BE and not (isinstance(value, ast.Constant) and value.value is MUST_BE[str(name)])


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda path: path.relative_to(SRC).as_posix())
def test_source_is_safe(path):
    assert list(problems(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "eval('1')",
        "exec('1')",
        "import os\nos.system('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=flag)",
        "options = {'trust_remote_code': None}",
        "np.load('x', allow_pickle=True)",
    ],
)
def test_what_is_unsafe_is_found(source):
    assert list(problems(source)) != []


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "yaml.safe_load(text)",
        "options = {'trust_remote_code': False}",
        "subprocess.run(['git'])",
        "re.compile('x')",
    ],
)
def test_what_is_safe_is_not(source):
    assert list(problems(source)) == []


def test_models_are_loaded_from_safetensors_only():
    text = (SRC / "varlora" / "model.py").read_text(encoding="utf-8")
    assert "use_safetensors=True" in text
    assert '"trust_remote_code": False' in text
