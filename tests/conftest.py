"""What every test may use: a small pretrained base, and the folder of real data and models."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


def shared_folder() -> Path:
    """Return the folder of development data and models (`$VARLORA_SHARED` or `../shared`), whether it exists or not."""
    return Path(os.environ.get("VARLORA_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(autouse=True)
def global_seed() -> None:
    """Give every test the same global randomness, whatever ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The tests of a module compute on one thread, as models this small gain nothing from a second one."""
    from varlora.demo.run import one_thread

    with one_thread():
        yield


@pytest.fixture(scope="session")
def bundled() -> Path:
    """The folder of the small pretrained base that comes with the package; `varlora.demo.load()` loads it."""
    from varlora.demo.base import BUNDLED

    return BUNDLED / "base"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models; skips, saying so, where it is absent."""
    folder = shared_folder()
    if not folder.is_dir():
        pytest.skip(f"real data and models are absent: {folder} (set VARLORA_SHARED)")
    return folder


@pytest.fixture(scope="session")
def few_rows(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder with the first rows of its data alone, for tests that need no more: SST-2 takes long to read."""
    from helpers import first_rows

    folder = tmp_path_factory.mktemp("shared")
    first_rows(shared, folder / "data", 100)
    (folder / "models").symlink_to(shared / "models")
    return folder


@pytest.fixture(scope="session")
def other_device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A process with two devices, `everywhere.other_device.Elsewhere`."""
    from everywhere import other_device

    if other_device.compiler() is None:
        pytest.skip("no C++ compiler, to build the device with")
    with other_device.elsewhere(tmp_path_factory.mktemp("device")) as process:
        yield process
