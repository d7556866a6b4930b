"""The ways of using IVON: they agree with each other, and with what other optimizers are expected to do."""

from __future__ import annotations

import copy
import itertools
import math
import weakref

import pytest
import torch
from optim.ivon_helpers import (
    SETTINGS,
    STATE,
    WAYS,
    make,
    make_loss,
    make_parameters,
    noise_of,
    run,
    same,
    snapshot,
    values,
)
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from varlora.optim import noise
from varlora.optim.ivon import IVON

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# --- three ways ---


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}, {"hess_approx": "gradsq", "batch_size": 8}])
@pytest.mark.parametrize("way", ["train", "closure"])
def test_the_three_ways_give_the_same_bits(way: str, settings: dict) -> None:
    expected, reference = make(**settings)
    run(reference, expected, range(5))
    parameters, optimizer = make(**settings)
    run(optimizer, parameters, range(5), way=way)
    assert same(snapshot(parameters, optimizer), snapshot(expected, reference))


def test_contexts_and_closure_give_the_same_bits_with_several_draws() -> None:
    results = []
    for way in ("context", "closure"):
        parameters, optimizer = make(mc_samples=3)
        run(optimizer, parameters, range(5), samples=3, way=way)
        results.append(snapshot(parameters, optimizer))
    assert same(*results)


@pytest.mark.parametrize("approx", ["price", "gradsq"])
def test_micro_batches_under_train_share_out_the_draws(approx: str) -> None:
    """Three micro-batches, each with a third of the loss, are three contexts averaged."""
    # `batch_size` is what the gradient of one draw averages over; under `train` the draws share the step's examples
    expected, reference = make(mc_samples=3, hess_approx=approx, batch_size=4)
    parameters, optimizer = make(mc_samples=3, hess_approx=approx, batch_size=12)
    for step in range(5):
        run(reference, expected, [step], samples=3)
        WAYS["train"](optimizer, [make_loss(parameters, 100 * step + s, scale=1 / 3) for s in range(3)])
    torch.testing.assert_close(snapshot(parameters, optimizer), snapshot(expected, reference))


def test_closure_returns_the_average_loss_and_is_called_once_for_each_draw() -> None:
    _, optimizer = make(mc_samples=3)
    losses = iter([1.0, 2.0, 6.0])
    assert optimizer.step(lambda: next(losses)) == 3.0
    assert next(losses, None) is None


def test_each_draw_has_noise_of_its_own_and_micro_batches_beyond_the_draws_stay_on_the_last() -> None:
    parameters, optimizer = make(mc_samples=3)
    seen = []
    for key in range(5):
        optimizer.train()
        optimizer.train()  # without a gradient in between there is nothing to draw for
        seen.append(values(parameters))
        make_loss(parameters, key)().backward()
    assert optimizer.param_groups[0]["draws"] == 3
    assert [same(one, other) for one, other in itertools.pairwise(seen)] == [False, False, True, True]


# --- accumulation ---


@pytest.mark.parametrize("way", ["train", "context"])
def test_micro_batches_under_one_draw_are_one_batch(way: str) -> None:
    expected, reference = make()
    parameters, optimizer = make()
    for step in range(3):
        whole = [make_loss(expected, 10 * step + k, scale=1 / 4) for k in range(4)]
        WAYS["context"](reference, [lambda whole=whole: torch.stack([loss() for loss in whole]).sum()])
        micro = [make_loss(parameters, 10 * step + k, scale=1 / 4) for k in range(4)]
        if way == "train":
            WAYS["train"](optimizer, micro)
        else:
            optimizer.zero_grad()
            with optimizer.sampled_params(train=True):
                for loss in micro:
                    loss().backward()
            optimizer.step()
        torch.testing.assert_close(snapshot(parameters, optimizer), snapshot(expected, reference))


def test_an_evaluation_between_micro_batches_changes_nothing() -> None:
    results = []
    for evaluate in (False, True):
        parameters, optimizer = make(mc_samples=3)
        for key in range(4):
            optimizer.train()
            make_loss(parameters, key)().backward()
            if evaluate:
                optimizer.eval()
                assert same(values(parameters), [optimizer.state[p]["mean"] for p in parameters])
        optimizer.step()
        results.append(snapshot(parameters, optimizer))
    assert same(*results)


@pytest.mark.parametrize("samples", [1, 3])
def test_a_gradient_that_was_thrown_away_leaves_no_trace(samples: int) -> None:
    """A loop that skips a bad batch: `zero_grad` and on to the next."""
    parameters, optimizer = make(mc_samples=samples)
    optimizer.train()
    (1e6 * make_loss(parameters, 0)()).backward()
    optimizer.zero_grad()
    run(optimizer, parameters, [1], samples, way="train")
    # the same draws without the bad batch before them
    expected, reference = make(mc_samples=samples)
    if samples > 1:
        reference.param_groups[0]["draws"] = 1
    run(reference, expected, [1], samples, way="train")
    assert same(snapshot(parameters, optimizer), snapshot(expected, reference))


@pytest.mark.parametrize("where", ["before", "within", "after"])
def test_each_context_counts_wherever_gradients_are_cleared(where: str) -> None:
    """A draw is added up when its context ends, so `zero_grad` takes none of them back."""
    results = []
    for place in (where, "nowhere"):
        parameters, optimizer = make(mc_samples=3)
        for key in range(3):
            if place == "before":
                optimizer.zero_grad()
            with optimizer.sampled_params(train=True):
                if place == "within":
                    optimizer.zero_grad()
                make_loss(parameters, key)().backward()
            if place == "after" and key < 2:
                optimizer.zero_grad()
        optimizer.step()
        results.append(snapshot(parameters, optimizer))
    assert same(*results)


# --- which parameters ---


@pytest.mark.parametrize("way", WAYS)
def test_parameters_without_gradient_stay(way: str) -> None:
    parameters, optimizer = make(weight_decay=0.5)
    run(optimizer, parameters, range(3), way=way)
    before = snapshot(parameters[1::2], optimizer)
    WAYS[way](optimizer, [make_loss(parameters[::2], 9)])
    assert same(snapshot(parameters[1::2], optimizer), before)
    assert [optimizer.state[p]["step"] for p in parameters] == [4, 3, 4, 3, 4]


@pytest.mark.parametrize("way", ["context", "closure"])
def test_a_gradient_in_one_draw_of_several_counts(way: str) -> None:
    """A draw may route around a parameter, as in a mixture of experts."""
    parameters, optimizer = make(mc_samples=2)
    WAYS[way](optimizer, [make_loss(parameters, 0), make_loss(parameters[:1], 1)])
    expected, reference = make(mc_samples=2)
    WAYS[way](reference, [make_loss(expected, 0), lambda: make_loss(expected[:1], 1)() + 0 * make_loss(expected, 2)()])
    assert same(snapshot(parameters, optimizer), snapshot(expected, reference))


def test_frozen_parameters_are_never_perturbed() -> None:
    parameters, optimizer = make()
    parameters[0].requires_grad_(False)
    before = values(parameters[:1])
    optimizer.train()
    assert same(values(parameters[:1]), before)
    assert not torch.equal(parameters[1], make_parameters()[1])
    optimizer.eval()
    with optimizer.sampled_params():
        assert same(values(parameters[:1]), before)
    run(optimizer, parameters, range(2))
    assert same(values(parameters[:1]), before)
    assert sorted(optimizer.posterior().mean) == ["p1", "p2", "p3", "p4"]
    parameters[0].requires_grad_(True)  # and may be thawed
    run(optimizer, parameters, range(2))
    assert not same(values(parameters[:1]), before)
    parameters[1].requires_grad_(False)  # and frozen again, in the middle of a draw
    mean = optimizer.state[parameters[1]]["mean"].clone()
    parameters[1].requires_grad_(True)
    optimizer.train()
    parameters[1].requires_grad_(False)
    optimizer.eval()
    assert torch.equal(parameters[1], mean)


@pytest.mark.parametrize("samples", [1, 3])
def test_a_group_may_be_added_later_and_changes_nothing_for_the_others(samples: int) -> None:
    parameters, optimizer = make(mc_samples=samples)
    run(optimizer, parameters, range(3), samples)
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [("extra", extra)], "lr": 0.5, "ess": 9.0})
    run(optimizer, [*parameters, extra], range(3, 6), samples)
    expected, reference = make(mc_samples=samples)
    run(reference, expected, range(6), samples)
    assert same(snapshot(parameters, optimizer), snapshot(expected, reference))
    assert optimizer.state[extra]["step"] == 3
    assert not torch.equal(extra, torch.ones(3))
    assert list(optimizer.posterior().std)[-1] == "extra"


@pytest.mark.parametrize("samples", [1, 3])
def test_a_group_added_in_the_middle_of_a_step_keeps_draw_and_gradient(samples: int) -> None:
    results = []
    for late in (False, True):
        parameters, optimizer = make(mc_samples=samples)
        for key in range(3):
            optimizer.train()
            make_loss(parameters, key)().backward()
            if late and key == 1:
                optimizer.add_param_group({"params": [("extra", nn.Parameter(torch.ones(3)))]})
        optimizer.step()
        results.append(snapshot(parameters, optimizer))
    assert same(*results)


def test_groups_have_settings_of_their_own() -> None:
    p, q = make_parameters()[:2]
    optimizer = IVON([{"params": [p], "ess": 1e10}, {"params": [q], "lr": 0.0}], **SETTINGS)
    mean = values([q])
    optimizer.train()
    torch.testing.assert_close(p.detach(), make_parameters()[0], atol=1e-4, rtol=0)  # hardly perturbed
    assert (q - mean[0]).abs().max() > 1e-2
    make_loss([p, q], 0)().backward()
    optimizer.step()
    assert same(values([q]), mean)
    assert not torch.equal(p, make_parameters()[0])


# --- types and memory ---


def test_bfloat16_parameters_have_a_float32_state_that_moves() -> None:
    p = nn.Parameter(torch.ones(50, dtype=torch.bfloat16))
    optimizer = IVON([("p", p)], lr=0.03, ess=1e6, hess_init=1e-2, seed=0)  # β₂ and ξ of the paper's recipe
    for step in range(1, 101):
        optimizer.train()
        p.grad = torch.ones_like(p)
        optimizer.step()
        state = optimizer.state[p]
        moved = 1 - state["mean"]
        torch.testing.assert_close(moved, torch.full_like(moved, step * 3e-5), rtol=1e-2, atol=0)
        assert torch.equal(p, state["mean"].bfloat16())
    assert all(state[name].dtype == torch.float32 for name in ("mean", "momentum", "hess"))
    assert (state["hess"] != 1e-2).all()
    assert optimizer.posterior().mean["p"].dtype == torch.float32
    assert torch.equal(p, torch.full_like(p, 0.996))


@pytest.mark.parametrize("fused", [None, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("way", ["context", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_step_allocates_nothing_that_grows_with_the_parameters(
    samples: int, way: str, dtype: torch.dtype, fused: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise, "_AT_ONCE", 24)  # torch's operations make noise in pieces of a fixed size
    p = nn.Parameter(torch.ones(8_000, dtype=dtype))
    q = nn.Parameter(torch.ones(1_000, dtype=dtype))
    settings = {"weight_decay": 0.1, "mc_samples": samples, "fused": fused}
    optimizer = IVON([p, q], lr=0.1, ess=100, hess_init=1.0, seed=0, **settings)
    gradients = [torch.full_like(p, 0.1), torch.full_like(q, 0.1)]

    def backward() -> None:  # as autograd does, but allocating nothing itself
        for parameter, gradient in zip((p, q), gradients):
            for hook in (parameter._backward_hooks or {}).values():
                hook(gradient)
            parameter.grad = gradient
            for hook in (parameter._post_accumulate_grad_hooks or {}).values():  # type: ignore[attr-defined]
                hook(parameter)

    def step() -> None:
        for _ in range(samples):
            if way == "train":
                optimizer.train()
                backward()
            else:
                with optimizer.sampled_params(train=True):
                    backward()
        optimizer.step()

    pointers = [p.data_ptr(), q.data_ptr()]
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
        with optimizer.sampled_params():
            pass
    largest = max(event.self_cpu_memory_usage for event in profiler.events())
    assert largest < 10_000, [e.name for e in profiler.events() if e.self_cpu_memory_usage > 10_000]
    assert [p.data_ptr(), q.data_ptr()] == pointers


def test_parameters_keep_their_storage_and_the_state_lies_in_optimizer_state() -> None:
    parameters, optimizer = make(mc_samples=2)
    pointers = [p.data_ptr() for p in parameters]
    run(optimizer, parameters, range(2), samples=2, way="closure")
    with optimizer.sampled_params():
        assert [p.data_ptr() for p in parameters] == pointers
    assert [p.data_ptr() for p in parameters] == pointers
    for p in parameters:
        state = optimizer.state[p]
        assert {"step", "mean", "momentum", "hess"} <= set(state)
        assert all(state[name].shape == p.shape for name in ("mean", "momentum", "hess"))


def test_the_posterior_is_what_draws_are_from() -> None:
    parameters, optimizer = make(weight_decay=0.2)
    run(optimizer, parameters, range(3))
    posterior, sigma = optimizer.posterior(), optimizer.mean_sigma()
    with optimizer.sampled_params(train=True):
        for i, (p, eps) in enumerate(zip(parameters, noise_of(optimizer))):
            mean, std = posterior.mean[f"p{i}"], posterior.std[f"p{i}"]
            torch.testing.assert_close(p.detach(), mean + std * eps)
            torch.testing.assert_close(std, 1 / (50.0 * (optimizer.state[p]["hess"] + 0.2)).sqrt())
            assert sigma[f"p{i}"] == pytest.approx(std.mean().item())
    posterior.mean["p0"].zero_()  # a copy
    assert not torch.equal(parameters[0], torch.zeros(3, 4))
    with pytest.raises(ValueError, match="named_parameters"):
        IVON(parameters, **SETTINGS).posterior()


# --- wrong use ---


@pytest.mark.parametrize("samples", [1, 2])
def test_sparse_gradients_are_refused_in_words(samples: int) -> None:
    rows = nn.Embedding(5, 3, sparse=True)
    optimizer = IVON(rows.named_parameters(), lr=0.1, ess=10.0, hess_init=1.0, mc_samples=samples, seed=0)

    def closure() -> None:
        optimizer.zero_grad()
        rows(torch.tensor([1])).sum().backward()

    with pytest.raises(RuntimeError, match=r"Expected dense gradients, but got .*sparse=False"):
        optimizer.step(closure)
    assert optimizer.posterior().mean["weight"].equal(rows.weight)


def test_complex_parameters_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"Expected real parameters, but got one of torch\.complex64"):
        IVON([nn.Parameter(torch.ones(3, dtype=torch.complex64))], lr=0.1, ess=10.0, hess_init=1.0)


@pytest.mark.parametrize("samples", [1, 3])
def test_a_gradient_without_a_draw_is_refused(samples: int) -> None:
    parameters, optimizer = make(mc_samples=samples)
    make_loss(parameters, 0)().backward()
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
        optimizer.step()
    optimizer.zero_grad()
    run(optimizer, parameters, range(2), samples)
    make_loss(parameters, 0)().backward()
    with pytest.raises(RuntimeError, match=r"nothing was drawn since the last step"):
        optimizer.step()


def test_a_gradient_from_the_mean_among_those_from_draws_is_refused() -> None:
    """A look at the mean between micro-batches, after which `train` was forgotten."""
    parameters, optimizer = make()
    run(optimizer, parameters, range(1))
    before = snapshot(parameters, optimizer)
    optimizer.zero_grad()
    optimizer.train()
    make_loss(parameters, 1)().backward()
    optimizer.eval()
    make_loss(parameters, 2)().backward()
    with pytest.raises(RuntimeError, match=r"one was taken at the mean since the draw.*Clear the gradients"):
        optimizer.step()
    assert same(snapshot(parameters, optimizer), before)
    optimizer.zero_grad()
    run(optimizer, parameters, range(1))  # and all is well again


def test_parameters_that_were_replaced_by_a_flat_copy_are_refused() -> None:
    """Forward passes do not see what is put into the copy."""
    parameters, optimizer = make()
    optimizer.param_groups[0]["params"] = [torch.cat([p.detach().flatten() for p in parameters]).requires_grad_()]
    with pytest.raises(RuntimeError, match=r"others were put in their place, as DeepSpeed does at stage 3.*FSDP2"):
        optimizer.train()


def test_parameters_that_are_no_more_the_optimizers_are_let_go() -> None:
    """As those of a model that FSDP2 has sharded: it frees them, and puts others into the groups."""
    parameters, optimizer = make()
    optimizer.param_groups[0]["params"] = [nn.Parameter(p.detach().clone()) for p in parameters]
    references = [weakref.ref(p) for p in parameters]
    parameters.clear()
    assert not any(reference() is not None for reference in references)
    optimizer.train()
    for name, std in optimizer.posterior().std.items():
        torch.testing.assert_close(std.mean().item(), optimizer.mean_sigma()[name])


def test_there_may_be_nothing_to_train() -> None:
    optimizer = IVON([{"params": []}], lr=0.1, ess=10.0, hess_init=1.0)
    p = nn.Parameter(torch.ones(2))
    for _ in range(2):
        optimizer.train()
        optimizer.step()
    optimizer.add_param_group({"params": [p]})
    optimizer.train()
    assert (p != 1).all()


def test_parameters_may_come_and_go_and_mere_tensors_be_given() -> None:
    parameters, optimizer = make()
    run(optimizer, parameters, range(1))
    copied = copy.deepcopy(optimizer)
    copied.add_param_group({"params": [("more", nn.Parameter(torch.ones(2)))]})
    copied.train()
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(2)))
    optimizer.train()
    del optimizer.param_groups[0]["params"][0]
    optimizer.train()
    IVON([torch.ones(3, requires_grad=True)], lr=0.1, ess=10.0, hess_init=1.0).train()
    IVON(nn.LazyLinear(2).parameters(), lr=0.1, ess=10.0, hess_init=1.0)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_where_gradients_are_cleared_it_does_not_matter_where_they_were_taken(set_to_none: bool) -> None:
    parameters, optimizer = make()
    optimizer.train()
    optimizer.eval()
    make_loss(parameters, 0)().backward()
    optimizer.train()
    optimizer.zero_grad(set_to_none)
    make_loss(parameters, 1)().backward()
    optimizer.step()

    def closure() -> torch.Tensor:  # Lightning's, which clears the gradients itself
        optimizer.zero_grad(set_to_none)
        loss = make_loss(parameters, 2)()
        loss.backward()
        return loss

    optimizer.train()
    optimizer.eval()
    make_loss(parameters, 3)().backward()
    optimizer.train()
    optimizer.step(closure)


SCHEDULES: dict[str, dict[str, float]] = {
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 10, "cycle_momentum": False},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "cycle_momentum": False},
    "CosineAnnealingLR": {"T_max": 10},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"total_iters": 10},
    "ReduceLROnPlateau": {"patience": 0},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_torchs_schedules_set_the_learning_rate(name: str) -> None:
    parameters, optimizer = make()
    schedule, seen = getattr(torch.optim.lr_scheduler, name)(optimizer, **SCHEDULES[name]), []
    for at in range(6):
        run(optimizer, parameters, range(at, at + 1))
        schedule.step(1.0) if name == "ReduceLROnPlateau" else schedule.step()
        seen.append(float(optimizer.param_groups[0]["lr"]))
    assert len(set(seen)) > 2
    assert optimizer.skipped_steps == 0


def test_a_step_without_any_gradient_is_no_error_and_changes_nothing() -> None:
    parameters, optimizer = make()
    run(optimizer, parameters, range(1))
    optimizer.zero_grad()
    before = snapshot(parameters, optimizer)
    optimizer.step()
    optimizer.train()
    optimizer.step()
    assert same(snapshot(parameters, optimizer), before)


NAN, INF = math.nan, math.inf
WRONG = {
    "lr": [-1e-3, NAN, INF, True, "1e-3"],
    "ess": [0, -1, NAN, INF],
    "hess_init": [0.0, -1.0, NAN, INF],
    "beta1": [-0.1, 1.0, NAN],
    "beta2": [-0.1, 1.0, NAN],
    "weight_decay": [-0.1, NAN, INF],
    "clip_radius": [0.0, -1.0, NAN],
    "mc_samples": [0, -1, 1.5, 2.0, NAN, INF, True],
    "hess_approx": ["prices", None],
    "batch_size": [0, -1, NAN],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, wrong in WRONG.items() for value in wrong])
def test_a_setting_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"Expected `{name}` to be .* but got {value!r}\. (Pass|Leave it out) "):
        make(**{name: value})
    parameters, optimizer = make()
    with pytest.raises(ValueError, match=name):
        optimizer.add_param_group({"params": [("extra", nn.Parameter(torch.ones(2)))], name: value})
    assert len(optimizer.param_groups) == 1
    run(optimizer, parameters, range(1))  # as if nothing had been tried


def test_gradsq_needs_the_batch_size_and_groups_the_same_number_of_draws() -> None:
    with pytest.raises(ValueError, match="Expected `batch_size`"):
        make(hess_approx="gradsq")
    with pytest.raises(ValueError, match="Expected `mc_samples` to be the same in all groups"):
        IVON([{"params": make_parameters()[:1]}, {"params": make_parameters()[1:], "mc_samples": 3}], **SETTINGS)


# --- beside others ---


def test_a_learning_rate_schedule_acts() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = IVON([p], lr=1.0, ess=1.0, hess_init=1.0, clip_radius=0.5, seed=0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    means = [p.detach().clone()]
    for _ in range(3):
        optimizer.train()
        p.grad = torch.full_like(p, 100.0)
        optimizer.step()
        schedule.step()
        means.append(p.detach().clone())
    torch.testing.assert_close(torch.stack(means)[:, 0], torch.tensor([1.0, 0.5, 0.25, 0.125]))


def test_accelerate_forwards_train_and_eval() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    micro_batches = torch.randn(2, 4, 3)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    wrapped, optimizer = accelerator.prepare(model, IVON(model.named_parameters(), **SETTINGS))
    for _ in range(2):
        for x in micro_batches:
            with accelerator.accumulate(wrapped):
                optimizer.train()
                accelerator.backward(wrapped(x).square().mean())
                if accelerator.sync_gradients:  # accelerate would clip each micro-batch's share as well
                    accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    optimizer.eval()
    reference = IVON(twin.named_parameters(), **SETTINGS)
    for _ in range(2):
        with reference.sampled_params(train=True):
            for x in micro_batches:
                (twin(x).square().mean() / 2).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        reference.step()
        reference.zero_grad()
    assert same(values(list(wrapped.parameters())), values(list(twin.parameters())))


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("way", ["context", "train"])
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
def test_grad_scaler(samples: int, way: str, unscale: bool) -> None:
    """The scaled loss gives the same steps, and one that overflows is skipped without a trace."""
    expected, reference = make(mc_samples=samples)
    parameters, optimizer = make(mc_samples=samples)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def backward(loss: Tensor) -> None:
        scaler.scale(loss).backward()

    for step, factor in enumerate([1.0, math.inf, 1.0, 1.0]):
        optimizer.zero_grad()
        for sample in range(samples):
            loss = make_loss(parameters, 100 * step + sample, factor)
            if way == "train":
                optimizer.train()
                backward(loss())
            else:
                with optimizer.sampled_params(train=True):
                    backward(loss())
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        reference.zero_grad()
        for sample in range(samples):
            loss = make_loss(expected, 100 * step + sample, factor)
            if way == "train":
                reference.train()
                loss().backward()
            else:
                with reference.sampled_params(train=True):
                    loss().backward()
        reference.step()
        torch.testing.assert_close(snapshot(parameters, optimizer), snapshot(expected, reference))
    assert optimizer.skipped_steps == reference.skipped_steps == 1
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def test_float16_autocast_leaves_out_a_step_that_overflows(device: str) -> None:
    x = torch.randn(64, 8, device=device)
    model = nn.Linear(8, 1).to(device)
    parameters, scaler = list(model.parameters()), torch.amp.GradScaler(device, init_scale=2.0**10)
    optimizer, losses = IVON(parameters, lr=0.2, ess=1e4, hess_init=1.0, clip_radius=math.inf, seed=0), []
    for step in range(10):
        if step in (4, 5):
            scaler.update(2.0**40 if step == 4 else 2.0**10)
        optimizer.zero_grad()
        optimizer.train()
        before = [state[name].clone() for state in optimizer.state.values() for name in STATE]
        with torch.autocast(device, torch.float16):
            out = model(x)
        assert out.dtype == torch.float16
        loss = (out.float() - x.sum(-1, keepdim=True)).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        after = [state[name].clone() for state in optimizer.state.values() for name in STATE]
        assert same(after, before) == (step == 4)
        assert same(values(parameters), [optimizer.state[p]["mean"] for p in parameters])
        assert optimizer.skipped_steps == (step >= 4)
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("_arithmetic", ["kernels", pytest.param("torch", marks=pytest.mark.slow)], indirect=True)
def test_compiled_it_gives_the_bits_of_eager() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend  # which takes seconds to import

    results, backend = [], CompileCounterWithBackend("aot_eager")
    for compiled in (False, True):
        parameters = make_parameters(shapes=[(50,)])
        optimizer = IVON(parameters, **SETTINGS)
        train, step = optimizer.train, optimizer.step
        if compiled:
            train, step = (torch.compile(what, backend=backend) for what in (train, step))
        for key in range(4):
            train()
            make_loss(parameters, key)().backward()
            step()
            optimizer.zero_grad()
        results.append(snapshot(parameters, optimizer))
    torch._dynamo.reset()
    assert backend.frame_count > 0  # else nothing was compiled
    assert same(*results)
