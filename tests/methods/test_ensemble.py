"""The methods that work on any other one: ensembles of its runs, and a temperature for its posterior."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from varlora.data import collate
from varlora.demo.run import one_thread
from varlora.errors import ConfigError, VarloraError
from varlora.fit import conclude
from varlora.methods import METHODS, Ensemble, Plan, Pruned, Temperature
from varlora.model import LoRA, load_model
from varlora.posterior import DiagonalGaussian, Mixture, Tempered
from varlora.temperature import fit_temperature

SEED = 5
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 2e-2},
    "ivon": {"lr": 1.0, "clip_radius": 2e-2},
    "swag": {"lr": 2e-2, "start": 0.0, "every": 2},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def plan(**changes: Any) -> Plan:
    return Plan(**{"steps": 10, "accumulation": 1, "dropout": 0.1, "calibration": True, **changes})


def loaded(seed: int, **base: Any) -> Any:
    """The tiny model with the adapter of a seed."""
    lora = LoRA(rank=4, alpha=8, dropout=0.1)
    return load_model(helpers.base_folder(), lora=lora, seed=seed, device="cpu", **base)[0]


def ensemble(of: str, size: int = 3) -> Ensemble:
    return Ensemble(of=of, settings=SETTINGS[of], size=size)


# --- Ensemble ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Mixture]:
    """An ensemble of three AdamW runs, left alone."""
    run_dir, model = tmp_path_factory.mktemp("whole"), loaded(0)
    with one_thread():
        return run_dir, model, helpers.run_fit(model, ensemble("adamw"), run_dir, seed=SEED)


@pytest.mark.parametrize("of", SETTINGS)
def test_member_k_is_the_run_with_the_seed_plus_1000_k(of: str, tmp_path: Path) -> None:
    """Bit for bit, from the adapter that a model loaded with that seed has; whatever adapter the ensemble was given."""
    posterior = helpers.run_fit(loaded(77), ensemble(of, 2), tmp_path, seed=SEED)
    assert type(posterior) is Mixture
    assert len(posterior.members) == 2
    for k, member in enumerate(posterior.members):
        seed = SEED + 1000 * k  # so that the next seed's ensemble has none of them
        alone = helpers.run_fit(loaded(seed), METHODS[of](**SETTINGS[of]), tmp_path / f"alone-{k}", seed=seed)
        assert type(member) is type(alone)
        assert helpers.same(member.tensors(), alone.tensors())
        assert helpers.outcome(tmp_path / f"member-{k}") == helpers.outcome(tmp_path / f"alone-{k}")


def test_members_of_a_16_bit_base_start_from_its_adapter(tmp_path: Path) -> None:
    posterior = helpers.run_fit(loaded(0, dtype="bfloat16"), ensemble("adamw", 2), tmp_path, seed=SEED, steps=2)
    seed = SEED + 1000
    alone = helpers.run_fit(
        loaded(seed, dtype="bfloat16"), METHODS["adamw"](lr=2e-2), tmp_path / "alone", seed=seed, steps=2
    )
    assert helpers.same(posterior.members[1].tensors(), alone.tensors())


def test_the_model_ends_at_the_first_member(whole: tuple[Path, Any, Mixture]) -> None:
    _, model, posterior = whole
    assert helpers.same(helpers.bits(model), posterior.members[0].mean)  # type: ignore[attr-defined]


def test_probabilities_are_the_average_of_the_members(whole: tuple[Path, Any, Mixture]) -> None:
    _, model, posterior = whole
    members = [helpers.run_predict(model, member, samples=0).probs_mean for member in posterior.members]
    assert (members[0] - members[1]).abs().max() > 0.01
    predictions = helpers.run_predict(model, posterior, samples=10)
    average = torch.stack(members).mean(0)
    torch.testing.assert_close(predictions.probs, average, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(predictions.probs_mean, average, rtol=1e-5, atol=1e-6)


class CutOff(TrainerCallback):
    """Counts the runs that begin, and ends one of them as a crash would, once its second step is saved."""

    def __init__(self, run: int | None = None) -> None:
        self.run, self.begun = run, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun += 1

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.begun == self.run and state.global_step >= 2:
            raise ConnectionAbortedError("crash")


def test_cut_off_in_the_second_member_and_resumed(whole: tuple[Path, Any, Mixture], tmp_path: Path) -> None:
    """The first is not trained again, the second goes on from its checkpoint, and all end in the same bits."""
    with pytest.raises(ConnectionAbortedError):
        helpers.run_fit(loaded(0), ensemble("adamw"), tmp_path, seed=SEED, callbacks=[CutOff(2)])
    assert (tmp_path / "member-0" / "adapter").is_dir()
    assert not (tmp_path / "member-1" / "adapter").exists()
    assert not (tmp_path / "adapter").exists()
    torch.manual_seed(99)
    runs, model = CutOff(), loaded(3)
    posterior = helpers.run_fit(model, ensemble("adamw"), tmp_path, seed=SEED, resume=True, callbacks=[runs])
    run_dir, other, expected = whole
    assert runs.begun == 2
    assert helpers.same(posterior.tensors(), expected.tensors())
    assert helpers.same(helpers.bits(model), helpers.bits(other))
    for k in range(3):
        assert helpers.outcome(tmp_path / f"member-{k}") == helpers.outcome(run_dir / f"member-{k}")
    for file in ("adapter_model.safetensors", "posterior.safetensors"):
        assert (tmp_path / "adapter" / file).read_bytes() == (run_dir / "adapter" / file).read_bytes()


def test_cut_off_between_two_members_and_resumed(whole: tuple[Path, Any, Mixture], tmp_path: Path) -> None:
    """Also if the checkpoints of the finished member are gone."""
    run_dir, _, expected = whole
    shutil.copytree(run_dir / "member-0", tmp_path / "member-0", ignore=shutil.ignore_patterns("checkpoint-*"))
    runs = CutOff()
    posterior = helpers.run_fit(loaded(3), ensemble("adamw"), tmp_path, seed=SEED, resume=True, callbacks=[runs])
    assert runs.begun == 2
    assert helpers.same(posterior.tensors(), expected.tensors())


def test_an_ensemble_of_finished_runs_has_them_as_members(whole: tuple[Path, Any, Mixture], tmp_path: Path) -> None:
    _, model, posterior = whole
    sources = [posterior.members[2], Mixture(posterior.members[:2])]
    found = conclude(model, Ensemble(), helpers.make_rows(), tmp_path, sources=sources, pad_token_id=0)
    assert list(found.members) == sources
    _, again = helpers.reloaded(tmp_path)
    assert helpers.same(again.tensors(), found.tensors())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ],
)
def test_an_adapter_that_cannot_start_anew_is_refused(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    """Before the first member is trained: the second one would start where it ended."""
    base = helpers.tiny_model().unload()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], **settings))
    with pytest.raises(VarloraError, match=re.escape(named)):
        helpers.run_fit(model, ensemble("adamw"), tmp_path)
    assert not list(tmp_path.glob("member-0/checkpoint-*"))


# --- what both refuse ---


@pytest.mark.parametrize("method", [Ensemble, Temperature], ids=lambda method: method.name)
class TestWrapping:
    def test_every_other_method_is_possible(self, method: Any) -> None:
        for of in SETTINGS:
            assert method(of=of, settings=SETTINGS[of]).problems(plan()) == []

    def test_an_unknown_method_is_refused(self, method: Any) -> None:
        (problem,) = method(of="adamv").problems(plan())
        assert "Expected `of` to be a method, but got `adamv`" in problem
        assert "`adamw`" in problem

    @pytest.mark.parametrize("of", ["ensemble", "temperature"])
    def test_a_method_that_wraps_another_is_refused(self, of: str, method: Any) -> None:
        (problem,) = method(of=of).problems(plan())
        assert f"trains one adapter, but got `{of}`" in problem
        assert "finished runs" in problem

    def test_what_the_other_method_cannot_do_is_refused(self, method: Any) -> None:
        assert "its rate is 0" in method(of="mc_dropout").problems(plan(dropout=0.0))[0]
        assert "`accumulation`" in method(of="ivon", settings={"mc_samples": 4}).problems(plan())[0]
        assert "snapshots" in method(of="swag").problems(plan(steps=5))[0]

    def test_finished_runs_may_be_of_any_method(self, method: Any) -> None:
        assert method(of="ensemble").problems(plan(finished=True)) == []
        assert method.concludes_from == ("*",)

    def test_fit_refuses_before_anything_runs(self, method: Any, tmp_path: Path) -> None:
        model = helpers.tiny_model()
        before = helpers.bits(model)
        with pytest.raises(ConfigError, match="Expected `of`"):
            helpers.run_fit(model, method(of="ensemble"), tmp_path, calibration=helpers.make_rows(4, seed=2))
        assert list(tmp_path.iterdir()) == []
        assert helpers.same(helpers.bits(model), before)


@pytest.mark.parametrize("size", [1, 0, -1, 10**9])
def test_one_member_is_no_ensemble_nor_a_slip_of_many(size: int) -> None:
    (problem,) = Ensemble(size=size).problems(plan())
    assert f"Expected `size` to be a number of members >= 2 and at most 1000, but got {size}" in problem
    assert Ensemble(size=size).problems(plan(finished=True)) == []
    assert len(Ensemble(of="adamv", size=size).problems(plan())) == 2  # all at once


# --- Temperature ---

HELD_OUT = helpers.make_rows(9, seed=2)


def calibration_logits(model: Any, posterior: Any, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of n draws on the held-out rows, all in one batch, and the labels."""
    batch = collate(HELD_OUT, 0)
    generator = torch.Generator().manual_seed(seed)
    return posterior.draw_logits(model, batch, n, generator, helpers.forward), batch["labels"]


@pytest.mark.parametrize("of", ["ivon", "swag"])
def test_the_temperature_is_that_of_the_held_out_rows_under_the_methods_own_posterior(of: str, tmp_path: Path) -> None:
    said: list[str] = []
    model = loaded(0)
    method = Temperature(of=of, settings=SETTINGS[of], samples=4)
    found = helpers.run_fit(model, method, tmp_path, steps=20, seed=SEED, calibration=HELD_OUT, warn=said.append)
    assert type(found) is Tempered
    alone = helpers.run_fit(loaded(0), METHODS[of](**SETTINGS[of]), tmp_path / "alone", steps=20, seed=SEED)
    assert type(found.inner) is type(alone)
    assert helpers.same(found.inner.tensors(), alone.tensors())
    assert found.temperature == pytest.approx(fit_temperature(*calibration_logits(model, alone, 4, SEED)), rel=1e-4)
    assert found.temperature_mean == pytest.approx(
        fit_temperature(*calibration_logits(model, alone, 0, SEED)), rel=1e-4
    )
    assert found.temperature != found.temperature_mean
    assert f"draws is {found.temperature:.3f}, at the mean {found.temperature_mean:.3f}" in " ".join(said)


@pytest.mark.parametrize("of", ["ivon", "swag"])
def test_a_wrapped_method_logs_and_schedules_as_it_does_alone(of: str, tmp_path: Path) -> None:
    logging = {"training_arguments": {"logging_steps": 1}}
    method = Temperature(of=of, settings=SETTINGS[of])
    helpers.run_fit(loaded(0), method, tmp_path / "wrapped", calibration=HELD_OUT, **logging)
    helpers.run_fit(loaded(0), METHODS[of](**SETTINGS[of]), tmp_path / "alone", **logging)
    assert helpers.logged(tmp_path / "wrapped") == helpers.logged(tmp_path / "alone")


def test_a_finished_run_gets_a_temperature(whole: tuple[Path, Any, Mixture], tmp_path: Path) -> None:
    _, model, posterior = whole
    found = conclude(
        model,
        Temperature(samples=3),
        helpers.make_rows(),
        tmp_path,
        sources=[posterior],
        calibration=HELD_OUT,
        pad_token_id=0,
        warn=lambda words: None,
    )
    assert found.inner is posterior
    assert found.temperature == pytest.approx(fit_temperature(*calibration_logits(model, posterior, 3, 0)), rel=1e-4)
    _, again = helpers.reloaded(tmp_path)
    assert (again.temperature, again.temperature_mean) == (found.temperature, found.temperature_mean)


def test_held_out_rows_have_labels(tmp_path: Path) -> None:
    unknown = [*HELD_OUT, *helpers.make_rows(2, seed=3, labelled=False)]
    with pytest.raises(VarloraError, match="a label in each held-out row, but 2 of 11 have none"):
        helpers.run_fit(helpers.tiny_model(), Temperature(of="adamw"), tmp_path, calibration=unknown)
    assert list(tmp_path.iterdir()) == []


def test_without_held_out_rows_it_is_refused(tmp_path: Path) -> None:
    model = helpers.tiny_model()
    before = helpers.bits(model)
    with pytest.raises(ConfigError, match=r"held out for the temperature, .* Train with `calibration_fraction`"):
        helpers.run_fit(model, Temperature(of="adamw"), tmp_path, calibration=[])
    assert list(tmp_path.iterdir()) == []
    assert helpers.same(helpers.bits(model), before)
    assert len(Temperature(samples=0).problems(plan(calibration=False, finished=True))) == 2


def test_a_temperature_of_a_point_is_one_for_draws_and_mean(tmp_path: Path) -> None:
    settings = {"calibration": HELD_OUT, "warn": lambda words: None}
    found = helpers.run_fit(loaded(0), Temperature(of="adamw", settings=SETTINGS["adamw"]), tmp_path, **settings)
    assert found.temperature == found.temperature_mean


@pytest.mark.parametrize(
    ("of", "settings", "logs"),
    [("ivon", SETTINGS["ivon"], "held_back"), ("blob", {"lr": 1e-2, "kl_lr": 0.1, "sigma_init": 0.5}, "kl")],
)
def test_a_wrapped_method_draws_and_compares_as_it_does_alone(
    of: str, settings: dict[str, Any], logs: str, tmp_path: Path
) -> None:
    """IVON first compares the losses at the mean and under noise before the last of these steps."""
    run: dict[str, Any] = {"steps": 15, "checkpoint_every": 15, "training_arguments": {"logging_steps": 1}}
    wrapped = Temperature(of=of, settings=settings, samples=1)
    helpers.run_fit(loaded(0), wrapped, tmp_path / "wrapped", calibration=HELD_OUT, **run)
    helpers.run_fit(loaded(0), METHODS[of](**settings), tmp_path / "alone", **run)
    assert helpers.logged(tmp_path / "wrapped") == helpers.logged(tmp_path / "alone")
    assert logs in helpers.logged(tmp_path / "alone")[-1]


# --- Pruned ---


def pruned(by: Any, seed: int, model: Any, posterior: DiagonalGaussian, run_dir: Path) -> torch.Tensor:
    """Return which weights of a finished run are kept, of all of them."""
    found = conclude(
        model,
        Pruned(fraction=0.25, by=by),
        helpers.make_rows(),
        run_dir,
        sources=[posterior],
        pad_token_id=0,
        seed=seed,
        warn=lambda words: None,
    )
    return torch.cat([value.flatten() != 0 for value in found.mean.values()])  # type: ignore[attr-defined]


def test_a_finished_run_is_pruned_by_what_is_asked_for(tmp_path: Path) -> None:
    """The noisiest weights have the largest means here; chance is that of the run's seed."""
    model, source = loaded(0), helpers.seeded()
    mean = {name: torch.randn(p.shape, generator=source) for name, p in helpers.bits(model).items()}
    posterior = DiagonalGaussian(mean, {name: value.square() for name, value in mean.items()})
    size = torch.cat([value.flatten() for value in mean.values()]).abs()
    kept = {by: pruned(by, 0, model, posterior, tmp_path) for by in ("snr", "magnitude", "random")}
    assert all(keep.float().mean() == 0.75 for keep in kept.values())
    assert size[~kept["magnitude"]].max() <= size[kept["magnitude"]].min()
    assert size[~kept["snr"]].min() >= size[kept["snr"]].max()
    assert not torch.equal(kept["random"], kept["snr"])
    again, other = (pruned("random", seed, model, posterior, tmp_path) for seed in (0, 1))
    assert torch.equal(again, kept["random"])
    assert not torch.equal(other, kept["random"])
