"""The demo: AdamW and IVON on a small generated task, from nothing to a report, without a network.

Until a pretrained base comes with varlora, the base is a small Llama with random weights. The task is one that such a
base can learn: reviews in an invented language whose words are hidden praise or blame. One label in ten is wrong, and
some words occur in the evaluation only, so nobody can be sure of every answer: who says so nevertheless is
overconfident, and pays for it in calibration error and likelihood.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from varlora import __version__, metrics
from varlora.config import Settings, settings_from
from varlora.errors import VarloraError
from varlora.progress import TrainingProgress, rows_progress
from varlora.report import Report, Row, build_report
from varlora.run import read_json, write_json, write_text
from varlora.workflow import evaluate, train

__all__ = ["run_demo", "write_base", "write_task"]

MARKER = "demo.json"
PARTS = ("base", "data", "runs", "report")
DRAWS = 10

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
PROMPT = "Review: {review}\nGood or bad? Answer:"
PROMPT_WORDS = ("Review", ":", "Good", "or", "bad", "?", "Answer", "good")
KNOWN, NEW = 40, 4  # words that occur in training, and words that do not
NOISE = 0.1  # share of wrong labels, in training and in evaluation

SETTINGS: dict[str, Any] = {
    "batch_size": 8,
    "calibration_fraction": 0.0,
    # A random base has nothing to bring out, so every linear layer is adapted; on a pretrained one q and v suffice.
    "lora": {"targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
}
METHOD_SETTINGS: dict[str, dict[str, float]] = {
    # 3e-3 is no more accurate and worse calibrated, 1e-2 unstable. Stopped after a quarter of the steps, AdamW at 3e-3
    # is about as accurate as IVON and better calibrated than here, but less so than IVON's averaged draws.
    "adamw": {"lr": 1e-3},
    "ivon": {"lr": 0.5, "ess": 1e6, "hess_init": 4e-4},  # σ₀ = 1/√(ess · hess_init) = 0.05
}
STEPS, TRAIN, DEV = 1000, 500, 1000  # training steps, training rows, evaluation rows
QUICK_STEPS, QUICK_TRAIN, QUICK_DEV = 60, 200, 200

PAPER = {"adamw": (76.1, 21.8, 2.24), "ivon@mean": (78.9, 17.2, 1.60), "ivon x10": (77.8, 10.6, 1.11)}
"""ACC in %, ECE x100 and NLL of Llama-2-7B, averaged over the paper's six tasks (Cong et al. 2024)."""
NAMES = {"adamw": "AdamW", "ivon@mean": "IVON@mean", f"ivon x{DRAWS}": f"IVON x{DRAWS}"}


def run_demo(out_dir: Path, *, quick: bool = False, seed: int = 0, console: Console | None = None) -> Report:
    """Make a base and a task, train, evaluate and report with AdamW and IVON, and say in plain words what happens.

    Args:
        out_dir: folder for everything; an earlier demo in it is replaced, any other folder is refused.
        quick: a check that everything works, in seconds: too short to compare the methods.
        seed: of base, task and training.
        console: where to write; None: the terminal.

    Returns:
        The report, whose files are in `out_dir/report`.

    Raises:
        VarloraError: `out_dir` holds something else than an earlier demo.
    """
    started = time.monotonic()
    console = console or Console()
    say, whisper = _say(console), _say(console, "dim")
    _prepare(out_dir, quick, seed)
    base, data, runs = out_dir / "base", out_dir / "data", out_dir / "runs"

    console.rule("1  A base model, at random")
    console.print(
        "No pretrained model comes with varlora yet, so this demo starts from a small Llama with [bold]random "
        "weights[/bold]. It knows no language, and its numbers say nothing about pretrained models. Everything around "
        "it is real: the training, prediction and report that a model of yours goes through."
    )
    write_base(base, seed)
    whisper(str(base))

    console.rule("2  A task that leaves room for doubt")
    train_rows, dev_rows = (QUICK_TRAIN, QUICK_DEV) if quick else (TRAIN, DEV)
    task = write_task(data, seed, train=train_rows, dev=dev_rows)
    first = json.loads((data / "train.jsonl").read_text(encoding="utf-8").partition("\n")[0])
    console.print(
        f'{train_rows} reviews in an invented language to learn from, such as "{first["review"]}" -> {first["label"]}, '
        f"and {dev_rows} others to be tested on. Each word is praise or blame to a hidden degree; their sum decides. "
        f"{NOISE:.0%} of the labels are wrong, and {NEW} of the {KNOWN + NEW} words occur in the test only: the best "
        "answer is often a probability, and to be certain is a mistake."
    )
    whisper(str(task))

    console.rule("3  AdamW: one set of weights")
    steps = QUICK_STEPS if quick else STEPS
    common = SETTINGS | {"task": str(task), "model": str(base), "seed": seed, "steps": steps}
    settings = {
        method: settings_from({**common, "method": {"name": method, **own}, "run_dir": str(runs / method)})
        for method, own in METHOD_SETTINGS.items()
    }
    console.print(
        f"LoRA adapters of rank {settings['adamw'].lora.rank}, {steps} steps. AdamW looks for the one adapter that "
        "fits the training labels best; given time, it fits the wrong ones too and is sure of them."
    )
    whisper(_train_and_evaluate(settings["adamw"], console))

    console.rule("4  IVON: a mean and a variance for every weight")
    sigma = 1 / math.sqrt(METHOD_SETTINGS["ivon"]["ess"] * METHOD_SETTINGS["ivon"]["hess_init"])
    console.print(
        f"The same rows and as many steps, but each gradient is taken at a random draw from a Gaussian around the "
        f"adapter (σ about {sigma:.2g}). A fit that holds at a single point only does not survive that. To predict, "
        f"the probabilities of {DRAWS} draws are averaged: where they disagree, the answer becomes less certain."
    )
    whisper(_train_and_evaluate(settings["ivon"], console))

    console.rule("5  What came out")
    report = build_report([runs / "adamw", runs / "ivon"], out_dir / "report")
    rows = {row.label: row for row in report.rows}
    console.print(_table(rows))
    console.print(_in_words(rows, data / "dev.jsonl", quick))
    say(f"\nReport: {report.files['report.md']}, diagram: {report.files['reliability.png']}")
    say(f'Ask the model: echo \'{{"review": "{first["review"]}"}}\' | varlora predict {runs / "ivon"}')
    say(f"Your own data and model (take {task} as a pattern):")
    say("  varlora train --task my-task.yaml --model path/to/my-model --method ivon")
    whisper(f"All of this took {time.monotonic() - started:.0f} s.")
    return report


def write_base(folder: Path, seed: int) -> None:
    """Write a small Llama with random weights and a tokenizer that knows the demo's words.

    Args:
        folder: folder to write to.
        seed: of the weights, and of the words.
    """
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *PROMPT_WORDS, *_words(random.Random(seed))))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.1,  # at the usual 0.02 the answers' logits could hardly differ
        pad_token_id=vocabulary["<pad>"],
        bos_token_id=vocabulary["<s>"],
        eos_token_id=vocabulary["</s>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)


def write_task(folder: Path, seed: int, *, train: int, dev: int) -> Path:
    """Write train.jsonl, dev.jsonl and the task file reviews.yaml; the same seed gives the same bytes.

    Args:
        folder: folder to write to, made if absent.
        seed: of words, their hidden values, reviews and label noise.
        train: training rows, of known words only.
        dev: evaluation rows, of all words.

    Returns:
        The task file.
    """
    generator = random.Random(seed)
    words = _words(generator)
    value = {word: generator.gauss(0, 1) for word in words}
    for split, rows, known in (("train", train, words[:KNOWN]), ("dev", dev, words)):
        lines = []
        for _ in range(rows):
            review = generator.choices(known, k=generator.randint(3, 6))
            good = sum(value[word] for word in review) > 0
            wrong = generator.random() < NOISE
            row = {
                "review": " ".join(review),
                "label": "good" if good != wrong else "bad",
                "new_words": sum(word in words[KNOWN:] for word in review),
            }
            lines.append(json.dumps(row) + "\n")
        write_text(folder / f"{split}.jsonl", "".join(lines))
    task = folder / "reviews.yaml"
    write_text(
        task,
        "# A task of your own needs no more than this and the files that it names.\n"
        f"name: reviews\nprompt: {json.dumps(PROMPT)}\nlabel: label\nanswers: [bad, good]\n"
        "files: {train: train.jsonl, dev: dev.jsonl}\n",
    )
    return task


def _words(generator: random.Random) -> list[str]:
    """Invent the words of the reviews; those from number `KNOWN` on never occur in training."""
    words: dict[str, None] = {}  # keeps the order
    while len(words) < KNOWN + NEW:
        word = "".join(generator.choice("bdfklmnrstv") + generator.choice("aeiou") for _ in range(2))
        words[word] = None
    return list(words)


def _train_and_evaluate(settings: Settings, console: Console) -> str:
    """Do what `varlora train` and `varlora evaluate` do; return where and how long."""
    started = time.monotonic()
    with _one_thread():
        run_dir = train(settings, say=_say(console), callbacks=[TrainingProgress(console, settings.method)])
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
def _one_thread() -> Iterator[None]:
    """Compute on one thread: matrices this small only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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


def _in_words(rows: Mapping[str, Row], dev: Path, quick: bool) -> str:
    """Say what the numbers say."""
    new = torch.tensor([json.loads(line)["new_words"] > 0 for line in dev.read_text(encoding="utf-8").splitlines()])

    def claims(label: str) -> str:
        """How sure of itself, and how right, where a word is new."""
        run = rows[label].runs[0].predictions
        probs = (run.probs if rows[label].draws else run.probs_mean)[new]
        sure, right = probs.amax(dim=1).mean(), metrics.accuracy(probs, run.labels[new])
        return f"{sure:.0%} sure on average and right in {right:.0%}"

    text = (
        "ECE: by how much stated confidence and the share of right answers differ. NLL: what wrong certainty costs. "
        "Lower is better for both. Llama-2-7B: the paper's averages over its six tasks, for orientation.\n"
        f"On the {int(new.sum())} reviews with a word that training never showed, AdamW is {claims('adamw')}; IVON "
        f"with {DRAWS} draws is {claims('ivon x10')}."
    )
    if quick:
        return text + "\nThis was the quick demo: it shows that all works, and is too short to compare the methods."
    adamw, ivon = rows["adamw"].stats, rows["ivon x10"].stats
    better = ivon["ece"].mean < adamw["ece"].mean and ivon["nll"].mean < adamw["nll"].mean
    return text + (
        "\nAs in the paper, IVON's averaged draws are better calibrated than AdamW."
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
