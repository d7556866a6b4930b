"""IVON against its slow twin, and against what Bayes' rule gives in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim.ivon_helpers import (
    SETTINGS,
    assert_kernels_in_use,
    make,
    make_parameters,
    noise_of,
    run,
    same,
    snapshot,
    values,
)
from reference.ivon_slow import SlowIVON
from torch import Tensor, nn

from varlora.optim import bucket
from varlora.optim.ivon import IVON

TWIN = {"lr", "ess", "hess_init", "beta1", "beta2", "weight_decay", "clip_radius", "hess_approx", "batch_size"}
TWIN |= {"rescale_lr", "debias"}
CASES = [
    {"hess_approx": approx, "batch_size": 4, "weight_decay": decay, "mc_samples": samples, "debias": debias}
    | {"rescale_lr": debias != (samples == 3)}
    for approx in ("price", "gradsq")
    for decay in (0.0, 0.3)
    for samples in (1, 3)
    for debias in (True, False)
]


def gradient_of(name: str, theta: Tensor, x: Tensor) -> Tensor:
    """Of the loss Σ ½ (1 + i/2)(θ − x)² + sin θ."""
    return (1 + int(name) / 2) * (theta - x) + theta.cos()


def assert_near(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """The error of all parameters together, relative to their scale."""
    error = math.sqrt(sum((got[n].detach().double() - want[n]).square().sum() for n in want))
    scale = math.sqrt(sum(want[n].square().sum() for n in want))
    assert error <= tolerance * scale, f"{error / scale:.1e} of the scale"


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
@pytest.mark.parametrize(
    ("dtype", "tolerance", "steps"), [(torch.float32, 1e-6, 100), (torch.float64, 1e-12, 30)], ids=["f32", "f64"]
)
def test_equals_the_slow_twin_step_by_step(case: dict, dtype: torch.dtype, tolerance: float, steps: int) -> None:
    """Two groups with settings of their own; some parameters get no gradient in some steps."""
    parameters = {str(i): p for i, p in enumerate(make_parameters(dtype))}
    other = {"lr": 0.02, "ess": 300.0, "hess_init": 2.0, "beta1": 0.8, "beta2": 0.99, "clip_radius": math.inf}
    split = {"012": SETTINGS | {"beta1": 0.9} | case, "34": SETTINGS | {"beta1": 0.9} | case | other}
    groups = [{"params": [(n, parameters[n]) for n in names]} | settings for names, settings in split.items()]
    optimizer = IVON(groups, **SETTINGS)
    twins = [
        SlowIVON({n: parameters[n].detach().double() for n in names}, **{key: settings[key] for key in TWIN})
        for names, settings in split.items()
    ]
    source = torch.Generator().manual_seed(1)
    for _ in range(steps):
        present = [n for n in parameters if torch.rand((), generator=source) < 0.8]
        draws: list[tuple[dict, dict]] = []  # gradients and noise
        for _ in range(case["mc_samples"]):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                for n in present:
                    x = torch.randn(parameters[n].shape, generator=source, dtype=dtype)
                    parameters[n].grad = gradient_of(n, parameters[n].detach(), x)
                gradients = {n: parameters[n].grad.double().clone() for n in present}
                noise = {n: x.double() for n, x in zip(parameters, noise_of(optimizer))}
                for twin in twins:
                    assert_near(parameters, twin.draw(noise), tolerance)
                draws.append((gradients, noise))
        optimizer.step()
        for twin in twins:
            own = [({n: grad for n, grad in grads.items() if n in twin.m}, noise) for grads, noise in draws]
            twin.step(*zip(*own))
            states = {n: optimizer.state[parameters[n]] for n in twin.m}
            assert {n: state["step"] for n, state in states.items()} == twin.t
            assert all(torch.equal(parameters[n], state["mean"]) for n, state in states.items())
            for name, want in (("mean", twin.m), ("momentum", twin.g), ("hess", twin.h)):
                assert_near({n: state[name] for n, state in states.items()}, want, tolerance)
                assert all(state[name].dtype == dtype for state in states.values())


@pytest.mark.parametrize("samples", [1, 3])
def test_chunks_do_not_change_a_bit(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for size in (1 << 20, 64, 1):
        monkeypatch.setattr(bucket, "_CHUNK", size)
        monkeypatch.setattr(bucket, "_BUCKET", 2 * size)
        parameters, optimizer = make(mc_samples=samples, weight_decay=0.1)
        run(optimizer, parameters, range(5), samples)
        with optimizer.sampled_params():
            drawn = values(parameters)
        results.append(drawn + snapshot(parameters, optimizer))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


# --- Bayes' rule ---


@pytest.mark.parametrize("batch", [None, 8], ids=["full batch", "mini-batches"])
def test_linear_regression_reaches_the_mean_field_posterior(batch: int | None, device: str) -> None:
    """256 runs side by side, the rows of one parameter: the average shows a bias of a fraction of a per cent."""
    runs, n, d, precision, steps = 256, 64, 4, 5.0, 3000
    source = torch.Generator().manual_seed(0)
    mixing = torch.eye(d) + 0.4 * torch.randn(d, d, generator=source)
    x = torch.randn(n, d, generator=source) @ mixing
    y = x @ torch.tensor([1.0, -1.5, 2.0, 0.8]) + torch.randn(n, generator=source)
    exact = x.T @ x + precision * torch.eye(d)  # the posterior's precision, unit noise
    want_mean, want_var = torch.linalg.solve(exact, x.T @ y), 1 / exact.diagonal()

    w = nn.Parameter(torch.zeros(runs, d, device=device))
    settings = {"ess": n, "weight_decay": precision / n, "hess_init": 3.0, "clip_radius": math.inf}
    optimizer = IVON([("w", w)], lr=0.05, seed=0, **settings)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for t in range(steps):
        optimizer.param_groups[0]["beta2"] = 1 - 1 / (100 + t / 3)  # forgets where it came from
        rows = torch.arange(n) if batch is None else torch.randint(n, (runs, batch), generator=source)
        optimizer.train()
        error = y[rows] - (x[rows] * w.detach().cpu()[:, None]).sum(-1)  # (R, B)
        w.grad = -(error[..., None] * x[rows]).mean(1).to(device)  # of ½ mean error², for each run
        optimizer.step()
        schedule.step()
    assert_kernels_in_use(optimizer)
    posterior = optimizer.posterior()
    mean, var = posterior.mean["w"].cpu(), posterior.std["w"].cpu().square()
    torch.testing.assert_close(mean.mean(0), want_mean, rtol=0.02, atol=0)
    torch.testing.assert_close(var.mean(0), want_var, rtol=0.02, atol=0)
    assert ((mean - want_mean) / want_var.sqrt()).square().mean() < 0.02  # each run, in units of the posterior
    assert (var / want_var - 1).square().mean().sqrt() < 0.1


# --- the curvature estimators ---

BETA2 = 0.999
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])  # kernels are for f32


def curvature(
    theta: Tensor,
    gradient: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    device: str,
    ess: float = 4.0,
    **settings: Any,
) -> Tensor:
    """Return ĥ of a step from h = 1, solved from the new Hessian: (R, d), float64 and on the CPU, as `gradient` is.

    `ess` is so small that ĥ > −h/(1 − β₂) for sure, where the root is the right one.
    """
    p = nn.Parameter(theta.to(device, dtype, copy=True))
    optimizer = IVON([p], lr=0.0, ess=ess, hess_init=1.0, beta2=BETA2, seed=0, **settings)
    optimizer.train()
    p.grad = gradient(p.detach().cpu().double()).to(device, dtype)
    optimizer.step()
    assert_kernels_in_use(optimizer)
    # h' = h (1 + u + ½u²) with u = (1 − β₂)(ĥ − h)/h
    u = (2 * optimizer.state[p]["hess"].cpu().double() - 1).sqrt() - 1
    return 1 + u / (1 - BETA2)


def assert_unbiased(estimates: Tensor, want: Tensor, precision: float) -> None:
    """The rows' average is the truth, within 4 standard errors that are small themselves."""
    error = estimates.std(0) / math.sqrt(len(estimates))
    assert (error / want).max() < precision
    assert ((estimates.mean(0) - want) / error).abs().max() < 4


@dtypes
@pytest.mark.parametrize("batch", [1, 4])
def test_price_is_unbiased_on_any_quadratic(batch: int, dtype: torch.dtype, device: str) -> None:
    """Far from the optimum, with examples that have nothing to do with each other, in mini-batches."""
    n, d, runs = 50, 3, 100_000
    source = torch.Generator().manual_seed(0)
    root = torch.randn(n, d, d, generator=source, dtype=torch.float64)
    a, b = root @ root.mT, torch.randn(n, d, generator=source, dtype=torch.float64)

    def gradient(theta: Tensor) -> Tensor:
        rows = torch.randint(n, (runs, batch), generator=source)
        return (torch.einsum("rbij,rj->rbi", a[rows], theta) - b[rows]).mean(1)

    estimates = curvature(torch.tensor([1.0, -2.0, 0.5]).expand(runs, d), gradient, dtype, device)
    assert_unbiased(estimates, a.mean(0).diagonal(), precision=0.02)


@dtypes
@pytest.mark.parametrize("likelihood", ["logistic", "gaussian"])
@pytest.mark.parametrize("batch", [4, 32])
def test_gradsq_is_unbiased_on_a_well_specified_model_whatever_the_batch(
    likelihood: str, batch: int, dtype: torch.dtype, device: str
) -> None:
    n, d, runs = 200, 3, 30_000
    source = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=source, dtype=torch.float64)
    w = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    p = torch.sigmoid(x @ w)

    def gradient(theta: Tensor) -> Tensor:
        rows = torch.randint(n, (runs, batch), generator=source)
        logits = torch.einsum("rbi,ri->rb", x[rows], theta)
        if likelihood == "logistic":
            labels = torch.rand(runs, batch, generator=source, dtype=torch.float64) < p[rows]
            error = logits.sigmoid() - labels.double()
        else:
            error = logits - (x @ w)[rows] - torch.randn(runs, batch, generator=source, dtype=torch.float64)
        return (error[..., None] * x[rows]).mean(1)

    weight = p * (1 - p) if likelihood == "logistic" else torch.ones(n)
    hessian = (weight[:, None] * x.square()).mean(0)
    # at the optimum: the posterior is made so narrow that draws stay there
    settings: dict[str, Any] = {"hess_approx": "gradsq", "batch_size": batch, "ess": 1e12}
    assert_unbiased(curvature(w.expand(runs, d), gradient, dtype, device, **settings), hessian, precision=0.02)


@dtypes
def test_gradsq_is_scaled_by_the_batch_size_and_not_by_ess(dtype: torch.dtype, device: str) -> None:
    """ivon-opt multiplies by λ, which is too much by about λ over the batch size."""

    def estimate(batch_size: int, ess: float) -> Tensor:
        settings: dict[str, Any] = {"hess_approx": "gradsq", "batch_size": batch_size, "ess": ess}
        return curvature(torch.zeros(5, 1), lambda theta: torch.full_like(theta, 0.3), dtype, device, **settings)

    rounding = torch.finfo(dtype).eps / (1 - BETA2)  # half of ε for each of two sums that make h', which is about 1
    for batch_size in (4, 8):
        want = torch.full((5, 1), batch_size * 0.09).double()
        torch.testing.assert_close(estimate(batch_size, 10.0), want, rtol=1e-6, atol=rounding)
    assert torch.equal(estimate(4, 10.0), estimate(4, 1e6))


@dtypes
def test_price_does_not_depend_on_how_the_loss_is_batched(dtype: torch.dtype, device: str) -> None:
    """On an exact quadratic the estimate is that of the mean loss: there is no batch size in it."""
    h = torch.tensor([[0.5, 3.0]], dtype=torch.float64)
    estimates = curvature(torch.zeros(100_000, 2), lambda theta: h * theta, dtype, device)
    assert_unbiased(estimates, h[0], precision=0.01)
