"""One rank of a run under DeepSpeed's ZeRO, started by test_ivon_zero.py: python zero.py RANK WORLD FOLDER CASE...

A case is a way to train, the stage, what is particular, and what to do, such as engine-2-plain-all: all nine steps, six
and then a checkpoint (`save`), or the three steps from that on (`load`). Each rank writes what it ended with to
FOLDER/CASE-RANK.safetensors. `alone` is what a process that has everything ends with, without DeepSpeed.
"""

from __future__ import annotations

import copy
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin
from optim import shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from varlora import IVON

STEPS, SAVED = 9, 6
ROWS = 12
"""Of all ranks, each micro-batch."""
BATCHES = 2
"""Micro-batches of each step."""
CLIP = 0.2


class Model(PreTrainedModel):
    """Two layers, of whose parameters one is frozen."""

    config_class = PreTrainedConfig

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.layers = shards.make_model()
        self.layers[0].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> SequenceClassifierOutput:
        out = x
        for layer in self.layers:
            out = layer(out.to(layer.weight) if hasattr(layer, "weight") else out)
        return SequenceClassifierOutput(loss=(out - x[:, :7].to(out)).square().mean(), logits=out)


class Recorder:
    """What the weights were when last looked at."""

    def __init__(self, model: nn.Module, optimizer: IVON) -> None:
        self.model, self.optimizer, self.seen = model, optimizer, {}
        model.register_forward_pre_hook(lambda *_: self.note("training" if torch.is_grad_enabled() else "evaluation"))

    def note(self, when: str) -> None:
        self.seen |= {f"{when}.{name}": p.detach().clone() for name, p in self.model.named_parameters()}

    def look(self) -> None:
        """Look at what there is to be seen: draws for an evaluation, one within the other, and the mean."""
        self.note("before")
        with self.optimizer.sampled_params():
            self.note("outer")
            with self.optimizer.sampled_params():
                self.note("inner")
            self.note("outer again")
        self.note("before again")
        self.optimizer.eval()
        self.note("at the mean")

    def results(self) -> dict[str, Tensor]:
        """What was seen, and the posterior."""
        posterior = self.optimizer.posterior()
        return {
            **self.seen,
            **{f"mean.{name}": x.contiguous() for name, x in posterior.mean.items()},
            **{f"std.{name}": x.contiguous() for name, x in posterior.std.items()},
            "sigma": torch.tensor(list(self.optimizer.mean_sigma().values())),
        }


class Rows(torch.utils.data.Dataset):
    """The rows of all steps, in order."""

    def __len__(self) -> int:
        return STEPS * BATCHES * ROWS

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return {"x": torch.randn(20, generator=torch.Generator().manual_seed(at))}


def batch(number: int, rank: int = 0, world: int = 1) -> Tensor:
    """A rank's rows of a micro-batch."""
    size = ROWS // world
    first = number * ROWS + rank * size
    return torch.stack([Rows()[at]["x"] for at in range(first, first + size)])


def make_optimizer(model: nn.Module, kind: str, **settings: Any) -> IVON:
    """One with a group for each layer, or with one for all."""
    *first, last = model.named_parameters()
    groups: list[Any] = [{"params": first}, {"params": [last], "lr": 0.02}]
    in_groups = kind in ("groups", "again", "types")
    return IVON(groups if in_groups else [*first, last], **shards.SETTINGS, **settings)


def alone(way: str, kind: str) -> dict[str, Tensor]:
    model = Model(PreTrainedConfig())
    optimizer = make_optimizer(model, kind)
    recorder = Recorder(model, optimizer)
    model.layers[0].weight.requires_grad_(kind != "frozen")
    for number in range(STEPS * BATCHES):
        optimizer.train()
        (model(batch(number)).loss / BATCHES).backward()
        if way != "trainer" and number == STEPS * BATCHES - 2:
            recorder.look()
        if number % BATCHES == BATCHES - 1:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    if way == "trainer":  # whose last evaluation comes after the last step
        with torch.no_grad():
            model(batch(0))
    recorder.look()
    return recorder.results()


def config(stage: int, kind: str) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "round_robin_gradients": kind == "robin"}
    if kind == "offload":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": ROWS // 2,
        "gradient_accumulation_steps": BATCHES,
        "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        **({"bf16": {"enabled": True}} if kind in ("bf16", "master") else {}),
        **({"data_types": {"grad_accum_dtype": "fp32"}} if kind == "master" else {}),  # another class of DeepSpeed's
    }


def by_engine(stage: int, kind: str, do: str, rank: int, world: int, folder: Path) -> dict[str, Tensor]:
    import deepspeed

    model = Model(PreTrainedConfig())
    if kind == "again":
        train_and_destroy(model, stage)
    optimizer = make_optimizer(model, kind)
    if kind == "groups":
        optimizer.mean_sigma()  # which makes a state of the parameters, before DeepSpeed takes them
        model, optimizer = copy.deepcopy((model, optimizer))
    recorder = Recorder(model, optimizer)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config(stage, kind))[0]
    model.layers[0].weight.requires_grad_(kind != "frozen")  # after DeepSpeed took it
    if do == "load":
        engine.load_checkpoint(folder)
    for number in range(SAVED * BATCHES if do == "load" else 0, (SAVED if do == "save" else STEPS) * BATCHES):
        if kind == "contexts":
            with optimizer.sampled_params(train=True):
                engine.backward(engine(batch(number, rank, world)).loss)
            optimizer.train()  # for what is looked at next
        else:
            optimizer.train()
            engine.backward(engine(batch(number, rank, world)).loss)
        if number == STEPS * BATCHES - 2:
            recorder.look()
        engine.step()
    if do == "save":
        engine.save_checkpoint(folder)
    recorder.look()
    found = recorder.results()
    if do == "check":
        check_what_goes_wrong(engine, optimizer, rank)
    return found


def train_and_destroy(model: Model, stage: int) -> None:
    """Train, with all parameters in one group and none frozen, and leave the weights as they were."""
    import deepspeed

    before = copy.deepcopy(model.state_dict())
    model.layers[0].bias.requires_grad_(True)
    optimizer = make_optimizer(model, "plain")
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config(stage, "plain"))[0]
    for number in range(BATCHES):
        optimizer.train()
        engine.backward(engine(batch(number)).loss)
        engine.step()
    engine.destroy()
    model.layers[0].bias.requires_grad_(False)
    model.load_state_dict(before)


def by_accelerate(stage: int, kind: str, do: str, rank: int, world: int, folder: Path) -> dict[str, Tensor]:
    plugin = DeepSpeedPlugin(hf_ds_config=config(stage, kind))
    accelerator = Accelerator(gradient_accumulation_steps=BATCHES, deepspeed_plugin=plugin)
    model = Model(PreTrainedConfig())
    own = make_optimizer(model, kind)
    recorder = Recorder(model, own)
    engine, optimizer = accelerator.prepare(model, own)
    for number in range(STEPS * BATCHES):
        with accelerator.accumulate(engine):
            optimizer.train()
            accelerator.backward(engine(batch(number, rank, world)).loss)
            if number == STEPS * BATCHES - 2:
                recorder.look()
            optimizer.step()
            optimizer.zero_grad()
    recorder.look()
    return recorder.results()


class VariationalTrainer(Trainer):
    """With DeepSpeed, the Trainer makes its optimizer itself."""

    def create_optimizer(self, model: Any = None) -> IVON:
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model, "plain")
        return self.optimizer

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(Rows())


def by_trainer(stage: int, kind: str, do: str, rank: int, world: int, folder: Path) -> dict[str, Tensor]:
    model = Model(PreTrainedConfig())
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        deepspeed=config(stage, kind),
        per_device_train_batch_size=ROWS // world,
        gradient_accumulation_steps=BATCHES,
        max_steps=SAVED if do == "save" else STEPS,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP,
        save_steps=SAVED,
        eval_strategy="steps",
        eval_steps=SAVED // 2,
        report_to="none",
        remove_unused_columns=False,
    )
    trainer = VariationalTrainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())
    recorder = Recorder(model, None)
    trainer.train(resume_from_checkpoint=do == "load")
    recorder.optimizer = trainer.model_wrapped.optimizer.optimizer
    recorder.look()
    return recorder.results()


def check_what_goes_wrong(engine: Any, optimizer: IVON, rank: int) -> None:
    """What a user or the data may do to a run, after its end."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    def go(calls: str, factor: float = 1.0) -> None:
        for call in calls.split():
            if call == "backward":
                engine.backward(engine(factor * batch(0)).loss)
            else:
                {"train": optimizer.train, "eval": optimizer.eval, "step": engine.step}[call]()

    def begin_anew() -> None:
        engine.micro_steps += 1
        engine.optimizer.zero_grad()
        optimizer.zero_grad()

    before = optimizer.posterior()

    # gradients that were not taken at a draw, all or one
    for calls, words in (
        ("backward step backward", "nothing was drawn"),
        ("train backward step eval backward", "at the mean since"),
        ("train backward eval backward step train backward", "at the mean since"),
    ):
        go(calls)
        with pytest.raises(RuntimeError, match=words):
            engine.step()
        begin_anew()

    # a gradient of one rank that is not finite
    go("train backward step train backward step", factor=math.inf if rank == 1 else 1.0)
    weights = engine.module.layers[2].weight
    assert not torch.equal(weights, before.mean["layers.2.weight"])  # DeepSpeed tells nobody that it makes no step
    optimizer.eval()
    after = optimizer.posterior()
    assert torch.equal(weights, after.mean["layers.2.weight"])
    assert all(torch.equal(x, before.mean[name]) for name, x in after.mean.items())
    assert all(torch.equal(x, before.std[name]) for name, x in after.std.items())

    # what others write into the partitions
    p = engine.module.layers[2].weight
    safe_set_full_fp32_param(p, torch.ones_like(p))
    go("train backward step train backward step")
    assert (safe_get_full_fp32_param(p) - 1).abs().max() < 0.1
    assert torch.equal(p, optimizer.posterior().mean["layers.2.weight"])


def by_refusal(stage: int, kind: str, do: str, rank: int, world: int, folder: Path) -> dict[str, Tensor]:
    """What is refused, on all ranks."""
    import deepspeed

    model: Any = Model(PreTrainedConfig())
    if kind == "robin":  # of three ranks, each finds its own part in order
        model = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in (12, 6, 6, 12))
    if kind == "types":
        model.layers[2].bfloat16()
    extra: dict[str, Any] = {"samples": {"mc_samples": 2}, "own": {"noise_per_rank": True}}.get(kind, {})
    optimizer = make_optimizer(model, kind, **extra)
    if kind == "late":
        optimizer.train()
    if kind == "second":
        deepspeed.initialize(model=model, optimizer=make_optimizer(model, kind), config=config(stage, kind))[
            0
        ].destroy()
        kept = deepspeed.initialize(model=model, optimizer=make_optimizer(model, kind), config=config(stage, kind))[0]

    expected = {
        "samples": (ValueError, "`mc_samples=1` with DeepSpeed's ZeRO"),
        "own": (ValueError, "never see a gradient of their own"),
        "robin": (RuntimeError, "Set `round_robin_gradients`"),
        "plain": (RuntimeError, "as DeepSpeed does at stage 3"),
        "late": (RuntimeError, "had drawn nothing and loaded no state before DeepSpeed"),
        "groups": (RuntimeError, "one after the other, and nothing was drawn before"),
        "types": (RuntimeError, "one after the other, and nothing was drawn before"),
        "second": (RuntimeError, "some are in none, as another engine of DeepSpeed had the model"),
    }
    error, words = expected[kind]
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config(stage, kind))[0]
    if kind == "second":
        kept.destroy()  # and with it all notes at the parameters
    if kind in ("groups", "types"):
        for _ in range(BATCHES - 1):
            engine.backward(engine(batch(0)).loss)
            engine.step()
        engine.backward(engine(batch(0)).loss)
    with pytest.raises(error, match=words):
        engine.step() if kind in ("groups", "types") else optimizer.train()
    return {}


WAYS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "engine": by_engine,
    "accelerate": by_accelerate,
    "trainer": by_trainer,
    "refusal": by_refusal,
}


def main() -> None:
    rank, world, folder, *cases = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT="1"
    )
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which takes C++ and a minute to compile
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    for case in cases:
        way, stage, kind, do = case.split("-")
        AcceleratorState._reset_state(reset_partial_state=True)
        checkpoints = folder / f"{way}-{stage}-{kind}" / ("all" if do == "all" else "part")
        found = WAYS[way](int(stage), kind, do, rank, world, checkpoints)
        save_file(found, folder / f"{case}-{rank}.safetensors")
    torch.distributed.barrier()
    os._exit(0)  # as in ranks.py


if __name__ == "__main__":
    main()
