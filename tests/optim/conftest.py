"""What the tests of IVON share as fixtures."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

from varlora.optim import bucket, native


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors of a few numbers gain nothing from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["kernels", pytest.param("triton", marks=pytest.mark.slow), "torch"], autouse=True)
def _arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds with the compiled kernels, with those for a GPU in Triton's interpreter, and without."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif request.param == "triton":
        pytest.importorskip("triton")
        if re.search("bf16|bfloat16|rounded", request.node.name):
            pytest.skip("Triton's interpreter cuts bfloat16 off instead of rounding it")
        monkeypatch.setattr(bucket, "kernels_for", lambda device: "triton")
    elif native.library() is None:
        pytest.skip("the kernels were not built: there was no C compiler")
    kind = {"kernels": "native", "triton": "triton", "torch": None}[request.param]
    assert bucket.kernels_for(torch.device("cpu")) == kind


@pytest.fixture
def device() -> str:
    """Where the parameters of a test lie that also runs on a GPU."""
    return "cpu"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some parameters are then larger than a chunk, and one is larger than a bucket."""
    monkeypatch.setattr(bucket, "_CHUNK", 16)
    monkeypatch.setattr(bucket, "_BUCKET", 64)
