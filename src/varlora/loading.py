"""What a run is made of: its base with the adapter, its posterior, and the rows of its task."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from varlora.calibration import Calibration, load_calibration
from varlora.checkpoint import load_adapter, load_posterior
from varlora.config import TASK_FILE, Settings, settings_of
from varlora.data import EncodedSet, encode_all
from varlora.drawing import PLAIN, Drawing
from varlora.errors import DamagedFileError, VarloraError, did_you_mean
from varlora.files import read_json
from varlora.model import base_fingerprint, first_position, load_model, same_checksum
from varlora.posterior import Posterior
from varlora.prompt import Encoded
from varlora.tasks import Task, get_task, is_task_file, load_rows, split_calibration
from varlora.tasks.base import Example

__all__ = [
    "Loaded",
    "Progress",
    "Say",
    "check_same",
    "checksum_of",
    "digest_of",
    "encode_rows",
    "kept_task",
    "load",
    "load_base",
    "load_parts",
    "longest_prompt",
    "no_progress",
    "pad_of",
    "revision_of",
    "rows_of_split",
    "say_unsliced",
    "trained_settings",
    "trained_task",
    "training_rows",
]

Say = Callable[[str], None]
"""Told in words what a user should know."""
Progress = Callable[[int], AbstractContextManager[Callable[[int], None] | None]]
"""Given how many there are, of rows or rounds, a context that gives a function to call with those done."""


@dataclass(frozen=True)
class Loaded:
    """What a run directory holds."""

    model: nn.Module
    """Base and adapter, at the posterior mean, in evaluation mode."""
    posterior: Posterior
    """The posterior over the adapter."""
    tokenizer: PreTrainedTokenizerBase
    """The base's tokenizer."""
    settings: Settings
    """The settings that it was trained with."""
    calibration: Calibration | None = None
    """How the posterior is to be used, if `varlora calibrate` chose it."""

    @property
    def calibrated(self) -> Posterior:
        """The posterior as it is to be drawn from: calibrated, where that was done."""
        return self.posterior if self.calibration is None else self.calibration.applied(self.posterior)

    def used(self, samples: int | None = None, tau: float | None = None) -> tuple[Posterior, int, float, Drawing]:
        """Return the posterior to draw from, the number of draws, the factor τ of its variance, and how it is drawn.

        Args:
            samples: draws; 0: only the mean; left out: what `calibrate` chose, else 10.
            tau: factor of the variance of what was trained, without the rest of what was chosen; left out: what was
                chosen, else 1.
        """
        chosen = self.calibration if tau is None else None
        if samples is None:
            samples = chosen.samples if chosen else 10
        if chosen:
            return chosen.applied(self.posterior), samples, chosen.tau, chosen.how
        tau = 1.0 if tau is None else tau
        return self.posterior.scale(tau), samples, tau, PLAIN

    def __iter__(self) -> Iterator[Any]:
        """Unpack as `model, posterior = load(run_dir)`."""
        return iter((self.model, self.posterior))


def kept_task(run_dir: Path, settings: Settings) -> str:
    """Return a run's task, by the copy that it kept of a task file, which may have been changed since."""
    kept = run_dir / TASK_FILE
    return str(kept) if is_task_file(settings.task) and kept.is_file() else settings.task


def trained_task(run_dir: Path, settings: Settings) -> Task:
    """Return a run's task as it was trained on, with its files where they were."""
    task = get_task(kept_task(run_dir, settings))
    return dataclasses.replace(task, folder=Path(settings.task).parent) if is_task_file(settings.task) else task


def trained_settings(run_dir: Path) -> Settings:
    """Return the settings of a run that is trained.

    Raises:
        VarloraError: there is no such run, or its training is not finished.
        DamagedFileError: its config.json is.
    """
    settings = settings_of(run_dir)
    if not (run_dir / "adapter").is_dir():
        raise VarloraError(
            f"{run_dir} has no adapter yet: training is not finished. Go on with `varlora train --resume`."
        )
    return settings


def load(
    run_dir: str | Path, *, model: str | None = None, device: str | None = None, calibrated: bool = True
) -> Loaded:
    """Load a trained run: `model, posterior = varlora.load(run_dir)`, bit for bit what was saved.

    Args:
        run_dir: a run directory.
        model: the base, if it is no longer where it was; from the hub, its main branch.
        device: where to load it to; left out: the current GPU, else the CPU.
        calibrated: whether to read what `calibrate` chose; it may be damaged, or about to be chosen anew.

    Returns:
        The model at the posterior mean, and the posterior; as fields also the tokenizer, the settings, and what was
        calibrated.

    Raises:
        DamagedFileError: a file is absent, altered or of another model.
        VarloraError: the run is not finished, or its base cannot be loaded.

    Example:
        >>> model, posterior = load(run_dir)  # a run that `train` made
        >>> posterior
        Point(16,384 weights)
    """
    run_dir = Path(run_dir)
    settings = trained_settings(run_dir)
    trained_on = read_json(run_dir / "config.json").get("base")
    where: dict[str, Any] = {"name": str(run_dir), "model": model, "device": device, "calibrated": calibrated}
    return load_parts(settings, run_dir / "adapter", trained_on, **where)


def load_parts(
    settings: Settings,
    adapter: Path,
    trained_on: str | None,
    *,
    name: str,
    model: str | None = None,
    device: str | None = None,
    calibrated: bool = True,
) -> Loaded:
    """Load a base, and an adapter with its posterior and calibration on it.

    Args:
        settings: those that it was trained with.
        adapter: the folder of the adapter's files.
        trained_on: checksum of the base that it was trained on, if that is known.
        name: what messages call it.
        model: the base, if it is no longer where it was; from the hub, its main branch.
        device: where to load it to; left out: the current GPU, else the CPU.
        calibrated: whether to read what `calibrate` chose.

    Raises:
        DamagedFileError: a file is absent, altered or of another model.
        VarloraError: the base cannot be loaded.
    """
    loaded, tokenizer = load_base(settings, model, device)
    posterior = load_posterior(loaded, adapter)
    if trained_on is not None and not same_checksum(trained_on, base_fingerprint(loaded)):
        raise _other(f"the base model {model or settings.model}", name)
    load_adapter(loaded, adapter)
    return Loaded(loaded, posterior, tokenizer, settings, load_calibration(adapter) if calibrated else None)


def load_base(settings: Settings, model: str | None = None, device: str | None = None) -> tuple[Any, Any]:
    """Return the base of a run with a fresh adapter, and its tokenizer."""
    return load_model(
        model or settings.model,
        dtype=settings.dtype,
        quantization=settings.quantization,
        lora=settings.lora,
        seed=settings.seed,
        device=device,
        revision=revision_of(settings, model),
    )


def revision_of(settings: Settings, model: str | None) -> str | None:
    """Return the revision of a run's base, or of the `model` in its place: another repository has its own."""
    return settings.revision if model in (None, settings.model) else None


def _other(what: str, run: str) -> DamagedFileError:
    return DamagedFileError(
        f"Expected {what} to be what {run} was trained with, but its checksum differs. "
        "Pass the original, or train a new run."
    )


def check_same(run_dir: Path, key: str, checksum: str, what: str) -> None:
    """Refuse a base or rows that are not those which a run was trained with; they may lie elsewhere, not differ."""
    if not same_checksum(read_json(run_dir / "config.json").get(key, checksum), checksum):
        raise _other(what, str(run_dir))


def checksum_of(rows: Sequence[Encoded]) -> str:
    """Return the checksum by which rows are known to be those that a run was trained with, or held out."""
    return hashlib.sha256(repr(list(rows)).encode()).hexdigest()


def digest_of(examples: Sequence[Example]) -> str:
    """Return the checksum by which rows are known before a tokenizer sees them, in whatever order they come."""
    each = sorted(repr((row.id, row.prompt, row.answers, row.label)) for row in examples)
    return hashlib.sha256("\n".join(each).encode()).hexdigest()


def training_rows(task: Task, settings: Settings, say: Say) -> tuple[list[Example], list[Example]]:
    """Return the training rows and the calibration rows that were held out of them."""
    rows = load_rows(task, "train", settings.data_dir, settings.skip_bad_rows, settings.row_filter)
    _say_skipped(rows.skipped, rows.problems, say)
    if not any(choice in row.prompt for row in rows.examples for choice in row.choices or ("",)):
        say(
            f"No prompt of {task.name} has any of its choices, so the model cannot know what it chooses from. Write "
            "{choices} into the task file's `prompt`."
        )
    return split_calibration(rows.examples, settings.calibration_fraction, settings.seed)


def rows_of_split(task: Task, split: str, settings: Settings, say: Say) -> list[Example]:
    """Return the rows of an official split, or of `calibration`: the training rows that were held out.

    These are not among those of `train`: what was chosen on them is not shown on them.
    """
    if split == "train":
        return training_rows(task, settings, say)[0]
    if split == "calibration":
        calibration = training_rows(task, settings, say)[1]
        if not calibration:
            if len(settings.sources) > 1:
                raise VarloraError(
                    "This run was concluded from finished ones that held out no rows in common, so none are left to "
                    "choose on. Calibrate those, or train `ensemble` itself with `--calibration-fraction 0.1`."
                )
            raise VarloraError("This run held no rows out for calibration. Train with `--calibration-fraction 0.1`.")
        return calibration
    if split not in task.files:
        hint = did_you_mean(split, [*task.files, "calibration"])
        raise VarloraError(f"Expected `split` of {task.name}, but got `{split}`. {hint}")
    rows = load_rows(task, split, settings.data_dir, settings.skip_bad_rows, settings.row_filter)
    _say_skipped(rows.skipped, rows.problems, say)
    return rows.examples


def _say_skipped(skipped: int, problems: Sequence[str], say: Say) -> None:
    if skipped:
        say(f"{skipped} malformed rows were left out; the first: {problems[0]}")


def say_unsliced(task: Task, examples: Sequence[Example], say: Say) -> None:
    """Say so where no row has the field that the task slices its reports by."""
    if task.slice and not any(example.slice for example in examples):
        say(f"No row of {task.name} has the field `{task.slice}`, so that reports cannot be sliced by it.")


def encode_rows(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], settings: Settings, say: Say
) -> EncodedSet:
    """Return examples as token ids, and say how many prompts were cut to what the run or the model takes."""
    length = longest_prompt(model, settings, say)
    encoded = encode_all(tokenizer, examples, length, settings.chat)
    if encoded.cut:
        say(f"{encoded.cut} of {len(examples)} prompts were longer than {length} tokens and have been cut.")
    return encoded


def longest_prompt(model: nn.Module, settings: Settings, say: Say) -> int | None:
    """Return the tokens of the longest prompt that a run takes, which is never more than the model's context."""
    config: Any = model.config
    text = config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None) or math.inf  # MPT
    context -= first_position(config)
    if settings.max_length is not None and settings.max_length > context:
        say(f"`max_length` {settings.max_length} is more than the model's context; {context} tokens are used.")
    length = min(settings.max_length or math.inf, context)
    return None if length == math.inf else int(length)


def pad_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token to pad with."""
    return int(tokenizer.pad_token_id or 0)


def no_progress(count: int) -> AbstractContextManager[None]:
    """Show no progress: a `Progress` for callers that gave none."""
    return nullcontext()
