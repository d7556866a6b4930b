"""The tasks, and how their rows are loaded, checked and split.

`TASKS` lists the tasks that come with the package; a task file (see `varlora.tasks.local`) describes one of your own.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from varlora.errors import ConfigError, TaskError, did_you_mean
from varlora.tasks.arc import ARC_CHALLENGE, ARC_EASY
from varlora.tasks.base import Example, Row, Task, UnclosedQuoteError, parse_rows, text_field
from varlora.tasks.boolq import BOOLQ
from varlora.tasks.local import load_task
from varlora.tasks.openbookqa import OPENBOOKQA
from varlora.tasks.winogrande import WINOGRANDE_M, WINOGRANDE_S

__all__ = [
    "TASKS",
    "Example",
    "Rows",
    "Task",
    "get_task",
    "is_task_file",
    "load_rows",
    "make_examples",
    "parse_rows",
    "split_calibration",
]

TASKS: dict[str, Task] = {
    "winogrande_s": WINOGRANDE_S,
    "winogrande_m": WINOGRANDE_M,
    "arc_challenge": ARC_CHALLENGE,
    "arc_easy": ARC_EASY,
    "openbookqa": OPENBOOKQA,
    "boolq": BOOLQ,
}


@dataclass(frozen=True)
class Rows:
    """The examples of a split, and what was left out."""

    examples: list[Example]
    """In the order of the file."""
    skipped: int
    """Malformed rows, left out because `skip_bad_rows` was set."""
    filtered: int
    """Rows that the task's row filter left out."""
    source: str
    """The file or hub dataset that they were read from."""
    problems: tuple[str, ...] = ()
    """What was wrong with each skipped row."""


def get_task(name: str | Path) -> Task:
    """Return a task by its name in `TASKS`, or the one that a task file (.yaml) describes.

    Args:
        name: a key of `TASKS`, or the path of a task file.

    Returns:
        The task: its files or dataset, its splits, and how a row becomes an example.

    Raises:
        ConfigError: no such task, or problems in the task file.

    Example:
        >>> get_task("boolq").evaluation
        'dev'
    """
    if str(name) in TASKS:
        return TASKS[str(name)]
    if is_task_file(name):
        return load_task(Path(name))
    hint = f"{did_you_mean(str(name), TASKS)} Or give the path of a task file (.yaml) for data of your own."
    raise ConfigError([f"Expected `task` to be a known task, but got `{name}`. {hint}"])


def is_task_file(name: str | Path) -> bool:
    """Whether a task is named by the path of a task file.

    Example:
        >>> is_task_file("boolq"), is_task_file("mine/task.yaml")
        (False, True)
    """
    return Path(name).suffix in (".yaml", ".yml")


def load_rows(
    task: Task,
    split: str,
    data_dir: str | Path | None = None,
    skip_bad_rows: bool = False,
    row_filter: bool = False,
) -> Rows:
    """Load the examples of one split, from files in the schema of the official release or else from the hub.

    Args:
        task: the task.
        split: a key of `task.files`.
        data_dir: the folder that `task.files` are relative to; None: the hub, or the task file's own folder.
        skip_bad_rows: leave malformed rows out and count them, instead of raising an error at the first.
        row_filter: keep only the rows that the paper keeps.

    Returns:
        Rows, all of them with a label.

    Raises:
        TaskError: no such split or file, a hub dataset that cannot be reached, or a malformed row.

    Example:
        >>> from varlora.demo.base import BUNDLED
        >>> rows = load_rows(get_task(BUNDLED / "tasks" / "two_choices.yaml"), "dev")
        >>> len(rows.examples), rows.examples[0].answers, rows.skipped
        (600, ('A', 'B'), 0)
    """
    if split not in task.files:
        raise TaskError(f"Expected `split` of {task.name}, but got `{split}`. {did_you_mean(split, task.files)}")
    folder = Path(data_dir) if data_dir is not None else task.folder
    if folder is None:
        source, unit, rows = _hub_rows(task, split)
        result = make_examples(task, rows, source, unit, skip_bad_rows=skip_bad_rows, row_filter=row_filter)
    else:
        path = folder / task.files[split]
        if not path.is_file():
            raise TaskError(
                f"Expected the {split} rows of {task.name} in {path}, but there is no such file. "
                f"Point `data_dir` (--data-dir) to the folder that holds `{task.files[split]}`."
            )
        with path.open("rb") as file:
            rows = parse_rows(file, path.suffix.lower())
            result = make_examples(task, rows, str(path), skip_bad_rows=skip_bad_rows, row_filter=row_filter)
    return replace(result, examples=_limited(result.examples, task.limit.get(split)))


def make_examples(
    task: Task,
    rows: Iterable[tuple[int, Row | TaskError]],
    source: str,
    unit: str = "line",
    *,
    labelled: bool = True,
    skip_bad_rows: bool = False,
    row_filter: bool = False,
) -> Rows:
    """Make examples of numbered rows, such as `parse_rows(sys.stdin.buffer, ".jsonl")`.

    Args:
        task: the task whose schema the rows have.
        rows: (number, row) or (number, error) pairs.
        source: what an error message calls the rows' origin.
        unit: what an error message calls the number.
        labelled: whether a row without label is malformed; False: its label is None.
        skip_bad_rows: as in `load_rows`.
        row_filter: as in `load_rows`.

    Example:
        >>> rows = [(1, {"question": "is snow cold", "passage": "Snow is frozen water."})]
        >>> make_examples(TASKS["boolq"], rows, "stdin", labelled=False).examples[0].prompt
        'Answer the question with only True or False: is snow cold Context: Snow is frozen water.'
    """
    examples: list[Example] = []
    problems: list[str] = []
    seen: dict[str, int] = {}
    filtered = 0
    for index, (number, row) in enumerate(rows):
        try:
            if isinstance(row, TaskError):
                raise row
            example = task.example(row if labelled or task.label not in row else {**row, task.label: None}, index)
            if labelled and example.label is None:
                if task.label not in row:
                    text_field(row, task.label)  # raises: names the fields found
                raise TaskError(f"Expected field `{task.label}` to hold the right answer, but it is missing or empty.")
            if example.id in seen:
                raise TaskError(
                    f"Expected ids that differ, but `{example.id}` is that of {unit} {seen[example.id]} too."
                )
        except TaskError as error:
            problem = f"{source}, {unit} {number}: {error}"
            if isinstance(error, UnclosedQuoteError):
                raise TaskError(problem) from None
            if not skip_bad_rows:
                cure = "Mend the row, or leave malformed rows out with `skip_bad_rows=True` (--skip-bad-rows)."
                raise TaskError(f"{problem} {cure}") from None
            problems.append(problem)
            continue
        seen[example.id] = number
        if row_filter and task.row_filter is not None and not task.row_filter(example):
            filtered += 1
        else:
            examples.append(example)
    if not examples:
        first = f" The first problem: {problems[0]}" if problems else ""
        raise TaskError(
            f"Expected rows in {source}, but none is left ({len(problems)} malformed, {filtered} filtered out).{first}"
        )
    return Rows(examples, len(problems), filtered, source, tuple(problems))


def split_calibration(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split training examples into (train, calibration), so that nothing needs selecting on the rows reported on.

    A row's side depends on the seed and on its group alone: groups stay together, and adding others moves none. A row
    without a group has that of the first row with its prompt: copies of a prompt stay together.

    Args:
        examples: the examples of a train split.
        fraction: expected share of the calibration rows, in [0, 1).
        seed: another seed, another split.

    Raises:
        TaskError: a fraction out of range, or one that leaves either side empty.

    Example:
        >>> rows = [Example(str(i), f"Question {i}:", "", "", ("A", "B"), 0) for i in range(100)]
        >>> [len(side) for side in split_calibration(rows, 0.2, seed=1)]
        [82, 18]
    """
    if not 0 <= fraction < 1:
        raise TaskError(
            f"Expected `fraction` to be the share of calibration rows in [0, 1), but got {fraction}. Give e.g. 0.1."
        )
    first: dict[str, str] = {}
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        group = example.group or first.setdefault(example.prompt, example.id)
        digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
        sides[int.from_bytes(digest[:8], "big") < fraction * 2**64].append(example)
    if not sides[0] or (fraction > 0 and not sides[1]):
        raise TaskError(
            f"Expected `fraction` to leave rows on both sides, but {fraction} of {len(examples)} rows gives "
            f"{len(sides[0])} for training and {len(sides[1])} for calibration. Give more rows or another fraction."
        )
    return sides


def _hub_rows(task: Task, split: str) -> tuple[str, str, Iterator[tuple[int, Row | TaskError]]]:
    import datasets  # slow to import, and needed here only

    assert task.hub is not None  # a task without hub has a folder
    path, config = task.hub
    source = f"{path}{f' ({config})' if config else ''}, split {task.hub_splits[split]}"
    try:
        dataset: Any = datasets.load_dataset(path, config, split=task.hub_splits[split])
    except Exception as error:  # offline, gated, removed, a proxy's page: the cure is one
        raise TaskError(
            f"Could not load {source} from the Hugging Face hub ({type(error).__name__}: {error}). If this machine is "
            f"offline or the dataset is gated or gone, pass `data_dir` (--data-dir), a folder that holds "
            f"{', '.join(f'`{file}`' for file in task.files.values())} in the schema of the official release."
        ) from error
    return source, "row", iter(enumerate(dataset, 1))


def _limited(examples: list[Example], limit: int | None) -> list[Example]:
    if limit is None or limit >= len(examples):
        return examples
    order = list(range(len(examples)))
    random.Random(0).shuffle(order)
    return [examples[index] for index in sorted(order[:limit])]
