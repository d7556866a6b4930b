"""A task of your own: JSONL, CSV or TSV files, described by a small task file.

```yaml
name: sst2
prompt: "Review: {sentence}\\nIs this review positive or negative? Answer:"   # {field}: a field of the row
label: label                                   # the field that holds the right answer
answers: {"0": negative, "1": positive}        # value of that field -> what the model has to say
files: {train: train.tsv, dev: dev.tsv}        # relative to the data folder, or else to this file
```

`answers` may be a list: the field then holds an answer's text or its index from 0. For questions with choices of their
own, `choices` names the field that holds their list: the answers are then A, B, ..., `{choices}` in the prompt stands
for "A. <text> B. <text>", and the label field holds a choice's text, its letter or its index from 0. Where a label may
be two of these, as 1 with the answers "1" and "2", it is refused until `label_as` says which (text, letter or index).

Optional: `version`; `cut`, the field that is shortened (from its left end) if a prompt is too long, by default the
longest of the row; `id`, a field; `slice`, a field by whose values a report divides the rows; `evaluation`, the split
reported on (default `dev`); `limit: {train: 1000}`, which keeps the first 1000 rows of a permutation with seed 0.
YAML's aliases (`*name`) and large files are refused: a file may come from a stranger, and a few lines of aliases fill
any memory.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from varlora.errors import ConfigError, TaskError, did_you_mean
from varlora.plain_yaml import read_yaml
from varlora.tasks.base import LETTERS, Example, Row, Task, label_index, lettered, text_field

__all__ = ["load_task"]

PLAIN = re.compile(r"[^\W.][\w .+-]*")
"""What a task may be called: a task file may come from a stranger, and must not choose where results are written."""
KEYS = (
    *("name", "version", "prompt", "cut", "answers", "choices", "label", "label_as", "id", "slice"),
    *("files", "evaluation", "limit"),
)
MOST = 20
"""Problems of a file that are told."""
SUFFIXES = (".jsonl", ".csv", ".tsv")


@dataclass(frozen=True)
class _Schema:
    """How a row of the user's data becomes an example."""

    pieces: tuple[tuple[str, str | None], ...]
    """The prompt as (text, field after it) pairs."""
    answers: tuple[str, ...]
    """Empty where each row has its own choices."""
    values: Mapping[str, int]
    """Value of the label field, as text -> index into `answers`."""
    label: str
    label_as: str | None
    """What the label field holds of an answer, one of its `_names`; None: any of them."""
    cut: str | None
    choices: str | None
    id: str | None
    slice: str | None

    def example(self, row: Row, index: int) -> Example:
        """Make the example of a row."""
        names = [name for _, name in self.pieces if name is not None and not self._is_choices(name)]
        texts = {name: _shown(row, name) for name in names}
        choices = self._choices(row)
        answers = tuple(LETTERS[: len(choices)]) if choices else self.answers
        cut = self.cut or max(texts, key=lambda name: len(texts[name]), default=None)
        if choices:
            texts["choices"] = lettered(answers, choices)
        parts = ["", "", ""]
        for text, name in self.pieces:
            parts[2 if parts[1] else 0] += text
            if name is not None and name == cut and not parts[1]:
                parts[1] = texts[name]
            elif name is not None:
                parts[2 if parts[1] else 0] += texts[name]
        return Example(
            id=str(index) if self.id is None else _shown(row, self.id),
            head=parts[0],
            context=parts[1],
            tail=parts[2],
            answers=answers,
            label=self._label(row, choices),
            choices=choices,
            slice=(_key(row.get(self.slice)) or "") if self.slice else "",
        )

    def _is_choices(self, name: str) -> bool:
        return name == "choices" and self.choices is not None

    def _choices(self, row: Row) -> tuple[str, ...]:
        if self.choices is None:
            return ()
        value = row.get(self.choices)
        if value is None:
            text_field(row, self.choices)  # raises: absent or no text
        if not isinstance(value, list) or not 2 <= len(value) <= len(LETTERS):
            raise TaskError(
                f"Expected field `{self.choices}` to be a list of 2 to {len(LETTERS)} choices, got {value!r}."
            )
        for text in value:
            if not isinstance(text, str) or not text.strip():
                raise TaskError(
                    f"Expected each choice in field `{self.choices}` to be non-empty text, but got {text!r}."
                )
        return tuple(value)

    def _label(self, row: Row, choices: tuple[str, ...]) -> int | None:
        value = _key(row.get(self.label))
        if not choices:
            known = self.values
        else:
            meant = _meant(_names(choices, LETTERS[: len(choices)]), self.label_as)
            if value is not None and len(meant.get(value, ())) > 1:
                raise TaskError(f"Expected field `{self.label}` to name one choice, but {_ambiguous(value)}")
            known = {name: min(indices) for name, indices in meant.items()}
        found = label_index({self.label: value}, self.label, known)
        return None if found is None else list(known.values())[found]


def load_task(path: Path) -> Task:
    """Read a task file.

    Args:
        path: a YAML file, as described at the top of this module.

    Returns:
        A task whose files lie in the data folder, or else beside the task file.

    Raises:
        ConfigError: the file is absent or no YAML, or all its problems together.
    """
    try:
        config = read_yaml(path)
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError([f"Expected a task file at {path}, but it cannot be read: {error.strerror}."]) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError([f"Expected {path} to be YAML: {_short(str(error))}"]) from None
    if not isinstance(config, dict):
        raise ConfigError(
            [f"Expected {path} to hold keys such as `name` and `prompt`, but got {_short(repr(config))}."]
        )
    problems = [f"Unknown key `{key}`. {did_you_mean(str(key), KEYS)}" for key in config if key not in KEYS]
    problems += [
        f"Expected a key `{key}`, but there is none."
        for key in ("name", "prompt", "label", "files")
        if key not in config
    ]
    for key in ("name", "prompt", "cut", "choices", "label", "id", "slice", "evaluation"):
        if key in config and not (isinstance(config[key], str) and config[key].strip()):
            problems.append(f"Expected `{key}` to be text, but got {config[key]!r}.")
    if isinstance(name := config.get("name"), str) and not PLAIN.fullmatch(name):
        problems.append(
            f"Expected `name` to be letters, digits, spaces and . _ - +, not beginning with a dot, since folders and "
            f"files are called by it, but got {name!r}."
        )
    pieces = _pieces(config, problems)
    label_as = _label_as(config, problems)
    answers, values = _answers(config, label_as, problems)
    files = _files(config, problems)
    evaluation = config.get("evaluation", "dev")
    if files and str(evaluation) not in files:
        hint = did_you_mean(str(evaluation), files)
        problems.append(f"Expected `evaluation` to be a split of `files`, but got {evaluation!r}. {hint}")
    limit = _limit(config, files, problems)
    if problems:
        raise ConfigError(f"{path}: {_short(problem)}" for problem in problems[:MOST])
    cut, choices, id, slice = (config.get(key) for key in ("cut", "choices", "id", "slice"))
    schema = _Schema(pieces, answers, values, config["label"], label_as, cut, choices, id, slice)
    names = [name for _, name in pieces if name is not None and not (choices and name == "choices")]
    return Task(
        name=config["name"],
        version=str(config.get("version", "1")),
        example=schema.example,
        files=files,
        label=config["label"],
        fields=tuple(dict.fromkeys([*names, *(name for name in (choices, id) if name)])),
        evaluation=evaluation,
        folder=path.parent,
        limit=limit,
        slice=slice,
    )


def _short(text: str) -> str:
    """Return a message of bearable length: what it quotes may be of any."""
    return text if len(text) <= 500 else f"{text[:400]} ... {text[-100:]}"


def _pieces(config: Mapping[str, Any], problems: list[str]) -> tuple[tuple[str, str | None], ...]:
    prompt = config.get("prompt")
    if not isinstance(prompt, str):
        return ()
    try:
        parsed = list(string.Formatter().parse(prompt))
    except ValueError as error:
        problems.append(f"Expected `prompt` to name fields as {{field}} (a brace of its own is doubled), but {error}.")
        return ()
    if any(name == "" or form or conversion for _, name, form, conversion in parsed):
        problems.append("Expected each pair of braces in `prompt` to hold a field's name and nothing else.")
        return ()
    names = [name for _, name, _, _ in parsed if name]
    if not names:
        problems.append(f"Expected `prompt` to hold a field in braces, such as {{sentence}}, but got {prompt!r}.")
    own = config.get("choices")
    if own is not None and own != "choices" and own in names:
        problems.append(f"Expected `{{choices}}` in `prompt`, where the choices are to be, but got `{{{own}}}`.")
    cut = config.get("cut")
    if names and cut is not None and cut not in names:
        problems.append(f"Expected `cut` to be a field of the prompt, but got {cut!r}. {did_you_mean(str(cut), names)}")
    return tuple((text, name) for text, name, _, _ in parsed)


def _label_as(config: Mapping[str, Any], problems: list[str]) -> str | None:
    label_as = config.get("label_as")
    ways = ("text", "letter", "index") if "choices" in config else ("text", "index")
    if isinstance(config.get("answers"), dict) and label_as is not None:
        problems.append("Expected no `label_as`, as the mapping of `answers` says what the label is. Leave it out.")
    elif label_as not in (None, *ways):
        problems.append(f"Expected `label_as` to be one of {', '.join(ways)}, but got {label_as!r}.")
    else:
        return label_as
    return None


def _answers(
    config: Mapping[str, Any], label_as: str | None, problems: list[str]
) -> tuple[tuple[str, ...], Mapping[str, int]]:
    given = config.get("answers")
    if "choices" in config:
        if given is not None:
            problems.append(
                "Expected either `answers` or `choices`, but got both. With `choices` the answers are A, B, ..."
            )
        return (), {}
    if not isinstance(given, (list, dict)) or len(given) < 2:
        problems.append(f"Expected `answers` to be a list or mapping of two or more (or `choices`), but got {given!r}.")
        return (), {}
    answers = list(given.values()) if isinstance(given, dict) else given
    for answer in answers:
        if not isinstance(answer, str) or not answer.strip():
            # YAML reads yes, no, true and 1 as other than text.
            problems.append(f'Expected each of `answers` to be text, but got {answer!r}. Quote it, as in "yes".')
            return (), {}
    if len(set(answers)) < len(answers):
        problems.append(f"Expected `answers` to differ, but got {', '.join(answers)}.")
        return (), {}
    if isinstance(given, dict):
        labels = [str(_key(key)) for key in given]
        if len(set(labels)) < len(labels):
            problems.append(
                "Expected the labels that `answers` maps to differ as text, as they are compared so, but got "
                f"{', '.join(map(repr, given))}."
            )
        return tuple(answers), {label: index for index, label in enumerate(labels)}
    meant = _meant(_names(answers), label_as)
    problems += [
        f"Expected each label to name one of `answers`, but {_ambiguous(name)}"
        for name, indices in meant.items()
        if len(indices) > 1
    ]
    return tuple(answers), {name: min(indices) for name, indices in meant.items()}


def _files(config: Mapping[str, Any], problems: list[str]) -> dict[str, str]:
    files = config.get("files", {})
    if not isinstance(files, dict) or ("files" in config and not files):
        problems.append(f"Expected `files` to name a file for each split, such as {{dev: dev.tsv}}, but got {files!r}.")
        return {}
    for split, file in files.items():
        if split == "calibration":
            problems.append("Expected no split `calibration`, which is what is held out of `train`. Name it otherwise.")
        if not isinstance(file, str) or Path(file).suffix.lower() not in SUFFIXES:
            problems.append(f"Expected the file of split `{split}` to end in {', '.join(SUFFIXES)}, but got {file!r}.")
    return {str(split): str(file) for split, file in files.items()}


def _limit(config: Mapping[str, Any], files: Mapping[str, str], problems: list[str]) -> dict[str, int]:
    limit = config.get("limit", {})
    if not isinstance(limit, dict):
        problems.append(f"Expected `limit` to give rows by split, such as {{train: 1000}}, but got {limit!r}.")
        return {}
    for split, rows in limit.items():
        if files and split not in files:
            problems.append(f"Unknown split `{split}` in `limit`. {did_you_mean(str(split), files)}")
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
            problems.append(f"Expected `limit` of split `{split}` to be a number of rows >= 1, but got {rows!r}.")
    return dict(limit)


def _names(texts: Sequence[str], letters: Sequence[str] = ()) -> dict[str, Sequence[str]]:
    """Return what a label may be called by, each way in the order of the answers."""
    return {"text": texts, "letter": letters, "index": [str(index) for index in range(len(texts))]}


def _meant(names: Mapping[str, Sequence[str]], label_as: str | None) -> dict[str, set[int]]:
    """Return which answers each name may stand for: one, unless it is that of several."""
    meant: dict[str, set[int]] = {}
    for way, column in names.items():
        for index, name in enumerate(column if label_as in (None, way) else ()):
            meant.setdefault(name, set()).add(index)
    return meant


def _ambiguous(name: str) -> str:
    return f"{name!r} may be several. Say in the task file what labels are, with `label_as`: text, letter or index."


def _key(value: Any) -> str | None:
    """Write a label as text, so that 1 in JSON, "1" in CSV and 1 in YAML are the same; true is `true`."""
    if value is None or isinstance(value, str):
        return value
    return str(value).lower() if isinstance(value, bool) else str(value)


def _shown(row: Row, name: str) -> str:
    value = row.get(name)
    if value != value:  # as pandas writes what is missing
        raise TaskError(f"Expected field `{name}` to hold text or a number, but it is NaN.")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return text_field(row, name)
