"""What the benchmarks share: interleaved timing, statistics, and results with their origin."""

from __future__ import annotations

import argparse
import os
import platform
import random
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from varlora.files import write_json
from varlora.overhead import Clock
from varlora.run import origin

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LOAD_AT_START = os.getloadavg()

Part = tuple[str, Callable[[], Any]]
"""A name and what is timed under it."""
Samples = dict[str, dict[str, list[float]]]
"""candidate -> part -> one number for each round; `total` is the sum over the parts."""


Titled = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""Title, columns and rows of a table."""


# --- arguments ---


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """Return a parser with the module's docstring as help and the options that every benchmark has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="result file (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="seed of data, noise and order (default: %(default)s)")
    made.add_argument("--threads", type=count, help="threads of torch (default: torch's choice)")
    return made


def set_up(args: argparse.Namespace) -> None:
    """Apply what every benchmark has options for."""
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)


def count(text: str) -> int:
    """Parse a whole number of at least 1 from the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, but got {text}")
    return value


def shared_folder() -> Path:
    """Return the folder of models and data: `$VARLORA_SHARED`, or `shared` beside the checkout."""
    return Path(os.environ.get("VARLORA_SHARED", ROOT.parent / "shared"))


# --- timing ---


def interleave(
    candidates: Mapping[str, Sequence[Part]],
    device: torch.device,
    rounds: int,
    *,
    warmup: int = 3,
    flush: Callable[[], Any] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Samples, Samples]:
    """Run the candidates in turn, in a new random order each round, so that all of them see the same disturbances.

    Args:
        candidates: name -> its parts, run one after another.
        device: where they run.
        rounds: timed rounds.
        warmup: rounds before these that are not timed.
        flush: run before each part, outside the timing, to empty the caches; without it the parts follow directly.
        seed: of the order.
        progress: print a line now and then.

    Returns:
        Seconds, and page faults without input or output (memory that the kernel had to hand out anew).
    """
    names = {name: [*(part for part, _ in parts), "total"] for name, parts in candidates.items()}
    seconds: Samples = {name: {part: [] for part in parts} for name, parts in names.items()}
    faults: Samples = {name: {part: [] for part in parts} for name, parts in names.items()}
    order, rng, clock, started = list(candidates), random.Random(seed), Clock(device), time.perf_counter()
    for done in range(-warmup, rounds):
        rng.shuffle(order)
        for name in order:
            took: list[float] = []
            faulted: list[float] = []
            clock.mark()
            for _, run in candidates[name]:
                if flush:
                    flush()
                    clock.seconds()  # waits for the device, and forgets the flush
                    clock.mark()
                before = _minor_faults()
                run()
                clock.mark()
                faulted.append(_minor_faults() - before)
                if flush:
                    took += clock.seconds()
            took += clock.seconds()
            if done >= 0:
                for part, *values in zip(names[name], [*took, sum(took)], [*faulted, sum(faulted)]):
                    seconds[name][part].append(values[0])
                    faults[name][part].append(values[1])
        if progress and done >= 0 and (done + 1) % max(1, rounds // 5) == 0:
            print(f"round {done + 1} of {rounds}, {time.perf_counter() - started:.0f} s", flush=True)
    return seconds, faults


def _minor_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def peak(run: Callable[[], Any]) -> int:
    """Return the most bytes that are allocated at once while it runs, beside what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, quartiles and minimum."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "q1": low, "q3": high, "min": min(values)}


def ratio(values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Compare two candidates timed in the same rounds; where the ratios differ much, the rounds were disturbed."""
    each = spread([a / b for a, b in zip(values, base)])
    return {
        "of_medians": statistics.median(values) / statistics.median(base),
        "of_minima": min(values) / min(base),
        "median_of_rounds": each["median"],
        "q1_of_rounds": each["q1"],
        "q3_of_rounds": each["q3"],
    }


# --- results ---


def machine(device: torch.device) -> dict[str, Any]:
    """Return what a timing depends on beside the versions."""
    found = {
        "cpu": _cpu_name(),
        "torch_threads": torch.get_num_threads(),
        "load_average": {  # over 1, 5 and 15 minutes: what else ran on the machine before, and all that ran meanwhile
            "at_start": [round(x, 2) for x in LOAD_AT_START],
            "at_end": [round(x, 2) for x in os.getloadavg()],
        },
        "malloc": {k: v for k, v in os.environ.items() if k in ("LD_PRELOAD", "GLIBC_TUNABLES") or "MALLOC" in k},
        "device": str(device),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return name


def write_result(path: Path, name: str, settings: argparse.Namespace, device: torch.device, **found: Any) -> None:
    """Write what was found with its origin, whole or not at all, and say where."""
    where = origin()
    where["machine"] |= machine(device)
    plain = {key: _public(value) for key, value in vars(settings).items()}
    write_json(path, {"benchmark": name, "settings": plain, "origin": where, **found})
    print(f"wrote {path}")


def _public(value: Any) -> Any:
    """A path within the checkout relative to it, any other by its name: a result is read on other machines."""
    if isinstance(value, list):
        return [_public(one) for one in value]
    if not isinstance(value, Path) and not (isinstance(value, str) and os.path.isabs(value)):
        return value
    path = Path(value).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def in_document(text: str, marker: str, tables: Sequence[Titled]) -> str:
    """Return a document with tables in Markdown between `<!-- marker -->` and `<!-- end -->`."""
    parts = []
    for title, columns, rows in tables:
        lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
        parts.append(f"{title}:\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
    begin, end = f"<!-- {marker} -->\n", "<!-- end -->"
    before, _, rest = text.partition(begin)
    return before + begin + "\n".join(parts) + end + rest.partition(end)[2]


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a title and a table with its first column on the left and numbers on the right."""
    table = Table(*columns, box=SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:  # a log file has no width of its own
        console.width = 140
    print(f"\n{title}", flush=True)
    console.print(table)
