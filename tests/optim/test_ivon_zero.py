"""IVON under DeepSpeed's ZeRO-1 and -2, itself and through accelerate and the Trainer: the run of one process."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from optim import zero
from optim.ivon_helpers import start_ranks
from safetensors.torch import load_file
from torch import Tensor

KINDS = ("plain", "groups", "contexts", "again", "frozen", "bf16")
WHOLE = [
    *(f"engine-{stage}-{kind}-all" for stage in (1, 2) for kind in KINDS),
    *(f"{way}-{stage}-plain-all" for stage in (1, 2) for way in ("accelerate", "trainer")),
    "engine-1-master-all",
    "engine-2-offload-all",
]
RESUMED = ["engine-1-groups", "engine-2-bf16", "trainer-2-plain"]
REFUSED = ["2-samples", "1-own", "2-robin", "2-late", "1-groups", "1-types", "2-second", "3-plain"]

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.fixture(autouse=True)
def _arithmetic() -> None:
    """Ranks are processes of their own, with the kernels if there are any: nothing here runs twice."""


def start(folder: Path, world: int, cases: list[str]) -> dict[str, list[dict[str, Tensor]]]:
    start_ranks(zero.__file__, world, folder, *cases)
    return {case: [load_file(folder / f"{case}-{rank}.safetensors") for rank in range(world)] for case in cases}


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Tensor]]]:
    parts = [f"{case}-{do}" for case in RESUMED for do in ("save", "load")]
    refused = [f"refusal-{what}-all" for what in REFUSED]
    return start(tmp_path_factory.mktemp("two"), 2, [*WHOLE, *parts, "engine-2-plain-check", *refused])


@pytest.fixture(scope="module")
def on_three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Tensor]]]:
    return start(tmp_path_factory.mktemp("three"), 3, ["engine-2-groups-all", "refusal-2-robin-all"])


@pytest.mark.parametrize("case", WHOLE)
def test_two_ranks_do_what_one_process_does(case: str, on_two: dict) -> None:
    check(on_two[case], case)


def test_so_do_three_whose_partitions_are_padded(on_three: dict) -> None:
    check(on_three["engine-2-groups-all"], "engine-2-groups-all")


def check(found: list[dict[str, Tensor]], case: str) -> None:
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())
    way, _, kind, _ = case.split("-")
    wanted = zero.alone(way, kind)
    assert found[0].keys() == wanted.keys()
    if kind in ("bf16", "master"):
        check_bfloat16(found[0], wanted)
    else:
        for name, value in wanted.items():
            torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=2e-6)


def check_bfloat16(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Draws and gradients are those of weights of 8 bits; the posterior has more, and moves as it should."""
    start = dict(zero.Model(zero.PreTrainedConfig()).named_parameters())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].float(), value, rtol=0.03, atol=0.01)
        kind, _, of = name.partition(".")
        if kind == "mean":
            mean, before = found[name], start[of].detach()
            assert (mean != mean.bfloat16().float()).any()
            moved, wanted_move = mean - before.bfloat16().float(), value - before
            assert (moved - wanted_move).norm() < 0.05 * wanted_move.norm()


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_that_goes_on_from_a_checkpoint_ends_in_the_same_bits(case: str, on_two: dict) -> None:
    for whole, part in zip(on_two[f"{case}-all"], on_two[f"{case}-load"]):
        assert whole.keys() == part.keys()
        assert all(torch.equal(value, part[name]) for name, value in whole.items())


def test_a_checkpoint_comes_before_the_end(on_two: dict) -> None:
    early, late = (on_two[f"{RESUMED[0]}-{do}"][0] for do in ("save", "load"))
    assert not torch.equal(early["mean.layers.0.weight"], late["mean.layers.0.weight"])
