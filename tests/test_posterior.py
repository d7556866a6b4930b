"""Point, DiagonalGaussian and Mixture: draws, means, scales, and the way through a checkpoint's tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from varlora.errors import DamagedFileError, VarloraError
from varlora.params import trainable
from varlora.posterior import POSTERIORS, DiagonalGaussian, Mixture, Point, Posterior, posterior_from_tensors


def make(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 4).to(dtype)


def weights(seed: int) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {"weight": torch.randn(4, 3, generator=source), "bias": torch.randn(4, generator=source)}


def gaussian(seed: int = 1) -> DiagonalGaussian:
    return DiagonalGaussian(weights(seed), {name: value.abs() + 0.1 for name, value in weights(seed + 50).items()})


def mixture() -> Mixture:
    return Mixture([Point(weights(1)), gaussian(2), Mixture([gaussian(3), Point(weights(4))])])


ALL = {"point": lambda: Point(weights(1)), "diagonal_gaussian": gaussian, "mixture": mixture}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def forward(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)


def logits(posterior: Posterior, n: int, seed: int = 0, model: nn.Module | None = None) -> Tensor:
    batch = torch.randn(5, 3, generator=seeded(9))
    with torch.no_grad():
        return posterior.draw_logits(model or make(), batch, n, seeded(seed), forward)


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
                assert not torch.equal(model.weight, before["weight"])
            with pytest.raises(KeyboardInterrupt), context():
                raise KeyboardInterrupt
            assert all(torch.equal(p, before[name]) for name, p in trainable(model).items())

    def test_draws_depend_on_the_generator_alone(self, kind: str) -> None:
        posterior = ALL[kind]()
        assert torch.equal(logits(posterior, 4), logits(posterior, 4))
        if kind != "point":
            assert not torch.equal(logits(posterior, 4), logits(posterior, 4, seed=1))

    def test_logits_are_of_shape_draws_batch_classes(self, kind: str) -> None:
        posterior = ALL[kind]()
        assert logits(posterior, 0).shape == (1, 5, 4)
        assert logits(posterior, 6).shape == ((1 if kind == "point" else 6), 5, 4)

    def test_comes_back_from_its_tensors(self, kind: str) -> None:
        posterior = ALL[kind]()
        tensors = posterior.tensors()
        again = posterior_from_tensors(kind, dict(sorted(tensors.items(), reverse=True)))
        assert type(again) is type(posterior)
        assert again.tensors().keys() == tensors.keys()
        assert torch.equal(logits(again, 5), logits(posterior, 5))
        assert torch.equal(logits(again, 0), logits(posterior, 0))

    def test_scaled_to_nothing_it_is_its_mean(self, kind: str) -> None:
        narrow = ALL[kind]().scale(0.0)
        assert torch.equal(logits(narrow, 0), logits(ALL[kind](), 0))
        torch.testing.assert_close(logits(narrow, 3), logits(narrow, 3, seed=1))

    @pytest.mark.parametrize("tau", [-1.0, math.nan, math.inf])
    def test_refuses_a_scale_that_is_none(self, kind: str, tau: float) -> None:
        with pytest.raises(VarloraError, match="Expected `tau`"):
            ALL[kind]().scale(tau)

    def test_refuses_another_model(self, kind: str) -> None:
        with pytest.raises(DamagedFileError):
            ALL[kind]().draw_logits(nn.Linear(2, 4), torch.zeros(1, 2), 1, seeded(), forward)

    def test_refuses_a_negative_number_of_draws(self, kind: str) -> None:
        with pytest.raises(VarloraError, match="Expected `n`"):
            logits(ALL[kind](), -1)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(DamagedFileError, match="`diagonal_gaussian`"):
        posterior_from_tensors("diagonal_gausian", {})


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


def test_draws_do_not_depend_on_the_order_of_the_names() -> None:
    posterior = gaussian()
    reverse = DiagonalGaussian(dict(reversed(posterior.mean.items())), dict(reversed(posterior.std.items())))
    first, second = posterior.draw(seeded()), reverse.draw(seeded())
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_scale_multiplies_the_variance_and_keeps_the_mean() -> None:
    posterior = gaussian()
    scaled = posterior.scale(0.3)
    for name in posterior.mean:
        assert torch.equal(scaled.mean[name], posterior.mean[name])
        torch.testing.assert_close(scaled.std[name].square(), 0.3 * posterior.std[name].square())


def test_logits_are_those_of_the_draws() -> None:
    posterior, model, batch, source = gaussian(), make(), torch.randn(5, 3, generator=seeded(9)), seeded()
    draws = [posterior.draw(source) for _ in range(3)]
    expected = torch.stack([batch @ draw["weight"].T + draw["bias"] for draw in draws])
    torch.testing.assert_close(logits(posterior, 3, model=model), expected)
    torch.testing.assert_close(logits(posterior, 0)[0], batch @ posterior.mean["weight"].T + posterior.mean["bias"])


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_prune_takes_the_weights_that_are_least_certain_not_to_be_zero(fraction: float) -> None:
    posterior = gaussian()
    pruned = posterior.prune(fraction)
    ratio = torch.cat([(posterior.mean[name].abs() / posterior.std[name]).flatten() for name in posterior.mean])
    gone = torch.cat([pruned.mean[name].flatten() == 0 for name in posterior.mean])
    assert gone.sum() == round(16 * fraction)
    if 0 < fraction < 1:
        assert ratio[gone].max() < ratio[~gone].min()
    for name in posterior.mean:
        kept = pruned.mean[name] != 0
        assert torch.equal(pruned.mean[name][kept], posterior.mean[name][kept])
        assert torch.equal(pruned.std[name][kept], posterior.std[name][kept])
        assert (pruned.std[name][~kept] == 0).all()


def test_prune_knows_weights_without_variance() -> None:
    """A weight that is certainly zero goes first, one that is certainly something last."""
    mean, std = torch.tensor([0.0, 5.0, 0.1, 0.2]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    pruned = DiagonalGaussian({"w": mean}, {"w": std}).prune(0.5)
    assert pruned.mean["w"].tolist() == pytest.approx([0.0, 5.0, 0.0, 0.2])
    assert torch.equal(pruned.prune(0.5).mean["w"], pruned.mean["w"])  # once more is the same


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_prune_refuses_what_is_no_share(fraction: float) -> None:
    with pytest.raises(VarloraError, match="Expected `fraction`"):
        gaussian().prune(fraction)


@pytest.mark.parametrize("shapes", [{"a": 3}, {"b": 2}, {"a": 2, "b": 1}, {}])
def test_mean_and_std_have_to_match(shapes: dict[str, int]) -> None:
    std = {name: torch.ones(size) for name, size in shapes.items()}
    with pytest.raises(VarloraError, match="same names and shapes"):
        DiagonalGaussian({"a": torch.ones(2)}, std)


# --- Mixture ---


def test_a_mixture_takes_its_members_in_turn() -> None:
    members = [Point(weights(seed)) for seed in (1, 2, 3)]
    means = torch.cat([logits(member, 0) for member in members])
    torch.testing.assert_close(logits(Mixture(members), 7), means[[0, 1, 2, 0, 1, 2, 0]])


def test_at_the_mean_a_mixture_averages_probabilities() -> None:
    members: list[Any] = [Point(weights(1)), gaussian(2)]
    expected = (logits(members[0], 0).softmax(-1) + logits(members[1], 0).softmax(-1)) / 2
    torch.testing.assert_close(logits(Mixture(members), 0).softmax(-1), expected)
    torch.testing.assert_close(logits(Mixture(members), 0).exp(), expected)


def test_masked_answers_stay_masked_in_a_mixture() -> None:
    def masked(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).masked_fill(torch.tensor([False, False, False, True]), -math.inf)

    found = Mixture([Point(weights(1)), Point(weights(2))]).draw_logits(make(), torch.ones(2, 3), 0, seeded(), masked)
    assert (found[..., 3] == -math.inf).all()
    torch.testing.assert_close(found.softmax(-1).sum(-1), torch.ones(1, 2))


def test_a_mixture_samples_each_member_about_equally_often() -> None:
    members = [Point({"weight": torch.full((4, 3), float(k)), "bias": torch.zeros(4)}) for k in range(3)]
    model, source, counts = make(), seeded(), [0, 0, 0]
    for _ in range(300):
        with Mixture(members).sampled(model, source):
            counts[int(model.weight[0, 0].item())] += 1
    assert stats.chisquare(counts).pvalue > 1e-3


def test_a_mixture_of_more_than_ten_comes_back_in_order() -> None:
    many = Mixture([Point({"weight": torch.full((4, 3), float(k)), "bias": torch.zeros(4)}) for k in range(12)])
    again = posterior_from_tensors("mixture", dict(sorted(many.tensors().items())))
    assert [member.mean["weight"][0, 0].item() for member in again.members] == list(range(12))  # type: ignore[attr-defined]


def test_a_mixture_has_members() -> None:
    with pytest.raises(VarloraError, match="at least one"):
        Mixture([])
