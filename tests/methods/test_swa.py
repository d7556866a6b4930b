"""SWA and SWAG: the running moments against the plain definition over a list of snapshots, and the schedules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from varlora.checkpoint import load_state, save_state
from varlora.demo.run import one_thread
from varlora.errors import ConfigError
from varlora.fit import check_method
from varlora.methods import AdamW, Plan, Swa, Swag
from varlora.posterior import LowRankGaussian, Point

both = pytest.mark.parametrize("method", [Swa, Swag], ids=lambda method: method.name)
SHAPES = {"a": (3, 2), "b": (4,)}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def plan(steps: int) -> Plan:
    return Plan(steps=steps, accumulation=1, dropout=0.0, calibration=False)


def walk(steps: int, centre: float = 0.0, scatter: float = 1.0) -> list[dict[str, Tensor]]:
    """The weights after each of some steps: noise around a centre that drifts."""
    source = torch.Generator().manual_seed(0)
    return [
        {name: centre + scatter * (0.1 * step + torch.randn(shape, generator=source)) for name, shape in SHAPES.items()}
        for step in range(steps)
    ]


def watched(
    method: Any, path: list[dict[str, Tensor]], state: dict[str, Any] | None = None, steps: range | None = None
) -> dict[str, Any]:
    """Let the method look at the weights after each step of the path, or after some of them, counted from 1."""
    params = {name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    state = {} if state is None else state
    for step in steps or range(1, len(path) + 1):
        for name, p in params.items():
            p.data.copy_(path[step - 1][name])
        method.after_step(params, step, len(path), state)
    return state


def concluded(method: Any, state: dict[str, Any]) -> Any:
    return method.posterior(SimpleNamespace(state=state, sources=()))  # it needs no more of what training ended with


class Plain:
    """The definition: all snapshots in a list, float64, two passes."""

    def __init__(self, path: list[dict[str, Tensor]], steps: list[int], name: str) -> None:
        snapshots = np.stack([path[step - 1][name].double().numpy() for step in steps])  # steps count from 1
        means = [snapshots[: n + 1].mean(0) for n in range(len(snapshots))]  # of the snapshots so far
        self.mean = snapshots.mean(0)
        self.std = snapshots.std(0, ddof=0)
        self.deviations = np.stack([theta - mean for theta, mean in zip(snapshots, means)])


# --- when snapshots are taken, and what becomes of them ---

WHEN = {
    "half of 20, every 3": ({"start": 0.5, "every": 3}, 20, [13, 16, 19]),
    "the last is a snapshot": ({"start": 0.5, "every": 5}, 20, [15, 20]),
    "all": ({"start": 0.0, "every": 1}, 6, [1, 2, 3, 4, 5, 6]),
    "a start between two steps": ({"start": 0.5, "every": 2}, 11, [8, 10]),
    "one only": ({"start": 0.9, "every": 1}, 10, [10]),
    "none": ({"start": 0.5, "every": 6}, 10, []),
}


@both
@pytest.mark.parametrize("case", WHEN)
def test_snapshots_are_taken_every_so_many_steps_from_the_start_on(method: Any, case: str) -> None:
    settings, total, steps = WHEN[case]
    state = watched(method(**settings), walk(total))
    assert state.get("count", 0) == len(steps) == method(**settings).snapshots(total)
    if steps:
        found = state["weights"]["a"]["mean"]
        np.testing.assert_allclose(found, Plain(walk(total), steps, "a").mean, rtol=1e-5, atol=1e-6)
    else:
        assert state == {}


def test_a_start_that_is_a_whole_number_of_steps_is_that_number() -> None:
    assert [Swa(start=start).first(100) for start in (0.07, 0.14, 0.28, 0.55)] == [7, 14, 28, 55]


@both
@pytest.mark.parametrize(
    ("centre", "scatter", "tolerance"), [(0.0, 1.0, 1e-4), (1000.0, 0.1, 0.02), (-0.02, 1e-6, 0.02)]
)
def test_moments_are_those_of_the_plain_definition(
    method: Any, centre: float, scatter: float, tolerance: float
) -> None:
    """Also where the mean of squares minus the squared mean has no digit left in float32."""
    path, steps = walk(40, centre, scatter), list(range(22, 41, 2))
    posterior = concluded(method(start=0.5, every=2), watched(method(start=0.5, every=2), path))
    for name in SHAPES:
        plain = Plain(path, steps, name)
        assert np.abs(posterior.mean[name].numpy() - plain.mean).max() < tolerance * scatter
        if method is Swag:
            np.testing.assert_allclose(posterior.std[name], plain.std, rtol=tolerance)
            np.testing.assert_allclose(
                posterior.deviations[name], plain.deviations, rtol=tolerance, atol=tolerance * scatter
            )


def test_the_naive_variance_fails_where_ours_does_not() -> None:
    """So that the case above is one that counts."""
    path = walk(40, 1000.0, 0.1)
    snapshots = torch.stack([path[step - 1]["a"] for step in range(22, 41, 2)])
    naive = (snapshots.square().mean(0) - snapshots.mean(0).square()).clamp(min=0).sqrt()
    assert np.abs(naive.numpy() / Plain(path, list(range(22, 41, 2)), "a").std - 1).max() > 0.1


@pytest.mark.parametrize("rank", [2, 3, 10, 20])
def test_swag_keeps_the_last_deviations_from_the_mean_so_far(rank: int) -> None:
    path, steps = walk(10), list(range(1, 11))
    method = Swag(start=0.0, every=1, rank=rank)
    posterior = concluded(method, watched(method, path))
    assert isinstance(posterior, LowRankGaussian)
    for name, shape in SHAPES.items():
        plain = Plain(path, steps, name)
        assert posterior.deviations[name].shape == (min(rank, 10), *shape)
        np.testing.assert_allclose(posterior.deviations[name], plain.deviations[-rank:], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(posterior.std[name], plain.std, rtol=1e-4)  # of all, however many are kept


def test_weights_of_16_bits_are_averaged_in_32() -> None:
    """The mean of 1 and 1 + 2⁻⁷ lies between two neighbours of bfloat16."""
    p, state = nn.Parameter(torch.ones(1, dtype=torch.bfloat16)), {}
    for step in (1, 2):
        Swa(start=0.0, every=1).after_step({"a": p}, step, 2, state)
        p.data += 2**-7
    assert concluded(Swa(), state).mean["a"].item() == 1 + 2**-8


@both
def test_the_posterior_is_a_copy_of_what_was_collected(method: Any) -> None:
    path, chosen = walk(8), method(start=0.0, every=1)
    state = watched(chosen, path, steps=range(1, 5))
    tensors = concluded(chosen, state).tensors()
    before = {name: value.clone() for name, value in tensors.items()}
    watched(chosen, path, state, steps=range(5, 9))
    assert helpers.same(tensors, before)


@both
def test_what_was_collected_goes_through_a_checkpoint(method: Any, tmp_path: Path) -> None:
    path, chosen = walk(12), method(start=0.25, every=2)
    whole = concluded(chosen, watched(chosen, path))
    save_state(tmp_path, "method", watched(chosen, path, steps=range(1, 9)))
    resumed = watched(chosen, path, load_state(tmp_path, "method"), steps=range(9, 13))
    assert helpers.same(concluded(chosen, resumed).tensors(), whole.tensors())


# --- in training ---


class Keep(TrainerCallback):
    """Keeps the adapter after each step."""

    def __init__(self, model: Any) -> None:
        self.model, self.path = model, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.path.append(helpers.bits(self.model))


@both
def test_fit_ends_in_the_moments_of_the_weights_it_went_through(method: Any, tmp_path: Path) -> None:
    model = helpers.tiny_model(dropout=0.1)
    keep, chosen = Keep(model), method(lr=1e-2, start=0.4, every=2)
    posterior = helpers.run_fit(model, chosen, tmp_path, steps=10, callbacks=[keep])
    assert type(posterior) is {Swa: Point, Swag: LowRankGaussian}[method]
    for name, value in helpers.bits(model).items():
        plain = Plain(keep.path, [6, 8, 10], name)
        np.testing.assert_allclose(posterior.mean[name], plain.mean, rtol=1e-4, atol=1e-6)
        assert torch.equal(value, posterior.mean[name])
        if method is Swag:
            np.testing.assert_allclose(posterior.std[name], plain.std, rtol=1e-3, atol=1e-6)
            np.testing.assert_allclose(posterior.deviations[name], plain.deviations, rtol=1e-3, atol=1e-6)


def test_fit_follows_the_schedule(tmp_path: Path) -> None:
    method = Swa(lr=1e-2, start=0.5, every=1, average_lr=4e-3)
    helpers.run_fit(helpers.tiny_model(), method, tmp_path, steps=8, training_arguments={"logging_steps": 1})
    logged = [line["learning_rate"] for line in helpers.logged(tmp_path)]
    assert logged == pytest.approx(rates(method, 8))


@both
def test_trains_as_adamw_does_but_for_the_learning_rate(method: Any, tmp_path: Path) -> None:
    paths = []
    for chosen in (AdamW(lr=1e-2), method(lr=1e-2, every=1, shape="trainer")):
        model = helpers.tiny_model(dropout=0.1)
        keep = Keep(model)
        helpers.run_fit(model, chosen, tmp_path / chosen.name, callbacks=[keep])
        paths.append(keep.path)
    assert all(helpers.same(one, other) for one, other in zip(*paths))


# --- the learning rate ---


def rates(method: Any, total: int) -> list[float]:
    """The learning rate of each step, the first being step 1."""
    optimizer = method.optimizer({"a": nn.Parameter(torch.zeros(1))}, 1, 1, 0)
    schedule, found = method.schedule(optimizer, total), []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@both
def test_constant_schedule(method: Any) -> None:
    """`lr` for half of the way to the start, linearly down to nine tenths of it, and `average_lr` from there on."""
    found = rates(method(lr=1.0, start=0.5, every=5, average_lr=0.2), 40)
    assert found[:11] == [1.0] * 11  # the step numbered 10 from 0 is half of the way to 20
    assert found[14] == pytest.approx(0.6)  # 14 is in the middle between 10 and 18
    assert found[11:18] == pytest.approx([1 - 0.1 * step for step in range(1, 8)])
    assert found[18:] == pytest.approx([0.2] * 22)


@both
def test_the_averaging_rate_is_half_of_the_first_unless_it_is_set(method: Any) -> None:
    assert rates(method(lr=3e-4, start=0.5), 40)[-1] == pytest.approx(1.5e-4)
    assert rates(method(lr=3e-4, start=0.5, average_lr=0.0), 40)[-1] == 0.0
    assert rates(method(lr=3e-4, start=0.5, average_lr=6e-4), 40)[-1] == pytest.approx(6e-4)  # more is possible


@both
def test_cyclic_schedule(method: Any) -> None:
    """Between two snapshots from near `lr` down to `average_lr`, with which the step before a snapshot is made."""
    chosen = method(lr=1.0, start=0.5, every=4, average_lr=0.2, shape="cyclic")
    found = rates(chosen, 40)
    assert found[:20] == rates(method(lr=1.0, start=0.5, every=4, average_lr=0.2), 40)[:20]
    assert found[20:] == pytest.approx([0.8, 0.6, 0.4, 0.2] * 5)
    state, counts = {}, []
    for step in range(1, 41):
        chosen.after_step({"a": nn.Parameter(torch.zeros(1))}, step, 40, state)
        counts.append(state.get("count", 0))
    taken = [step for step in range(1, 40) if counts[step] > counts[step - 1]]  # numbered from 0
    assert [found[step] for step in taken] == pytest.approx([0.2] * 5)


def test_cycles_end_at_snapshots_also_if_averaging_starts_at_once() -> None:
    method = Swa(lr=1.0, start=0.0, every=4, average_lr=0.2, shape="cyclic")
    assert rates(method, 12)[3::4] == pytest.approx([0.2] * 3)  # snapshots are after the steps 4, 8 and 12


@both
def test_the_trainers_schedule_is_left_to_the_trainer(method: Any) -> None:
    chosen = method(shape="trainer")
    assert chosen.schedule(chosen.optimizer({"a": nn.Parameter(torch.zeros(1))}, 1, 1, 0), 10) is None


@both
@pytest.mark.parametrize(("shape", "refused"), [("constant", True), ("cyclic", True), ("trainer", False)])
def test_a_schedule_of_its_own_leaves_no_room_for_the_trainers(method: Any, shape: Any, refused: bool) -> None:
    found = check_method(method(shape=shape), plan(100), {"warmup_steps": 5, "logging_steps": 1})
    assert [("`training_arguments.warmup_steps`" in problem) for problem in found] == [True] * refused


# --- what is refused ---


@both
@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"start": 1.0}, ["`start`"]),
        ({"start": -0.1}, ["`start`"]),
        ({"start": float("nan")}, ["`start`"]),
        ({"every": 0}, ["`every`"]),
        ({"average_lr": -1e-5}, ["`average_lr`"]),
        ({"start": 2.0, "every": -1, "average_lr": -1.0}, ["`start`", "`every`", "`average_lr`"]),
    ],
)
def test_impossible_settings_are_all_named(method: Any, settings: dict[str, Any], names: list[str]) -> None:
    found = method(**settings).problems(plan(1000))
    assert len(found) == len(names)
    assert all(name in problem for name, problem in zip(names, found))


def test_swag_names_a_rank_beside_the_rest() -> None:
    found = Swag(rank=1, every=0).problems(plan(1000))
    assert ["`every`" in found[0], "`rank`" in found[1]] == [True, True]
    assert len(found) == 2
    assert Swag(rank=2).problems(plan(1000)) == []


@pytest.mark.parametrize(
    ("method", "steps", "fine"),
    [(Swa, 20, True), (Swa, 19, False), (Swag, 40, True), (Swag, 39, False), (Swag, 20, False)],
)
def test_too_few_snapshots_are_refused(method: Any, steps: int, fine: bool) -> None:
    """SWA needs one and SWAG two; from the half on every ten steps there is one."""
    found = method().problems(plan(steps))
    assert (found == []) == fine
    if not fine:
        assert f"at least {method().needed}, but {steps} steps" in found[0]
        assert f"give {(steps // 2) // 10}." in found[0]


def test_fit_refuses_before_anything_runs(tmp_path: Path) -> None:
    model = helpers.tiny_model()
    before = helpers.bits(model)
    with pytest.raises(ConfigError, match="snapshots, at least 2"):
        helpers.run_fit(model, Swag(every=4), tmp_path, steps=8)
    assert list(tmp_path.iterdir()) == []
    assert helpers.same(helpers.bits(model), before)
