"""What the command line may be given: the parser, with one part for each verb."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from varlora import __version__
from varlora.errors import did_you_mean

__all__ = ["LISTS", "PLAN_OPTIONS", "SETTINGS_OPTIONS", "command_line"]

PLAN_OPTIONS = (
    "model", "tasks", "methods", "seeds", "samples", "split", "data_dir", "steps", "batch_size", "quantization",
    "dtype", "max_length", "calibration_fraction",
)  # fmt: skip
SETTINGS_OPTIONS = (
    "task", "model", "method", "data_dir", "steps", "batch_size", "accumulation", "quantization", "dtype", "max_length",
    "calibration_fraction", "checkpoint_every", "row_filter", "skip_bad_rows", "chat",
)  # fmt: skip
LISTS = ("tasks", "methods", "recipes", "runs")

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


class _Parser(argparse.ArgumentParser):
    """Offers the nearest names for a misspelt option or verb, and tells the usage of the verb that was typed."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what is left over, which a verb's parser would hand on to that of all verbs."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            options = [word.partition("=")[0] for word in rest if word.startswith("--")]
            hints = [did_you_mean(option, self._option_string_actions) for option in options]
            self.error(" ".join([f"unrecognized arguments: {' '.join(rest)}.", *hints]))
        return found, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}. {did_you_mean(value, action.choices)}")


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the whole command line; `command` names the verb."""
    parser = _Parser(
        prog="varlora",
        description="Fine-tune a language model with LoRA and keep a posterior over the adapter.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"varlora {__version__}")
    verbs = parser.add_subparsers(dest="command", required=True, metavar="command")

    def verb(name: str, summary: str, examples: str) -> argparse.ArgumentParser:
        return verbs.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    train = verb("train", "Fine-tune an adapter and keep its posterior.", TRAIN_EXAMPLES)
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
        help="conclude the method from finished runs, with their settings; swa and swag train on from an AdamW run",
    )
    existing = train.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    existing.add_argument("--overwrite", action="store_true", help="replace an existing run")

    tune = verb("tune", "Find the scale of IVON's noise and what goes with it, without training.", TUNE_EXAMPLES)
    _settings_arguments(tune)
    tune.add_argument("--out", type=Path, default=Path("tuned.yaml"), help="recipe to write (default: tuned.yaml)")
    tune.add_argument("--overwrite", action="store_true", help="replace files that exist")

    calibrate = verb("calibrate", "Choose on held-out rows how a posterior is best used.", CALIBRATE_EXAMPLES)
    calibrate.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    calibrate.add_argument("--samples", type=int, default=16, help="draws at the most (default: 16)")
    _noise_arguments(calibrate, "latin", "now and later; default: latin", "now and later; default: all")
    calibrate.set_defaults(tolerance=None)
    calibrate.add_argument("--seed", type=seed, default=0, help="seed of the draws (default: 0)")
    calibrate.add_argument("--token-budget", type=_at_least_one, default=4096, help="tokens a batch (default: 4096)")
    calibrate.add_argument("--data-dir", help="where the data lie now, if not where they were")
    calibrate.add_argument("--model", help="where the base lies now, if not where it was")

    evaluate = verb("evaluate", "Predict a split's rows with trained runs and print the metrics.", EVALUATE_EXAMPLES)
    evaluate.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    evaluate.add_argument("--split", help="split to report on (default: the task's own; also: calibration)")
    _draw_arguments(evaluate)
    _drawing_arguments(evaluate, "default: {}; the calibrated row as `calibrate` chose")
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
    evaluate.add_argument("--token-budget", type=_at_least_one, default=4096, help="tokens a batch (default: 4096)")
    evaluate.add_argument("--data-dir", help="where the data lie now, if not where they were")

    predict = verb("predict", "Answer questions: JSON lines with probabilities.", PREDICT_EXAMPLES)
    predict.add_argument("run_dir", type=Path, metavar="RUN", help="a run directory")
    predict.add_argument("--input", default="-", help="file with rows in the task's schema (default: standard input)")
    predict.add_argument("--output", default="-", help="file to write (default: standard output)")
    predict.add_argument("--format", choices=("jsonl", "csv", "tsv"), help="format of the rows (default: by the name)")
    predict.add_argument("--skip-bad-rows", action="store_true", help="leave out malformed rows and count them")
    _draw_arguments(predict, "what `calibrate` chose, else ")
    _drawing_arguments(predict)

    serve = verb("serve", "Answer questions over HTTP, in batches, with a page to ask on.", SERVE_EXAMPLES)
    _serve_arguments(serve)

    report = verb("report", "Make a page of tables and pictures from evaluated runs.", REPORT_EXAMPLES)
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    report.add_argument("--out", type=Path, default=Path("report"), help="folder to write (default: report)")
    report.add_argument("--compare", choices=("paper",), help="lay the paper's numbers beside")
    _bin_arguments(report)

    reproduce = verb("reproduce", "Make the paper's tables for your own model and tasks.", REPRODUCE_EXAMPLES)
    _plan_arguments(reproduce)

    ls = verb("ls", "List tasks, methods, recipes and runs.", LS_EXAMPLES)
    ls.add_argument("what", nargs="?", choices=LISTS, help="what to list (default: all)")

    validate = verb("validate", "Check settings, data and answers without training.", VALIDATE_EXAMPLES)
    _settings_arguments(validate)

    demo = verb("demo", "Fine-tune a small pretrained model with AdamW and IVON, and compare.", DEMO_EXAMPLES)
    demo.add_argument("--out", default="runs/demo", help="folder to write (default: runs/demo)")
    demo.add_argument("--task", help="four_choices, two_choices or true_or_false (default: four_choices)")
    demo.add_argument("--quick", action="store_true", help="fewer steps: to see that it works")
    demo.add_argument("--seed", type=seed, default=0, help="seed (default: 0)")

    export = verb("export", "Write draws of a posterior as adapters that servers load.", EXPORT_EXAMPLES)
    export.add_argument("run_dir", type=Path, metavar="RUN", help="a run directory")
    export.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write")
    _draw_arguments(export, "what `calibrate` chose, else ")
    export.add_argument(
        "--no-calibration", dest="calibration", action="store_false", help="export the posterior as it was trained"
    )
    export.add_argument("--answers", nargs="+", help="what the model may say, if no rows are here to tell")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export")

    push = verb("push", "Upload adapter, posterior and a model card to the Hugging Face hub.", PUSH_EXAMPLES)
    push.add_argument("run_dir", type=Path, metavar="RUN", help="a run directory")
    push.add_argument("name", metavar="USER/NAME", help="the repository")
    push.add_argument("--private", action="store_true", help="only you see it; a public one is refused")
    push.add_argument("--revision", help="branch to upload to, made if absent (default: main)")
    push.add_argument("--base-model", help="the base's name on the hub, where the run has a folder's")
    push.add_argument("--folder", type=Path, help="write the repository's files here and upload nothing")
    return parser


def _bin_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bins", type=_at_least_one, default=10, help="bins of the ECE, of equal width (default: 10)")
    parser.add_argument(
        "--bin-rule",
        choices=("right", "left"),
        default="right",
        help="right: (lo, hi], left: [lo, hi) (default: right)",
    )


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
    parser.add_argument(
        "--methods", nargs="+", help="default: the paper's, adamw mc_dropout laplace_kfac laplace_diag swa swag ivon"
    )
    parser.add_argument("--seeds", type=seed, nargs="+", help="a run of each method for each (default: 0 1 2)")
    parser.add_argument("--samples", type=int, help="posterior draws (default: 10)")
    parser.add_argument("--split", help="the split to report on (default: each task's own, dev)")
    _common_arguments(parser, "any setting of the plan or of all runs: methods.ivon.ess=1e6 lora.rank=16")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="folder (default: runs/reproduce)")
    parser.add_argument("--compare", choices=("paper",), help="lay the paper's numbers beside")
    _bin_arguments(parser)
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of the overhead (default: 30)")
    parser.add_argument("--launcher", choices=("local", "ray"), default="local", help="where runs go (default: local)")
    parser.add_argument("--workers", type=_at_least_one, default=1, help="local: runs at a time (default: 1)")
    parser.add_argument("--threads", type=_at_least_one, help="local: threads a run (default: cores by workers)")
    parser.add_argument("--address", help="ray: address of the cluster, or auto (default: a new one on this machine)")
    parser.add_argument("--cpus", type=float, default=1, help="ray: cores a run (default: 1)")
    parser.add_argument("--gpus", type=float, help="ray: GPUs a run, 0.5 say; has to be said where there are some")


def _common_arguments(parser: argparse.ArgumentParser, what_set: str) -> None:
    parser.add_argument("--model", help="the base model: a folder, or a name on the hub")
    parser.add_argument(
        "--data-dir", help="folder with the tasks' files, named as in the README (default: from the hub)"
    )
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


def _drawing_arguments(parser: argparse.ArgumentParser, when: str = "default: what `calibrate` chose, else {}") -> None:
    """Add how draws are made and run; `_drawing` reads it."""
    _noise_arguments(parser, None, when.format("independent"), when.format("all"))
    parser.add_argument(
        "--tolerance", type=float, help="stop drawing for a row at this standard error of its probabilities"
    )


def _noise_arguments(parser: argparse.ArgumentParser, noise: str | None, when: str, layers: str) -> None:
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
        help=f"draw the last K adapted layers alone, or all if there are no more ({layers})",
    )
