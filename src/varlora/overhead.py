r"""Overhead: what a method's training step costs beside AdamW's, in time and in memory.

The paper's measurement (the last paragraph of its section 3): forward pass, loss and backward pass of a training step,
the sampling, and the optimizer's step are timed apart. With medians t over the rounds, and T the whole step's,

    share = median(t_sampling + t_step) / T,   overhead = (T_ivon − T_adamw) / T_adamw

All methods train the same model on the same batches, in turn, in a new random order each round, so that whatever else
the machine does disturbs all of them alike. Each method has trainable parameters of its own, which take their place in
the model for its turn; the model's own are not touched.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import nn

from varlora.data import Batch, collate
from varlora.errors import VarloraError
from varlora.methods import METHODS, Method
from varlora.model import class_logits
from varlora.params import trainable
from varlora.prompt import Encoded
from varlora.trainer import class_loss

__all__ = ["PAPER_SECONDS", "PARTS", "Clock", "Cost", "Overhead", "measure_overhead", "to_table"]

PARTS = ("sampling", "forward_backward", "step")
"""The parts of a training step, in their order."""
PAPER_SECONDS = {"sampling": 0.0018, "forward_backward": 0.3163, "step": 0.0010}
"""The paper's, of IVON on an NVIDIA RTX 6000 Ada with Llama-2-7B: the end of its section 3."""


@dataclass(frozen=True)
class Cost:
    """What the training steps of one method cost."""

    seconds: Mapping[str, tuple[float, ...]]
    """Each round's seconds by part, and of `total`, their sum."""
    state_bytes: int
    """Bytes of the optimizer's state; what it works in beside that is in the peak alone."""
    peak_bytes: int | None
    """The most device memory in use at once, base and activations included, in a step on the batch with the most tokens
    when no other method's state is there; None on a CPU, where torch does not count it."""

    def median(self, part: str) -> float:
        """Return the median over the rounds, in seconds."""
        return statistics.median(self.seconds[part])

    def quartiles(self, part: str) -> tuple[float, float]:
        """Return the first and the third quartile over the rounds, in seconds."""
        values = self.seconds[part]
        if len(values) == 1:
            return values[0], values[0]
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return low, high

    @property
    def share(self) -> float:
        """Sampling and optimizer's step as a share of the whole step; the paper's is below 0.01."""
        extra = [sampling + step for sampling, step in zip(self.seconds["sampling"], self.seconds["step"])]
        return statistics.median(extra) / self.median("total")


@dataclass(frozen=True)
class Overhead:
    """Costs of several methods that were measured together."""

    costs: Mapping[str, Cost]
    """Method -> its cost; the first one is what the others are compared with."""
    device: str
    """Name of the GPU, or CPU with its number of threads."""
    batch_size: int
    """Rows a step."""
    tokens_per_batch: float
    """Tokens a step, padding included, averaged over the batches."""
    parameters: int
    """Numbers that are trained."""

    @property
    def base(self) -> str:
        """The method that the others are compared with."""
        return next(iter(self.costs))

    @property
    def rounds(self) -> int:
        """Timed rounds."""
        return len(self.costs[self.base].seconds["total"])

    def relative(self, name: str) -> float:
        """Return (T − T_base) / T_base, of the medians of whole steps; 0.01 is one per cent longer."""
        base = self.costs[self.base].median("total")
        return (self.costs[name].median("total") - base) / base

    def to_dict(self) -> dict[str, Any]:
        """Return all as plain values for JSON; of the rounds, medians and quartiles."""
        methods = {
            name: {
                "seconds": {
                    part: dict(zip(("median", "q1", "q3"), (cost.median(part), *cost.quartiles(part))))
                    for part in cost.seconds
                },
                "share": cost.share,
                "relative": self.relative(name),
                "state_bytes": cost.state_bytes,
                "peak_bytes": cost.peak_bytes,
            }
            for name, cost in self.costs.items()
        }
        return {
            "device": self.device,
            "rounds": self.rounds,
            "batch_size": self.batch_size,
            "tokens_per_batch": self.tokens_per_batch,
            "parameters": self.parameters,
            "base": self.base,
            "methods": methods,
        }


def measure_overhead(
    model: nn.Module,
    rows: Sequence[Encoded],
    *,
    pad_token_id: int,
    methods: Mapping[str, Method] | None = None,
    batch_size: int = 4,
    rounds: int = 30,
    warmup: int = 3,
    seed: int = 0,
    max_seconds: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> Overhead:
    """Time training steps of several methods on the same model and batches, in turn.

    `sampling` is what the optimizer does before a forward pass, as `transformers.Trainer` has it do: IVON draws its
    noise and puts a draw into the parameters. For an optimizer that does nothing there it is exactly 0. IVON's `step`
    puts the mean back. Times are wall clock on a CPU, and those of events in the stream on a GPU.

    Args:
        model: the model with its adapter; afterwards it is bit for bit and mode for mode what it was.
        rows: labelled rows, cut into batches in their order; those that do not fill a batch are left out.
        pad_token_id: token to pad with.
        methods: name -> method, the first of which the others are compared with; None: AdamW and IVON with their
            defaults.
        batch_size: rows a step.
        rounds: timed rounds; in each, every method makes a step on the same batch.
        warmup: rounds before these that are not timed.
        seed: of the order of the methods, of what their optimizers draw, and of dropout.
        max_seconds: no round starts after this many seconds; one is timed all the same. None: no limit.
        progress: called with the number of rounds done, 1, after each timed round.

    Returns:
        Each round's times, and the bytes that each method needs.

    Raises:
        VarloraError: an argument is out of its range, a batch is not full, a row has no label, nothing in the model is
            trainable, or the model is on a device other than a CPU or a CUDA device.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
        >>> rows = [Encoded("1", (3, 4, 5), (6, 7), 0, False), Encoded("2", (4, 3), (6, 7), 1, False)]
        >>> overhead = measure_overhead(model, rows, pad_token_id=0, batch_size=2, rounds=3)
        >>> overhead.costs["adamw"].median("sampling"), 0 < overhead.costs["ivon"].share < 1
        (0.0, True)
        >>> ivon, adamw = (overhead.costs[name].state_bytes for name in ("ivon", "adamw"))
        >>> ivon - adamw == 4 * overhead.parameters  # mean, momentum and Hessian in float32, not two moments
        True

    References:
        Cong et al. 2024, Variational Low-Rank Adaptation Using IVON (arXiv:2411.04421), section 3.
    """
    if methods is None:
        methods = {name: METHODS[name]() for name in ("adamw", "ivon")}
    params = trainable(model)
    _check(params, rows, methods, batch_size, rounds, warmup)
    device = next(iter(params.values())).device
    starts = range(0, len(rows) - batch_size + 1, batch_size)
    batches = [collate(rows[at : at + batch_size], pad_token_id) for at in starts]
    batches = [{key: tensor.to(device) for key, tensor in batch.items()} for batch in batches]
    tokens = [batch["input_ids"].numel() for batch in batches]

    def begin(name: str) -> _Trainee:
        return _Trainee(model, methods[name], len(rows), batch_size, seed)

    started, order, clock, shuffle = time.perf_counter(), list(methods), Clock(device), random.Random(seed).shuffle
    seconds: dict[str, list[list[float]]] = {name: [] for name in methods}
    with _as_it_was(model, device, seed):
        longest = batches[tokens.index(max(tokens))]
        peaks = {name: _peak(begin(name), longest, clock) if clock.cuda else None for name in methods}
        trainees = {name: begin(name) for name in methods}
        for done in range(-warmup, rounds):
            if done > 0 and max_seconds is not None and time.perf_counter() - started > max_seconds:
                break
            shuffle(order)
            for name in order:
                took = trainees[name].step(batches[(done + warmup) % len(batches)], clock)
                if done >= 0:
                    seconds[name].append([*took, sum(took)])
            if progress and done >= 0:
                progress(1)
    return Overhead(
        costs={
            name: Cost(dict(zip((*PARTS, "total"), zip(*took))), _state_bytes(trainees[name].optimizer), peaks[name])
            for name, took in seconds.items()
        },
        device=torch.cuda.get_device_name(device) if clock.cuda else f"CPU, {torch.get_num_threads()} threads",
        batch_size=batch_size,
        tokens_per_batch=statistics.mean(tokens),
        parameters=sum(p.numel() for p in params.values()),
    )


def to_table(overhead: Overhead, beside_paper: bool = False) -> Table:
    """Return a table with a column for each method: median times with their quartiles, shares and bytes.

    Args:
        overhead: what was measured.
        beside_paper: whether there is a column for the paper's times of IVON with Llama-2-7B.

    Example:
        >>> seconds = {"sampling": (0.001,), "forward_backward": (0.097,), "step": (0.002,), "total": (0.1,)}
        >>> overhead = Overhead({"ivon": Cost(seconds, 16_000_000, None)}, "CPU, 1 threads", 4, 1280.0, 1_000_000)
        >>> table = to_table(overhead)
        >>> table.title
        'CPU, 1 threads: 4 rows a step, 1,280 tokens, 1 rounds'
        >>> list(table.columns[1].cells)[2:]
        ['2.000 (2.000 to 2.000)', '100.000 (100.000 to 100.000)', '3.00', '0.00', '16.00', 'not measured']
    """
    costs = overhead.costs
    parts = {
        "sampling, ms": "sampling",
        "forward and backward, ms": "forward_backward",
        "optimizer's step, ms": "step",
        "whole step, ms": "total",
    }
    lines = {what: [_milliseconds(cost, part) for cost in costs.values()] for what, part in parts.items()}
    lines |= {
        "sampling and optimizer's step, of the step, %": [f"{100 * cost.share:.2f}" for cost in costs.values()],
        f"whole step beyond {overhead.base}'s, %": [f"{100 * overhead.relative(name):.2f}" for name in costs],
        "optimizer's state, MB": [f"{cost.state_bytes / 1e6:.2f}" for cost in costs.values()],
        "peak memory, GB": [
            "not measured" if cost.peak_bytes is None else f"{cost.peak_bytes / 1e9:.2f}" for cost in costs.values()
        ],
    }
    columns = list(costs)
    if beside_paper:
        columns.append("ivon, paper, Llama-2-7B")
        whole = sum(PAPER_SECONDS.values())
        share = 100 * (whole - PAPER_SECONDS["forward_backward"]) / whole
        known = [f"{1000 * PAPER_SECONDS[part]:.1f}" for part in PARTS] + [f"{1000 * whole:.1f}", f"{share:.2f}"]
        for i, cells in enumerate(lines.values()):
            cells.append(known[i] if i < len(known) else "not given")
    batch = f"{overhead.batch_size} rows a step, {overhead.tokens_per_batch:,.0f} tokens"
    table = Table("median (quartiles)", *columns, title=f"{overhead.device}: {batch}, {overhead.rounds} rounds")
    for column in table.columns[1:]:
        column.justify = "right"
    for what, cells in lines.items():
        table.add_row(what, *cells)
    return table


class Clock:
    """Marks on a time line: wall time on a CPU, events in the stream on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Remember now."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds between neighbouring marks, and forget the marks."""
        if self.cuda:
            torch.cuda.synchronize()
            spans = [a.elapsed_time(b) / 1000 for a, b in zip(self.marks, self.marks[1:])]
        else:
            spans = [b - a for a, b in zip(self.marks, self.marks[1:])]
        self.marks.clear()
        return spans


class _Trainee:
    """A method with its optimizer, and parameters that start as the model's."""

    def __init__(self, model: nn.Module, method: Method, num_examples: int, batch_size: int, seed: int) -> None:
        self.model, self.method = model, method
        self.params = {name: nn.Parameter(p.detach().clone()) for name, p in trainable(model).items()}
        self.optimizer = method.optimizer(self.params, num_examples, batch_size, seed)

    def step(self, batch: Batch, clock: Clock) -> list[float]:
        """Make a training step and return the seconds of its parts."""
        sample = getattr(self.optimizer, "train", None)  # the Trainer's rule
        with _replaced(self.model, self.params), self.method.training(self.model, self.optimizer):
            clock.mark()
            if sample:
                sample()
                clock.mark()
            (class_loss(class_logits(self.model, batch), batch["labels"]) / len(batch["labels"])).backward()
            clock.mark()
            self.optimizer.step()
            clock.mark()
            took = clock.seconds()
            self.optimizer.zero_grad()
        return took if sample else [0.0, *took]


@contextmanager
def _replaced(model: nn.Module, params: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Within the context the model has `params` in place of its own of the same names.

    Values copied into the same parameters (`varlora.params.swapped`) would not do: IVON sees that they were written to
    by somebody else, and would compare them with its mean within the timed part.
    """
    new = {own: params[name] for name, own in trainable(model).items()}
    places = [(m, leaf, own) for m in model.modules() for leaf, own in m._parameters.items() if own in new]
    try:
        for module, leaf, own in places:
            module._parameters[leaf] = new[own]
        yield
    finally:
        for module, leaf, own in places:
            module._parameters[leaf] = own


@contextmanager
def _as_it_was(model: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """Within the context the model trains and dropout is seeded; after it, modes and generators are as before."""
    modes = [(module, module.training) for module in model.modules()]
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []), torch.cuda.device(device) if cuda else nullcontext():
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed(seed)
        model.train()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _peak(trainee: _Trainee, batch: Batch, clock: Clock) -> int:
    """Return the most bytes in use on the device in a step; the step before it makes the optimizer's state."""
    trainee.step(batch, clock)
    torch.cuda.reset_peak_memory_stats()
    trainee.step(batch, clock)
    return torch.cuda.max_memory_allocated()


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of the optimizer's state; memory that several tensors are views of counts once."""
    storages = [
        value.untyped_storage()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _check(
    params: Mapping[str, nn.Parameter],
    rows: Sequence[Encoded],
    methods: Mapping[str, Method],
    batch_size: int,
    rounds: int,
    warmup: int,
) -> None:
    """Raise for the first argument that is out of its range."""
    counts = (("batch_size", batch_size, 1, 4), ("rounds", rounds, 1, 30), ("warmup", warmup, 0, 3))
    for name, value, least, usual in counts:
        if value < least:
            raise VarloraError(
                f"Expected `{name}` to be a whole number >= {least}, but got {value}. Pass e.g. `{name}={usual}`."
            )
    if not methods:
        raise VarloraError("Expected `methods` to hold methods to compare, but got none. Pass None for AdamW and IVON.")
    if len(rows) < batch_size:
        raise VarloraError(
            f"Expected `rows` to fill a batch of {batch_size}, but got {len(rows)}. Pass more rows, or a smaller "
            "`batch_size`."
        )
    if unlabelled := sum(row.label is None for row in rows):
        raise VarloraError(f"Expected a label in each row, but {unlabelled} of {len(rows)} have none. Leave them out.")
    if not params:
        raise VarloraError(
            "Expected a model with trainable parameters, but nothing in it requires a gradient. "
            "Load it with an adapter: `load_model(name, lora=LoRA())`."
        )
    if (device := next(iter(params.values())).device.type) not in ("cpu", "cuda"):
        raise VarloraError(
            f"Expected a model on a CPU or a CUDA device, but it is on {device}, which has no clock here."
        )


def _milliseconds(cost: Cost, part: str) -> str:
    low, high = cost.quartiles(part)
    return f"{1000 * cost.median(part):.3f} ({1000 * low:.3f} to {1000 * high:.3f})"
