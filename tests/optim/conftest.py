"""What the tests of IVON share as fixtures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from varlora.optim import ivon


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors of a few numbers gain nothing from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some parameters are then larger than a chunk, and one is larger than a bucket."""
    monkeypatch.setattr(ivon, "_CHUNK", 16)
    monkeypatch.setattr(ivon, "_BUCKET", 64)
