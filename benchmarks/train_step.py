"""The whole training step with IVON and with AdamW: what sampling and step add to forward and backward pass.

Both train an adapter of the same base on the same SST-2 batches, in turn in one process. The parts are those of the
paper (the last paragraph of its section 3), which measured 316.3 ms, 1.8 ms and 1.0 ms on an RTX 6000 Ada with an 8-bit
Llama-2-7B: forward, loss and backward pass; sampling; optimizer step.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --model meta-llama/Llama-2-7b-hf --dtype bfloat16 --device cuda
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

import torch
from _common import (
    ROOT,
    Part,
    count,
    interleave,
    parser,
    print_table,
    ratio,
    set_up,
    shared_folder,
    spread,
    write_result,
)
from transformers.utils.logging import disable_progress_bar

from varlora.data import Batch, collate, encode_all
from varlora.fit import class_loss
from varlora.methods import METHODS
from varlora.model import class_logits, load_model
from varlora.params import trainable
from varlora.tasks import get_task, load_rows

PAPER = {"forward_backward": 0.3163, "sample": 0.0018, "step": 0.0010}
"""Seconds on an NVIDIA RTX 6000 Ada: the paper, section 3."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = _parser().parse_args(argv)
    device = torch.device(args.device)
    set_up(args)
    disable_progress_bar()
    model_name = args.model or str(shared_folder() / "models" / "tinyllama-3m")
    candidates: dict[str, list[Part]] = {}
    for name in ("ivon", "adamw"):
        model, tokenizer = load_model(model_name, dtype=args.dtype, seed=args.seed, device=device)
        if not candidates:
            batches = _batches(tokenizer, args)
        params = trainable(model.train())
        optimizer: Any = METHODS[name]().optimizer(params, 1000, args.batch_size, args.seed)
        sampling: list[Part] = [("sample", optimizer.train)] if name == "ivon" else []
        # `cycle` starts anew for each method, so round r is the same batch for both.
        passes = _forward_backward(model, optimizer, cycle(batches), device)
        candidates[name] = [*sampling, ("forward_backward", passes), ("step", optimizer.step)]
    tensors, numel = len(params), sum(p.numel() for p in params.values())
    tokens = statistics.mean(batch["input_ids"].numel() for batch in batches)
    print(
        f"{model_name}: {tensors} adapter matrices, {numel:,} parameters, {tokens:.0f} tokens a batch, "
        f"{args.rounds} rounds on {device}",
        flush=True,
    )
    seconds, _ = interleave(candidates, device, args.rounds, warmup=args.warmup, seed=args.seed)
    found: dict[str, Any] = {
        "adapter": {"tensors": tensors, "numel": numel},
        "tokens_per_batch": tokens,
        "seconds": {name: {part: spread(values) for part, values in parts.items()} for name, parts in seconds.items()},
        "overhead_percent": {name: _overhead(seconds[name]) for name in seconds},
        "ivon_to_adamw": ratio(seconds["ivon"]["total"], seconds["adamw"]["total"]),
        "paper": {"seconds": PAPER, "overhead_percent": 100 * (1 - PAPER["forward_backward"] / sum(PAPER.values()))},
    }
    _print(found)
    write_result(args.out, "train_step", args, device, **found)
    return found


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__, "train_step")
    made.add_argument("--model", help="folder or hub name (default: tinyllama-3m of the shared folder)")
    made.add_argument("--dtype", default="float32", help="type of the base's weights (default: %(default)s)")
    made.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    made.add_argument("--rounds", type=count, default=200, help="timed rounds (default: %(default)s)")
    made.add_argument("--warmup", type=int, default=10, help="rounds before these (default: %(default)s)")
    made.add_argument("--batch-size", type=count, default=4, help="rows a batch (default: %(default)s)")
    made.add_argument("--rows", type=count, default=200, help="training rows in use (default: %(default)s)")
    made.add_argument("--max-length", type=count, default=256, help="tokens a row (default: %(default)s)")
    return made


def _batches(tokenizer: Any, args: argparse.Namespace) -> list[Batch]:
    """Return the training rows as batches of mixed lengths, as training has them."""
    task = replace(get_task(ROOT / "recipes" / "local" / "sst2.yaml"), limit={"train": args.rows})
    examples = load_rows(task, "train", data_dir=shared_folder() / "data").examples
    rows = encode_all(tokenizer, examples, args.max_length).rows
    starts = range(0, len(rows) - args.batch_size + 1, args.batch_size)
    return [collate(rows[at : at + args.batch_size], tokenizer.pad_token_id) for at in starts]


def _forward_backward(model: Any, optimizer: Any, batches: Iterator[Batch], device: torch.device) -> Callable[[], None]:
    def passes() -> None:
        batch = {key: tensor.to(device) for key, tensor in next(batches).items()}
        optimizer.zero_grad()
        (class_loss(class_logits(model, batch), batch["labels"]) / len(batch["labels"])).backward()

    return passes


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
