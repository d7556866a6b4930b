"""IVON under DistributedDataParallel: the same bits on all ranks, and the right curvature, with shared noise or own."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from optim import ranks
from optim.ivon_helpers import make, start_ranks
from safetensors.torch import load_file
from torch import Tensor, nn

from varlora.optim.ivon import IVON

WAYS = itertools.product(("price", "gradsq"), ("shared", "own"), ("train", "context"))
CASES = [f"{'-'.join(way)}-1" for way in WAYS] + ["price-shared-train-3", "gradsq-own-train-3", "price-own-context-3"]
CASES += ["price-own-train-1-3", "gradsq-own-train-1-3", "gradsq-own-context-1-3"]  # three micro-batches on one draw
ON_FOUR = [case for case in CASES if case.endswith("-train-1")] + ["price-shared-context-1", "price-own-context-1"]


@pytest.fixture(autouse=True)
def _arithmetic() -> None:
    """Ranks are processes of their own, with the kernels if there are any: nothing here runs twice."""


def start(folder: Path, world: int, cases: list[str]) -> dict[str, list[dict[str, Tensor]]]:
    """Run cases on so many processes, and return what each rank ended with."""
    start_ranks(ranks.__file__, world, folder, *cases)
    return {case: [load_file(folder / f"{case}-{rank}.safetensors") for rank in range(world)] for case in cases}


def hessian(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for name, value in found.items() if name.endswith(".hess")])


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Tensor]]]:
    return start(tmp_path_factory.mktemp("two"), 2, CASES)


@pytest.fixture(scope="module")
def on_four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Tensor]]]:
    return start(tmp_path_factory.mktemp("four"), 4, ON_FOUR)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_hold_the_same_bits_and_the_right_hessian(case: str, on_two: dict) -> None:
    check(on_two[case], case)


@pytest.mark.parametrize("case", ON_FOUR)
def test_four_ranks_hold_the_same_bits_and_the_right_hessian(case: str, on_four: dict) -> None:
    check(on_four[case], case)


def check(found: list[dict[str, Tensor]], case: str) -> None:
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())
    curvature = ranks.CURVATURE[case.partition("-")[0]]
    h = hessian(found[0])
    assert (h != curvature).all()
    # h₀ is the curvature: for the estimates to be within 2 %, what they have replaced of h has to be
    assert h.mean().item() == pytest.approx(curvature, rel=0.02 * (1 - ranks.BETA2**100))


def test_noise_of_its_own_divides_the_variance_by_the_ranks(on_two: dict, on_four: dict) -> None:
    for found, world in ((on_two, 2), (on_four, 4)):
        for way in ("train", "context"):
            shared, own = (hessian(found[f"price-{noise}-{way}-1"][0]).var() for noise in ("shared", "own"))
            assert (shared / own).item() == pytest.approx(world, rel=0.15)


def test_alone_a_rank_of_its_own_is_as_any_other() -> None:
    found = []
    for own in (False, True):
        p = nn.Parameter(torch.ones(50))
        optimizer = IVON([p], lr=0.1, ess=100.0, hess_init=1.0, beta2=0.9, seed=0, noise_per_rank=own)
        for key in range(20):
            with optimizer.sampled_params(train=True):
                ((p - key) ** 2).sum().backward()
            nn.utils.clip_grad_norm_([p], 3.0)
            optimizer.step()
            optimizer.zero_grad()
        found.append(optimizer.state[p]["hess"].mean())
    torch.testing.assert_close(*found, rtol=0.2, atol=0)  # other noise, the same expectation


def test_a_gradient_that_is_only_looked_at_does_not_count() -> None:
    parameters, optimizer = make(noise_per_rank=True)
    optimizer.train()
    loss = sum(p.square().sum() for p in parameters)
    torch.autograd.grad(loss, parameters, retain_graph=True)
    assert all((optimizer.state[p]["grad_sum"] == 0).all() for p in parameters)
    loss.backward()
    for p in parameters:
        assert p.grad is not None
        torch.testing.assert_close(optimizer.state[p]["grad_sum"], p.grad)


def test_groups_agree_on_whose_noise_it_is() -> None:
    _, optimizer = make()
    with pytest.raises(ValueError, match="`noise_per_rank` to be the same in all groups, but got True after False"):
        optimizer.add_param_group({"params": [("x", nn.Parameter(torch.ones(1)))], "noise_per_rank": True})
