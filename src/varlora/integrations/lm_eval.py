"""A posterior in EleutherAI's lm-evaluation-harness: `lm_eval.simple_evaluate(model=VarloraLM("runs/my-run"), ...)`.

A request is a context x and a continuation y = y₁ … yₙ, and its likelihood is averaged over the same S fixed draws as
every other request's, as a probability and as a whole:

    p(y | x) = 1/S Σₛ pₛ(y | x);   loglikelihood = log 1/S Σₛ exp(llₛ),   llₛ = Σₜ log pₛ(yₜ | x, y₍<t₎)

`is_greedy` is of this p too: each yₜ is the token v with the largest p(y₍<t₎ v | x). So draws that make the tokens
before it more probable have more say on the next, which is what the average of whole texts' probabilities means.

Whole likelihoods also weigh a choice by how much a draw says any of the choices at all. Where a run was trained to
choose among answers, as varlora's tasks are, draws differ in that by chance; `normalise_choices` takes it out, so that
each draw has the same say, as in `varlora evaluate`:

    loglikelihood of choice c = log 1/S Σₛ exp(llₛ(c)) / Σ_c' exp(llₛ(c'))

The harness's own model class, `HFLM`, does the rest: tokens, templates, generation, and all of it where there is but
one model to run. On the harness's command line:

    python -m varlora.integrations.lm_eval run --model varlora --model_args run=runs/my-run,samples=10 --tasks ...
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varlora import __version__
from varlora.drawing import Draw
from varlora.draws import distinct, holds, means
from varlora.errors import VarloraError, did_you_mean
from varlora.loading import Loaded, load
from varlora.params import swapped, trainable
from varlora.posterior import Linearised, Mixture, Posterior, Tempered

try:
    from lm_eval.api.registry import model_registry
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:  # an optional dependency: said when it is needed
    ABSENT: ImportError | None = error
    HFLM = object
else:
    ABSENT = None
    if "varlora" not in model_registry:
        # by name, so that it is the same class whether this module is imported or run
        model_registry.register("varlora", target="varlora.integrations.lm_eval:VarloraLM")

__all__ = ["VarloraLM", "main"]

Say = Callable[[str], None]
Pair = tuple[tuple[str, str] | None, list[int], list[int]]
"""A request as the harness hands it on: its texts, the context's tokens, the continuation's tokens."""
Row = tuple[Any, ...]
"""What tells one row's choices from another's."""

SETTINGS = (
    "add_bos_token",
    "chat_template_args",
    "enable_thinking",
    "max_length",
    "mixed_precision_dtype",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
)
"""Settings of `HFLM` that do not choose a model, which the run does."""


class VarloraLM(HFLM):  # type: ignore[misc, valid-type, unused-ignore]
    """A run's posterior as a model of lm-evaluation-harness.

    Generated text is that of the posterior mean, of the first member where the posterior is a mixture: texts of several
    draws have no average. Afterwards the model is bit for bit what it was.

    Args:
        run: a run directory, or what `varlora.load` returned; it has to be given.
        samples: draws; 0: only the mean; left out: what `varlora calibrate` chose, else 10.
        tau: factor of the posterior's variance, of what was trained and without the rest of what was chosen; left out:
            what was chosen, else 1. A temperature of class logits has no part in the likelihood of texts.
        normalise_choices: make the choices of each multiple-choice row probabilities among themselves before draws are
            averaged. Lengths are then no matter of theirs: read `acc`, not `acc_norm`. At the mean it changes nothing.
            Not with the harness's `use_cache`.
        seed: seed of the draws.
        model: the base, if it is no longer where it was.
        device: where to load it to; left out, or a GPU where there is none: the current GPU, else the CPU.
        batch_size: requests a pass, or "auto".
        max_batch_size: where "auto" begins to look.
        say: told in words what a user should know.
        settings: those of `HFLM` that do not choose a model, such as `max_length` and `add_bos_token`.
            `softmax_dtype` is float32 if left out, where `HFLM` takes the base's type.

    Raises:
        VarloraError: lm-eval is not installed, or a setting is wrong, or see `varlora.load`.
    """

    def __init__(
        self,
        run: str | Path | Loaded | None = None,
        *,
        samples: int | None = None,
        tau: float | None = None,
        normalise_choices: bool = False,
        seed: int = 0,
        model: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = 64,
        say: Say = print,
        **settings: Any,
    ) -> None:
        if ABSENT is not None:
            raise VarloraError(
                f"`VarloraLM` needs lm-eval, which cannot be imported: {ABSENT}. Run: pip install varlora[lm-eval]"
            ) from ABSENT
        if run is None:  # the harness leaves it out where its `--model_args` do
            raise VarloraError(
                "Expected `run`, the run directory that base, adapter and posterior are of, but it is missing. Pass "
                "`--model_args run=runs/my-run`."
            )
        _check(samples, tau, normalise_choices, seed, settings)
        where = run.settings.run_dir if isinstance(run, Loaded) else str(run)
        if not isinstance(run, Loaded):
            device = None if str(device).startswith("cuda") and not torch.cuda.is_available() else device
            run = load(run, model=model, device=device)
        chosen = run.calibration if tau is None else None
        self.say, self.seed, self.normalise_choices = say, seed, normalise_choices
        self._rows: Sequence[Row] | None = None
        self.posterior: Posterior
        self.posterior, self.samples, tau, self.how = run.used(samples, tau)
        self.facts: dict[str, Any] = {
            "version": __version__,
            "run": where,
            "method": run.settings.method,
            "posterior": run.posterior.kind,
            "samples": self.samples,
            "tau": tau,
            "pruned": chosen.pruned if chosen else 0.0,
            "normalise_choices": normalise_choices,
            "seed": seed,
        }
        with _without_warnings("lm_eval.models.huggingface"):  # of a model that is not given by name
            super().__init__(
                run.model,  # type: ignore[arg-type, unused-ignore]
                tokenizer=run.tokenizer,
                batch_size=batch_size,
                max_batch_size=max_batch_size,
                **{"softmax_dtype": "float32", **settings},
            )
        self.draws = self._drawn()
        self.facts["models"] = len(self.draws)
        self._say_what_differs()

    def _drawn(self) -> list[Draw]:
        """Return the models that are averaged, with shares that sum to 1."""
        generator = torch.Generator(next(iter(trainable(self.model).values())).device).manual_seed(self.seed)
        of_mean = self.samples == 0
        draws = distinct(
            means(self.posterior) if of_mean else self.posterior.drawn(self.samples, generator, self.how).models()
        )
        total = sum(draw.weight for draw in draws)
        return [draw._replace(weight=draw.weight / total) for draw in draws]

    def _say_what_differs(self) -> None:
        if holds(self.posterior, Tempered):
            self.say("The temperature of class logits has no part in the likelihood of texts: it is left out here.")
        if self.samples and holds(self.posterior, Linearised):
            self.say(
                "This posterior is of the model linearised in its weights, which gives class logits alone. Here its "
                "Gaussian is drawn from without the linearisation, which may be less accurate: compare with samples=0."
            )

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take the harness's cache, which knows requests by their texts, and not what they were choices among.

        Raises:
            VarloraError: `normalise_choices` is set: a row of which some choices are in the cache would be made
                probabilities among the others.
        """
        if self.normalise_choices and len(self.draws) > 1 and getattr(cache_hook, "dbdict", None) is not None:
            raise VarloraError(
                "Expected `normalise_choices=False` with a cache of the harness, but got True: what is in the cache is "
                "left out of its row, and the other choices would be normalised without it. Leave out `use_cache` "
                "(`--use_cache`), or `normalise_choices`."
            )
        super().set_cache_hook(cache_hook)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return for each request its loglikelihood in nats, of the average over draws, and whether it is greedy."""
        self._rows = _rows(requests) if self.normalise_choices else None
        try:
            return super().loglikelihood(list(requests), disable_tqdm=disable_tqdm)
        finally:
            self._rows = None

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the loglikelihood of each whole text, in nats: of the average over draws of its probability.

        A text that is longer than the context is cut into windows as in `HFLM`; each draw reads all of a text's windows
        before draws are averaged.
        """
        windows: list[Pair] = []
        owners = []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(index)
        lls = torch.zeros(len(self.draws), len(requests), dtype=torch.float64)  # (S, N)
        for of_draw, draw in zip(lls, self.draws):
            with swapped(self.model, draw.weights):
                scores = super()._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
            of_draw.index_add_(0, torch.tensor(owners, dtype=torch.long), _column(scores))
        found = _averaged(lls, self.draws).tolist()
        for request, ll in zip(requests, found):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, ll)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return for each request the text that follows at the posterior mean; of a mixture, at its first member's."""
        if holds(self.posterior, Mixture):
            self.say("Texts are generated by the first member alone: texts of several models have no average.")
        with self.posterior.at_mean(self.model):
            return super().generate_until(list(requests), disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return loglikelihood and whether it is greedy, of the average over draws."""
        for texts, context, continuation in requests:
            if not (context and 0 < len(continuation) <= self.max_length):
                raise VarloraError(
                    f"Expected a context and a continuation of 1 to {self.max_length} tokens, but got {len(context)} "
                    f"and {len(continuation)} tokens in {texts!r:.200}. Mend the task, or pass another `max_length`."
                )
        if len(self.draws) == 1:
            hook = self.cache_hook  # type: ignore[has-type, unused-ignore]
            self.cache_hook = _NumbersAlone(hook)
            try:
                with swapped(self.model, self.draws[0].weights):
                    found = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)  # type: ignore[arg-type, unused-ignore]
            finally:
                self.cache_hook = hook
            _check_numbers(_column(found)[None])
            return found
        # requests that differ in their last token alone, such as the letters of choices, need one pass
        groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            groups.setdefault((tuple(context), tuple(continuation[:-1])), []).append(index)
        # the longest first: what does not fit into memory is known at once
        order = sorted(groups, key=lambda group: len(group[0]) + len(group[1]), reverse=True)
        cut = sum(len(context) + len(begun) > self.max_length for context, begun in order)
        if cut:
            self.say(f"{cut} contexts were too long for {self.max_length} tokens and have been cut from the left.")
        size = override_bs or self._batch_size_for(requests[groups[order[0]][0]] if order else None)
        lls = torch.empty(len(self.draws), len(requests), dtype=torch.float64)  # (S, N)
        is_greedy = torch.empty(len(requests), dtype=torch.bool)
        with tqdm(total=len(requests), disable=disable_tqdm, desc=f"Loglikelihoods, {len(self.draws)} draws") as bar:
            for at in range(0, len(order), size):
                batch = order[at : at + size]
                lasts = [[requests[index][2][-1] for index in groups[group]] for group in batch]
                for group, scores in zip(batch, self._scored(batch, lasts)):
                    indices = groups[group]
                    lls[:, indices], is_greedy[indices] = scores
                    bar.update(len(indices))
                    if self._rows is None:  # or what is found here is not the end of it
                        self._cache([requests[index] for index in indices], _averaged(scores[0], self.draws), scores[1])
        if self._rows is not None:
            lls = _among_choices(lls, self._rows)
        return list(zip(_averaged(lls, self.draws).tolist(), is_greedy.tolist()))

    def _cache(self, requests: Sequence[Pair], lls: Tensor, is_greedy: Tensor) -> None:
        for (texts, _, _), *answer in zip(requests, lls.tolist(), is_greedy.tolist()):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, tuple(answer))

    def _batch_size_for(self, longest: Pair | None) -> int:
        if self.batch_size != "auto":
            return int(self.batch_size)
        self.batch_sizes = {0: self._detect_batch_size([longest] if longest else None)}
        return int(self.batch_sizes[0])

    @torch.no_grad()
    def _scored(
        self, batch: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], lasts: Sequence[Sequence[int]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each (context, all but the last token) what is found for its k last tokens.

        That is the loglikelihood by each draw, (S, k) float64, and whether it is greedy for the average, (k,).
        """
        rows = [list(context + begun)[-self.max_length :] for context, begun in batch]
        width = max(map(len, rows))
        # padded on the right, as in `HFLM`: no token sees what is behind it
        inputs = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)  # (B, T)
        begun_tokens = [torch.tensor(begun, device=self.device, dtype=torch.long) for _, begun in batch]
        last_tokens = [torch.tensor(of_row, device=self.device) for of_row in lasts]
        lls: list[list[Tensor]] = [[] for _ in batch]  # S times (last tokens,) for each row
        joint: list[Tensor] = []  # (n, V) for each row: log Σₛ wₛ pₛ(y₍<t₎ v | x) for each t and v
        for draw in self.draws:
            with swapped(self.model, draw.weights):
                logits = self._model_call(inputs)  # (B, T, V)
            for i, (row, begun, last) in enumerate(zip(rows, begun_tokens, last_tokens)):
                of_row = logits[i, len(row) - len(begun) - 1 : len(row)]  # (T, V) -> (n, V)
                log_probs = of_row.log_softmax(-1, dtype=self.softmax_dtype)
                chosen = log_probs[:-1].gather(1, begun[:, None])[:, 0].cumsum(0)  # (n - 1,) log p(y₁ … yₜ | x)
                before = torch.cat([chosen.new_zeros(1), chosen])
                following = log_probs + before[:, None] + math.log(draw.weight)
                lls[i].append(before[-1].double().cpu() + log_probs[-1, last].double().cpu())
                if len(joint) == i:
                    joint.append(following)
                else:
                    torch.logaddexp(joint[i], following, out=joint[i])
        for i, (begun, last) in enumerate(zip(begun_tokens, last_tokens)):
            greedy = joint[i].argmax(-1)  # (n,)
            is_greedy = (greedy[-1] == last) & (greedy[:-1] == begun).all()
            yield torch.stack(lls[i]), is_greedy.cpu()

    def get_model_info(self) -> dict[str, Any]:
        """Return where results come from, for the harness to write beside them."""
        count = sum(parameter.numel() for parameter in self.model.parameters())
        base = getattr(self.config, "_name_or_path", "")
        info = {"model_num_parameters": count, "model_dtype": self.model.dtype, "model_revision": "", "model_sha": ""}
        return {**info, "varlora": {**self.facts, "base": base}}


class _NumbersAlone:
    """The harness's cache, without what is no number: the evaluation ends with an error, and may be begun again."""

    def __init__(self, hook: Any) -> None:
        self.hook = hook

    def add_partial(self, attribute: str, request: Any, answer: tuple[float, bool]) -> None:
        """Hand an answer on."""
        if not math.isnan(answer[0]):
            self.hook.add_partial(attribute, request, answer)


def _check_numbers(lls: Tensor) -> None:
    if lls.isnan().any():
        wrong = lls.isnan().any(1).nonzero()[:, 0].tolist()
        raise VarloraError(
            f"Expected loglikelihoods of every draw, but those of draws {wrong} are no numbers: their logits overflow. "
            "Pass a smaller `tau`, or samples=0, or train with dtype bfloat16 or float32."
        )


def _averaged(lls: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Return log Σₛ wₛ exp(llₛ), (N,), from (S, N) float64."""
    _check_numbers(lls)
    weights = torch.tensor([draw.weight for draw in draws], dtype=torch.float64)
    return (lls + weights.log()[:, None]).logsumexp(0)


def _rows(requests: Sequence[Any]) -> list[Row]:
    """Return the row that each request is a choice of.

    Choices without their question, which some tasks ask for as well, are a row of their own; so is each repetition.
    """
    seen: Counter[Row] = Counter()
    rows = []
    for request in requests:
        row = (request.task_name, request.doc_id, request.args[0] == "")
        rows.append((*row, seen[(*row, request.idx)]))
        seen[(*row, request.idx)] += 1
    return rows


def _among_choices(lls: Tensor, rows: Sequence[Row]) -> Tensor:
    """Return log-probabilities of each row's choices among themselves, by draw, (S, N); what is alone stays."""
    members: dict[Row, list[int]] = {}
    for index, row in enumerate(rows):
        members.setdefault(row, []).append(index)
    found = lls.clone()
    for (_, doc_id, *_), indices in members.items():
        if doc_id is not None and len(indices) > 1:
            found[:, indices] = lls[:, indices].log_softmax(1)
    return found


def _column(scores: Sequence[tuple[float, bool]]) -> Tensor:
    return torch.tensor([ll for ll, _ in scores], dtype=torch.float64)


def _check(samples: Any, tau: Any, normalise_choices: Any, seed: Any, settings: dict[str, Any]) -> None:
    """Refuse what the harness would hand on or swallow."""
    numbers = {"samples": samples if samples is not None else 0, "seed": seed}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise VarloraError(
                f"Expected `{name}` to be a whole number >= 0, but got {value!r}. Pass samples=10, or samples=0 for "
                "the mean, and seed=0."
            )
    if tau is not None and (isinstance(tau, bool) or not isinstance(tau, int | float)):
        raise VarloraError(f"Expected `tau` to be a factor of the variance, but got {tau!r}. 1 keeps it.")
    if not isinstance(normalise_choices, bool):
        raise VarloraError(f"Expected `normalise_choices` to be True or False, but got {normalise_choices!r}.")
    for name in settings:
        if name not in SETTINGS:
            known = (
                "samples",
                "tau",
                "normalise_choices",
                "seed",
                "model",
                "device",
                "batch_size",
                "max_batch_size",
                *SETTINGS,
            )
            raise VarloraError(
                f"Expected settings of `VarloraLM`, but got `{name}`: base, adapter and their types are the run's, and "
                f"code that comes with a model is never run. {did_you_mean(name, known)}"
            )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise VarloraError(
            f"Expected one process, but WORLD_SIZE is {os.environ['WORLD_SIZE']}, and each would do all of the work. "
            "Start it without `accelerate launch` or `torchrun`; several runs can be evaluated side by side."
        )


@contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the harness's own command line, to which the model `varlora` is known.

    Args:
        arguments: those of `lm-eval`; left out: the process's.
    """
    if ABSENT is not None:
        raise SystemExit(f"error: lm-eval cannot be imported: {ABSENT}. Run: pip install varlora[lm-eval]")
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm-eval", *(sys.argv[1:] if arguments is None else arguments)]
    try:
        cli_evaluate()
    except VarloraError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
