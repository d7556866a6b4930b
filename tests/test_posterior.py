"""Every kind of posterior: draws, means, scales, and the way through a checkpoint's tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import varlora.posterior.linearised
from varlora.drawing import Drawing, Latin, normal
from varlora.errors import DamagedFileError, VarloraError
from varlora.files import load_tensors, save_tensors
from varlora.params import swapped, trainable
from varlora.posterior import (
    POSTERIORS,
    DiagonalGaussian,
    Dropout,
    KroneckerGaussian,
    Linearised,
    LowRankGaussian,
    Mixture,
    Point,
    Posterior,
    Tempered,
    posterior_from_tensors,
)

SHAPES = {"a.weight": (5, 3), "b.weight": (4, 5)}


class Net(nn.Module):
    """Two linear layers and what is not linear between them; (B, T, 3) -> (B, T, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 5, bias=False), nn.Linear(5, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def make(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(seed: int) -> dict[str, Tensor]:
    source = seeded(seed)
    return {name: torch.randn(shape, generator=source) for name, shape in SHAPES.items()}


def constant(value: float) -> Point:
    return Point({name: torch.full(shape, value) for name, shape in SHAPES.items()})


def gaussian(seed: int = 1) -> DiagonalGaussian:
    return DiagonalGaussian(weights(seed), {name: value.abs() + 0.1 for name, value in weights(seed + 50).items()})


def low_rank(seed: int = 1) -> LowRankGaussian:
    source = seeded(seed + 60)
    deviations = {name: torch.randn(3, *shape, generator=source) for name, shape in SHAPES.items()}
    return LowRankGaussian(weights(seed), gaussian(seed).std, deviations)


def kronecker(seed: int = 1) -> KroneckerGaussian:
    """Of rank 2 on the right side of one weight."""
    source, left, right, variance = seeded(seed + 70), {}, {}, {}
    for name, (rows, columns) in SHAPES.items():
        left[name] = torch.linalg.qr(torch.randn(rows, rows, generator=source))[0]
        right[name] = torch.linalg.qr(torch.randn(columns, columns, generator=source))[0][:, :2]
        variance[name] = torch.rand(rows, 2, generator=source)
    return KroneckerGaussian(weights(seed), left, right, variance, torch.tensor(0.9))


def mixture() -> Mixture:
    return Mixture([Point(weights(1)), gaussian(2), Mixture([gaussian(3), Point(weights(4))])])


ALL: dict[str, Callable[[], Any]] = {
    "point": lambda: Point(weights(1)),
    "diagonal_gaussian": gaussian,
    "low_rank_gaussian": low_rank,
    "kronecker_gaussian": kronecker,
    "dropout": lambda: Dropout(weights(1), {"a.weight": torch.tensor(0.5)}),
    "linearised": lambda: Linearised(kronecker()),
    "mixture": mixture,
    "pruned": lambda: low_rank().prune(0.4),
    "tempered": lambda: Tempered(Mixture([gaussian(2), Tempered(low_rank(3), 0.7, 0.8)]), 1.5, 1.2),
}


def forward(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)[:, -1]  # (B, T, C) -> (B, C)


def rows(count: int = 5, width: int = 3) -> Tensor:
    return torch.randn(count, 2, width, generator=seeded(9))  # (B, T, in)


def logits(posterior: Posterior, n: int, seed: int = 0, model: nn.Module | None = None) -> Tensor:
    with torch.no_grad():
        return posterior.draw_logits(model or make(), rows(), n, seeded(seed), forward)


def flat(values: Mapping[str, Tensor]) -> Tensor:
    """One vector of all tensors, in the order of their names."""
    return torch.cat([values[name].flatten() for name in sorted(values)])


def draws_of(posterior: Posterior, n: int, seed: int = 0) -> Tensor:
    """Weights of `n` models, one after the other of the same generator, (n, P)."""
    model, source, found = make(), seeded(seed), []
    for _ in range(n):
        with posterior.sampled(model, source):
            found.append(flat(trainable(model)).detach())
    return torch.stack(found)


def check_moments(samples: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """The sample mean and covariance of (n, P) draws are within five standard errors of what they should be."""
    n, samples, variance = len(samples), samples.double(), covariance.diagonal()
    assert ((samples.mean(0) - mean).abs() <= 5 * (variance / n).sqrt() + 1e-6).all()
    error = ((variance[:, None] * variance + covariance.square()) / n).sqrt()
    assert ((torch.cov(samples.T, correction=0) - covariance).abs() <= 5 * error + 1e-6).all()


# --- what every posterior does ---


def test_every_kind_is_tested() -> None:
    assert set(POSTERIORS) == set(ALL)


@pytest.mark.parametrize("kind", ALL)
class TestEveryPosterior:
    def test_is_a_posterior(self, kind: str) -> None:
        posterior = ALL[kind]()
        assert isinstance(posterior, Posterior)
        assert posterior.kind == kind

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("inference", [False, True])
    def test_leaves_the_model_bit_for_bit(self, kind: str, dtype: torch.dtype, inference: bool) -> None:
        posterior, model = ALL[kind](), make(dtype)
        before = {name: p.detach().clone() for name, p in trainable(model).items()}
        for context in (lambda: posterior.sampled(model, seeded()), lambda: posterior.at_mean(model)):
            with torch.inference_mode(inference), context():
                assert not any(torch.equal(p, before[name]) for name, p in trainable(model).items())
            with pytest.raises(KeyboardInterrupt), context():
                raise KeyboardInterrupt
            assert all(torch.equal(p, before[name]) for name, p in trainable(model).items())

    @pytest.mark.parametrize("n", [0, 3])
    @pytest.mark.parametrize("fails", [False, True])
    def test_drawing_logits_leaves_no_trace(self, kind: str, n: int, fails: bool) -> None:
        def broken(model: nn.Module, batch: Tensor) -> Tensor:
            raise KeyboardInterrupt

        model = make()
        for p in model.parameters():
            p.grad = torch.full_like(p, 7.0)
        before = {name: p.detach().clone() for name, p in trainable(model).items()}
        if fails:
            with pytest.raises(KeyboardInterrupt):
                ALL[kind]().draw_logits(model, rows(), n, seeded(), broken)
        else:
            logits(ALL[kind](), n, model=model)
        assert all(torch.equal(p, before[name]) and (p.grad == 7).all() for name, p in trainable(model).items())
        assert not any(module._forward_hooks for module in model.modules())

    def test_draws_depend_on_the_generator_alone(self, kind: str) -> None:
        posterior = ALL[kind]()
        assert torch.equal(logits(posterior, 4), logits(posterior, 4))
        if kind != "point":
            assert not torch.equal(logits(posterior, 4), logits(posterior, 4, seed=1))

    def test_one_generator_gives_other_draws_the_next_time(self, kind: str) -> None:
        posterior, source, model = ALL[kind](), seeded(), make()
        first, second = (posterior.draw_logits(model, rows(), 4, source, forward).detach() for _ in range(2))
        assert torch.equal(first, second) == (kind == "point")

    def test_its_models_have_the_logits_that_are_drawn(self, kind: str) -> None:
        if kind == "linearised":  # whose models are not linear
            return
        drawn, model, found = ALL[kind]().drawn(6, seeded()), make(), []
        for draw in drawn.models():
            with swapped(model, draw.weights), torch.no_grad():
                found.append(forward(model, rows()) / draw.temperature)
        expected = drawn.logits(model, rows(), forward).detach()
        torch.testing.assert_close(torch.stack(found), expected.expand(len(found), -1, -1), rtol=1e-4, atol=1e-5)

    def test_gradients_being_recorded_or_not_makes_no_difference(self, kind: str) -> None:
        posterior = ALL[kind]()
        recorded = posterior.draw_logits(make(), rows(), 3, seeded(), forward)
        assert torch.equal(recorded, logits(posterior, 3))

    def test_logits_are_of_shape_draws_batch_classes(self, kind: str) -> None:
        posterior, draws = ALL[kind](), {"point": 1, "linearised": 256}.get(kind, 6)
        assert logits(posterior, 0).shape == (1, 5, 4)
        assert logits(posterior, 6).shape == (draws, 5, 4)

    @pytest.mark.parametrize("tau", [1.0, 0.3])
    def test_comes_back_from_a_file(self, kind: str, tau: float, tmp_path: Path) -> None:
        posterior = ALL[kind]().scale(tau)
        save_tensors(tmp_path / "posterior.safetensors", posterior.tensors())
        tensors = load_tensors(tmp_path / "posterior.safetensors")[0]
        again = posterior_from_tensors(kind, dict(sorted(tensors.items(), reverse=True)))
        assert type(again) is type(posterior)
        assert again.tensors().keys() == posterior.tensors().keys()
        assert all(torch.equal(value, again.tensors()[name]) for name, value in posterior.tensors().items())
        assert torch.equal(draws_of(again, 4), draws_of(posterior, 4))
        for n in (0, 5):
            assert torch.equal(logits(again, n), logits(posterior, n))

    def test_scaled_to_nothing_it_is_its_mean(self, kind: str) -> None:
        narrow = ALL[kind]().scale(0.0)
        assert torch.equal(logits(narrow, 0), logits(ALL[kind](), 0))
        torch.testing.assert_close(logits(narrow, 3), logits(narrow, 3, seed=1))
        if kind not in ("mixture", "tempered"):  # whose draws are not around one mean, and of another temperature
            torch.testing.assert_close(logits(narrow, 3), logits(narrow, 0).expand_as(logits(narrow, 3)))

    def test_tau_scales_the_covariance(self, kind: str) -> None:
        """The same noise goes √τ times as far from the mean."""
        posterior = ALL[kind]()
        mean, once, scaled = (draws_of(posterior.scale(tau), 20) for tau in (0.0, 1.0, 0.3))
        torch.testing.assert_close(once, draws_of(posterior, 20))
        torch.testing.assert_close(scaled - mean, math.sqrt(0.3) * (once - mean), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(draws_of(posterior.scale(0.6).scale(0.5), 20), scaled)

    @pytest.mark.parametrize("tau", [-1.0, math.nan, math.inf])
    def test_refuses_a_scale_that_is_none(self, kind: str, tau: float) -> None:
        with pytest.raises(VarloraError, match="Expected `tau`"):
            ALL[kind]().scale(tau)

    @pytest.mark.parametrize("by", ["magnitude", "random", "snr"])
    def test_pruned_it_has_weights_that_are_zero_in_every_draw(self, kind: str, by: str, tmp_path: Path) -> None:
        if by == "snr" and kind in ("point", "dropout", "mixture"):  # the mixture here has points among its members
            with pytest.raises(VarloraError, match="Prune it by magnitude"):
                ALL[kind]().prune(0.5, by)
            return
        half = ALL[kind]().prune(0.5, by, seeded())
        drawn = draws_of(half, 3)
        zero = (drawn == 0).float().mean(1)
        assert (zero >= 0.48).all()
        assert by == "snr" or kind in ("pruned", "dropout") or (zero <= 0.52).all()  # which have zeros of their own
        save_tensors(tmp_path / "half", half.tensors())
        save_tensors(tmp_path / "whole", ALL[kind]().tensors())
        again = posterior_from_tensors(half.kind, load_tensors(tmp_path / "half")[0])
        assert torch.equal(draws_of(again, 3), drawn)
        for n in (0, 3):
            assert torch.equal(logits(again, n), logits(half, n))

    @pytest.mark.parametrize("by", ["magnitude", "random"])
    def test_pruned_of_nothing_it_is_itself_and_of_everything_the_base(self, kind: str, by: str) -> None:
        posterior = ALL[kind]()
        nothing, everything = posterior.prune(0.0, by), posterior.prune(1.0, by)
        assert torch.equal(logits(nothing, 3), logits(posterior, 3))
        drawn = logits(everything, 3)
        torch.testing.assert_close(drawn.softmax(-1), torch.full_like(drawn, 0.25))

    def test_refuses_another_model(self, kind: str) -> None:
        with pytest.raises(DamagedFileError):
            ALL[kind]().draw_logits(nn.Linear(2, 4, bias=False), torch.zeros(1, 1, 2), 1, seeded(), forward)

    def test_refuses_a_negative_number_of_draws(self, kind: str) -> None:
        with pytest.raises(VarloraError, match="Expected `n`"):
            logits(ALL[kind](), -1)

    def test_refuses_more_draws_than_would_ever_end(self, kind: str) -> None:
        with pytest.raises(VarloraError, match="at most 100,000 draws, but got 1,000,000"):
            logits(ALL[kind](), 1_000_000)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(DamagedFileError, match="`diagonal_gaussian`"):
        posterior_from_tensors("diagonal_gausian", {})


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
@pytest.mark.parametrize("kind", ALL)
def test_what_no_noise_is_made_of_is_not_rebuilt(kind: str, dtype: torch.dtype) -> None:
    tensors = {name: v if name.startswith("keep.") else v.to(dtype) for name, v in ALL[kind]().tensors().items()}
    with pytest.raises(DamagedFileError, match="floating-point, but `"):
        posterior_from_tensors(kind, tensors)


@pytest.mark.parametrize("change", [{"rest": torch.tensor(-1.0)}, {"rest": torch.ones(2)}, {"variance": None}])
def test_kronecker_variances_are_no_less_than_zero(change: dict[str, Any]) -> None:
    right = kronecker()
    negative = {name: -value for name, value in right.variance.items()}
    with pytest.raises(VarloraError, match="Expected variances >= 0"):
        dataclasses.replace(right, **({"variance": negative} if "variance" in change else change))


@pytest.mark.parametrize("kind", ["diagonal_gaussian", "low_rank_gaussian", "kronecker_gaussian", "dropout"])
def test_draws_do_not_depend_on_the_order_of_the_names(kind: str) -> None:
    posterior = ALL[kind]()
    backwards = {
        name: dict(reversed(value.items())) for name, value in vars(posterior).items() if isinstance(value, dict)
    }
    first, second = posterior.draw(seeded()), type(posterior)(**{**vars(posterior), **backwards}).draw(seeded())
    assert all(torch.equal(first[name], second[name]) for name in SHAPES)


# --- Pruned ---


@pytest.mark.parametrize("make_one", [gaussian, low_rank, kronecker])
def test_marginal_standard_deviations_are_those_of_the_draws(make_one: Callable[[], Any]) -> None:
    posterior = make_one()
    expected = flat(posterior.marginal_std())
    spread = torch.stack([flat(posterior.draw(seeded(i))) for i in range(4000)]).std(0)
    torch.testing.assert_close(spread, expected, rtol=5 / math.sqrt(2 * 4000), atol=0)


def test_of_a_linear_model_what_is_pruned_has_no_part_in_the_covariance() -> None:
    """The predictive of a pruned Gaussian is that of its draws."""
    pruned = Linearised(kronecker()).prune(0.5)
    gradients = torch.randn(1, 2, *SHAPES["a.weight"], generator=seeded(3))
    drawn = torch.stack([pruned.weights.draw(seeded(i))["a.weight"] for i in range(4000)])
    functions = torch.einsum("cij,nij->nc", gradients[0], drawn)
    torch.testing.assert_close(
        torch.cov(functions.T).double(), pruned.weights.quadratic("a.weight", gradients)[0], rtol=0.1, atol=0.1
    )


def test_what_is_pruned_takes_no_room() -> None:
    posterior = DiagonalGaussian({"w": torch.randn(64, 64)}, {"w": torch.ones(64, 64)})

    def size(kept: Posterior) -> int:
        return sum(value.numel() * value.element_size() for value in kept.tensors().values())

    whole = size(posterior)
    assert size(posterior.prune(0.25)) == 0.75 * whole + 64 * 64 / 8 + 3 * 8
    assert size(posterior.prune(1.0)) == 64 * 64 / 8 + 3 * 8


def test_pruning_by_magnitude_and_at_random_are_other_choices() -> None:
    mean, std = torch.tensor([1.0, -4.0, 3.0, 0.5]), torch.tensor([0.1, 8.0, 1.0, 1.0])
    posterior = DiagonalGaussian({"w": mean}, {"w": std})
    assert posterior.prune(0.5, "magnitude").mean["w"].tolist() == [0.0, -4.0, 3.0, 0.0]
    assert posterior.prune(0.5, "snr").mean["w"].tolist() == [1.0, 0.0, 3.0, 0.0]
    chosen = [posterior.prune(0.5, "random", seeded(i)).mean["w"] for i in range(40)]
    assert (torch.stack(chosen) == 0).any(0).all()
    assert torch.equal(posterior.prune(0.5, "random", seeded(3)).mean["w"], chosen[3])
    sure = DiagonalGaussian(
        {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 4.0])}, {n: torch.zeros(2) for n in "ab"}
    )
    assert torch.cat(list(sure.prune(0.5, "snr").mean.values())).tolist() == [3.0, 0.0, 0.0, 4.0]  # not by name
    with pytest.raises(VarloraError, match="one of snr, magnitude, random"):
        posterior.prune(0.5, "size")


# --- DiagonalGaussian ---


def test_draws_have_the_mean_and_the_standard_deviation() -> None:
    n = 20_000
    mean, std = torch.tensor([-1.0, 0.0, 5.0]), torch.tensor([0.1, 2.0, 0.5])
    posterior = DiagonalGaussian({"a": mean.repeat(n, 1), "b": mean}, {"a": std.repeat(n, 1), "b": std})
    source = seeded()
    z = (posterior.draw(source)["a"] - mean) / std  # (n, 3)
    assert all(stats.kstest(column.numpy(), "norm").pvalue > 1e-3 for column in z.T)
    assert (torch.corrcoef(z.T) - torch.eye(3)).abs().max() < 5 / n**0.5
    again = (posterior.draw(source)["a"] - mean) / std
    assert (z * again).mean(0).abs().max() < 5 / n**0.5  # another draw
    scaled = (posterior.scale(4.0).draw(seeded())["a"] - mean) / std
    torch.testing.assert_close(scaled, 2 * z, atol=1e-4, rtol=1e-4)


def test_the_numbers_of_a_latin_draw_are_independent_of_one_another() -> None:
    """Each draw is all over the distribution; it is each number that lies once in each range, over the draws."""
    size = 4000
    standard = DiagonalGaussian({"w": torch.zeros(size)}, {"w": torch.ones(size)})
    drawn = torch.stack([draw.weights["w"] for draw in standard.drawn(8, seeded(), Drawing(noise="latin")).models()])
    assert drawn.mean(1).abs().max() < 5 / math.sqrt(size)
    assert (drawn.square().mean(1) - 1).abs().max() < 5 * math.sqrt(2 / size)


def test_normal_noise_is_finite_at_the_ends_of_the_uniform() -> None:
    """As float32 rounds the highest of many numbers below 1 to 1."""

    class Ends(Latin):
        def uniform(self, *size: int) -> Tensor:
            return torch.tensor([0.0, 1.0]).view(size)

    low, high = normal(torch.empty(2), Ends(seeded(), 2)).tolist()
    assert -7 < low < -5 < 5 < high < 7


def test_scale_multiplies_the_variance_and_keeps_the_mean() -> None:
    posterior = gaussian()
    scaled = posterior.scale(0.3)
    for name in posterior.mean:
        assert torch.equal(scaled.mean[name], posterior.mean[name])
        torch.testing.assert_close(scaled.std[name].square(), 0.3 * posterior.std[name].square())


def test_logits_are_those_of_the_draws() -> None:
    def by_hand(weights: Any) -> Tensor:
        return torch.tanh(rows()[:, -1] @ weights["a.weight"].T) @ weights["b.weight"].T

    posterior, source = gaussian(), seeded()
    expected = torch.stack([by_hand(posterior.draw(source)) for _ in range(3)])
    torch.testing.assert_close(logits(posterior, 3), expected)
    torch.testing.assert_close(logits(posterior, 0)[0], by_hand(posterior.mean))


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_prune_takes_the_weights_that_are_least_certain_not_to_be_zero(fraction: float) -> None:
    posterior = gaussian()
    pruned = posterior.prune(fraction)
    ratio = torch.cat([(posterior.mean[name].abs() / posterior.std[name]).flatten() for name in posterior.mean])
    gone = torch.cat([pruned.mean[name].flatten() == 0 for name in posterior.mean])
    assert gone.sum() == round(len(ratio) * fraction)
    if 0 < fraction < 1:
        assert ratio[gone].max() < ratio[~gone].min()
    for name in posterior.mean:
        kept = pruned.mean[name] != 0
        assert torch.equal(pruned.mean[name][kept], posterior.mean[name][kept])
        assert torch.equal(pruned.marginal_std()[name][kept], posterior.std[name][kept])
        assert (pruned.marginal_std()[name][~kept] == 0).all()


def test_prune_knows_weights_without_variance() -> None:
    """A weight that is certainly zero goes first, one that is certainly something last."""
    mean, std = torch.tensor([0.0, 5.0, 0.1, 0.2]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    pruned = DiagonalGaussian({"w": mean}, {"w": std}).prune(0.5)
    assert pruned.mean["w"].tolist() == pytest.approx([0.0, 5.0, 0.0, 0.2])
    assert torch.equal(pruned.prune(0.5).mean["w"], pruned.mean["w"])  # once more is the same
    for by in ("snr", "magnitude", "random"):  # of weights that are 0 anyway, too
        once = DiagonalGaussian({"w": torch.zeros(1000)}, {"w": torch.ones(1000)}).prune(0.5, "random", seeded(1))
        assert torch.equal(once.prune(0.5, by, seeded(2)).keep["w"], once.keep["w"])
        assert torch.equal(once.prune(0.2, by, seeded(2)).keep["w"], once.keep["w"])
        more = once.prune(0.7, by, seeded(2)).keep["w"]
        assert more.sum() == 300
        assert not (more & ~once.keep["w"]).any()


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_prune_refuses_what_is_no_share(fraction: float) -> None:
    with pytest.raises(VarloraError, match="Expected `fraction`"):
        gaussian().prune(fraction)


@pytest.mark.parametrize("shapes", [{"a": 3}, {"b": 2}, {"a": 2, "b": 1}, {}])
def test_mean_and_std_have_to_match(shapes: dict[str, int]) -> None:
    std = {name: torch.ones(size) for name, size in shapes.items()}
    with pytest.raises(VarloraError, match="same names and shapes"):
        DiagonalGaussian({"a": torch.ones(2)}, std)


# --- LowRankGaussian ---


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_low_rank_draws_have_swags_covariance_across_parameters(tau: float) -> None:
    """½ diag(σ²) + D Dᵀ/(2(K − 1)) over all weights at once: the noise of the low rank part is shared."""
    shapes, source = {"v": (2, 2), "w": (3,)}, seeded()
    mean, std = ({name: torch.rand(shape, generator=source) for name, shape in shapes.items()} for _ in range(2))
    deviations = {name: torch.randn(4, *shape, generator=source) for name, shape in shapes.items()}
    sigma = flat(std).double()
    D = torch.cat([deviations[name].flatten(1) for name in shapes], dim=1).double().T  # (P, K)
    covariance = sigma.square().diag() / 2 + D @ D.T / (2 * (4 - 1))
    assert (covariance[:4, 4:].abs() > 0.1).any()  # there is something to see between the two
    posterior = LowRankGaussian(mean, std, deviations).scale(tau)
    draws = torch.stack([flat(posterior.draw(source)) for _ in range(8000)])
    check_moments(draws, flat(mean), tau * covariance)


@pytest.mark.parametrize("ranks", [{"w": 1}, {"w": 0}, {"w": 3, "v": 2}, {}])
def test_deviations_are_of_at_least_two_snapshots_and_as_many_for_all(ranks: dict[str, int]) -> None:
    mean = {name: torch.ones(2) for name in ranks}
    with pytest.raises(VarloraError, match="Expected `deviations`"):
        LowRankGaussian(mean, mean, {name: torch.ones(rank, 2) for name, rank in ranks.items()})


def test_to_print_one_says_how_many_weights_it_is_over() -> None:
    one = DiagonalGaussian({"w": torch.zeros(30, 50)}, {"w": torch.ones(30, 50)})
    assert repr(one) == "DiagonalGaussian(1,500 weights)"
    assert repr(Mixture([one])) == "Mixture(members=[DiagonalGaussian(1,500 weights)])"


# --- KroneckerGaussian ---

SIDES = {"full": (3, 4), "input of rank 2": (3, 2), "output of rank 1": (1, 4), "both of low rank": (2, 3)}
"""k and l of a weight (3, 4)."""


def curvature(k: int, l: int, prior: float = 0.7) -> tuple[KroneckerGaussian, Tensor]:  # noqa: E741
    """Return the Gaussian of precision G ⊗ A + λI with G of rank k and A of rank l, and the inverse of that precision.

    Weights are counted row by row, so that the weight (o, i) is number `4 o + i` and the product is `kron(G, A)`.
    """
    source, vectors, values = seeded(k + 10 * l), [], []
    for size, rank in ((3, k), (4, l)):
        root = torch.randn(size, size, generator=source, dtype=torch.float64)
        found, basis = torch.linalg.eigh(root @ root.T)
        values.append(found[size - rank :])  # the largest
        vectors.append(basis[:, size - rank :])
    (g, a), (U, V) = values, vectors
    G, A = U @ g.diag() @ U.T, V @ a.diag() @ V.T
    precision = torch.kron(G, A) + prior * torch.eye(12, dtype=torch.float64)
    mean = torch.randn(3, 4, generator=source, dtype=torch.float64)
    variance, rest = 1 / (g[:, None] * a + prior), torch.tensor(1 / prior, dtype=torch.float64)
    posterior = KroneckerGaussian({"weight": mean}, {"weight": U}, {"weight": V}, {"weight": variance}, rest)
    return posterior, precision.inverse()


@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
def test_kronecker_quadratic_is_the_inverse_of_the_precision(sides: tuple[int, int]) -> None:
    posterior, covariance = curvature(*sides)
    gradients = torch.randn(6, 5, 3, 4, generator=seeded(), dtype=torch.float64)
    J = gradients.flatten(2)
    torch.testing.assert_close(posterior.quadratic("weight", gradients), J @ covariance @ J.mT)
    torch.testing.assert_close(posterior.scale(0.3).quadratic("weight", gradients), 0.3 * J @ covariance @ J.mT)


@pytest.mark.parametrize("prior", [0.7, 1e-4, 1e-8])
@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
def test_kronecker_of_32_bits_bears_curvature_far_above_the_prior(sides: tuple[int, int], prior: float) -> None:
    """Where r is millions of times s, eigenvectors that are orthonormal but for rounding must not leave errors of r."""
    exact, _ = curvature(*sides, prior)
    posterior = single(exact)
    U, V, s = (getattr(exact, field)["weight"] for field in ("left", "right", "variance"))
    within = U[:, None, :, None] * V[None, :, None, :]  # (3, 4, k, l)
    beyond = (1 - within.square().sum((2, 3))).clamp(min=1e-30) * exact.rest
    std = (beyond * (len(U) * len(V) > s.numel()) + (within.square() * s).sum((2, 3))).sqrt()
    torch.testing.assert_close(posterior.marginal_std()["weight"].double(), std, rtol=1e-5, atol=0)
    gradients = torch.einsum("jl,oijl->oi", torch.ones(s.shape, dtype=torch.float64), within)[None, None].float()
    found = posterior.quadratic("weight", gradients).item()
    assert found == pytest.approx(s.sum().item(), rel=1e-5 if prior > 1e-6 else 1e-3)


@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
def test_kronecker_draws_have_the_inverse_of_the_precision_as_covariance(sides: tuple[int, int]) -> None:
    (posterior, covariance), source = curvature(*sides), seeded()
    draws = torch.stack([posterior.draw(source)["weight"].flatten() for _ in range(5000)])
    check_moments(draws, posterior.mean["weight"].flatten(), covariance)


def test_kronecker_draws_of_two_parameters_are_independent() -> None:
    one, covariance = curvature(3, 4)
    other, _ = curvature(3, 2)
    both = {
        field: {"v": getattr(one, field)["weight"], "w": getattr(other, field)["weight"]}
        for field in ("mean", "left", "right", "variance")
    }
    posterior, source = KroneckerGaussian(**both, rest=one.rest), seeded()
    draws = torch.stack([flat(posterior.draw(source)) for _ in range(5000)])
    check_moments(draws, flat(both["mean"]), torch.block_diag(covariance, curvature(3, 2)[1]))


def test_diagonal_quadratic_is_the_variance_of_linear_functions() -> None:
    posterior, J = gaussian(), torch.randn(6, 4, 5, 3, generator=seeded())
    expected = torch.einsum("bcoi,oi,bdoi->bcd", J.double(), posterior.std["a.weight"].double().square(), J.double())
    torch.testing.assert_close(posterior.quadratic("a.weight", J), expected, rtol=1e-5, atol=1e-5)


# --- Dropout ---


def dropout(rate: float, columns: int = 6) -> Dropout:
    weight = torch.randn(3, columns, generator=seeded(3))
    return Dropout({"weight": weight, "other": torch.ones(2)}, {"weight": torch.tensor(rate, dtype=torch.float64)})


def test_a_dropout_draw_drops_whole_columns_and_scales_the_others() -> None:
    posterior, source, patterns = dropout(0.3), seeded(), set()
    for _ in range(50):
        draw = posterior.draw(source)
        kept = draw["weight"][0] != 0  # (in,)
        torch.testing.assert_close(draw["weight"], posterior.mean["weight"] * kept / 0.7)
        assert torch.equal(draw["other"], torch.ones(2))
        patterns.add(tuple(kept.tolist()))
    assert len(patterns) > 10


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("tau", [1.0, 0.25])
def test_dropout_draws_have_the_weight_as_mean_and_the_variance_of_their_rate(rate: float, tau: float) -> None:
    """Var = τ p/(1 − p) w²; weights of one column go together, and columns apart."""
    posterior, source = dropout(rate, columns=3).scale(tau), seeded()
    weight = posterior.mean["weight"]
    samples = torch.stack([posterior.draw(source)["weight"] for _ in range(8000)])
    same_column = torch.eye(3, dtype=torch.float64).repeat(3, 3)  # (9, 9): weight (o, i) is number 3 o + i
    outer = torch.outer(weight.flatten(), weight.flatten()).double()
    check_moments(samples.flatten(1), weight.flatten(), tau * rate / (1 - rate) * outer * same_column)


def test_each_layer_has_its_own_mask_and_rate() -> None:
    rates = {"a.weight": torch.tensor(0.2), "b.weight": torch.tensor(0.7)}
    posterior, source = Dropout(weights(1), rates), seeded()
    dropped = {name: [] for name in rates}
    for _ in range(2000):
        draw = posterior.draw(source)
        for name, found in dropped.items():
            found.append(draw[name][0] == 0)
    a, b = (torch.stack(found).double() for found in dropped.values())
    assert a.mean(0).tolist() == pytest.approx([0.2] * 3, abs=0.045)  # five standard errors
    assert b.mean(0).tolist() == pytest.approx([0.7] * 5, abs=0.052)
    assert torch.corrcoef(torch.cat([a, b], 1).T).fill_diagonal_(0).abs().max() < 5 / 2000**0.5


def test_a_dropout_draw_is_the_layer_with_inputs_dropped_for_all_rows_and_tokens() -> None:
    layer = nn.Linear(6, 3, bias=False)
    posterior = Dropout({"weight": torch.randn(3, 6, generator=seeded(3))}, {"weight": torch.tensor(0.4)})
    mask = (posterior.draw(seeded(5))["weight"][0] != 0).float()  # (in,)
    assert 0 < mask.sum() < 6
    x = torch.randn(7, 4, 6, generator=seeded(9))  # (B, T, in)
    with torch.no_grad(), posterior.sampled(layer, seeded(5)):
        drawn = layer(x)
    torch.testing.assert_close(drawn, nn.functional.linear(x * mask / (1 - 0.4), posterior.mean["weight"]))


def test_no_dropout_is_the_mean() -> None:
    posterior = dropout(0.0)
    assert torch.equal(posterior.draw(seeded())["weight"], posterior.mean["weight"])


# --- Linearised ---


def test_logits_of_a_model_that_overflows_are_not_numbers() -> None:
    """As those of draws of weights are, which `predict` then says; the other rows have theirs."""
    covariance = torch.eye(3).repeat(2, 1, 1)
    covariance[1, 0, 0] = math.inf
    drawn = varlora.posterior.linearised.gaussian_logits(torch.zeros(2, 3), covariance, 4, seeded())
    assert drawn[:, 0].isfinite().all()
    assert drawn[:, 1].isnan().all()


WEIGHTS = {
    "diagonal": lambda: DiagonalGaussian(
        {"weight": torch.randn(3, 4, generator=seeded(1))}, {"weight": torch.rand(3, 4, generator=seeded(2))}
    ),
    "kronecker": lambda: single(curvature(3, 2)[0]),
}


def single(posterior: KroneckerGaussian) -> KroneckerGaussian:
    """In float32, as the model is."""
    return KroneckerGaussian.from_tensors({name: value.float() for name, value in posterior.tensors().items()})


def covariance_of(posterior: Any) -> Tensor:
    """Return the covariance of the weights (3, 4) counted row by row, (12, 12)."""
    if isinstance(posterior, KroneckerGaussian):
        return curvature(3, 2)[1]
    return posterior.std["weight"].double().square().flatten().diag()


def linear_model() -> nn.Linear:
    return nn.Linear(4, 3, bias=False)


def masked(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    mask = batch["answer_mask"]  # (B, C), C as many as the row with most
    return forward(model, batch["x"])[:, : mask.shape[1]].masked_fill(~mask, -math.inf)


def ragged(classes: int) -> dict[str, Tensor]:
    """Five rows, the first with all answers, the second without the last, and so on up to two answers."""
    counts = torch.tensor([classes, classes - 1, classes, 2, 2])
    return {"x": rows(), "answer_mask": torch.arange(classes) < counts[:, None]}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_of_a_linear_model_the_predictive_is_exact(kind: str) -> None:
    """f = W x: mean θ* x, and covariance (I ⊗ xᵀ) Σ (I ⊗ x), also as draws of the weights have it."""
    gaussian, model, batch, source = WEIGHTS[kind](), linear_model(), rows(width=4), seeded()
    mean, covariance = Linearised(gaussian).covariance(model, batch, forward)
    x = batch[:, -1].double()
    lift = torch.stack([torch.kron(torch.eye(3, dtype=torch.float64), row[:, None]) for row in x])  # (B, 12, 3)
    expected = lift.mT @ covariance_of(gaussian) @ lift
    assert covariance.dtype == torch.float64
    torch.testing.assert_close(mean.double(), x @ gaussian.mean["weight"].double().T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(covariance, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        in_weights = gaussian.draw_logits(model, batch, 4000, source, forward)
    in_logits = Linearised(gaussian).draw_logits(model, batch, 4000, source, forward)
    for row in range(len(batch)):
        for samples in (in_weights, in_logits):
            check_moments(samples[:, row], mean[row], expected[row])


def test_the_gradients_are_those_at_the_mean_whatever_the_model_holds() -> None:
    posterior, model = kronecker(), make()

    def at(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, rows())[:, -1]

    jacobian = torch.func.jacrev(at)(dict(posterior.mean))
    expected = sum(posterior.quadratic(name, jacobian[name]) for name in SHAPES)
    found, covariance = Linearised(posterior).covariance(model, rows(), forward)
    torch.testing.assert_close(found, at(dict(posterior.mean)))
    torch.testing.assert_close(covariance, expected, rtol=1e-5, atol=1e-5)


def test_answers_that_a_row_lacks_have_no_logit_and_no_variance() -> None:
    posterior, batch, model = Linearised(gaussian()), ragged(4), make()
    full = {"x": batch["x"], "answer_mask": torch.ones(5, 4, dtype=torch.bool)}
    mean, covariance = posterior.covariance(model, batch, masked)
    mean_of_all, covariance_of_all = posterior.covariance(model, full, masked)
    present = batch["answer_mask"]
    assert torch.equal(mean, mean_of_all.masked_fill(~present, -math.inf))
    both = present[:, :, None] & present[:, None]
    torch.testing.assert_close(covariance, covariance_of_all * both)
    draws = posterior.draw_logits(model, batch, 4000, seeded(), masked)
    assert torch.equal(draws > -math.inf, present.expand_as(draws))
    for row, known in enumerate(present):
        check_moments(draws[:, row, known], mean[row, known], covariance[row][known][:, known])


def test_linearised_draws_do_not_depend_on_the_other_rows() -> None:
    posterior, batch, model = Linearised(gaussian()), ragged(4), make()
    whole = posterior.draw_logits(model, batch, 1, seeded(), masked)
    for row in range(5):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        torch.testing.assert_close(posterior.draw_logits(model, alone, 1, seeded(), masked)[:, 0], whole[:, row])


def test_linearised_draws_do_not_depend_on_how_many_answers_the_batch_has() -> None:
    """A row of two answers, in a batch of its like and beside a row of four."""
    posterior, wide, model = Linearised(gaussian()), ragged(4), make()
    narrow = {"x": wide["x"][3:], "answer_mask": wide["answer_mask"][3:, :2]}

    found = posterior.draw_logits(model, narrow, 1, seeded(), masked)
    torch.testing.assert_close(found, posterior.draw_logits(model, wide, 1, seeded(), masked)[:, 3:, :2])


@pytest.mark.parametrize(("n", "draws"), [(1, 256), (10, 256), (256, 256), (300, 300)])
def test_linearised_draws_are_many_and_antithetic(n: int, draws: int) -> None:
    posterior = Linearised(gaussian())
    found, mean = logits(posterior, n), logits(posterior, 0)
    assert len(found) == draws
    torch.testing.assert_close(found.mean(0), mean[0])
    away = found - mean
    torch.testing.assert_close(away[: draws // 2], -away[draws // 2 :])


def test_an_odd_number_of_linearised_draws_has_the_mean_too() -> None:
    posterior = Linearised(gaussian())
    found = logits(posterior, 301)
    assert len(found) >= 301
    torch.testing.assert_close(found.mean(0), logits(posterior, 0)[0])


@pytest.mark.parametrize(("at_once", "passes"), [(1, 5), (2, 3), (5, 1)])
def test_rows_in_chunks_give_the_same(at_once: int, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def counted(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        return masked(model, batch)

    posterior, model, batch = Linearised(gaussian()), make(), ragged(4)
    whole = posterior.draw_logits(model, batch, 1, seeded(), masked)
    numbers = 4 * sum(value.numel() for value in posterior.mean.values())  # of one row's Jacobian
    monkeypatch.setattr(varlora.posterior.linearised, "MAX_NUMBERS", at_once * numbers)
    torch.testing.assert_close(posterior.draw_logits(model, batch, 1, seeded(), counted), whole)
    assert calls == passes


def test_a_row_larger_than_a_chunk_is_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, model, batch = Linearised(gaussian()), make(), ragged(4)
    whole = posterior.draw_logits(model, batch, 1, seeded(), masked)
    monkeypatch.setattr(varlora.posterior.linearised, "MAX_NUMBERS", 1)
    torch.testing.assert_close(posterior.draw_logits(model, batch, 1, seeded(), masked), whole)


# --- Mixture ---


@pytest.mark.parametrize(("n", "rounds"), [(1, 1), (3, 1), (7, 3), (9, 3), (10, 4)])
def test_a_mixture_takes_its_members_in_turn_and_equally_often(n: int, rounds: int) -> None:
    members = [Point(weights(seed)) for seed in (1, 2, 3)]
    means = torch.cat([logits(member, 0) for member in members])
    torch.testing.assert_close(logits(Mixture(members), n), means.repeat(rounds, 1, 1))


def test_no_member_of_a_mixture_within_a_mixture_is_left_out() -> None:
    """Also where it has more of them than its own share of the draws, but no more than another one's."""
    points = [Point(weights(seed)) for seed in range(6)]
    nested = Mixture([*points[:2], Mixture(points[2:])])
    found = logits(nested, 10)
    for point in points:
        assert any(torch.allclose(one, logits(point, 0)[0], atol=1e-6) for one in found)


def test_members_that_are_alike_draw_apart() -> None:
    """Else an ensemble of S draws were one of S/K."""
    found = logits(Mixture([gaussian(), gaussian(), gaussian()]), 6)
    assert len(torch.unique(found, dim=0)) == 6


def test_at_the_mean_a_mixture_averages_probabilities() -> None:
    members: list[Any] = [Point(weights(1)), gaussian(2)]
    expected = (logits(members[0], 0).softmax(-1) + logits(members[1], 0).softmax(-1)) / 2
    torch.testing.assert_close(logits(Mixture(members), 0).softmax(-1), expected)
    torch.testing.assert_close(logits(Mixture(members), 0).exp(), expected)


def test_masked_answers_stay_masked_in_a_mixture() -> None:
    batch = {"x": rows(), "answer_mask": torch.tensor([True, True, True, False]).expand(5, 4)}
    found = Mixture([Point(weights(1)), Point(weights(2))]).draw_logits(make(), batch, 0, seeded(), masked)
    assert (found[..., 3] == -math.inf).all()
    torch.testing.assert_close(found.softmax(-1).sum(-1), torch.ones(1, 5))


def test_a_mixture_samples_each_member_about_equally_often() -> None:
    members = [constant(k) for k in range(3)]
    model, source, counts = make(), seeded(), [0, 0, 0]
    for _ in range(300):
        with Mixture(members).sampled(model, source):
            counts[int(model.a.weight[0, 0].item())] += 1
    assert stats.chisquare(counts).pvalue > 1e-3


def test_members_have_equal_shares_also_where_one_draws_more() -> None:
    point, linearised = Point(weights(2)), Linearised(gaussian())
    expected = (logits(point, 1).softmax(-1).mean(0) + logits(linearised, 1).softmax(-1).mean(0)) / 2
    found = logits(Mixture([point, linearised]), 2).softmax(-1).mean(0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


def test_a_mixture_of_more_than_ten_comes_back_in_order() -> None:
    many = Mixture([constant(float(k)) for k in range(12)])
    again = posterior_from_tensors("mixture", dict(sorted(many.tensors().items())))
    assert [member.mean["a.weight"][0, 0].item() for member in again.members] == list(range(12))  # type: ignore[attr-defined]


def test_a_mixture_has_members() -> None:
    with pytest.raises(VarloraError, match="at least one"):
        Mixture([])


# --- Tempered ---


@pytest.mark.parametrize("inner", ["point", "diagonal_gaussian", "linearised", "mixture", "tempered"])
def test_draws_and_mean_are_divided_by_temperatures_of_their_own(inner: str) -> None:
    posterior = Tempered(ALL[inner](), temperature=2.0, temperature_mean=0.5)
    torch.testing.assert_close(logits(posterior, 4), logits(ALL[inner](), 4) / 2)
    torch.testing.assert_close(logits(posterior, 0), logits(ALL[inner](), 0) / 0.5)
    assert torch.equal(draws_of(posterior, 4), draws_of(ALL[inner](), 4))  # the weights are left alone


def test_members_of_a_mixture_keep_their_temperatures() -> None:
    one, other = Point(weights(1)), Point(weights(2))
    both = Mixture([Tempered(one, 2.0, 4.0), Tempered(other, 0.5, 0.25)])
    torch.testing.assert_close(logits(both, 2), torch.cat([logits(one, 0) / 2, logits(other, 0) / 0.5]))
    mean = ((logits(one, 0) / 4).softmax(-1) + (logits(other, 0) / 0.25).softmax(-1)) / 2
    torch.testing.assert_close(logits(both, 0).softmax(-1), mean)


def test_scale_leaves_the_temperatures() -> None:
    posterior = Tempered(gaussian(), 2.0, 0.5).scale(0.3)
    assert (posterior.temperature, posterior.temperature_mean) == (2.0, 0.5)
    torch.testing.assert_close(logits(posterior, 3), logits(gaussian().scale(0.3), 3) / 2)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_is_above_zero(wrong: float) -> None:
    with pytest.raises(VarloraError, match="temperature"):
        Tempered(Point({}), wrong, 1.0)
    with pytest.raises(VarloraError, match="temperature_mean"):
        Tempered(Point({}), 1.0, wrong)
