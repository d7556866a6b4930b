"""The protocol of a method: how to reach a posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from varlora import metrics
from varlora.data import Batch, collate
from varlora.errors import VarloraError, did_you_mean
from varlora.params import trainable
from varlora.posterior import Forward, Posterior
from varlora.prompt import Encoded

__all__ = [
    "ANY",
    "AdamWTraining",
    "Comparison",
    "Given",
    "Method",
    "Plan",
    "Prepared",
    "Start",
    "Trained",
    "Wrapping",
]

ANY = ("*",)
"""As `Method.concludes_from`: finished runs of every method."""


@dataclass(frozen=True)
class Plan:
    """What a run is going to do, as far as a method may have to object before anything runs."""

    steps: int
    """Optimizer steps."""
    accumulation: int
    """Micro-batches a step."""
    dropout: float
    """Dropout rate of the adapter's inputs."""
    calibration: bool
    """Whether rows are held out for calibration."""
    finished: bool = False
    """Whether the posterior is concluded from finished runs, without training."""


@dataclass(frozen=True)
class Given:
    """A model and its rows, before training or after it, and what there is to look at them with."""

    model: nn.Module
    """The model, in evaluation mode; a run that is concluded from finished runs has it at the first's mean."""
    rows: Sequence[Encoded]
    """The training rows."""
    draw: Callable[[Posterior, Sequence[Encoded], int], tuple[Tensor, Tensor]]
    """`draw(posterior, rows, n)`: class logits of n fixed draws for each row, (S, N, C), or of the mean for n = 0, and
    the labels, (N,); on the CPU. The same run draws the same models each time."""
    forward: Forward
    """`forward(model, batch) -> (B, C)`: the class logits of one model, differentiable."""
    calibration: Sequence[Encoded] = ()
    """The rows that were held out; empty if none were."""
    pad_token_id: int = 0
    """Token to pad with."""
    batch_size: int = 4
    """Rows a batch of passes that need gradients."""
    seed: int = 0
    """Seed of whatever is drawn."""
    say: Callable[[str], None] = print
    """Told in words what a user should know."""

    def batch(self, rows: Sequence[Encoded]) -> Batch:
        """Return rows as a batch."""
        return collate(rows, self.pad_token_id)

    def some_rows(self, count: int) -> list[Encoded]:
        """Return up to `count` of the training rows, chosen by the seed: the first ones of a sorted file are alike."""
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.seed)).tolist()
        return [self.rows[i] for i in order[:count]]

    def at_mean(self, posterior: Posterior, rows: Sequence[Encoded]) -> tuple[list[Encoded], float]:
        """Return the rows whose logits at the mean are finite, and their NLL there; what is lost is said.

        A base in float16 may overflow on a single long row, and with it every loss would be infinite.
        """
        logits, labels = self.draw(posterior, rows, 0)  # (1, N, C), -inf where a row does not have the answer
        kept = metrics.finite_rows(logits)
        if not kept.all():
            self.say(f"{int((~kept).sum())} of {len(kept)} rows are left out: their logits are not finite at the mean.")
        nll = metrics.nll(metrics.average_probs(logits[:, kept]), labels[kept]) if kept.any() else math.nan
        return [row for row, good in zip(rows, kept.tolist()) if good], nll

    def nll(self, posterior: Posterior, rows: Sequence[Encoded], n: int) -> float:
        """Return the NLL of rows by the average of `n` draws, or by the mean for n = 0; infinity for lost logits."""
        try:
            logits, labels = self.draw(posterior, rows, n)
            return metrics.nll(metrics.average_probs(logits), labels)
        except metrics.MetricError:  # NaN: noise so large that a draw overflows
            return math.inf

    def generator(self) -> torch.Generator:
        """Return a generator on the model's device, seeded by the run's seed."""
        return torch.Generator(next(self.model.parameters()).device).manual_seed(self.seed)


@dataclass(frozen=True)
class Start(Given):
    """What training is about to begin with."""

    steps: int = 1
    """Optimizer steps."""
    accumulation: int = 1
    """Micro-batches a step."""
    ranks: int = 1
    """Processes that train together, each on micro-batches of its own."""

    @property
    def rows_per_step(self) -> int:
        """Rows that a step's gradient averages over."""
        return self.batch_size * self.accumulation * self.ranks

    @property
    def epochs(self) -> float:
        """How often training sees each row; once at the least."""
        return max(self.steps * self.rows_per_step / len(self.rows), 1.0)


@dataclass(frozen=True)
class Trained(Given):
    """What training ended with: all that a posterior may be concluded from."""

    optimizer: torch.optim.Optimizer | None = None
    """What `optimizer` returned, after its last step; None where nothing was trained now."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """What `after_step` and `compared` collected."""
    sources: Sequence[Posterior] = ()
    """Posteriors of the finished runs, or of the members, to conclude from."""


@dataclass(frozen=True)
class Prepared:
    """What a method found before training."""

    settings: Mapping[str, Any]
    """Those of the method's settings that were left to it, as it found them."""
    found: Mapping[str, Any]
    """What it saw, for people: plain values."""
    steps: float
    """What looking cost, in training steps."""


@dataclass(frozen=True)
class Comparison:
    """The same rows at the mean and under noise, within a training step."""

    step: int
    """The step, from 1."""
    total_steps: int
    """All steps."""
    at_mean: float
    """Loss at the mean, in nats."""
    under_noise: float
    """Loss at the step's draw."""
    chance: float
    """Loss of knowing how often each answer is right, and nothing of the question."""


class Method(Protocol):
    """How to reach a posterior: which optimizer, what to watch, what to conclude.

    A method is a frozen dataclass of its settings that names this class as its base, one file, and one entry in
    `METHODS`. What few methods need has a default here that does nothing.
    """

    name: ClassVar[str]
    """Key in `METHODS`, and what reports call it."""
    title: ClassVar[str] = ""
    """What the paper's tables call it, such as `LA (KFAC)`; empty: `name`."""
    concludes_from: ClassVar[tuple[str, ...]] = ()
    """Methods whose finished runs the posterior can be concluded from without training; `ANY` for all."""
    continues_from: ClassVar[tuple[str, ...]] = ()
    """Methods whose finished run this one can train on from, instead of training all the way."""
    several_sources: ClassVar[bool] = False
    """Whether it takes several finished runs, two at the least, or one."""

    def problems(self, plan: Plan) -> list[str]:
        """Return why the method cannot work in a run like this, and the cure; a sentence each."""
        return []

    def check_model(self, model: nn.Module) -> None:
        """Raise a `VarloraError` before training if the posterior of a model's adapter could not be concluded."""

    def has_variances(self) -> bool:
        """Whether the posterior has a variance for each weight, by which weights can be pruned."""
        return True

    def members(self) -> Sequence[Method]:
        """Methods to train one after the other, each on a fresh adapter, in place of this one; empty for most."""
        return ()

    def prepare(self, start: Start) -> Prepared | None:
        """Look at model and rows before training, and find the settings that are left to the method; None: no need."""
        return None

    def optimizer(
        self, params: Mapping[str, nn.Parameter], num_examples: int, batch_size: int, seed: int
    ) -> torch.optim.Optimizer:
        """Make the optimizer.

        Args:
            params: the trainable parameters by name.
            num_examples: rows of the training set.
            batch_size: rows that one step's gradient averages over.
            seed: seed of whatever the optimizer draws.
        """
        ...

    def schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler | None:
        """Make the learning rate's schedule; None: the Trainer's, linear decay by default."""
        return None

    def schedule_remedy(self) -> str:
        """Return what to do where fields of the Trainer's schedule are given, and the method has its own."""
        return "Leave it out."

    def training(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
        """Within the context the model's training passes are the method's own; after it as before."""
        return nullcontext()

    def before_step(self, optimizer: torch.optim.Optimizer, step: int, total_steps: int, state: dict[str, Any]) -> None:
        """Set what step `step` (from 1) of `total_steps` depends on; `state` is that of `after_step`."""

    def look_again_at(self, total_steps: int) -> int:
        """Return the step before which the method looks at model and rows once more; 0: no need."""
        return 0

    def look_again(self, start: Start, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
        """Look at model and rows as they are by then, at the mean; return what is to be added to `state`."""
        return {}

    def compare_every(self, total_steps: int) -> int:
        """Return how many steps there are between comparisons of the loss at the mean and under noise; 0: no need."""
        return 0

    def compared(self, comparison: Comparison, state: dict[str, Any]) -> str | None:
        """Note a comparison in `state`, that of `after_step`; return what a user should be told now, if anything."""
        return None

    def after_step(
        self, params: Mapping[str, nn.Parameter], step: int, total_steps: int, state: dict[str, Any]
    ) -> None:
        """Look at the parameters after step `step` (from 1) of `total_steps`.

        Args:
            params: the trainable parameters by name.
            step: the step that was just made.
            total_steps: all steps.
            state: what was collected so far, empty at first; nested dicts and lists of tensors and plain values, which
                checkpoints carry.
        """

    def posterior(self, trained: Trained) -> Posterior:
        """Conclude: the posterior after training, a copy that later training leaves alone."""
        ...

    def log(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, float]:
        """What to log beside the loss, by name; empty for most. `state` is that of `after_step`."""
        return {}


@dataclass(frozen=True)
class AdamWTraining(Method):
    """The settings and optimizer of the methods that train as AdamW does and differ in what they conclude.

    Defaults are the paper's: learning rate 5e-5 with linear decay to zero, no weight decay.
    """

    lr: float = 5e-5
    """Learning rate at the first step."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    beta1: float = 0.9
    """Decay of the gradient's average."""
    beta2: float = 0.999
    """Decay of the squared gradient's average."""
    eps: float = 1e-8
    """Added to the root of the squared gradient's average."""

    def check_model(self, model: nn.Module) -> None:
        """AdamW's state has the weights' type: an `eps` that is 0 in it makes a weight without gradient 0/0."""
        for name, p in trainable(model).items():
            if self.eps and not torch.tensor(self.eps, dtype=p.dtype):
                raise VarloraError(
                    f"Expected `eps` that {str(p.dtype).removeprefix('torch.')} can hold, which `{name}` is of, but "
                    f"got {self.eps}: weights would become NaN. Set `lora.dtype` to float32 or bfloat16, or `eps` to "
                    "1e-4."
                )

    def optimizer(
        self, params: Mapping[str, nn.Parameter], num_examples: int, batch_size: int, seed: int
    ) -> torch.optim.Optimizer:
        """Return torch's AdamW."""
        return torch.optim.AdamW(
            list(params.items()),
            lr=self.lr,
            weight_decay=self.weight_decay,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
        )


@dataclass(frozen=True)
class Wrapping(Method):
    """The settings of the methods that work on any other one: trained along with it, or on its finished runs."""

    concludes_from: ClassVar[tuple[str, ...]] = ANY

    of: str = "adamw"
    """The other method: a key of METHODS."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Its settings."""

    def inner(self) -> Method:
        """Make the other method."""
        from varlora.methods import METHODS

        return METHODS[self.of](**self.settings)

    def problems(self, plan: Plan) -> list[str]:
        """Those of the other method, if it is trained now."""
        from varlora.methods import METHODS

        if self.of not in METHODS:
            return [f"Expected `of` to be a method, but got `{self.of}`. {did_you_mean(self.of, METHODS)}"]
        if plan.finished:
            return []
        if isinstance(self.inner(), Wrapping):
            return [
                f"Expected `of` to be a method that trains one adapter, but got `{self.of}`. "
                f"Train that first, and use `{self.name}` on its finished runs."
            ]
        return self.inner().problems(plan)

    def check_model(self, model: nn.Module) -> None:
        """Raise if the other method could not conclude."""
        self.inner().check_model(model)

    def has_variances(self) -> bool:
        """Whether the other method's posterior has."""
        return self.inner().has_variances()

    def prepare(self, start: Start) -> Prepared | None:
        """Find what is left to the other method."""
        prepared = self.inner().prepare(start)
        return prepared and replace(prepared, settings={"settings": {**self.settings, **prepared.settings}})

    def optimizer(
        self, params: Mapping[str, nn.Parameter], num_examples: int, batch_size: int, seed: int
    ) -> torch.optim.Optimizer:
        """Return the other method's optimizer."""
        return self.inner().optimizer(params, num_examples, batch_size, seed)

    def schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler | None:
        """Return the other method's schedule."""
        return self.inner().schedule(optimizer, total_steps)

    def schedule_remedy(self) -> str:
        """Return the other method's."""
        return self.inner().schedule_remedy()

    def training(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
        """Train as the other method does."""
        return self.inner().training(model, optimizer)

    def before_step(self, optimizer: torch.optim.Optimizer, step: int, total_steps: int, state: dict[str, Any]) -> None:
        """Set what the other method's step depends on."""
        self.inner().before_step(optimizer, step, total_steps, state)

    def look_again_at(self, total_steps: int) -> int:
        """Return when the other method looks once more."""
        return self.inner().look_again_at(total_steps)

    def look_again(self, start: Start, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
        """Let the other method look once more."""
        return self.inner().look_again(start, optimizer, state)

    def compare_every(self, total_steps: int) -> int:
        """Return how often the other method compares."""
        return self.inner().compare_every(total_steps)

    def compared(self, comparison: Comparison, state: dict[str, Any]) -> str | None:
        """Let the other method note a comparison."""
        return self.inner().compared(comparison, state)

    def after_step(
        self, params: Mapping[str, nn.Parameter], step: int, total_steps: int, state: dict[str, Any]
    ) -> None:
        """Watch what the other method watches."""
        self.inner().after_step(params, step, total_steps, state)

    def log(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, float]:
        """Log what the other method logs."""
        return self.inner().log(optimizer, state)
