"""OpenBookQA (Mihaylov et al. 2018): elementary science questions with four choices.

References:
    https://arxiv.org/abs/1809.02789
"""

from __future__ import annotations

from varlora.tasks.base import Example, Row, Task, multiple_choice

__all__ = ["OPENBOOKQA"]


def example(row: Row, index: int) -> Example:
    """Make the example of a row of the official release (`question.stem`) or of the hub (`question_stem`)."""
    return multiple_choice(row, index, "question_stem")


OPENBOOKQA = Task(
    name="openbookqa",
    version="1",
    example=example,
    files={split: f"openbookqa/{split}.jsonl" for split in ("train", "dev", "test")},
    label="answerKey",
    fields=("question",),
    hub=("allenai/openbookqa", "main"),
    hub_splits={"train": "train", "dev": "validation", "test": "test"},
    row_filter=lambda example: len(example.answers) == 4,
)
