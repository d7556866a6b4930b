"""BLoB: its divergence, step, noise and storage, each against something independent."""

from __future__ import annotations

import math
from typing import Any

import helpers
import pytest
import torch
from torch import Tensor, nn

import varlora.methods.blob
from varlora.checkpoint import load_state, save_state
from varlora.errors import VarloraError
from varlora.fit import check_method
from varlora.methods import Plan, Trained
from varlora.methods.blob import Blob, _kl, _kl_gradient, _kl_weight
from varlora.params import trainable

A, B = "layer.lora_A.default.weight", "layer.lora_B.default.weight"


class Adapter(nn.Module):
    """One adapted layer without its base: x Aᵀ Bᵀ."""

    def __init__(self, dtype: torch.dtype = torch.float32, d_in: int = 5, rank: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Module()
        for name, shape in (("lora_A", (rank, d_in)), ("lora_B", (2, rank))):
            linear = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
            linear.weight.data.copy_(torch.randn(shape, generator=generator))
            setattr(self.layer, name, nn.ModuleDict({"default": linear}))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.lora_B["default"](self.layer.lora_A["default"](x))


def made(method: Blob, model: nn.Module | None = None, batch_size: int = 4, seed: int = 0):
    model = model or Adapter()
    return model.train(), method.optimizer(trainable(model), 12, batch_size, seed)


def data(rows: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(rows, 6, 5, generator=generator), torch.randn(rows, 6, 2, generator=generator)
    return x.to(dtype), y.to(dtype)


def nll(output: Tensor, y: Tensor) -> Tensor:
    return (output - y).square().sum() / 24


def backward(
    model: nn.Module, optimizer: Any, dtype: torch.dtype = torch.float32, cuts: tuple[int, ...] = (4,)
) -> None:
    """Add up the gradients of a step that is cut into micro-batches."""
    x, y = data(dtype=dtype)
    for part, target in zip(x.split(cuts), y.split(cuts)):
        optimizer.train()
        nll(model(part), target).backward()


def steps(method: Blob, model: nn.Module, optimizer: Any, count: int, **settings: Any) -> None:
    with method.training(model, optimizer):
        for _ in range(count):
            backward(model, optimizer, **settings)
            optimizer.step()
            model.zero_grad()


def everything(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Return copies of all that a step may change."""
    state = {f"{i}.{key}": value for i, mine in enumerate(optimizer.state.values()) for key, value in mine.items()}
    G = {f"G.{name}": value.detach() for name, value in optimizer.G.items()}
    count = {"steps": torch.tensor(optimizer.param_groups[0]["steps"])}
    return {name: value.clone() for name, value in {**state, **G, **count, **helpers.bits(model)}.items()}


# --- the divergence ---


def test_kl_and_its_gradient_are_those_of_the_two_gaussians():
    generator = torch.Generator().manual_seed(0)
    M = torch.randn(3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    G = torch.empty(3, 5, dtype=torch.float64).uniform_(0.1, 0.6, generator=generator)
    G = (G * torch.randn(3, 5, generator=generator).sign()).requires_grad_()
    q, p = torch.distributions.Normal(M, G.square()), torch.distributions.Normal(torch.zeros(3, 5), 0.2)
    expected = torch.distributions.kl_divergence(q, p).sum()
    torch.testing.assert_close(_kl(M, G, 0.2), expected, rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(expected, (M, G))
    torch.testing.assert_close(_kl_gradient(M, G, 0.2), gradients, rtol=1e-3, atol=1e-5)


def test_kl_gradient_is_finite_where_g_passes_through_zero():
    M, G = torch.zeros(3), torch.tensor([-1e-5, 0.0, 1e-5], requires_grad=True)
    (expected,) = torch.autograd.grad(_kl(M, G, 0.2), G)
    torch.testing.assert_close(_kl_gradient(M, G, 0.2)[1], expected)
    assert expected.isfinite().all()


@pytest.mark.parametrize("cycle", [1, 2, 7, 60])
def test_kl_weights_are_those_of_the_papers_formula(cycle):
    weights = [_kl_weight(step, cycle) for step in range(2 * cycle)]
    assert weights[:cycle] == pytest.approx([2**i / (2 ** (cycle + 1) - 1) for i in range(1, cycle + 1)])
    assert weights[cycle:] == weights[:cycle]


def test_a_cycle_as_long_as_the_authors():
    """At batch size 4: rows, and steps, from their code's formula; also one too long for 2ᶜ to be a float."""
    for rows, cycle in ((640, 316), (1000, 376), (2258, 518), (9427, 909), (40398, 1609)):
        optimizer = Blob().optimizer(trainable(Adapter()), rows, 4, 0)
        assert optimizer.cycle == pytest.approx(cycle, abs=1)
        assert 0 <= _kl_weight(0, cycle) < _kl_weight(cycle - 1, cycle) == pytest.approx(0.5)


# --- a step ---


class Twin:
    """BLoB as the authors' code runs it, on autograd: one optimizer for the NLL, then one for the weighted KL."""

    def __init__(self, method: Blob, params: dict[str, Tensor], G: Tensor, cycle: int) -> None:
        self.M, self.B, self.G = (value.detach().clone().requires_grad_() for value in (params[A], params[B], G))
        self.opt1 = torch.optim.AdamW(
            [self.M, self.B], lr=method.lr, eps=method.eps, weight_decay=method.weight_decay, betas=(0.9, 0.999)
        )
        self.opt2 = torch.optim.SGD([self.M, self.B, self.G], lr=method.kl_lr)
        self.prior_std, self.cycle, self.i = method.prior_std, cycle, 1

    def step(self, E: Tensor, s: Tensor, t: Tensor) -> None:
        x, y = data()
        noise = torch.einsum("bti,bi,oi,bo->bto", x, s, self.G**2 * E, t)
        nll((x @ self.M.T + noise) @ self.B.T, y).backward()
        self.opt1.step()
        self.opt1.zero_grad()
        q, p = torch.distributions.Normal(self.M, self.G**2), torch.distributions.Normal(0.0, self.prior_std)
        i = self.cycle if self.i % self.cycle == 0 else self.i % self.cycle
        (torch.distributions.kl_divergence(q, p).sum() * 2**i / (2 ** (self.cycle + 1) - 1)).backward()
        self.opt2.step()
        self.opt2.zero_grad()
        self.i += 1


@pytest.mark.parametrize("cuts", [(4,), (2, 2), (1, 2, 1)], ids=str)
def test_steps_are_the_slow_twins(cuts):
    """Four steps, in which the KL's weight goes up and starts again; also of micro-batches."""
    method = Blob(lr=1e-2, kl_lr=0.02, sigma_init=0.5, weight_decay=0.1)
    model, optimizer = made(method)
    optimizer.cycle = 3
    twin = Twin(method, helpers.bits(model), optimizer.G[A], optimizer.cycle)
    with method.training(model, optimizer):
        for _ in range(4):
            backward(model, optimizer, cuts=cuts)
            E, signs = optimizer.drawn[A]
            twin.step(E, signs[:, :5].float(), signs[:, 5:].float())
            optimizer.step()
            model.zero_grad()
            for value, expected in ((optimizer.G[A], twin.G), (model.get_parameter(A), twin.M)):
                torch.testing.assert_close(value.detach(), expected.detach(), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(model.get_parameter(B), twin.B, rtol=1e-4, atol=1e-6, check_stride=False)


def test_both_learning_rates_follow_the_schedule():
    _, optimizer = made(Blob())
    schedule = Blob().schedule(optimizer, 100)
    factors = []
    for _ in range(100):
        factors.append([group["lr"] / lr for group, lr in zip(optimizer.param_groups, (1e-4, 0.01))])
        optimizer.step()
        schedule.step()
    assert factors == [
        pytest.approx([factor] * 2) for factor in (step / 6 if step < 6 else (100 - step) / 94 for step in range(100))
    ]


def test_a_step_without_gradients_changes_nothing():
    """As `fit` leaves out a step that is not finite; the next one is as if it had not been."""
    method = Blob(kl_lr=0.1)
    (model, optimizer), (other, untouched) = made(method), made(method)
    steps(method, model, optimizer, 2)
    steps(method, other, untouched, 2)
    before = everything(model, optimizer)
    with method.training(model, optimizer):
        backward(model, optimizer, cuts=(2, 2))
        assert optimizer.G[A].grad is not None
        model.zero_grad()
        optimizer.step()
    assert optimizer.G[A].grad is None
    assert helpers.same(everything(model, optimizer), before)
    steps(method, model, optimizer, 1)
    steps(method, other, untouched, 1)
    assert helpers.same(everything(model, optimizer), everything(other, untouched))


def test_a_grad_scaler_scales_g_and_can_leave_a_step_out():
    method = Blob(lr=1e-2, kl_lr=0.1, sigma_init=0.5)
    (model, optimizer), (other, plain) = made(method), made(method)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    x, y = data()
    with method.training(model, optimizer):
        for factor in (math.inf, 1.0):
            optimizer.train()
            scaler.scale(nll(model(x), y) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            model.zero_grad()
    steps(method, other, plain, 1)
    one, two = everything(model, optimizer), everything(other, plain)
    assert one["steps"] == 1
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-7)


# --- noise ---


def test_flipout_is_plain_reparametrised_noise_for_each_row():
    """Over many steps: the mean is the mean path, a row's variance Σ σ²x², and rows are uncorrelated."""
    method = Blob(sigma_init=0.5)
    model, optimizer = made(method)
    x = data()[0]
    lora_A = model.layer.lora_A["default"]
    mean, draws = lora_A(x).detach(), []
    with method.training(model, optimizer), torch.no_grad():
        for step in range(20_000):
            optimizer.param_groups[0]["steps"] = step
            optimizer._begin()
            draws.append(lora_A(x) - mean)
    noise = torch.stack(draws)  # (S, B, T, rank)
    variance = x.square() @ optimizer.G[A].detach().pow(4).T  # (B, T, rank)
    assert (noise.mean(0) / (variance / len(noise)).sqrt()).abs().max() < 5
    torch.testing.assert_close(noise.square().mean(0), variance, rtol=0.08, atol=0)
    across = (noise[:, 0] * noise[:, 1]).mean(0) / (variance[0] * variance[1]).sqrt()
    assert across.abs().max() < 5 / math.sqrt(len(noise))


def test_noise_depends_on_seed_step_and_row_alone():
    method = Blob(sigma_init=0.5)
    x = data()[0]

    def noise(seed: int, step: int, cuts: tuple[int, ...]) -> Tensor:
        model, optimizer = made(method, seed=seed)
        optimizer.G[A].data.fill_(0.5)
        optimizer.param_groups[0]["steps"] = step
        parts = []
        with method.training(model, optimizer):
            for part in x.split(cuts):
                optimizer.train()
                parts.append(model(part) - model.layer.lora_B["default"](part @ model.get_parameter(A).T))
                parts[-1].sum().backward()
        return torch.cat(parts).detach()

    expected = noise(0, 0, (4,))
    for cuts in ((1, 1, 1, 1), (2, 2), (3, 1)):
        torch.testing.assert_close(noise(0, 0, cuts), expected)
    assert not torch.allclose(noise(0, 1, (4,)), expected)
    assert not torch.allclose(noise(1, 0, (4,)), expected)


def test_eval_mode_adds_nothing_and_the_hooks_go():
    method = Blob(sigma_init=0.5)
    model, optimizer = made(method)
    x = data()[0]
    expected = model(x)
    with method.training(model, optimizer):
        assert not torch.equal(model(x), expected)
        assert torch.equal(model.eval()(x), expected)
        model.train()
    assert torch.equal(model(x), expected)
    with pytest.raises(ZeroDivisionError), method.training(model, optimizer):
        raise ZeroDivisionError
    assert torch.equal(model(x), expected)
    assert not any(module._forward_hooks for module in model.modules())


def test_gradient_checkpointing_runs_the_same_pass_again(tmp_path):
    method = Blob(lr=1e-2, sigma_init=0.5)
    models = {}
    for use in (False, True):
        model = models[use] = helpers.tiny_model()
        arguments = {"gradient_checkpointing": use}
        helpers.run_fit(model, method, tmp_path / str(use), batch_size=2, accumulation=2, training_arguments=arguments)
    for name, value in helpers.bits(models[True]).items():
        torch.testing.assert_close(value, helpers.bits(models[False])[name], rtol=1e-4, atol=1e-6)


# --- storage and results ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumed_ends_in_the_same_bits(dtype, tmp_path):
    method = Blob(lr=1e-3, kl_lr=0.1, gamma=100.0)
    whole, optimizer = made(method, Adapter(dtype))
    steps(method, whole, optimizer, 3, dtype=dtype)
    save_state(tmp_path, "optimizer", optimizer.state_dict())
    weights = helpers.bits(whole)
    steps(method, whole, optimizer, 3, dtype=dtype)
    resumed, other = made(method, Adapter(dtype))
    resumed.load_state_dict(weights)
    other.load_state_dict(load_state(tmp_path, "optimizer"))
    steps(method, resumed, other, 3, dtype=dtype)
    assert helpers.same(everything(resumed, other), everything(whole, optimizer))
    assert all(value.dtype == torch.float32 for state in other.state.values() for value in state.values())
    assert other.G[A].requires_grad


def test_small_updates_count_in_bfloat16():
    method = Blob(lr=1e-5)
    model, optimizer = made(method, Adapter(torch.bfloat16))
    before = {name: optimizer.mean(name).clone() for name in (A, B)}
    steps(method, model, optimizer, 3, dtype=torch.bfloat16)
    for name, value in before.items():
        assert (optimizer.mean(name) != value).all()
        assert torch.equal(model.get_parameter(name), optimizer.mean(name).bfloat16())


def test_posterior_and_log_are_read_from_the_optimizer():
    method = Blob()
    model, optimizer = made(method)
    steps(method, model, optimizer, 2)
    posterior, logged = (
        method.posterior(Trained(model, rows=(), draw=None, forward=None, optimizer=optimizer)),
        method.log(optimizer, {}),
    )
    sigma = optimizer.G[A].detach().square()
    assert helpers.same(posterior.mean, helpers.bits(model))
    assert helpers.same(posterior.std, {A: sigma, B: torch.zeros(2, 3)})
    assert logged["sigma"] == pytest.approx(sigma.mean().item())
    assert logged["kl"] == pytest.approx(_kl(model.get_parameter(A), sigma.sqrt(), 0.2).item())
    posterior.mean[A].zero_()
    posterior.std[A].zero_()
    assert model.get_parameter(A).abs().sum() > 0
    assert optimizer.G[A].abs().sum() > 0


def test_several_processes_are_refused(monkeypatch):
    """G belongs to the optimizer, and DDP does not average its gradient."""
    monkeypatch.setattr(varlora.methods.blob, "ranks", lambda: (0, 2))
    with pytest.raises(VarloraError, match=r"one process for `blob`.* but 2 train together"):
        made(Blob())


def test_learns_twelve_rows_by_heart(tmp_path):
    helpers.run_fit(helpers.tiny_model(), Blob(lr=2e-2, gamma=100.0), tmp_path, steps=60)
    lines = helpers.logged(tmp_path)
    assert lines[-1]["loss"] < 0.2 * lines[0]["loss"]
    assert lines[-1]["sigma"] > 5 * lines[0]["sigma"]  # the prior's pull, at the ends of two cycles
    assert lines[-1]["kl"] < 0.5 * lines[0]["kl"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "Expected `lr` to be a learning rate >= 0, but got -1.0. Set e.g. `method.lr=0.0001`."),
        ({"kl_lr": math.nan}, "Expected `kl_lr` to be a learning rate >= 0, but got nan."),
        ({"prior_std": 0.0}, "Expected `prior_std` to be a number > 0, but got 0.0. Set e.g. `method.prior_std=0.2`."),
        ({"sigma_init": -0.1}, "Expected `sigma_init` to be a number > 0, but got -0.1."),
        ({"gamma": 0.5}, "Expected `gamma` to be a number >= 1, but got 0.5."),
        ({"beta2": 1.0}, "Expected `beta2` to be a decay within [0, 1), but got 1.0."),
        ({"eps": math.inf}, "Expected `eps` to be a number >= 0, but got inf."),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    (problem,) = check_method(Blob(**settings), Plan(steps=6, accumulation=1, dropout=0.0, calibration=False), {})
    assert problem.startswith(message)


# --- settings ---


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_eps_bounds_the_first_step(eps):
    """Which is lr g/(|g| + ε), as both averages are corrected for their start at 0."""
    method = Blob(lr=0.1, kl_lr=0.0, eps=eps)
    model, optimizer = made(method)
    before = model.get_parameter(B).detach().clone()
    with method.training(model, optimizer):
        backward(model, optimizer)
        gradient = model.get_parameter(B).grad.clone()
        optimizer.step()
    torch.testing.assert_close(model.get_parameter(B), before - 0.1 * gradient / (gradient.abs() + eps))


def test_sigma_starts_between_half_the_square_of_its_setting_and_its_square():
    method, model = Blob(sigma_init=0.1), Adapter(d_in=1000)
    _, optimizer = made(method, model)
    sigma = method.posterior(Trained(model, rows=(), draw=None, forward=None, optimizer=optimizer)).std[A]
    assert 0.01 / 2 <= sigma.min() < 0.0101 / 2
    assert 0.0099 < sigma.max() <= 0.01
