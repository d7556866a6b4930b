"""BoolQ (Clark et al. 2019): yes or no questions about a passage.

References:
    https://arxiv.org/abs/1905.10044
"""

from __future__ import annotations

from varlora.tasks.base import Example, Row, Task, label_index, text_field

__all__ = ["BOOLQ"]


def example(row: Row, index: int) -> Example:
    """Make the example of a row; the release and the hub share its fields and give no ids."""
    return Example(
        id=str(index),
        head=f"Answer the question with only True or False: {text_field(row, 'question')} Context: ",
        context=text_field(row, "passage"),
        tail="",  # the paper's prompt ends with the passage, without "Answer:"
        answers=("False", "True"),
        label=label_index(row, "answer", (False, True)),
        cut="right",
    )


BOOLQ = Task(
    name="boolq",
    version="1",
    example=example,
    files={"train": "boolq/train.jsonl", "dev": "boolq/dev.jsonl"},
    label="answer",
    fields=("question", "passage"),
    hub=("google/boolq", None),
    hub_splits={"train": "train", "dev": "validation"},
)
