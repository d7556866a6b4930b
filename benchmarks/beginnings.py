"""Prompts that begin with the same examples: ten draws and the mean go on from what is kept of them.

Rows of 220 tokens, of which the first 200 are the same in all, batch after batch: an instruction with a few examples,
and a question. The loop and the one pass run them whole; the stack of ten draws, and the mean as `predict` asks it,
keep the keys and values of the 200.

    python benchmarks/beginnings.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from _common import Titled, in_document, print_table, set_up, write_result
from inference import DOCUMENT, InTurn, bases_of, cell_of, draws_parser, in_turn, matmul_rate, random_posterior
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from varlora.drawing import Drawing
from varlora.files import read_json, write_text
from varlora.model import LoRA, class_logits, load_model
from varlora.predict import Predictor

DRAWS, LENGTH, ALIKE = 10, 220, 200


@torch.no_grad()
def speed_of(base: str, args: Any, device: torch.device) -> list[dict[str, Any]]:
    """Time each way on one base."""
    model, _ = load_model(base, device=args.device, lora=LoRA())
    config: Any = model.config
    posterior, rate, cells = random_posterior(model, args.seed), matmul_rate(model, device), []
    for rows in args.rows:
        batches = in_turn(config.vocab_size, rows, args.seed, ALIKE, LENGTH)
        loop, stack = (Predictor(model, posterior, DRAWS, how=Drawing(stacked=stacked)) for stacked in (False, True))
        asked: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
            "loop": loop.logits,
            "stack": stack.logits,
            "one pass": partial(class_logits, model),
            "mean": stack.at_mean,
        }
        ways: dict[str, Callable[[], Tensor]] = {name: InTurn(way, batches) for name, way in asked.items()}
        cells.append(cell_of(ways, DRAWS, rows, rate, args, device))
    return cells


def speed_table(name: str, cells: Sequence[dict[str, Any]]) -> Titled:
    """Return one base's table."""
    table = []
    for cell in cells:
        ways = cell["ways"]
        table.append(
            [str(cell["batch"])]
            + [f"{ways[way]['rows_per_second']:.0f}" for way in ("loop", "stack", "one pass", "mean")]
            + [f"{ways['stack']['loop_to_it']['median_of_rounds']:.1f}"]
            + [f"{1 / ways['mean']['to_one_pass']['median_of_rounds']:.1f}"]
        )
    columns = ["B", "loop rows/s", "stack rows/s", "one pass rows/s", "mean rows/s", "loop / stack", "one pass / mean"]
    return (
        f"{name}: {DRAWS} draws, and the mean, of rows that begin with the same {ALIKE} of {LENGTH} tokens",
        columns,
        table,
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = draws_parser(__doc__, "beginnings", [1, 8]).parse_args(argv)
    set_up(args)
    disable_progress_bar()
    device = torch.device(args.device)
    speed = {}
    for base in bases_of(args):
        speed[Path(base).name] = speed_of(base, args, device)
        print_table(*speed_table(Path(base).name, speed[Path(base).name]))
    write_result(args.out, "beginnings", args, device, speed=speed)
    if args.document:
        written = documented(DOCUMENT.read_text(encoding="utf-8"), read_json(args.out))
        write_text(DOCUMENT, written)


def documented(text: str, found: dict[str, Any]) -> str:
    """Return the document with the tables of a result."""
    return in_document(text, "beginnings", [speed_table(name, of) for name, of in found["speed"].items()])


if __name__ == "__main__":
    main()
