from __future__ import annotations

import json
import math
import random
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState

from varlora import checkpoint
from varlora.checkpoint import (
    CheckpointTrainer,
    latest_checkpoint,
    load_adapter,
    load_posterior,
    load_state,
    restore,
    save_adapter,
    save_state,
    step_of,
)
from varlora.data import collate
from varlora.demo.run import one_thread
from varlora.errors import DamagedFileError, VarloraError
from varlora.files import load_tensors, save_tensors, write_manifest, write_text
from varlora.model import class_logits
from varlora.params import trainable
from varlora.posterior import DiagonalGaussian, Dropout, Mixture, Point, Pruned


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def gaussian(model, seed=0, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    mean = {name: torch.randn(p.shape, generator=generator) * scale for name, p in trainable(model).items()}
    return DiagonalGaussian(mean, {name: torch.rand(value.shape, generator=generator) for name, value in mean.items()})


def posteriors(model):
    first, second = gaussian(model), gaussian(model, seed=1)
    return [Point(first.mean), first, Mixture([Point(second.mean), first, second])]


@pytest.fixture(scope="module")
def model():
    return helpers.tiny_model()


@pytest.fixture
def saved(model, tmp_path):
    save_adapter(model, gaussian(model), tmp_path / "adapter")
    return tmp_path / "adapter"


# --- the adapter and its posterior ---


def test_an_adapter_replaces_an_adapter_and_nothing_else(model, tmp_path):
    save_adapter(model, gaussian(model), str(tmp_path / "out"))
    (tmp_path / "out" / "calibration.json").write_text("{}")
    save_adapter(model, gaussian(model, seed=1), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "calibration.json").exists()  # which was that of the other
    assert load_posterior(model, str(tmp_path / "out")).kind == gaussian(model).kind
    (tmp_path / "out" / "checkpoint-5").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(VarloraError, match=r"has checkpoint-5, which would be lost\. Name a folder of its own"):
        save_adapter(model, gaussian(model), tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("index", range(3))
def test_posterior_comes_back_bit_for_bit(model, tmp_path, index):
    posterior = posteriors(model)[index]
    before = helpers.bits(model)
    save_adapter(model, posterior, tmp_path / "adapter")
    assert helpers.same(helpers.bits(model), before)
    loaded = load_posterior(model, tmp_path / "adapter")
    assert type(loaded) is type(posterior)
    assert helpers.same(loaded.tensors(), posterior.tensors())
    load_adapter(model, tmp_path / "adapter")
    with posterior.at_mean(model):
        mean = helpers.bits(model)
    assert helpers.same(helpers.bits(model), mean)


def test_plain_peft_loads_the_adapter_unchanged(model, saved):
    posterior = load_posterior(model, saved)
    batch = collate(helpers.make_rows(5), 0)
    with torch.no_grad(), posterior.at_mean(model):
        expected, ours = class_logits(model, batch), model(batch["input_ids"], batch["attention_mask"]).logits
        without = model.base_model.model(batch["input_ids"], batch["attention_mask"])
        assert torch.equal(without.logits, ours)
    base = AutoModelForCausalLM.from_pretrained(helpers.base_folder())
    plain = PeftModel.from_pretrained(base, saved).eval()
    with torch.no_grad():
        assert torch.equal(class_logits(plain, batch), expected)
        assert torch.equal(plain(batch["input_ids"], batch["attention_mask"]).logits, ours)


def test_adapter_in_16_bit_stays_in_16_bit(tmp_path):
    model = helpers.tiny_model(adapter="bfloat16")
    posterior = gaussian(model)
    save_adapter(model, posterior, tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter")
    for name, p in trainable(model).items():
        assert p.dtype == torch.bfloat16
        assert torch.equal(p, posterior.mean[name].bfloat16())


def test_everything_is_safetensors_json_or_text(saved):
    assert {path.suffix for path in saved.rglob("*") if path.is_file()} <= {".safetensors", ".json", ".md"}


@pytest.mark.parametrize("name", ["posterior.safetensors", "adapter_model.safetensors", "posterior_config.json"])
@pytest.mark.parametrize("damage", ["cut", "altered", "absent"])
def test_damaged_file_is_refused_by_name(model, saved, name, damage):
    content = (saved / name).read_bytes()
    if damage == "absent":
        (saved / name).unlink()
    else:
        end = content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1])
        (saved / name).write_bytes(end)
    with pytest.raises(DamagedFileError, match=name):
        load_posterior(model, saved)


def test_a_frozen_model_has_no_adapter_to_compare_with(saved):
    """As peft loads one that is not to be trained on."""
    model = helpers.tiny_model().requires_grad_(False)
    with pytest.raises(VarloraError, match=r"all of the model is frozen\. Load it by .*is_trainable=True"):
        load_posterior(model, saved)


def test_a_posterior_of_a_spread_model_lies_where_its_parameters_do():
    """A mask or a member's mean too, whose names begin otherwise; what is of no parameter, with the first."""
    parameters = {"a.weight": torch.ones(1), "b.a.weight": torch.ones(1, device="meta")}
    found = {key: checkpoint._device_of(key, parameters).type for key in ("mean.a.weight", "0.std.b.a.weight", "tau")}
    assert found == {"mean.a.weight": "cpu", "0.std.b.a.weight": "meta", "tau": "cpu"}


def test_adapter_cut_short_is_refused_by_name(model, saved):
    content = (saved / "adapter_model.safetensors").read_bytes()
    (saved / "adapter_model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(DamagedFileError, match=r"adapter_model.safetensors.*cut short"):
        load_adapter(model, saved)


def test_an_adapter_of_which_one_tensor_does_not_fit_leaves_the_model(saved):
    """The others have been loaded by then."""
    model = helpers.tiny_model()
    before = helpers.bits(model)
    tensors, meta = load_tensors(saved / "adapter_model.safetensors")
    name = max(tensors)
    save_tensors(saved / "adapter_model.safetensors", {**tensors, name: tensors[name][:1].clone()}, meta)
    with pytest.raises(DamagedFileError, match="is not of this model"):
        load_adapter(model, saved)
    assert helpers.same(helpers.bits(model), before)


def test_a_full_gpu_is_not_taken_for_damage(model, saved, monkeypatch):
    """Who is told so looks for the fault in the file."""

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    before = helpers.bits(model)
    for name, load in (("set_peft_model_state_dict", load_adapter), ("posterior_from_tensors", load_posterior)):
        monkeypatch.setattr(checkpoint, name, no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            load(model, saved)
    assert helpers.same(helpers.bits(model), before)


def test_posterior_of_an_unknown_kind_is_refused_by_name(model, saved):
    for content in ('{"kind": "diagonal_gausian"}', "{}", "[]"):
        write_text(saved / "posterior_config.json", content)
        write_manifest(saved)
        with pytest.raises(DamagedFileError, match=r"posterior_config\.json"):
            load_posterior(model, saved)


def dropped(one):
    return Dropout(one.mean, {name: torch.tensor(0.1) for name in one.mean})


def pruned(one):
    return Pruned(one, {name: value > 0 for name, value in one.mean.items()})


STRANGE = {
    "with a mask of another shape": (pruned, "keep.", None),
    "of another weight": (dropped, "rate.x", torch.tensor(0.1)),
    "of two numbers": (dropped, "rate.", torch.ones(2) / 2),
    "that drops all": (dropped, "rate.", torch.tensor(1.0)),
    "of negative variance": (dropped, "tau", torch.tensor(-1.0)),
    "that is not finite": (lambda one: one, "std.", torch.tensor(math.nan)),
}


@pytest.mark.parametrize("case", STRANGE)
def test_a_posterior_that_makes_no_sense_is_refused_when_it_is_loaded(model, saved, case):
    """Its checksums are right: who changes a run can write those too."""
    made, start, value = STRANGE[case]
    posterior = made(gaussian(model))
    tensors = dict(posterior.tensors())
    name = next((name for name in tensors if name.startswith(start)), start)
    if value is None:
        other = next(other for other in tensors if other.startswith("keep.") and "lora_B" in other)
        tensors[name] = tensors[other]
    else:
        tensors[name] = value.expand_as(tensors[name]).clone() if start == "std." else value
    save_tensors(saved / "posterior.safetensors", tensors, {})
    write_text(saved / "posterior_config.json", json.dumps({"kind": posterior.kind}))
    write_manifest(saved)
    with pytest.raises(DamagedFileError, match=r"posterior\.safetensors"):
        load_posterior(model, saved)


@pytest.mark.parametrize("index", range(3))
def test_posterior_of_another_rank_is_refused_with_names(model, tmp_path, index):
    save_adapter(model, posteriors(model)[index], tmp_path / "adapter")
    with pytest.raises(DamagedFileError, match=r"lora_A.*has shape \(4, 32\) where the model has \(8, 32\)"):
        load_posterior(helpers.tiny_model(rank=8), tmp_path / "adapter")
    with pytest.raises(DamagedFileError, match=r"adapter in .* is not of this model: .*lora_A"):
        load_adapter(helpers.tiny_model(rank=8), tmp_path / "adapter")


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("change", [{"num_hidden_layers": 1}, {"num_hidden_layers": 3}])
def test_posterior_of_another_model_is_refused_with_names(model, tmp_path, change, index):
    other, _ = helpers.load_model(
        helpers.save_base(tmp_path / "base", **change), lora=helpers.LoRA(rank=4), device="cpu"
    )
    save_adapter(model, posteriors(model)[index], tmp_path / "adapter")
    layer = change["num_hidden_layers"] - (change["num_hidden_layers"] > 2)
    for load in (load_posterior, load_adapter):
        with pytest.raises(DamagedFileError, match=rf"layers\.{layer}\..*lora_A"):
            load(other, tmp_path / "adapter")


def test_interrupted_saving_leaves_the_old_adapter(model, saved, monkeypatch):
    old = load_posterior(model, saved).tensors()

    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_json", crash)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(model, gaussian(model, seed=5), saved)
    assert helpers.same(load_posterior(model, saved).tensors(), old)
    assert [path.name for path in saved.parent.iterdir()] == ["adapter"]


# --- nested state ---


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and repr(one.tolist()) == repr(other.tolist())
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and repr(one) == repr(other)


STATES = {
    "an optimizer's": {
        "state": {0: {"step": torch.tensor(3.0), "mean": torch.ones(2, 3).bfloat16()}, 1: {}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1], "seed": 2**61 + 1, "fused": None}],
    },
    "random": {
        "python": random.Random(1).getstate(),
        "numpy": np.random.RandomState(1).get_state(),
        "torch": torch.Generator().manual_seed(1).get_state(),
    },
    "numbers": [math.inf, -math.inf, math.nan, -0.0, 1e-300, 0.1, 2**80, True, False, None, "text σ"],
    "tensors": [torch.tensor([math.inf, math.nan, -0.0]), torch.tensor(5), torch.empty(0, 2), torch.tensor(True)],
    "arrays": [
        np.array([0.5, math.inf]),
        np.array([2**64 - 1], dtype=np.uint64),
        np.array([1, 2], dtype=np.uint32),
        np.array([True, False]),
        np.array([1.5], dtype=np.float32),
    ],
    "keys": {0: 1, "0": 2, (1, "a"): 3, None: 4, 1.5: 5},
    "names that stand for something": {"tensor": "0", "tuple": [1], "array": {"dtype": "x"}, "dict": {}},
    "nothing": {},
    "nested": [((), [], {}), [[[torch.zeros(1)]]]],
    "a plain value": 5,
}


@pytest.mark.parametrize("name", STATES)
def test_state_comes_back_bit_for_bit(tmp_path, name):
    save_state(tmp_path, "state", STATES[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.json", "state.safetensors"]
    assert equal(STATES[name], load_state(tmp_path, "state"))


def test_random_state_goes_on_where_it_was(tmp_path):
    source = np.random.RandomState(3)
    source.randn(3)
    save_state(tmp_path, "state", (source.get_state(), random.getstate()))
    expected = source.randn(5), random.random()
    source.set_state(load_state(tmp_path, "state")[0])
    random.setstate(load_state(tmp_path, "state")[1])
    assert np.array_equal(source.randn(5), expected[0])
    assert random.random() == expected[1]


def test_all_that_draws_and_the_losses_since_the_last_line_go_on_where_they_were(tmp_path):
    trainer = CheckpointTrainer.__new__(CheckpointTrainer)
    trainer.args = SimpleNamespace(process_index=0)
    trainer._tr_loss, trainer._globalstep_last_logged = torch.tensor(0.5), 3
    trainer._save_rng_state(str(tmp_path))
    drawn = [(random.random(), np.random.rand(), torch.rand(3).tolist())]  # noqa: NPY002
    trainer._tr_loss, trainer._globalstep_last_logged = torch.tensor(0.0), 0
    trainer._load_rng_state(str(tmp_path))
    drawn += [(random.random(), np.random.rand(), torch.rand(3).tolist())]  # noqa: NPY002
    assert drawn[0] == drawn[1]
    assert (trainer._tr_loss, trainer._globalstep_last_logged) == (0.5, 3)


@pytest.mark.parametrize(("now", "told"), [(1, ["There were 2 GPUs before the stop and are 1 now"]), (2, []), (3, [])])
def test_random_states_of_gpus_go_on_as_far_as_there_are_any(now, told, tmp_path, monkeypatch):
    """A run may be moved to a machine with fewer; the generators are the CPU's here."""
    said, set_on = [], {}
    trainer = CheckpointTrainer.__new__(CheckpointTrainer)
    trainer.args, trainer.warn = SimpleNamespace(process_index=0), said.append
    trainer._tr_loss, trainer._globalstep_last_logged = torch.tensor(0.5), 3
    then = [torch.Generator().manual_seed(seed).get_state() for seed in (1, 2)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: then)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: now)
    monkeypatch.setattr(torch.cuda.random, "set_rng_state", lambda state, device: set_on.update({device: state}))
    trainer._save_rng_state(str(tmp_path))
    trainer._load_rng_state(str(tmp_path))
    assert [torch.equal(set_on[device], then[device]) for device in sorted(set_on)] == [True] * min(now, 2)
    assert [words.partition(",")[0] for words in said] == told


def test_optimizer_goes_on_where_it_was(tmp_path):
    def start():
        layer = torch.nn.Linear(3, 2)
        torch.nn.init.constant_(layer.weight, 0.5)
        torch.nn.init.zeros_(layer.bias)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1)

    def step(layer, optimizer):
        optimizer.zero_grad()
        layer(torch.arange(3.0)).square().sum().backward()
        optimizer.step()

    layer, optimizer = start()
    step(layer, optimizer)
    save_state(tmp_path, "optimizer", optimizer.state_dict())
    other, again = start()
    other.load_state_dict(layer.state_dict())
    again.load_state_dict(load_state(tmp_path, "optimizer"))
    for pair in ((layer, optimizer), (other, again)):
        step(*pair)
    assert helpers.same(layer.state_dict(), other.state_dict())


def test_state_of_other_things_is_refused(tmp_path):
    with pytest.raises(TypeError, match="but got object"):
        save_state(tmp_path, "state", {"a": object()})


@pytest.mark.parametrize("dtype", ["V2000000000", "U1000000000", "O", "M8[s]", "no type"])
def test_an_array_that_is_not_of_numbers_is_refused(dtype, tmp_path):
    """A stranger's text type of a million letters would take all memory."""
    save_state(tmp_path, "state", np.arange(3))
    path = tmp_path / "state.json"
    path.write_text(path.read_text().replace("int64", dtype))
    with pytest.raises(DamagedFileError, match=r"state\.json"):
        load_state(tmp_path, "state")


def test_damaged_state_is_refused_by_name(tmp_path):
    save_state(tmp_path, "state", STATES["an optimizer's"])
    for name in ("state.json", "state.safetensors"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-5])
        with pytest.raises(DamagedFileError, match=name):
            load_state(tmp_path, "state")
        (tmp_path / name).write_bytes(content)


# --- training checkpoints ---


def make_checkpoint(run_dir, step, complete=True):
    folder = run_dir / f"checkpoint-{step}"
    write_text(folder / "trainer_state.json", json.dumps(trainer_state(step)))
    if complete:
        write_manifest(folder)
    return folder


def trainer_state(step):
    state = vars(TrainerState(global_step=step, train_batch_size=4))
    return {**state, "stateful_callbacks": {"TrainerControl": TrainerControl().state(), "varlora": {"not_finite": 2}}}


def test_newest_complete_checkpoint_is_used_and_newer_ones_are_named(tmp_path):
    told: list[str] = []
    assert latest_checkpoint(tmp_path, told.append) is None
    for step in (5, 9, 10):  # 10 is newer than 9, whatever their names' order
        make_checkpoint(tmp_path, step)
    assert latest_checkpoint(tmp_path, told.append) == tmp_path / "checkpoint-10"
    assert told == []
    make_checkpoint(tmp_path, 100, complete=False)
    write_text(tmp_path / "checkpoint-10" / "trainer_state.json", "altered")
    write_text(tmp_path / "checkpoint-200", "a file")
    write_text(tmp_path / "checkpoint-notes" / "x", "not ours")
    assert latest_checkpoint(tmp_path, told.append) == tmp_path / "checkpoint-9"
    refused = [next(step for step in (200, 100, 10) if f"checkpoint-{step}" in words) for words in told[:3]]
    assert refused == [200, 100, 10]
    assert told[3:] == [f"Going on from {tmp_path / 'checkpoint-9'}."]
    assert "trainer_state.json is damaged" in told[2]
    assert step_of(tmp_path / "checkpoint-9") == 9


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("global_step", value) for value in (6, 10.0, "10", True, None)],
        *[("train_batch_size", value) for value in (None, "4")],
        *[("logging_steps", value) for value in (0, "1", None)],
        ("max_steps", []),
        ("total_flos", "many"),
        ("best_model_checkpoint", [1]),
        ("log_history", [1]),
        ("log_history", 5),
        *[("stateful_callbacks", value) for value in ({}, [1], {"TrainerControl": 1})],
        ("stateful_callbacks", {"TrainerControl": {}, "varlora": 1}),
        ("stateful_callbacks", {"TrainerControl": {}, "varlora": {"not_finite": "2"}}),
    ],
)
def test_what_the_trainer_reads_by_itself_is_looked_at_before(name, value, tmp_path):
    told: list[str] = []
    make_checkpoint(tmp_path, 9)
    newest = make_checkpoint(tmp_path, 10)
    write_text(newest / "trainer_state.json", json.dumps({**trainer_state(10), name: value}))
    write_manifest(newest)
    assert latest_checkpoint(tmp_path, told.append) == tmp_path / "checkpoint-9"
    assert str(newest / "trainer_state.json") in told[0]


def test_a_checkpoint_of_another_version_of_transformers_is_not_taken_for_damaged(tmp_path):
    newest = make_checkpoint(tmp_path, 10)
    write_text(newest / "trainer_state.json", json.dumps({**trainer_state(10), "new_in_6": 1}))
    write_manifest(newest)
    with pytest.raises(VarloraError, match=r"it has `new_in_6` as well\. Go on with the version of transformers"):
        latest_checkpoint(tmp_path, print)


def test_a_run_that_was_cut_off_after_its_last_step_gets_all_back(tmp_path):
    """Adapter, optimizer and what the method has collected, from which its posterior is made."""

    def start():
        model = helpers.tiny_model()
        return model, torch.optim.AdamW(trainable(model).values(), lr=0.1)

    (model, optimizer), (other, again), collected = start(), start(), {}
    for p in trainable(model).values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    model.save_pretrained(tmp_path)
    save_state(tmp_path, "optimizer", optimizer.state_dict())
    save_state(tmp_path, "method", {"count": 3, "mean": torch.ones(2)})
    restore(other, again, collected, tmp_path)
    assert helpers.same(helpers.bits(other), helpers.bits(model))
    assert equal(again.state_dict(), optimizer.state_dict())
    assert equal(collected, {"count": 3, "mean": torch.ones(2)})


def test_the_scale_of_float16_losses_goes_on_where_it_was(tmp_path):
    scales = []
    for scale in (8.0, 2.0):
        trainer = CheckpointTrainer.__new__(CheckpointTrainer)
        trainer.args = SimpleNamespace(should_save=True)
        trainer.accelerator = SimpleNamespace(scaler=torch.amp.GradScaler("cpu", init_scale=scale))
        trainer._load_scaler(str(tmp_path))  # where there is one
        trainer._save_scaler(str(tmp_path))
        scales.append(trainer.accelerator.scaler.get_scale())
    assert scales == [8.0, 8.0]


def test_rotation_keeps_complete_checkpoints(tmp_path):
    for step in (2, 4, 10):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 6, complete=False)
    make_checkpoint(tmp_path, 8, complete=False)
    write_text(tmp_path / "checkpoint-notes" / "x", "not ours")
    newest = make_checkpoint(tmp_path, 5)  # 10, 8 and 6 are of an attempt that was given up
    checkpoint._rotate(newest, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-5", "checkpoint-notes"]
    checkpoint._rotate(newest, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "checkpoint-notes"]
