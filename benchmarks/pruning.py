"""What pruning costs: NLL and accuracy of finished runs with a share of their weights pruned, by three criteria.

Signal to noise |m|/√v against its controls, magnitude and chance; ten draws, the evaluation split, no temperature. The
file also says how much smaller the stored posterior is.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from _common import ROOT, machine, parser, print_table, set_up

from varlora import metrics
from varlora.files import write_json
from varlora.loading import encode_rows, load, rows_of_split
from varlora.posterior.base import CRITERIA
from varlora.predict import predict
from varlora.run import origin
from varlora.tasks import get_task

SHARES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


def of_run(run: Path, samples: int, limit: int, seed: int) -> dict[str, Any]:
    """Return by criterion and share the metrics of a run."""
    loaded = load(run)
    task = get_task(loaded.settings.task)
    examples = rows_of_split(task, task.evaluation, loaded.settings, print)[:limit]
    rows = encode_rows(loaded.model, loaded.tokenizer, examples, loaded.settings, print).rows
    found: dict[str, Any] = {}
    for by in CRITERIA:
        for share in SHARES:
            kept = loaded.posterior.prune(share, by, torch.Generator().manual_seed(seed))
            made = predict(loaded.model, kept, rows, pad_token_id=loaded.tokenizer.pad_token_id or 0, samples=samples)
            numbers = metrics.evaluate(made.probs, made.labels)
            size = sum(value.numel() * value.element_size() for value in kept.tensors().values())
            found.setdefault(by, {})[str(share)] = {
                name: numbers[name] for name in ("accuracy", "nll", "ece")
            } | {"bytes": size}  # fmt: skip
    return found


def main() -> None:
    made = parser(__doc__, "pruning")
    made.add_argument("runs", nargs="+", type=Path, help="run directories of a method with variances")
    made.add_argument("--samples", type=int, default=10, help="draws (default: %(default)s)")
    made.add_argument("--rows", type=int, default=300, help="rows of the evaluation split (default: %(default)s)")
    args = made.parse_args()
    set_up(args)
    runs = {os.path.relpath(run.resolve(), ROOT): of_run(run, args.samples, args.rows, args.seed) for run in args.runs}
    table = []
    for share in map(str, SHARES):
        cells = [share]
        for by in CRITERIA:
            of = [found[by][share] for found in runs.values()]
            cells += [f"{sum(one['nll'] for one in of) / len(of):.3f}"]
            cells += [f"{100 * sum(one['accuracy'] for one in of) / len(of):.1f}"]
        table.append(cells)
    print_table("pruning", ["share", *(f"{by}: {what}" for by in CRITERIA for what in ("NLL", "ACC %"))], table)
    where = origin()
    where["machine"] |= machine(torch.device("cpu"))
    write_json(
        args.out,
        {"benchmark": "pruning", "samples": args.samples, "rows": args.rows, "runs": runs, "origin": where},
    )
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
