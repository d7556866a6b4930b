"""What a task is, what one of its rows becomes, and the checks on a row's fields that all tasks share."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from varlora.errors import TaskError, did_you_mean

__all__ = [
    "Example",
    "Task",
    "UnclosedQuoteError",
    "choice_lists",
    "label_index",
    "lettered",
    "multiple_choice",
    "parse_rows",
    "text_field",
]

Row = Mapping[str, Any]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LONGEST_FIELD = 2**24
"""Characters of a CSV field, at the most; Python's own limit is 131,072."""


class UnclosedQuoteError(TaskError):
    """A quote in a CSV file that swallows rows: not one malformed row, so it is never skipped."""


@dataclass(frozen=True)
class Example:
    """One question: its prompt in three parts, of which only `context` may be shortened, and its answers.

    Example:
        >>> Example("1", "Review: ", "a fine film", " Sentiment:", ("negative", "positive"), 1).prompt
        'Review: a fine film Sentiment:'
    """

    id: str
    """Unique within its split."""
    head: str
    """Start of the prompt, never cut."""
    context: str
    """The part of the prompt that truncation may shorten."""
    tail: str
    """End of the prompt, never cut."""
    answers: tuple[str, ...]
    """What the model has to say next: `("A", "B")` or `("False", "True")`."""
    label: int | None
    """Index into `answers`; None: unknown (prediction only)."""
    choices: tuple[str, ...] = ()
    """The answers' texts, for people."""
    cut: Literal["left", "right"] = "left"
    """The end of `context` from which words are removed first."""
    group: str = ""
    """Rows of one group stay on one side of a split; empty: that of the first row with the same prompt."""
    slice: str = ""
    """The part of the data that a report shows it in; empty: none."""

    @property
    def prompt(self) -> str:
        """The whole prompt."""
        return self.head + self.context + self.tail


@dataclass(frozen=True)
class Task:
    """A dataset and how a row of it becomes an `Example`.

    Example:
        >>> from varlora.tasks import TASKS
        >>> TASKS["boolq"].files["dev"]
        'boolq/dev.jsonl'
    """

    name: str
    """What `--task` takes."""
    version: str
    """Raised whenever a prompt or a label would change; stored with each run."""
    example: Callable[[Row, int], Example]
    """Make the example of a row; the index names rows that have no id. A row without label gives label None."""
    files: Mapping[str, str]
    """Split -> file, relative to the data folder."""
    label: str
    """Name of the field that holds the right answer."""
    fields: tuple[str, ...]
    """Names of the other fields that `example` reads."""
    hub: tuple[str, str | None] | None = None
    """Dataset and configuration on the Hugging Face hub."""
    hub_splits: Mapping[str, str] = field(default_factory=dict)
    """Split -> name of the split on the hub."""
    evaluation: str = "dev"
    """The split that results are reported on."""
    row_filter: Callable[[Example], bool] | None = None
    """The rows that the paper keeps; None: all of them."""
    folder: Path | None = None
    """Where `files` lie if no data folder is given."""
    limit: Mapping[str, int] = field(default_factory=dict)
    """Split -> number of rows to keep, drawn with seed 0."""
    slice: str | None = None
    """Name of the field by whose values a report divides the rows."""


def text_field(row: Row, name: str) -> str:
    """Return the text in field `name`.

    Raises:
        TaskError: the field is absent, no text, or blank.

    Example:
        >>> text_field({"question": "Why?"}, "question")
        'Why?'
    """
    if name not in row:
        found = ", ".join(map(str, row)) or "none"
        raise TaskError(f"Expected a field `{name}`, but found the fields {found}. {did_you_mean(name, map(str, row))}")
    value = row[name]
    if not isinstance(value, str):
        raise TaskError(f"Expected field `{name}` to be text, but got {value!r}.")
    if not value.strip():
        raise TaskError(f"Expected field `{name}` to hold text, but it is empty.")
    return value


def label_index(row: Row, name: str, known: Iterable[Any]) -> int | None:
    """Return which of the `known` values field `name` holds; None where the field is absent, null or empty.

    Raises:
        TaskError: the value is none of the known ones.

    Example:
        >>> label_index({"answer": "2"}, "answer", ["1", "2"])
        1
    """
    value = row.get(name)
    if value is None or value == "":
        return None
    values = list(known)
    for index, candidate in enumerate(values):
        if type(value) is type(candidate) and value == candidate:  # True == 1 in Python, but is no answer "1"
            return index
    raise TaskError(f"Expected field `{name}` to be one of {', '.join(map(repr, values))}, but got {value!r}.")


def choice_lists(value: Any, name: str) -> tuple[list[str], list[str]]:
    """Return labels and texts of a row's choices.

    The release writes `[{"text": ..., "label": ...}, ...]`, the hub `{"text": [...], "label": [...]}`.

    Raises:
        TaskError: neither schema, fewer than two choices, or an empty text or label.

    Example:
        >>> choice_lists({"text": ["sun", "moon"], "label": ["A", "B"]}, "choices")
        (['A', 'B'], ['sun', 'moon'])
    """
    if isinstance(value, Mapping) and all(isinstance(value.get(key), list) for key in ("label", "text")):
        labels, texts = list(value["label"]), list(value["text"])
    elif isinstance(value, list) and all(isinstance(choice, Mapping) for choice in value):
        labels, texts = [choice.get("label") for choice in value], [choice.get("text") for choice in value]
    else:
        raise TaskError(f"Expected field `{name}` to be a list of choices with `text` and `label`, but got {value!r}.")
    if len(labels) != len(texts) or len(texts) < 2:
        raise TaskError(
            f"Expected field `{name}` to hold two or more choices, each with a label, "
            f"but got {len(texts)} texts and {len(labels)} labels."
        )
    for text in (*labels, *texts):
        if not isinstance(text, str) or not text.strip():
            raise TaskError(
                f"Expected each `text` and `label` in field `{name}` to be non-empty text, but got {text!r}."
            )
    return labels, texts


def multiple_choice(row: Row, index: int, question: str) -> Example:
    """Make the example of a question with lettered choices (ARC, OpenBookQA), in the paper's wording.

    Labels 1, 2, ... become A, B, ...; as in the paper's code each choice starts with a capital and ends in a full stop.
    The question is cut from its left end: it usually asks in its last sentence.

    Args:
        row: of the release, `{"id", "question": {"stem", "choices"}, "answerKey"}`, or of the hub, where the
            choices lie beside the question.
        index: names a row without `id`.
        question: name of the field that holds the question on the hub.

    Example:
        >>> choices = {"text": ["the sun", "A lamp."], "label": ["1", "2"]}
        >>> row = {"id": "7", "question": "What is hot?", "choices": choices, "answerKey": "1"}
        >>> multiple_choice(row, 0, "question").tail
        ' Choices: A. The sun. B. A lamp. Answer:'
    """
    if isinstance(row.get("question"), Mapping):
        stem, choices = text_field(row["question"], "stem"), row["question"].get("choices")
    else:
        stem, choices = text_field(row, question if question in row else "question"), row.get("choices")
    labels, texts = choice_lists(choices, "choices")
    letters = tuple(LETTERS[int(label) - 1] if label in set("123456789") else label for label in labels)
    if len(set(letters)) < len(letters):
        raise TaskError(f"Expected the labels in field `choices` to differ, but got {', '.join(labels)}.")
    texts = [text[0].upper() + text[1:] for text in texts]
    texts = [text if text.endswith(".") else text + "." for text in texts]
    return Example(
        id=text_field(row, "id") if "id" in row else str(index),
        head="Select one of the choices that answers the following question: ",
        context=stem,
        tail=f" Choices: {lettered(letters, texts)} Answer:",
        answers=letters,
        label=label_index(row, "answerKey", labels),
        choices=tuple(texts),
    )


def lettered(letters: Iterable[str], texts: Iterable[str]) -> str:
    """Write choices in one line.

    Example:
        >>> lettered("AB", ["Red.", "Blue."])
        'A. Red. B. Blue.'
    """
    return " ".join(f"{letter}. {text}" for letter, text in zip(letters, texts))


def parse_rows(lines: Iterable[bytes], suffix: str) -> Iterator[tuple[int, Row | TaskError]]:
    r"""Yield (line number, row) of a JSONL, CSV or TSV file; an unreadable line gives its error as row.

    CSV follows RFC 4180 (a quoted field may span lines); TSV knows no quoting. UTF-8, with or without BOM.

    Args:
        lines: the file's lines, with their ends, such as an open binary file or `sys.stdin.buffer`.
        suffix: ".jsonl", ".csv" or ".tsv".

    Example:
        >>> list(parse_rows([b"sentence\tlabel\n", b'a "fine" film\t1\n'], ".tsv"))
        [(2, {'sentence': 'a "fine" film', 'label': '1'})]
    """
    # Bytes that are no UTF-8 become lone surrogates here and are reported with their line further down.
    texts = (line.decode("utf-8", "surrogateescape") for line in lines)
    texts = (text.removeprefix("\ufeff") if number == 0 else text for number, text in enumerate(texts))
    if suffix == ".jsonl":
        yield from ((number, _json_row(text)) for number, text in enumerate(texts, 1) if text.strip())
    elif suffix in (".csv", ".tsv"):
        yield from _table_rows(texts, suffix)
    else:
        raise TaskError(f"Expected a .jsonl, .csv or .tsv file, but got `{suffix}`. Convert the file to one of them.")


def _json_row(text: str) -> Row | TaskError:
    if not _is_utf8(text):
        return TaskError("Expected UTF-8, but found other bytes. Save the file as UTF-8.")
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return TaskError(f"Expected one JSON object a line, but it is no valid JSON: {error}.")
    if not isinstance(row, dict):
        return TaskError(f"Expected a JSON object, but got {type(row).__name__}.")
    if "\\u" in text and not _is_unicode(row):
        return TaskError("Expected text, but a string holds half of a character (a lone surrogate). Mend or remove it.")
    return row


def _table_rows(texts: Iterator[str], suffix: str) -> Iterator[tuple[int, Row | TaskError]]:
    csv.field_size_limit(LONGEST_FIELD)
    if suffix == ".tsv":
        reader = csv.reader(texts, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(texts, strict=True)
    names: list[str] | None = None
    while True:
        first = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if reader.line_num > first:  # nobody knows how many rows the quote has swallowed
                end = f"so that lines up to {reader.line_num} are no rows ({error}). Close it, or double it."
                yield first, UnclosedQuoteError(f"Expected each quote to be closed, but one is not, {end}")
                return
            yield first, TaskError(f"Expected a row of a {suffix} file, but it cannot be read: {error}.")
            continue
        if not values:
            continue
        if not all(map(_is_utf8, values)):
            yield reader.line_num, TaskError("Expected UTF-8, but found other bytes. Save the file as UTF-8.")
        elif names is None:
            names = values
            if len(set(names)) < len(names):
                yield 1, TaskError(f"Expected column names that differ, but got {', '.join(names)}.")
                return
        elif len(values) != len(names):
            yield reader.line_num, TaskError(f"Expected {len(names)} columns as in line 1, but found {len(values)}.")
        else:
            yield reader.line_num, dict(zip(names, values))


def _is_unicode(row: Row) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\udc80" <= character <= "\udcff" for character in text)
