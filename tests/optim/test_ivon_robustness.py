"""What goes wrong around IVON leaves the mean, the state and the noise to come as they were."""

from __future__ import annotations

import copy
import math
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optim.ivon_helpers import SETTINGS, WAYS, by_closure, make, make_loss, noise_of, run, same, snapshot, values
from reference.ivon_slow import SlowIVON
from torch import nn

from varlora.optim import bucket, native
from varlora.optim.ivon import IVON

# --- exceptions ---


class Failure(BaseException):
    """Like a KeyboardInterrupt, no `Exception`."""


def fail() -> None:
    raise Failure


def in_context(optimizer: IVON) -> None:
    with optimizer.sampled_params(train=True):
        fail()


def in_evaluation(optimizer: IVON) -> None:
    with optimizer.sampled_params():
        fail()


def in_nested_evaluations(optimizer: IVON) -> None:
    with optimizer.sampled_params(), optimizer.sampled_params():
        fail()


def in_evaluation_within_context(optimizer: IVON) -> None:
    with optimizer.sampled_params(train=True), optimizer.sampled_params():
        fail()


def in_closure(optimizer: IVON) -> None:
    optimizer.step(fail)


def in_second_closure(optimizer: IVON) -> None:
    calls = iter([lambda: 0.0, fail])
    optimizer.step(lambda: next(calls)())


def under_train(optimizer: IVON) -> None:
    optimizer.train()
    try:
        fail()
    finally:
        optimizer.eval()


IN_DRAWS = [in_context, in_evaluation, in_nested_evaluations, in_evaluation_within_context, under_train]


@pytest.mark.parametrize("failing", [*IN_DRAWS, in_closure, in_second_closure])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("warm", [0, 2], ids=["at once", "after steps"])
def test_an_exception_leaves_the_mean(failing: Callable, dtype: torch.dtype, warm: int) -> None:
    parameters, optimizer = make(dtype, mc_samples=2)
    run(optimizer, parameters, range(warm), samples=2)
    before = values(parameters)
    with pytest.raises(Failure):
        failing(optimizer)
    assert same(values(parameters), before)
    run(optimizer, parameters, [5], samples=2)  # and can go on
    assert [optimizer.state[p]["step"] for p in parameters] == [warm + 1] * len(parameters)


@pytest.mark.parametrize("noise_per_rank", [False, True])
@pytest.mark.parametrize("way", ["context", "closure"])
def test_a_failed_draw_leaves_no_trace_in_the_step(way: str, noise_per_rank: bool) -> None:
    """A second draw that fails and is repeated; the noise moves on."""
    parameters, optimizer = make(mc_samples=2, noise_per_rank=noise_per_rank)
    loss = [make_loss(parameters, key) for key in range(2)]
    if way == "context":
        with optimizer.sampled_params(train=True):
            loss[0]().backward()
        first = values([p.grad for p in parameters])
        with pytest.raises(Failure):  # noqa: PT012
            with optimizer.sampled_params(train=True):
                (1e6 * loss[1]()).backward()
                fail()
        assert same([p.grad for p in parameters], first)
        with optimizer.sampled_params(train=True):
            loss[1]().backward()
        optimizer.step()
        skipped = [2]  # of the draws
    else:
        calls = iter([loss[0], fail])

        def closure() -> object:
            optimizer.zero_grad()
            value = next(calls)()
            value.backward()
            return value

        with pytest.raises(Failure):
            optimizer.step(closure)
        WAYS["closure"](optimizer, loss)
        skipped = [1, 2]
    expected, reference = make(mc_samples=2, noise_per_rank=noise_per_rank)
    numbers = [n for n in range(1, 10) if n not in skipped][:2]
    for number, key in zip(numbers, range(2)):
        reference.param_groups[0]["draws"] = number - 1
        with reference.sampled_params(train=True):
            make_loss(expected, key)().backward()
    reference.step()
    assert same(snapshot(parameters, optimizer), snapshot(expected, reference))


@pytest.mark.parametrize("way", ["train", "context", "evaluation"])
def test_an_interrupt_while_parameters_are_being_perturbed(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two buckets: one holds the draw, the other does not yet."""
    monkeypatch.setattr(bucket, "_BUCKET", 32)
    parameters, optimizer = make()
    run(optimizer, parameters, range(2))
    before = values(parameters)
    to_draw, calls = bucket.Bucket.to_draw, iter(range(99))

    def interrupted(self: bucket.Bucket, *args: Any, **settings: Any) -> None:
        to_draw(self, *args, **settings)
        if next(calls) == 1:
            fail()

    monkeypatch.setattr(bucket.Bucket, "to_draw", interrupted)
    with pytest.raises(Failure):  # noqa: PT012
        if way == "train":
            optimizer.train()
        else:
            with optimizer.sampled_params(train=way == "context"):
                pass
    optimizer.eval()
    assert same(values(parameters), before)
    run(optimizer, parameters, [3])


# --- evaluation draws ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_an_evaluation_draw_restores_what_was_there(dtype: torch.dtype) -> None:
    parameters, optimizer = make(dtype)
    run(optimizer, parameters, range(2))
    mean = values(parameters)
    with optimizer.sampled_params():
        outer = values(parameters)
        with optimizer.sampled_params():
            assert not same(values(parameters), outer)
        assert same(values(parameters), outer)
    assert same(values(parameters), mean)
    with optimizer.sampled_params():
        assert not same(values(parameters), outer)  # another draw each time
    optimizer.train()
    draw = values(parameters)
    with optimizer.sampled_params():
        assert not same(values(parameters), draw)
    assert same(values(parameters), draw)
    optimizer.eval()
    assert same(values(parameters), mean)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("samples", [1, 3])
def test_evaluation_draws_do_not_change_training(way: str, samples: int) -> None:
    results = []
    for evaluate in (False, True):
        parameters, optimizer = make(mc_samples=samples)

        def evaluated(loss: Callable, optimizer: IVON = optimizer, evaluate: bool = evaluate) -> Callable:
            def both() -> torch.Tensor:
                if evaluate:
                    with optimizer.sampled_params(), torch.no_grad():
                        loss()
                return loss()

            return both

        for step in range(3):
            losses = [make_loss(parameters, 10 * step + s) for s in range(samples)]
            WAYS[way](optimizer, [evaluated(loss) for loss in losses])
            if evaluate:
                with optimizer.sampled_params():
                    pass
        results.append(snapshot(parameters, optimizer))
    assert same(*results)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("samples", [1, 3])
def test_sampling_under_inference_mode_does_not_break_training(train: bool, samples: int) -> None:
    parameters, optimizer = make(mc_samples=samples)
    with torch.inference_mode():  # the very first draw
        if train:
            optimizer.train()
            optimizer.eval()
        else:
            with optimizer.sampled_params():
                pass
    for way in ("train", "context"):
        run(optimizer, parameters, range(2), samples, way)
        with torch.inference_mode(), optimizer.sampled_params():
            pass
    losses = [make_loss(parameters, key) for key in range(samples)]
    with torch.inference_mode():
        optimizer.posterior()
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
        by_closure(optimizer, losses)
        assert torch.is_inference_mode_enabled()
    run(optimizer, parameters, range(2), samples)
    assert not any(
        value.is_inference() for p in parameters for name, value in optimizer.state[p].items() if name != "step"
    )


# --- gradients ---


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(way: str, samples: int, bad: float) -> None:
    parameters, optimizer = make(mc_samples=samples)
    run(optimizer, parameters, range(2), samples, way)
    before = snapshot(parameters, optimizer)

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
            return grad.index_fill(0, torch.tensor([3]), bad)

    def poisoned() -> torch.Tensor:
        return make_loss([*parameters[:1], Poison.apply(parameters[1]), *parameters[2:]], 0)()

    good = [make_loss(parameters, key) for key in range(samples - 1)]
    WAYS[way](optimizer, [poisoned, *good])
    assert optimizer.skipped_steps == 1
    assert same(snapshot(parameters, optimizer), before)
    optimizer.zero_grad()
    run(optimizer, parameters, [7], samples, way)
    after = snapshot(parameters, optimizer)
    assert all(value.isfinite().all() for value in after)
    assert [optimizer.state[p]["step"] for p in parameters] == [3] * len(parameters)
    assert optimizer.skipped_steps == 1
    # the step is what it would have been with the same noise and nothing wrong before it
    expected, reference = make(mc_samples=samples)
    run(reference, expected, range(2), samples, way)
    state = reference.state_dict()
    state["param_groups"][0]["draws"] += samples
    reference.load_state_dict(state)
    run(reference, expected, [7], samples, way)
    assert same(after, snapshot(expected, reference))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_large_gradient_is_no_overflow(dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.ones(10_000, dtype=dtype))
    optimizer = IVON([p], **SETTINGS)
    optimizer.train()
    p.grad = torch.full_like(p, 3e4)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert (optimizer.state[p]["mean"] != 1).all()


@pytest.mark.parametrize("approx", ["price", "gradsq"])
@pytest.mark.parametrize(("way", "samples"), [("context", 1), ("context", 3), ("train", 1), ("train", 3)])
def test_clipping_acts_on_mean_and_hessian(way: str, samples: int, approx: str) -> None:
    settings = SETTINGS | {"hess_approx": approx, "batch_size": 2}
    # under `train` the draws share the step's examples
    sharing = {"batch_size": 2 * samples} if way == "train" else {}
    parameters, optimizer = make(torch.float64, mc_samples=samples, **(settings | sharing))
    twin = SlowIVON(
        {str(i): p.detach() for i, p in enumerate(parameters)}, **{k: v for k, v in settings.items() if k != "seed"}
    )
    for step in range(5):
        optimizer.zero_grad()
        gradients, noises = [], []
        for sample in range(samples):
            loss = make_loss(parameters, 10 * step + sample)
            if way == "train":
                optimizer.train()
                gradients.append(torch.autograd.grad(loss(), parameters))
                (loss() / samples).backward()
            else:
                with optimizer.sampled_params(train=True):
                    gradients.append(torch.autograd.grad(loss(), parameters))
                    loss().backward()
            noises.append(noise_of(optimizer))
        norm = nn.utils.clip_grad_norm_(parameters, 2.0)
        assert norm > 4
        optimizer.step()
        clipped = [{str(i): g * 2 / (norm + 1e-6) for i, g in enumerate(gradient)} for gradient in gradients]
        twin.step(clipped, [{str(i): eps for i, eps in enumerate(noise)} for noise in noises])
        for i, p in enumerate(parameters):
            torch.testing.assert_close(p.detach(), twin.m[str(i)], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(optimizer.state[p]["hess"], twin.h[str(i)], rtol=1e-10, atol=1e-12)


# --- weights from elsewhere ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("when", ["between steps", "before the first", "between context and step"])
def test_weights_loaded_from_outside_become_the_mean(dtype: torch.dtype, when: str) -> None:
    parameters, optimizer = make(dtype)
    if when != "before the first":
        run(optimizer, parameters, range(2))
    loaded = [torch.full_like(p, 0.3) for p in parameters]
    if when == "between context and step":
        optimizer.zero_grad()
        with optimizer.sampled_params(train=True):
            pass
    with torch.no_grad():
        for p, value in zip(parameters, loaded):
            p.copy_(value)
    if when == "between context and step":
        optimizer.step()
    optimizer.train()
    optimizer.eval()
    assert same(values(parameters), loaded)
    for p, value in zip(parameters, loaded):
        assert torch.equal(optimizer.state[p]["mean"], value.float())


def test_weights_that_are_the_rounded_mean_keep_its_lower_bits() -> None:
    """A trainer loads its own checkpoint, in which a bfloat16 weight is less than the mean."""
    parameters, optimizer = make(torch.bfloat16)
    run(optimizer, parameters, range(2))
    mean = [optimizer.state[p]["mean"].clone() for p in parameters]
    assert not torch.equal(mean[0], parameters[0].float())
    with torch.no_grad():
        for p in parameters:
            p.copy_(p.clone())
    optimizer.train()
    optimizer.eval()
    assert same([optimizer.state[p]["mean"] for p in parameters], mean)


WIDER = [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.float16), (torch.float16, torch.float64)]


@pytest.mark.parametrize("looked_at", [False, True], ids=["", "looked at"])
@pytest.mark.parametrize(("before", "after"), WIDER, ids=str)
def test_a_wider_type_keeps_the_lower_bits_of_the_mean(
    before: torch.dtype, after: torch.dtype, looked_at: bool
) -> None:
    """The weights are rounded to the type that they had, which is not what others wrote."""
    parameters, optimizer = make(before)
    run(optimizer, parameters, range(2))
    mean = [optimizer.state[p]["mean"].clone() for p in parameters]
    for p in parameters:
        p.data = p.data.to(after)
    if looked_at:
        optimizer.state_dict()
    optimizer.train()
    optimizer.eval()
    assert same([optimizer.state[p]["mean"].float() for p in parameters], mean)
    assert same(values(parameters), [value.to(after) for value in mean])


def test_weights_loaded_after_a_change_of_type_become_the_mean() -> None:
    parameters, optimizer = make(torch.float16)
    run(optimizer, parameters, range(2))
    for p in parameters:
        p.data = torch.full_like(p, 0.3, dtype=torch.float32)
    optimizer.train()
    optimizer.eval()
    assert all((optimizer.state[p]["mean"] == torch.tensor(0.3)).all() for p in parameters)


def test_weights_loaded_before_a_group_is_added_become_the_mean() -> None:
    parameters, optimizer = make()
    run(optimizer, parameters, range(2))
    with torch.no_grad():
        parameters[0].fill_(0.3)
    optimizer.add_param_group({"params": [("extra", nn.Parameter(torch.ones(2)))]})
    optimizer.train()
    optimizer.eval()
    assert (parameters[0] == 0.3).all()


def copied(parameters: list[Any], optimizer: IVON) -> tuple[list[Any], IVON]:
    return copy.deepcopy((parameters, optimizer))


def unpickled(parameters: list[Any], optimizer: IVON) -> tuple[list[Any], IVON]:
    return pickle.loads(pickle.dumps((parameters, optimizer)))


def frozen(parameters: list[Any], optimizer: IVON) -> tuple[list[Any], IVON]:
    """All but the first."""
    for p in parameters[1:]:
        p.requires_grad_(False)
    run(optimizer, parameters[:1], [5])
    return parameters, optimizer


def resumed(parameters: list[Any], optimizer: IVON) -> tuple[list[Any], IVON]:
    """While all are frozen: of these `load_state_dict` restores the state only."""
    for p in parameters:
        p.requires_grad_(False)
    optimizer.load_state_dict(optimizer.state_dict())
    return parameters, optimizer


WITHOUT_BUCKETS = [copied, unpickled, frozen, resumed, lambda *made: copied(*frozen(*made))]


@pytest.mark.parametrize("then", ["train", "sampled_params", "posterior", "state_dict"])
@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("how", WITHOUT_BUCKETS)
def test_weights_loaded_into_a_copy_or_a_frozen_parameter_become_the_mean(
    how: Callable, dtype: torch.dtype, loaded: bool, then: str
) -> None:
    parameters, optimizer = make(dtype)
    run(optimizer, parameters, range(2))
    parameters, optimizer = how(parameters, optimizer)
    mean = [optimizer.state[p]["mean"].clone() for p in parameters]
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.full_like(p, 0.3) if loaded else p.clone())
    wanted = [p.float() if loaded else value for p, value in zip(values(parameters), mean)]
    if then == "state_dict":
        assert same([state["mean"] for state in optimizer.state_dict()["state"].values()], wanted)
    for p in parameters:
        p.requires_grad_(True)
    if then == "train":
        optimizer.train()
        optimizer.eval()
    elif then == "sampled_params":
        with optimizer.sampled_params():
            pass
    elif then == "posterior":
        assert same(list(optimizer.posterior().mean.values()), wanted)
    assert same(values(parameters), [value.to(dtype) for value in wanted])
    assert same([optimizer.state[p]["mean"] for p in parameters], wanted)


def test_what_a_frozen_parameter_adopts_is_not_written_into_the_state_that_was_loaded() -> None:
    parameters, optimizer = make()
    run(optimizer, parameters, range(2))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    resumed(parameters, optimizer)
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        parameters[0].fill_(0.3)
    optimizer.state_dict()
    assert same([s["mean"] for s in saved["state"].values()], [s["mean"] for s in kept["state"].values()])


@pytest.mark.parametrize("load_first", ["optimizer", "model"])
@pytest.mark.parametrize("in_flight", [False, True])
def test_rounded_weights_and_their_state_come_back_in_either_order_while_some_are_frozen(
    load_first: str, in_flight: bool
) -> None:
    """Also one from the middle of a draw, which the weights hold then."""
    source, optimizer = make(torch.bfloat16)
    run(optimizer, source, range(2))
    mean = [optimizer.state[p]["mean"].clone() for p in source]
    if in_flight:
        optimizer.train()
    weights, saved = values(source), optimizer.state_dict()
    fresh, other = make(torch.bfloat16, seed=9)
    run(other, fresh, range(1))
    if not in_flight:
        fresh[0].requires_grad_(False)
    if load_first == "optimizer":
        other.load_state_dict(saved)
    with torch.no_grad():
        for p, value in zip(fresh, weights):
            p.copy_(value)
    if load_first == "model":
        other.load_state_dict(saved)
    fresh[0].requires_grad_(True)
    other.train()
    other.eval()
    assert same([other.state[p]["mean"] for p in fresh], mean)


@pytest.mark.parametrize("copying", [copied, unpickled])
def test_a_copy_made_within_an_evaluation_draw_has_the_mean(copying: Callable) -> None:
    parameters, optimizer = make()
    run(optimizer, parameters, range(2))
    before = values(parameters)
    with optimizer.sampled_params():
        others, other = copying(parameters, optimizer)
    other.train()
    other.eval()
    assert same(values(others), before)


@pytest.mark.parametrize("when", ["between steps", "during a draw"])
def test_a_parameter_that_is_laid_out_anew_is_written_to_as_it_lies(when: str) -> None:
    """Every other number of a memory that has others in between."""
    found = []
    for spread in (False, True):
        p = nn.Parameter(torch.arange(200.0))
        optimizer = IVON([p], lr=0.1, ess=10.0, hess_init=1.0, seed=0)
        memory = torch.full((400,), 7.0)
        for step in range(3):
            if when == "during a draw":
                optimizer.train()
            if step == 1 and spread:
                memory[::2] = p.detach()
                p.data = memory[::2]
            optimizer.train()
            p.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert (memory[1::2] == 7).all()
        found.append(snapshot([p], optimizer))
    torch.testing.assert_close(*found)  # not the same bits: a GPU's kernels leave such a parameter to torch


# --- the folder alone ---

ALONE = """
import sys
sys.modules["varlora"] = None  # importing it fails
sys.path.insert(0, sys.argv[1])
import math, torch
from borrowed import IVON
model = torch.nn.Linear(3, 1)
optimizer = IVON(model.parameters(), lr=0.1, ess=1000, hess_init=1.0, clip_radius=math.inf)
x = torch.randn(64, 3)
losses = []
for _ in range(100):
    with optimizer.sampled_params(train=True):
        loss = (model(x) - x.sum(-1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.1 * losses[0], losses
"""


def test_a_copy_of_the_folder_works_without_the_package(tmp_path: Path) -> None:
    kept = None if native.library() else shutil.ignore_patterns("_native.*")
    shutil.copytree(Path(bucket.__file__).parent, tmp_path / "borrowed", ignore=kept)
    subprocess.run([sys.executable, "-c", ALONE, str(tmp_path)], check=True, cwd=tmp_path)
