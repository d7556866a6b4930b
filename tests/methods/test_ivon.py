"""IVON's method: what it finds before training, how the noise grows and is held back, and what it logs."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import plan
from torch import nn
from transformers import TrainerCallback

from varlora import IVON, scale
from varlora.demo.run import one_thread
from varlora.errors import DamagedFileError, VarloraError
from varlora.fit import _draw, start_of
from varlora.methods import METHODS, Comparison, Ivon, Start, Temperature
from varlora.methods.ivon import BATCHES, BEARABLE, COLDEST, MEMORY, PAPER, PROBE, PROGRESS, _layer, _noisy, _probe
from varlora.model import class_logits
from varlora.params import copied, trainable
from varlora.posterior import DiagonalGaussian
from varlora.predict import predict

ROWS = helpers.make_rows(64)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def start(**changes: Any) -> Start:
    model = helpers.tiny_model().eval()
    settings: dict[str, Any] = {"batch_size": 4, "steps": 400, "say": lambda words: None, **changes}
    return Start(model, ROWS, partial(_draw, model, 0, settings.get("seed", 0)), class_logits, **settings)


def found(method: Ivon, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    prepared = method.prepare(start(**changes))
    assert prepared is not None
    return dict(prepared.settings), dict(prepared.found)


# --- what is found ---


def test_it_finds_what_is_left_to_it() -> None:
    settings, seen = found(Ivon())
    sigma = 1 / math.sqrt(settings["ess"] * settings["hess_init"])
    assert sigma == pytest.approx(seen["sigma"])
    assert seen["reach"] == sigma
    assert settings["lr"] * 1e-3 == pytest.approx(scale.step_size(sigma, 25, 400, 0.9, scale.DECAY))
    assert settings["noise_warmup"] == scale.growth(25)
    assert settings["cooling"] is True


def test_noise_of_that_size_changes_predictions_as_much_as_the_bound_says() -> None:
    """On all rows, of which it has looked at some."""
    _, seen = found(Ivon(), steps=4000)
    begin = start()
    mean = copied(begin.model)
    at_mean = begin.draw(_noisy(mean, 0.0), ROWS, 0)[0][0]
    kl = scale.kl_under_noise(begin.draw(_noisy(mean, seen["sigma"]), ROWS, 64)[0], at_mean)
    assert seen["bound"] == pytest.approx(scale.bound([len(row.label_tokens) for row in ROWS], 4000 * 4 / 64))
    assert seen["bound"] / 1.7 < kl < seen["bound"] * 1.7


def test_seeds_find_much_the_same_sigma_where_noise_shifts_all_rows_alike() -> None:
    """So few draws would tell little, on however many rows: here KL = (σz)²/8 in all of them, z normal."""

    def shifted(posterior: Any, rows: Any, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        source = torch.Generator().manual_seed(seed)
        std = next(iter(posterior.std.values())).max() if count else 0.0
        shift = std * torch.randn(max(count, 1), generator=source)
        return torch.stack([shift, 0 * shift], -1)[:, None].expand(-1, len(rows), -1), torch.zeros(len(rows))

    begin = start(steps=800)
    twos = [replace(row, label_tokens=(1, 2), label=0) for row in ROWS] * 50  # one epoch
    noisy = partial(_noisy, copied(begin.model))
    sigmas = [
        _probe(replace(begin, rows=twos, seed=seed, draw=partial(shifted, seed=seed)), noisy, first=0.1)[0]
        for seed in range(20)
    ]
    # of n draws the root of a mean square is off by 1/√(2n)
    assert statistics.stdev(map(math.log, sigmas)) < 1.2 / math.sqrt(2 * 13)  # as of 13 draws; of 4 it is 0.35
    assert statistics.fmean(sigmas) == pytest.approx(math.sqrt(8 * scale.bound([2], 1.0)), rel=0.2)


def test_each_layer_has_its_part_in_that_change() -> None:
    """The first layer of a base whose second one is made deaf gets the less noise; together they change as much."""
    begin = start(steps=4000)
    with torch.no_grad():
        for name, weight in begin.model.named_parameters():
            if ".layers.1." in name and "o_proj" in name:
                weight.mul_(0.3)
    prepared = Ivon().prepare(begin)
    assert prepared is not None
    mean = copied(begin.model)
    at_mean = begin.draw(_noisy(mean, 0.0), ROWS, 0)[0][0]

    def kl(shares: dict[str, float]) -> float:
        std = {
            name: torch.full_like(value, prepared.found["sigma"] * shares.get(_layer(name), 0.0))
            for name, value in mean.items()
        }
        return scale.kl_under_noise(begin.draw(DiagonalGaussian(mean, std), ROWS, 64)[0], at_mean)

    shares = prepared.settings["sigma_by_layer"]
    assert shares["0"] < 1 < shares["1"]
    apart = kl({"0": 1.0}) / kl({"1": 1.0})
    assert abs(math.log(kl({"0": shares["0"]}) / kl({"1": shares["1"]}))) < abs(math.log(apart)) - math.log(1.5)
    assert kl({"0": 1.0, "1": 1.0}) / 1.7 < kl(shares) < 1.7 * kl({"0": 1.0, "1": 1.0})


def test_a_layers_noise_steps_and_hessian_are_its_own() -> None:
    params = trainable(helpers.tiny_model())
    method = Ivon(lr=0.1, ess=100.0, hess_init=1.0, sigma_by_layer={"1": 2.0})
    optimizer = method.optimizer(params, 10, 4, 0)
    assert {
        _layer(name): (group["lr"], group["hess_init"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    } == {"0": (0.1, 1.0), "1": (0.2, 0.25)}
    std = optimizer.posterior().std
    assert {_layer(name): value.unique().tolist() for name, value in std.items()} == {
        "0": [pytest.approx(0.1)],
        "1": [pytest.approx(0.2)],
    }
    assert method.log(optimizer, {})["hessian_over_first"] == pytest.approx(1.0)
    assert len(Ivon(sigma_by_layer={}).optimizer(params, 10, 4, 0).param_groups) == 1
    by_number = {0: 0.5}  # as YAML reads it
    settings, _ = found(Ivon(sigma_by_layer=by_number))  # type: ignore[arg-type]
    assert settings["sigma_by_layer"] == {"0": 0.5}


@pytest.mark.parametrize("given", [{}, {"lr_like_adamw": 1e-4}, {"lr": 0.02}])
def test_rescaled_learning_rates_make_the_steps_that_are_announced(given: dict[str, float]) -> None:
    """In every layer: with `rescale_lr` the optimizer multiplies by the group's own h₀ + δ."""
    steps = []
    for rescale in (False, True):
        method = Ivon(**given, rescale_lr=rescale, weight_decay=1e-4)
        settings, seen = found(method)
        optimizer = replace(method, **settings).optimizer(trainable(helpers.tiny_model()), 64, 4, 0)
        by_group = [
            group["lr"] * (group["hess_init"] + 1e-4 if rescale else 1.0) / seen["step"] * 1e-3
            for group in optimizer.param_groups
        ]
        steps.append(by_group)
    assert steps[0] == pytest.approx(steps[1])
    shares = settings["sigma_by_layer"].values()
    assert sorted({round(step, 3) for step in steps[0]}) == sorted({round(share, 3) for share in shares})
    assert len(set(shares)) > 1  # layers have steps of their own


def test_processes_that_train_together_make_the_epochs_of_one_with_all_their_rows() -> None:
    alone, seen_alone = found(Ivon(), batch_size=8)
    together, seen = found(Ivon(), batch_size=4, ranks=2)
    assert seen["epochs"] == seen_alone["epochs"] == 50
    assert together["noise_warmup"] == alone["noise_warmup"]
    assert together["lr"] == pytest.approx(alone["lr"], rel=0.2)  # of draws on other rows
    assert together["hess_init"] == pytest.approx(alone["hess_init"], rel=0.3)


def test_fit_tells_a_method_how_many_processes_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varlora.fit.ranks", lambda *_: (0, 2))
    begin = start_of(helpers.tiny_model(), ROWS, pad_token_id=0, steps=3, batch_size=4, accumulation=2)
    assert begin.rows_per_step == 16


def test_a_sigma_of_a_layer_is_above_zero() -> None:
    for wrong in (0.0, -1.0, math.inf, math.nan, "much", True):
        (problem,) = Ivon(sigma_by_layer={"3": wrong}).problems(plan())  # type: ignore[dict-item]
        assert "layer 3" in problem


def test_more_passes_over_the_rows_take_more_noise() -> None:
    few, many = (found(Ivon(), steps=steps)[1]["sigma"] for steps in (100, 4000))
    assert few < many


def test_what_is_given_is_kept() -> None:
    assert Ivon(**PAPER).prepare(start()) is None
    settings, _ = found(Ivon(lr=0.5))
    assert settings["lr"] == 0.5
    settings, seen = found(Ivon(ess=1e6))
    assert settings["ess"] == 1e6
    assert settings["noise_warmup"] == 0  # the scale is the user's
    assert 1 / math.sqrt(1e6 * settings["hess_init"]) == pytest.approx(seen["sigma"])
    decay = settings["hess_init"] / 4
    settings, seen = found(Ivon(ess=1e6, weight_decay=decay))
    assert 1 / math.sqrt(1e6 * (settings["hess_init"] + decay)) == pytest.approx(seen["sigma"])
    with pytest.raises(VarloraError, match="Expected `weight_decay` below"):
        found(Ivon(ess=1e6, weight_decay=8 * decay))
    settings, seen = found(Ivon(hess_init=2e-3, weight_decay=1e-3))
    assert settings["hess_init"] == 2e-3
    assert 1 / math.sqrt(settings["ess"] * 3e-3) == pytest.approx(seen["sigma"])
    settings, seen = found(Ivon(ess=1e6, hess_init=1e-3))
    assert seen["sigma"] == pytest.approx(0.0316, rel=1e-2)
    assert settings["lr"] * 1e-3 == pytest.approx(scale.step_size(0.0316, 25, 400, 0.9, scale.DECAY), rel=1e-2)


def test_a_learning_rate_may_be_said_in_adamws_terms() -> None:
    settings, _ = found(Ivon(lr_like_adamw=1e-3))
    assert settings["lr"] * 1e-3 == pytest.approx(scale.like_adamw(1e-3, 0.9))
    assert "lr_decay" not in settings  # it falls as AdamW's


def rates(method: Ivon, steps: int = 10) -> list[float] | None:
    """Learning rates of a training over the first, or none where the Trainer has the schedule."""
    optimizer = method.optimizer(trainable(helpers.tiny_model()), 64, 4, 0)
    schedule, seen = method.schedule(optimizer, steps), []
    if schedule is None:
        return None
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0
    return [rate / seen[0] for rate in seen]


@pytest.mark.parametrize(("given", "told"), [({}, 1), ({"lr_like_adamw": 1e-4}, 0), ({"lr": 0.02}, 0)])
def test_it_says_that_the_learning_rate_stays_where_it_does(given: dict[str, float], told: int) -> None:
    said: list[str] = []
    found(Ivon(**given), say=said.append)
    assert len(helpers.about(said, " until the last 30% of training (a weight moves by")) == told


def test_a_learning_rate_that_is_found_stays_until_the_last_part_of_training() -> None:
    settings, _ = found(Ivon())
    expected = [1.0] * 8 + [2 / 3, 1 / 3]
    assert rates(Ivon(**settings)) == pytest.approx(expected)  # once found, and as `tune` writes it
    assert rates(Ivon()) == pytest.approx(expected)
    assert rates(Ivon(**PAPER)) is rates(Ivon(lr_like_adamw=1e-3)) is None
    assert rates(Ivon(**PAPER, lr_decay=1.0)) == pytest.approx([1 - step / 10 for step in range(10)])
    slower, shorter = found(Ivon(lr_decay=1.0))[0], found(Ivon(lr_decay=0.1))[0]
    assert slower["lr"] > settings["lr"] > shorter["lr"]  # for as long a walk
    assert slower["lr_decay"] == 1.0


def test_lambda_may_be_a_multiple_of_the_root_of_the_rows() -> None:
    settings, seen = found(Ivon(ess_per_root_row=5000.0))
    assert settings["ess"] == 5000 * math.sqrt(64)
    assert 1 / math.sqrt(settings["ess"] * settings["hess_init"]) == pytest.approx(seen["sigma"])


def test_with_squared_gradients_the_first_hessian_is_what_they_average_to() -> None:
    settings, seen = found(Ivon(hess_approx="gradsq"), accumulation=2)
    assert settings["hess_init"] == pytest.approx(8 * seen["gradient"] ** 2)


def test_the_seed_decides_what_it_looks_at() -> None:
    one, again, other = (found(Ivon(), seed=seed)[0] for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_of_a_file_that_is_sorted_by_label_the_look_sees_batches_as_training_has_them() -> None:
    """A mini-batch of one label has a larger gradient, so h_0 and lambda would be off."""
    begin, seen = start(batch_size=8, steps=2000), []

    def forward(model: Any, batch: Any) -> Any:
        seen.append(len(set(batch["labels"].tolist())))
        return class_logits(model, batch)

    Ivon().prepare(replace(begin, rows=sorted(ROWS, key=lambda row: row.label), forward=forward))
    assert len(seen) == BATCHES
    assert statistics.mean(seen) > 2


@pytest.mark.parametrize(("batch_size", "least"), [(1, 460), (2, 230), (4, 120)])
def test_the_look_costs_more_than_a_twentieth_of_few_steps_alone(batch_size: int, least: int) -> None:
    """As docs/scale.md says."""
    shares = []
    for steps in (least - 30, least + 20):
        prepared = Ivon().prepare(start(steps=steps, batch_size=batch_size))
        assert prepared is not None
        shares.append(prepared.steps / steps)
    assert shares[0] > 0.05 >= shares[1]


@pytest.mark.parametrize("steps", [400, 2000, 20_000])
@pytest.mark.parametrize(("batch_size", "ranks"), [(1, 1), (4, 1), (16, 1), (4, 4), (4, 8)])
def test_the_look_costs_what_it_may(steps: int, batch_size: int, ranks: int) -> None:
    begin = replace(start(steps=steps, batch_size=batch_size, ranks=ranks), rows=ROWS * (10 if ranks > 1 else 1))
    prepared = Ivon().prepare(begin)
    assert prepared is not None
    least = (scale.TRIALS * 4 + 1) * 4 / (3 * batch_size) + 4  # four rows, and a gradient
    gradients = min(PROBE * steps / 2 + ranks, BATCHES * ranks)  # one on each rank at the least
    assert prepared.steps <= max(PROBE * steps + gradients, least + 1)
    assert prepared.steps <= 0.05 * steps or (batch_size == 1 and steps < 460)
    assert Ivon(cooling=True).compare_every(steps) * 3 * PROBE >= 1  # a comparison is a third of a step


@pytest.mark.parametrize(
    ("forward", "saw"),
    [
        (lambda logits, labels: 0 * logits + 1e4 * nn.functional.one_hot(labels, logits.shape[1]), "got 0:"),
        (lambda logits, labels: math.nan * logits, "got nan:"),
    ],
)
def test_a_gradient_that_tells_nothing_is_refused_with_what_to_do(forward: Any, saw: str) -> None:
    """That of an adapter that changes nothing, or of a base that overflows."""

    def substituted(model: Any, batch: Any) -> torch.Tensor:
        logits = class_logits(model, batch)
        return forward(torch.where(logits.isfinite(), logits, 0.0), batch["labels"])

    begin = replace(start(), forward=substituted)
    with pytest.raises(VarloraError, match=saw) as error:
        Ivon().prepare(begin)
    assert "`lr`, `ess` and `hess_init`" in str(error.value)
    assert "float32" in str(error.value)
    if "nan" not in saw:  # with these it is not needed
        prepared = Ivon(ess=1e6).prepare(begin)
        assert prepared is not None
        assert set(prepared.settings["sigma_by_layer"].values()) == {1.0}


@pytest.mark.parametrize("lead", [0.0, 30.0], ids=["new", "known"])
def test_of_rows_that_are_known_already_gradients_are_those_of_other_answers(lead: float) -> None:
    """Those of their own are as good as 0, until noise has one forgotten."""
    said: list[str] = []
    begin = replace(start(), say=said.append)
    right = {row.input_ids: row.label for row in begin.rows}

    def knowing(model: Any, batch: Any) -> torch.Tensor:
        logits = class_logits(model, batch)
        masked = zip(batch["input_ids"], batch["attention_mask"].bool())
        labels = torch.tensor([right[tuple(ids[mask].tolist())] for ids, mask in masked])
        return logits + lead * nn.functional.one_hot(labels, logits.shape[1])

    before, after = Ivon().prepare(begin), Ivon().prepare(replace(begin, forward=knowing))
    assert before is not None
    assert after is not None
    assert 1 / 3 < after.found["gradient"] / before.found["gradient"] < 3
    assert any("known already" in words for words in said) == (lead > 0)
    batches = round(PROBE * begin.steps / 2)  # and as many again
    assert after.steps - before.steps == pytest.approx(batches if lead else 0)


def test_a_trial_that_overflows_is_written_as_valid_json() -> None:
    begin = start()

    def draw(posterior: Any, rows: Any, count: int) -> Any:
        std = next(iter(posterior.std.values())).max().item() if count else 0.0
        answer = torch.tensor([math.nan if std > 0.05 else 30 * std, 0.0, 0.0])
        return answer.expand(max(count, 1), len(rows), 3), torch.zeros(len(rows))

    prepared = Ivon().prepare(replace(begin, draw=draw))
    assert prepared is not None
    assert None in [trial["kl"] for trial in prepared.found["trials"]]
    assert json.dumps(prepared.found, allow_nan=False)


def test_the_model_is_left_as_it_was() -> None:
    begin = start()
    before, grads = helpers.bits(begin.model), [p.grad for p in trainable(begin.model).values()]
    state = torch.get_rng_state()
    Ivon().prepare(begin)
    assert helpers.same(helpers.bits(begin.model), before)
    assert [p.grad for p in trainable(begin.model).values()] == grads
    assert torch.equal(torch.get_rng_state(), state)
    assert not begin.model.training


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": 0.1, "lr_like_adamw": 1e-4}, "`lr` or `lr_like_adamw`"),
        ({"ess": 1e6, "ess_per_root_row": 5000.0}, "`ess` or `ess_per_root_row`"),
        ({"lr_like_adamw": -1.0}, "a number > 0"),
        ({"clip_radius": math.inf}, "cannot be foreseen"),
        ({"mc_samples": 2}, "`accumulation`"),
        ({"noise_warmup": 1.5}, "a share of training"),
        ({"lr_decay": 0.0}, "a share of training"),
        ({"lr_decay": 1.5}, "a share of training"),
        ({"recheck": 1.0}, "a share of training"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings: dict[str, Any], said: str) -> None:
    (problem,) = Ivon(**settings).problems(plan())
    assert said in problem


def test_a_base_that_answers_much_the_same_gets_little_noise_and_long_steps() -> None:
    """However much noise there is: so steps are not as short as the noise is small."""
    said: list[str] = []
    begin = start(say=said.append)

    def draw(posterior: Any, rows: Any, count: int) -> Any:
        std = next(iter(posterior.std.values())).max().item() if count else 0.0
        answer = torch.tensor([0.3 * (1 - math.exp(-((std / 0.2) ** 2))), 0.0, 0.0])
        return answer.expand(max(count, 1), len(rows), 3), torch.zeros(len(rows))

    prepared = Ivon().prepare(replace(begin, draw=draw))
    assert prepared is not None
    seen = prepared.found
    assert seen["reach"] > 2 * seen["sigma"]
    assert prepared.settings["lr"] * 1e-3 == pytest.approx(scale.step_size(seen["reach"], 25, 400, 0.9, scale.DECAY))
    assert len(helpers.about(said, "answers much the same whatever its adapter is")) == 1


# --- while training ---


def method(**settings: Any) -> Ivon:
    return Ivon(**{**PAPER, "noise_warmup": 1.0, "cooling": True, **settings})


def optimizer_of(one: Ivon) -> IVON:
    return one.optimizer(trainable(helpers.tiny_model()), 64, 4, 0)


def test_the_noise_grows_to_its_full_size() -> None:
    one = method()
    optimizer, sizes = optimizer_of(one), []
    for step in (1, 50, 100):
        one.before_step(optimizer, step, 100, {})
        sizes.append(next(iter(optimizer.mean_sigma().values())) / 0.0316)
    assert sizes == pytest.approx([0.1, 0.5, 1.0], rel=1e-2)
    one.before_step(optimizer, 100, 100, {"held_back": 0.5})
    assert next(iter(optimizer.mean_sigma().values())) == pytest.approx(0.0158, rel=1e-2)


def test_over_the_first_epochs() -> None:
    """Of 64 rows in 400 steps of 4: 25 epochs."""
    settings, _ = found(Ivon())
    assert settings["noise_warmup"] == 0.25
    assert found(Ivon(), steps=32)[0]["noise_warmup"] == 1.0
    assert found(Ivon(noise_warmup=0.7))[0]["noise_warmup"] == 0.7
    assert found(Ivon(noise_warmup=0.0))[0]["cooling"] is False


# --- another look ---


def ready(sigma: float = 0.0316, **settings: Any) -> tuple[Ivon, IVON, Start]:
    """Return a method, its optimizer and a model whose B has left zero, as in the middle of training."""
    begin = replace(start(steps=4000), rows=ROWS * 250)  # one epoch
    for name, p in trainable(begin.model).items():
        if "lora_B" in name:
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    one = method(ess=1 / (1e-3 * sigma**2), recheck=0.25, **{"noise_warmup": 0.25, **settings})
    optimizer = one.optimizer(trainable(begin.model), len(begin.rows), 4, 0)
    return one, optimizer, begin


def changed(start: Start, sigma: float) -> float:
    """Return by how many nats noise of a size changes the predictions, of other draws than those of the look."""
    posterior = _noisy(copied(start.model), sigma)
    draws = predict(start.model, posterior, start.rows[:64], pad_token_id=0, samples=100, seed=7).logits
    mean = predict(start.model, posterior, start.rows[:64], pad_token_id=0, samples=0, seed=7).logits[0]
    return scale.kl_under_noise(draws, mean)


def drawn(optimizer: IVON) -> float:
    return next(iter(optimizer.mean_sigma().values()))


@pytest.mark.parametrize("factor", [2.5, 1 / 2.5])
def test_a_sigma_that_no_longer_suits_is_replaced(factor: float) -> None:
    one, optimizer, begin = ready()
    suits = 0.0316 * one.look_again(begin, optimizer, {})["rechecked"]
    said: list[str] = []
    one, optimizer, begin = ready(suits * factor)
    one.before_step(optimizer, 1000, 4000, {})
    state = one.look_again(replace(begin, say=said.append), optimizer, {})
    bound = scale.bound([len(row.label_tokens) for row in ROWS], 1.0)
    assert bound / 1.7 < changed(begin, suits * factor * state["rechecked"]) < bound * 1.7
    assert len(helpers.about(said, "Tried sigma again")) == 1
    one.before_step(optimizer, 1001, 4000, state)
    assert drawn(optimizer) == pytest.approx(suits * factor * state["rechecked"], rel=0.05)


@pytest.mark.parametrize("off", [1.3, 1.0, 1 / 1.3])
def test_one_that_suits_stands(off: float) -> None:
    one, optimizer, begin = ready()
    suits = 0.0316 * one.look_again(begin, optimizer, {})["rechecked"]
    one, optimizer, begin = ready(suits * off)
    said: list[str] = []
    assert one.look_again(replace(begin, say=said.append), optimizer, {}) == {"rechecked": 1.0}
    assert not said


def test_no_look_leads_far() -> None:
    """However little is felt of the noise, or however much of it."""
    one, optimizer, begin = ready()
    for logits, most in ((0.0, scale.FURTHEST), (math.nan, 1 / scale.FURTHEST)):

        def draw(posterior: Any, rows: Any, count: int, logits: float = logits) -> Any:
            return torch.full((max(count, 1), len(rows), 3), logits if count else 0.0), torch.zeros(len(rows))

        assert one.look_again(replace(begin, draw=draw), optimizer, {})["rechecked"] == most


def test_what_was_held_back_for_it_is_not_held_back_twice() -> None:
    one, optimizer, begin = ready(1.0)
    one.before_step(optimizer, 1000, 4000, {"held_back": 0.5})
    state = one.look_again(begin, optimizer, {"held_back": 0.5})
    assert state["rechecked"] < 0.5
    assert state["held_back"] == 1.0
    one, optimizer, begin = ready(1e-3)
    state = one.look_again(begin, optimizer, {"held_back": 0.5})
    assert state == {"rechecked": scale.FURTHEST, "held_back": 0.5 / scale.FURTHEST}  # let go by the comparisons


def test_it_counts_also_where_noise_neither_grows_nor_is_held_back() -> None:
    one, optimizer, _ = ready(noise_warmup=0.0, cooling=False)
    one.before_step(optimizer, 1001, 4000, {"rechecked": 0.5})
    assert drawn(optimizer) == pytest.approx(0.0158, rel=1e-2)


def test_when_there_is_another_look() -> None:
    assert Ivon().look_again_at(10) == 0
    assert Ivon(recheck=0.25).look_again_at(10) == 4  # three steps are more than a quarter of ten
    one, optimizer, begin = ready(1.0)
    wrapped = Temperature(of="ivon", settings={"ess": one.ess, "hess_init": 1e-3, "lr": 0.1, "recheck": 0.5})
    assert wrapped.look_again_at(10) == 6
    assert wrapped.look_again(begin, optimizer, {}) == one.look_again(begin, optimizer, {}) != {}


def test_nothing_of_it_is_lost_or_done_twice_in_a_resumed_run(tmp_path: Path) -> None:
    """Stopped before the look, which is before step 3 of 8, and after it; σ is another from that step on."""
    from conformance.test_methods import Crash

    settings: dict[str, Any] = {"steps": 8, "checkpoint_every": 1, "training_arguments": {"logging_steps": 1}}
    one, outcomes = method(ess=1e3, recheck=0.25, noise_warmup=0.0), []
    for stopped_at in (0, 1, 2, 3):
        folder, said = tmp_path / str(stopped_at), list[str]()
        folder.mkdir()
        if stopped_at:
            with pytest.raises(ConnectionAbortedError):
                helpers.run_fit(helpers.tiny_model(), one, folder, callbacks=[Crash(stopped_at)], **settings)
        helpers.run_fit(helpers.tiny_model(), one, folder, resume=True, warn=said.append, **settings)
        assert len(helpers.about(said, "Tried sigma again")) == (stopped_at < 3)
        outcomes.append(helpers.outcome(folder))
    assert all(outcome == outcomes[0] for outcome in outcomes)
    log = outcomes[0]["log"]
    assert ["rechecked" in line for line in log] == [False] * 2 + [True] * 6
    assert log[2]["rechecked"] < 1 / scale.FAR
    assert log[2]["sigma"] / log[1]["sigma"] == pytest.approx(log[2]["rechecked"], rel=0.05)


def test_looking_again_changes_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where σ stands, the run ends in the bits of one without the look: dropout masks, order of rows and noise too."""
    asked: list[bool] = []

    def look(self: Ivon, start: Start, optimizer: IVON, state: Any) -> dict[str, Any]:
        asked.append(start.model.training)
        real(self, start, optimizer, state)
        return {}

    real = Ivon.look_again
    monkeypatch.setattr(Ivon, "look_again", look)
    for recheck in (0.0, 0.5):
        (tmp_path / str(recheck)).mkdir()
        helpers.run_fit(
            helpers.tiny_model(dropout=0.5), method(recheck=recheck), tmp_path / str(recheck),
            training_arguments={"logging_steps": 1},
        )  # fmt: skip
    assert asked == [False]
    assert helpers.outcome(tmp_path / "0.0") == helpers.outcome(tmp_path / "0.5")


# --- what is given ---


def test_of_given_numbers_it_does_not() -> None:
    one = Ivon(**PAPER)
    optimizer = optimizer_of(one)
    one.before_step(optimizer, 1, 100, {})
    assert optimizer.param_groups[0]["ess"] == PAPER["ess"]
    assert one.compare_every(1000) > 0  # for a word of warning
    state = {"held_back": 0.5}
    for settings, share in (({"cooling": False}, 1.0), ({"cooling": True}, 0.5), ({"noise_warmup": 0.5}, 0.5)):
        Ivon(**PAPER, **settings).before_step(optimizer, 100, 100, state)
        assert optimizer.param_groups[0]["ess"] == pytest.approx(PAPER["ess"] / share**2)


def compare(one: Ivon, at_mean: float, under_noise: float, times: int, state: dict[str, Any], step: int = 90) -> list:
    return [one.compared(Comparison(step, 100, at_mean, under_noise, 1.0), state) for _ in range(times)]


def test_noise_is_held_back_while_it_takes_too_much_of_the_gain_and_let_go_after() -> None:
    one, state = method(), {}
    compare(one, 0.6, 0.6 + 0.9 * BEARABLE * 0.4, 20, state)
    assert state["held_back"] == 1.0
    compare(one, 0.6, 0.6 + 1.5 * BEARABLE * 0.4, 3 * MEMORY, state)
    assert COLDEST <= state["held_back"] < 0.3
    compare(one, 0.6, 0.6, 60, state)
    assert state["held_back"] == 1.0


def test_before_anything_is_learned_hardly_any_noise_is_borne() -> None:
    one, state = method(), {}
    compare(one, 1.1, 1.2, 60, state)
    assert state["held_back"] == COLDEST


def test_of_a_small_gain_noise_may_take_a_smaller_share() -> None:
    """At half the gain that counts as progress, half the share."""
    one, gain = method(), PROGRESS / 2
    below, above = {}, {}
    compare(one, 1 - gain, 1 - gain + 0.9 * BEARABLE / 2 * gain, 20, below)
    compare(one, 1 - gain, 1 - gain + 1.1 * BEARABLE / 2 * gain, 20, above)
    assert below["held_back"] == 1.0 > above["held_back"]


def test_a_rise_within_its_error_is_none() -> None:
    one, state = method(), {}
    for i in range(60):
        compare(one, 0.6, 0.6 + 0.22 + (0.9 if i % 2 else -0.9), 1, state)
    assert state["held_back"] > 0.5


def test_the_error_of_a_rise_is_that_of_its_average() -> None:
    """Of differences that are noise, one in six averages is more than its standard error above 0, or a few more."""
    source, one = torch.Generator().manual_seed(0), method()
    runs = torch.randn(1000, 12, generator=source).tolist()
    held = torch.zeros(12)
    for differences in runs:
        state: dict[str, Any] = {}
        for i, difference in enumerate(differences):
            state["held_back"] = 0.5
            one.compared(Comparison(90, 100, 0.6, 0.6 + BEARABLE * 0.4 + 0.01 * difference, 1.0), state)
            held[i] += state["held_back"] < 0.49
    assert held[0] == 0  # of one difference nothing is known
    assert (held[4:] / len(runs)).tolist() == pytest.approx([0.17] * 8, abs=0.03)


def test_where_all_rows_have_one_answer_nothing_is_held_back() -> None:
    state: dict[str, Any] = {}
    assert method().compared(Comparison(90, 100, 0.6, 0.9, 0.0), state) is None
    assert state == {}


def test_it_is_said_once_and_not_in_the_first_half() -> None:
    one, state = method(), {}
    assert not any(compare(one, 1.1, 1.4, 20, state, step=40))
    (words,) = filter(None, compare(one, 1.1, 1.4, 20, state, step=60))
    assert "1.400" in words
    assert "chance's 1.000" in words
    assert "`method.cooling=false`" in words


def test_of_noise_that_may_not_be_held_back_it_is_said_too() -> None:
    one, state = Ivon(**PAPER), {}
    assert not any(compare(one, 0.8, 0.85, 20, state))
    (words,) = filter(None, compare(one, 1.1, 1.4, 40, state))
    assert "noise takes back too much" in words
    assert "`method.cooling=true`" in words
    assert "held_back" not in state


def test_each_matrix_gets_the_prior_of_most_evidence(tmp_path: Path) -> None:
    """1/(λδ) = mean(m² + v), at the choice before."""
    one = method(weight_decay="auto", noise_warmup=0.0, cooling=False)
    optimizer = optimizer_of(one)
    assert len(optimizer.param_groups) == len(trainable(helpers.tiny_model()))
    before = optimizer.posterior()
    one.before_step(optimizer, 1, 100, {})
    for group in optimizer.param_groups:
        (name,) = group["param_names"]
        second = before.mean[name].square().mean() + before.std[name].square().mean()
        assert 1 / (group["ess"] * group["weight_decay"]) == pytest.approx(second.item(), rel=1e-5)
    helpers.run_fit(helpers.tiny_model(), one, tmp_path, steps=12)


def test_a_hessian_may_be_the_average_of_the_run() -> None:
    one = method(hess_approx="gradsq", hess_average="run", beta2=0.999)
    optimizer, betas = optimizer_of(one), []
    for step in (1, 80, 5000):
        one.before_step(optimizer, step, 10_000, {})
        betas.append(optimizer.param_groups[0]["beta2"])
    assert betas == pytest.approx([1 - 1 / 21, 0.99, 0.999])
    assert one.log(optimizer, {})["hessian_of_run"] == 1  # that it moves is no sign
    assert "hessian_of_run" not in method().log(optimizer, {})


# --- in a run ---


def test_what_was_found_is_written_and_logged(tmp_path: Path) -> None:
    said: list[str] = []
    posterior = helpers.run_fit(
        helpers.tiny_model(),
        Ivon(clip_radius=2e-2),
        tmp_path,
        steps=60,
        checkpoint_every=60,
        training_arguments={"logging_steps": 1},
        warn=said.append,
    )
    tuned = json.loads((tmp_path / "tuned.json").read_text())
    assert {"lr", "ess", "hess_init"} <= tuned["settings"].keys()
    assert "sigma" in helpers.about(said, "learning rate")[0]
    lines = helpers.logged(tmp_path)
    sigma = [line["sigma"] for line in lines]
    last, shares = lines[-1], tuned["settings"]["sigma_by_layer"]
    assert set(shares) == {"0", "1"}
    mean = tuned["found"]["sigma"] * sum(shares.values()) / len(shares)
    assert sigma[0] == pytest.approx(0.1 * mean, rel=0.02)
    assert sigma[-1] == pytest.approx(mean * last["held_back"], rel=0.05)
    of_layer = [last[f"sigma/layer_0{layer}"] for layer in shares]
    assert of_layer[0] / of_layer[1] == pytest.approx(shares["0"] / shares["1"], rel=0.05)
    heard = torch.cat([(posterior.mean[name].abs() > std).flatten() for name, std in posterior.std.items()])
    assert last["signal_above_noise"] == pytest.approx(heard.double().mean().item())
    assert 0 < last["signal_above_noise"] < 1
    assert last["hessian_over_first"] == pytest.approx(1, abs=0.1)
    assert {"sigma/layer_00", "sigma/q_proj.lora_A", "loss_at_mean", "loss_under_noise", "held_back"} <= last.keys()


def test_noise_that_takes_too_much_is_held_back_also_across_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from conformance.test_methods import Crash

    monkeypatch.setattr("varlora.methods.ivon.PROBE", 1 / 6)  # a comparison every second step
    sigma, said = 0.4, list[str]()
    one = Ivon(lr=10.0, ess=1e3 / sigma**2, hess_init=1e-3, noise_warmup=0.25, cooling=True)
    rows = [replace(row, label_tokens=helpers.ANSWERS[:2], label=row.input_ids[0] % 2) for row in ROWS[:48]]
    settings: dict[str, Any] = {
        "rows": rows, "steps": 40, "batch_size": 16, "checkpoint_every": 20, "training_arguments": {"logging_steps": 1},
    }  # fmt: skip
    helpers.run_fit(helpers.tiny_model(), one, tmp_path / "whole", warn=said.append, **settings)
    whole = helpers.outcome(tmp_path / "whole")
    halfway, last = whole["log"][19], whole["log"][-1]
    assert halfway["loss_under_noise"] > halfway["loss_at_mean"]
    assert halfway["held_back"] < 1
    assert last["held_back"] < 0.5
    assert last["sigma"] == pytest.approx(last["held_back"] * sigma, rel=0.15)  # held back further after the last step
    (words,) = helpers.about(said, "noise takes back too much of what training has gained")
    assert "so sigma is held back, now to" in words
    with pytest.raises(ConnectionAbortedError):
        helpers.run_fit(helpers.tiny_model(), one, tmp_path / "stopped", callbacks=[Crash(20)], **settings)
    helpers.run_fit(helpers.tiny_model(), one, tmp_path / "stopped", resume=True, **settings)
    assert helpers.outcome(tmp_path / "stopped") == whole


def test_all_rows_may_have_the_same_answer(tmp_path: Path) -> None:
    """There is nothing to gain on always giving it: no comparison, and a warning."""
    warned: list[str] = []
    rows = [replace(row, label=1) for row in ROWS]
    helpers.run_fit(helpers.tiny_model(), Ivon(), tmp_path, rows=rows, steps=30, warn=warned.append)
    assert any("All 64 training rows have the same answer, number 1" in words for words in warned)
    assert "held_back" not in helpers.logged(tmp_path)[-1]


def test_a_prior_by_evidence_goes_with_a_hessian_that_learns(tmp_path: Path) -> None:
    """The Hessian falls below 0 then, and the prior's precision with it."""
    method = Ivon(weight_decay="auto", hess_average="run")
    fitted = helpers.run_fit(helpers.tiny_model(), method, tmp_path, steps=60)
    assert all(std.isfinite().all() for std in fitted.std.values())


def test_a_resumed_run_does_not_look_again(tmp_path: Path) -> None:
    from conformance.test_methods import Crash

    with pytest.raises(ConnectionAbortedError):
        helpers.run_fit(helpers.tiny_model(), Ivon(), tmp_path, callbacks=[Crash(2)])
    path = tmp_path / "tuned.json"
    tuned = json.loads(path.read_text())
    tuned["settings"]["ess"] *= 4
    path.write_text(json.dumps(tuned))
    helpers.run_fit(helpers.tiny_model(), Ivon(), tmp_path, resume=True, training_arguments={"logging_steps": 1})
    assert json.loads(path.read_text()) == tuned
    sigma = {line["step"]: line["sigma"] for line in helpers.logged(tmp_path)}
    shares = tuned["settings"]["sigma_by_layer"].values()
    mean = tuned["found"]["sigma"] * sum(shares) / len(shares)
    assert sigma[6] == pytest.approx(mean / 2 * scale.ramp(1.0, tuned["settings"]["noise_warmup"]), rel=0.05)


@pytest.mark.parametrize("held", ['{"settings": {"no": 1}}', "{}", "[]", "{"])
def test_a_damaged_file_of_what_was_found_is_refused_by_name(held: str, tmp_path: Path) -> None:
    (tmp_path / "tuned.json").write_text(held)
    with pytest.raises(DamagedFileError, match=r"tuned\.json"):
        helpers.run_fit(helpers.tiny_model(), Ivon(), tmp_path, resume=True)


def test_a_method_on_top_finds_for_the_one_below(tmp_path: Path) -> None:
    prepared = Temperature(of="ivon", settings={"beta1": 0.8}).prepare(start())
    assert prepared is not None
    settings = prepared.settings["settings"]
    assert settings["beta1"] == 0.8
    assert METHODS["ivon"](**settings).prepare(start()) is None


# --- numbers that are told, and settings that arrive ---


def test_another_look_is_at_the_full_sigma_however_much_of_it_is_drawn() -> None:
    """Before step 500 of 4000 half of it is, of noise that grows over the first quarter."""
    found = []
    for step in (1000, 500):
        one, optimizer, begin = ready(0.15)
        one.before_step(optimizer, step, 4000, {})
        found.append(one.look_again(begin, optimizer, {})["rechecked"])
    assert 1 / scale.FURTHEST < found[0] < 1 / scale.FAR
    assert found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize(("accumulation", "ranks"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_the_look_costs_the_passes_that_it_makes(accumulation: int, ranks: int) -> None:
    """Over those of a process's rows in a step, where a backward pass counts as two forward passes."""
    begin, passes = start(accumulation=accumulation, ranks=ranks), 0

    def draw(posterior: Any, rows: Any, count: int) -> Any:
        nonlocal passes
        passes += max(count, 1) * len(rows)
        return begin.draw(posterior, rows, count)

    def forward(model: Any, batch: Any) -> torch.Tensor:
        nonlocal passes
        passes += 3 * len(batch["labels"])
        return class_logits(model, batch)

    prepared = Ivon().prepare(replace(begin, draw=draw, forward=forward))
    assert prepared is not None
    assert prepared.steps == pytest.approx(passes / (3 * 4 * accumulation))


def test_settings_of_the_optimizer_are_the_methods() -> None:
    settings: dict[str, Any] = {
        "lr": 0.1, "ess": 100.0, "hess_init": 0.5, "beta1": 0.8, "beta2": 0.99, "weight_decay": 0.01,
        "clip_radius": 0.1, "mc_samples": 2, "hess_approx": "gradsq", "rescale_lr": True,
        "debias": False,
    }  # fmt: skip
    (group,) = Ivon(**settings).optimizer(trainable(helpers.tiny_model()), 64, 4, 0).param_groups
    assert {name: group[name] for name in settings} == settings


@pytest.mark.parametrize("samples", [1, 2])
def test_a_step_has_as_many_draws_as_it_is_to_have(samples: int, tmp_path: Path) -> None:
    drawn: list[int] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
            drawn.append(optimizer.param_groups[0]["draws"])

    one, micro = Ivon(**PAPER, mc_samples=samples), {"batch_size": 2, "accumulation": 2}
    helpers.run_fit(helpers.tiny_model(), one, tmp_path, steps=3, callbacks=[Watch()], **micro)
    assert drawn == [samples, 2 * samples, 3 * samples]


@pytest.mark.parametrize(("first", "moves"), [(1e-3, False), (1e-9, True)])
def test_a_hessian_that_leaves_its_start_at_once_is_told_of(first: float, moves: bool, tmp_path: Path) -> None:
    """Of the same σ."""
    said: list[str] = []
    one = Ivon(lr=0.03, ess=1e3 / first, hess_init=first)
    helpers.run_fit(
        helpers.tiny_model(), one, tmp_path, steps=30, checkpoint_every=30, warn=said.append,
        training_arguments={"logging_steps": 1},
    )  # fmt: skip
    assert len(helpers.about(said, "raise `hess_init`, and lower `ess`")) == moves
    log = helpers.logged(tmp_path)
    assert ["hessian_early" in line for line in log] == [False] * 10 + [True] * 20
    assert log[10]["hessian_early"] == log[9]["hessian_over_first"]


def test_signal_is_above_noise_on_either_side_of_zero() -> None:
    """Half the weights are far below it here, and the others within σ = 0.03."""
    params = trainable(helpers.tiny_model())
    for p in params.values():
        p.data.fill_(-0.1)
        p.data.flatten()[::2] = 0.01
    one = method()
    assert one.log(one.optimizer(params, 64, 4, 0), {})["signal_above_noise"] == 0.5


def test_the_hessian_that_is_logged_is_without_the_prior() -> None:
    one = method(weight_decay=2e-3)
    assert one.log(optimizer_of(one), {})["hessian_over_first"] == pytest.approx(1.0, rel=1e-4)


def test_a_comparison_changes_nothing_and_both_losses_have_the_same_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an adapter that is large enough for masks to tell."""
    one, outcomes = method(lr=10.0, clip_radius=2e-2, ess=1e14, noise_warmup=0.0, cooling=False), []
    for every in (2, 0):
        monkeypatch.setattr(Ivon, "compare_every", lambda self, steps, every=every: every)
        helpers.run_fit(
            helpers.tiny_model(dropout=0.5), one, tmp_path / str(every), checkpoint_every=6,
            training_arguments={"logging_steps": 1},
        )  # fmt: skip
        outcomes.append(helpers.outcome(tmp_path / str(every)))
    compared, alone = outcomes
    last = compared["log"][-1]
    assert last["loss_at_mean"] == pytest.approx(last["loss_under_noise"], rel=1e-3)
    assert [line["loss"] for line in compared["log"]] == [line["loss"] for line in alone["log"]]
    assert compared["adapter_model.safetensors"] == alone["adapter_model.safetensors"]


def test_which_rows_are_looked_at_depends_on_the_seed() -> None:
    assert start(seed=1).some_rows(8) == start(seed=1).some_rows(8)
    assert start(seed=1).some_rows(8) != start(seed=2).some_rows(8)


def test_less_than_an_epoch_counts_as_one() -> None:
    assert start(steps=1).epochs == 1.0
    assert start(steps=400).epochs == 400 * 4 / len(ROWS)
