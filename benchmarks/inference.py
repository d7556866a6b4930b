"""Ten draws for the price of fewer: stacked draws against the loop and peft's mixed-adapter batches.

Class logits of S draws of B rows, by a loop of S passes, stacked in one pass, stacked with rows that begin alike,
stacked with the last quarter of the layers drawn, and by peft's mixed-adapter batches (S adapters loaded, each for its
own rows of S·B); random adapters, rows of 40 tokens; where rows begin alike, they do so in 16 tokens, as in the demo's
tasks, batch after batch. Beside each time stands its arithmetic at the rate of one large matrix product on this
machine: the loop does that of one pass S times, and the stack cannot do less of it than its draws differ in. What the
cheaper ways cost in NLL is in draws.py.

    python benchmarks/inference.py
    python benchmarks/inference.py --device cuda --llama2-7b --out benchmarks/results/inference_gpu.json
    python benchmarks/inference.py --llama2-7b --tiny --bases --out tiny.json
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent / "gpu"))

import torch
from _common import (
    ROOT,
    Titled,
    count,
    in_document,
    interleave,
    parser,
    peak,
    print_table,
    ratio,
    set_up,
    shared_folder,
    spread,
    write_result,
)
from llama2_7b_shape import _save_random, shape
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils.logging import disable_progress_bar

from varlora.blocks import patched, repeated
from varlora.drawing import Drawing
from varlora.files import read_json, write_text
from varlora.model import LoRA, class_logits, load_model
from varlora.params import copied
from varlora.posterior import DiagonalGaussian
from varlora.stack import rows_of

LENGTH, ALIKE, ANSWERS = 40, 16, 4
DOCUMENT = ROOT / "docs" / "inference.md"


# --- speed ---


def batch_of(rows: int, vocabulary: int, seed: int, alike: int = 0, length: int = LENGTH) -> dict[str, Tensor]:
    """Return random rows, the first tokens the same in all of them."""
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (rows, length), generator=source)
    ids[:, :alike] = ids[0, :alike].clone()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones(rows, length, dtype=torch.long),
        "label_tokens": torch.arange(ANSWERS).expand(rows, -1),
        "answer_mask": torch.ones(rows, ANSWERS, dtype=torch.bool),
    }


def in_turn(vocabulary: int, rows: int, seed: int, alike: int, length: int = LENGTH) -> list[dict[str, Tensor]]:
    """Return two batches, whose rows all begin with the same tokens."""
    both = batch_of(2 * rows, vocabulary, seed, alike, length)
    return [rows_of(both, part) for part in torch.arange(2 * rows).split(rows)]


class InTurn:
    """A way to draw, asked for one batch and then for the other."""

    def __init__(self, way: Callable[[dict[str, Tensor]], Tensor], batches: Sequence[dict[str, Tensor]]) -> None:
        self.way, self.batches = way, itertools.cycle(batches)

    def __call__(self) -> Tensor:
        """Return the logits of the next batch."""
        return self.way(next(self.batches))


class Mixed:
    """peft's way: S adapters in one model, and the name of one for each row."""

    def __init__(self, base: str, draws: Sequence[dict[str, Tensor]], settings: dict[str, Any]) -> None:
        self.model, _ = load_model(base, **settings)
        self.names = [f"draw{index}" for index in range(len(draws))]
        for name, draw in zip(self.names, draws):
            self.model.add_adapter(name, self.model.peft_config["default"])
            parameters = dict(self.model.named_parameters())
            for key, value in draw.items():
                parameters[key.replace(".default.", f".{name}.")].data.copy_(value)
        self.model.eval()

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Return (S, B, C)."""
        rows = len(batch["input_ids"])
        of_each = [name for name in self.names for _ in range(rows)]
        with patched([(self.model, partial(self.model.forward, adapter_names=of_each))]):
            logits = class_logits(self.model, repeated(batch, len(self.names)))
        return logits.view(len(self.names), rows, -1)


def random_posterior(model: nn.Module, seed: int) -> DiagonalGaussian:
    """Return a Gaussian around weights near the model's."""
    source = torch.Generator().manual_seed(seed)
    mean = {n: v + 0.02 * torch.randn(v.shape, generator=source).to(v) for n, v in copied(model).items()}
    return DiagonalGaussian(mean, {n: torch.full_like(v, 0.02) for n, v in mean.items()})


@torch.no_grad()
def speed_of(base: str, settings: dict[str, Any], args: Any, device: torch.device) -> Iterator[dict[str, Any]]:
    """Time all ways of drawing on one base; yield what is found after each number of draws and rows."""
    model, _ = load_model(base, **settings)
    config: Any = model.config
    posterior = random_posterior(model, args.seed)
    quarter = max(1, config.num_hidden_layers // 4)  # of six layers one
    found: dict[str, Any] = {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "last_layers": quarter,
        "rate": matmul_rate(model, device),
        "cells": [],
    }
    for draws in args.draws:
        kinds = {"loop": {"stacked": False}, "stack": {}, "alike": {}, "quarter": {"last_layers": quarter}}
        made = {
            name: posterior.drawn(draws, torch.Generator(device).manual_seed(1), Drawing(**how))
            for name, how in kinds.items()
        }
        mixed = Mixed(base, made["stack"].draws(), settings)
        for rows in args.rows:
            # two batches in turn, as of the same rows again nearly all would be kept
            apart, alike = (in_turn(config.vocab_size, rows, args.seed, tokens) for tokens in (0, ALIKE))
            asked: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
                name: partial(drawn.logits, model, forward=class_logits) for name, drawn in made.items()
            }
            asked |= {"mixed": mixed.logits, "one pass": partial(class_logits, model)}
            ways: dict[str, Callable[[], Tensor]] = {
                name: InTurn(way, alike if name == "alike" else apart) for name, way in asked.items()
            }
            found["cells"].append(cell_of(ways, draws, rows, found["rate"], args, device))
            yield found


def cell_of(
    ways: dict[str, Callable[[], Tensor]], draws: int, rows: int, rate: float, args: Any, device: torch.device
) -> dict[str, Any]:
    """Time the ways for one number of draws and rows."""
    logits = {name: way() for name, way in ways.items()}
    seconds, _ = interleave(
        {name: [(name, way)] for name, way in ways.items()},
        device,
        args.rounds,
        warmup=2,  # after which what rows begin with is kept
        progress=False,
        seed=args.seed,
    )
    taken = {name: of[name] for name, of in seconds.items()}
    cell: dict[str, Any] = {"draws": draws, "batch": rows, "ways": {}}
    for name, way in ways.items():
        counter = FlopCounterMode(display=False)
        with counter:
            way()
        operations = counter.get_total_flops()
        cell["ways"][name] = {
            "seconds": spread(taken[name]),
            "rows_per_second": rows / spread(taken[name])["median"],
            "loop_to_it": ratio(taken["loop"], taken[name]),
            "to_one_pass": ratio(taken[name], taken["one pass"]),
            "peak_bytes": peak_of(way, device),
            "operations": operations,
            "limit_seconds": operations / rate,
            "differs_from_loop": (logits[name] - logits["loop"]).abs().max().item()
            if name in ("stack", "mixed")
            else None,
        }
    return cell


def peak_of(way: Callable[[], Any], device: torch.device) -> int:
    """Return the bytes allocated at once while it runs."""
    if device.type == "cpu":
        return peak(way)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    way()
    return torch.cuda.max_memory_allocated(device) - before


def matmul_rate(model: nn.Module, device: torch.device) -> float:
    """Return the operations a second of one product of the model's own width, 2048 tokens high: the best of 20."""
    config: Any = model.config
    dtype = next(p.dtype for p in model.parameters() if p.dtype.is_floating_point)
    x = torch.randn(2048, config.hidden_size, device=device, dtype=dtype)
    w = torch.randn(config.hidden_size, config.intermediate_size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(20):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        x @ w
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * len(x) * w.numel() / (time.perf_counter() - start))
    return best


# --- tables ---


WAYS = ("loop", "mixed", "stack", "alike", "quarter")


def speed_table(name: str, found: dict[str, Any]) -> Titled:
    """Return one base's table."""
    table = []
    for cell in sorted(found["cells"], key=lambda cell: (cell["draws"], cell["batch"])):
        ways = cell["ways"]
        table.append(
            [str(cell["draws"]), str(cell["batch"])]
            + [f"{ways[way]['rows_per_second']:.0f}" for way in WAYS]
            + [f"{ways[way]['loop_to_it']['median_of_rounds']:.2f}" for way in WAYS[1:]]
            + [f"{ways[way]['to_one_pass']['median_of_rounds']:.1f}" for way in ("loop", "stack", "alike", "quarter")]
            + [f"{ways['stack']['limit_seconds'] / ways['stack']['seconds']['median']:.0%}"]
            + [f"{ways[way]['peak_bytes'] / 1e6:.0f}" for way in WAYS]
        )
    columns = ["S", "B", *(f"{way} rows/s" for way in WAYS), *(f"loop / {way}" for way in WAYS[1:])]
    columns += [f"{way} / one pass" for way in ("loop", "stack", "alike", "quarter")]
    columns += ["limit / stack", *(f"{way} MB" for way in WAYS)]
    title = f"{name}: {found['layers']} layers, the last {found['last_layers']} of them drawn in `quarter`"
    return title, columns, table


def documented(text: str, found: dict[str, Any]) -> str:
    """Return the document with the tables of a result."""
    return in_document(text, "inference", [speed_table(name, of) for name, of in found["speed"].items()])


def draws_parser(description: str | None, name: str, rows: list[int]) -> argparse.ArgumentParser:
    """Return a parser of what benchmarks of draws are told."""
    made = parser(description, name)
    made.add_argument("--device", default="cpu", help="default: %(default)s")
    made.add_argument("--bases", nargs="*", help="folders of bases (default: the demo's, and tinyllama-3m)")
    made.add_argument("--rows", nargs="+", type=count, default=rows, help=f"B (default: {' '.join(map(str, rows))})")
    made.add_argument("--rounds", type=count, default=5, help="timed rounds (default: %(default)s)")
    made.add_argument("--document", action="store_true", help="write the tables into docs/inference.md as well")
    return made


def bases_of(args: Any) -> list[str]:
    """Return the folders of the bases that are asked for."""
    if args.bases is not None:
        return list(args.bases)
    return [str(ROOT / "src/varlora/demo/bundled/base"), str(shared_folder() / "models" / "tinyllama-3m")]


def measured(args: Any, device: torch.device) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and speed of each base, after each number of draws and rows."""
    settings: dict[str, Any] = {"device": args.device, "lora": LoRA()}
    if args.llama2_7b:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            _save_random(shape(args.tiny), Path(folder), device)
            for found in speed_of(folder, {**settings, "dtype": "bfloat16"}, args, device):
                yield "Llama-2-7B's shape", found
    for base in bases_of(args):
        for found in speed_of(base, settings, args, device):
            yield Path(base).name, found


def main(argv: Sequence[str] | None = None) -> None:
    args, started = arguments(argv), time.monotonic()
    set_up(args)
    disable_progress_bar()
    device = torch.device(args.device)
    speed: dict[str, Any] = {}
    for base, found in measured(args, device):
        speed[base] = found
        write_result(args.out, "inference", args, device, speed=speed)  # what comes next may not end
        if args.budget_minutes is not None and time.monotonic() - started >= 60 * args.budget_minutes:
            print(f"{args.budget_minutes:g} minutes are spent")
            break
    for name, found in speed.items():
        print_table(*speed_table(name, found))
    if args.document:
        write_text(DOCUMENT, documented(DOCUMENT.read_text(encoding="utf-8"), read_json(args.out)))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return what the benchmark is told."""
    made = draws_parser(__doc__, "inference", [1, 8, 64])
    made.add_argument("--llama2-7b", action="store_true", help="first the shape of Llama-2-7B, random and bfloat16")
    made.add_argument("--tiny", action="store_true", help="two layers of width 64 for that, to see that all works")
    made.add_argument("--folder", type=Path, help="where its weights are for a while (default: the system's)")
    made.add_argument("--draws", nargs="+", type=count, default=[10, 1, 4, 32], help="S (default: 10 1 4 32)")
    made.add_argument("--budget-minutes", type=float, help="no S and B but the first is begun after these minutes")
    args = made.parse_args(argv)
    if args.tiny and not args.llama2_7b:
        made.error("--tiny is for the shape of Llama-2-7B: pass --llama2-7b as well")
    if args.document and args.budget_minutes is not None:
        made.error("--document takes a whole measurement: leave out --budget-minutes")
    if args.tiny and args.out == made.get_default("out"):
        made.error("--tiny measures nothing worth keeping: pass --out, so that the result file is not overwritten")
    if args.llama2_7b and not args.tiny and args.device == "cpu":
        made.error("the true shape takes hours on a CPU: run it on a GPU, or pass --tiny")
    return args


if __name__ == "__main__":
    main()
