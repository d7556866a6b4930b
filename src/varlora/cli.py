"""The command line: train, evaluate, predict, report, ls, validate, demo."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from varlora import __version__
from varlora.errors import VarloraError

__all__ = ["main"]

EXAMPLES = """\
examples:
  varlora demo
  varlora train --task winogrande_s --data-dir data --model meta-llama/Llama-3.2-1B --method ivon
  varlora train recipes/llama2-7b/boolq/ivon.yaml --seed 21 42 87 --set method.ess=1e7
  varlora evaluate runs/boolq-Llama-2-7b-hf-ivon-seed21
  varlora report runs/* --out report
"""
TRAIN_EXAMPLES = """\
examples:
  varlora train --task my-task.yaml --model my-model/ --steps 1000
  varlora train recipes/llama2-7b/arc_easy/ivon.yaml --data-dir data --seed 21 42 87
  varlora train --task boolq --model my-model/ --set lora.rank=16 method.lr=0.1 training_arguments.bf16=true
  varlora train --resume --run-dir runs/boolq-my-model-ivon-seed0
"""
PREDICT_EXAMPLES = """\
examples:
  varlora predict runs/my-run --input questions.jsonl --output answers.jsonl
  echo '{"sentence": "a fine film"}' | varlora predict runs/my-run
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; left out: those of the process.

    Returns:
        Exit status: 0, 1 for wrong input, 130 when interrupted.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = _parser().parse_args(argv)
    console = Console(stderr=arguments.command == "predict")  # predictions go to standard output
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            _quiet_libraries()
            arguments.run(arguments, console)
    except VarloraError as error:
        from varlora.fit import Interrupted

        interrupted = isinstance(error, Interrupted)
        console.print(Text(str(error) if interrupted else f"error: {error}", style="red"), soft_wrap=True)
        return 130 if interrupted else 1
    except KeyboardInterrupt:
        console.print("Interrupted.")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of our output has left
        return 1
    return 0


def _speaker(console: Console) -> Callable[[str], None]:
    """Return a function that prints a text as it is: no markup, no line breaks within a path or a command."""
    return lambda text: console.print(Text(text), soft_wrap=True)


def _quiet_libraries() -> None:
    import transformers

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of kernels that are missing on a CPU
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


# --- verbs -----------------------------------------------------------------------------------------------------------


def _train(arguments: argparse.Namespace, console: Console) -> None:
    from varlora.config import load_settings
    from varlora.progress import TrainingProgress
    from varlora.workflow import resume_run, train

    def callbacks(name: str) -> list[Any]:
        return [TrainingProgress(console, name)]

    say = _speaker(console)
    run_dir = Path(arguments.run_dir) if arguments.run_dir else None
    if arguments.resume and run_dir and (run_dir / "config.json").is_file():
        done = [resume_run(run_dir, say=say, callbacks=callbacks(run_dir.name))]
    else:
        done = []
        seeds = arguments.seed or [None]
        for seed in seeds:
            own_dir = run_dir / f"seed{seed}" if run_dir and len(seeds) > 1 else run_dir
            overrides = {name: getattr(arguments, name) for name in TRAIN_OPTIONS}
            overrides |= {"seed": seed, "run_dir": own_dir}
            settings = load_settings(arguments.recipe, overrides, arguments.set)
            say(f"Training {settings.method} on {settings.task} with {settings.model}, seed {settings.seed}.")
            done.append(
                train(
                    settings,
                    resume=arguments.resume,
                    overwrite=arguments.overwrite,
                    say=say,
                    callbacks=callbacks(settings.method),
                )
            )
    for folder in done:
        say(f"The adapter and its posterior are in {folder}/adapter.")
    say(f"Next: varlora evaluate {' '.join(map(str, done))}")


def _evaluate(arguments: argparse.Namespace, console: Console) -> None:
    from varlora.progress import rows_progress
    from varlora.workflow import evaluate

    say = _speaker(console)
    table = Table("run", "split", "rows", "draws", "ACC %", "ECE x100", "NLL", "Brier")
    for run_dir in arguments.runs:
        results = evaluate(
            run_dir,
            split=arguments.split,
            samples=arguments.samples,
            tau=arguments.tau,
            seed=arguments.seed,
            token_budget=arguments.token_budget,
            data_dir=arguments.data_dir,
            model=arguments.model,
            say=say,
            progress=rows_progress(console, "evaluate"),
        )
        for key, draws in (("mean", "mean"), ("draws", str(results["samples"]))):
            if numbers := results.get(key):
                cells = [100 * numbers["accuracy"], 100 * numbers["ece"], numbers["nll"], numbers["brier"]]
                texts = [f"{cells[0]:.1f}", f"{cells[1]:.1f}", f"{cells[2]:.3f}", f"{cells[3]:.3f}"]
                table.add_row(Text(str(run_dir)), results["split"], str(results["rows"]), draws, *texts)
    console.print(table)
    say(f"Written: predictions.safetensors and metrics.json in {' '.join(map(str, arguments.runs))}")
    say(f"Next: varlora report {' '.join(map(str, arguments.runs))}")


def _predict(arguments: argparse.Namespace, console: Console) -> None:
    from varlora.run import write_text
    from varlora.tasks import get_task, make_examples, parse_rows
    from varlora.workflow import answer_rows, load

    say = _speaker(console)
    source = "standard input" if arguments.input == "-" else arguments.input
    suffix = f".{arguments.format}" if arguments.format else ".jsonl" if arguments.input == "-" else Path(source).suffix
    try:
        lines = sys.stdin.buffer.readlines() if arguments.input == "-" else Path(source).read_bytes().splitlines(True)
    except OSError as error:
        raise VarloraError(f"Expected rows in {source}, but it cannot be read ({error.strerror}).") from error
    loaded = load(arguments.run_dir, model=arguments.model)
    task = get_task(loaded.settings.task)
    rows = make_examples(task, parse_rows(lines, suffix), source, labelled=False, skip_bad_rows=arguments.skip_bad_rows)
    if rows.skipped:
        say(f"{rows.skipped} malformed rows were left out; the first: {rows.problems[0]}")
    if not rows.examples:
        raise VarloraError(f"Expected rows in {source}, but there are none. Each row is a line in the task's schema.")
    answers = answer_rows(
        loaded, rows.examples, samples=arguments.samples, tau=arguments.tau, seed=arguments.seed, say=say
    )
    text = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    if arguments.output == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        write_text(Path(arguments.output), text)
        say(f"{len(rows.examples)} rows are in {arguments.output}.")


def _report(arguments: argparse.Namespace, console: Console) -> None:
    from varlora.report import build_report, to_table

    report = build_report(arguments.runs, arguments.out)
    console.print(to_table(report))
    say = _speaker(console)
    for note in report.notes:
        say(note)
    for skipped in report.skipped:
        say(f"left out: {skipped.run}: {skipped.reason}")
    say(f"Written: {', '.join(str(path) for path in report.files.values())}")


def _ls(arguments: argparse.Namespace, console: Console) -> None:
    say = _speaker(console)
    for name in [arguments.what] if arguments.what else list(LISTS):
        console.print(Text(name, style="bold"))
        for line in LISTS[name]():
            say(f"  {line}")


def _list_tasks() -> list[str]:
    from varlora.tasks import TASKS

    return [f"{name:16} splits {', '.join(task.files)}; reported on {task.evaluation}" for name, task in TASKS.items()]


def _list_methods() -> list[str]:
    from varlora.methods import METHODS

    return [f"{name:16} {(method.__doc__ or '').splitlines()[0]}" for name, method in METHODS.items()]


def _list_recipes() -> list[str]:
    return [str(path) for path in sorted(Path("recipes").rglob("*.yaml"))] or ["none under recipes/"]


def _list_runs() -> list[str]:
    lines = []
    for config in sorted(Path("runs").rglob("config.json")):
        folder = config.parent
        states = {"adapter": "trained", "metrics.json": "evaluated"}
        found = [word for name, word in states.items() if (folder / name).exists()]
        steps = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
        lines.append(f"{folder}  {', '.join(found) or (f'at step {steps[-1]}' if steps else 'not started')}")
    return lines or ["none under runs/"]


LISTS = {"tasks": _list_tasks, "methods": _list_methods, "recipes": _list_recipes, "runs": _list_runs}


def _validate(arguments: argparse.Namespace, console: Console) -> None:
    from varlora.config import load_settings
    from varlora.workflow import validate

    overrides = {name: getattr(arguments, name) for name in TRAIN_OPTIONS}
    settings = load_settings(arguments.recipe, overrides, arguments.set)
    for line in validate(settings):
        _speaker(console)(line)


def _demo(arguments: argparse.Namespace, console: Console) -> None:
    from varlora.demo import run_demo

    run_demo(Path(arguments.out), quick=arguments.quick, seed=arguments.seed, console=console)


# --- arguments -------------------------------------------------------------------------------------------------------

TRAIN_OPTIONS = (
    "task", "model", "method", "data_dir", "steps", "batch_size", "accumulation", "quantization", "dtype", "max_length",
    "calibration_fraction", "checkpoint_every", "row_filter", "skip_bad_rows", "chat",
)  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="varlora",
        description="Fine-tune a language model with LoRA and keep a posterior over the adapter.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"varlora {__version__}")
    verbs = parser.add_subparsers(dest="command", required=True, metavar="command")

    def verb(name: str, run: Any, summary: str, examples: str = "") -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    train = verb("train", _train, "Fine-tune an adapter and keep its posterior.", TRAIN_EXAMPLES)
    _settings_arguments(train)
    train.add_argument("--run-dir", help="where to write; with several seeds, a folder for each goes into it")
    train.add_argument("--seed", type=int, nargs="+", help="one run for each seed")
    train.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    train.add_argument("--overwrite", action="store_true", help="replace an existing run")

    evaluate = verb("evaluate", _evaluate, "Predict a split's rows with trained runs, and print the metrics.")
    evaluate.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    evaluate.add_argument("--split", help="split to report on (default: the task's own; also: calibration)")
    _draw_arguments(evaluate)
    evaluate.add_argument("--token-budget", type=int, default=4096, help="tokens a batch (default: 4096)")
    evaluate.add_argument("--data-dir", help="where the data lie now, if not where they were")

    predict = verb("predict", _predict, "Answer questions: JSON lines with probabilities.", PREDICT_EXAMPLES)
    predict.add_argument("run_dir", type=Path, metavar="RUN", help="a run directory")
    predict.add_argument("--input", default="-", help="file with rows in the task's schema (default: standard input)")
    predict.add_argument("--output", default="-", help="file to write (default: standard output)")
    predict.add_argument("--format", choices=("jsonl", "csv", "tsv"), help="format of the rows (default: by the name)")
    predict.add_argument("--skip-bad-rows", action="store_true", help="leave out malformed rows and count them")
    _draw_arguments(predict)

    report = verb("report", _report, "Make a table and a reliability diagram from evaluated runs.")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    report.add_argument("--out", type=Path, default=Path("report"), help="folder to write (default: report)")

    ls = verb("ls", _ls, "List tasks, methods, recipes and runs.")
    ls.add_argument("what", nargs="?", choices=tuple(LISTS), help="what to list (default: all)")

    validate = verb("validate", _validate, "Check settings, data and answers without training.")
    _settings_arguments(validate)

    demo = verb("demo", _demo, "Run AdamW and IVON on a small generated task, and compare them.")
    demo.add_argument("--out", default="runs/demo", help="folder to write (default: runs/demo)")
    demo.add_argument("--quick", action="store_true", help="fewer steps: to see that it works")
    demo.add_argument("--seed", type=int, default=0, help="seed (default: 0)")
    return parser


def _settings_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", type=Path, help="a YAML file of settings; the options below win over it")
    parser.add_argument("--task", help="a task's name (see `varlora ls tasks`), or a task file for your own data")
    parser.add_argument("--model", help="the base model: a folder, or a name on the hub")
    parser.add_argument("--method", help="how to reach a posterior (see `varlora ls methods`; default: ivon)")
    parser.add_argument("--data-dir", help="folder with the task's files (default: from the hub)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 10000)")
    parser.add_argument("--batch-size", type=int, help="rows a micro-batch (default: 4)")
    parser.add_argument("--accumulation", type=int, help="micro-batches a step (default: 1)")
    parser.add_argument("--dtype", help="type of the base's weights (default: float32)")
    parser.add_argument("--quantization", help="keep the base in 8bit or 4bit")
    parser.add_argument("--max-length", type=int, help="longest prompt in tokens (default: the model's context)")
    parser.add_argument("--calibration-fraction", type=float, help="share of training rows held out (default: 0.1)")
    parser.add_argument("--checkpoint-every", type=int, help="steps between checkpoints (default: 500)")
    for flag, text in (
        ("--row-filter", "keep only the rows that the paper keeps"),
        ("--skip-bad-rows", "leave out malformed rows and count them"),
        ("--chat", "put prompts through the tokenizer's chat template"),
    ):
        parser.add_argument(flag, action="store_true", default=None, help=text)
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="any setting, e.g. method.ess=1e6 lora.rank=16"
    )


def _draw_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=10, help="posterior draws; 0: only the mean (default: 10)")
    parser.add_argument("--tau", type=float, default=1.0, help="factor of the posterior variance (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    parser.add_argument("--model", help="where the base lies now, if not where it was")


if __name__ == "__main__":
    sys.exit(main())
