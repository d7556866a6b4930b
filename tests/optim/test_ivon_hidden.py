"""What goes wrong without a word: casts that autocast keeps, hooks that keep memory, values set through `.data`."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from varlora import IVON

X = torch.ones(3, 4)


def network() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 2)


def ivon(net: nn.Module, **settings: Any) -> IVON:
    return IVON(net.named_parameters(), **{"lr": 0.1, "ess": 1.0, "hess_init": 1.0, "seed": 0, **settings})


def autocast() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("fused", [None, False])
def test_draws_in_one_autocast_context_are_those_of_contexts_of_their_own(fused: bool | None) -> None:
    net = network()

    def outputs(within: bool) -> torch.Tensor:
        optimizer, found = ivon(net, fused=fused), []
        with autocast() if within else torch.no_grad():
            for _ in range(3):
                with optimizer.sampled_params():
                    if within:
                        found.append(net(X).detach())
                    else:
                        with autocast():
                            found.append(net(X))
            found.append(net(X).detach() if within else autocast_of(net))
        return torch.stack(found)

    def autocast_of(net: nn.Module) -> torch.Tensor:
        with autocast():
            return net(X)

    inside = outputs(within=True)
    assert torch.equal(inside, outputs(within=False))
    assert (inside.float().std(0) > 0).all()


def test_several_draws_in_one_autocast_context_train_as_in_contexts_of_their_own() -> None:
    def trained(within: bool) -> torch.Tensor:
        net = network()
        optimizer = ivon(net, mc_samples=3)

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            value = net(X).square().sum()
            value.backward()
            return value

        def loss_of_its_own() -> torch.Tensor:
            with autocast():
                return loss()

        for _ in range(3):
            if within:
                with autocast():
                    optimizer.step(loss)
            else:
                optimizer.step(loss_of_its_own)
        return torch.cat([optimizer.state[p]["hess"].flatten() for p in net.parameters()])

    assert torch.equal(trained(within=True), trained(within=False))


@pytest.mark.parametrize("settings", [{"mc_samples": 2}, {"mc_samples": 1}, {"noise_per_rank": True}])
def test_model_and_state_are_freed(settings: dict[str, Any]) -> None:
    net = network()
    optimizer = ivon(net, **settings)
    for _ in range(settings.get("mc_samples", 1)):
        optimizer.train()
        net(X).sum().backward()
    optimizer.step()
    gone = [weakref.ref(net), weakref.ref(net.weight), weakref.ref(optimizer), weakref.ref(optimizer._buckets[0])]
    del net, optimizer
    gc.collect()
    assert [reference() for reference in gone] == [None] * 4


def test_values_that_torch_puts_in_the_place_of_a_parameters_become_the_mean() -> None:
    net = network()
    optimizer = ivon(net)
    step(net, optimizer)
    nn.utils.vector_to_parameters(torch.arange(10.0), net.parameters())
    assert optimizer.posterior().mean["bias"].tolist() == [8.0, 9.0]
    step(net, optimizer)
    assert (net.weight.flatten() - torch.arange(8.0)).abs().max() < 0.01


def step(net: nn.Module, optimizer: IVON) -> None:
    optimizer.train()
    optimizer.zero_grad()
    net(X).sum().backward()
    optimizer.step()


def test_two_parameters_of_one_name_are_refused() -> None:
    one, two = network(), network()
    groups = [{"params": one.named_parameters()}, {"params": two.named_parameters()}]
    with pytest.raises(ValueError, match="'weight' is there 2 times"):
        IVON(groups, lr=0.1, ess=1.0, hess_init=1.0)
    optimizer = ivon(one)
    with pytest.raises(ValueError, match="'weight' is there 2 times"):
        optimizer.add_param_group({"params": two.named_parameters()})
    step(one, optimizer)  # which the refused group left as it was
    assert set(optimizer.posterior().mean) == {"weight", "bias"}


@pytest.mark.parametrize("frozen", [["weight", "bias"], ["bias"]])
def test_parameters_frozen_within_a_draw_come_back(frozen: list[str]) -> None:
    net = network()
    optimizer = ivon(net)
    step(net, optimizer)
    before = copy.deepcopy(net.state_dict())
    with optimizer.sampled_params():
        drawn = copy.deepcopy(net.state_dict())
        for name in frozen:
            net.get_parameter(name).requires_grad_(False)
        with optimizer.sampled_params():
            assert not torch.equal(net.weight, drawn["weight"]) or "weight" in frozen
        assert "weight" in frozen or torch.equal(net.weight, drawn["weight"])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("fused", [False, None])
def test_a_weight_decay_may_be_lowered_while_training(fused: bool | None) -> None:
    """Price's estimates let the Hessian fall below 0, and h + δ has to stay above it, whatever δ becomes."""
    parameter = nn.Parameter(torch.zeros(1000))
    settings: dict[str, Any] = {"ess": 1e3, "hess_init": 0.01, "beta2": 0.95, "weight_decay": 0.1}
    optimizer = IVON([("p", parameter)], lr=0.0, seed=0, fused=fused, **settings)
    source = torch.Generator().manual_seed(0)

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.train()
            parameter.grad = 0.01 * torch.randn(1000, generator=source)
            optimizer.step()

    steps(30)
    before = optimizer.state[parameter]["hess"].clone()
    optimizer.param_groups[0]["weight_decay"] = 0.01
    precision = optimizer.posterior().std["p"] ** -2 / 1e3
    below = before <= 0
    assert below.any()
    assert torch.allclose(precision[~below], before[~below] + 0.01)
    assert torch.allclose(precision[below], torch.maximum(before[below] + 0.01, (before[below] + 0.1) / 2))
    steps(5)
    assert optimizer.posterior().std["p"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_micro_batches_that_cancel_in_16_bits_do_not_spoil_the_hessian(dtype: torch.dtype) -> None:
    """Their sum in 16 bits differs from the float32 one by rounding, and not by what clipping would have done."""
    grown = {}
    for kind in (torch.float32, dtype):
        parameter = nn.Parameter(torch.zeros(8, 8, dtype=kind))
        optimizer = IVON([("p", parameter)], lr=0.0, ess=1e6, hess_init=1e-3, mc_samples=2, seed=0)
        source = torch.Generator().manual_seed(0)
        ones, small = torch.randn(2, 8, 8, generator=source)
        for gradient in (ones, 0.004 * small, -ones, -0.003 * small):
            optimizer.train()
            (parameter * gradient.to(kind)).sum().backward()
        optimizer.step()
        grown[kind] = optimizer.state[parameter]["hess"] - 1e-3
    of_16, of_32 = (grown[kind].norm().item() for kind in (dtype, torch.float32))
    assert of_16 < 3 * of_32  # of bfloat16 the whole sum is half rounding; entry by entry it was 20 times and more
