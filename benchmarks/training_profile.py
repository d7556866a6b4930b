"""Where the time of a training run goes: forward, backward, optimizer, and what is left for everything else.

Runs `varlora.fit.fit` as the command line does, on `transformers.Trainer`, with a clock around the loss (the forward
pass), the backward pass, IVON's `train`, `eval` and `step`, the data path (what the loader and the collator take), and
the clipping of gradients. Freeing the graph that the forward pass has made is autograd's work, which every loop has
where it lets go of the loss; it has a line of its own, and counts as outside. What is left between one step's end and
the next one's is the Trainer's own loop.

Then whole runs with IVON and with AdamW in turn: a step of the one over a step of the other. At some IVON compares its
draw with the mean, a forward pass more, which the mean over the steps shows and the median does not.

    python benchmarks/training_profile.py
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from _common import count, print_table, ratio, spread, write_result
from train_step import base_parser, load_base, training_rows
from transformers import TrainerCallback

from varlora import fit
from varlora.methods import METHODS
from varlora.optim.ivon import IVON
from varlora.params import copied, swapped
from varlora.trainer import MethodTrainer

FREEING = "freeing the graph"
PARTS = ("forward", "backward", "optimizer", FREEING, "data", "clipping", "the rest")
BOUND = 3.0
"""Per cent of the time that all but the first three may take."""
NOTES = [
    "What is left outside forward, backward and optimizer is a fixed number of calls a step, whatever the batch: the "
    "clipping of 24 gradients, the loader and the collator, and the Trainer's own loop, mostly out of the cache.",
    "IVON over AdamW: a draw and a step, and now and then a forward pass at the mean, a third of a step.",
]
"""What stands between the measurement and its limit."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = _parser().parse_args(argv)
    _, device, model, tokenizer = load_base(args)
    begun = time.perf_counter()
    rows = training_rows(tokenizer, args)
    tokenising = time.perf_counter() - begun
    found: dict[str, Any] = {
        "notes": NOTES,
        "bound_per_cent": BOUND,
        "tokenising": {"rows": len(rows), "seconds": tokenising},
    }
    found["batch_size"] = {size: _profile(model, tokenizer, rows, size, args) for size in args.batch_size}
    found["ivon_to_adamw"] = {size: _in_turn(model, tokenizer, rows, size, args) for size in args.batch_size}
    print(f"Tokenising {len(rows)} rows, once, before the first step: {1000 * tokenising:.0f} ms.")
    write_result(args.out, "training_profile", args, device, **found)
    return found


def _profile(model: Any, tokenizer: Any, rows: list[Any], size: int, args: argparse.Namespace) -> dict[str, Any]:
    with _watched(clock := Clock(args.warmup), torch.device(args.device)):
        _train(model, tokenizer, rows, size, args, "ivon", args.steps, clock)
    steps = clock.steps()
    whole = sum(sum(step.values()) for step in steps)
    seconds = {part: spread([step[part] for step in steps]) for part in PARTS}
    share = {part: 100 * sum(step[part] for step in steps) / whole for part in PARTS}
    outside = sum(share[part] for part in PARTS[3:])
    table = []
    for part in PARTS:
        times = [f"{1000 * seconds[part][key]:.3f}" for key in ("median", "q1", "q3", "min")]
        table.append([part, *times, f"{share[part]:.2f}"])
    print_table(f"A training step of {size} rows", ["ms", "median", "q1", "q3", "min", "per cent of all"], table)
    print(
        f"Outside forward, backward and optimizer: {outside:.2f} per cent (bound {BOUND:.0f}), "
        f"without freeing the graph {outside - share[FREEING]:.2f}."
    )
    return {"seconds_per_step": seconds, "per_cent": share, "outside_per_cent": outside}


def _in_turn(model: Any, tokenizer: Any, rows: list[Any], size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return IVON's seconds a step over AdamW's, of the medians and of the means of runs in turn."""
    seconds: dict[str, list[list[float]]] = {"ivon": [], "adamw": []}
    order = random.Random(args.seed)
    for _ in range(args.rounds):
        for method, found in order.sample(list(seconds.items()), 2):
            clock = Clock(args.warmup)
            _train(model, tokenizer, rows, size, args, method, max(2, args.steps // args.rounds), clock)
            found.append([sum(step.values()) for step in clock.steps()])
    ways = {"median_step": statistics.median, "mean_step": statistics.fmean}
    ratios = {
        name: ratio(*([way(steps) for steps in seconds[method]] for method in ("ivon", "adamw")))
        for name, way in ways.items()
    }
    table = [[name, *(f"{value:.3f}" for value in found.values())] for name, found in ratios.items()]
    print_table(f"IVON over AdamW on the Trainer, {size} rows", ["", *ratios["median_step"]], table)
    return ratios


def _train(
    model: Any,
    tokenizer: Any,
    rows: list[Any],
    size: int,
    args: argparse.Namespace,
    method: str,
    steps: int,
    clock: Clock,
) -> None:
    """Train, and leave the adapter as it was: one that has learned the rows is no start to look for a scale at."""
    with tempfile.TemporaryDirectory() as folder, swapped(model, copied(model)):
        fit.fit(
            model,
            METHODS[method](),
            rows,
            Path(folder),
            pad_token_id=tokenizer.pad_token_id,
            steps=args.warmup + steps,
            batch_size=size,
            checkpoint_every=args.warmup + steps,
            seed=args.seed,
            callbacks=[clock],
            warn=lambda words: None,
        )


def _parser() -> argparse.ArgumentParser:
    made = base_parser(__doc__, "training_profile")
    made.set_defaults(rows=2000)  # two epochs of the steps below at 4 rows; with few rows an epoch begins too often
    made.add_argument("--steps", type=count, default=1000, help="timed steps (default: %(default)s)")
    made.add_argument("--warmup", type=count, default=20, help="steps before these (default: %(default)s)")
    made.add_argument("--rounds", type=count, default=8, help="runs of each method in turn (default: %(default)s)")
    made.add_argument("--batch-size", type=count, nargs="+", default=[4, 16], help="rows a batch (default: 4 16)")
    return made


class Clock(TrainerCallback):
    """Adds up the time of each part by step, and when each step ended."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.now: defaultdict[str, float] = defaultdict(float)
        self.ends: list[float] = []
        self.last = 0.0
        """When the last timed call ended."""
        self.parts: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note when a step ended, and what its parts took."""
        self.ends.append(time.perf_counter())
        self.parts.append(dict(self.now))
        self.now.clear()

    def steps(self) -> list[dict[str, float]]:
        """Return the seconds of each part of each step after the warm-up, from one step's end to the next one's."""
        found = []
        for before, after, parts in list(zip(self.ends, self.ends[1:], self.parts[1:]))[self.warmup - 1 :]:
            timed = {part: parts.get(part, 0.0) for part in PARTS[:-1]}
            found.append({**timed, "the rest": after - before - sum(timed.values())})
        return found


@contextmanager
def _watched(clock: Clock, device: torch.device) -> Iterator[None]:
    """Put a clock around the functions that a training step consists of."""
    places = [
        (MethodTrainer, "compute_loss", "forward"),
        (accelerate.Accelerator, "backward", "backward"),
        (MethodTrainer, "get_batch_samples", "data"),
        (transformers.Trainer, "_prepare_inputs", "data"),
        (MethodTrainer, "_clip_grad_norm", "clipping"),
        *((IVON, name, "optimizer") for name in ("train", "eval", "step")),
    ]
    IVON([torch.nn.Parameter(torch.zeros(1))], lr=1.0, ess=1.0, hess_init=1.0)  # torch's own wrapper of `step` is timed
    before = [getattr(owner, name) for owner, name, _ in places]
    within = [0]

    def timed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if within[0]:  # `step` calls `eval`
                return function(*args, **kwargs)
            within[0] = 1
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                clock.last = time.perf_counter()
                clock.now[part] += clock.last - begun
                within[0] = 0

        return run

    def training_step(*args: Any, **kwargs: Any) -> Any:
        """Make the Trainer's step, which lets go of the loss when it returns, after the backward pass."""
        loss = step(*args, **kwargs)
        clock.now[FREEING] += time.perf_counter() - clock.last
        return loss

    for (owner, name, part), function in zip(places, before):
        setattr(owner, name, timed(function, part))
    step = transformers.Trainer.training_step
    transformers.Trainer.training_step = training_step
    try:
        yield
    finally:
        for (owner, name, _), function in zip(places, before):
            setattr(owner, name, function)
        transformers.Trainer.training_step = step


if __name__ == "__main__":
    main()
