"""From a request's JSON to encoded rows: what a question looks like, how the model is asked, and what is wrong with it.

A run has learned the wording of its task. Where the task's rows bring choices of their own, a question and its answers
are put as such a row: the answers become A, B, ... behind the question, as in training. Where all rows share their
answers, a question is put to the model to the letter, and the answers are what it may say next; the task's own rows
can be asked in any case, by their fields.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from varlora.errors import TaskError, VarloraError
from varlora.files import deeper_than
from varlora.prompt import Encoded, encode, prompt_ids
from varlora.serve.base import Limits, Refused, safe
from varlora.tasks import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Ask", "Asker", "Question", "Ready", "parse"]

DEPTH = 12
"""Objects and lists within each other, at the most."""
LONGEST_ID = 200
"""Characters."""
TOLD = 5
"""Reasons that a refusal names at the most."""

FIRST = Field(fail_fast=True)
"""Of a list's wrong items the first is told: a body has room for a hundred thousand."""

Id = Annotated[str, Field(max_length=LONGEST_ID)]
Texts = Annotated[list[str], FIRST]

_Make = Callable[[Any, int], tuple[Example, tuple[str, ...]]]


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few_unknown(cls, given: Any) -> Any:
        """Leave out all but a few of the unknown keys: each becomes an error."""
        if not isinstance(given, dict):
            return given
        known = {name: given[name] for name in cls.model_fields if name in given}
        return known | dict(islice(((name, value) for name, value in given.items() if name not in known), TOLD))


class Question(_Shape):
    """A question and its answers."""

    id: Id | None = Field(None, description="Comes back with the answer; left out: the number of the question.")
    question: str
    answers: Texts


class Ask(_Shape):
    """One question, or several, or rows of the run's own task; and how to answer them."""

    id: Id | None = Field(None, description="Of the one question; comes back with the answer.")
    question: str | None = Field(None, description="One question; `answers` belong to it.")
    answers: Texts | None = None
    questions: Annotated[list[Question], FIRST] | None = Field(None, description="Several questions.")
    rows: Annotated[list[dict[str, Any]], FIRST] | None = Field(
        None, description="Rows of the run's task, as `varlora predict` takes."
    )
    tau: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None, description="Factor of the trained posterior's variance, without the rest of what `calibrate` chose."
    )
    risk: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Share of the answers given that may be wrong: `abstain` says which not to give."
    )
    cut: bool = Field(False, description="Shorten prompts that are longer than the model's context.")
    draws: bool = Field(False, description="Also return the probabilities of each draw.")

    @property
    def count(self) -> int:
        """How many rows are asked."""
        return len(self.rows if self.rows is not None else [()] if self.questions is None else self.questions)

    def id_of(self, index: int) -> str:
        """What a row that is not even made ready is called: by its own id, if that is one."""
        given: Any = self.id if self.questions is None else self.questions[index].id
        if self.rows is not None:
            given = self.rows[index].get("id")
        fits = isinstance(given, str) and given.strip() and len(given) <= LONGEST_ID
        return safe(given) if fits else str(index)


@dataclass(frozen=True)
class Ready:
    """A row that can be answered."""

    id: str
    answers: tuple[str, ...]
    """What its probabilities are returned by."""
    encoded: Encoded


def parse(body: bytes, limits: Limits) -> Ask:
    """Read a request's body.

    Raises:
        Refused: 422, with the reason, if it is no such request, or one beyond the limits.

    Example:
        >>> parse(b'{"question": "Is snow cold?", "answers": ["yes", "no"]}', Limits()).count
        1
    """
    try:
        found = json.loads(body, parse_constant=_no_constant)
        if deeper_than(found, DEPTH):
            raise ValueError(f"it is nested more than {DEPTH} deep")
    except (ValueError, RecursionError) as error:  # the texts of json name places and no contents
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Refused(422, "wrong_shape", f"Expected a JSON object as body, but {why}.") from None
    _check_many(found, limits)
    try:
        ask = Ask.model_validate(found)
    except ValidationError as error:
        reasons = "; ".join(_reason(problem) for problem in error.errors(include_url=False, include_input=False)[:TOLD])
        raise Refused(422, "wrong_shape", f"Expected a question with answers, but {reasons}.") from None
    given = [name for name in ("question", "questions", "rows") if getattr(ask, name) is not None]
    if len(given) != 1:
        raise Refused(
            422,
            "wrong_shape",
            f"Expected one of `question`, `questions` and `rows`, but got {' and '.join(given) or 'none'}.",
        )
    if ask.question is not None and ask.answers is None:
        raise Refused(422, "answers", 'Expected `answers`, a list of texts such as ["yes", "no"], but got none.')
    if ask.question is None and not (ask.answers is None and ask.id is None):
        raise Refused(422, "wrong_shape", f"Expected `answers` and `id` within each of `{given[0]}`, not beside them.")
    if not ask.count:
        raise _count_refused(0, limits)
    if ask.tau is not None and ask.tau > limits.max_tau:
        raise Refused(422, "tau", f"Expected `tau` within 0 and {limits.max_tau:g}, but got {ask.tau:g}.")
    return ask


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _check_many(found: Any, limits: Limits) -> None:
    """Refuse more rows than are taken before anything looks at each of them."""
    lists = [found.get(name) for name in ("questions", "rows")] if isinstance(found, dict) else []
    most = max((len(one) for one in lists if isinstance(one, list)), default=0)
    if most > limits.max_rows:
        raise _count_refused(most, limits)


def _count_refused(count: int, limits: Limits) -> Refused:
    return Refused(422, "too_many_rows", f"Expected 1 to {limits.max_rows} rows, but got {count}.")


def _reason(problem: Mapping[str, Any]) -> str:
    where = ".".join(map(str, problem["loc"]))
    said = problem["msg"][0].lower() + problem["msg"][1:]
    return f"`{where}`: {said}" if where else said


class Asker:
    """Makes rows ready; its calls come one at a time, as tokenizers bear no other.

    Args:
        task: of the run.
        tokenizer: of its base.
        limits: of the service.
        longest: tokens of a prompt; None: no limit.
        chat: whether prompts go through the tokenizer's chat template.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        longest: int | None = None,
        chat: bool = False,
    ) -> None:
        self.task, self.tokenizer, self.limits, self.longest, self.chat = task, tokenizer, limits, longest, chat
        self._row = _row_of_choices(task)

    @property
    def own_choices(self) -> bool:
        """Whether questions are put in the task's own wording."""
        return self._row is not None

    def ready(self, ask: Ask) -> list[Ready | Refused]:
        """Make the rows of a request ready, or say for each what is wrong with it."""
        if ask.rows is not None:
            return [self._of(self._example, row, i, ask.cut) for i, row in enumerate(ask.rows)]
        questions = ask.questions
        if questions is None:
            questions = [Question(id=ask.id, question=ask.question or "", answers=ask.answers or [])]
        return [self._of(self._asked, one, i, ask.cut) for i, one in enumerate(questions)]

    def _of(self, make: _Make, asked: Any, index: int, cut: bool) -> Ready | Refused:
        try:
            example, answers = make(asked, index)
            self._check_answers(answers)
            if len(example.id) > LONGEST_ID:
                raise TaskError(f"Expected an id of at most {LONGEST_ID} characters, but it has {len(example.id)}.")
            if not _is_unicode(example.id, example.prompt, *answers, *example.answers):
                raise TaskError("Expected text, but a part of it is no Unicode (a lone surrogate).")
            ids = prompt_ids(self.tokenizer, [example.prompt], self.chat)[0]
            if self.longest is not None and len(ids) > self.longest and not cut:
                return Refused(
                    422,
                    "too_long",
                    f"Expected a prompt of at most {self.longest} tokens, but it has {len(ids)}. "
                    'Shorten it, or let it be shortened by `"cut": true`.',
                )
            return Ready(example.id, answers, encode(self.tokenizer, example, self.longest, self.chat, ids=ids))
        except Refused as refused:
            return refused
        except VarloraError as error:
            return Refused(422, "wrong_row", str(error))
        except Exception as error:  # such as a field of a type that nobody thought of
            return Refused(
                422, "wrong_row", f"The row cannot be read as one of {self.task.name} ({type(error).__name__})."
            )

    def _example(self, row: Mapping[str, Any], index: int) -> tuple[Example, tuple[str, ...]]:
        example = self.task.example({**row, self.task.label: None}, index)
        return example, example.answers

    def _asked(self, asked: Question, index: int) -> tuple[Example, tuple[str, ...]]:
        answers = tuple(asked.answers)
        self._check_answers(answers)
        if not asked.question.strip():
            raise TaskError("Expected `question` to hold text, but it is empty.")
        id = str(index) if asked.id is None else asked.id
        if self._row is None:
            return Example(id, "", asked.question, "", answers, None), answers
        example = self.task.example(self._row(asked.question, answers), index)
        return replace(example, id=id), answers

    def _check_answers(self, answers: Sequence[str]) -> None:
        if not 2 <= len(answers) <= self.limits.max_answers:
            expected = f"Expected 2 to {self.limits.max_answers} answers, but got {len(answers)}."
            raise Refused(422, "answers", expected)
        if (longest := max(map(len, answers))) > self.limits.max_answer:
            expected = f"Expected answers of at most {self.limits.max_answer} characters, but one has {longest}."
            raise Refused(422, "answers", expected)
        if not all(answer.strip() for answer in answers):
            raise Refused(422, "answers", "Expected each answer to hold text, but one is empty.")
        if len({answer.strip() for answer in answers}) < len(answers):
            raise Refused(422, "answers", "Expected answers that differ, but one is given twice.")


def _is_unicode(*texts: str) -> bool:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


# --- the wording of a task of choices

MakeRow = Callable[[str, Sequence[str]], dict[str, Any]]


def _row_of_choices(task: Task) -> MakeRow | None:
    """Find out by trial how a task's row holds a question and its choices; None if rows share their answers."""
    fields = tuple(name for name in task.fields if name != "choices")
    marks = {name: f"Field{i}." for i, name in enumerate(fields)}
    choices = ("One.", "Two.")

    def rows(place: Callable[[Sequence[str]], dict[str, Any]], question: str) -> MakeRow:
        return lambda text, answers: {**marks, question: text, **place(answers)}

    for name in (*fields, "choices"):
        for shape in (list, _labelled):

            def place(answers: Sequence[str], name: str = name, shape: Any = shape) -> dict[str, Any]:
                return {name: shape(answers)}

            example = _tried(task, {**marks, **place(choices)})
            question = example and _only_field(example, marks, choices)
            if question:
                return rows(place, question)
    example = _tried(task, marks)
    if example and example.choices and set(example.choices) < set(marks.values()):  # a field for each choice
        names = [name for text in example.choices for name, mark in marks.items() if mark == text]
        others = {name: mark for name, mark in marks.items() if name not in names}
        question = _only_field(example, others, example.choices)
        if question:

            def named(answers: Sequence[str]) -> dict[str, Any]:
                if len(answers) != len(names):
                    raise Refused(
                        422, "answers", f"Expected {len(names)} answers, as in {task.name}, but got {len(answers)}."
                    )
                return dict(zip(names, answers))

            return rows(named, question)
    return None


def _labelled(answers: Sequence[str]) -> list[dict[str, str]]:
    return [{"text": text, "label": chr(ord("A") + i)} for i, text in enumerate(answers)]


def _tried(task: Task, row: Mapping[str, Any]) -> Example | None:
    try:
        return task.example({**row, task.label: None}, 0)
    except TaskError:
        return None


def _only_field(example: Example, marks: Mapping[str, str], choices: Sequence[str]) -> str | None:
    """The one field whose text the prompt holds beside the choices."""
    if tuple(example.choices) != tuple(choices):
        return None
    shown = [name for name, mark in marks.items() if mark in example.prompt]
    return shown[0] if len(shown) == 1 else None
