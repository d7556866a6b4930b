"""What needs two devices, where the machine has one: run in a process that is given a second, `other_device.cpp`.

As a script this is that process. It takes the names of a module, a function of it, and one of its `ROWS`, in a line of
JSON, and answers with what went wrong, or null.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

DEVICE = "mtia"
SOURCE = Path(__file__).with_suffix(".cpp")
TESTS = SOURCE.parents[1]


def compiler() -> str | None:
    """Return the C++ compiler, if there is one."""
    return shutil.which(os.environ.get("CXX", "g++"))


def _torch() -> Path:
    """Return the folder of torch, which is not imported: it looks for its devices when it is."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def build(folder: Path) -> Path:
    """Compile the device, which takes some ten seconds, and return the library."""
    torch, library = _torch(), folder / "other_device.so"
    include, lib = torch / "include", torch / "lib"
    command = [str(compiler()), "-std=c++20", "-O0", "-w", "-fPIC", "-shared", str(SOURCE), "-o", str(library)]
    command += [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"]
    command += [f"-L{lib}", f"-Wl,-rpath,{lib}", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True)
    return library


def plug_in(library: Path) -> None:
    """Give torch the device."""
    assert "torch" not in sys.modules
    ctypes.CDLL(str(_torch() / "lib" / "libtorch_global_deps.so"), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))
    import torch

    torch.mtia._lazy_init = lambda: None  # as it would for want of the company's own library, it refuses
    torch.mtia.device_count = lambda: 1
    assert torch.zeros(2, device=DEVICE).device == torch.device(DEVICE, 0)


class Elsewhere:
    """A process in which there are two devices."""

    def __init__(self, library: Path) -> None:
        command = [sys.executable, "-m", "everywhere.other_device", str(library)]
        settings = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=TESTS.parent, env=settings
        )

    def __call__(self, module: str, function: str, row: str) -> None:
        """Run a function of a module on one of its rows, and fail as it does.

        Args:
            module: has `ROWS`.
            function: takes the row, a folder of its own, and the name of the other device.
            row: the row's name.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([module, function, row]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"The process with two devices ended with status {self.process.wait()}."
        assert json.loads(answer) is None, json.loads(answer)


@contextmanager
def elsewhere(folder: Path) -> Iterator[Elsewhere]:
    """Have a process with two devices, for as long as the context lasts."""
    made = Elsewhere(build(folder))
    try:
        yield made
    finally:
        assert made.process.stdin is not None
        made.process.stdin.close()
        made.process.wait()


def _answer(module: str, function: str, name: str) -> str | None:
    import traceback

    import pytest
    from helpers import trainers_afresh

    of = importlib.import_module(module)
    (row,) = (row for row in of.ROWS if row.name == name)
    with tempfile.TemporaryDirectory() as folder, trainers_afresh():
        try:
            getattr(of, function)(row, Path(folder), DEVICE)
        except (Exception, pytest.fail.Exception):
            return traceback.format_exc()
    return None


def main(library: str) -> None:
    answers: Any = sys.stdout
    plug_in(Path(library))
    import torch

    torch.set_num_threads(1)
    with redirect_stdout(sys.stderr):
        for line in sys.stdin:
            print(json.dumps(_answer(*json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
