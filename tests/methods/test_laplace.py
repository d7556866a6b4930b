"""Laplace: its curvature, posterior and predictive on networks small enough to form every matrix, and its choices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from helpers import about, plan, seeded
from reference import laplace_slow as slow
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from varlora.config import settings_from
from varlora.data import collate
from varlora.demo.run import one_thread
from varlora.errors import ConfigError, VarloraError
from varlora.fit import check_method
from varlora.methods import LaplaceDiag, LaplaceKfac, Trained
from varlora.methods.laplace import CANDIDATES
from varlora.model import LoRA, class_logits, load_model
from varlora.params import trainable
from varlora.posterior import DiagonalGaussian, KroneckerGaussian, Linearised
from varlora.predict import predict
from varlora.prompt import Encoded

BAD = 46
"""A token that makes the gradients of its row not finite, in one way or another."""
ROWS = helpers.make_rows(6)
"""Of different lengths, and of two to five answers."""
both = pytest.mark.parametrize("method", [LaplaceDiag, LaplaceKfac], ids=lambda method: method.name)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


class Net(nn.Module):
    """Two layers that train; after each, every token sees the average of those up to it, without padding."""

    def __init__(self, width: int = 4, rank: int = 4, hidden: int = 5) -> None:
        super().__init__()
        source = seeded()
        table = torch.randn(48, rank, generator=source) @ torch.randn(rank, width, generator=source) / rank**0.5
        self.register_buffer("table", table)
        self.register_buffer("head", 2 * torch.randn(3, 5, generator=source))
        self.a, self.b = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, 3, bias=False)
        for layer in (self.a, self.b):
            layer.weight.data.normal_(std=0.7, generator=source)

    def forward(self, batch: Any) -> Tensor:
        real = batch["attention_mask"][:, :, None].to(self.table.dtype)  # (B, T, 1)
        count = real.cumsum(1).clamp(min=1)
        # 0.3: padding has inputs of its own
        hidden = ((torch.tanh(self.a(self.table[batch["input_ids"]])) * real).cumsum(1) / count) + 0.3
        out = (torch.tanh(self.b(hidden)) * real).cumsum(1) / count
        return masked(out[:, -1] @ self.head, batch)


class Linear(nn.Module):
    """Logits are linear in the last token's embedding, and in the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(48, 3, generator=seeded()))
        self.layer = nn.Linear(3, 5, bias=False)
        self.layer.weight.data.normal_(generator=seeded(1))

    def forward(self, batch: Any) -> Tensor:
        return masked(self.layer(self.table[batch["input_ids"]])[:, -1], batch)


def masked(logits: Tensor, batch: Any) -> Tensor:
    mask = batch["answer_mask"]
    return logits[:, : mask.shape[1]].masked_fill(~mask, -math.inf)


def forward(model: nn.Module, batch: Any) -> Tensor:
    return model(batch)


def one_by_one(rows: Sequence[Encoded]) -> list[Any]:
    """Batches of one row, without padding and without answers that it lacks."""
    return [collate([row], 0) for row in rows]


def ended(model: nn.Module, rows: Sequence[Encoded] = ROWS, of: Any = forward, **settings: Any) -> Trained:
    """Return what training ended with, whose draws are those of all rows in one batch."""

    def draw(posterior: Any, rows: Sequence[Encoded], n: int) -> tuple[Tensor, Tensor]:
        batch = collate(rows, 0)
        with torch.no_grad():
            return posterior.draw_logits(model, batch, n, seeded(), of), batch["labels"]

    return Trained(model.eval(), rows, draw, of, **{"say": lambda words: None, **settings})


def covariances(posterior: Any) -> dict[str, np.ndarray]:
    """Return the covariance of each weight matrix: what linear functions that pick one weight each vary like."""
    posterior = posterior.weights if isinstance(posterior, Linearised) else posterior
    found = {}
    for name, mean in posterior.mean.items():
        pick = torch.eye(mean.numel()).view(1, mean.numel(), *mean.shape)
        found[name] = posterior.quadratic(name, pick)[0].numpy()
    return found


def inverse(H: np.ndarray, precision: float) -> np.ndarray:
    return np.linalg.inv(H + precision * np.eye(len(H)))


def reference(method: Any, model: nn.Module, rows: Sequence[Encoded], of: Any = forward) -> dict[str, np.ndarray]:
    """Return H of each weight matrix as the method has it."""
    single = one_by_one(rows)
    if method is LaplaceKfac:
        return slow.kronecker(model, single, of)
    whole = slow.blocks(model, slow.gauss_newton(model, single, of))
    return {name: np.diag(np.diag(H)) for name, H in whole.items()}


def diagonal(method: LaplaceDiag, trained: Trained) -> dict[str, Tensor]:
    """Return h as the method collects it."""
    found: Any = method.collector(trained)
    for part in method.passes(trained):
        found.add(*part)
    return found.h


# --- the posterior is (H + δI)⁻¹ ---


@both
@pytest.mark.parametrize("precision", [0.3, 20.0])
@pytest.mark.parametrize("predictive", ["linearised", "weights"])
def test_covariance_is_the_inverse_of_curvature_and_prior(method: Any, precision: float, predictive: Any) -> None:
    """Of rows with padding and without some answers, against matrices that are formed row by row."""
    said: list[str] = []
    net, chosen = Net(), method(prior_precision=precision, predictive=predictive)
    posterior = chosen.posterior(ended(net, say=said.append))
    assert type(posterior) is (
        Linearised if predictive == "linearised" else DiagonalGaussian if method is LaplaceDiag else KroneckerGaussian
    )
    assert helpers.same(posterior.mean, trainable(net))
    expected, found = reference(method, net, ROWS), covariances(posterior)
    assert list(found) == ["a.weight", "b.weight"]
    for name, H in expected.items():
        assert np.diag(H).max() > 3 * 0.3  # there is something to see beside the prior
        np.testing.assert_allclose(found[name], inverse(H, precision), rtol=1e-4, atol=1e-5 / precision)
    assert about(said, "precision") == [f"The prior precision is {precision:.4g}."]


def test_kronecker_is_exact_for_one_row_of_one_token() -> None:
    net, rows = Net(), [Encoded("x", (7,), helpers.ANSWERS, 1, False)]
    exact = slow.blocks(net, slow.gauss_newton(net, one_by_one(rows), forward))
    found = covariances(LaplaceKfac(prior_precision=0.2).posterior(ended(net, rows)))
    for name, H in exact.items():
        np.testing.assert_allclose(found[name], inverse(H, 0.2), rtol=1e-4, atol=1e-5)


def test_kronecker_of_low_rank_is_the_whole_where_the_inputs_are_of_that_rank() -> None:
    """Embeddings of 30 dimensions that span 3 of them: the factor is sketched."""
    net, rank = Net(width=30, rank=3), 3
    A, G, tokens = slow.kronecker_factors(net, one_by_one(ROWS), forward)
    posterior = LaplaceKfac(rank=rank, prior_precision=0.5, predictive="weights").posterior(ended(net))
    assert posterior.right["a.weight"].shape == (30, 3)
    found = covariances(posterior)
    for name in A:
        H = np.kron(G[name], slow.truncated(A[name], rank) if name == "a.weight" else A[name]) / tokens
        np.testing.assert_allclose(found[name], inverse(H, 0.5), rtol=0, atol=1e-4)  # variances are up to 2


@both
def test_neither_padding_nor_batches_matter(method: Any) -> None:
    """Also not what padding is embedded as, nor how much there is, nor the answers that other rows have."""
    net = Net()
    net.table[45] *= 30
    long = Encoded("long", tuple(range(3, 27)), helpers.ANSWERS, 0, False)
    rows = [*ROWS, long]
    expected = covariances(method(prior_precision=0.5).posterior(ended(net, rows, batch_size=1)))
    for settings in ({"batch_size": 7}, {"batch_size": 7, "pad_token_id": 45}, {"batch_size": 3}):
        found = covariances(method(prior_precision=0.5).posterior(ended(net, rows, **settings)))
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-5)


@both
def test_batches_do_not_matter_to_a_sketch(method: Any) -> None:
    net, settings = Net(width=40, rank=20), {"rank": 4} if method is LaplaceKfac else {}
    one, other = (
        covariances(method(prior_precision=0.5, **settings).posterior(ended(net, batch_size=size))) for size in (1, 6)
    )
    np.testing.assert_allclose(one["a.weight"], other["a.weight"], rtol=0, atol=1e-4)


def adapter(std: float = 0.3) -> Any:
    """The tiny model with a B that is not zero, so that A has gradients too."""
    model = helpers.tiny_model()
    with torch.no_grad():
        for name, p in trainable(model).items():
            if "lora_B" in name:
                p.normal_(std=std, generator=seeded(3))
    return model


def adapted_head() -> nn.Module:
    """One whose output layer has an adapter too, which sees the last token of each row alone."""
    lora = LoRA(rank=2, alpha=4, targets=("q_proj", "lm_head"))
    model = load_model(helpers.base_folder(), lora=lora, device="cpu")[0]
    with torch.no_grad():
        for p in trainable(model).values():
            p.normal_(std=0.3, generator=seeded(3))
    return model


@pytest.mark.parametrize("made", [adapter, adapted_head])
def test_diagonal_of_a_language_model_is_that_of_a_loop_over_rows_and_classes(made: Callable[[], nn.Module]) -> None:
    model, rows = made(), helpers.make_rows(5)
    posterior = LaplaceDiag(prior_precision=0.7, predictive="weights").posterior(
        ended(model, rows, class_logits, batch_size=2)
    )
    params, h = trainable(model), {name: torch.zeros_like(p) for name, p in trainable(model).items()}
    for row in rows:
        logits = class_logits(model, collate([row], 0))[0]
        probs = logits.softmax(-1)
        J = [torch.autograd.grad(logit, list(params.values()), retain_graph=True) for logit in logits]
        for number, name in enumerate(params):
            mean = sum(p * J_c[number] for p, J_c in zip(probs, J))
            h[name] += sum(p * (J_c[number] - mean).square() for p, J_c in zip(probs, J)).detach()  # E[(J − E J)²]
    assert max(value.max() for value in h.values()) > 5
    for name, value in h.items():
        torch.testing.assert_close(1 / posterior.std[name].square() - 0.7, value, rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(posterior.std[name], (value + 0.7).rsqrt(), rtol=1e-3, atol=1e-6)


def test_factors_of_an_output_layer_count_the_rows() -> None:
    model, rows = adapted_head(), helpers.make_rows(5)
    trained, method = ended(model, rows, class_logits, batch_size=2), LaplaceKfac()
    found: Any = method.collector(trained)
    for batch in method.passes(trained):
        found.add(*batch)
    lengths = sum(len(row.input_ids) for row in rows)
    assert {name: found.tokens[name] for name in found.a} == {
        name: len(rows) if "lm_head" in name else lengths for name in trainable(model)
    }
    hidden: list[Tensor] = []
    head = next(layer for name, layer in model.named_modules() if name.endswith("lm_head.lora_A.default"))
    hook = head.register_forward_hook(lambda layer, arguments, output: hidden.append(arguments[0][0, -1]))
    for row in rows:
        class_logits(model, collate([row], 0))
    hook.remove()
    (name,) = (name for name in found.a if "lm_head.lora_A" in name)
    torch.testing.assert_close(found.a[name].y, sum(torch.outer(x, x) for x in hidden) @ found.a[name].omega)


def test_the_model_is_left_as_it_was() -> None:
    net = Net()
    before = helpers.bits(net)
    for p in net.parameters():
        p.grad = torch.full_like(p, 7.0)
    posterior = LaplaceKfac(prior_precision=1.0).posterior(ended(net))
    assert helpers.same(helpers.bits(net), before)
    assert all((p.grad == 7).all() for p in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())
    with torch.no_grad():
        net.a.weight.add_(1)
    assert helpers.same(posterior.mean, before)


# --- the linearised predictive ---


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        (LaplaceDiag, helpers.make_rows(8)),
        (LaplaceKfac, helpers.make_rows(8)),
        (LaplaceKfac, [Encoded("x", (7,), helpers.ANSWERS, 1, False)]),
    ],
    ids=["diagonal", "kronecker", "kronecker, exact"],
)
def test_predictive_of_a_linear_model_is_that_of_the_explicit_matrices(method: Any, rows: list[Encoded]) -> None:
    """J (H + δI)⁻¹ Jᵀ of rows that were not trained on; for one row of one token H is the Gauss-Newton matrix."""
    model, precision = Linear(), 0.4
    posterior = method(prior_precision=precision).posterior(ended(model, rows))
    if len(rows) == 1:
        H = slow.gauss_newton(model, one_by_one(rows), forward)
    else:
        H = reference(method, model, rows)["layer.weight"]
    test = helpers.make_rows(5, seed=1)
    logits, covariance = posterior.covariance(model, collate(test, 0), forward)
    for number, row in enumerate(test):
        x, count = model.table[row.input_ids[-1]].double().numpy(), len(row.label_tokens)
        J = np.kron(np.eye(5), x)  # (5, 15)
        expected = J @ inverse(H, precision) @ J.T
        np.testing.assert_allclose(covariance[number, :count, :count], expected[:count, :count], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            logits[number, :count].detach(),
            (J @ model.layer.weight.detach().double().numpy().ravel())[:count],
            rtol=1e-4,
        )


# --- the prior's precision ---


@both
def test_precision_of_the_largest_evidence(method: Any) -> None:
    """Of all eigenvalues of H, that are formed row by row."""
    said: list[str] = []
    net = Net()
    H = reference(method, net, ROWS)
    values = np.concatenate([np.linalg.eigvalsh(block).clip(min=0) for block in H.values()])
    square = slow.square_norm(trainable(net))
    best = minimize_scalar(lambda x: -slow.log_evidence(math.exp(x), values, square), bounds=(-5, 8), method="bounded")
    posterior = method(predictive="weights").posterior(ended(net, say=said.append))
    assert about(said, "precision") == [f"The prior precision is {math.exp(best.x):.4g}."]
    found = covariances(posterior)
    for name, block in H.items():
        np.testing.assert_allclose(found[name], inverse(block, math.exp(best.x)), rtol=1e-3, atol=1e-5)


def of_predict(model: Any, rows: Sequence[Encoded], **settings: Any) -> Trained:
    """What `fit` gives a method."""

    def draw(posterior: Any, rows: Sequence[Encoded], n: int) -> tuple[Tensor, Tensor]:
        found = predict(model, posterior, rows, pad_token_id=0, samples=n, seed=0)
        return found.logits, found.labels

    return Trained(model.eval(), rows, draw, class_logits, **settings)


@pytest.mark.parametrize(
    ("method", "predictive"), [(LaplaceDiag, "linearised"), (LaplaceKfac, "weights")], ids=["linearised", "weights"]
)
def test_precision_of_the_lowest_nll_on_held_out_rows(method: Any, predictive: Any) -> None:
    """Each candidate's NLL is computed anew: half a decade apart, from 0.1 to a million."""
    assert pytest.approx([10 ** (k / 2) for k in range(-2, 13)]) == CANDIDATES
    said: list[str] = []
    model, held_out = adapter(), helpers.make_rows(8, seed=2)
    trained = of_predict(model, helpers.make_rows(6), calibration=held_out, say=said.append)
    posterior = method(choose_by="calibration", predictive=predictive).posterior(trained)
    losses = {}
    for precision in CANDIDATES:
        candidate = method(prior_precision=precision, predictive=predictive).posterior(
            of_predict(model, helpers.make_rows(6), say=lambda words: None)
        )
        predictions = predict(model, candidate, held_out, pad_token_id=0, samples=10)
        losses[precision] = slow.nll(predictions.logits, [row.label for row in held_out])
    best = min(losses, key=lambda precision: losses[precision])
    assert min(CANDIDATES) < best < max(CANDIDATES)
    assert about(said, "precision") == [f"The prior precision is {best:.4g}."]
    expected = method(prior_precision=best, predictive=predictive).posterior(of_predict(model, helpers.make_rows(6)))
    assert helpers.same(posterior.tensors(), expected.tensors())


@both
@pytest.mark.parametrize("choose_by", ["evidence", "calibration"])
def test_a_precision_that_is_given_is_used_as_it_is(method: Any, choose_by: Any) -> None:
    """Outside of all candidates, and without a look at held-out rows."""
    said: list[str] = []
    chosen = method(prior_precision=1e-7, choose_by=choose_by, predictive="weights")
    assert chosen.problems(plan()) == []
    posterior = chosen.posterior(ended(Net(), say=said.append))
    assert about(said, "precision") == ["The prior precision is 1e-07."]
    if method is LaplaceDiag:
        H = reference(method, Net(), ROWS)["a.weight"]
        np.testing.assert_allclose(covariances(posterior)["a.weight"], inverse(H, 1e-7), rtol=1e-3)
    else:
        assert posterior.rest.item() == pytest.approx(1e7)


def test_a_candidate_whose_draws_are_not_finite_is_not_chosen() -> None:
    net = Net()
    trained = ended(net, calibration=helpers.make_rows(4, seed=2))

    def draw(posterior: Any, rows: Any, n: int) -> tuple[Tensor, Tensor]:
        logits, labels = trained.draw(posterior, rows, n)
        return (logits * math.nan if posterior.std["a.weight"].max() > 1 else logits), labels

    method = LaplaceDiag(choose_by="calibration", predictive="weights")
    posterior = method.posterior(Trained(**{**vars(trained), "draw": draw}))
    assert posterior.std["a.weight"].max() <= 1


@pytest.mark.parametrize("lost", [1, 4])
def test_held_out_rows_that_are_not_finite_at_the_mean_choose_nothing(lost: int) -> None:
    """As one long row is in float16. Where all of them are, the evidence chooses."""
    said: list[str] = []
    net, held_out = Net(), helpers.make_rows(4, seed=2)
    trained = ended(net, calibration=held_out, say=said.append)

    def draw(posterior: Any, rows: Any, n: int) -> tuple[Tensor, Tensor]:
        logits, labels = trained.draw(posterior, rows, n)
        return logits.masked_fill(torch.tensor([row in held_out[:lost] for row in rows])[:, None], math.nan), labels

    found = LaplaceDiag(choose_by="calibration").posterior(Trained(**{**vars(trained), "draw": draw}))
    assert f"{lost} of 4 rows are left out: their logits are not finite at the mean." in said
    of_the_rest = LaplaceDiag(choose_by="evidence" if lost == 4 else "calibration")
    expected = of_the_rest.posterior(Trained(**{**vars(trained), "calibration": held_out[lost:]}))
    assert helpers.same(found.tensors(), expected.tensors())


def test_an_evidence_that_does_not_set_the_precision_is_doubted() -> None:
    """As where all rows are learned by heart."""
    said: list[str] = []
    net = Net()
    with torch.no_grad():
        for p in trainable(net).values():
            p *= 100
    LaplaceDiag().posterior(ended(net, say=said.append))
    (words,) = about(said, "precision is")
    assert words.startswith("The prior precision is 0.0001; it is at the end of its range, so the training rows do not")


# --- the Fisher estimate ---


def test_the_fisher_estimate_is_the_curvature_on_average() -> None:
    net = Net()
    expected = diagonal(LaplaceDiag(), ended(net, batch_size=6))
    fisher = LaplaceDiag(curvature="fisher")
    runs = [diagonal(fisher, ended(net, batch_size=6, seed=seed)) for seed in range(600)]
    for name, value in expected.items():
        found = torch.stack([run[name] for run in runs])
        assert ((found.mean(0) - value).abs() <= 5 * found.std(0) / len(runs) ** 0.5 + 1e-6).all()
        assert (found.mean(0) - value).norm() < 0.1 * value.norm()


@both
def test_the_fisher_estimate_takes_one_pass_and_depends_on_the_seed(method: Any) -> None:
    net, fisher = Net(), method(curvature="fisher", prior_precision=0.5)
    exact = [len(gradients) for _, gradients, _ in method().passes(ended(net, batch_size=3))]
    assert exact == [3, 4]  # rows of up to four and of up to five answers
    assert [len(gradients) for _, gradients, _ in fisher.passes(ended(net, batch_size=3))] == [1, 1]
    one, same, other = (fisher.posterior(ended(net, seed=seed)).tensors() for seed in (1, 1, 2))
    assert helpers.same(one, same)
    assert not helpers.same(one, other)


# --- gradients that are not finite ---


def with_bad(*at: int, count: int = 6) -> list[Encoded]:
    """Rows with five answers, some of which end in the token that does harm."""
    rows = []
    for number, row in enumerate(helpers.make_rows(count, seed=4)):
        ids = (*row.input_ids[:-1], BAD) if number in at else row.input_ids
        rows.append(Encoded(row.id, ids, helpers.ANSWERS, 0, False))
    return rows


def harmed(logits: Tensor, batch: Any, harm: Callable[[Tensor], Tensor]) -> Tensor:
    bad = (batch["input_ids"] == BAD).any(1)
    return logits.index_put((bad,), harm(logits[bad]))


def bad_embedding(value: float) -> tuple[nn.Module, Any]:
    net = Net()
    net.table[BAD] = value
    return net, forward


HARMS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "inputs nan": lambda: bad_embedding(math.nan),
    "inputs inf": lambda: bad_embedding(math.inf),
    # finite logits, whose gradient is 0 times infinity
    "gradients nan": lambda: (
        Net(),
        lambda net, batch: harmed(net(batch), batch, lambda logits: logits + (0 * logits).sqrt()),
    ),
    "logits nan": lambda: (Net(), lambda net, batch: harmed(net(batch), batch, lambda logits: logits * math.nan)),
    # as where the last product overflows: what flows back is 0
    "logits inf": lambda: (
        Net(),
        lambda net, batch: harmed(net(batch), batch, lambda logits: logits.masked_fill(logits.isfinite(), math.inf)),
    ),
}


@both
@pytest.mark.parametrize("harm", HARMS)
def test_rows_whose_gradients_are_not_finite_are_left_out_and_reported(method: Any, harm: str) -> None:
    said: list[str] = []
    net, of = HARMS[harm]()
    chosen = method(prior_precision=0.5)
    found = chosen.posterior(ended(net, with_bad(1, 4), of, batch_size=1, say=said.append))
    kept = [row for number, row in enumerate(with_bad()) if number not in (1, 4)]
    expected = chosen.posterior(ended(net, kept, of, batch_size=1))
    assert helpers.same(found.tensors(), expected.tensors())
    assert about(said, "finite") == ["2 training rows were left out of the curvature: their gradients are not finite."]


@pytest.mark.parametrize("harm", HARMS)
def test_the_fisher_estimate_leaves_them_out_too(harm: str) -> None:
    said: list[str] = []
    net, of = HARMS[harm]()
    chosen = LaplaceDiag(prior_precision=0.5, curvature="fisher", predictive="weights")
    posterior = chosen.posterior(ended(net, with_bad(1, 4), of, batch_size=1, say=said.append))
    assert about(said, "2 training rows were left out")
    assert all(std.isfinite().all() for std in posterior.std.values())


def test_the_other_rows_of_their_batch_are_kept() -> None:
    said: list[str] = []
    net, of = HARMS["inputs nan"]()
    chosen = LaplaceDiag(prior_precision=0.5, predictive="weights")
    found = chosen.posterior(ended(net, with_bad(1), of, batch_size=3, say=said.append))
    kept = [row for number, row in enumerate(with_bad()) if number != 1]
    expected = chosen.posterior(ended(net, kept, of))
    assert about(said, "1 training rows were left out")
    for name, std in expected.std.items():
        torch.testing.assert_close(found.std[name], std)


@both
@pytest.mark.parametrize("settings", [{"prior_precision": 0.5}, {}], ids=["given", "evidence"])
def test_without_any_row_left_it_is_refused_in_words(method: Any, settings: Any) -> None:
    net, of = HARMS["inputs nan"]()
    with pytest.raises(VarloraError, match="finite"):
        method(**settings).posterior(ended(net, with_bad(*range(6)), of))


# --- memory ---


@both
@pytest.mark.parametrize("fitting", [1, 2])
def test_a_pass_that_does_not_fit_is_made_in_halves(method: Any, fitting: int) -> None:
    """What was trained before must not be lost to a batch that is too large for C - 1 backward passes."""
    sizes: list[int] = []

    def of(net: nn.Module, batch: Any) -> Tensor:
        sizes.append(len(batch["labels"]))
        if sizes[-1] > fitting:
            raise torch.OutOfMemoryError
        return forward(net, batch)

    net, chosen = Net(), method(prior_precision=0.5)
    found = chosen.posterior(ended(net, ROWS, of, batch_size=6)).tensors()
    expected = chosen.posterior(ended(net, ROWS, batch_size=6)).tensors()
    assert {6, 3, 1} <= set(sizes)
    for name, value in expected.items():
        if "left" not in name and "right" not in name:  # eigenvectors have a sign to choose
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_a_row_that_does_not_fit_is_out_of_memory() -> None:
    def of(net: nn.Module, batch: Any) -> Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        LaplaceDiag().posterior(ended(Net(), ROWS, of, batch_size=6))


# --- what is refused before anything runs ---


@both
class TestRefusals:
    def test_nothing_is_wrong_with_the_defaults(self, method: Any) -> None:
        for finished in (True, False):
            assert method().problems(plan(finished=finished)) == []
        assert method.concludes_from == ("adamw",)

    @pytest.mark.parametrize("finished", [True, False])
    def test_calibration_without_held_out_rows(self, method: Any, finished: bool) -> None:
        chosen = method(choose_by="calibration")
        (problem,) = chosen.problems(plan(finished=finished))
        assert "held out for `choose_by: calibration`, but there are none. Train with `calibration_fraction`" in problem
        assert chosen.problems(plan(calibration=True, finished=finished)) == []

    @pytest.mark.parametrize("precision", [0.0, -1.0, math.nan, math.inf])
    def test_a_precision_that_is_none(self, method: Any, precision: float) -> None:
        (problem,) = method(prior_precision=precision).problems(plan())
        assert f"Expected `prior_precision` to be a number > 0, but got {precision}" in problem

    def test_fit_refuses_before_anything_runs(self, method: Any, tmp_path: Path) -> None:
        model = helpers.tiny_model()
        before = helpers.bits(model)
        with pytest.raises(ConfigError, match="held out for `choose_by: calibration`"):
            helpers.run_fit(model, method(choose_by="calibration"), tmp_path, calibration=[])
        assert list(tmp_path.iterdir()) == []
        assert helpers.same(helpers.bits(model), before)

    @pytest.mark.parametrize("name", ["curvature", "choose_by", "predictive"])
    def test_a_recipe_with_an_option_that_is_none(self, method: Any, name: str) -> None:
        values = {"task": "boolq", "model": "m", "method": {"name": method.name, name: "other"}}
        with pytest.raises(ConfigError, match=f"Expected `method.{name}` to be one of .*, but got 'other'"):
            settings_from(values)

    @pytest.mark.parametrize("name", ["curvature", "choose_by", "predictive"])
    def test_an_option_that_is_none(self, method: Any, name: str) -> None:
        (problem,) = check_method(method(**{name: "other"}), plan(calibration=True), {})
        assert f"Expected `{name}` to be one of " in problem
        assert "but got 'other'" in problem

    def test_every_setting_comes_back_from_a_recipe(self, method: Any) -> None:
        chosen = method(curvature="fisher", prior_precision=3.0, choose_by="calibration", predictive="weights")
        values = {"task": "boolq", "model": "m", "calibration_fraction": 0.1}
        settings = settings_from({**values, "method": {"name": method.name, **asdict(chosen)}})
        assert method(**settings.method_settings) == chosen


@pytest.mark.parametrize("rank", [0, -3])
def test_a_factor_of_no_rank_is_refused(rank: int) -> None:
    (problem,) = LaplaceKfac(rank=rank).problems(plan())
    assert f"Expected `rank` to be a whole number >= 1, but got {rank}" in problem
    assert len(LaplaceKfac(rank=rank, prior_precision=0.0).problems(plan())) == 2  # all at once
    assert LaplaceKfac(rank=1).problems(plan()) == []
