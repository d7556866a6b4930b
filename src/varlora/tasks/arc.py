"""ARC, challenge and easy set (Clark et al. 2018): science questions with three to five choices.

References:
    https://arxiv.org/abs/1803.05457
"""

from __future__ import annotations

from varlora.tasks.base import Example, Row, Task, multiple_choice

__all__ = ["ARC_CHALLENGE", "ARC_EASY"]


def example(row: Row, index: int) -> Example:
    """Make the example of a row of the official release (`question.stem`) or of the hub (`question`)."""
    return multiple_choice(row, index, "question")


def _task(name: str, config: str) -> Task:
    return Task(
        name=name,
        version="1",
        example=example,
        files={split: f"{name}/{split}.jsonl" for split in ("train", "dev", "test")},
        label="answerKey",
        fields=("question",),
        hub=("allenai/ai2_arc", config),
        hub_splits={"train": "train", "dev": "validation", "test": "test"},
        row_filter=lambda example: len(example.answers) == 4,
    )


ARC_CHALLENGE = _task("arc_challenge", "ARC-Challenge")
ARC_EASY = _task("arc_easy", "ARC-Easy")
