"""The demo: fine-tune the bundled base with AdamW and with IVON, compare, and say in plain words what happens."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from varlora import __version__, metrics
from varlora.config import Settings, settings_from
from varlora.data import encode_all
from varlora.demo.base import BUNDLED, TASKS, load
from varlora.errors import VarloraError, did_you_mean
from varlora.evaluation import evaluate
from varlora.files import read_json, write_json
from varlora.params import trainable
from varlora.posterior import Point
from varlora.predict import predict
from varlora.progress import TrainingProgress, rows_progress
from varlora.report import Report, build_report
from varlora.results import Row
from varlora.tasks import Example, get_task, load_rows
from varlora.training import train

__all__ = ["METHOD_SETTINGS", "SETTINGS", "one_thread", "run_demo", "train_and_evaluate", "zero_shot"]

MARKER = "demo.json"
PARTS = ("base", "tasks", "runs", "report")
DRAWS = 10

SETTINGS: dict[str, Any] = {"batch_size": 8, "steps": 2000, "calibration_fraction": 0.0}
METHOD_SETTINGS: dict[str, dict[str, float]] = {
    "adamw": {"lr": 1e-3},
    "ivon": {"lr": 0.5, "ess": 1e6, "hess_init": 2e-4},  # σ₀ = 1/√(ess · hess_init) = 0.07
}
QUICK_STEPS = 60

PAPER = {"adamw": (76.1, 21.8, 2.24), "ivon@mean": (78.9, 17.2, 1.60), "ivon x10": (77.8, 10.6, 1.11)}
"""ACC in %, ECE x100 and NLL of Llama-2-7B, averaged over the paper's six tasks (Cong et al. 2024)."""
NAMES = {"adamw": "AdamW", "ivon@mean": "IVON@mean", f"ivon x{DRAWS}": f"IVON x{DRAWS}"}


def run_demo(
    out_dir: Path,
    *,
    task: str = TASKS[0],
    quick: bool = False,
    seed: int = 0,
    console: Console | None = None,
) -> Report:
    """Fine-tune, evaluate and report with AdamW and IVON on the bundled base, and say in plain words what happens.

    Args:
        out_dir: folder for everything; an earlier demo in it is replaced, any other folder is refused.
        task: one of `varlora.demo.TASKS`.
        quick: a check that everything works, in seconds: too short to compare the methods.
        seed: of the adapter, of the order of rows and of the draws.
        console: where to write; None: the terminal.

    Returns:
        The report, whose files are in `out_dir/report`.

    Raises:
        VarloraError: no such task, or `out_dir` holds something else than an earlier demo.
    """
    if task not in TASKS:
        raise VarloraError(f"Expected `task` to be a task of the demo, but got `{task}`. {did_you_mean(task, TASKS)}")
    started = time.monotonic()
    console = console or Console()
    say, whisper = _say(console), _say(console, "dim")
    _prepare(out_dir, quick, seed)
    base, tasks, runs = out_dir / "base", out_dir / "tasks", out_dir / "runs"
    for source, target in ((BUNDLED / "base", base), (BUNDLED / "tasks", tasks)):
        shutil.copytree(source, target)

    console.rule("1  A base model that knows something")
    console.print(
        "With varlora comes a small Llama (0.9 million parameters), pretrained from nothing on texts about a made-up "
        "world: the color, home, craft, food, animal and tool of 160 people. [bold]30 % of these facts stood in no "
        "text[/bold], so nobody can know them, and the data say which."
    )
    whisper(str(base))

    console.rule("2  A task")
    train_rows, dev_rows = (load_rows(get_task(tasks / f"{task}.yaml"), split).examples for split in ("train", "dev"))
    console.print(
        f"{len(train_rows)} questions to learn from and {len(dev_rows)} about other facts to be tested on, in one of "
        "the paper's formats. The first of each kind:"
    )
    for name in ("told", "never told"):
        example = next(example for example in dev_rows if example.slice == name)
        say(f"  {name}: {example.prompt} {example.answers[example.label or 0]}")
    before, chance = zero_shot(dev_rows)["accuracy"], sum(1 / len(row.answers) for row in dev_rows) / len(dev_rows)
    console.print(
        f"Before fine-tuning the base is right in {before:.0%}; guessing is right in {chance:.0%}. It knows, and "
        "has yet to learn what such a question wants."
    )
    whisper(str(tasks / f"{task}.yaml"))

    console.rule("3  AdamW: one set of weights")
    common = SETTINGS | {"task": str(tasks / f"{task}.yaml"), "model": str(base), "seed": seed}
    if quick:
        common["steps"] = QUICK_STEPS
    settings = {
        method: settings_from({**common, "method": {"name": method, **own}, "run_dir": str(runs / method)})
        for method, own in METHOD_SETTINGS.items()
    }
    console.print(
        f"LoRA adapters of rank {settings['adamw'].lora.rank}, {common['steps']} steps. AdamW looks for the one "
        "adapter that fits the training answers best; trained long, it learns by heart what it cannot know, and is "
        "sure of itself wherever it is asked."
    )
    whisper(train_and_evaluate(settings["adamw"], console))

    console.rule("4  IVON: a mean and a variance for every weight")
    sigma = 1 / math.sqrt(METHOD_SETTINGS["ivon"]["ess"] * METHOD_SETTINGS["ivon"]["hess_init"])
    console.print(
        f"The same rows and as many steps, but each gradient is taken at a random draw from a Gaussian around the "
        f"adapter (σ about {sigma:.2g}). What holds at a single point only, such as an answer learned by heart, "
        f"survives that less easily. To predict, the probabilities of {DRAWS} draws are averaged: where they disagree, "
        "the answer becomes less certain."
    )
    whisper(train_and_evaluate(settings["ivon"], console))

    console.rule("5  What came out")
    report = build_report([runs / "adamw", runs / "ivon"], out_dir / "report")
    rows = {row.label: row for row in report.rows}
    console.print(_table(rows))
    console.print(_in_words(rows, chance, quick))
    question = json.loads(_first_line(tasks / f"{task}.dev.jsonl"))
    say(f"\nReport: {report.files['report.html']} (open it in a browser), and as report.md with pictures")
    say(f"Ask the model: echo '{json.dumps(question)}' | varlora predict {shlex.quote(str(runs / 'ivon'))}")
    say(f"Your own data and model (take {tasks / f'{task}.yaml'} as a pattern):")
    say("  varlora train --task my-task.yaml --model path/to/my-model --method ivon")
    whisper(f"All of this took {time.monotonic() - started:.0f} s.")
    return report


def zero_shot(examples: Sequence[Example]) -> dict[str, float]:
    """Return accuracy, nll, ece and brier of the base with a fresh adapter, which changes nothing."""
    demo = load()
    rows = encode_all(demo.tokenizer, examples).rows
    point = Point({name: p.detach().clone() for name, p in trainable(demo.model).items()})
    with one_thread():
        found = predict(demo.model, point, rows, pad_token_id=demo.tokenizer.pad_token_id, samples=0)
    return metrics.evaluate(found.probs_mean, found.labels)


def train_and_evaluate(settings: Settings, console: Console) -> str:
    """Do what `varlora train` and `varlora evaluate` do, going on where it was stopped; return where and how long."""
    started = time.monotonic()
    with one_thread():
        run_dir = train(
            settings,
            resume=settings.folder.exists(),
            say=_say(console),
            callbacks=[TrainingProgress(console, settings.method)],
        )
        if not (run_dir / "metrics.json").is_file():
            evaluate(
                run_dir,
                samples=DRAWS,
                seed=settings.seed,
                token_budget=16384,
                say=_say(console),
                progress=rows_progress(console, "evaluating"),
            )
    return f"{run_dir}, {time.monotonic() - started:.0f} s"


def _say(console: Console, style: str = "") -> Callable[[str], None]:
    """Return a function that prints a text as it is: no markup, no line breaks within a path or a command."""
    return lambda text: console.print(Text(text, style=style), soft_wrap=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: matrices this small only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline()


def _table(rows: Mapping[str, Row]) -> Table:
    """Return the demo's numbers beside the paper's."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name, style in (("", ""), ("ACC %", ""), ("ECE x100", ""), ("NLL", ""), ("Llama-2-7B:", "dim")):
        table.add_column(name, justify="right" if name else "left", style=style)
    for name in ("ACC %", "ECE x100", "NLL"):
        table.add_column(name, justify="right", style="dim")
    for label, (paper_acc, paper_ece, paper_nll) in PAPER.items():
        acc, ece, nll = (rows[label].stats[metric].mean for metric in ("accuracy", "ece", "nll"))
        here = (f"{100 * acc:.1f}", f"{100 * ece:.1f}", f"{nll:.2f}")
        paper = (f"{paper_acc:.1f}", f"{paper_ece:.1f}", f"{paper_nll:.2f}")
        table.add_row(NAMES[label], *here, "", *paper)
    return table


def _in_words(rows: Mapping[str, Row], chance: float, quick: bool) -> str:
    """Say what the numbers say."""

    def believes(label: str) -> str:
        part = next(part for part in rows[label].slices if part.name == "never told")
        return f"{part.stats['confidence'].mean:.0%} sure and right in {part.stats['accuracy'].mean:.0%}"

    text = (
        "ECE: by how much stated confidence and the share of right answers differ. NLL: what wrong certainty costs. "
        "Lower is better for both. Llama-2-7B: the paper's averages over its six tasks, for orientation.\n"
        f"Where the base was never told the fact, there is nothing to know, and {chance:.0%} is all that an honest "
        f"model is sure of. There AdamW is on average {believes('adamw')}; IVON with {DRAWS} draws is "
        f"{believes(f'ivon x{DRAWS}')}."
    )
    if quick:
        return text + "\nThis was the quick demo: it shows that all works, and is too short to compare the methods."
    adamw, ivon = rows["adamw"].stats, rows[f"ivon x{DRAWS}"].stats
    better = ivon["ece"].mean < adamw["ece"].mean and ivon["nll"].mean < adamw["nll"].mean
    return text + (
        "\nAs in the paper, IVON's averaged draws are better calibrated than AdamW trained as long. (A smaller "
        "learning rate brings AdamW near IVON's mean, but not to its draws: docs/demo.md has the figures.)"
        if better
        else "\nUnlike in the paper, IVON is not better calibrated here: its settings do not suit this seed."
    )


def _prepare(out_dir: Path, quick: bool, seed: int) -> None:
    """Make the folder; of an earlier demo, delete what it wrote and nothing else."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        if not (out_dir / MARKER).is_file() or "varlora_demo" not in str(read_json(out_dir / MARKER)):
            raise VarloraError(
                f"{out_dir} exists and holds no earlier demo (no {MARKER}), so it is not replaced. Choose another."
            )
        for part in PARTS:
            shutil.rmtree(out_dir / part, ignore_errors=True)
    write_json(out_dir / MARKER, {"varlora_demo": __version__, "quick": quick, "seed": seed})
