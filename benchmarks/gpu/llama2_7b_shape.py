"""The paper's overhead measurement at the true shape of Llama-2-7B, with random weights and without a download.

A random Llama of this shape is written to a temporary folder (13.5 GB) and loaded as any base is, in bfloat16 and in
8 bit (LLM.int8), with the paper's adapter: rank 8 and alpha 16 on q_proj and v_proj. `varlora.overhead` then times a
training step with IVON and with AdamW. Beside the times stand the limits: arithmetic at the GPU's peak, and the memory
traffic of the optimizer. `--tiny` shows that all works, on a CPU as well.

    python benchmarks/gpu/llama2_7b_shape.py
    python benchmarks/gpu/llama2_7b_shape.py --tiny --rounds 5 --out tiny.json
"""

from __future__ import annotations

import argparse
import gc
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import count, parser, print_table, set_up, write_result
from optimizer import TRAFFIC

from varlora.model import LoRA, load_model
from varlora.overhead import PAPER_SECONDS, Clock, Overhead, measure_overhead, to_table
from varlora.progress import rows_progress
from varlora.prompt import Encoded

QUANTIZATIONS = {"bfloat16": None, "8bit": "8bit"}
ADAPTER = LoRA(rank=8, alpha=16, targets=("q_proj", "v_proj"))
PEAKS = {
    "H100 PCIe": (756e12, 1513e12),
    "H100 NVL": (835e12, 1671e12),
    "H100": (989e12, 1979e12),
    "H200 NVL": (835e12, 1671e12),
    "H200": (989e12, 1979e12),
    "A100": (312e12, 624e12),
    "RTX 6000 Ada": (364e12, 728e12),
    "L40S": (362e12, 733e12),
}
"""Part of a GPU's name -> operations a second in bfloat16 and in int8, dense, by its data sheet; first match."""
NOTES = [
    "Arithmetic is 2 operations for each weight and token forward, and 2 backward: the base's weights are frozen and "
    "get no gradient. Attention counts the lower half of its matrix. In 8 bit the base's forward pass is at the int8 "
    "peak, all else at the 16-bit peak.",
    "Traffic counts each number of the adapter's state as read or written once, at the bandwidth of a copy on this "
    "device. The adapter's state may fit a GPU's cache, and then the optimizer can be below this limit.",
    "Random weights have no outlier features, which LLM.int8 multiplies apart in 16 bit, so a real base's 8-bit pass "
    "takes longer.",
]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args, started = _arguments(argv), time.monotonic()
    device = torch.device(args.device)
    set_up(args)
    disable_progress_bar()
    config = shape(args.tiny)
    length = args.length or (32 if args.tiny else 320)
    rows = _rows(config, args.batch_size, length, args.seed)
    operations = count_operations(config, args.batch_size, length)
    peaks, bandwidth = _peaks(device), _bandwidth(device)
    measured: dict[str, Any] = {}
    found: dict[str, Any] = {
        "operations": operations,
        "peak_operations_per_second": peaks,
        "bytes_per_second": bandwidth,
        "paper": {
            "seconds": PAPER_SECONDS,
            "share": 1 - PAPER_SECONDS["forward_backward"] / sum(PAPER_SECONDS.values()),
        },
        "notes": NOTES,
        "measured": measured,
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        _save_random(config, Path(folder), device)
        _say(started, "random weights are written")
        for number, precision in enumerate(args.precisions):
            model, tokenizer = load_model(
                folder,
                dtype="bfloat16",
                quantization=QUANTIZATIONS[precision],  # type: ignore[arg-type]
                lora=ADAPTER,
                seed=args.seed,
                device=device,
            )
            _say(started, f"{precision}: loaded")
            left = max(0.0, 60 * args.budget_minutes - (time.monotonic() - started))
            with rows_progress(Console(), precision)(args.rounds) as progress:
                overhead = measure_overhead(
                    model,
                    rows,
                    pad_token_id=tokenizer.pad_token_id,
                    batch_size=args.batch_size,
                    rounds=args.rounds,
                    warmup=args.warmup,
                    seed=args.seed,
                    max_seconds=left / (len(args.precisions) - number),
                    progress=progress,
                )
            _say(started, f"{precision}: {overhead.rounds} rounds")
            base_bytes = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
            limits = _limits(overhead, operations, peaks, bandwidth, quantized=precision == "8bit")
            measured[precision] = {**overhead.to_dict(), "base_bytes": base_bytes, "limits": limits}
            _print(precision, overhead, limits)
            write_result(args.out, "llama2_7b_shape", args, device, **found)  # what comes next may not fit
            del model
            _free(device)
    return found


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__, "llama2_7b_shape")
    made.add_argument("--tiny", action="store_true", help="two layers of width 64, to see that all works")
    made.add_argument(
        "--precisions", nargs="+", choices=list(QUANTIZATIONS), default=list(QUANTIZATIONS), help="(default: both)"
    )
    made.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: %(default)s)"
    )
    made.add_argument("--rounds", type=count, default=100, help="timed rounds, at most (default: %(default)s)")
    made.add_argument("--warmup", type=int, default=5, help="rounds before these (default: %(default)s)")
    made.add_argument("--batch-size", type=count, default=4, help="rows a batch (default: %(default)s)")
    made.add_argument("--length", type=count, help="tokens a row (default: 320; tiny: 32)")
    made.add_argument(
        "--budget-minutes", type=float, default=8.0, help="no round starts after these minutes (default: %(default)s)"
    )
    made.add_argument("--folder", type=Path, help="where the random weights are for a while (default: the system's)")
    args = made.parse_args(argv)
    if args.tiny and args.out == made.get_default("out"):
        made.error("--tiny measures nothing worth keeping: pass --out, so that the result file is not overwritten")
    if not args.tiny and args.device == "cpu":
        made.error("the true shape takes hours on a CPU: run it on a GPU, or pass --tiny")
    return args


def shape(tiny: bool) -> LlamaConfig:
    """Return the shape of Llama-2-7B, or a tiny one."""
    h, inner, layers, heads, vocabulary = (64, 128, 2, 4, 256) if tiny else (4096, 11008, 32, 32, 32000)
    return LlamaConfig(
        hidden_size=h,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )


def _rows(config: LlamaConfig, batch_size: int, length: int, seed: int) -> list[Encoded]:
    """Return random rows for eight batches, all of the same length, with two possible answers each."""
    source = random.Random(seed)
    return [
        Encoded(str(i), tuple(source.randrange(3, config.vocab_size) for _ in range(length)), (3, 4), i % 2, False)
        for i in range(8 * batch_size)
    ]


def _save_random(config: LlamaConfig, folder: Path, device: torch.device) -> None:
    """Write a random model and a tokenizer of three words as `load_model` reads them."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    size, free = sum(p.nbytes for p in model.parameters()), shutil.disk_usage(folder).free
    if size > free:
        raise SystemExit(f"The weights take {size / 1e9:.1f} GB, but {folder} has {free / 1e9:.1f} GB. Pass --folder.")
    model.save_pretrained(folder, max_shard_size="2GB")
    del model
    _free(device)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def _free(device: torch.device) -> None:
    """Give back the memory of a model that was deleted."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- limits ---


def count_operations(config: LlamaConfig, batch_size: int, length: int) -> dict[str, int]:
    """Return the additions and multiplications of a forward and backward pass.

    Nothing before the first layer's query, key and value is trained, so these three matrices, and the A on two of them,
    pass no gradient on; its keys need none at all. The output layer sees one position a row.
    """
    h, layers, rank = config.hidden_size, config.num_hidden_layers, ADAPTER.rank
    tokens = batch_size * length
    first = 3 * h * h  # query, key and value, each (h, h): as many heads for key and value as for query
    weights = layers * (4 * h * h + 3 * h * config.intermediate_size)
    head = h * config.vocab_size
    pairs = layers * 2  # of A (rank, h) and B (h, rank)
    half = batch_size * length**2 * h  # of the scores, or of any of the six products like it
    return {
        "base_forward": 2 * tokens * weights + 2 * batch_size * head,
        "base_backward": 2 * tokens * (weights - first) + 2 * batch_size * head,
        "adapter": tokens * rank * h * (3 * 4 * pairs - 4),
        "attention": (6 * layers - 1) * half,
    }


def _peaks(device: torch.device) -> dict[str, float] | None:
    """Return the device's operations a second, or None where no data sheet is at hand."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = next((speeds for part, speeds in PEAKS.items() if part in name), None)
    return known and dict(zip(("bfloat16", "int8"), known))


def _bandwidth(device: torch.device) -> float:
    """Return the bytes a second that copying 256 MB reads and writes."""
    source, clock = torch.ones(2**26, device=device), Clock(device)
    target = torch.empty_like(source)
    for _ in range(13):
        target.copy_(source)
        clock.mark()
    return 2 * source.nbytes / statistics.median(clock.seconds()[2:])


def _limits(
    overhead: Overhead, operations: dict[str, int], peaks: dict[str, float] | None, bandwidth: float, quantized: bool
) -> dict[str, Any]:
    """Return the least seconds that each part can take on this device; None where its peak is not known."""
    passes = None
    if peaks:
        slow = sum(operations.values()) - operations["base_forward"]
        passes = operations["base_forward"] / peaks["int8" if quantized else "bfloat16"] + slow / peaks["bfloat16"]
    per_number = 4 * overhead.parameters / bandwidth
    adamw, ivon = TRAFFIC["AdamW"], TRAFFIC["IVON"]
    return {
        "adamw": {"forward_backward": passes, "step": adamw["step"] * per_number},
        "ivon": {
            "sampling": ivon["sample"] * per_number,
            "forward_backward": passes,
            "step": ivon["step"] * per_number,
        },
    }


def _print(precision: str, overhead: Overhead, limits: dict[str, Any]) -> None:
    print(f"\n{precision}", flush=True)
    console = Console()
    if not console.is_terminal:
        console.width = 140
    console.print(to_table(overhead))
    rows = []
    for name, parts in limits.items():
        for part, least in parts.items():
            took = overhead.costs[name].median(part)
            known = ["unknown", ""] if least is None else [f"{1000 * least:.3f}", f"{took / least:.1f}"]
            rows.append([f"{name}: {part}", f"{1000 * took:.3f}", *known])
    print_table(f"{precision}: against the limits", ["ms", "measured", "limit", "measured / limit"], rows)


def _say(started: float, what: str) -> None:
    print(f"{time.monotonic() - started:.0f} s: {what}", flush=True)


if __name__ == "__main__":
    main()
