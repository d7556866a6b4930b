"""The command line: one function and one part of the parser for each verb."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from varlora import __version__
from varlora.errors import Interrupted, VarloraError

if TYPE_CHECKING:
    from varlora.config import Settings
    from varlora.drawing import Drawing

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
  varlora train --method laplace_kfac --from runs/boolq-my-model-adamw-seed0
  varlora train --method ensemble --from runs/boolq-my-model-ivon-seed0 runs/boolq-my-model-ivon-seed1
  varlora train --resume --run-dir runs/boolq-my-model-ivon-seed0
"""
TUNE_EXAMPLES = """\
What `train` does first, alone: a short look at model and training rows finds the scale of the noise, and the learning
rate and Hessian that go with it. They are printed, drawn, and written into a recipe.

examples:
  varlora tune --task my-task.yaml --model my-model/ --steps 2000
  varlora tune --task boolq --model my-model/ --learning-rate-like-adamw 5e-5 --out boolq.yaml
  varlora train tuned.yaml
"""
CALIBRATE_EXAMPLES = """\
The factor of the variance, the share of weights pruned, the temperature and the number of draws are chosen together on
the rows that were held out of training, and stored with the adapter; `predict` uses them, `evaluate` shows them.

examples:
  varlora calibrate runs/my-run
  varlora calibrate runs/boolq-*-seed* --samples 32
"""
EVALUATE_EXAMPLES = """\
examples:
  varlora evaluate runs/my-run
  varlora evaluate runs/my-run --split test --samples 50 --tau 0.5
  varlora evaluate runs/boolq-*-seed* --data-dir data
"""
PREDICT_EXAMPLES = """\
examples:
  varlora predict runs/my-run --input questions.jsonl --output answers.jsonl
  echo '{"sentence": "a fine film"}' | varlora predict runs/my-run
"""
SERVE_EXAMPLES = """\
POST a question and its answers to /v1/answer; a page to ask on is at /. docs/serve.md says the rest.

examples:
  varlora serve runs/my-run
  varlora serve runs/my-run --port 0 --risk 0.05 --queue 1024 --batch-tokens 16384
  varlora serve runs/my-run --host 0.0.0.0 --allowed-hosts ask.example.org
"""
REPORT_EXAMPLES = """\
examples:
  varlora report runs/*
  varlora report runs/boolq-* --out report/boolq --compare paper
"""
REPRODUCE_EXAMPLES = """\
table1 compares methods, table2 scales IVON's variance, table3 shows the settings, overhead times the training step.
Done runs are never repeated: the same command goes on where it was stopped, and runs again what failed.

examples:
  varlora reproduce table1 --model my-model/ --tasks boolq openbookqa --seeds 0 1 2 --data-dir data
  varlora reproduce table1 recipes/llama2-7b/table1.yaml --methods adamw ivon --compare paper
  varlora reproduce table2 --model my-model/ --tasks my-task.yaml --set methods.ivon.ess=1e7 --workers 2
  varlora reproduce table1 plan.yaml --launcher ray --address auto --gpus 0.5
  varlora reproduce overhead --model my-model/ --tasks my-task.yaml
"""
LS_EXAMPLES = """\
examples:
  varlora ls
  varlora ls runs
"""
VALIDATE_EXAMPLES = """\
examples:
  varlora validate recipes/llama2-7b/boolq/ivon.yaml --data-dir data
  varlora validate --task my-task.yaml --model my-model/
"""
DEMO_EXAMPLES = """\
examples:
  varlora demo
  varlora demo --task true_or_false --out runs/true-or-false
  varlora demo --quick --out runs/quick
"""
EXPORT_EXAMPLES = """\
Each draw becomes an ordinary PEFT adapter. Beside them lie scripts that serve all of them with vLLM or SGLang, and
client.py, which asks every draw and averages the probabilities.

examples:
  varlora export runs/my-run --to served
  varlora export runs/my-run --samples 10 --seed 1 --to served --no-calibration
  served/serve_vllm.sh & python served/client.py --input served/example.jsonl
"""
PUSH_EXAMPLES = """\
Adapter, posterior, calibration and a model card go into one repository, which plain PEFT loads as an adapter and
`varlora.from_pretrained` with its posterior. Log in by `hf auth login`.

examples:
  varlora push runs/my-run me/my-adapter --private
  varlora push runs/my-run me/my-adapter --base-model meta-llama/Llama-3.2-1B --revision v1
  varlora push runs/my-run me/my-adapter --folder look-first
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; left out: those of the process.

    Returns:
        Exit status: 0, 1 for wrong input, 130 when interrupted.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # where there is no σ, a ? does
    arguments = _parser().parse_args(argv)
    console = Console(stderr=arguments.command == "predict")  # predictions go to standard output
    try:
        with warnings.catch_warnings():
            if arguments.command != "ls":  # which needs no language model
                from varlora.quiet import quiet_libraries

                quiet_libraries()
            arguments.run(arguments, console)
    except Interrupted as error:
        go_on = {
            "demo": "Run the same command to start the demo again.",
            "reproduce": "Run the same command to go on.",
        }.get(arguments.command, "Run the same command with `--resume` (not `--overwrite`) to go on.")
        return _complain(f"{error} {go_on}", 130)
    except VarloraError as error:
        return _complain(f"error: {error}")
    except KeyboardInterrupt:
        return _complain("Interrupted.", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of our output has left
        return 1
    except OSError as error:  # no space, no permission: the message names the file
        return _complain(f"error: {error}")
    except torch.OutOfMemoryError:
        cure = "Lower batch_size (and raise accumulation), token_budget or max_length, or set quantization."
        return _complain(f"error: The device has too little memory. {cure}")
    return 0


def _complain(text: str, status: int = 1) -> int:
    Console(stderr=True).print(Text(text, style="red"), soft_wrap=True)
    return status


def _speaker(console: Console) -> Callable[[str], None]:
    """Return a function that prints a text as it is: no markup, no line breaks within a path or a command."""
    return lambda text: console.print(Text(text), soft_wrap=True)


# --- verbs -----------------------------------------------------------------------------------------------------------


def _train(arguments: argparse.Namespace, console: Console) -> None:
    from varlora.progress import TrainingProgress
    from varlora.workflow import check_run_dir, train

    say = _speaker(console)
    runs = _settings(arguments, seeds=arguments.seed, run_dir=arguments.run_dir, resume=arguments.resume)
    how = {"resume": arguments.resume, "overwrite": arguments.overwrite}
    for settings in runs:
        check_run_dir(settings, **how)  # of all runs, before the hours of the first
    done = []
    for settings in runs:
        if settings.sources:
            say(f"Building {settings.method} on {', '.join(settings.sources)}.")
        else:
            say(f"Training {settings.method} on {settings.task} with {settings.model}, seed {settings.seed}.")
        with TrainingProgress(console, settings.method) as progress:
            done.append(train(settings, **how, say=say, callbacks=[progress]))
    for folder in done:
        say(f"The adapter and its posterior are in {folder / 'adapter'}.")
    say(f"Next: varlora evaluate {' '.join(map(str, done))}")


def _settings(
    arguments: argparse.Namespace, *, seeds: list[int] | None = None, run_dir: str | None = None, resume: bool = False
) -> list[Settings]:
    """Return the settings of each run; a run that is resumed by its directory alone starts from its own."""
    from varlora.config import load_settings, settings_of
    from varlora.sources import recipe_from

    recipe = arguments.recipe
    if sources := getattr(arguments, "sources", None):
        if recipe:
            raise VarloraError("Expected a recipe or `--from`, but got both. Change single settings by `--set`.")
        recipe = recipe_from(sources, arguments.method or "ivon")
    if resume and run_dir and not (recipe or arguments.task or arguments.model):
        recipe = settings_of(Path(run_dir)).to_dict()
    options = {name: getattr(arguments, name) for name in SETTINGS_OPTIONS}
    options["method.lr_like_adamw"] = arguments.learning_rate_like_adamw
    return load_settings(recipe, {**options, "seeds": seeds, "run_dir": run_dir}, arguments.set)


def _tune(arguments: argparse.Namespace, console: Console) -> None:
    from varlora.config import recipe_of
    from varlora.diagram import scale_diagram
    from varlora.run import write_bytes, write_text
    from varlora.workflow import tune

    say = _speaker(console)
    settings = _settings(arguments)[0]
    out, picture = arguments.out, arguments.out.with_suffix(".png")
    if out == picture:
        raise VarloraError(f"Expected `--out` to be a recipe, but {out} is where the picture goes. Give it as `.yaml`.")
    for path in (out, picture):
        if path.exists() and not arguments.overwrite:
            raise VarloraError(f"{path} exists already. Pass `--overwrite`, or another `--out`.")
    tuned, prepared = tune(settings, say=say)
    found, written = prepared.found, [out]
    if "trials" in found:
        table = Table("sigma", "change of the predictions (KL, nats)")
        for trial in found["trials"]:
            table.add_row(f"{trial['sigma']:.4g}", f"{trial['kl']:.4g}")
        console.print(table)
        say(
            f"By {found['draws']} draws on {found['rows']} training rows. A change of {found['bound']:.3g} is borne, "
            f"as {found['epochs']:.1f} epochs are to come."
        )
        if by_layer := prepared.settings["sigma_by_layer"]:
            layers = Table("layer", "sigma")
            for layer, share in by_layer.items():
                layers.add_row(layer, f"{found['sigma'] * share:.4g}")
            console.print(layers)
        write_bytes(picture, scale_diagram(found["trials"], found["bound"], found["sigma"])["png"])
        written.append(picture)
    write_text(out, f"# Found by `varlora tune`, at the cost of {prepared.steps:.0f} steps.\n" + recipe_of(tuned))
    say(f"Written: {', '.join(map(str, written))}")
    say(f"Next: varlora train {out}")


def _calibrate(arguments: argparse.Namespace, console: Console) -> None:
    from varlora.workflow import calibrate

    say = _speaker(console)
    for run_dir in arguments.runs:
        search = calibrate(
            run_dir,
            samples=arguments.samples,
            how=_drawing(arguments),
            seed=arguments.seed,
            token_budget=arguments.token_budget,
            data_dir=arguments.data_dir,
            model=arguments.model,
            say=say,
        )
        chosen = search.chosen
        table = Table("tau", "pruned", "draws", "temperature", "NLL", title=str(run_dir))
        for trial in search.trials:
            numbers = (f"{trial.tau:g}", f"{trial.pruned:g}", str(trial.samples or "mean"))
            table.add_row(*numbers, f"{trial.temperature:.3f}", f"{trial.nll:.4f}")
        console.print(table)
        draws = f"{chosen.samples} draws" if chosen.samples else "the mean alone"
        temperature = chosen.temperature if chosen.samples else chosen.temperature_mean
        say(
            f"Chosen on {search.rows} held-out rows, with {search.passes} passes over them: tau {chosen.tau:g}, "
            f"{chosen.pruned:.0%} pruned, {draws}, temperature {temperature:.3f}."
        )
    say(f"Written: adapter/calibration.json in {' '.join(map(str, arguments.runs))}; `varlora predict` uses it.")


def _evaluate(arguments: argparse.Namespace, console: Console) -> None:
    from varlora.progress import rows_progress
    from varlora.report import TEMPERED
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
            temperature=arguments.temperature,
            taus=arguments.taus,
            ood=arguments.ood,
            calibrated=arguments.calibrate,
            how=_drawing(arguments),
            say=say,
            progress=rows_progress(console, "evaluate"),
        )
        samples = str(results["samples"])
        lines = (
            ("mean", "mean"),
            ("draws", samples),
            ("mean_tempered", "mean +T"),
            ("draws_tempered", f"{samples} +T"),
            ("calibrated", "calibrated"),
        )
        for key, draws in lines:
            if numbers := results.get(key):
                cells = [100 * numbers["accuracy"], 100 * numbers["ece"], numbers["nll"], numbers["brier"]]
                texts = [f"{cells[0]:.1f}", f"{cells[1]:.1f}", f"{cells[2]:.3f}", f"{cells[3]:.3f}"]
                table.add_row(Text(str(run_dir)), results["split"], str(results["rows"]), draws, *texts)
        if temperatures := results.get("temperature"):
            table.caption = TEMPERED
            at_mean, of_draws = temperatures["mean"], temperatures["draws"]
            say(f"{run_dir}: temperature {at_mean:.2f} at the mean, {of_draws:.2f} of the draws")
    console.print(table)
    runs, suffix = " ".join(map(str, arguments.runs)), "-calibration" if arguments.split == "calibration" else ""
    say(f"Written: predictions{suffix}.safetensors and metrics{suffix}.json in {runs}")
    say("No report shows them: these rows are there to choose on." if suffix else f"Next: varlora report {runs}")


def _drawing(arguments: argparse.Namespace) -> Drawing:
    """Return how draws are to be made and run."""
    from varlora.drawing import Drawing

    return Drawing(noise=arguments.noise, last_layers=arguments.last_layers, tolerance=arguments.tolerance)


def _predict(arguments: argparse.Namespace, console: Console) -> None:
    from varlora.config import settings_of
    from varlora.run import write_text
    from varlora.tasks import get_task, make_examples, parse_rows
    from varlora.workflow import answer_rows, load

    say = _speaker(console)
    source = "standard input" if arguments.input == "-" else arguments.input
    of_name = ".jsonl" if arguments.input == "-" else Path(source).suffix.lower()
    suffix = f".{arguments.format}" if arguments.format else of_name
    if Path(arguments.output).is_dir():
        raise VarloraError(f"Expected `--output` to be a file, but {arguments.output} is a folder. Add a file name.")
    try:
        stream = sys.stdin.buffer if arguments.input == "-" else io.BytesIO(Path(source).read_bytes())
        lines = stream.readlines()
    except OSError as error:
        raise VarloraError(f"Expected rows in {source}, but it cannot be read ({error.strerror}).") from error
    task = get_task(settings_of(arguments.run_dir).task)
    rows = make_examples(task, parse_rows(lines, suffix), source, labelled=False, skip_bad_rows=arguments.skip_bad_rows)
    if rows.skipped:
        say(f"{rows.skipped} malformed rows were left out; the first: {rows.problems[0]}")
    loaded = load(arguments.run_dir, model=arguments.model)
    answers = answer_rows(
        loaded,
        rows.examples,
        samples=arguments.samples,
        tau=arguments.tau,
        seed=arguments.seed,
        how=_drawing(arguments),
        say=say,
    )
    text = "".join(json.dumps(answer) + "\n" for answer in answers)  # in ASCII, which every pipe passes on
    if arguments.output == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        write_text(Path(arguments.output), text)
        say(f"{len(rows.examples)} rows are in {arguments.output}.")


def _serve(arguments: argparse.Namespace, console: Console) -> None:
    from varlora.serve import Limits, serve

    names = ("queue", "batch_tokens", "max_body", "max_rows", "max_answers", "max_tau")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    options = ("host", "port", "model", "samples", "tau", "seed", "risk", "allowed_hosts")
    settings = {name: getattr(arguments, name) for name in options}
    serve(arguments.run_dir, limits=Limits(**given), how=_drawing(arguments), say=_speaker(console), **settings)


def _report(arguments: argparse.Namespace, console: Console) -> None:
    from varlora.report import build_report, to_table

    report = build_report(arguments.runs, arguments.out, compare=arguments.compare)
    console.print(to_table(report))
    say = _speaker(console)
    for note in report.notes:
        say(note)
    for skipped in report.skipped:
        say(f"left out: {skipped.run}: {skipped.reason}")
    say(f"Written: {', '.join(str(path) for path in report.files.values())}")


def _reproduce(arguments: argparse.Namespace, console: Console) -> None:
    from varlora.grid import Processes, RayTasks
    from varlora.plan import plan_from
    from varlora.progress import rows_progress
    from varlora.reproduce import overhead_of, tables_of
    from varlora.typeset import to_terminal

    say = _speaker(console)
    plan = plan_from(
        arguments.recipe, arguments.out, {name: getattr(arguments, name) for name in PLAN_OPTIONS}, arguments.set
    )
    if arguments.what == "overhead":
        table, path = overhead_of(plan, arguments.rounds, rows_progress(console, "rounds"))
        console.print(table)
        say(f"Written: {path}")
        return

    def launcher() -> Processes | RayTasks:
        if arguments.launcher == "ray":
            return RayTasks(arguments.address, arguments.cpus, arguments.gpus)
        return Processes(arguments.workers, arguments.threads)

    made = tables_of(arguments.what, plan, launcher, beside=arguments.compare == "paper", say=say)
    for found in made.tables:
        console.print(to_terminal(found))
    say(f"Written: {', '.join(str(path) for path in made.files)}")
    if made.failed:
        reasons = "\n".join(f"  - {skip.run}: {skip.reason}" for skip in made.failed)
        raise VarloraError(f"{len(made.failed)} runs failed; the same command tries them again:\n{reasons}")


def _ls(arguments: argparse.Namespace, console: Console) -> None:
    say = _speaker(console)
    for name in [arguments.what] if arguments.what else list(LISTS):
        console.print(Text(name, style="bold"))
        for line in LISTS[name]():
            say(f"  {line}")


def _list_tasks() -> list[str]:
    from varlora.tasks import TASKS

    lines = [f"{name:16} splits {', '.join(task.files)}; reported on {task.evaluation}" for name, task in TASKS.items()]
    return lines + [str(path) for path in sorted(Path("recipes/local").glob("*.yaml"))]


def _list_methods() -> list[str]:
    from varlora.methods import METHODS

    return [f"{name:16} {(method.__doc__ or '').splitlines()[0]}" for name, method in METHODS.items()]


def _list_recipes() -> list[str]:
    paths = sorted(path for path in Path("recipes").rglob("*.yaml") if path.parent.name != "local")  # task files
    return [str(path) for path in paths] or ["none under recipes/"]


def _list_runs() -> list[str]:
    from varlora.run import is_run

    lines = []
    for folder in sorted(path.parent for path in Path("runs").rglob("config.json") if is_run(path.parent)):
        states = {"adapter": "trained", "metrics.json": "evaluated"}
        found = [word for name, word in states.items() if (folder / name).exists()]
        members = len(list(folder.glob("member-*")))
        at = f"in member {members - 1}, " if members else ""
        inside = folder / f"member-{members - 1}" if members else folder
        steps = sorted(int(path.name[11:]) for path in inside.glob("checkpoint-*") if path.name[11:].isdecimal())
        at += f"at step {steps[-1]}" if steps else "not started"
        lines.append(f"{folder}  {', '.join(found) or at}")
    return lines or ["none under runs/"]


LISTS = {"tasks": _list_tasks, "methods": _list_methods, "recipes": _list_recipes, "runs": _list_runs}


def _validate(arguments: argparse.Namespace, console: Console) -> None:
    from varlora.workflow import validate

    say = _speaker(console)
    for line in validate(_settings(arguments)[0]):
        say(line)


def _demo(arguments: argparse.Namespace, console: Console) -> None:
    from varlora.demo import run_demo

    options = {} if arguments.task is None else {"task": arguments.task}
    run_demo(Path(arguments.out), quick=arguments.quick, seed=arguments.seed, console=console, **options)


def _export(arguments: argparse.Namespace, console: Console) -> None:
    from varlora.export import export

    say = _speaker(console)
    manifest = export(
        arguments.run_dir,
        arguments.to,
        samples=arguments.samples,
        seed=arguments.seed,
        tau=arguments.tau,
        calibration=arguments.calibration,
        answers=arguments.answers,
        model=arguments.model,
        overwrite=arguments.overwrite,
        say=say,
    )
    names = ", ".join(draw["name"] for draw in manifest["draws"])
    say(f"Written: {arguments.to}; its client averages {names}.")
    say(f"Next: {arguments.to / 'serve_vllm.sh'}, then python {arguments.to / 'client.py'} --help")


def _push(arguments: argparse.Namespace, console: Console) -> None:
    from varlora.hub import push_to_hub

    say = _speaker(console)
    where = push_to_hub(
        arguments.run_dir,
        arguments.name,
        private=arguments.private,
        revision=arguments.revision,
        base_model=arguments.base_model,
        folder=arguments.folder,
        say=say,
    )
    say(f"Written: {where}")


# --- arguments -------------------------------------------------------------------------------------------------------

PLAN_OPTIONS = (
    "model", "tasks", "methods", "seeds", "samples", "data_dir", "steps", "batch_size", "quantization", "dtype",
    "max_length", "calibration_fraction",
)  # fmt: skip
SETTINGS_OPTIONS = (
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

    def verb(name: str, run: Any, summary: str, examples: str) -> argparse.ArgumentParser:
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
    train.add_argument(
        "--seed", type=seed, nargs="+", help="one run for each; wins over the recipe's `seed` or `seeds`"
    )
    train.add_argument(
        "--from",
        dest="sources",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="conclude the method from finished runs, with their settings, without training",
    )
    existing = train.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    existing.add_argument("--overwrite", action="store_true", help="replace an existing run")

    tune = verb("tune", _tune, "Find the scale of IVON's noise and what goes with it, without training.", TUNE_EXAMPLES)
    _settings_arguments(tune)
    tune.add_argument("--out", type=Path, default=Path("tuned.yaml"), help="recipe to write (default: tuned.yaml)")
    tune.add_argument("--overwrite", action="store_true", help="replace files that exist")

    calibrate = verb(
        "calibrate", _calibrate, "Choose on held-out rows how a posterior is best used.", CALIBRATE_EXAMPLES
    )
    calibrate.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    calibrate.add_argument("--samples", type=int, default=16, help="draws at the most (default: 16)")
    _noise_arguments(calibrate, "latin", "now and later; default: latin")
    calibrate.set_defaults(tolerance=None)
    calibrate.add_argument("--seed", type=seed, default=0, help="seed of the draws (default: 0)")
    calibrate.add_argument("--token-budget", type=int, default=4096, help="tokens a batch (default: 4096)")
    calibrate.add_argument("--data-dir", help="where the data lie now, if not where they were")
    calibrate.add_argument("--model", help="where the base lies now, if not where it was")

    evaluate = verb(
        "evaluate", _evaluate, "Predict a split's rows with trained runs and print the metrics.", EVALUATE_EXAMPLES
    )
    evaluate.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    evaluate.add_argument("--split", help="split to report on (default: the task's own; also: calibration)")
    _draw_arguments(evaluate)
    _drawing_arguments(evaluate)
    evaluate.add_argument(
        "--no-temperature", dest="temperature", action="store_false", help="fit no temperature on the held-out rows"
    )
    evaluate.add_argument(
        "--calibrate", action="store_true", help="call `varlora calibrate` first, if that was not done"
    )
    evaluate.add_argument(
        "--taus", type=float, nargs="+", default=(), metavar="TAU", help="predict at further factors of the variance"
    )
    evaluate.add_argument(
        "--ood", nargs="+", default=(), metavar="TASK", help="predict other tasks' rows too: out of distribution"
    )
    evaluate.add_argument("--token-budget", type=int, default=4096, help="tokens a batch (default: 4096)")
    evaluate.add_argument("--data-dir", help="where the data lie now, if not where they were")

    predict = verb("predict", _predict, "Answer questions: JSON lines with probabilities.", PREDICT_EXAMPLES)
    predict.add_argument("run_dir", type=Path, metavar="RUN", help="a run directory")
    predict.add_argument("--input", default="-", help="file with rows in the task's schema (default: standard input)")
    predict.add_argument("--output", default="-", help="file to write (default: standard output)")
    predict.add_argument("--format", choices=("jsonl", "csv", "tsv"), help="format of the rows (default: by the name)")
    predict.add_argument("--skip-bad-rows", action="store_true", help="leave out malformed rows and count them")
    _draw_arguments(predict, "what `calibrate` chose, else ")
    _drawing_arguments(predict)

    serve = verb("serve", _serve, "Answer questions over HTTP, in batches, with a page to ask on.", SERVE_EXAMPLES)
    _serve_arguments(serve)

    report = verb("report", _report, "Make a page of tables and pictures from evaluated runs.", REPORT_EXAMPLES)
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    report.add_argument("--out", type=Path, default=Path("report"), help="folder to write (default: report)")
    report.add_argument("--compare", choices=("paper",), help="lay the paper's numbers beside")

    reproduce = verb(
        "reproduce", _reproduce, "Make the paper's tables for your own model and tasks.", REPRODUCE_EXAMPLES
    )
    _plan_arguments(reproduce)

    ls = verb("ls", _ls, "List tasks, methods, recipes and runs.", LS_EXAMPLES)
    ls.add_argument("what", nargs="?", choices=tuple(LISTS), help="what to list (default: all)")

    validate = verb("validate", _validate, "Check settings, data and answers without training.", VALIDATE_EXAMPLES)
    _settings_arguments(validate)

    demo = verb("demo", _demo, "Fine-tune a small pretrained model with AdamW and IVON, and compare.", DEMO_EXAMPLES)
    demo.add_argument("--out", default="runs/demo", help="folder to write (default: runs/demo)")
    demo.add_argument("--task", help="four_choices, two_choices or true_or_false (default: four_choices)")
    demo.add_argument("--quick", action="store_true", help="fewer steps: to see that it works")
    demo.add_argument("--seed", type=seed, default=0, help="seed (default: 0)")

    export = verb("export", _export, "Write draws of a posterior as adapters that servers load.", EXPORT_EXAMPLES)
    export.add_argument("run_dir", type=Path, metavar="RUN", help="a run directory")
    export.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write")
    _draw_arguments(export, "what `calibrate` chose, else ")
    export.add_argument(
        "--no-calibration", dest="calibration", action="store_false", help="export the posterior as it was trained"
    )
    export.add_argument("--answers", nargs="+", help="what the model may say, if no rows are here to tell")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export")

    push = verb("push", _push, "Upload adapter, posterior and a model card to the Hugging Face hub.", PUSH_EXAMPLES)
    push.add_argument("run_dir", type=Path, metavar="RUN", help="a run directory")
    push.add_argument("name", metavar="USER/NAME", help="the repository")
    push.add_argument("--private", action="store_true", help="only you see it; a public one is refused")
    push.add_argument("--revision", help="branch to upload to, made if absent (default: main)")
    push.add_argument("--base-model", help="the base's name on the hub, where the run has a folder's")
    push.add_argument("--folder", type=Path, help="write the repository's files here and upload nothing")
    return parser


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: this machine alone, 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0: any that is free (default: 8000)")
    parser.add_argument(
        "--risk", type=float, help="share of the answers given that may be wrong, which decides when to abstain"
    )
    parser.add_argument(
        "--allowed-hosts", nargs="+", default=(), metavar="NAME", help="names in the Host header (default: by --host)"
    )
    parser.add_argument("--queue", type=_at_least_one, help="rows that may wait (default: 256)")
    parser.add_argument("--batch-tokens", type=_at_least_one, help="tokens a batch (default: 4096)")
    parser.add_argument("--max-body", type=_at_least_one, help="bytes of a request (default: 262144)")
    parser.add_argument("--max-rows", type=_at_least_one, help="rows of a request (default: 64)")
    parser.add_argument("--max-answers", type=_at_least_one, help="answers of a question (default: 64)")
    parser.add_argument("--max-tau", type=float, help="largest factor of the variance in a request (default: 4)")
    _draw_arguments(parser, "what `calibrate` chose, else ")
    _drawing_arguments(parser)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("table1", "table2", "table3", "overhead"), help="what to make")
    parser.add_argument("recipe", nargs="?", type=Path, help="a YAML file of a plan; the options below win over it")
    parser.add_argument("--tasks", nargs="+", help="names of tasks, or task files for your own data")
    parser.add_argument("--methods", nargs="+", help="default: the paper's")
    parser.add_argument("--seeds", type=seed, nargs="+", help="a run of each method for each (default: 0 1 2)")
    parser.add_argument("--samples", type=int, help="posterior draws (default: 10)")
    _common_arguments(parser, "any setting of the plan or of all runs: methods.ivon.ess=1e6 lora.rank=16")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="folder (default: runs/reproduce)")
    parser.add_argument("--compare", choices=("paper",), help="lay the paper's numbers beside")
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of the overhead (default: 30)")
    parser.add_argument("--launcher", choices=("local", "ray"), default="local", help="where runs go (default: local)")
    parser.add_argument("--workers", type=_at_least_one, default=1, help="local: runs at a time (default: 1)")
    parser.add_argument("--threads", type=_at_least_one, help="local: threads a run (default: cores by workers)")
    parser.add_argument("--address", help="ray: address of the cluster, or auto (default: a new one on this machine)")
    parser.add_argument("--cpus", type=float, default=1, help="ray: cores a run (default: 1)")
    parser.add_argument("--gpus", type=float, help="ray: GPUs a run, 0.5 say; has to be said where there are some")


def _common_arguments(parser: argparse.ArgumentParser, what_set: str) -> None:
    parser.add_argument("--model", help="the base model: a folder, or a name on the hub")
    parser.add_argument("--data-dir", help="folder with the tasks' files (default: from the hub)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 10000)")
    parser.add_argument("--batch-size", type=int, help="rows a micro-batch (default: 4)")
    parser.add_argument("--dtype", help="type of the base's weights (default: float32)")
    parser.add_argument("--quantization", help="keep the base in 8bit or 4bit")
    parser.add_argument("--max-length", type=int, help="longest prompt in tokens (default: the model's context)")
    parser.add_argument("--calibration-fraction", type=float, help="share of training rows held out (default: 0.1)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=what_set)


def _settings_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", type=Path, help="a YAML file of settings; the options below win over it")
    parser.add_argument("--task", help="a task's name (see `varlora ls tasks`), or a task file for your own data")
    parser.add_argument("--method", help="how to reach a posterior (see `varlora ls methods`; default: ivon)")
    _common_arguments(parser, "any setting: method.ess=1e6 lora.rank=16")
    parser.add_argument(
        "--learning-rate-like-adamw",
        type=float,
        metavar="LR",
        help="ivon: the AdamW learning rate to match in step size, in place of method.lr",
    )
    parser.add_argument("--accumulation", type=int, help="micro-batches a step (default: 1)")
    parser.add_argument("--checkpoint-every", type=int, help="steps between checkpoints (default: 500)")
    for flag, text in (
        ("--row-filter", "keep only the rows that the paper keeps"),
        ("--skip-bad-rows", "leave out malformed rows and count them"),
        ("--chat", "put prompts through the tokenizer's chat template"),
    ):
        parser.add_argument(flag, action="store_true", default=None, help=text)


def seed(text: str) -> int:
    """Read a seed; argparse takes this function's name for its message."""
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2**32 - 1, but got {text}")
    return number


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, but got {text}")
    return number


def _draw_arguments(parser: argparse.ArgumentParser, chosen: str = "") -> None:
    """Add what decides the draws; with `chosen`, the defaults are not known before the run is read."""
    samples, tau = (None, None) if chosen else (10, 1.0)
    parser.add_argument(
        "--samples", type=int, default=samples, help=f"posterior draws; 0: only the mean (default: {chosen}10)"
    )
    parser.add_argument(
        "--tau", type=float, default=tau, help=f"factor of the trained posterior's variance (default: {chosen}1)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the draws (default: 0)")
    parser.add_argument("--model", help="where the base lies now, if not where it was")


def _drawing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how draws are made and run; `_drawing` reads it."""
    _noise_arguments(parser, None, "default: what `calibrate` chose, else independent")
    parser.add_argument(
        "--tolerance", type=float, help="stop drawing for a row at this standard error of its probabilities"
    )


def _noise_arguments(parser: argparse.ArgumentParser, noise: str | None, when: str) -> None:
    parser.add_argument(
        "--noise",
        choices=("independent", "antithetic", "latin"),
        default=noise,
        help=f"what the draws are to one another ({when})",
    )
    parser.add_argument(
        "--last-layers",
        type=int,
        metavar="K",
        help="draw the last K adapted layers alone (default: all; of a calibrated run, what was chosen)",
    )


if __name__ == "__main__":
    sys.exit(main())
