"""Whether training has to be stopped early: the NLL along the way of ten times the demo's steps, and where it ends.

Each run of IVON left to itself, also with a learning rate that falls from the start, and of AdamW at the learning rates
that its searches for as many steps and for a tenth of them found, is asked at every tenth of its training, on the rows
that are reported. What the end has above the lowest of these ten is what stopping early could have gained at the most,
as nobody knows when that was.

    python benchmarks/evidence/along.py

An hour on two cores; stopped at any point, the same command goes on.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean as mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from _common import RESULTS, ROOT, Titled, count, in_document, machine, parser, print_table
from auto import DEMO, DEMO_SHORT, FALLING, TENFOLD
from transformers import TrainerCallback

from varlora import metrics
from varlora.config import settings_from
from varlora.demo.run import one_thread
from varlora.files import read_json, write_json, write_text
from varlora.loading import encode_rows, load_base, pad_of, rows_of_split
from varlora.optim.ivon import IVON
from varlora.params import trainable
from varlora.posterior import Point, Posterior
from varlora.predict import predict
from varlora.quiet import quiet_libraries
from varlora.run import origin
from varlora.tasks import get_task
from varlora.training import train

DOCUMENT = ROOT / "docs" / "scale.md"
STEPS, PARTS = DEMO_SHORT * TENFOLD, 10
LINES: dict[str, tuple[str, dict[str, float], str | None]] = {
    "IVON, left to itself": ("ivon", {}, None),
    "IVON, a learning rate that falls from the start": ("ivon", FALLING, None),
    "AdamW, its best for as many steps": ("adamw", {}, f"demo-{STEPS}"),
    "AdamW, its best for a tenth of them": ("adamw", {}, f"demo-{DEMO_SHORT}"),
}
"""Name -> method, its settings, and the setting of auto.json whose search found its learning rate."""


class Along(TrainerCallback):
    """Notes the NLL of ten draws, or of the point, on some rows at every tenth of training; it changes no bit of it."""

    def __init__(self, rows: Sequence[Any], pad_token_id: int, every: int) -> None:
        self.rows, self.pad_token_id, self.every = rows, pad_token_id, every
        self.nlls: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        """Ask the model as it is."""
        if state.global_step % self.every:
            return
        own = getattr(optimizer, "optimizer", optimizer)
        if isinstance(own, IVON):
            posterior: Posterior = own.posterior()
        else:
            posterior = Point({name: p.detach().clone() for name, p in trainable(model).items()})
        found = predict(model, posterior, self.rows, pad_token_id=self.pad_token_id)
        self.nlls.append(metrics.nll(found.probs, found.labels))


def curve(task: str, line: str, seed: int, steps: int, rates: Mapping[str, float]) -> list[float]:
    """Return the NLL at each tenth of a run's training."""
    os.chdir(ROOT)
    quiet_libraries()
    method, own_settings, searched = LINES[line]
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        settings = settings_from(
            {
                "task": task,
                "model": "src/varlora/demo/bundled/base",
                "method": method,
                "method_settings": {"lr": rates[searched]} if searched else own_settings,
                "run_dir": str(Path(folder) / "run"),
                "steps": steps,
                "batch_size": 4,
                "seed": seed,
                "calibration_fraction": 0.2,
                "checkpoint_every": steps,
            }
        )
        model, tokenizer = load_base(settings)
        own = get_task(task)
        examples = rows_of_split(own, own.evaluation, settings, _nothing)
        rows = encode_rows(model, tokenizer, examples, settings, _nothing).rows
        along = Along(rows, pad_of(tokenizer), steps // PARTS)
        train(settings, say=_nothing, callbacks=[along])
    return along.nlls


def _nothing(words: str) -> None:
    """Say nothing."""


def rates_of(settings: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return for each task the learning rates of AdamW that the searches of auto.json found, by setting."""
    searched = [setting for *_, setting in LINES.values() if setting]
    return {
        task: {
            setting: float(settings[setting]["peers"]["chosen"][Path(task).stem]["adamw"].removeprefix("lr="))
            for setting in searched
        }
        for task in DEMO
    }


def table_of(found: Mapping[str, Any]) -> Titled:
    """Return for each line the NLL along the way, and what its end has above the lowest of it, run by run."""
    rows = []
    for line, runs in found["curves"].items():
        ends = [100 * (nlls[-1] / min(nlls) - 1) for nlls in runs.values()]
        way = [f"{mean(at):.3f}" for at in zip(*runs.values(), strict=True)]
        spread = f" ± {metrics.standard_error(ends):.1f}" if len(ends) > 1 else ""
        rows.append([line, str(len(runs)), *way, f"{mean(ends):.1f}{spread}"])
    shares = [f"{100 * part // PARTS} %" for part in range(1, PARTS + 1)]
    columns = ["NLL after", "runs", *shares, "end above the lowest, %"]
    return f"The demo's three tasks, {found['steps']:,} steps, averages over tasks and seeds", columns, rows


def documented(text: str, found: Mapping[str, Any]) -> str:
    """Return the document with the table of a result."""
    return in_document(text, "along", [table_of(found)])


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__, "along")
    made.add_argument("--seeds", type=count, default=3, help="runs of each (default: %(default)s)")
    made.add_argument("--steps", type=count, default=STEPS, help="steps of each (default: %(default)s)")
    made.add_argument("--workers", type=count, default=os.cpu_count() or 1, help="default: the cores")
    made.add_argument("--document", action="store_true", help="write the table into docs/scale.md as well")
    args = made.parse_args(argv)
    rates = rates_of(read_json(RESULTS / "auto.json")["settings"])
    curves: dict[str, dict[str, list[float]]] = {line: {} for line in LINES}
    if args.steps % PARTS:
        made.error(f"--steps: expected a multiple of {PARTS}, but got {args.steps}")
    if args.out.is_file():
        before = read_json(args.out)
        if (before["steps"], before["learning_rates"]) != (args.steps, rates):
            made.error(f"--out: {args.out} has curves of other steps or learning rates; give another file")
        curves |= before["curves"]
    wanted = itertools.product(range(args.seeds), LINES, DEMO)
    todo = [(s, line, task) for s, line, task in wanted if f"{Path(task).stem}/seed{s}" not in curves[line]]
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        futures = {one: pool.submit(curve, one[2], one[1], one[0], args.steps, rates[one[2]]) for one in todo}
        for (seed, line, task), future in futures.items():
            curves[line][f"{Path(task).stem}/seed{seed}"] = future.result()
            where = origin()
            where["machine"] |= machine(torch.device("cpu"))
            found = {"benchmark": "along", "steps": args.steps, "learning_rates": rates, "curves": curves}
            write_json(args.out, found | {"origin": where})
            print(f"{line}, {Path(task).stem}, seed {seed}", flush=True)
    print_table(*table_of(read_json(args.out)))
    if args.document:
        write_text(DOCUMENT, documented(DOCUMENT.read_text(encoding="utf-8"), read_json(args.out)))


if __name__ == "__main__":
    main()
