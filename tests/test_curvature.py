"""Curvature from layer inputs and output gradients that are made up, against loops and eigen-decompositions."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from reference.laplace_slow import log_evidence, truncated
from scipy.optimize import minimize_scalar
from torch import Tensor

import varlora.curvature
from varlora.curvature import RANGE, Diagonal, Factor, Kronecker, best_evidence, root, sampled_root
from varlora.demo.run import one_thread
from varlora.errors import VarloraError

SIZES = {"v": (2, 6), "w": (5, 3)}
"""out and in of two layers."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


Batches = list[tuple[dict[str, Tensor], list[dict[str, Tensor]], int]]


def batches(sizes: Any = SIZES, count: int = 3, columns: int = 2) -> Batches:
    """Return batches of two rows of four positions, the first of which is padding in the first row."""
    found, seed = [], 0
    for _ in range(count):
        inputs, gradients = {}, [{} for _ in range(columns)]
        for name, (d_out, d_in) in sizes.items():
            for values, size in ((inputs, d_in), *((g, d_out) for g in gradients)):
                seed += 1
                values[name] = numbers(2, 4, size, seed=seed)
                values[name][0, 0] = 0
        found.append((inputs, gradients, dict.fromkeys(sizes, 7)))
    return found


def collected(curvature: Any, of: Batches) -> Any:
    for inputs, gradients, tokens in of:
        curvature.add(inputs, gradients, tokens)
    return curvature


def kronecker(rank: int = 10, say: Any = None, seed: int = 0) -> Kronecker:
    return Kronecker(rank, seeded(seed), say or (lambda words: pytest.fail(words)))


def outer_sum(values: list[Tensor]) -> np.ndarray:
    """Σ xxᵀ over all positions, one by one."""
    total: Any = 0.0
    for value in values:
        for x in value.double().flatten(0, 1).numpy():
            total = total + np.outer(x, x)
    return total


def covariance(posterior: Any, name: str) -> np.ndarray:
    """Return the covariance of a weight matrix: what linear functions that pick one weight each vary like."""
    shape = posterior.mean[name].shape
    pick = torch.eye(shape.numel()).view(1, shape.numel(), *shape)
    return posterior.quadratic(name, pick)[0].numpy()


def zeros(sizes: Any = SIZES) -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in sizes.items()}


# --- a root of Λ ---


def exact(p: Tensor) -> Tensor:
    """diag(p) − ppᵀ without cancellation: pᵢ(1 − pᵢ) is pᵢ times what the others have."""
    found = torch.empty(len(p), len(p), dtype=torch.float64)
    for i in range(len(p)):
        for j in range(len(p)):
            others = sum(p[k].item() for k in range(len(p)) if k != i)
            found[i, j] = p[i] * others if i == j else -p[i] * p[j]
    return found


def check_root(p: Tensor) -> None:
    columns = root(p)
    assert len(columns) == p.shape[1] - 1
    assert all(column.shape == p.shape and column.isfinite().all() for column in columns)
    L = torch.stack(columns, -1)  # (B, C, C - 1)
    for row, of_row in zip(p, L @ L.mT):
        expected = exact(row)
        scale = expected.diagonal().sqrt()
        error = (of_row - expected).abs()
        assert (error <= 1e-10 * scale[:, None] * scale + 1e-300).all()  # as correlations, so small ones count too


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_root_of_random_probabilities(classes: int) -> None:
    for temperature in (1.0, 5.0):
        check_root((temperature * numbers(50, classes).double()).softmax(-1))


@pytest.mark.parametrize("classes", [2, 5])
def test_root_where_answers_have_no_probability(classes: int) -> None:
    """Whichever they are, all but one included."""
    for pattern in range(1, 2**classes):
        present = torch.tensor([bool(pattern >> k & 1) for k in range(classes)])
        logits = numbers(3, classes, seed=pattern).double().masked_fill(~present, -math.inf)
        check_root(logits.softmax(-1))
        columns = root(logits.softmax(-1))
        assert all((column[:, ~present] == 0).all() for column in columns)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("rest", [1e-12, 1e-100])
def test_root_of_a_model_that_is_almost_sure(classes: int, rest: float) -> None:
    """Λ of 1e-12 is not rounded away, whichever answer it is sure of."""
    for sure in range(classes):
        p = torch.full((1, classes), rest / (classes - 1), dtype=torch.float64)
        p[0, sure] = 1 - rest
        L = torch.stack(root(p), -1)[0]
        diagonal = (L @ L.T).diagonal()
        torch.testing.assert_close(diagonal, exact(p[0]).diagonal(), rtol=1e-10, atol=0)
        if rest == 1e-12:
            torch.testing.assert_close(L @ L.T, exact(p[0]), rtol=0, atol=1e-10 * rest)


@pytest.mark.parametrize("classes", [2, 5])
def test_root_of_certainty_is_zero(classes: int) -> None:
    assert all((column == 0).all() for column in root(torch.eye(classes, dtype=torch.float64)))


def test_sampled_root_is_a_root_on_average() -> None:
    p = torch.tensor([[0.2, 0.5, 0.3, 0.0], [0.9, 0.1, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    draws = 20_000
    (column,) = sampled_root(p.repeat(draws, 1), seeded())
    outer = (column[:, :, None] * column[:, None]).view(draws, 3, 4, 4)
    error = outer.std(0) / draws**0.5
    expected = torch.stack([exact(row) for row in p])
    assert ((outer.mean(0) - expected).abs() <= 5 * error + 1e-12).all()
    assert ((column.view(draws, 3, 4).mean(0)).abs() < 5 / draws**0.5).all()
    assert (column.view(draws, 3, 4)[:, p == 0] == 0).all()  # an answer that a row lacks is never drawn


# --- the diagonal ---


def test_diagonal_is_the_sum_of_each_rows_squared_gradients() -> None:
    made = batches()
    found = collected(Diagonal(), made)
    for name, (d_out, d_in) in SIZES.items():
        expected = np.zeros((d_out, d_in))
        for inputs, gradients, _ in made:
            for row in range(2):
                for g in gradients:
                    of_row = sum(np.outer(g[name][row, t].numpy(), inputs[name][row, t].numpy()) for t in range(4))
                    expected += of_row**2
        np.testing.assert_allclose(found.h[name].numpy(), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            np.diag(covariance(found.gaussian(zeros(), 0.5), name)), 1 / (expected.ravel() + 0.5), rtol=1e-5
        )
    values = found.eigenvalues()
    assert values.dtype == torch.float64
    torch.testing.assert_close(values, torch.cat([found.h[name].flatten().double() for name in SIZES]))


# --- Kronecker factors ---


def test_kronecker_is_g_times_a_over_all_tokens() -> None:
    """G ⊗ A/M; eigenvalues and posterior both, and one prior precision after the other."""
    made = batches()
    found, expected = collected(kronecker(), made), {}
    for name in SIZES:
        A = outer_sum([inputs[name] for inputs, _, _ in made])
        G = outer_sum([g[name] for _, gradients, _ in made for g in gradients])
        expected[name] = np.kron(G, A) / 21
    values = np.concatenate([np.linalg.eigvalsh(H) for H in expected.values()])
    np.testing.assert_allclose(np.sort(found.eigenvalues().numpy()), np.sort(values), rtol=1e-4, atol=1e-4)
    for precision in (0.5, 30.0):
        posterior = found.gaussian(zeros(), precision)
        for name, H in expected.items():
            inverse = np.linalg.inv(H + precision * np.eye(len(H)))
            np.testing.assert_allclose(covariance(posterior, name), inverse, rtol=1e-3, atol=1e-5 / precision)


def test_eigenvectors_are_orthonormal_and_their_number_is_the_rank_of_large_factors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An adapter's rank, the smaller side of its matrices, is kept whole, be it as large as 64."""
    monkeypatch.setattr(varlora.curvature, "WHOLE", 64)
    sizes = {
        "up": (50, 4),
        "down": (4, 60),
        "rank 50": (50, 60),
        "rank 64": (70, 64),
        "square": (64, 64),
        "large": (65, 66),
    }
    posterior = collected(kronecker(3), batches(sizes)).gaussian(zeros(sizes), 1.0)
    expected = {
        "up": (3, 4),
        "down": (4, 3),
        "rank 50": (50, 3),
        "rank 64": (3, 64),
        "square": (64, 3),
        "large": (3, 3),
    }
    for name, ranks in expected.items():
        assert posterior.variance[name].shape == ranks
        for basis, rank in zip((posterior.left[name], posterior.right[name]), ranks):
            torch.testing.assert_close(basis.T @ basis, torch.eye(rank), rtol=0, atol=1e-5)
        assert ((posterior.variance[name] > 0) & (posterior.variance[name] <= 1)).all()
    assert posterior.rest == 1


@pytest.mark.parametrize("true_rank", [1, 3])
def test_a_sketch_of_a_factor_of_at_most_the_rank_is_the_factor(true_rank: int) -> None:
    sizes, basis = {"w": (4, 60)}, numbers(true_rank, 60, seed=99)
    made = batches(sizes)
    for number, (inputs, _, _) in enumerate(made):
        inputs["w"] = numbers(2, 4, true_rank, seed=200 + number) @ basis
    A = outer_sum([inputs["w"] for inputs, _, _ in made])
    G = outer_sum([g["w"] for _, gradients, _ in made for g in gradients])
    H = np.kron(G, truncated(A, 3)) / 21
    inverse = np.linalg.inv(H + 0.5 * np.eye(len(H)))
    found = covariance(collected(kronecker(3), made).gaussian(zeros(sizes), 0.5), "w")
    np.testing.assert_allclose(found, inverse, rtol=0, atol=1e-4)  # variances are up to 2


def decaying(power: float, d: int = 200) -> tuple[Tensor, Tensor]:
    """Return vectors (N, d) and their Σ xxᵀ, float64, whose eigenvalues are about 1/iᵖ."""
    basis = torch.linalg.qr(numbers(d, d))[0]
    x = (numbers(2000, d, seed=1) * torch.arange(1, d + 1).float() ** (-power / 2)) @ basis.T
    return x, x.double().T @ x.double()


@pytest.mark.parametrize(("power", "leading", "close"), [(2.0, 2, 0.06), (3.0, 4, 0.05)])
def test_a_sketch_of_a_decaying_spectrum_is_close(power: float, leading: int, close: float) -> None:
    """Never above the factor, the leading eigenvalues within a few per cent, and on average within the bound of theory.

    That is, for k columns, E‖S − Ŝᵣ‖₁ ≤ (1 + r/(k − r − 1)) ‖S − Sᵣ‖₁ (Tropp et al. 2017, theorem 4.1).
    """
    x, S = decaying(power)
    true, rank = torch.linalg.eigvalsh(S).flip(0), 10
    errors = []
    for seed in range(10):
        factor = Factor(rank, numbers(200, 2 * rank, seed=50 + seed))
        for part in x.split(150):
            factor.add(part)
        values, vectors, damped = factor.eigen()
        assert not damped
        assert values.shape == (rank,)
        assert vectors.shape == (200, rank)
        assert (values <= true[:rank] * (1 + 1e-5)).all()
        assert (values[:leading] >= true[:leading] * (1 - close)).all()
        assert (values.diff() <= 0).all()
        errors.append(torch.linalg.eigvalsh(S - vectors * values @ vectors.T).abs().sum())
    assert torch.stack(errors).mean() <= (1 + rank / (2 * rank - rank - 1)) * true[rank:].sum()


@pytest.mark.parametrize("rank", [10, 3])
def test_neither_the_batches_nor_their_order_matter(rank: int) -> None:
    """Also where factors are sketched: of all rows at once, and of one row at a time from the last on."""
    sizes = {"v": (4, 40), "w": (30, 5)}
    made = batches(sizes)
    rows = [
        (
            {k: v[r : r + 1] for k, v in inputs.items()},
            [{k: v[r : r + 1] for k, v in g.items()} for g in gradients],
            dict.fromkeys(sizes, n),
        )
        for inputs, gradients, _ in reversed(made)
        for r, n in ((1, 4), (0, 3))
    ]
    one, other = (collected(kronecker(rank), of) for of in (made, rows))
    torch.testing.assert_close(one.eigenvalues(), other.eigenvalues(), rtol=1e-3, atol=1e-3)
    for name in sizes:
        pair = [covariance(found.gaussian(zeros(sizes), 2.0), name) for found in (one, other)]
        np.testing.assert_allclose(*pair, rtol=0, atol=1e-4)
    both = [collected(Diagonal(), of).h for of in (made, rows)]
    for name in sizes:
        torch.testing.assert_close(both[0][name], both[1][name])


def test_a_factor_of_nothing_leaves_the_prior() -> None:
    """As G of A is while B is zero."""
    sizes = {"w": (40, 50)}
    made = [(inputs, [{"w": torch.zeros(2, 4, 40)}], n) for inputs, _, n in batches(sizes)]
    found = collected(kronecker(3), made)
    assert (found.eigenvalues().abs() < 1e-30).all()
    np.testing.assert_allclose(covariance(found.gaussian(zeros(sizes), 4.0), "w"), np.eye(2000) / 4, atol=1e-6)


def test_llamas_adapter_fits_in_200_megabytes() -> None:
    """Queries and values of Llama-2-7B: 64 layers of rank 8, at the default rank."""
    from varlora.methods import LaplaceKfac

    sizes = {f"{layer}.{name}": shape for layer in range(64) for name, shape in (("A", (8, 4096)), ("B", (4096, 8)))}
    found = kronecker(LaplaceKfac().rank)
    found.add(
        {name: numbers(1, 2, d_in, seed=i) for i, (name, (_, d_in)) in enumerate(sizes.items())},
        [{name: numbers(1, 2, d_out, seed=i) for i, (name, (d_out, _)) in enumerate(sizes.items())}],
        dict.fromkeys(sizes, 2),
    )
    factors = [*found.a.values(), *found.g.values()]
    held = {factor.omega.data_ptr(): factor.omega.numel() for factor in factors}
    assert found.numbers() == sum(held.values()) + sum(factor.y.numel() for factor in factors)
    assert all(factor.y.dtype == factor.omega.dtype == torch.float32 for factor in factors)
    assert 4 * found.numbers() <= 200e6
    mean = {name: torch.zeros(()).expand(shape) for name, shape in sizes.items()}
    tensors = found.gaussian(mean, 1.0).tensors()
    stored = sum(value.nbytes for name, value in tensors.items() if not name.startswith("mean."))
    assert stored <= 200e6
    assert len(tensors) == 4 * 128 + 1


# --- factors that are not positive definite ---

RAGGED = {"dense": (4, 5), "sketched": (4, 40)}


@pytest.mark.parametrize("kind", RAGGED)
@pytest.mark.parametrize("share", [0.3, 3.0], ids=["slightly", "entirely"])
def test_a_factor_that_is_not_positive_definite_is_damped_and_reported_once(kind: str, share: float) -> None:
    said: list[str] = []
    sizes = {"v": RAGGED[kind], "w": RAGGED[kind]}
    found = collected(kronecker(3, said.append), batches(sizes))
    factor = found.a["w"]
    largest = torch.linalg.matrix_norm(factor.y, 2) / torch.linalg.matrix_norm(factor.omega, 2)
    factor.y -= share * largest * factor.omega  # S − c I
    assert (found.eigenvalues() >= 0).all()
    for precision in (0.1, 10.0):
        posterior = found.gaussian(zeros(sizes), precision)
        assert all(value.isfinite().all() for value in posterior.tensors().values())
        assert all(((v > 0) & (v <= 1 / precision * (1 + 1e-6))).all() for v in posterior.variance.values())
    assert said == ["1 of 4 curvature factors were not positive definite: damped."]


def test_every_factor_that_was_damped_is_counted() -> None:
    said: list[str] = []
    sizes = {"v": RAGGED["dense"], "w": RAGGED["sketched"]}
    found = collected(kronecker(3, said.append), batches(sizes))
    for factor in (found.a["v"], found.a["w"], found.g["w"]):
        factor.y.neg_()
    found.gaussian(zeros(sizes), 1.0)
    assert said == ["3 of 4 curvature factors were not positive definite: damped."]


def test_damping_changes_only_the_factor_that_needs_it() -> None:
    sizes = {"v": RAGGED["dense"], "w": RAGGED["sketched"]}
    one, other = (collected(kronecker(3, lambda words: None), batches(sizes)) for _ in range(2))
    other.a["w"].y.neg_()
    pair = [covariance(found.gaussian(zeros(sizes), 1.0), "v") for found in (one, other)]
    np.testing.assert_array_equal(*pair)


def positive(d: int, rank: int, seed: int) -> Factor:
    """A sketched factor of many vectors that span three dimensions: positive semi-definite but for rounding."""
    factor, basis = Factor(rank, numbers(d, 2 * rank, seed=seed)), numbers(3, d, seed=1000 + seed)
    for part in numbers(30, 32, 3, seed=2000 + seed):
        factor.add(part @ basis)
    return factor


@pytest.mark.parametrize(
    ("d", "rank"),
    [
        (4096, 10),
        (64, 10),
        (32, 10),
        (32, 15),
    ],
)
def test_a_factor_of_low_rank_is_not_reported(d: int, rank: int) -> None:
    assert not any(positive(d, rank, seed).eigen()[2] for seed in range(2 if d > 1000 else 20))


def test_a_sketch_that_has_overflown_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite activations whose squares are not: it may be refused, but must not hang."""
    factor, calls, cholesky = Factor(2, numbers(20, 4)), 0, torch.linalg.cholesky_ex

    def counted(matrix: Tensor) -> Any:
        nonlocal calls
        calls += 1
        assert calls < 700, "hangs"  # ten times each from the smallest float64 to the largest
        return cholesky(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted)
    factor.add(1e20 * numbers(3, 20, seed=1))
    with contextlib.suppress(VarloraError):
        factor.eigen()


# --- the evidence ---


@pytest.mark.parametrize("seed", range(8))
def test_best_evidence_is_where_the_evidence_is_largest(seed: int) -> None:
    """Of random eigenvalues over many magnitudes; those that are zero do not matter."""
    source = np.random.default_rng(seed)
    eigenvalues = 10 ** source.uniform(-4, 5, size=40)
    square = 10 ** source.uniform(-2, 2)
    with_zeros = np.concatenate([eigenvalues, np.zeros(100)])
    low, high = (math.log(end) for end in RANGE)
    grid = np.linspace(low, high, 2000)
    best = grid[np.argmax([log_evidence(math.exp(x), with_zeros, square) for x in grid])]
    expected = minimize_scalar(
        lambda x: -log_evidence(math.exp(x), with_zeros, square),
        bounds=(max(low, best - 0.1), min(high, best + 0.1)),
        method="bounded",
        options={"xatol": 1e-10},
    )
    found = best_evidence(torch.from_numpy(eigenvalues), square)
    assert found == pytest.approx(math.exp(expected.x), rel=1e-4)
    assert found == pytest.approx(best_evidence(torch.from_numpy(with_zeros), square), rel=1e-9)
    gamma = (eigenvalues / (eigenvalues + found)).sum()
    assert gamma == pytest.approx(found * square, rel=1e-6)


@pytest.mark.parametrize(
    ("eigenvalues", "square", "end"),
    [([1.0, 2.0], 0.0, 1e8), ([1e9, 1e9], 1e-12, 1e8), ([0.0, 0.0], 1.0, 1e-4), ([1e-9], 1e3, 1e-4)],
    ids=["all weights zero", "weights close to zero", "no curvature", "hardly any curvature"],
)
def test_best_evidence_stays_in_its_range(eigenvalues: list[float], square: float, end: float) -> None:
    found = best_evidence(torch.tensor(eigenvalues, dtype=torch.float64), square)
    assert found == pytest.approx(end, rel=1e-6)
    assert end in RANGE
