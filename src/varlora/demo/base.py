"""The bundled base: a Llama of 0.9 million parameters that knows a made-up world, and tasks that ask about it.

It was pretrained from nothing by `pretraining/pretrain.py`, on text in which 70 % of the world's facts are told. The
tasks ask about told and never told facts in the paper's formats, and their rows say which is which. Zero-shot the base
answers near chance; fine-tuned, it answers what it was told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from varlora.model import LoRA, load_model
from varlora.tasks import Task, get_task

__all__ = ["BUNDLED", "TASKS", "Demo", "load"]

BUNDLED = Path(__file__).parent / "bundled"
"""`base/`: weights, tokenizer and `pretraining.json`; `tasks/`: a task file and two row files for each task."""
TASKS = ("four_choices", "two_choices", "true_or_false")
"""Formats of ARC and OpenBookQA, of WinoGrande, and of BoolQ."""


@dataclass(frozen=True)
class Demo:
    """A real model and real tasks, small enough for tests."""

    model: Any
    """The base with a fresh adapter, in evaluation mode."""
    tokenizer: PreTrainedTokenizerBase
    """Its tokenizer."""
    tasks: Mapping[str, Task]
    """Name -> task, with splits train and dev; each example's `slice` is `told` or `never told`."""
    folder: Path
    """Where the base lies, for whatever loads a model from a folder."""


LORA = LoRA()


def load(lora: LoRA | None = LORA, seed: int = 0, device: str = "cpu") -> Demo:
    """Load the bundled base and its tasks, in well under a second.

    Args:
        lora: the adapter's settings; None: the frozen base alone.
        seed: of the adapter's random A.
        device: where the model goes.

    Example:
        >>> demo = load()
        >>> demo.model.num_parameters() < 1_000_000, list(demo.tasks)
        (True, ['four_choices', 'two_choices', 'true_or_false'])
        >>> from varlora.tasks import load_rows
        >>> load_rows(demo.tasks["four_choices"], "dev").examples[0].answers
        ('A', 'B', 'C', 'D')
    """
    folder = BUNDLED / "base"
    model, tokenizer = load_model(folder, lora=lora, seed=seed, device=device)
    return Demo(model, tokenizer, {name: get_task(BUNDLED / "tasks" / f"{name}.yaml") for name in TASKS}, folder)
