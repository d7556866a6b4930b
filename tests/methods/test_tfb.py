"""TFB: the turned adapter against numpy, the noise against its closed form, and the search against predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from helpers import about, plan, seeded
from reference.laplace_slow import nll
from torch import Tensor

from varlora.config import settings_from
from varlora.demo.run import one_thread
from varlora.errors import ConfigError, VarloraError
from varlora.methods import Tfb, Trained
from varlora.methods.tfb import largest, turned
from varlora.model import class_logits
from varlora.params import swapped, trainable
from varlora.posterior import DiagonalGaussian
from varlora.predict import predict
from varlora.prompt import Encoded

SHAPES = {"q": (7, 6), "v": (7, 9)}
"""in and out of two layers, with an adapter of rank 4."""
RANK = 4


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def names(layer: str) -> tuple[str, str]:
    return f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"


def adapter(rank_of_b: int = RANK, rank: int = RANK) -> dict[str, Tensor]:
    """A and B of both layers; B is the product of two matrices, so its rank is what is asked for but for rounding."""
    source, weights = seeded(), {}
    for layer, (d_in, d_out) in SHAPES.items():
        a, b = names(layer)
        weights[a] = torch.randn(rank, d_in, generator=source)
        weights[b] = torch.randn(d_out, rank_of_b, generator=source) @ torch.randn(rank_of_b, rank, generator=source)
    return weights


def product(weights: Any, layer: str) -> np.ndarray:
    a, b = names(layer)
    return weights[b].double().numpy() @ weights[a].double().numpy()


def projection(B: Tensor) -> np.ndarray:
    """Onto the space that the columns of B span, (out, out), without a singular value decomposition of ours."""
    B = B.double().numpy()
    return B @ np.linalg.pinv(B, rcond=1e-5)


# --- the turned adapter ---


@pytest.mark.parametrize("rank_of_b", [4, 2, 1])
def test_turned_is_the_same_adapter(rank_of_b: int) -> None:
    weights = adapter(rank_of_b)
    mean, unit = turned(weights)
    assert list(mean) == list(unit) == list(weights)
    for layer in SHAPES:
        a, b = names(layer)
        np.testing.assert_allclose(product(mean, layer), product(weights, layer), rtol=0, atol=1e-4)
        assert all(mean[name].shape == unit[name].shape == weights[name].shape for name in (a, b))
        columns = mean[b].T @ mean[b]  # orthogonal, and of the length d, largest first
        d = np.linalg.svd(weights[b].double().numpy(), compute_uv=False)
        np.testing.assert_allclose(columns.numpy(), np.diag(d**2), rtol=0, atol=1e-4 * d[0] ** 2)


def test_turned_leaves_the_models_answers() -> None:
    model = helpers.tiny_model()
    with torch.no_grad():
        for p in trainable(model).values():
            p.normal_(std=0.3, generator=seeded(3))
    rows = helpers.make_rows(6)
    before = predict(model, DiagonalGaussian(*[helpers.bits(model)] * 2), rows, pad_token_id=0, samples=0).logits
    with swapped(model, turned(helpers.bits(model))[0]):
        after = predict(model, DiagonalGaussian(*[helpers.bits(model)] * 2), rows, pad_token_id=0, samples=0).logits
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


def test_row_i_of_a_has_the_standard_deviation_of_one_over_its_singular_value() -> None:
    weights = adapter()
    _, unit = turned(weights)
    for layer in SHAPES:
        a, b = names(layer)
        d = np.linalg.svd(weights[b].double().numpy(), compute_uv=False)
        np.testing.assert_allclose(unit[a].numpy(), np.repeat(1 / d[:, None], 7, 1), rtol=1e-4)
        assert (unit[b] == 0).all()


@pytest.mark.parametrize("rank_of_b", [4, 2, 1, 0])
def test_each_direction_of_bs_columns_carries_the_same_noise(rank_of_b: int) -> None:
    """Cov[vec(B'·A')] = σ² (U Uᵀ ⊗ I): in closed form, and of draws."""
    weights, sigma = adapter(rank_of_b), 0.3
    mean, unit = turned(weights)
    posterior, source = DiagonalGaussian(mean, {name: sigma * std for name, std in unit.items()}), seeded(1)
    draws = [posterior.draw(source) for _ in range(3000)]
    for layer, (d_in, d_out) in SHAPES.items():
        a, b = names(layer)
        expected = sigma**2 * np.kron(projection(weights[b]), np.eye(d_in))
        # vec(B ΔA) is linear in vec(ΔA), row by row
        lift = np.kron(mean[b].double().numpy(), np.eye(d_in))
        variance = (sigma * unit[a].double().numpy().ravel()) ** 2
        np.testing.assert_allclose((lift * variance) @ lift.T, expected, rtol=0, atol=1e-4 * sigma**2)
        samples = np.stack([product(draw, layer).ravel() for draw in draws]) - product(mean, layer).ravel()
        error = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / len(draws))
        assert (np.abs(samples.T @ samples / len(draws) - expected) <= 5 * error + 1e-6).all()
        assert expected.shape == (d_out * d_in, d_out * d_in)


@pytest.mark.parametrize("rank_of_b", [0, 1, 3])
def test_directions_without_a_singular_value_have_no_noise(rank_of_b: int) -> None:
    mean, unit = turned(adapter(rank_of_b))
    for layer in SHAPES:
        a, _ = names(layer)
        assert (unit[a][:rank_of_b] > 0).all()
        assert (unit[a][rank_of_b:] == 0).all()
    assert all(value.isfinite().all() for value in (*mean.values(), *unit.values()))


def test_a_rank_above_the_layers_output_is_the_same_adapter_too() -> None:
    """As 32 is for the tiny model's values."""
    weights = adapter(rank=8)
    mean, unit = turned(weights)
    for layer in SHAPES:
        np.testing.assert_allclose(product(mean, layer), product(weights, layer), rtol=0, atol=1e-3)
        for name in names(layer):
            assert mean[name].shape == unit[name].shape == weights[name].shape


def test_an_adapter_of_more_than_two_matrices_is_refused() -> None:
    with pytest.raises(VarloraError, match=r"`q\.magnitude`"):
        turned({**adapter(), "q.magnitude": torch.ones(3)})


# --- the search ---


@pytest.mark.parametrize("threshold", np.geomspace(2e-8, 5e3, 60).tolist())
def test_largest_is_within_little_more_than_one_per_cent(threshold: float) -> None:
    tried: list[float] = []

    def passes(sigma: float) -> bool:
        tried.append(sigma)
        return sigma <= threshold

    found = largest(passes)
    assert threshold / 1.012 <= found <= threshold
    assert found in tried
    assert len(tried) <= 1 + 20 + 6


@pytest.mark.parametrize("threshold", [0.01, 0.02, 0.005, 0.01 * 2**19])
def test_largest_where_a_scale_that_is_tried_is_the_limit(threshold: float) -> None:
    assert largest(lambda sigma: sigma <= threshold) == pytest.approx(threshold, rel=0.012)


def test_no_noise_where_none_passes() -> None:
    tried: list[float] = []
    assert largest(lambda sigma: bool(tried.append(sigma))) == 0
    assert min(tried) < 1e-7


def test_the_search_ends_where_all_noise_passes() -> None:
    tried: list[float] = []

    def passes(sigma: float) -> bool:
        tried.append(sigma)
        return True

    found = largest(passes)
    assert math.isfinite(found)
    assert found == max(tried) > 1e3


# --- the posterior ---


def ended(model: Any, rows: Sequence[Encoded], draw: Any = None, **settings: Any) -> Trained:
    """What `fit` gives a method."""

    def of_predict(posterior: Any, rows: Sequence[Encoded], n: int) -> tuple[Tensor, Tensor]:
        found = predict(model, posterior, rows, pad_token_id=0, samples=n, seed=0)
        return found.logits, found.labels

    return Trained(model.eval(), rows, draw or of_predict, class_logits, **{"say": lambda words: None, **settings})


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tfb], tuple[Any, DiagonalGaussian, list[str]]]:
    """Train as TFB does, half-way to knowing the rows by heart, and conclude; made once for each setting."""
    runs: dict[Tfb, Any] = {}

    def get(method: Tfb) -> Any:
        if method not in runs:
            said: list[str] = []
            model = helpers.tiny_model()
            folder = tmp_path_factory.mktemp("tfb")
            posterior = helpers.run_fit(model, method, folder, steps=12, seed=4, warn=said.append)
            runs[method] = model, posterior, said
        return runs[method]

    return get


def rise(model: Any, posterior: Any, rows: Sequence[Encoded], samples: int, seed: int = 4) -> float:
    """Return by what share the draws' NLL is above the mean's."""
    labels = [row.label for row in rows]
    with_noise, without = (
        nll(predict(model, posterior, rows, pad_token_id=0, samples=n, seed=seed).logits, labels) for n in (samples, 0)
    )
    return with_noise / without - 1


@pytest.mark.parametrize(
    "method",
    [
        Tfb(lr=2e-2, samples=3),
        Tfb(lr=2e-2, samples=3, bound=0.2),
        Tfb(lr=2e-2, samples=5, bound=0.03, anchor_rows=5),
    ],
    ids=["the paper's bound", "much", "few rows"],
)
def test_the_loss_on_the_anchor_rows_rises_as_far_as_the_bound_allows(method: Tfb, fitted: Any) -> None:
    """The next larger scale that may be tried, 1.1 % above, or at most 3 % above, does not pass."""
    model, posterior, said = fitted(method)
    anchors = ended(model, helpers.make_rows(), seed=4).some_rows(method.anchor_rows)
    assert 0 < rise(model, posterior, anchors, method.samples) <= method.bound * (1 + 1e-3)
    assert rise(model, posterior.scale(1.03**2), anchors, method.samples) > method.bound
    assert about(said, f"on {len(anchors)} training rows")
    sigma = max((std[0, 0] * posterior.mean[b].norm(dim=0)[0]).item() for std, b in pairs(posterior))
    assert about(said, "scale of the noise is") == [f"The scale of the noise is {sigma:.4g}."]


@pytest.mark.parametrize("lost", [1, 12])
def test_anchor_rows_that_are_not_finite_at_the_mean_are_left_out(lost: int, fitted: Any) -> None:
    """With one of them all noise would pass: its loss without noise is infinite."""
    said: list[str] = []
    model, _, _ = fitted(method := Tfb(lr=2e-2, samples=3))
    rows = helpers.make_rows(12)
    bad = {row.id for row in rows[:lost]}
    whole = ended(model, rows)

    def draw(posterior: Any, rows: Any, n: int) -> tuple[Tensor, Tensor]:
        logits, labels = whole.draw(posterior, rows, n)
        return logits.masked_fill(torch.tensor([row.id in bad for row in rows])[:, None], math.nan), labels

    if lost == 12:
        with pytest.raises(VarloraError, match="training rows with finite logits, but there are none"):
            method.posterior(ended(model, rows, draw))
        return
    found = method.posterior(ended(model, rows, draw, say=said.append))
    assert "1 of 12 rows are left out: their logits are not finite at the mean." in said
    assert about(said, "scale of the noise is")
    assert max(float(std.max()) for std in found.std.values()) < 100


def pairs(posterior: DiagonalGaussian) -> list[tuple[Tensor, str]]:
    """The standard deviation of each A, and the name of its B."""
    return [(std, name.replace(".lora_A.", ".lora_B.")) for name, std in posterior.std.items() if ".lora_A." in name]


def test_more_is_borne_where_the_bound_is_larger(fitted: Any) -> None:
    one, other = (fitted(Tfb(lr=2e-2, samples=3, **bound))[1] for bound in ({}, {"bound": 0.2}))
    assert helpers.same(one.mean, other.mean)
    for (std, _), (larger, _) in zip(pairs(one), pairs(other)):
        assert (larger > 1.5 * std).all()


def test_noise_is_of_one_scale_in_all_layers(fitted: Any) -> None:
    """σ/d in row i of every A, d the length of B's column i; none in B."""
    _, posterior, _ = fitted(Tfb(lr=2e-2, samples=3))
    assert type(posterior) is DiagonalGaussian
    scales = torch.cat([std * posterior.mean[b].norm(dim=0)[:, None] for std, b in pairs(posterior)])
    torch.testing.assert_close(scales, scales[0, 0].expand_as(scales), rtol=1e-4, atol=0)
    assert all((std == 0).all() for name, std in posterior.std.items() if ".lora_B." in name)


@pytest.mark.parametrize(("anchor_rows", "used"), [(3, 3), (12, 12), (500, 12)])
def test_only_the_anchor_rows_are_drawn_and_each_scale_with_as_many_draws(anchor_rows: int, used: int) -> None:
    """The same rows each time; the mean once."""
    model, rows, calls = helpers.tiny_model(), helpers.make_rows(), []

    def draw(posterior: Any, of: Sequence[Encoded], n: int) -> tuple[Tensor, Tensor]:
        calls.append((list(of), n))
        spread = sum(std.sum() for std in posterior.std.values())
        assert (spread == 0) == (n == 0)
        return torch.zeros(max(n, 1), len(of), 5) + spread * torch.eye(5)[4], torch.tensor([row.label for row in of])

    with torch.no_grad():
        for p in trainable(model).values():
            p.normal_(generator=seeded(3))
    Tfb(anchor_rows=anchor_rows, samples=7).posterior(ended(model, rows, draw))
    assert all(of == calls[0][0] for of, _ in calls)
    assert len({row.id for row in calls[0][0]}) == used
    assert [n for _, n in calls].count(0) == 1
    assert {n for _, n in calls} == {0, 7}


@pytest.mark.parametrize("seed", range(3))
def test_of_a_file_that_is_sorted_by_label_the_anchor_rows_are_of_all_labels(seed: int) -> None:
    rows = sorted(helpers.make_rows(60), key=lambda row: row.label)
    model, kinds = helpers.tiny_model(), set()

    def draw(posterior: Any, of: Sequence[Encoded], n: int) -> tuple[Tensor, Tensor]:
        kinds.add(frozenset(row.label for row in of))
        return torch.zeros(max(n, 1), len(of), 5), torch.tensor([row.label for row in of])

    with torch.no_grad():
        for p in trainable(model).values():
            p.normal_(generator=seeded(3))
    Tfb(anchor_rows=30).posterior(ended(model, rows, draw, seed=seed))
    assert kinds == {frozenset(row.label for row in rows)}


def test_an_adapter_that_has_learned_nothing_gets_no_noise_and_says_so() -> None:
    """B is zero at the start: 4 layers of rank 4."""
    said: list[str] = []
    model = helpers.tiny_model()
    posterior = Tfb(samples=2).posterior(ended(model, helpers.make_rows(), say=said.append))
    directions = 4 * len(pairs(posterior))
    assert about(said, "no singular value") == [
        f"{directions} of {directions} directions of the adapter have no singular value and get no noise."
    ]
    assert all((std == 0).all() for std in posterior.std.values())
    assert all(value.isfinite().all() for value in posterior.tensors().values())


def test_directions_without_a_singular_value_are_counted() -> None:
    said: list[str] = []
    model = helpers.tiny_model()
    count = 0
    with torch.no_grad():
        for name, p in trainable(model).items():
            if ".lora_B." in name:
                p.copy_(torch.outer(torch.randn(len(p), generator=seeded(3)), torch.randn(4, generator=seeded(4))))
                count += 1
    posterior = Tfb(samples=2).posterior(ended(model, helpers.make_rows(), say=said.append))
    assert about(said, "no singular value")[0].startswith(f"{3 * count} of {4 * count} directions")
    for std, _ in pairs(posterior):
        assert (std[0] > 0).all()
        assert (std[1:] == 0).all()


def test_where_no_noise_passes_the_posterior_is_a_point_and_says_so() -> None:
    """Rows that are all right with certainty, and any noise makes one of them wrong."""
    said: list[str] = []
    model = helpers.tiny_model()
    with torch.no_grad():
        for p in trainable(model).values():
            p.normal_(generator=seeded(3))

    def draw(posterior: Any, rows: Any, n: int) -> tuple[Tensor, Tensor]:
        return torch.eye(2)[int(n > 0)].expand(max(n, 1), len(rows), 2), torch.zeros(len(rows), dtype=torch.long)

    posterior = Tfb().posterior(ended(model, helpers.make_rows(), draw, say=said.append))
    assert all((std == 0).all() for std in posterior.std.values())
    assert about(said, "No noise passes") == ["No noise passes the bound, so there is none. Raise `bound`."]


def test_noise_that_makes_logits_infinite_does_not_pass() -> None:
    model = helpers.tiny_model()
    with torch.no_grad():
        for p in trainable(model).values():
            p.normal_(generator=seeded(3))

    def draw(posterior: Any, rows: Any, n: int) -> tuple[Tensor, Tensor]:
        value = math.nan if max(std.max() for std in posterior.std.values()) > 1 else 0.0
        return torch.full((max(n, 1), len(rows), 2), value), torch.zeros(len(rows), dtype=torch.long)

    posterior = Tfb().posterior(ended(model, helpers.make_rows(), draw))
    assert 0.9 < max(std.max() for std in posterior.std.values()) <= 1


def test_the_seed_decides(fitted: Any, tmp_path: Path) -> None:
    method = Tfb(lr=2e-2, samples=3)
    settings = {"steps": 12, "warn": lambda words: None}
    same, other = (
        helpers.run_fit(helpers.tiny_model(), method, tmp_path / str(seed), seed=seed, **settings) for seed in (4, 5)
    )
    _, expected, _ = fitted(method)
    assert helpers.same(same.tensors(), expected.tensors())
    assert not helpers.same(other.std, expected.std)


# --- what is refused before anything runs ---


def test_nothing_is_wrong_with_the_defaults() -> None:
    """They are the paper's."""
    for finished in (True, False):
        assert Tfb().problems(plan(finished=finished)) == []
    assert (Tfb().bound, Tfb().anchor_rows, Tfb().samples) == (0.003, 500, 10)
    assert set(Tfb.concludes_from) >= {"adamw"}


@pytest.mark.parametrize("bound", [0.0, -0.1, math.nan, math.inf])
def test_a_bound_that_is_none_is_refused(bound: float) -> None:
    (problem,) = Tfb(bound=bound).problems(plan())
    assert f"Expected `bound` to be a relative rise > 0, but got {bound}" in problem


@pytest.mark.parametrize("name", ["anchor_rows", "samples"])
@pytest.mark.parametrize("value", [0, -2])
def test_nothing_to_search_with_is_refused(name: str, value: int) -> None:
    (problem,) = Tfb(**{name: value}).problems(plan(finished=True))
    assert f"Expected `{name}` to be a whole number >= 1, but got {value}" in problem


def test_all_problems_are_reported_at_once_and_before_anything_runs(tmp_path: Path) -> None:
    model, method = helpers.tiny_model(), Tfb(bound=0.0, anchor_rows=0, samples=0)
    assert len(method.problems(plan())) == 3
    before = helpers.bits(model)
    with pytest.raises(ConfigError, match=r"(?s)`bound`.*`anchor_rows`.*`samples`"):
        helpers.run_fit(model, method, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert helpers.same(helpers.bits(model), before)
    values = {"name": "tfb", "bound": 0.0, "anchor_rows": 0, "samples": 0}
    with pytest.raises(ConfigError, match=r"(?s)`bound`.*`anchor_rows`.*`samples`"):
        settings_from({"task": "boolq", "model": "m", "method": values})
