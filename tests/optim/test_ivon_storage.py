"""A saved IVON continues bit for bit, wherever it was interrupted."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim.ivon_helpers import make, make_loss, make_parameters, run, same, snapshot, values
from torch import Tensor, nn

from varlora.optim.ivon import IVON

Resume = Callable[[list[Any], IVON], tuple[list[Any], IVON]]


def stay(parameters: list[Any], optimizer: IVON) -> tuple[list[Any], IVON]:
    return parameters, optimizer


def reload(parameters: list[Any], optimizer: IVON) -> tuple[list[Any], IVON]:
    """A fresh process: other weights and settings until the state is loaded, which must not alias what was saved."""
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    fresh, other = make(parameters[0].dtype, mc_samples=optimizer.param_groups[0]["mc_samples"], lr=9.0, seed=9)
    other.load_state_dict(saved)
    run(optimizer, parameters, [77])  # the interrupted one goes elsewhere
    other.load_state_dict(kept)
    return fresh, other


def reload_used(parameters: list[Any], optimizer: IVON) -> tuple[list[Any], IVON]:
    """Into an optimizer that is itself in the middle of something."""
    fresh, other = make(parameters[0].dtype, mc_samples=optimizer.param_groups[0]["mc_samples"], seed=9)
    run(other, fresh, range(2), other.param_groups[0]["mc_samples"])
    other.train()
    make_loss(fresh, 5)().backward()
    other.load_state_dict(optimizer.state_dict())
    if not optimizer.param_groups[0]["drawn"]:
        other.zero_grad()
    return fresh, other


def deepcopy(parameters: list[Any], optimizer: IVON) -> tuple[list[Any], IVON]:
    fresh, other = copy.deepcopy((parameters, optimizer))
    for p, q in zip(parameters, fresh):  # torch leaves gradients out
        q.grad = None if p.grad is None else p.grad.clone()
    return fresh, other


def finish(parameters: list[Any], optimizer: IVON) -> list[Tensor]:
    """Three more steps and an evaluation draw."""
    samples = optimizer.param_groups[0]["mc_samples"]
    optimizer.zero_grad()
    run(optimizer, parameters, range(10, 12), samples)
    run(optimizer, parameters, [12], samples, way="train")
    with optimizer.sampled_params():
        drawn = values(parameters)
    return drawn + snapshot(parameters, optimizer)


def after_steps(resume: Resume, samples: int) -> list[Tensor]:
    parameters, optimizer = make(mc_samples=samples)
    run(optimizer, parameters, range(3), samples)
    with optimizer.sampled_params():
        pass
    return finish(*resume(parameters, optimizer))


def before_any_step(resume: Resume, samples: int) -> list[Tensor]:
    parameters, optimizer = make(mc_samples=samples)
    optimizer.train()
    optimizer.eval()
    return finish(*resume(parameters, optimizer))


def between_micro_batches(resume: Resume, samples: int) -> list[Tensor]:
    parameters, optimizer = make(mc_samples=samples)
    run(optimizer, parameters, range(2), samples, way="train")
    optimizer.train()
    make_loss(parameters, 5)().backward()
    parameters, optimizer = resume(parameters, optimizer)
    for key in (6, 7):
        optimizer.train()
        make_loss(parameters, key)().backward()
    optimizer.step()
    return finish(parameters, optimizer)


def between_train_and_backward(resume: Resume, samples: int) -> list[Tensor]:
    parameters, optimizer = make(mc_samples=samples)
    run(optimizer, parameters, range(2), samples, way="train")
    optimizer.train()
    parameters, optimizer = resume(parameters, optimizer)
    make_loss(parameters, 5)().backward()
    optimizer.step()
    return finish(parameters, optimizer)


def between_draws(resume: Resume, samples: int) -> list[Tensor]:
    parameters, optimizer = make(mc_samples=samples)
    run(optimizer, parameters, range(2), samples)
    optimizer.zero_grad()
    for sample in range(samples):
        if sample == max(samples - 1, 0):
            parameters, optimizer = resume(parameters, optimizer)
        with optimizer.sampled_params(train=True):
            make_loss(parameters, sample)().backward()
    optimizer.step()
    return finish(parameters, optimizer)


def between_context_and_step(resume: Resume, samples: int) -> list[Tensor]:
    parameters, optimizer = make(mc_samples=samples)
    run(optimizer, parameters, range(2), samples)
    optimizer.zero_grad()
    for sample in range(samples):
        with optimizer.sampled_params(train=True):
            make_loss(parameters, sample)().backward()
    parameters, optimizer = resume(parameters, optimizer)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return finish(parameters, optimizer)


MOMENTS = [after_steps, before_any_step, between_micro_batches, between_train_and_backward]
MOMENTS += [between_draws, between_context_and_step]


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("resume", [reload, reload_used, deepcopy])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_resumed_run_ends_in_the_same_bits(moment: Callable, resume: Resume, samples: int) -> None:
    assert same(moment(resume, samples), moment(stay, samples))


def test_an_optimizer_that_never_drew_may_be_saved() -> None:
    _, optimizer = make()
    fresh, other = make(seed=9)
    other.load_state_dict(optimizer.state_dict())
    assert same(finish(fresh, other), finish(*make()))


def test_settings_and_step_count_come_back_and_the_first_resumed_step_is_not_too_large() -> None:
    """ivon-opt forgets t, so that the debiased momentum is ten times too large."""
    p = nn.Parameter(torch.zeros(20))
    settings: dict[str, Any] = {"ess": 1e6, "hess_init": 10.0, "clip_radius": 1.0}
    optimizer = IVON([p], lr=0.1, seed=0, **settings)

    def step(p: nn.Parameter, optimizer: IVON) -> Tensor:
        before = p.detach().clone()
        optimizer.train()
        p.grad = torch.ones_like(p)
        optimizer.step()
        return (p - before).detach().norm()

    sizes = [step(p, optimizer) for _ in range(20)]
    q = nn.Parameter(torch.zeros(20))
    resumed = IVON([q], lr=7.0, seed=1, **settings)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.state[q]["step"] == 20
    assert resumed.param_groups[0]["lr"] == 0.1
    torch.testing.assert_close(step(q, resumed), sizes[-1], rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_state_keeps_its_type(dtype: torch.dtype) -> None:
    parameters, optimizer = make(dtype)
    run(optimizer, parameters, range(2))
    fresh, other = make(dtype)
    other.load_state_dict(optimizer.state_dict())
    wide = torch.promote_types(dtype, torch.float32)
    assert all(other.state[p][name].dtype == wide for p in fresh for name in ("mean", "momentum", "hess"))
    assert same(snapshot(fresh, other), snapshot(parameters, optimizer))


def test_a_state_without_the_settings_of_today_goes_on() -> None:
    parameters, optimizer = make()
    run(optimizer, parameters, range(2))
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["fused"], group["noise_per_rank"]
    fresh, other = make()
    buckets = other._buckets  # which a wrapper may have copied the reference to
    other.load_state_dict(saved)
    assert other._buckets is buckets
    assert same(finish(fresh, other), after_two_steps())


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("in_flight", [False, True])
def test_a_state_dict_fits_safetensors_and_json(samples: int, in_flight: bool) -> None:
    parameters, optimizer = make(mc_samples=samples)
    run(optimizer, parameters, range(2), samples)
    if in_flight:
        optimizer.train()
        make_loss(parameters, 3)().backward()
    saved = optimizer.state_dict()
    tensors = {f"{index}.{k}": v for index, s in saved["state"].items() for k, v in s.items() if isinstance(v, Tensor)}
    rest = {index: {k: v for k, v in s.items() if not isinstance(v, Tensor)} for index, s in saved["state"].items()}
    assert json.loads(json.dumps([rest, saved["param_groups"]]))[1] == saved["param_groups"]
    storages = {value.untyped_storage().data_ptr() for value in tensors.values() if value.numel()}
    assert len(storages) == len(tensors)
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in tensors.values())
    names = {name.split(".")[1] for name in tensors}
    transient = {"grad"} | ({"grad_sum", "hess_sum"} if samples > 1 else set())
    assert names == {"mean", "momentum", "hess"} | (transient if in_flight else set())


def test_the_state_of_another_model_is_refused_and_leaves_everything() -> None:
    parameters, optimizer = make()
    run(optimizer, parameters, range(2))
    before = snapshot(parameters, optimizer)
    source = make_parameters()
    source[3] = nn.Parameter(torch.zeros(40))
    other = IVON(source, lr=0.1, ess=1.0, hess_init=1.0)
    run(other, source, range(1))
    with pytest.raises(ValueError, match=r"parameter 3 to have shape \(2, 1, 20\), but got \(40,\)"):
        optimizer.load_state_dict(other.state_dict())
    fewer = IVON(source[:2], lr=0.1, ess=1.0, hess_init=1.0)
    run(fewer, source[:2], range(1))
    with pytest.raises(ValueError, match="size"):
        optimizer.load_state_dict(fewer.state_dict())
    assert same(snapshot(parameters, optimizer), before)
    assert same(finish(parameters, optimizer), after_two_steps())


def test_the_same_names_in_another_order_are_refused_and_leave_everything() -> None:
    named = [(name, nn.Parameter(torch.full((3,), value))) for name, value in (("a", 1.0), ("b", 2.0))]
    saved, other = (IVON(of, lr=0.1, ess=1.0, hess_init=1.0) for of in (named, named[::-1]))
    with pytest.raises(ValueError, match="number 0 is 'b' and was 'a'"):
        other.load_state_dict(saved.state_dict())
    assert {name: mean.tolist() for name, mean in other.posterior().mean.items()} == {"a": [1.0] * 3, "b": [2.0] * 3}


def after_two_steps() -> list[Tensor]:
    parameters, optimizer = make()
    run(optimizer, parameters, range(2))
    return finish(parameters, optimizer)


def test_hooks_do_not_pile_up() -> None:
    parameters, optimizer = make(mc_samples=3)
    for name in "abc":
        run(optimizer, parameters, range(1), samples=3, way="train")
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.add_param_group({"params": [(name, nn.Parameter(torch.ones(1)))]})
    assert [len(p._post_accumulate_grad_hooks) for p in parameters] == [1] * len(parameters)
    assert [len(p._backward_hooks) for p in parameters] == [1] * len(parameters)


def test_what_others_wrote_into_the_parameters_is_saved() -> None:
    """A constraint after each step, say: the state that is saved next has it, and so has a copy."""
    parameters, optimizer = make()
    run(optimizer, parameters, range(2))
    with torch.no_grad():
        for p in parameters:
            p.clamp_(-0.05, 0.05)
    clamped = values(parameters)
    others, other = make()
    other.load_state_dict(optimizer.state_dict())
    assert same(values(others), clamped)
    copies, copied = copy.deepcopy((parameters, optimizer))
    copied.eval()
    run(copied, copies, [5])
    run(other, others, [5])
    run(optimizer, parameters, [5])
    assert same(snapshot(others, other), snapshot(parameters, optimizer))
    assert same(snapshot(copies, copied), snapshot(parameters, optimizer))
