"""WinoGrande, sizes S and M (Sakaguchi et al. 2020): which of two options does the blank in a sentence stand for?

References:
    https://arxiv.org/abs/1907.10641
"""

from __future__ import annotations

from varlora.tasks.base import Example, Row, Task, label_index, text_field

__all__ = ["WINOGRANDE_M", "WINOGRANDE_S"]


def example(row: Row, index: int) -> Example:
    """Make the example of a row of the official release or of the hub, which leaves the ids out."""
    sentence, first, second = (text_field(row, name) for name in ("sentence", "option1", "option2"))
    id = text_field(row, "qID") if "qID" in row else str(index)
    # Twins differ by a word, so one must not be trained on while the other is reported on. Without ids, the rows of
    # one pair of options go together: more than the twins, never less.
    group = id.rpartition("-")[0] if "qID" in row else " | ".join(sorted((first.lower(), second.lower())))
    return Example(
        id=id,
        head="Select one of the choices that answers the following question: ",
        context=sentence,
        # The full stop that B lacks is lacking in the paper's prompt too; results compare only if it stays so.
        tail=f" Choices: A. {first}. B {second}. Answer:",
        answers=("A", "B"),
        label=label_index(row, "answer", ("1", "2")),
        choices=(first, second),
        group=group,
    )


def _task(size: str) -> Task:
    return Task(
        name=f"winogrande_{size}",
        version="1",
        example=example,
        files={"train": f"winogrande/train_{size}.jsonl", "dev": "winogrande/dev.jsonl"},
        label="answer",
        fields=("sentence", "option1", "option2"),
        hub=("allenai/winogrande", f"winogrande_{size}"),
        hub_splits={"train": "train", "dev": "validation"},
    )


WINOGRANDE_S = _task("s")
WINOGRANDE_M = _task("m")
