"""The command line: one function for each verb."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from varlora.arguments import LISTS, PLAN_OPTIONS, SETTINGS_OPTIONS, command_line
from varlora.errors import ConfigError, Interrupted, VarloraError

if TYPE_CHECKING:
    from varlora.config import Settings
    from varlora.drawing import Drawing

__all__ = ["main"]


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
    arguments = command_line().parse_args(argv)
    console = Console(stderr=arguments.command == "predict")  # predictions go to standard output
    try:
        with warnings.catch_warnings():
            if arguments.command != "ls":  # which needs no language model
                from varlora.quiet import quiet_libraries

                quiet_libraries()
            VERBS[arguments.command](arguments, console)
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
    except (RuntimeError, MemoryError) as error:
        from varlora.stack import out_of_memory

        if not out_of_memory(error):
            raise
        cure = "Lower max_length or samples, in training batch_size (and raise accumulation), or set quantization."
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
    from varlora.run import is_first
    from varlora.training import check_run_dir, train

    console.quiet = not is_first()
    say = _speaker(console)
    runs = _settings(arguments, seeds=arguments.seed, run_dir=arguments.run_dir, resume=arguments.resume)
    how = {"resume": arguments.resume, "overwrite": arguments.overwrite}
    for settings in runs:
        check_run_dir(settings, **how, recipe=arguments.recipe)  # of all runs, before the hours of the first
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
    say(f"Next: varlora evaluate {_typed(*done)}")


def _typed(*paths: Path) -> str:
    """Return paths as a shell takes them."""
    return shlex.join(map(str, paths))


def _settings(
    arguments: argparse.Namespace, *, seeds: list[int] | None = None, run_dir: str | None = None, resume: bool = False
) -> list[Settings]:
    """Return the settings of each run; a run that is resumed by its directory alone starts from its own."""
    from varlora.config import load_settings, settings_of
    from varlora.methods import METHODS
    from varlora.sources import recipe_from

    recipe = arguments.recipe
    if sources := getattr(arguments, "sources", None):
        if recipe:
            raise VarloraError("Expected a recipe or `--from`, but got both. Change single settings by `--set`.")
        if not arguments.method:
            builds = ", ".join(
                name for name, method in METHODS.items() if method.concludes_from or method.continues_from
            )
            raise VarloraError(
                "Expected `--method` with `--from`, for what to make of the runs, but it is missing. Name one that "
                f"builds on finished runs: {builds}."
            )
        recipe = recipe_from(sources, arguments.method)
    goes_on = resume and not (recipe or arguments.task or arguments.model)
    if goes_on:
        if run_dir:
            recipe = settings_of(Path(run_dir)).to_dict()
        elif not arguments.set:
            raise VarloraError(
                "Expected `--run-dir` with `--resume`, but it is missing. Give the run to go on with, or the recipe or "
                "the options that it was started with."
            )
    options = {name: getattr(arguments, name) for name in SETTINGS_OPTIONS}
    options["method.lr_like_adamw"] = arguments.learning_rate_like_adamw
    try:
        runs = load_settings(recipe, {**options, "seeds": seeds, "run_dir": run_dir}, arguments.set)
    except ConfigError as error:
        if arguments.learning_rate_like_adamw is None:
            raise
        raise ConfigError(map(_of_option, error.problems)) from error
    if goes_on and len(runs) > 1:
        raise VarloraError(
            f"Expected one run to go on with in {run_dir}, but got {len(runs)} seeds. Leave the seeds out, or give the "
            "recipe or the options that the runs were started with."
        )
    return runs


def _of_option(problem: str) -> str:
    """Return a problem by the name of the option that was typed, which is no setting's name."""
    if not problem.startswith("Unknown setting `method.lr_like_adamw`"):
        return problem
    return (
        "Expected `--learning-rate-like-adamw` with `--method ivon` alone. Leave it out, or use `--set method.lr=5e-5`."
    )


def _tune(arguments: argparse.Namespace, console: Console) -> None:
    from varlora.config import recipe_of
    from varlora.diagram import scale_diagram
    from varlora.files import check_writable, write_bytes, write_text
    from varlora.training import tune

    say = _speaker(console)
    runs = _settings(arguments)
    settings, seeds = runs[0], [run.seed for run in runs]
    out, picture = arguments.out, arguments.out.with_suffix(".png")
    if out == picture:
        raise VarloraError(f"Expected `--out` to be a recipe, but {out} is where the picture goes. Give it as `.yaml`.")
    for path in (out, picture):
        if path.exists() and not arguments.overwrite:
            raise VarloraError(f"{path} exists already. Pass `--overwrite`, or another `--out`.")
    check_writable(out)
    tuned, prepared = tune(settings, say=say)
    found, written = prepared.found, [out]
    if "trials" in found:
        trials = [
            {"sigma": trial["sigma"], "kl": math.inf if trial["kl"] is None else trial["kl"]}
            for trial in found["trials"]
        ]
        table = Table("sigma", "change of the predictions (KL, nats)")
        for trial in trials:
            table.add_row(f"{trial['sigma']:.4g}", f"{trial['kl']:.4g}")
        console.print(table)
        stops_growing = found["reach"] > found["sigma"] and all(
            not found["bound"] <= trial["kl"] < math.inf for trial in trials
        )
        is_borne = "would be borne, which no noise comes to" if stops_growing else "is borne"
        say(
            f"By {found['draws']} draws on {found['rows']} training rows. As {found['epochs']:.1f} epochs are to come, "
            f"a change of {found['bound']:.3g} {is_borne}."
        )
        of_ivon = prepared.settings.get("settings", prepared.settings)  # which another method may work on
        if by_layer := of_ivon["sigma_by_layer"]:
            layers = Table("layer", "sigma")
            for layer, share in by_layer.items():
                layers.add_row(layer, f"{found['sigma'] * share:.4g}")
            console.print(layers)
        write_bytes(picture, scale_diagram(trials, found["bound"], found["sigma"])["png"])
        written.append(picture)
    write_text(
        out, f"# Found by `varlora tune`, at the cost of {prepared.steps:.0f} steps.\n" + recipe_of(tuned, seeds)
    )
    if len(seeds) > 1:
        say(f"Found with seed {seeds[0]}, for all of {', '.join(map(str, seeds))}.")
    say(f"Written: {', '.join(map(str, written))}")
    say(f"Next: varlora train {_typed(out)}")


def _calibrate(arguments: argparse.Namespace, console: Console) -> None:
    from varlora.evaluation import calibrate
    from varlora.files import check_writable
    from varlora.loading import trained_settings

    say = _speaker(console)
    for run_dir in arguments.runs:  # before the work on the first one
        trained_settings(run_dir)
        check_writable(run_dir / "adapter" / "calibration.json")
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
        draws = f"draws at tau {chosen.tau:g}"
        used = f"{chosen.samples} {draws}" if chosen.samples else "the mean"
        if arguments.samples and chosen.tau and not chosen.samples:
            used += f" alone, as {draws} do no better"
        temperature = chosen.temperature if chosen.samples else chosen.temperature_mean
        say(
            f"Chosen on {search.rows} held-out rows, with {search.passes} passes over them: {used}; "
            f"{chosen.pruned:.0%} pruned, temperature {temperature:.3f}."
        )
    say(f"Written: adapter/calibration.json in {' '.join(map(str, arguments.runs))}; `varlora predict` uses it.")


def _evaluate(arguments: argparse.Namespace, console: Console) -> None:
    from varlora.evaluation import evaluate
    from varlora.files import check_writable
    from varlora.loading import trained_settings
    from varlora.predictions import CALIBRATION
    from varlora.progress import rows_progress
    from varlora.report import TEMPERED

    say = _speaker(console)
    table = Table(Column("run", overflow="fold"), "split", "rows", "draws", "ACC %", "ECE x100", "NLL", "Brier")
    for run_dir in arguments.runs:  # before the work on the first one
        trained_settings(run_dir)
        check_writable(run_dir / "metrics.json")

    def evaluated(run_dir: Path) -> None:
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
        if passes := results.get("passes_a_row"):
            say(f"{run_dir}: {passes:.1f} of {samples} draws were made of a row, on average.")
        if temperatures := results.get("temperature"):
            table.caption = TEMPERED
            at_mean, of_draws = temperatures["mean"], temperatures["draws"]
            say(f"{run_dir}: temperature {at_mean:.2f} at the mean, {of_draws:.2f} of the draws")

    try:
        for run_dir in arguments.runs:
            evaluated(run_dir)
    finally:  # what was done is shown, and is in its run directory, if another run fails
        if table.row_count:
            console.print(table)
    runs, suffix = _typed(*arguments.runs), CALIBRATION if arguments.split == "calibration" else ""
    say(f"Written: predictions{suffix}.safetensors and metrics{suffix}.json in {runs}")
    say("No report shows them: these rows are there to choose on." if suffix else f"Next: varlora report {runs}")


def _drawing(arguments: argparse.Namespace) -> Drawing:
    """Return how draws are to be made and run."""
    from varlora.drawing import Drawing

    return Drawing(noise=arguments.noise, last_layers=arguments.last_layers, tolerance=arguments.tolerance)


def _predict(arguments: argparse.Namespace, console: Console) -> None:
    from varlora.config import settings_of
    from varlora.evaluation import answer_rows
    from varlora.files import check_writable, written_by_line
    from varlora.grid import interrupted_by_signals
    from varlora.loading import load, trained_task
    from varlora.progress import rows_progress
    from varlora.tasks import make_examples, parse_rows

    say = _speaker(console)
    source = "standard input" if arguments.input == "-" else arguments.input
    of_name = ".jsonl" if arguments.input == "-" else Path(source).suffix.lower()
    suffix = f".{arguments.format}" if arguments.format else of_name
    output = None if arguments.output == "-" else Path(arguments.output)
    if output and output.is_dir():
        raise VarloraError(f"Expected `--output` to be a file, but {output} is a folder. Add a file name.")
    if output and output.exists() and not output.is_file():
        raise VarloraError(f"Expected `--output` to be a file, but {output} is none. Leave it out, and redirect.")
    if arguments.input == "-" and sys.stdin is None:  # as Python has it where it is closed
        raise VarloraError("Expected rows in standard input, but it is closed. Give a file by `--input`, or pipe rows.")
    if output is None and sys.stdout is None:
        raise VarloraError("Expected to write to standard output, but it is closed. Give a file by `--output`.")
    try:
        stream = sys.stdin.buffer if arguments.input == "-" else io.BytesIO(Path(source).read_bytes())
        lines = stream.readlines()
    except OSError as error:
        raise VarloraError(f"Expected rows in {source}, but it cannot be read ({error.strerror}).") from error
    if output and arguments.input != "-" and output.exists() and output.samefile(source):
        raise VarloraError(f"Expected `--output` to be another file than `--input`, but both are {output}.")
    task = trained_task(arguments.run_dir, settings_of(arguments.run_dir))
    rows = make_examples(task, parse_rows(lines, suffix), source, labelled=False, skip_bad_rows=arguments.skip_bad_rows)
    if rows.skipped:
        say(f"{rows.skipped} malformed rows were left out; the first: {rows.problems[0]}")
    if output:
        check_writable(output)  # before the work
    loaded = load(arguments.run_dir, model=arguments.model, calibrated=arguments.tau is None)
    answers = answer_rows(
        loaded,
        rows.examples,
        samples=arguments.samples,
        tau=arguments.tau,
        seed=arguments.seed,
        how=_drawing(arguments),
        say=say,
        progress=rows_progress(console, "predict") if output or not sys.stdout.isatty() else None,
    )
    stdout = sys.stdout  # itself: while a bar is shown, `print` goes before it, to where the bar is

    def to_stdout(line: str) -> None:
        stdout.write(f"{line}\n")
        stdout.flush()

    def kept(part: Path, count: int) -> None:
        say(f"{count} of {len(rows.examples)} rows are in {part}.")

    lines = written_by_line(output, kept) if output else nullcontext(to_stdout)
    lost = 0
    with interrupted_by_signals(), lines as write, closing(answers):
        for answer in answers:
            write(json.dumps(answer))  # in ASCII, which every pipe passes on
            lost += "error" in answer
    if output:
        say(f"{len(rows.examples)} rows are in {output}.")
    if lost:
        raise VarloraError(
            f"{lost} of {len(rows.examples)} rows have no answer, as their logits are not finite; their lines have "
            "`error`. Train with `--dtype float32` or `bfloat16`."
        )


def _serve(arguments: argparse.Namespace, console: Console) -> None:
    from varlora.serve import Limits, serve

    names = ("queue", "batch_tokens", "max_body", "max_rows", "max_answers", "max_tau")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    options = ("host", "port", "model", "samples", "tau", "seed", "risk", "allowed_hosts")
    settings = {name: getattr(arguments, name) for name in options}
    serve(arguments.run_dir, limits=Limits(**given), how=_drawing(arguments), say=_speaker(console), **settings)


def _report(arguments: argparse.Namespace, console: Console) -> None:
    from varlora.report import build_report, to_table

    report = build_report(
        arguments.runs, arguments.out, arguments.bins, rule=arguments.bin_rule, compare=arguments.compare
    )
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
        beside_paper = arguments.compare == "paper"
        table, path = overhead_of(plan, arguments.rounds, rows_progress(console, "rounds"), beside_paper)
        console.print(table)
        say(f"Written: {path}")
        return

    def launcher() -> Processes | RayTasks:
        if arguments.launcher == "ray":
            return RayTasks(arguments.address, arguments.cpus, arguments.gpus)
        return Processes(arguments.workers, arguments.threads)

    how: dict[str, Any] = {"bins": arguments.bins, "rule": arguments.bin_rule, "beside": arguments.compare == "paper"}
    made = tables_of(arguments.what, plan, launcher, **how, say=say)
    for found in made.tables:
        console.print(to_terminal(found))
    say(f"Written: {', '.join(str(path) for path in made.files)}")
    if made.failed:
        reasons = "\n".join(f"  - {skip.run}: {skip.reason}" for skip in made.failed)
        raise VarloraError(f"{len(made.failed)} runs failed; the same command tries them again:\n{reasons}")


def _ls(arguments: argparse.Namespace, console: Console) -> None:
    say = _speaker(console)
    lists = dict(zip(LISTS, (_list_tasks, _list_methods, _list_recipes, _list_runs), strict=True))
    for name in [arguments.what] if arguments.what else LISTS:
        console.print(Text(name, style="bold"))
        for line in lists[name]():
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


def _validate(arguments: argparse.Namespace, console: Console) -> None:
    from varlora.training import validate

    say = _speaker(console)
    runs = _settings(arguments)
    for line in validate(runs[0]):
        say(line)
    if len(runs) > 1:
        say(f"Looked at with seed {runs[0].seed}, of {', '.join(str(run.seed) for run in runs)}.")


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
    server, client = _typed(arguments.to / "serve_vllm.sh"), _typed(arguments.to / "client.py")
    say(f"Next: {server}, then python {client} --help")


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


VERBS = {
    "train": _train,
    "tune": _tune,
    "calibrate": _calibrate,
    "evaluate": _evaluate,
    "predict": _predict,
    "serve": _serve,
    "report": _report,
    "reproduce": _reproduce,
    "ls": _ls,
    "validate": _validate,
    "demo": _demo,
    "export": _export,
    "push": _push,
}


if __name__ == "__main__":
    sys.exit(main())
