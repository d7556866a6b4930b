from __future__ import annotations

import copy
import dataclasses
import errno
import importlib
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import types
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path

import full_disk
import helpers
import kill_and_resume
import pytest
import torch
from accelerate.utils import is_lomo_available
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import TrainerCallback

import varlora.files
import varlora.fit
import varlora.methods
import varlora.predict
import varlora.trainer
from varlora.checkpoint import load_adapter
from varlora.demo.run import one_thread
from varlora.errors import ConfigError, Interrupted, VarloraError
from varlora.files import load_tensors, verify_manifest
from varlora.fit import NotFiniteError, check_training_arguments
from varlora.methods import AdamW, Ivon, Swa, Swag
from varlora.model import LoRA, load_model
from varlora.optim.ivon import IVON
from varlora.optim.native import library
from varlora.params import trainable
from varlora.prompt import Encoded
from varlora.trainer import MethodTrainer, Watch, class_loss, of_first_rank, short_walks

METHODS = [AdamW(lr=2e-2), Ivon(lr=1.0, ess=1e6, hess_init=1e-3, clip_radius=2e-2)]
both_methods = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


class Spy(TrainerCallback):
    """Keeps what a step began and ended with, and what a checkpoint held."""

    def __init__(self, model):
        self.model = model
        self.begun, self.ended, self.saved, self.states = {}, {}, {}, {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.args = args

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun[state.global_step + 1] = helpers.bits(self.model)

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        self.ended[state.global_step] = helpers.bits(self.model)
        self.states[state.global_step] = copy.deepcopy(optimizer.state_dict()["state"])

    def on_save(self, args, state, control, **kwargs):
        self.saved[state.global_step] = helpers.bits(self.model)


class At(TrainerCallback):
    """Does something when a step begins."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.action()


def checkpoints(run_dir):
    return sorted(path.name for path in run_dir.glob("checkpoint-*"))


def at_forwards(monkeypatch, numbers, change):
    """Change the logits of some forward passes, counted from 1."""
    original, count = varlora.trainer.class_logits, 0

    def replacement(model, batch):
        nonlocal count
        count += 1
        logits = original(model, batch)
        return change(logits) if count in numbers else logits

    monkeypatch.setattr(varlora.trainer, "class_logits", replacement)


# --- what is trained ---


def test_class_loss_is_the_sum_of_the_negative_log_probabilities():
    logits = torch.tensor([[1.0, 2.0, -torch.inf], [0.5, 0.5, 0.5]], requires_grad=True)
    labels = torch.tensor([0, 2])
    loss = class_loss(logits, labels)
    probabilities = logits.softmax(-1)
    torch.testing.assert_close(loss, -(probabilities[0, 0].log() + probabilities[1, 2].log()))
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("draws", [0, 1])
def test_training_forwards_are_draws_and_all_else_is_at_the_mean(tmp_path, monkeypatch, draws):
    """Of IVON; AdamW's forward passes are at its only point."""
    model = helpers.tiny_model()
    spy, used = Spy(model), []
    original = varlora.trainer.class_logits

    def watched(model, batch):
        used.append(helpers.bits(model))
        return original(model, batch)

    monkeypatch.setattr(varlora.trainer, "class_logits", watched)
    settings = {"steps": 4, "batch_size": 2, "accumulation": 2}
    posterior = helpers.run_fit(model, METHODS[draws], tmp_path, callbacks=[spy], **settings)
    assert len(used) == 8
    for step in range(1, 5):
        begun, ended, one, two = spy.begun[step], spy.ended[step], *used[2 * step - 2 : 2 * step]
        assert helpers.same(one, two)  # micro-batches share a draw
        assert helpers.same(one, begun) == (draws == 0)
        assert not any(torch.equal(ended[name], begun[name]) for name in begun) or step == 1
        if step > 1:
            assert helpers.same(begun, spy.ended[step - 1])
        if draws:
            mean = {name: state["mean"] for name, state in zip(begun, spy.states[step].values())}
            assert helpers.same(ended, mean)
    for step, held in spy.saved.items():
        assert helpers.same(held, spy.ended[step])
        if (tmp_path / f"checkpoint-{step}").exists():
            other = helpers.tiny_model()
            load_adapter(other, tmp_path / f"checkpoint-{step}")
            assert helpers.same(helpers.bits(other), held)
    assert set(spy.saved) == {2, 4}
    assert helpers.same(dict(posterior.mean), spy.ended[4])


@both_methods
def test_a_forward_that_raises_leaves_the_mean(method, tmp_path, monkeypatch):
    model = helpers.tiny_model(dropout=0.1)
    spy = Spy(model)

    def fail(logits):
        raise RuntimeError("out of memory")

    at_forwards(monkeypatch, [4], fail)
    before = signal.getsignal(signal.SIGINT)  # a job in the background ignores it
    with pytest.raises(RuntimeError, match="out of memory"):
        helpers.run_fit(model, method, tmp_path, callbacks=[spy])
    assert helpers.same(helpers.bits(model), spy.ended[3])
    assert not model.training
    assert signal.getsignal(signal.SIGINT) is before


def test_sigma_is_logged_like_the_loss(tmp_path):
    posterior = helpers.run_fit(helpers.tiny_model(), METHODS[1], tmp_path, training_arguments={"logging_steps": 2})
    lines = helpers.logged(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all({"loss", "learning_rate", "grad_norm", "epoch"} <= line.keys() for line in lines)

    def mean(names):
        return torch.cat([posterior.std[name].flatten() for name in names]).mean().item()

    names = list(posterior.std)
    assert lines[-1]["sigma"] == pytest.approx(mean(names), rel=1e-5)
    for layer in (0, 1):
        of_layer = [name for name in names if f".layers.{layer}." in name]
        assert lines[-1][f"sigma/layer_{layer:02d}"] == pytest.approx(mean(of_layer), rel=1e-5)
    assert lines[0]["sigma"] != lines[-1]["sigma"]


@pytest.mark.parametrize(
    "settings", [{"mc_samples": 2}, {"hess_approx": "gradsq"}, {"mc_samples": 2, "hess_approx": "gradsq"}], ids=str
)
def test_every_kind_of_ivon_resumes_bit_for_bit(tmp_path, settings):
    method = Ivon(lr=1.0, ess=1e6, hess_init=1e-3, clip_radius=2e-2, beta2=0.9, **settings)
    case = {"batch_size": 2, "accumulation": 2, "rows": helpers.make_rows(11), "checkpoint_every": 3}
    helpers.run_fit(helpers.tiny_model(dropout=0.1), method, tmp_path / "whole", **case)
    fit_until(helpers.tiny_model(dropout=0.1), method, tmp_path / "cut", 4, **case)
    helpers.run_fit(helpers.tiny_model(dropout=0.1), method, tmp_path / "cut", resume=True, **case)
    assert helpers.outcome(tmp_path / "cut") == helpers.outcome(tmp_path / "whole")


def fit_until(model, method, run_dir, step, **settings):
    """Fit until a crash at the beginning of a step."""

    def crash():
        raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        helpers.run_fit(model, method, run_dir, callbacks=[At(step, crash)], **settings)


# --- stopped ---


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Runs that died of SIGKILL and were resumed, each in a process of its own."""
    folder, seed = tmp_path_factory.mktemp("killed"), random.randrange(10**6)
    script = Path(kill_and_resume.__file__)
    done = subprocess.run(
        [sys.executable, script, folder, str(seed)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"seed {seed}: {done.stdout}\n{done.stderr}"
    return folder, seed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("death", kill_and_resume.DEATHS)
@pytest.mark.parametrize("method", kill_and_resume.METHODS)
def test_killed_and_resumed_ends_in_the_bits_of_one_left_alone(killed, method, death):
    folder, seed = killed
    whole, resumed = folder / method / "whole", folder / method / death
    assert helpers.outcome(resumed) == helpers.outcome(whole), f"seed {seed}"
    expected, meta = load_tensors(whole / "predictions.safetensors")
    found, other = load_tensors(resumed / "predictions.safetensors")
    assert helpers.same(found, expected), f"seed {seed}"
    assert other == meta


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_20_random_moments_ends_in_the_bits_of_one_left_alone(ranks, tmp_path):
    """Any line may be the last one; of two ranks, either may die, and the other is then killed."""
    seed = random.randrange(10**6)
    script = Path(kill_and_resume.__file__)
    command = [sys.executable, script, tmp_path, str(seed), "--random", str(ranks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"seed {seed}: {done.stdout}\n{done.stderr}"
    assert helpers.outcome(tmp_path / "killed") == helpers.outcome(tmp_path / "whole"), f"seed {seed}"
    for kind in ("while writing", *kill_and_resume.RARE):
        assert done.stdout.count(f"died {kind}") >= 2, f"seed {seed}: {done.stdout}"
    assert done.stdout.count("died") == 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_one_of_two_ranks_stops_both_after_a_checkpoint(rank, tmp_path):
    command = [sys.executable, Path(kill_and_resume.__file__), tmp_path, "0", "--stop", str(rank)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert helpers.outcome(tmp_path / "killed") == helpers.outcome(tmp_path / "whole")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_step_that_is_not_finite_on_one_of_two_ranks_is_left_out_on_both(tmp_path):
    """The loss alone is not: gradients are averaged, and one that is not finite would be seen on both."""
    command = [sys.executable, Path(kill_and_resume.__file__), tmp_path, "0", "--spoil"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    outcomes = [helpers.outcome(tmp_path / name) for name in ("0", "1", "01")]
    for outcome in outcomes:
        assert [line.get("not_finite_steps") for line in outcome.pop("log")] == [None, None, None, *[1] * 5]
    assert outcomes[0] == outcomes[1] == outcomes[2]


SMALL = 'mount -t tmpfs -o size=4m tmpfs "$1" && exec "$2" "$3" "$1" "$4"'


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(tmp_path):
    """A tmpfs of 4 MB, in a mount namespace of the process's own."""
    (tmp_path / "small").mkdir()
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*unshare, SMALL, "", tmp_path / "small", "true"]).returncode:
        pytest.skip("needs `unshare` and the right to mount in it")
    script = Path(full_disk.__file__)
    command = [*unshare, SMALL, "", tmp_path / "small", sys.executable, script, tmp_path / "whole"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"checkpoint-4 could not be written: .*[Nn]o space left .* Make room", done.stdout)


def test_a_log_that_cannot_be_written_leaves_the_checkpoint_before_and_says_so(tmp_path, monkeypatch):
    model, opened = helpers.tiny_model(), Path.open

    def full(path, mode="r", **settings):
        if path.name == "training.jsonl" and mode == "a" and (tmp_path / "cut" / "checkpoint-2").is_dir():
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, mode, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(VarloraError, match=r"training\.jsonl could not be written: .*No space left .* Make room"):
            helpers.run_fit(model, METHODS[1], tmp_path / "cut")
    verify_manifest(tmp_path / "cut" / "checkpoint-2")
    helpers.run_fit(helpers.tiny_model(), METHODS[1], tmp_path / "cut", resume=True)
    helpers.run_fit(helpers.tiny_model(), METHODS[1], tmp_path / "whole")
    assert helpers.outcome(tmp_path / "cut") == helpers.outcome(tmp_path / "whole")


@both_methods
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_writes_a_checkpoint_and_resumes_to_the_same_bits(method, number, tmp_path):
    case = {"checkpoint_every": 100, "training_arguments": {"logging_steps": 1}, "batch_size": 2, "accumulation": 2}
    helpers.run_fit(helpers.tiny_model(dropout=0.1), method, tmp_path / "whole", **case)
    interrupt = At(4, lambda: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=r"step 4 of 6.*checkpoint-4") as caught:
        helpers.run_fit(helpers.tiny_model(dropout=0.1), method, tmp_path / "cut", callbacks=[interrupt], **case)
    assert isinstance(caught.value, VarloraError)
    assert signal.getsignal(number) is before
    assert checkpoints(tmp_path / "cut") == ["checkpoint-4"]
    verify_manifest(tmp_path / "cut" / "checkpoint-4")
    assert not (tmp_path / "cut" / "adapter").exists()
    helpers.run_fit(helpers.tiny_model(dropout=0.1), method, tmp_path / "cut", resume=True, **case)
    assert helpers.outcome(tmp_path / "cut") == helpers.outcome(tmp_path / "whole")


def test_interrupt_in_the_last_step_finishes(tmp_path):
    interrupt = At(6, lambda: os.kill(os.getpid(), signal.SIGINT))
    helpers.run_fit(helpers.tiny_model(), METHODS[1], tmp_path, callbacks=[interrupt])
    assert (tmp_path / "adapter").is_dir()


def test_second_interrupt_leaves_at_once(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    model = helpers.tiny_model()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        helpers.run_fit(model, METHODS[1], tmp_path, callbacks=[At(3, twice)])
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoints(tmp_path) == ["checkpoint-2"]


@pytest.mark.parametrize("damage", ["cut", "altered", "without manifest"])
def test_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, damage):
    case = {"training_arguments": {"logging_steps": 1}, "checkpoint_every": 1}
    helpers.run_fit(helpers.tiny_model(dropout=0.1), METHODS[1], tmp_path / "whole", **case)
    fit_until(helpers.tiny_model(dropout=0.1), METHODS[1], tmp_path / "cut", 5, **case)
    newest = tmp_path / "cut" / "checkpoint-4"
    file = newest / ("manifest.json" if damage == "without manifest" else "optimizer.safetensors")
    content = file.read_bytes()
    file.unlink()
    if damage != "without manifest":
        file.write_bytes(content[:-7] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    told: list[str] = []
    helpers.run_fit(
        helpers.tiny_model(dropout=0.1), METHODS[1], tmp_path / "cut", resume=True, warn=told.append, **case
    )
    assert len(told) == 2
    assert "checkpoint-4" in told[0]
    assert told[1] == f"Going on from {tmp_path / 'cut' / 'checkpoint-3'}."
    assert helpers.outcome(tmp_path / "cut") == helpers.outcome(tmp_path / "whole")


def test_resume_without_a_checkpoint_starts_anew(tmp_path):
    helpers.run_fit(helpers.tiny_model(), METHODS[1], tmp_path / "whole")
    helpers.run_fit(helpers.tiny_model(), METHODS[1], tmp_path / "resumed", resume=True)
    assert helpers.outcome(tmp_path / "resumed") == helpers.outcome(tmp_path / "whole")


def test_checkpoints_of_an_earlier_run_are_not_mixed_in(tmp_path):
    helpers.run_fit(helpers.tiny_model(), METHODS[1], tmp_path)
    with pytest.raises(VarloraError, match=r"checkpoint-\d is of an earlier run"):
        helpers.run_fit(helpers.tiny_model(), METHODS[1], tmp_path)


# --- checkpoints ---


@both_methods
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_checkpoints_rotate_and_hold_no_pickles(method, limit, tmp_path):
    arguments = {"save_total_limit": limit}
    helpers.run_fit(helpers.tiny_model(), method, tmp_path, checkpoint_every=1, training_arguments=arguments)
    assert checkpoints(tmp_path) == [f"checkpoint-{step}" for step in range(7 - limit, 7)]
    for name in checkpoints(tmp_path):
        verify_manifest(tmp_path / name)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".md"}


def test_rotation_never_leaves_fewer_complete_ones(tmp_path, monkeypatch):
    """The old checkpoint is there until the new one is complete."""
    seen = []
    original = varlora.files.write_manifest

    def watched(folder):
        if folder.name.startswith("checkpoint"):
            seen.append([path.name for path in tmp_path.glob("checkpoint-*") if (path / "manifest.json").is_file()])
        original(folder)

    monkeypatch.setattr(varlora.files, "write_manifest", watched)
    arguments = {"save_total_limit": 1}
    helpers.run_fit(
        helpers.tiny_model(), METHODS[1], tmp_path, steps=3, checkpoint_every=1, training_arguments=arguments
    )
    assert seen == [[], ["checkpoint-1"], ["checkpoint-2"]]


# --- not finite ---


def nan_logits(logits):
    return logits * torch.nan


def states_equal(one, other):
    return all(
        torch.equal(torch.as_tensor(one[index][key]), torch.as_tensor(other[index][key]))
        for index in one
        for key in one[index]
    )


@both_methods
@pytest.mark.parametrize("clip", [1.0, 0.0])
@pytest.mark.parametrize("where", ["loss", "one micro-batch", "gradient", "loss alone"])
def test_step_that_is_not_finite_is_left_out_counted_and_logged(method, where, clip, tmp_path, monkeypatch):
    """The fourth, of two micro-batches."""
    model = helpers.tiny_model()
    spy, told = Spy(model), []

    def now():
        return 4 in spy.begun and 4 not in spy.ended

    if where == "loss":
        at_forwards(monkeypatch, [7, 8], nan_logits)
    elif where == "one micro-batch":
        at_forwards(monkeypatch, [8], nan_logits)
    elif where == "gradient":
        list(trainable(model).values())[-1].register_hook(lambda grad: grad * torch.inf if now() else grad)
    else:
        monkeypatch.setattr(
            varlora.trainer, "class_loss", lambda *batch: class_loss(*batch) + (torch.inf if now() else 0)
        )
    settings = {"batch_size": 2, "accumulation": 2, "training_arguments": {"logging_steps": 1, "max_grad_norm": clip}}
    helpers.run_fit(model, method, tmp_path, callbacks=[spy], warn=told.append, **settings)
    assert helpers.same(spy.ended[4], spy.begun[4])
    assert states_equal(spy.states[4], spy.states[3])
    assert not helpers.same(spy.ended[5], spy.ended[4])
    lines = helpers.logged(tmp_path)
    assert [line.get("not_finite_steps") for line in lines] == [None, None, None, 1, 1, 1]
    assert told == ["1 of 6 steps were left out because loss or gradient was not finite."]
    assert all(value.isfinite().all() for value in helpers.bits(model).values())
    assert all(math.isfinite(line["loss"]) for line in lines)


@both_methods
def test_too_many_in_a_row_stop_with_the_last_good_state(method, tmp_path, monkeypatch):
    model = helpers.tiny_model()
    spy = Spy(model)
    with monkeypatch.context() as patch:
        at_forwards(patch, [2, 3, 5, 6, 7, 8, 9, 10], nan_logits)
        with pytest.raises(NotFiniteError, match=r"3 steps in a row; stopped at step 7.*checkpoint-7") as caught:
            helpers.run_fit(model, method, tmp_path, steps=12, max_not_finite=3, checkpoint_every=100, callbacks=[spy])
    assert isinstance(caught.value, VarloraError)
    assert helpers.same(helpers.bits(model), spy.ended[4])
    assert checkpoints(tmp_path) == ["checkpoint-7"]
    other = helpers.tiny_model()
    load_adapter(other, tmp_path / "checkpoint-7")
    assert helpers.same(helpers.bits(other), spy.ended[4])
    told: list[str] = []
    helpers.run_fit(model, method, tmp_path, steps=12, max_not_finite=3, resume=True, warn=told.append)
    assert told == ["5 of 12 steps were left out because loss or gradient was not finite."]
    assert (tmp_path / "adapter").is_dir()


def test_a_short_run_of_steps_that_are_all_left_out_is_no_success(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_forwards(patch, range(1, 100), nan_logits)
        with pytest.raises(NotFiniteError, match="6 steps in a row; stopped at step 6"):
            helpers.run_fit(helpers.tiny_model(), METHODS[1], tmp_path, steps=6, batch_size=4, accumulation=1)
    assert checkpoints(tmp_path)[-1] == "checkpoint-6"
    assert not (tmp_path / "adapter").exists()


def test_steps_left_out_are_counted_over_an_interruption(tmp_path, monkeypatch):
    case = {"training_arguments": {"logging_steps": 1}}
    for folder, cut in (("whole", False), ("cut", True)):
        with monkeypatch.context() as patch:
            at_forwards(patch, [2], nan_logits)
            if cut:
                fit_until(helpers.tiny_model(), METHODS[1], tmp_path / folder, 5, **case)
            else:
                helpers.run_fit(helpers.tiny_model(), METHODS[1], tmp_path / folder, **case)
    helpers.run_fit(helpers.tiny_model(), METHODS[1], tmp_path / "cut", resume=True, **case)
    assert helpers.outcome(tmp_path / "cut") == helpers.outcome(tmp_path / "whole")
    assert helpers.logged(tmp_path / "cut")[-1]["not_finite_steps"] == 1


# --- arguments ---


def test_training_arguments_pass_through(tmp_path):
    model = helpers.tiny_model()
    spy = Spy(model)
    arguments = {
        "logging_steps": 2,
        "bf16": True,
        "max_grad_norm": 0.25,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "dataloader_drop_last": True,
    }
    helpers.run_fit(model, METHODS[1], tmp_path, callbacks=[spy], training_arguments=arguments)
    for name, value in arguments.items():
        assert getattr(spy.args, name) == value
    assert (spy.args.max_steps, spy.args.per_device_train_batch_size, spy.args.save_steps) == (6, 4, 2)
    lines = helpers.logged(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[0]["learning_rate"] == pytest.approx(0.5)  # the first half of two steps of warmup


@pytest.mark.parametrize(
    ("cuda", "arguments", "pins"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"dataloader_pin_memory": False}, False),
        (False, {"dataloader_pin_memory": True}, True),
    ],
)
def test_batches_are_to_be_pinned_where_there_is_a_gpu_and_a_user_does_not_say_otherwise(
    tmp_path, monkeypatch, cuda, arguments, pins
):
    given = {}

    def look(**values):
        given.update(values)
        raise ConnectionAbortedError  # before the Trainer looks for the GPU

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(sys.modules["varlora.fit"], "_arguments", look)
    with pytest.raises(ConnectionAbortedError):
        helpers.run_fit(helpers.tiny_model(), METHODS[0], tmp_path, training_arguments=arguments)
    assert given["dataloader_pin_memory"] is pins


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_pinned(tmp_path):
    batches = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, train_dataloader, **kwargs):
            batches.extend(DataLoader.__iter__(train_dataloader))  # before they are brought to the GPU

    helpers.run_fit(helpers.tiny_model(device="cuda"), METHODS[0], tmp_path, callbacks=[Look()])
    assert {tensor.is_pinned() for batch in batches for tensor in batch.values()} == {True}


def test_clipping_acts(tmp_path):
    for folder, norm in (("tight", 1e-3), ("loose", 1e3)):
        method = Ivon(lr=1e-6, ess=1e6, hess_init=1e-3, clip_radius=1e9)
        helpers.run_fit(helpers.tiny_model(), method, tmp_path / folder, steps=2,
                        training_arguments={"max_grad_norm": norm})  # fmt: skip
    start = helpers.bits(helpers.tiny_model())
    moved = {
        folder: sum(
            (p - start[name]).abs().sum() for name, p in helpers.bits(helpers.reloaded(tmp_path / folder)[0]).items()
        )
        for folder in ("tight", "loose")
    }
    assert 0 < moved["tight"] < 0.1 * moved["loose"]


def test_unknown_arguments_and_ours_are_refused_together(tmp_path):
    arguments = {"logging_step": 5, "learning_rate": 1e-3, "seed": 1, "zzzzzz": 1, "logging_steps": 5}
    with pytest.raises(ConfigError) as caught:
        helpers.run_fit(helpers.tiny_model(), METHODS[1], tmp_path, training_arguments=arguments)
    assert len(caught.value.problems) == 4
    assert caught.value.problems == tuple(check_training_arguments(arguments))
    text = str(caught.value)
    assert "`training_arguments.logging_step`. Did you mean `logging_steps`" in text
    assert "`training_arguments.learning_rate` is set by `method.lr`" in text
    assert "`training_arguments.seed` is set by `seed`" in text
    assert "`training_arguments.zzzzzz`. See `transformers.TrainingArguments`" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [{"deepspeed": "zero2.json"}, {"fsdp": True}])
def test_adapters_that_are_spread_over_processes_are_refused(tmp_path, arguments):
    with pytest.raises(ConfigError, match=r"`training_arguments\.\w+` would spread .* `varlora.IVON` in a script"):
        helpers.run_fit(helpers.tiny_model(), METHODS[1], tmp_path, training_arguments=arguments)
    assert list(tmp_path.iterdir()) == []
    assert check_training_arguments(dict.fromkeys(arguments)) == []


@pytest.mark.parametrize("name", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_so_is_what_accelerate_launch_says_of_it(tmp_path, monkeypatch, name):
    """With DeepSpeed the Trainer would make AdamW of any optimizer."""
    monkeypatch.setenv(name, "true")
    with pytest.raises(ConfigError, match=f"`{name}` in the environment would spread the adapter"):
        helpers.run_fit(helpers.tiny_model(), METHODS[1], tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        {"lr_scheduler_type": "linaer"},
        {"logging_steps": "many"},
        {"warmup_steps": -1},
        {"eval_strategy": "steps"},
        {"train_sampling_strategy": "group_by_length"},
        {"bf16": "false"},
    ],
)
def test_values_that_the_trainer_refuses_are_problems_of_the_configuration(tmp_path, arguments):
    with pytest.raises(ConfigError, match="training_arguments"):
        helpers.run_fit(helpers.tiny_model(), METHODS[1], tmp_path, training_arguments=arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "adapter", "says"),
    [
        ("tfb", {"use_dora": True}, "A and B alone"),
        ("laplace_diag", {"use_dora": True}, "weights of linear layers"),
        ("laplace_kfac", {"lora_bias": True}, "weights of linear layers"),
        ("mc_dropout", {"use_dora": True}, "without DoRA"),
        ("blob", {"use_dora": True}, "without DoRA"),
        ("temperature", {"use_dora": True}, "A and B alone"),
    ],
)
def test_an_adapter_that_a_method_cannot_conclude_from_is_refused_before_training(name, adapter, says, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1, **adapter)
    model = get_peft_model(helpers.tiny_model().unload(), config)
    settings = {"of": "tfb"} if name == "temperature" else {}
    with pytest.raises(VarloraError, match=says):
        helpers.run_fit(model, varlora.methods.METHODS[name](**settings), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_epsilon_that_float16_does_not_know_is_refused(tmp_path):
    """AdamW would divide 0 by 0 at its first step, and no gradient would tell."""
    with pytest.raises(VarloraError, match=r"`eps` that float16 can hold.*`eps` to 1e-4"):
        helpers.run_fit(helpers.tiny_model(adapter="float16"), AdamW(lr=1e-3), tmp_path)
    helpers.run_fit(helpers.tiny_model(adapter="float16"), AdamW(lr=1e-3, eps=1e-4), tmp_path)


def test_a_posterior_that_is_not_finite_is_not_written(tmp_path):
    model = helpers.tiny_model()

    class Broken(AdamW):
        def posterior(self, trained):
            found = super().posterior(trained)
            next(iter(found.mean.values())).fill_(math.nan)
            return found

    with pytest.raises(NotFiniteError, match="is not finite, so nothing is written"):
        helpers.run_fit(model, Broken(), tmp_path)
    assert not (tmp_path / "adapter").exists()


def test_no_batch_at_all_is_refused(tmp_path):
    """The Trainer would end without a step, and an untrained adapter would be written."""
    arguments = {"dataloader_drop_last": True}
    with pytest.raises(ConfigError, match="drops all of 12 rows, as a batch has 16"):
        helpers.run_fit(helpers.tiny_model(), METHODS[0], tmp_path, batch_size=16, training_arguments=arguments)


def test_mc_dropout_of_adapted_embeddings(tmp_path):
    """Which have no dropout of their own."""
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], lora_dropout=0.1)
    model = get_peft_model(helpers.tiny_model().unload(), config)
    posterior = helpers.run_fit(model, varlora.methods.METHODS["mc_dropout"](), tmp_path)
    assert {name.rpartition(".lora_A")[1] for name in posterior.rate} == {".lora_A"}


def test_the_adapter_has_the_name_that_it_is_written_under(tmp_path):
    model = helpers.tiny_model()
    model.add_adapter("other", model.peft_config["default"])
    with pytest.raises(VarloraError, match="but got 'default', 'other'"):
        helpers.run_fit(model, METHODS[0], tmp_path)


def test_rows_must_exist_and_have_labels(tmp_path):
    fit = varlora.fit.fit
    with pytest.raises(VarloraError, match="`rows`"):
        fit(helpers.tiny_model(), METHODS[0], [], tmp_path, pad_token_id=0, steps=1)
    short = [dataclasses.replace(row, label_tokens=row.label_tokens[:1], label=0) for row in helpers.make_rows(2)]
    with pytest.raises(VarloraError, match="two answers or more in each training row, but 2 of 5 have less"):
        fit(helpers.tiny_model(), METHODS[0], helpers.make_rows(3) + short, tmp_path, pad_token_id=0, steps=1)
    rows = helpers.make_rows(3) + helpers.make_rows(2, labelled=False)
    with pytest.raises(VarloraError, match="2 of 5 have none"):
        fit(helpers.tiny_model(), METHODS[0], rows, tmp_path, pad_token_id=0, steps=1)
    for label in (-100, 5):  # of which torch ignores the one, and gives infinity for the other
        wrong = [*helpers.make_rows(3), dataclasses.replace(row := helpers.make_rows(4)[3], label=label)]
        last = len(row.label_tokens) - 1
        with pytest.raises(VarloraError, match=f"from 0 to {last} in row '{row.id}', but got {label}"):
            fit(helpers.tiny_model(), METHODS[0], wrong, tmp_path, pad_token_id=0, steps=1)


@pytest.mark.parametrize("kernels", [True, False])
@both_methods
def test_steps_that_walk_over_all_modules_end_in_the_same_place(method, kernels, tmp_path, monkeypatch):
    """What is left out of a step changes nothing: modes, gradients and clipping are those of the whole walk.

    The compiled kernel's norm differs from torch's by rounding, so the bits are the same without it alone.
    """
    arguments = {"max_grad_norm": 2.7, "logging_steps": 1}
    if not kernels:
        monkeypatch.setattr(varlora.trainer, "clip", lambda *_: None)
    helpers.run_fit(helpers.tiny_model(), method, tmp_path / "short", training_arguments=arguments)
    monkeypatch.setattr(varlora.fit, "short_walks", lambda *_: nullcontext())
    monkeypatch.delattr(MethodTrainer, "_clip_grad_norm")
    helpers.run_fit(helpers.tiny_model(), method, tmp_path / "whole", training_arguments=arguments)
    norms = [line["grad_norm"] for line in helpers.logged(tmp_path / "short")]
    assert min(norms) < 2.7 < max(norms)
    within = 1e-5 if kernels else 0.0
    assert norms == pytest.approx([line["grad_norm"] for line in helpers.logged(tmp_path / "whole")], rel=within)
    short, whole = (helpers.bits(helpers.reloaded(tmp_path / name)[0]) for name in ("short", "whole"))
    for name, p in whole.items():
        torch.testing.assert_close(short[name], p, rtol=within, atol=within)


def test_what_a_callback_freezes_for_a_while_ends_in_the_same_bits_with_short_walks(tmp_path, monkeypatch):
    """Its gradients are cleared once it is trained again."""

    class Freeze(TrainerCallback):
        def __init__(self, model):
            self.parameters = [p for p in model.parameters() if p.requires_grad][:4]

        def on_init_end(self, args, state, control, **kwargs):
            self.set(False)

        def on_step_end(self, args, state, control, **kwargs):
            self.set(state.global_step >= 2)

        def set(self, trains):
            for p in self.parameters:
                p.requires_grad = trains

    for folder in ("short", "whole"):
        model = helpers.tiny_model()
        helpers.run_fit(model, METHODS[1], tmp_path / folder, steps=6, callbacks=[Freeze(model)])
        monkeypatch.setattr(varlora.fit, "short_walks", lambda *_: nullcontext())
    assert helpers.outcome(tmp_path / "short") == helpers.outcome(tmp_path / "whole")


@pytest.mark.skipif(library() is None, reason="the kernels were not built")
def test_a_gradient_beyond_float32_that_is_clipped_is_a_step(tmp_path):
    class Large(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            (p,) = [p for name, p in kwargs["model"].named_parameters() if "layers.0.self_attn.q_proj.lora_B" in name]
            hook = p.register_hook(lambda gradient: torch.full_like(gradient, 2e38))
            self.hook = hook

        def on_step_end(self, args, state, control, **kwargs):
            self.hook.remove()

    arguments = {"logging_steps": 1}
    helpers.run_fit(
        helpers.tiny_model(), METHODS[0], tmp_path, steps=2, callbacks=[Large()], training_arguments=arguments
    )
    lines = helpers.logged(tmp_path)
    assert [line["grad_norm"] > torch.finfo(torch.float32).max for line in lines[:2]] == [True, True]
    assert not any("not_finite_steps" in line for line in lines)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("part", ["", "base_model.model.model.layers.0"])
def test_whatever_a_callback_evaluates_trains_on_in_training_mode(part, compiled, tmp_path):
    model, modes = helpers.tiny_model(), []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            modes.append({module.training for module in model.modules()})
            model.get_submodule(part).eval()

    compiling = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
    helpers.run_fit(model, METHODS[1], tmp_path, steps=3, callbacks=[Look()], training_arguments=compiling)
    assert modes == [{True}] * 3


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    flushed, named = set(), []
    fsync, rename = os.fsync, Path.rename

    def flush(handle):
        flushed.add(os.fstat(handle).st_ino)
        fsync(handle)

    def give(path, target):
        if target.name.startswith("checkpoint-"):
            assert {found.stat().st_ino for found in (path, *path.rglob("*"))} <= flushed
            named.append(target)
            flushed.clear()
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "rename", give)
    run_dir = tmp_path / "run"
    helpers.run_fit(helpers.tiny_model(), METHODS[1], run_dir, steps=2)
    assert named == [run_dir / "checkpoint-2"]
    assert run_dir.stat().st_ino in flushed


def test_short_walks_end_with_training(tmp_path):
    model = helpers.tiny_model()
    helpers.run_fit(model, METHODS[1], tmp_path, steps=1)
    assert not {"train", "zero_grad"} & vars(model).keys()


def test_a_package_that_accelerate_looks_for_at_each_step_is_absent_while_training_and_not_after():
    with short_walks(helpers.tiny_model()):
        assert not is_lomo_available()
        assert sys.modules["lomo_optim"] is None  # which ends the search before it begins
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("lomo_optim")
    assert "lomo_optim" not in sys.modules


def test_an_installed_package_stays(monkeypatch):
    here = types.ModuleType("lomo_optim")
    here.__spec__ = ModuleSpec("lomo_optim", None)
    monkeypatch.setitem(sys.modules, "lomo_optim", here)
    with short_walks(helpers.tiny_model()):
        assert importlib.import_module("lomo_optim") is here
    assert sys.modules["lomo_optim"] is here


def test_a_copy_that_is_made_while_training_is_a_model_of_its_own():
    """As one that averages the weights is."""
    model = helpers.tiny_model()
    with short_walks(model):
        model.train()
        copied = copy.deepcopy(model)
        for p in (*model.parameters(), *copied.parameters()):
            p.grad = torch.ones_like(p)
        copied.eval()
        copied.zero_grad()
    assert {module.training for module in copied.modules()} == {False}
    assert {module.training for module in model.modules()} == {True}
    assert all(p.grad is None for p in copied.parameters())
    assert all(p.grad is not None for p in model.parameters())


def test_parameters_that_are_replaced_before_the_first_step_are_cleared():
    """As `fully_shard` replaces them, when the Trainer prepares the model."""
    model = helpers.tiny_model()
    with short_walks(model):
        layer = next(module for module in model.modules() if isinstance(module, torch.nn.Linear))
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
        layer.weight.grad = torch.ones_like(layer.weight)
        model.zero_grad()
        assert layer.weight.grad is None


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_are_cleared_as_torch_does(to_none):
    model = helpers.tiny_model()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with short_walks(model):
        model.zero_grad(to_none)
    assert all(p.grad is None if to_none else not p.grad.any() for p in model.parameters())


def test_callbacks_see_the_optimizer_itself_and_the_log(tmp_path):
    class Log(TrainerCallback):
        lines = []

        def on_log(self, args, state, control, logs, optimizer, **kwargs):
            self.lines.append(logs)
            self.optimizer = getattr(optimizer, "optimizer", optimizer)

    log = Log()
    helpers.run_fit(helpers.tiny_model(), METHODS[1], tmp_path, callbacks=[log])
    assert isinstance(log.optimizer, IVON)
    assert {"loss", "sigma"} <= log.lines[0].keys()


def test_training_without_a_terminal_prints_nothing(tmp_path, capfd):
    model = helpers.tiny_model()
    capfd.readouterr()
    helpers.run_fit(model, METHODS[1], tmp_path)
    assert capfd.readouterr() == ("", "")


def test_real_model_learns(shared, tmp_path):
    """Nothing here hangs on how tiny the model is."""
    model, tokenizer = load_model(shared / "models" / "stories-260k", lora=LoRA(), device="cpu")
    texts = {
        "Tom was happy. He felt": 0,
        "Lily was sad. She felt": 1,
        "Ben was happy. Ben felt": 0,
        "Sam was sad. Sam felt": 1,
    }
    answers = tuple(tokenizer.convert_tokens_to_ids(["\u2581a", "\u2581the"]))
    rows = [Encoded(text, tuple(tokenizer(text)["input_ids"]), answers, label, False) for text, label in texts.items()]
    method = Ivon(lr=1.0, ess=1e6, hess_init=1e-3, clip_radius=5e-3)
    posterior = varlora.fit.fit(model, method, rows, tmp_path, pad_token_id=tokenizer.pad_token_id, steps=40)
    found = varlora.predict.predict(model, posterior, rows, pad_token_id=tokenizer.pad_token_id)
    assert found.probs.argmax(-1).tolist() == list(texts.values())


@pytest.mark.parametrize(("rank", "looks"), [(0, 1), (1, 0)])
def test_ranks_take_what_the_first_one_finds(rank, looks, monkeypatch):
    """One process looks, for all: what another would find might differ in its last bits."""
    asked: list[int] = []

    def find() -> dict[str, float]:
        asked.append(rank)
        return {"rechecked": 0.5}

    def broadcast(told: list[object]) -> None:
        assert told == [{"rechecked": 0.5} if rank == 0 else None]
        told[0] = {"rechecked": 0.5}

    monkeypatch.setattr("varlora.trainer.ranks", lambda *_: (rank, 2))
    monkeypatch.setattr("torch.distributed.broadcast_object_list", broadcast)
    assert of_first_rank(find) == {"rechecked": 0.5}
    assert len(asked) == looks


# --- AdamW's settings, and what a step counts ---


def test_adamw_steps_as_its_settings_say():
    p = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = AdamW(lr=0.1, weight_decay=0.5, beta1=0.6, beta2=0.8, eps=0.01).optimizer({"p": p}, 12, 4, 0)
    expected, m, v = 1.0, 0.0, 0.0
    for t, gradient in enumerate((2.0, -1.0, 4.0), 1):
        p.grad = torch.tensor([gradient])
        optimizer.step()
        m, v = 0.6 * m + 0.4 * gradient, 0.8 * v + 0.2 * gradient**2
        expected -= 0.1 * (0.5 * expected + m / (1 - 0.6**t) / (math.sqrt(v / (1 - 0.8**t)) + 0.01))
        assert p.item() == pytest.approx(expected, rel=1e-5)


def test_the_batch_of_a_step_is_that_of_all_ranks(monkeypatch):
    """Of which squared gradients are to be multiplied by the rows."""
    monkeypatch.setattr("varlora.trainer.ranks", lambda *_: (0, 2))
    optimizer = Ivon(lr=0.1, ess=1e6, hess_init=1e-3).optimizer(trainable(helpers.tiny_model()), 12, 4, 0)
    trainer = types.SimpleNamespace(varlora_optimizer=optimizer)
    batches = iter([{"labels": torch.zeros(rows)} for rows in (4, 3, 4)])
    assert MethodTrainer.get_batch_samples(trainer, batches, 2, "cpu")[1] == 7  # here
    assert optimizer.param_groups[0]["batch_size"] == 14


def test_a_comparison_is_one_forward_pass_also_of_a_step_of_several_micro_batches(tmp_path, monkeypatch):
    rows = []
    at_forwards(monkeypatch, range(1000), lambda logits: rows.append(len(logits)) or logits)
    monkeypatch.setattr(Ivon, "compare_every", lambda *_: 2)
    helpers.run_fit(helpers.tiny_model(), METHODS[1], tmp_path, steps=2, batch_size=2, accumulation=3)
    assert rows == [2] * (2 * 3 + 1)


@pytest.mark.parametrize("number", [2, 3])
def test_a_comparison_that_is_not_finite_is_not_noted(number, tmp_path, monkeypatch):
    """Of losses at the mean, or under noise, at the second step; NaN would stay in their averages."""
    at_forwards(monkeypatch, [number], nan_logits)
    monkeypatch.setattr(Ivon, "compare_every", lambda *_: 2)
    method, arguments = dataclasses.replace(METHODS[1], cooling=True), {"logging_steps": 1}
    helpers.run_fit(helpers.tiny_model(), method, tmp_path, steps=4, checkpoint_every=4, training_arguments=arguments)
    lines = helpers.logged(tmp_path)
    assert ["loss_at_mean" in line for line in lines] == [False] * 3 + [True]
    assert all(math.isfinite(lines[-1][name]) for name in ("loss_at_mean", "loss_under_noise", "held_back"))


@pytest.mark.parametrize("fp16", [False, True])
def test_a_grad_scaler_sees_what_overflows(fp16):
    """And lowers its scale for it; without one the step has no gradients."""
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=0.1)
    watch = Watch(METHODS[0], optimizer, {"p": p}, {}, 10, 1.0, None)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    loss = (p * torch.inf).sum()
    scaler.scale(loss).backward()
    watch.losses = [loss.detach()]
    watch.on_pre_optimizer_step(types.SimpleNamespace(fp16=fp16), types.SimpleNamespace(stateful_callbacks={}), None)
    assert watch.not_finite == 1
    if fp16:
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0
    else:
        assert p.grad is None
    assert p.tolist() == [1.0, 1.0]


# --- what the Trainer would do beside ---


class EndsAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_begin(self, args, state, control, **kwargs):
        self.rows_a_step = args.train_batch_size

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_several_gpus_that_one_process_sees_do_not_multiply_the_batch(tmp_path, monkeypatch):
    module = sys.modules["varlora.fit"]
    before = module._arguments

    def with_two_gpus(**settings):
        made = before(**settings)
        assert made.device.type == "cpu"
        made._n_gpu = 2
        return made

    monkeypatch.setattr(module, "_arguments", with_two_gpus)
    seen = EndsAt(6)
    helpers.run_fit(helpers.tiny_model(), AdamW(), tmp_path, callbacks=[seen])
    assert seen.rows_a_step == 4


def test_the_posterior_is_that_of_the_step_at_which_a_callback_ends_training(tmp_path):
    said: list[str] = []
    model = helpers.tiny_model()
    posterior = helpers.run_fit(model, AdamW(lr=1e-2), tmp_path, callbacks=[EndsAt(3)], warn=said.append)
    assert "A callback ended training after step 3 of 6; the posterior is that of this step." in said
    assert helpers.same(posterior.mean, {name: p.detach() for name, p in trainable(model).items()})


@pytest.mark.parametrize("method", [Swa(every=1), Swag(every=1)], ids=lambda method: method.name)
def test_an_average_that_a_callback_ends_before_it_begins_is_told_of(method, tmp_path):
    with pytest.raises(VarloraError, match=r"Expected at least \d snapshots, but training ended after 0"):
        helpers.run_fit(helpers.tiny_model(), method, tmp_path, callbacks=[EndsAt(3)])
