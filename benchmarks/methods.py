"""What each method costs: training, its pass over the data, its posterior, and prediction, all beside AdamW's.

On tinyllama-3m every method trains on the same SST-2 batches and predicts the same held-out rows, in turn in one
process, so each number is also a ratio within the run. At the shapes of Llama-2-7B's adapter (rank 8 on query and value
of 32 layers: 64 times A (8, 4096) and B (4096, 8)), where the base has no weights here, only what the methods add to
forward and backward pass is timed. What can be installed from the package index runs beside ours.

    python benchmarks/methods.py
    pip install --no-deps --target build/peers bayesian-lora jaxtyping wadler-lindig
    PYTHONPATH=build/peers python benchmarks/methods.py
"""

from __future__ import annotations

import argparse
import importlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from _common import (
    ROOT,
    Part,
    count,
    interleave,
    parser,
    peak,
    print_table,
    ratio,
    set_up,
    shared_folder,
    spread,
    write_result,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers.utils.logging import disable_progress_bar

from varlora.curvature import Curvature, Diagonal, Kronecker
from varlora.data import Batch, collate, encode_all
from varlora.methods import METHODS, Method, Trained
from varlora.model import class_logits, load_model
from varlora.params import trainable
from varlora.posterior import DiagonalGaussian, Dropout, LowRankGaussian, Posterior
from varlora.predict import predict
from varlora.prompt import Encoded
from varlora.tasks import get_task, load_rows
from varlora.trainer import class_loss

MB = 1e6
STEPS = METHODS["swag"]().every  # type: ignore[attr-defined]
"""Training steps that are timed together: SWA and SWAG take one snapshot in so many."""
KEPT = METHODS["swag"]().rank  # type: ignore[attr-defined]
"""Snapshots taken before the timing, so that SWAG holds all the deviations it ever holds."""
FOREVER = 10**9
"""Steps of a training whose end does not come near."""
COLUMNS = 4
"""Backward passes a batch of the exact curvature with five answers, the most that the paper's tasks have."""
BOUND = 200e6
"""Bytes that the curvature's factors may take at Llama-2-7B's shapes."""
LIMITS = {
    "training": "forward and backward pass; what a method adds is memory traffic over the adapter (IVON: and drawing). "
    "The Trainer's own work, the same for all, is not in the times, so the ratios are upper bounds. Methods that train "
    "as AdamW does are timed all the same: how far they are from 1 is the noise.",
    "swa, swag": f"a snapshot every {STEPS} steps reads and writes mean and squares; SWAG's list is copied whole. None "
    "is taken before `start`, so over a whole training the extra is half of this by default.",
    "blob": "one more product of A's shape, forward and backward, in each layer, on a copy of the layer's input.",
    "laplace": "one forward and, for C answers, C − 1 backward passes a batch (fisher: 1). SST-2 has C = 2, where both "
    "are one, so a pass over the rows is at its limit at one epoch of training.",
    "kfac": "8 d rank operations for each token, factor and column: two matrix products of 2 rank columns.",
    "tfb": "(S + 1) forward passes over the anchor rows for each scale that is tried, the last one at the mean.",
    "temperature": "forward passes over the held-out rows.",
    "prediction": "S forward passes, and one at the mean. Linearised: 2 forward and C backward passes for any S, and "
    "each row's Jacobians, C P numbers, written and read.",
    "memory": "State is counted from the tensors that optimizer and method hold between steps. Peaks are the most that "
    "is allocated at once, beside what was held before, by the allocator's events.",
    "bayesian_lora": "samples labels (one backward pass a batch) and takes the last position alone, where ours takes "
    "all; each batch costs it a float64 singular value decomposition of each wide factor.",
    "llama2_7b": "random gradients, inputs and weights; no forward or backward pass of the base is in any time.",
}
"""What bounds each cost."""
AS_WITHOUT = "that of the method without the suffix"
WHY_NULL = {
    "fisher": {"training": AS_WITHOUT, "prediction": AS_WITHOUT},
    "weights": {"training": AS_WITHOUT, "conclusion": AS_WITHOUT, "posterior": AS_WITHOUT},
}
"""Why a variant has no number of its own."""
ABSENT = {
    "bayesian-peft (BLoB, TFB)": "no such distribution on the package index",
    "swag-lora": "no such distribution on the package index",
    "laplace-lora": "no such distribution on the package index",
    "laplace-torch": "needs torchvision, which would replace the tested torch",
    "ivon-opt": "in benchmarks/optimizer.py",
}
"""Peers that do not run here, and why."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = _parser().parse_args(argv)
    device = torch.device("cpu")
    set_up(args)
    disable_progress_bar()
    warnings.filterwarnings("ignore", message="Full backward hook")  # bayesian_lora's, on inputs without gradient
    base = Base.load(args)
    tokens = [len(row.input_ids) for row in base.rows]
    print(
        f"{base.name}: {len(base.rows)} training rows of {sum(tokens) / len(tokens):.0f} tokens, "
        f"{len(base.held_out)} held out",
        flush=True,
    )
    methods, trainees = _training(base, args)
    posteriors = _conclusions(methods, base, trainees, args)
    _predictions(methods, base, posteriors, args)
    for name, of in methods.items():
        if (suffix := name.rpartition(" ")[2]) in WHY_NULL:
            of |= {**dict.fromkeys(WHY_NULL[suffix]), "why_null": WHY_NULL[suffix]}
    found: dict[str, Any] = {
        "base": {
            "numel": base.numel,
            "adapter_bytes": 4 * base.numel,
            "training_rows": len(base.rows),
            "held_out_rows": len(base.held_out),
            "tokens_per_row": sum(tokens) / len(tokens),
            "steps_per_round": STEPS,
        },
        "methods": methods,
        "llama2_7b": _llama(args),
        "peers": _peers(base, trainees["adamw"], args),
        "limits": LIMITS,
    }
    _print(found)
    write_result(args.out, "methods", args, device, **found)
    return found


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__, "methods")
    made.add_argument("--rows", type=count, default=200, help="training rows (default: %(default)s)")
    made.add_argument("--held-out", type=count, default=32, help="rows to predict (default: %(default)s)")
    made.add_argument("--batch-size", type=count, default=4, help="rows a batch (default: %(default)s)")
    made.add_argument("--max-length", type=count, default=256, help="tokens a row (default: %(default)s)")
    made.add_argument("--rounds", type=count, default=15, help=f"timed rounds of {STEPS} steps (default: %(default)s)")
    made.add_argument("--passes", type=count, default=5, help="rounds of what takes seconds (default: %(default)s)")
    made.add_argument("--warmup", type=int, default=1, help="rounds before either (default: %(default)s)")
    made.add_argument("--layers", type=count, default=32, help="layers at the large shapes (default: %(default)s)")
    made.add_argument("--hidden", type=count, default=4096, help="width there (default: %(default)s)")
    made.add_argument("--tokens", type=count, default=128, help="tokens a row there (default: %(default)s)")
    made.add_argument("--flush-mb", type=count, default=64, help="MB written before each part (default: %(default)s)")
    return made


# --- what is trained, and on what ---


@dataclass
class Base:
    """The small model's name and the rows."""

    name: str
    rows: list[Encoded]
    held_out: list[Encoded]
    pad: int
    batch_size: int
    seed: int
    numel: int
    batches: list[Batch]

    @classmethod
    def load(cls, args: argparse.Namespace) -> Base:
        """Encode SST-2 rows for tinyllama-3m."""
        name = str(shared_folder() / "models" / "tinyllama-3m")
        model, tokenizer = load_model(name, seed=args.seed, device="cpu")
        limit = {"train": args.rows, "dev": args.held_out}
        task = replace(get_task(ROOT / "recipes" / "local" / "sst2.yaml"), limit=limit)
        rows, held_out = (
            encode_all(tokenizer, load_rows(task, s, data_dir=shared_folder() / "data").examples, args.max_length).rows
            for s in ("train", "dev")
        )
        pad, size = tokenizer.pad_token_id, args.batch_size
        batches = [collate(rows[at : at + size], pad) for at in range(0, len(rows) - size + 1, size)]
        numel = sum(p.numel() for p in trainable(model).values())
        return cls(name, rows, held_out, pad, size, args.seed, numel, batches)

    @property
    def longest(self) -> list[Encoded]:
        """The longest rows, three batches of them: where memory peaks."""
        return sorted(self.rows, key=lambda row: -len(row.input_ids))[: 3 * self.batch_size]


@dataclass
class Trainee:
    """A method with a model, or parameters alone, of its own."""

    method: Method
    model: nn.Module
    optimizer: Any
    params: dict[str, nn.Parameter]
    state: dict[str, Any] = field(default_factory=dict)
    made: int = 0

    @classmethod
    def of(cls, method: Method, model: nn.Module, params: dict[str, nn.Parameter], args: argparse.Namespace) -> Trainee:
        """Make its optimizer, and take the snapshots that training will have taken."""
        made = cls(method, model, method.optimizer(params, args.rows, args.batch_size, args.seed), params)
        for _ in range(KEPT):
            made.made += STEPS
            method.after_step(params, made.made, FOREVER, made.state)
        return made

    def draw(self) -> None:
        """Do what precedes a forward pass."""
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()

    def move(self) -> None:
        """Do what follows a backward pass."""
        self.optimizer.step()
        self.made += 1
        self.method.after_step(self.params, self.made, FOREVER, self.state)

    def train(self, batches: Iterable[Batch]) -> None:
        """Make a training step with each batch, as `fit` does within its Trainer."""
        self.model.train()
        with self.method.training(self.model, self.optimizer):
            for batch in batches:
                self.draw()
                (class_loss(class_logits(self.model, batch), batch["labels"]) / len(batch["labels"])).backward()
                self.move()
                self.optimizer.zero_grad()

    def train_next(self, stream: Iterator[Batch]) -> None:
        """Make the steps of one round."""
        self.train(islice(stream, STEPS))

    def trained(self, base: Base, rows: Sequence[Encoded], sources: Sequence[Posterior] = ()) -> Trained:
        """Return what `fit` would conclude the posterior from."""

        def draw(posterior: Posterior, of: Sequence[Encoded], n: int) -> tuple[Tensor, Tensor]:
            found = predict(self.model, posterior, of, pad_token_id=base.pad, samples=n, seed=base.seed)
            return found.logits, found.labels

        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()
        return Trained(
            self.model.eval(),
            rows,
            draw,
            class_logits,
            calibration=base.held_out,
            pad_token_id=base.pad,
            batch_size=base.batch_size,
            optimizer=self.optimizer,
            state=self.state,
            sources=sources,
            seed=base.seed,
            say=lambda text: None,
        )


def _made(name: str, **settings: Any) -> Method:
    """Make a method with its defaults, but snapshots from the first step on."""
    if name in ("swa", "swag"):
        settings["start"] = 0.0
    return METHODS[name](**settings)


# --- tinyllama-3m ---


def _training(base: Base, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Trainee]]:
    """Time training steps; those that train as AdamW does show how far from 1 noise takes a ratio."""
    trainees = {}
    for name in METHODS:
        if name != "ensemble":
            model, _ = load_model(base.name, seed=args.seed, device="cpu")
            trainees[name] = Trainee.of(_made(name), model, trainable(model), args)
    candidates: dict[str, list[Part]] = {}
    for name, trainee in trainees.items():
        stream = cycle(base.batches)  # each method's own: round r has the same batches for all
        candidates[name] = [("steps", partial(trainee.train_next, stream))]
    print("Training steps", flush=True)
    seconds, _ = interleave(candidates, torch.device("cpu"), args.rounds, warmup=args.warmup, seed=args.seed)
    longest = collate(base.longest[: base.batch_size], base.pad)
    found: dict[str, Any] = {}
    plain = _held(trainees["adamw"])
    for name, trainee in trainees.items():
        found[name] = {
            "training": {
                "seconds_per_step": spread([value / STEPS for value in seconds[name]["total"]]),
                "ratio_to_adamw": ratio(seconds[name]["total"], seconds["adamw"]["total"]),
                "state_bytes": _held(trainee),
                "state_bytes_beyond_adamw": _held(trainee) - plain,
                "peak_bytes": peak(partial(trainee.train, [longest])),
            }
        }
    size = METHODS["ensemble"]().size  # type: ignore[attr-defined]
    found["ensemble"] = {
        "training": {
            "seconds_per_step": None,
            "why_null": "its members train one after the other, each as AdamW does: the ratio is their number",
            "ratio_to_adamw": size,
            "state_bytes": plain,
            "state_bytes_beyond_adamw": 0,
            "peak_bytes": found["adamw"]["training"]["peak_bytes"],
        }
    }
    return found, trainees


def _conclusions(
    methods: dict[str, Any], base: Base, trainees: dict[str, Trainee], args: argparse.Namespace
) -> dict[str, tuple[Trainee, Posterior]]:
    """Time `posterior`, in the same rounds as an epoch of AdamW's training; return the posteriors.

    `training_epochs` is its time in epochs over the rows that it goes through itself.
    """
    adamw = trainees["adamw"]
    sources = [adamw.method.posterior(adamw.trained(base, base.rows))] * METHODS["ensemble"]().size  # type: ignore[attr-defined]
    concluding = {name: (trainee.method, trainee) for name, trainee in trainees.items()}
    concluding["ensemble"] = (_made("ensemble"), adamw)
    for name in ("laplace_diag", "laplace_kfac"):
        concluding[f"{name} fisher"] = (_made(name, curvature="fisher"), trainees[name])
    posteriors: dict[str, tuple[Trainee, Posterior]] = {}
    passes: dict[str, int] = {}
    over = dict.fromkeys(concluding, len(base.rows))
    # TFB runs a hundred models on each row: on some of them, as its time is proportional to them
    over |= {"tfb": max(1, len(base.rows) // 4), "temperature": len(base.held_out)}

    def conclude(name: str) -> None:
        method, trainee = concluding[name]
        trained, passes[name] = trainee.trained(base, base.rows[: over[name]]), 0

        def draw(posterior: Posterior, rows: Sequence[Encoded], n: int) -> tuple[Tensor, Tensor]:
            passes[name] += n + 1
            return trained.draw(posterior, rows, n)

        of = replace(trained, draw=draw, sources=sources if name == "ensemble" else ())
        posteriors[name] = trainee, method.posterior(of)

    epoch = Trainee.of(adamw.method, adamw.model, adamw.params, args)
    candidates: dict[str, list[Part]] = {name: [("pass", partial(conclude, name))] for name in concluding}
    candidates["epoch"] = [("epoch", partial(epoch.train, base.batches))]
    print("Conclusions", flush=True)
    seconds, _ = interleave(candidates, torch.device("cpu"), args.passes, warmup=0, seed=args.seed)
    for name, (method, trainee) in concluding.items():
        light = replace(method, samples=1) if hasattr(method, "samples") else method  # type: ignore[type-var]
        rows = base.longest if "laplace" in name else base.rows  # prediction makes batches of its own
        trained = trainee.trained(base, rows, sources if name == "ensemble" else ())
        found = methods.setdefault(name, {})
        found["conclusion"] = {
            "rows": over[name],
            "seconds_per_row": spread([value / over[name] for value in seconds[name]["total"]]),
            "training_epochs": ratio(
                seconds[name]["total"], [value * over[name] / len(base.rows) for value in seconds["epoch"]["total"]]
            ),
            "predicted_models": passes[name],
            "peak_bytes": peak(partial(light.posterior, trained)),
        }
        found["posterior"] = {
            "kind": posteriors[name][1].kind,
            "bytes": _bytes(posteriors[name][1]),
            "ratio_to_adamw": _bytes(posteriors[name][1]) / _bytes(posteriors["adamw"][1]),
        }
    return posteriors


def _predictions(
    methods: dict[str, Any], base: Base, posteriors: dict[str, tuple[Trainee, Posterior]], args: argparse.Namespace
) -> None:
    """Time prediction with 10 draws, beside AdamW's at the mean."""
    shown = {name: of for name, of in posteriors.items() if not name.endswith("fisher")}  # the curvature's form alone
    for name in ("laplace_diag", "laplace_kfac"):
        trainee, posterior = posteriors[name]
        shown[f"{name} weights"] = trainee, posterior.weights  # type: ignore[attr-defined]

    def run(trainee: Trainee, posterior: Posterior, samples: int) -> None:
        predict(trainee.model, posterior, base.held_out, pad_token_id=base.pad, samples=samples, seed=args.seed)

    candidates: dict[str, list[Part]] = {name: [("predict", partial(run, *of, 10))] for name, of in shown.items()}
    candidates["at the mean"] = [("predict", partial(run, *posteriors["adamw"], 0))]
    print("Predictions", flush=True)
    seconds, _ = interleave(candidates, torch.device("cpu"), args.passes, warmup=0, seed=args.seed)
    for name in shown:
        methods.setdefault(name, {})["prediction"] = {
            "seconds_per_row": spread([value / len(base.held_out) for value in seconds[name]["total"]]),
            "ratio_to_adamw_at_the_mean": ratio(seconds[name]["total"], seconds["at the mean"]["total"]),
        }
    methods["adamw"]["prediction"]["seconds_per_row_at_the_mean"] = spread(
        [value / len(base.held_out) for value in seconds["at the mean"]["total"]]
    )


# --- the shapes of Llama-2-7B's adapter ---


def _adapter(args: argparse.Namespace) -> dict[str, nn.Parameter]:
    """Return the matrices of an adapter without its base, with gradients."""
    generator = torch.Generator().manual_seed(args.seed)
    made = {}
    for layer in range(args.layers):
        for projection in ("q_proj", "v_proj"):
            for side, shape in (("A", (8, args.hidden)), ("B", (args.hidden, 8))):
                p = nn.Parameter(torch.randn(shape, generator=generator) * 0.02)
                p.grad = torch.randn(shape, generator=generator) * 1e-3
                made[f"layers.{layer}.self_attn.{projection}.lora_{side}.default.weight"] = p
    return made


def _llama(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what needs the shapes alone."""
    block = torch.zeros(args.flush_mb * 2**20 // 4)
    every: dict[str, Any] = {"flush": lambda: block.add_(1), "seed": args.seed, "warmup": args.warmup}
    return {
        "adapter": {"matrices": 4 * args.layers, "numel": 32 * args.layers * args.hidden},
        "steps": _llama_steps(args, every),
        **_llama_posteriors(args, every),
    }


def _llama_steps(args: argparse.Namespace, every: dict[str, Any]) -> dict[str, Any]:
    """Time optimizer and `after_step` of the methods that do not train as AdamW does, the snapshot of ten included."""
    base = nn.Identity()  # there is none
    trainees = {
        name: Trainee.of(_made(name), base, _adapter(args), args) for name in ("adamw", "ivon", "swa", "swag", "blob")
    }
    candidates: dict[str, list[Part]] = {}
    for name, trainee in trainees.items():
        parts: list[Part] = [("draw", trainee.draw)] if name == "ivon" else []
        candidates[name] = [*parts, ("step", trainee.move)] * STEPS
    alone = nn.ParameterList(trainees["swa"].params.values())
    averaged = AveragedModel(alone)
    candidates["torch AveragedModel, a snapshot"] = [("step", partial(averaged.update_parameters, alone))]
    candidates["swa, a snapshot"] = [("step", _snapshot(trainees["swa"]))]
    candidates["swag, a snapshot"] = [("step", _snapshot(trainees["swag"]))]
    noisy = Trainee.of(_made("blob"), base, _adapter(args), args)
    noisy.optimizer.zero_grad()  # so that each pass begins a step
    x = torch.randn(args.batch_size, args.tokens, args.hidden, requires_grad=True)
    candidates["blob, flipout noise"] = [("step", partial(_flipout, noisy, x))]
    print("Optimizer steps at Llama-2-7B's shapes", flush=True)
    seconds, _ = interleave(candidates, torch.device("cpu"), max(1, args.rounds // 2), **every)
    plain = _held(trainees["adamw"])
    found: dict[str, Any] = {}
    for name, times in seconds.items():
        steps = STEPS if name in trainees else 1
        found[name] = {"seconds": spread([value / steps for value in times["total"]])}
        if name in trainees:
            found[name] |= {
                "ratio_to_adamw": ratio(times["total"], seconds["adamw"]["total"]),
                "state_bytes": _held(trainees[name]),
                "state_bytes_beyond_adamw": _held(trainees[name]) - plain,
            }
    return found


def _snapshot(trainee: Trainee) -> Callable[[], None]:
    return partial(trainee.method.after_step, trainee.params, STEPS, FOREVER, trainee.state)


def _flipout(trainee: Trainee, x: Tensor) -> None:
    """Make the noise of each A and its gradients, layer by layer, as within forward and backward pass."""
    trainee.optimizer.train()  # new noise, as there is no gradient of M or B
    for name in trainee.optimizer.G:
        x.grad = None
        trainee.optimizer.noise(name, x).sum().backward()


def _llama_posteriors(args: argparse.Namespace, every: dict[str, Any]) -> dict[str, Any]:
    """Time one batch of the curvature, its decomposition, one draw of each posterior, and the linearised covariance."""
    generator = torch.Generator().manual_seed(args.seed)
    mean = {name: p.detach() for name, p in _adapter(args).items()}

    def values(width: int) -> Tensor:
        return torch.randn(args.batch_size, args.tokens, width, generator=generator)

    inputs = {name: values(p.shape[1]) for name, p in mean.items()}
    gradients = {name: values(p.shape[0]) for name, p in mean.items()}
    tokens = args.batch_size * args.tokens
    collectors: dict[str, Curvature] = {}
    posteriors: dict[str, Any] = {}

    def first(name: str) -> None:
        collectors[name] = Diagonal() if name == "diagonal" else Kronecker(10, generator, lambda text: None)
        add(name, 1)

    def add(name: str, columns: int) -> None:
        collectors[name].add(inputs, [gradients] * columns, dict.fromkeys(inputs, tokens))

    def eigenvalues(name: str) -> None:
        collectors[name].eigenvalues()

    def conclude(name: str) -> None:
        posteriors[name] = collectors[name].gaussian(mean, 1.0)

    candidates: dict[str, list[Part]] = {
        name: [
            ("first batch", partial(first, name)),
            ("batch, 1 column", partial(add, name, 1)),
            (f"batch, {COLUMNS} columns", partial(add, name, COLUMNS)),
            ("eigenvalues", partial(eigenvalues, name)),
            ("posterior", partial(conclude, name)),
        ]
        for name in ("diagonal", "kronecker")
    }
    print("Curvature at Llama-2-7B's shapes", flush=True)
    seconds, _ = interleave(candidates, torch.device("cpu"), args.passes, **every)
    kronecker, diagonal = collectors["kronecker"], collectors["diagonal"]
    assert isinstance(kronecker, Kronecker)
    assert isinstance(diagonal, Diagonal)
    held = {"kronecker": 4 * kronecker.numbers(), "diagonal": sum(h.nbytes for h in diagonal.h.values())}
    found: dict[str, Any] = {
        "curvature": {
            name: {
                "seconds": {part: spread(times) for part, times in seconds[name].items() if part != "total"},
                "rows_per_batch": args.batch_size,
                "tokens_per_row": args.tokens,
                "collector_bytes": held[name],
                "posterior_bytes": _bytes(posteriors[name]),
                "bytes_beyond_mean": _bytes(posteriors[name]) - sum(p.nbytes for p in mean.values()),
                "bound_bytes": BOUND,
            }
            for name in candidates
        },
        "passes_batch_bytes": {  # what a batch's inputs and one column's gradients hold while they are added
            "inputs": sum(value.nbytes for value in inputs.values()),
            "gradients_per_column": sum(value.nbytes for value in gradients.values()),
        },
    }
    jacobian = {name: torch.randn(args.batch_size, 2, *p.shape, generator=generator) for name, p in mean.items()}
    inputs.clear()
    gradients.clear()
    std = {name: torch.full_like(p, 0.03) for name, p in mean.items()}
    deviations = {name: torch.randn(KEPT, *p.shape, generator=generator) for name, p in mean.items()}
    posteriors |= {
        "diagonal": DiagonalGaussian(mean, std),
        "low rank": LowRankGaussian(mean, std, deviations),
        "dropout": Dropout(mean, {name: torch.tensor(0.1) for name in mean if ".lora_A." in name}),
    }
    candidates = {f"{name}, a draw": [("run", partial(p.draw, generator))] for name, p in posteriors.items()}

    def covariances(name: str) -> None:
        for parameter, of in jacobian.items():
            posteriors[name].quadratic(parameter, of)

    candidates |= {f"{name}, covariances": [("run", partial(covariances, name))] for name in ("diagonal", "kronecker")}
    print("Posteriors at Llama-2-7B's shapes", flush=True)
    seconds, _ = interleave(candidates, torch.device("cpu"), args.rounds, **every)
    found["draws"] = {
        name: {"seconds": spread(seconds[f"{name}, a draw"]["total"]), "posterior_bytes": _bytes(posterior)}
        for name, posterior in posteriors.items()
    }
    found["linearised_covariances"] = {
        name: {
            "seconds_per_row": spread([s / args.batch_size for s in seconds[f"{name}, covariances"]["total"]]),
            "answers": 2,
            "jacobian_bytes_per_row": sum(j.nbytes for j in jacobian.values()) // args.batch_size,
        }
        for name in ("diagonal", "kronecker")
    }
    return found


# --- peers ---


def _peers(base: Base, adamw: Trainee, args: argparse.Namespace) -> dict[str, Any]:
    """Time what else can be installed, beside ours."""
    found: dict[str, Any] = {name: {"measured": None, "why_null": why} for name, why in ABSENT.items()}
    candidates: dict[str, list[Part]] = {}
    for curvature in ("ggn", "fisher"):
        candidates[f"ours, {curvature}"] = [("pass", _ours(base, adamw, curvature))]
    try:
        peer = importlib.import_module("bayesian_lora")
    except ImportError as error:
        found["bayesian_lora"] = {"measured": None, "why_null": f"not installed ({error})"}
    else:
        candidates["bayesian_lora"] = [("pass", _bayesian_lora(peer, base, adamw))]
    print("Peers", flush=True)
    seconds, _ = interleave(candidates, torch.device("cpu"), args.passes, warmup=args.warmup, seed=args.seed)
    if "bayesian_lora" in candidates:
        found["bayesian_lora"] = {
            "version": peer.__version__,
            "seconds_per_row": {n: spread([v / len(base.rows) for v in t["total"]]) for n, t in seconds.items()},
            "ours_to_it": {
                n: ratio(t["total"], seconds["bayesian_lora"]["total"]) for n, t in seconds.items() if "ours" in n
            },
        }
    swa = Trainee.of(_made("swa"), adamw.model, adamw.params, args)
    whole, alone = AveragedModel(adamw.model), nn.ParameterList(adamw.params.values())
    averaged = AveragedModel(alone)
    candidates = {
        "ours": [("snapshot", _snapshot(swa))],
        "the adapter": [("snapshot", partial(averaged.update_parameters, alone))],
        "the whole model": [("snapshot", partial(whole.update_parameters, adamw.model))],
    }
    seconds, _ = interleave(candidates, torch.device("cpu"), 10 * args.rounds, seed=args.seed, progress=False)
    found["torch AveragedModel"] = {
        "seconds_per_snapshot": {name: spread(times["total"]) for name, times in seconds.items()},
        "ours_to_it": {
            name: ratio(seconds["ours"]["total"], t["total"]) for name, t in seconds.items() if "the" in name
        },
    }
    return found


def _ours(base: Base, trainee: Trainee, curvature: str) -> Callable[[], None]:
    """Return what makes our factors: the pass over the rows, and their decomposition."""
    method: Any = _made("laplace_kfac", curvature=curvature)

    def run() -> None:
        trained = trainee.trained(base, base.rows)
        found = method.collector(trained)
        for batch in method.passes(trained):
            found.add(*batch)
        found.eigenvalues()

    return run


def _bayesian_lora(peer: Any, base: Base, trainee: Trainee) -> Callable[[], None]:
    """Return what makes bayesian_lora's factors, of the rank and threshold of its example, from the same batches.

    It does less: it samples labels, so one backward pass is all it ever makes, and it takes each row's last position
    where ours takes all. In return it decomposes each wide factor anew in each batch.
    """

    def run() -> None:
        peer.calculate_kronecker_factors(
            trainee.model, class_logits, base.batches, n_kfac=10, lr_threshold=100, target_module_keywords=["lora"]
        )
        trainee.model.eval()  # it leaves it in training mode
        trainee.optimizer.zero_grad()

    return run


# --- memory ---


def _bytes(posterior: Posterior) -> int:
    """Return the bytes of what a checkpoint stores."""
    return sum(tensor.nbytes for tensor in posterior.tensors().values())


def _held(trainee: Trainee) -> int:
    """Return the bytes of all memory that optimizer and method hold beside the parameters and their gradients."""
    given = [*trainee.params.values(), *(p.grad for p in trainee.params.values() if p.grad is not None)]
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    found: dict[int, int] = {}
    seen: set[int] = set()

    def look(at: Any) -> None:
        if id(at) in seen:
            return
        seen.add(id(at))
        if isinstance(at, Tensor):
            storage = at.untyped_storage()  # of a view, all that it keeps alive
            if storage.data_ptr() not in known:
                found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(at, Mapping):
            for value in at.values():
                look(value)
        elif isinstance(at, (list, tuple)):
            for value in at:
                look(value)
        elif isinstance(at, torch.optim.Optimizer) or type(at).__module__.startswith("varlora."):
            look(getattr(at, "__dict__", {}))

    look(trainee.optimizer)
    look(trainee.state)
    return sum(found.values())


# --- tables ---


def _print(found: dict[str, Any]) -> None:
    rows = []
    for name, of in found["methods"].items():
        training, conclusion = of["training"] or {}, of["conclusion"] or {}
        posterior, prediction = of["posterior"] or {}, of["prediction"] or {}
        rows.append(
            [
                name,
                _number(training.get("seconds_per_step"), 1000, ".1f"),
                _number(training.get("ratio_to_adamw"), 1, ".2f"),
                _number(training.get("state_bytes_beyond_adamw"), 1 / MB, ".2f"),
                _number(training.get("peak_bytes"), 1 / MB, ".1f"),
                _number(conclusion.get("seconds_per_row"), 1000, ".2f"),
                _number(conclusion.get("training_epochs"), 1, ".3f"),
                _number(conclusion.get("peak_bytes"), 1 / MB, ".1f"),
                _number(posterior.get("bytes"), 1 / MB, ".2f"),
                _number(prediction.get("seconds_per_row"), 1000, ".2f"),
                _number(prediction.get("ratio_to_adamw_at_the_mean"), 1, ".1f"),
            ]
        )
    columns = [
        "",
        "ms a step",
        "/ AdamW",
        "MB more",
        "MB peak",
        "ms a row to conclude",
        "epochs",
        "MB peak",
        "MB saved",
    ]
    print_table("tinyllama-3m", [*columns, "ms a row, S = 10", "/ mean"], rows)
    llama = found["llama2_7b"]
    rows = [
        [
            name,
            _number(of["seconds"], 1000, ".1f"),
            _number(of.get("ratio_to_adamw"), 1, ".2f"),
            _number(of.get("state_bytes_beyond_adamw"), 1 / MB, ".1f"),
        ]
        for name, of in llama["steps"].items()
    ]
    print_table("Llama-2-7B's shapes: optimizer and after_step", ["", "ms", "/ AdamW", "MB more"], rows)
    parts = list(llama["curvature"]["kronecker"]["seconds"])
    rows = [
        [
            name,
            *(_number(of["seconds"][part], 1000, ".0f") for part in parts),
            _number(of["collector_bytes"], 1 / MB, ".1f"),
            _number(of["bytes_beyond_mean"], 1 / MB, ".1f"),
        ]
        for name, of in llama["curvature"].items()
    ]
    title = f"Llama-2-7B's shapes: curvature, ms (bound {BOUND / MB:.0f} MB)"
    print_table(title, ["", *parts, "MB while collecting", "MB beside the mean"], rows)
    rows = [
        [f"{name}: a draw", _number(of["seconds"], 1000, ".1f"), _number(of["posterior_bytes"], 1 / MB, ".1f")]
        for name, of in llama["draws"].items()
    ]
    rows += [
        [f"{name}: a row's covariance", _number(of["seconds_per_row"], 1000, ".1f"), ""]
        for name, of in llama["linearised_covariances"].items()
    ]
    print_table("Llama-2-7B's shapes: posteriors", ["", "ms", "MB saved"], rows)
    rows = []
    for name, of in found["peers"].items():
        if "why_null" in of:
            rows.append([name, of["why_null"]])
        for mine, times in of.get("ours_to_it", {}).items():
            rows.append([f"{name}: time of ours to it, {mine}", _number(times, 1, ".2f")])
    print_table("Peers", ["", ""], rows)


def _number(value: Any, factor: float, form: str) -> str:
    """Format a number, a spread's or a ratio's median; nothing where there is none."""
    if isinstance(value, Mapping):
        value = value.get("median", value.get("median_of_rounds"))
    return "" if value is None or math.isnan(value) else format(factor * value, form)


if __name__ == "__main__":
    main()
