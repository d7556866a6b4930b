"""Sampling and step of IVON against AdamW, and against ivon-opt where it is installed.

The shapes are those of Llama-2-7B's adapter in the paper: rank 8 on the query and value projections of 32 layers, 128
matrices of 4096 x 8 or 8 x 4096, 4.19 M parameters, float32. Gradients are there already, so nothing but the optimizer
is timed. All candidates take turns in one process; before each timed part, 64 MB are written to empty the caches, as a
backward pass would.

    python benchmarks/optimizer.py
    python benchmarks/optimizer.py --device cuda --rounds 300 --out benchmarks/results/optimizer_gpu.json
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _common import Part, Samples, count, interleave, parser, print_table, ratio, set_up, spread, write_result
from torch import nn
from torch.profiler import ProfilerActivity, profile

from varlora.optim.ivon import IVON

# The paper's settings for ARC and OpenBookQA (its Table 3). No timing depends on them.
RECIPE = {"lr": 0.03, "ess": 1e6, "hess_init": 1e-3, "beta2": 1 - 1e-5, "weight_decay": 0.0, "clip_radius": 1e-3}
BASE = "AdamW foreach"
# Numbers of 4 bytes that have to pass between memory and processor for each parameter, if each part reads and writes
# everything once. AdamW: reads p, gradient and two moments, writes p and the moments. IVON's draw: reads mean and
# Hessian, writes p. IVON's step: reads gradient, mean, momentum and Hessian, writes the last three and p. The noise is
# made in registers both times.
TRAFFIC = {"AdamW": {"step": 7}, "IVON": {"sample": 3, "step": 8}}
# Whose times these are compared with: of AdamW's forms, the one that moves no more.
MEASURED = {"AdamW": "AdamW fused", "IVON": "IVON"}
NOTES = [
    "AdamW's foreach and plain forms allocate temporaries as large as the parameters, so their time depends on malloc: "
    "glibc may map every temporary anew (page faults) or reuse it, by its thresholds and by what the process freed "
    "before. Page faults a step are listed for this reason.",
    "The traffic limit is at the better of two bandwidths, of copying 64 MB and of adding to 64 MB in place. It counts "
    "a write as one transfer; a processor reads a cache line before it writes one that it has not read, so copying, "
    "and IVON's draw, which writes parameters unread, move more than that.",
    "normal_ draws on one thread, whatever torch's number of threads. IVON makes its noise twice, in the draw and in "
    "the step, on all of them: a counter-based generator (Philox) in the kernels of native.c.",
    "noise_seconds is what that noise takes once, alone, with the 4 bytes a number of writing it down. Beside the "
    "traffic it is most of what a draw and a step have to do: measured_over_traffic is to be read with it.",
    "IVON torch is IVON without these kernels, as where there was no C compiler or no Triton: the same noise and "
    "arithmetic, operation by operation.",
    "On a GPU, a graph is the same replayed as a CUDA graph: what the device takes, without the host's launches, of "
    "which IVON's draw and step have six and one for 16 gradients that lie elsewhere than in the step before.",
]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = _parser().parse_args(argv)
    device = torch.device(args.device)
    set_up(args)
    shapes = [shape for _ in range(2 * args.layers) for shape in ((args.rank, args.hidden), (args.hidden, args.rank))]
    numel = sum(a * b for a, b in shapes)
    print(f"{len(shapes)} tensors, {numel:,} parameters, {args.rounds} rounds on {device}", flush=True)

    optimizers = _optimizers(shapes, device, args.seed)
    block = torch.zeros(args.flush_mb * 2**20 // 4, device=device)
    source, target = torch.ones(2, 2**24, device=device)  # 64 MB each
    noise = torch.empty(numel, device=device)
    limits: dict[str, list[Part]] = {
        "copy 64 MB": [("run", lambda: target.copy_(source))],
        "add_ to 64 MB": [("run", lambda: target.add_(1))],
        "normal_": [("run", lambda: noise.normal_())],
        "IVON's noise": [("run", _noise(shapes, device, args.seed))],
    }
    seconds, faults = interleave(
        optimizers | limits, device, args.rounds, warmup=args.warmup, flush=lambda: block.add_(1), seed=args.seed
    )
    allocated = {name: _allocated(parts, device) for name, parts in optimizers.items()}

    # Either reads and writes 64 MB; the better one is the limit.
    bandwidths = {n: 2 * source.nbytes / statistics.median(v["total"]) for n, v in seconds.items() if "64 MB" in n}
    bandwidth = max(bandwidths.values())
    moved = {name: {part: 4 * n * numel for part, n in parts.items()} for name, parts in TRAFFIC.items()}
    at_limit = {name: {part: n / bandwidth for part, n in parts.items()} for name, parts in moved.items()}
    found: dict[str, Any] = {
        "parameters": {"tensors": len(shapes), "numel": numel, "bytes": 4 * numel},
        "seconds": {name: {part: spread(values) for part, values in parts.items()} for name, parts in seconds.items()},
        "ratio_to": {
            base: {name: ratio(seconds[name]["total"], seconds[base]["total"]) for name in optimizers if name != base}
            for base in optimizers
            if not base.startswith("IVON")
        },
        "allocated_bytes": allocated,
        "page_faults": {name: {p: statistics.median(v) for p, v in faults[name].items()} for name in optimizers},
        "limits": {
            "bytes_per_second": bandwidths,
            "bytes_moved": moved,
            "traffic_seconds": at_limit,
            "measured_over_traffic": {
                name: {part: statistics.median(seconds[MEASURED[name]][part]) / n for part, n in parts.items()}
                for name, parts in at_limit.items()
            },
            "normal_seconds": spread(seconds["normal_"]["total"]),
            "noise_seconds": spread(seconds["IVON's noise"]["total"]),
        },
        "notes": NOTES,
    }
    _print(found, seconds, optimizers)
    write_result(args.out, "optimizer", args, device, **found)
    return found


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__, "optimizer")
    made.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    made.add_argument("--rounds", type=count, default=100, help="timed rounds (default: %(default)s)")
    made.add_argument("--warmup", type=int, default=10, help="rounds before these (default: %(default)s)")
    made.add_argument("--layers", type=count, default=32, help="adapted layers (default: %(default)s)")
    made.add_argument("--hidden", type=count, default=4096, help="width of the model (default: %(default)s)")
    made.add_argument("--rank", type=count, default=8, help="rank of the adapter (default: %(default)s)")
    made.add_argument("--flush-mb", type=count, default=64, help="MB written before each part (default: %(default)s)")
    return made


def _noise(shapes: list[tuple[int, int]], device: torch.device, seed: int) -> Callable[[], None]:
    """Return what makes the noise of an IVON optimizer once, for all parameters, and writes it down."""
    ours = IVON([nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes], seed=seed, **RECIPE)  # type: ignore[arg-type]
    ours.train()
    keys = itertools.count()

    def make() -> None:
        key = next(keys)  # what is there already would not be made again
        for bucket in ours._buckets:
            bucket.noise_of(key)

    return make


def _optimizers(shapes: list[tuple[int, int]], device: torch.device, seed: int) -> dict[str, list[Part]]:
    """Return the candidates, each with parameters and gradients of its own."""

    def params() -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(seed)
        made = []
        for shape in shapes:
            p = nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(device))
            p.grad = (torch.randn(shape, generator=generator) * 1e-3).to(device)
            made.append(p)
        return made

    found: dict[str, list[Part]] = {}
    for name, fused in (("IVON", None), ("IVON torch", False)):
        ours = IVON(params(), seed=seed, fused=fused, **RECIPE)  # type: ignore[arg-type]
        found[name] = [("sample", ours.train), ("step", ours.step)]
    for name, form in (("foreach", {"foreach": True}), ("fused", {"fused": True}), ("plain", {"foreach": False})):
        adamw = torch.optim.AdamW(params(), lr=5e-5, weight_decay=0.0, **form)  # type: ignore[arg-type]
        found[f"AdamW {name}"] = [("step", adamw.step)]
    if device.type == "cuda":
        ours = IVON(params(), seed=seed, capturable=True, **RECIPE)  # type: ignore[arg-type]
        found["IVON graph"] = _captured([("sample", ours.train), ("step", ours.step)])
        adamw = torch.optim.AdamW(params(), lr=5e-5, weight_decay=0.0, fused=True, capturable=True)
        found["AdamW fused graph"] = _captured([("step", adamw.step)])
    try:
        peer = importlib.import_module("ivon").IVON(params(), rescale_lr=False, **RECIPE)
    except ImportError:
        print("ivon-opt is not installed and is left out", flush=True)
    else:
        found["ivon-opt"] = [("sample", _entered(peer)), ("step", _left(peer))]
    return found


def _captured(parts: Sequence[Part]) -> list[Part]:
    """Return each part as a CUDA graph, captured after three rounds on a stream of their own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            for _, run in parts:
                run()
    torch.cuda.current_stream().wait_stream(side)
    found: list[Part] = []
    for part, run in parts:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        found.append((part, graph.replay))
    return found


def _entered(peer: Any) -> Callable[[], None]:
    """Return what draws with ivon-opt: it enters its context."""

    def enter() -> None:
        peer.benchmark_context = peer.sampled_params(train=True)
        peer.benchmark_context.__enter__()

    return enter


def _left(peer: Any) -> Callable[[], None]:
    """Return what follows a backward pass with ivon-opt: it leaves its context, then makes its step."""

    def leave() -> None:
        peer.benchmark_context.__exit__(None, None, None)
        peer.step()

    return leave


def _allocated(parts: Sequence[Part], device: torch.device) -> dict[str, int]:
    """Return the bytes that each part allocates, freed again or not."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    found = {}
    for part, run in parts:
        with profile(activities=activities, profile_memory=True) as profiler:
            run()
        # An operator's own sum leaves out what it frees before it ends, so the allocator's events are read.
        events = profiler.profiler.kineto_results.events()
        found[part] = sum(max(0, event.nbytes()) for event in events if event.name() == "[memory]")
    return found | {"total": sum(found.values())}


def _print(found: dict[str, Any], seconds: Samples, optimizers: dict[str, list[Part]]) -> None:
    rows = []
    for name in seconds:
        for part, times in found["seconds"][name].items():
            if part == "run" or (part == "step" and "sample" not in found["seconds"][name]):
                continue  # the total alone
            row = [f"{name}: {part}", *(f"{1000 * times[key]:.2f}" for key in ("median", "q1", "q3", "min"))]
            ratios = found["ratio_to"][BASE].get(name)
            if part == "total" and ratios:
                row += [f"{ratios[key]:.2f}" for key in ("of_medians", "median_of_rounds", "of_minima")]
            else:
                row += ["1.00" if name == BASE else ""] * 3
            if name in optimizers:
                row += [
                    f"{found['allocated_bytes'][name][part] / 2**20:.3f}",
                    f"{found['page_faults'][name][part]:.0f}",
                ]
            rows.append([*row, *[""] * (10 - len(row))])
    columns = ["ms", "median", "q1", "q3", "min", f"/ {BASE}", "by round", "by min", "MB allocated", "page faults"]
    print_table("Sample and step", columns, rows)
    limits = found["limits"]
    rows = [
        [
            f"{MEASURED[name]}: {part}",
            f"{limits['bytes_moved'][name][part] / 1e6:.1f}",
            f"{1000 * spent:.2f}",
            f"{1000 * found['seconds'][MEASURED[name]][part]['median']:.2f}",
            f"{limits['measured_over_traffic'][name][part]:.2f}",
            f"{1000 * limits['noise_seconds']['median']:.2f}" if name == "IVON" else "",
        ]
        for name, parts in limits["traffic_seconds"].items()
        for part, spent in parts.items()
    ]
    bandwidth = max(limits["bytes_per_second"].values())
    title = f"Limit by memory traffic at {bandwidth / 1e9:.1f} GB/s (read and write)"
    print_table(title, ["", "MB moved", "ms", "measured", "measured / limit", "its noise alone"], rows)
    drawn = 1000 * limits["normal_seconds"]["median"]
    print(f"Limit by drawing: normal_ on one thread takes {drawn:.2f} ms; {torch.get_num_threads()} threads share it.")


if __name__ == "__main__":
    main()
