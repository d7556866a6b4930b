"""The whole training step with IVON and with AdamW: what sampling and step add to forward and backward pass.

Both train an adapter of the same base on the same SST-2 batches, in turn in one process. The parts are those of the
paper (the last paragraph of its section 3), which measured 316.3 ms, 1.8 ms and 1.0 ms on an RTX 6000 Ada with an 8-bit
Llama-2-7B: forward, loss and backward pass; sampling; optimizer step.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --model meta-llama/Llama-2-7b-hf --dtype bfloat16 --device cuda
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from _common import (
    ROOT,
    Samples,
    count,
    parser,
    print_table,
    ratio,
    set_up,
    shared_folder,
    spread,
    write_result,
)
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from varlora.data import encode_all
from varlora.methods import METHODS
from varlora.model import load_model
from varlora.overhead import PAPER_SECONDS, Overhead, measure_overhead
from varlora.params import trainable
from varlora.progress import rows_progress
from varlora.prompt import Encoded
from varlora.tasks import get_task, load_rows

NAMES = {"sampling": "sample"}
"""Parts that have another name in the result file."""
BOUND = 3.0
"""Per cent that a step with IVON may take more than one with AdamW."""
NOTES = [
    "A draw and a step are a fixed number of calls (24 matrices) beside a forward and a backward pass over a base of "
    "3.8 million parameters: with a larger base the ratio is nearer to 1.",
]
"""What stands between the measurement and its limit."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = _parser().parse_args(argv)
    model_name, device, model, tokenizer = load_base(args)
    tensors = len(trainable(model))
    print(f"{model_name}: {tensors} adapter matrices, {args.rounds} rounds on {device}", flush=True)
    with rows_progress(Console(), "rounds")(args.rounds) as progress:
        overhead = measure_overhead(
            model,
            training_rows(tokenizer, args),
            pad_token_id=tokenizer.pad_token_id,
            methods={name: METHODS[name]() for name in ("ivon", "adamw")},
            batch_size=args.batch_size,
            rounds=args.rounds,
            warmup=args.warmup,
            seed=args.seed,
            progress=progress,
        )
    seconds = _samples(overhead)
    paper = {NAMES.get(part, part): value for part, value in PAPER_SECONDS.items()}
    found: dict[str, Any] = {
        "notes": NOTES,
        "bound_per_cent": BOUND,
        "adapter": {"tensors": tensors, "numel": overhead.parameters},
        "tokens_per_batch": overhead.tokens_per_batch,
        "seconds": {name: {part: spread(values) for part, values in parts.items()} for name, parts in seconds.items()},
        "overhead_percent": {name: _overhead(parts) for name, parts in seconds.items()},
        "ivon_to_adamw": ratio(seconds["ivon"]["total"], seconds["adamw"]["total"]),
        "state_bytes": {name: cost.state_bytes for name, cost in overhead.costs.items()},
        "peak_bytes": {name: cost.peak_bytes for name, cost in overhead.costs.items()},
        "paper": {"seconds": paper, "overhead_percent": 100 * (1 - paper["forward_backward"] / sum(paper.values()))},
    }
    _print(found)
    write_result(args.out, "train_step", args, device, **found)
    return found


def _parser() -> argparse.ArgumentParser:
    made = base_parser(__doc__, "train_step")
    made.add_argument("--rounds", type=count, default=200, help="timed rounds (default: %(default)s)")
    made.add_argument("--warmup", type=int, default=10, help="rounds before these (default: %(default)s)")
    made.add_argument("--batch-size", type=count, default=4, help="rows a batch (default: %(default)s)")
    return made


def base_parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """Return a parser of what `load_base` and `training_rows` need."""
    made = parser(doc, name)
    made.add_argument("--model", help="folder or hub name (default: tinyllama-3m of the shared folder)")
    made.add_argument("--dtype", default="float32", help="type of the base's weights (default: %(default)s)")
    made.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    made.add_argument("--rows", type=count, default=200, help="training rows in use (default: %(default)s)")
    made.add_argument("--max-length", type=count, default=256, help="tokens a row (default: %(default)s)")
    return made


def load_base(args: argparse.Namespace) -> tuple[str, torch.device, Any, Any]:
    """Set the process up; return the base's name, the device, the base with an adapter, and its tokenizer."""
    set_up(args)
    disable_progress_bar()
    name, device = args.model or str(shared_folder() / "models" / "tinyllama-3m"), torch.device(args.device)
    return name, device, *load_model(name, dtype=args.dtype, seed=args.seed, device=device)


def training_rows(tokenizer: Any, args: argparse.Namespace) -> list[Encoded]:
    """Return training rows of mixed lengths, as training has them."""
    task = replace(get_task(ROOT / "recipes" / "local" / "sst2.yaml"), limit={"train": args.rows})
    examples = load_rows(task, "train", data_dir=shared_folder() / "data").examples
    return encode_all(tokenizer, examples, args.max_length).rows


def _samples(overhead: Overhead) -> Samples:
    """Return each round's seconds by method and part; a part that a method does not have is left out."""
    return {
        name: {NAMES.get(part, part): list(values) for part, values in cost.seconds.items() if any(values)}
        for name, cost in overhead.costs.items()
    }


def _overhead(parts: dict[str, list[float]]) -> dict[str, float]:
    """Return sampling and step in per cent of the whole step."""
    extra = [sum(values) for values in zip(*(parts[part] for part in ("sample", "step") if part in parts))]
    return {name: 100 * value for name, value in ratio(extra, parts["total"]).items()}


def _print(found: dict[str, Any]) -> None:
    rows = [
        [f"{name}: {part}", *(f"{1000 * times[key]:.3f}" for key in ("median", "q1", "q3", "min"))]
        for name, parts in found["seconds"].items()
        for part, times in parts.items()
    ]
    print_table("Training step", ["ms", "median", "q1", "q3", "min"], rows)
    rows = [
        [name, *(f"{of[key]:.2f}" for key in ("of_medians", "median_of_rounds", "of_minima"))]
        for name, of in found["overhead_percent"].items()
    ]
    rows.append(["paper (IVON, RTX 6000 Ada)", f"{found['paper']['overhead_percent']:.2f}", "", ""])
    columns = ["per cent", "of medians", "median of rounds", "of minima"]
    print_table("Sampling and optimizer step in per cent of the whole step", columns, rows)
    whole = found["ivon_to_adamw"]
    print(f"IVON's whole step takes {whole['median_of_rounds']:.3f} times AdamW's (median of rounds).")


if __name__ == "__main__":
    main()
