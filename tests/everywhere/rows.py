"""The rows of the table in docs/works_everywhere.md: each a way to train, as its own documentation shows it.

All of them train the same model on the same batches in the same order, so that each can be held against one slow twin.
"""

from __future__ import annotations

import functools
import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helpers
import lightning
import torch
import transformers
from accelerate import Accelerator, skip_first_batches
from datasets import Dataset
from lightning.pytorch.accelerators import Accelerator as LightningAccelerator
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from varlora import IVON

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

BATCH = 2
SETTINGS: dict[str, Any] = {"lr": 0.1, "ess": 1e4, "hess_init": 0.1, "beta2": 0.9, "clip_radius": 10.0}
SCALE = 2.0**10
DECAY = 0.75

Weights = dict[str, Tensor]


# --- what is trained ---


@dataclass(frozen=True)
class Task:
    """What a row is asked to do."""

    steps: int = 3
    micro: int = 1
    """Micro-batches a step."""
    precision: str = "float32"
    """float32, bf16 (autocast), or fp16 (autocast and a GradScaler)."""
    clip: float | None = None
    """Norm at which the gradient is clipped."""
    schedule: bool = False
    """Whether the learning rate decays linearly to 0."""
    checkpointing: bool = False
    """Whether activations are made again in the backward pass."""
    average: bool = False
    """Whether an exponential moving average of the weights is kept."""
    save_at: int | None = None
    """The step after which the row's own kind of checkpoint is written."""
    stop: bool = False
    """Whether to stop after that step, as a crash would."""

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of autocast."""
        return {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    def autocast(self, device: str = "cpu") -> Any:
        return torch.autocast(device, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def rows(self) -> list[dict[str, list[int]]]:
        """The rows of all steps; one more than that would begin a second epoch."""
        return _rows()[: self.steps * self.micro * BATCH]

    def batches(self, step: int, device: Any = "cpu") -> list[dict[str, Tensor]]:
        """The micro-batches of a step."""
        starts = range(step * self.micro * BATCH, (step + 1) * self.micro * BATCH, BATCH)
        return [collate(self.rows()[at : at + BATCH], device) for at in starts]

    def lr_factor(self, step: int) -> float:
        return 1 - step / self.steps if self.schedule else 1.0


@functools.cache
def _rows() -> list[dict[str, list[int]]]:
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(3, helpers.VOCABULARY, (32, 6), generator=source).tolist()
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in ids]


def collate(rows: list[dict[str, list[int]]], device: Any = "cpu") -> dict[str, Tensor]:
    return {name: torch.tensor([row[name] for row in rows], device=device) for name in rows[0]}


HELD_OUT = _rows()[-BATCH:]


def make_model(unused: bool = False) -> Any:
    """Return a random Llama of one layer, the same bits at every call; with `unused` some of it gets no gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=helpers.VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2,
                pad_token_id=0,
            )
        )  # fmt: skip
        if unused:
            model.unused = nn.Linear(4, 3)
            model.model.embed_tokens.requires_grad_(False)
    return model


def make_optimizer(model: nn.Module, **settings: Any) -> IVON:
    return IVON(model.named_parameters(), **{"seed": 0, **SETTINGS, **settings})


class Watch:
    """What the weights were in each training pass, in each evaluation pass, and after each step."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.training: list[Weights] = []
        self.evaluation: list[Weights] = []
        self.means: list[Weights] = []
        self.layers: list[Weights] = []
        self.average: Weights = {}

    def weights(self) -> Weights:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def called(self, module: nn.Module) -> None:
        """Watch the passes of the module that the row calls: the model, or what it made of it."""

        def before(module: nn.Module, *_: Any) -> None:
            (self.training if module.training else self.evaluation).append(self.weights())

        module.register_forward_pre_hook(before)

    def layer(self, layer: nn.Module) -> None:
        """Watch the training passes of a layer, those that are repeated in the backward pass among them."""

        def before(module: nn.Module, *_: Any) -> None:
            if module.training:
                self.layers.append(self.weights())

        layer.register_forward_pre_hook(before)

    def stepped(self) -> None:
        """Note the weights after a step."""
        self.means.append(self.weights())


@dataclass
class Outcome:
    """What a row has come to."""

    model: Any
    optimizer: IVON
    watch: Watch

    def state(self, name: str) -> Weights:
        """A tensor of the optimizer's state for each parameter that trains."""
        named = self.model.named_parameters()
        return {key: self.optimizer.state[p][name].clone() for key, p in named if p.requires_grad}

    def everything(self) -> Weights:
        """Weights, mean, momentum and Hessian."""
        state = {f"{what} {k}": v for what in ("mean", "momentum", "hess") for k, v in self.state(what).items()}
        return {**{f"weight {name}": value for name, value in self.watch.weights().items()}, **state}


class Row(ABC):
    """A way to train."""

    name: str
    eager = True
    """Whether the model's layers are called one by one."""

    @abstractmethod
    def fit(self, model: Any, optimizer: IVON, task: Task, watch: Watch, folder: Path, resume: bool = False) -> None:
        """Train as this row does.

        Args:
            model: what to train.
            optimizer: over all of its parameters.
            task: how.
            watch: told of passes and steps.
            folder: for checkpoints.
            resume: go on from the checkpoint in the folder.
        """

    def run(
        self,
        task: Task,
        folder: Path,
        model: Any = None,
        optimizer: IVON | None = None,
        resume: bool = False,
        overflow_in: int | None = None,
        **settings: Any,
    ) -> Outcome:
        """Train a model with IVON; in one backward pass, if asked for, a gradient overflows."""
        model = make_model() if model is None else model
        optimizer = make_optimizer(model, **settings) if optimizer is None else optimizer
        folder.mkdir(exist_ok=True)
        watch, passes = Watch(model), itertools.count()
        if self.eager and task.checkpointing:
            watch.layer(model.model.layers[0].mlp)

        def overflow(p: Tensor) -> None:
            if next(passes) == overflow_in and p.grad is not None:
                p.grad.view(-1)[0] = torch.inf

        hook = model.lm_head.weight.register_post_accumulate_grad_hook(overflow)
        try:
            self.fit(model, optimizer, task, watch, folder, resume)
        finally:
            hook.remove()
        return Outcome(model, optimizer, watch)


def _schedule(optimizer: Any, task: Task) -> LambdaLR:
    return LambdaLR(optimizer, task.lr_factor)


def _average(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))


def _weights_of(average: AveragedModel) -> Weights:
    return {name: p.detach().clone() for name, p in average.module.named_parameters()}


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


# --- loops of one's own ---


class PlainLoop(Row):
    name = "plain loop"

    def prepared(self, model: Any) -> Any:
        return model

    def fit(self, model: Any, optimizer: IVON, task: Task, watch: Watch, folder: Path, resume: bool = False) -> None:
        device, file = _device(model), folder / "state.pt"
        prepared = self.prepared(model)
        watch.called(prepared)
        if task.checkpointing:
            model.gradient_checkpointing_enable()
        scaler = torch.amp.GradScaler(device.type, init_scale=SCALE, enabled=task.precision == "fp16")
        schedule, average, start = _schedule(optimizer, task), _average(model), 0
        if resume:
            saved = torch.load(file, weights_only=True)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            schedule.load_state_dict(saved["schedule"])
            start = saved["step"]
        for step in range(start, task.steps):
            prepared.train()
            for batch in task.batches(step, device):
                optimizer.train()
                with task.autocast(device.type):
                    loss = prepared(**batch).loss / task.micro
                scaler.scale(loss).backward()
            if task.clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), task.clip)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad()
            watch.stepped()
            if task.average:
                average.update_parameters(model)
            prepared.eval()
            with torch.no_grad(), task.autocast(device.type):
                prepared(**collate(HELD_OUT, device))
            if step + 1 == task.save_at:
                states = {"model": model, "optimizer": optimizer, "schedule": schedule}
                torch.save({k: v.state_dict() for k, v in states.items()} | {"step": step + 1}, file)
                if task.stop:
                    break
        if task.average:
            watch.average = _weights_of(average)


class Compiled(PlainLoop):
    name = "`torch.compile`"
    eager = False

    def __init__(self, backend: Any = "aot_eager") -> None:
        self.backend = backend

    def prepared(self, model: Any) -> Any:
        return torch.compile(model, backend=self.backend)

    def fit(self, *args: Any, **settings: Any) -> None:
        # All rows share one cache, in which each kind of pass has an entry; at its limit, torch would stop compiling.
        with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
            super().fit(*args, **settings)


def _with_float16(accelerator: Accelerator, task: Task) -> None:
    """Have accelerate do on a CPU, where it refuses float16, what it does on a GPU."""
    if task.precision == "fp16":
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler(accelerator.device.type, init_scale=SCALE)


class Accelerate(Row):
    name = "accelerate"

    def fit(self, model: Any, optimizer: IVON, task: Task, watch: Watch, folder: Path, resume: bool = False) -> None:
        watch.called(model)
        if task.checkpointing:
            model.gradient_checkpointing_enable()
        accelerator = Accelerator(
            cpu=_device(model).type == "cpu",
            gradient_accumulation_steps=task.micro,
            mixed_precision="bf16" if task.precision == "bf16" else "no",
        )
        average, loader = _average(model), DataLoader(task.rows(), BATCH, collate_fn=collate)  # type: ignore[arg-type]
        _with_float16(accelerator, task)
        prepared, wrapped, batches, schedule = accelerator.prepare(model, optimizer, loader, _schedule(optimizer, task))
        step = 0
        if resume:
            accelerator.load_state(str(folder / "state"))
            step = task.save_at or 0
            batches = skip_first_batches(batches, step * task.micro)
        for batch in batches:
            prepared.train()
            with accelerator.accumulate(prepared):
                wrapped.train()
                accelerator.backward(prepared(**batch).loss)
                if task.clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prepared.parameters(), task.clip)
                wrapped.step()
                schedule.step()
                wrapped.zero_grad()
            if not accelerator.sync_gradients:
                continue
            step += 1
            watch.stepped()
            if task.average:
                average.update_parameters(accelerator.unwrap_model(prepared))
            prepared.eval()
            with torch.no_grad():
                prepared(**collate(HELD_OUT, accelerator.device))
            if step == task.save_at:
                accelerator.save_state(str(folder / "state"))
                if task.stop:
                    break
        if task.average:
            watch.average = _weights_of(average)


# --- Trainers ---


class _Callback(TrainerCallback):
    def __init__(self, task: Task, watch: Watch, average: AveragedModel) -> None:
        self.task, self.watch, self.average = task, watch, average

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.watch.stepped()
        if self.task.average:
            self.average.update_parameters(model)
        if self.task.stop and state.global_step == self.task.save_at:
            control.should_training_stop = True


class Trainer(Row):
    name = "`Trainer`"

    def made(self, arguments: dict[str, Any], **settings: Any) -> transformers.Trainer:
        return transformers.Trainer(
            args=TrainingArguments(**arguments), train_dataset=settings.pop("rows"),
            eval_dataset=settings.pop("held_out"), **settings,
        )  # fmt: skip

    def fit(self, model: Any, optimizer: IVON, task: Task, watch: Watch, folder: Path, resume: bool = False) -> None:
        watch.called(model)
        average = _average(model)
        arguments: dict[str, Any] = {
            "output_dir": str(folder / "trainer"),
            "use_cpu": _device(model).type == "cpu",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "max_steps": task.steps,
            "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": task.micro,
            "train_sampling_strategy": "sequential",
            "max_grad_norm": task.clip or 0.0,
            "lr_scheduler_type": "linear" if task.schedule else "constant",
            "bf16": task.precision == "bf16",
            "gradient_checkpointing": task.checkpointing,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps" if task.save_at else "no",
            "save_steps": task.save_at or 1,
            "logging_strategy": "no",
        }
        trainer = self.made(
            arguments, model=model, rows=task.rows(), held_out=HELD_OUT, optimizers=(optimizer, None),
            callbacks=[_Callback(task, watch, average)],
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        _with_float16(trainer.accelerator, task)
        trainer.train(resume_from_checkpoint=resume)
        if task.average:
            watch.average = _weights_of(average)


class SFT(Trainer):
    name = "`SFTTrainer`"

    def made(self, arguments: dict[str, Any], **settings: Any) -> transformers.Trainer:
        return SFTTrainer(
            args=SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True}),
            train_dataset=Dataset.from_list(settings.pop("rows")),
            eval_dataset=Dataset.from_list(settings.pop("held_out")),
            processing_class=AutoTokenizer.from_pretrained(helpers.base_folder(), pad_token="</s>"),
            **settings,
        )


# --- Lightning ---


class _Loader(DataLoader[Any]):
    """Goes on within an epoch after a checkpoint, as Lightning asks for."""

    at = 0

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(super().__iter__()):
            if number >= self.at:
                self.at = number + 1
                yield batch
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Module(lightning.LightningModule):
    """What the two kinds of optimization share."""

    def __init__(self, model: Any, optimizer: IVON, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task
        self._optimizer = [optimizer]

    def configure_optimizers(self) -> Any:
        (optimizer,) = self._optimizer
        schedule = _schedule(optimizer, self.task)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def validation_step(self, batch: Any, index: int) -> None:
        self.model(**batch)


class Automatic(Module):
    def training_step(self, batch: Any, index: int) -> Any:
        return self.model(**batch).loss


class AutomaticWithTrain(Automatic):
    """As accumulation and a GradScaler need it."""

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        self.optimizers().train()


class Manual(Module):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        optimizer.train()
        self.manual_backward(self.model(**batch).loss / self.task.micro)
        if (index + 1) % self.task.micro == 0:
            if self.task.clip:
                self.clip_gradients(optimizer, self.task.clip, "norm")
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


class _LightningWatch(Callback):
    def __init__(self, task: Task, watch: Watch, folder: Path) -> None:
        self.task, self.watch, self.folder = task, watch, folder
        self.steps = 0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if (index + 1) % self.task.micro:
            return
        self.watch.stepped()
        if trainer.global_step == self.task.save_at:
            trainer.save_checkpoint(self.folder / "lightning.ckpt")
            trainer.should_stop = self.task.stop


class _OtherDevice(LightningAccelerator):
    """Has Lightning know the device that is made for the tests."""

    def setup_device(self, device: Any) -> None: ...

    def teardown(self) -> None: ...

    parse_devices = get_parallel_devices = staticmethod(lambda devices: devices)
    auto_device_count = staticmethod(lambda: 1)
    is_available = staticmethod(lambda: True)
    name = staticmethod(lambda: "other")


def _where(kind: str) -> dict[str, Any]:
    """Return what a Trainer is told of its device."""
    if kind in ("cpu", "cuda"):
        return {"accelerator": "cpu" if kind == "cpu" else "gpu", "devices": 1}
    return {"strategy": SingleDeviceStrategy(torch.device(kind, 0), accelerator=_OtherDevice())}


class Lightning(Row):
    name = "Lightning, automatic"
    callbacks: Sequence[Callback] = ()

    def module(self, model: Any, optimizer: IVON, task: Task) -> Module:
        needed = task.micro > 1 or task.precision == "fp16"
        return (AutomaticWithTrain if needed else Automatic)(model, optimizer, task)

    def fit(self, model: Any, optimizer: IVON, task: Task, watch: Watch, folder: Path, resume: bool = False) -> None:
        watch.called(model)
        if task.checkpointing:
            model.gradient_checkpointing_enable()
        module, kind = self.module(model, optimizer, task), _device(model).type
        automatic = module.automatic_optimization
        callbacks: list[Callback] = [_LightningWatch(task, watch, folder), *self.callbacks]
        if task.average:
            callbacks.append(EMAWeightAveraging(decay=DECAY))
        precision: dict[str, Any] = {"precision": "bf16-mixed"} if task.precision == "bf16" else {}
        if task.precision == "fp16":
            precision = {"plugins": [MixedPrecision("16-mixed", kind, torch.amp.GradScaler(kind, init_scale=SCALE))]}
        trainer = lightning.Trainer(
            max_steps=task.steps,
            **_where(kind),
            accumulate_grad_batches=task.micro if automatic else 1,
            gradient_clip_val=task.clip if automatic else None,
            val_check_interval=task.micro,
            num_sanity_val_steps=0,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **precision,
        )
        batches = _Loader(task.rows(), BATCH, collate_fn=collate)  # type: ignore[arg-type]
        held_out = DataLoader(HELD_OUT, BATCH, collate_fn=collate)  # type: ignore[arg-type]
        trainer.fit(module, batches, held_out, ckpt_path=folder / "lightning.ckpt" if resume else None)
        if task.average:
            watch.average = watch.weights()


class ManualLightning(Lightning):
    name = "Lightning, manual"

    def module(self, model: Any, optimizer: IVON, task: Task) -> Module:
        return Manual(model, optimizer, task)


ROWS = [PlainLoop(), Trainer(), SFT(), Accelerate(), Lightning(), ManualLightning(), Compiled()]
