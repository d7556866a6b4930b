"""Requests to rows: their shape, the wording of each task, and a reason for each that is wrong."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError
from serve_helpers import loaded, task_rows

from varlora.prompt import _CACHE, encode
from varlora.serve.asking import Ask, Asker, parse
from varlora.serve.base import Limits, Refused
from varlora.tasks import TASKS, get_task

LIMITS = Limits()


def asker(task="four_choices", limits=LIMITS, **settings) -> Asker:
    run = loaded(task)
    return Asker(get_task(run.settings.task), run.tokenizer, limits, 512, **settings)


def ask(asker, **body):
    return asker.ready(parse(json.dumps(body).encode(), asker.limits))


def refused(body: bytes | str, limits: Limits = LIMITS) -> Refused:
    with pytest.raises(Refused) as found:
        parse(body if isinstance(body, bytes) else body.encode(), limits)
    assert found.value.status == 422
    return found.value


# --- shapes


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b'{"question": "q", "answers": ["a", "b"]', "JSON"),
        (b"[1, 2]", "dictionary"),
        (b"{}", "one of `question`, `questions` and `rows`, but got none"),
        (b'{"question": "q", "rows": []}', "got question and rows"),
        (b'{"question": "q"}', "`answers`"),
        (b'{"question": 3, "answers": ["a", "b"]}', "`question`: input should be a valid string"),
        (b'{"question": "q", "answers": "ab"}', "`answers`: input should be a valid list"),
        (b'{"question": "q", "answers": ["a", 1]}', "`answers.1`"),
        (b'{"question": "q", "answers": ["a", "b"], "tua": 1}', "`tua`: extra inputs are not permitted"),
        (b'{"question": "q", "answers": ["a", "b"], "tau": -1}', "`tau`"),
        (b'{"question": "q", "answers": ["a", "b"], "tau": "1"}', "`tau`"),
        (b'{"question": "q", "answers": ["a", "b"], "tau": 4.1}', "`tau` within 0 and 4, but got 4.1"),
        (b'{"question": "q", "answers": ["a", "b"], "tau": 1e999}', "`tau`"),
        (b'{"question": "q", "answers": ["a", "b"], "tau": NaN}', "NaN is no JSON number"),
        (b'{"question": "q", "answers": ["a", "b"], "risk": 5}', "`risk`"),
        (b'{"question": "q", "answers": ["a", "b"], "cut": 1}', "`cut`"),
        (b'{"questions": []}', "1 to 64 rows, but got 0"),
        (b'{"rows": []}', "1 to 64 rows, but got 0"),
        (b'{"questions": [{"question": "q"}]}', "`questions.0.answers`: field required"),
        (b'{"questions": [{"question": "q", "answers": ["a", "b"]}], "answers": ["a"]}', "within each of `questions`"),
        (b'{"rows": [3]}', "`rows.0`"),
        (b'{"rows": [{"a": ' + b"[" * 20 + b"]" * 20 + b"}]}", "nested more than"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"id": "' + b"x" * 201 + b'", "question": "q", "answers": ["a", "b"]}', "`id`"),
        (b'{"question": "q", "answers": ["a", "b"], "risk": ' + b"9" * 5000 + b"}", "JSON"),
    ],
)
def test_a_wrong_shape_has_its_reason(body, reason):
    assert reason in str(refused(body))


def test_a_reason_does_not_repeat_the_request():
    assert "secret" not in str(refused('{"question": ["the secret"], "answers": ["a", "b"]}'))


UNKNOWN = {f"k{i}": 1 for i in range(20_000)}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"questions": [{}] * 80_000}, "Expected 1 to 64 rows, but got 80000."),
        ({"rows": [1] * 80_000}, "Expected 1 to 64 rows, but got 80000."),
        ({"questions": [{}] * 64}, "`questions.0.question`: field required; `questions.0.answers`: field required."),
        ({"rows": [1] * 64}, "`rows.0`: input should be a valid dictionary."),
        ({"question": "q", "answers": [1] * 80_000}, "`answers.0`: input should be a valid string."),
        ({"questions": [{"question": "q", "answers": [1] * 1000}] * 64}, "`questions.0.answers.0`: input"),
        (UNKNOWN, "`k4`: extra inputs are not permitted."),
        ({"questions": [{"question": "q", "answers": ["a", "b"], **UNKNOWN}]}, "`questions.0.k4`: extra inputs"),
    ],
)
def test_of_thousands_of_mistakes_few_are_looked_at(body, reason, monkeypatch):
    """All of it happens in the event loop, where tens of thousands of errors take most of a second."""
    validate, counts = Ask.model_validate, []

    def counted(given):
        try:
            return validate(given)
        except ValidationError as error:
            counts.append(error.error_count())
            raise

    monkeypatch.setattr(Ask, "model_validate", counted)
    assert reason in str(refused(json.dumps(body)))
    assert sum(counts) <= 5


def test_limits_are_those_given():
    limits = Limits(max_rows=2, max_tau=9)
    three = {"questions": [{"question": "q", "answers": ["a", "b"]}] * 3}
    assert "1 to 2 rows, but got 3" in str(refused(json.dumps(three), limits))
    assert parse(b'{"question": "q", "answers": ["a", "b"], "tau": 9}', limits).tau == 9
    assert Limits(queue=3).max_rows == 3


@pytest.mark.parametrize(
    ("name", "value"), [("queue", 0), ("max_body", 0), ("max_answers", 1), ("max_tau", 0), ("max_tau", float("nan"))]
)
def test_limits_make_sense(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        Limits(**{name: value})


# --- wording


def test_a_question_of_a_task_of_choices_is_put_as_its_row():
    made = asker()
    assert made.own_choices
    for row in task_rows()[:5]:
        (as_row,) = ask(made, rows=[row])
        (as_question,) = ask(made, id="mine", question=row["question"], answers=row["choices"])
        assert as_question.encoded.input_ids == as_row.encoded.input_ids
        assert as_question.encoded.label_tokens == as_row.encoded.label_tokens
        assert (as_row.id, as_row.answers) == (row["id"], ("A", "B", "C", "D"))
        assert (as_question.id, as_question.answers) == ("mine", tuple(row["choices"]))
        assert as_row.encoded.label is None  # a label in the row is of no matter


def test_a_question_to_a_task_of_shared_answers_is_put_to_the_letter():
    made = asker("true_or_false")
    assert not made.own_choices
    (found,) = ask(made, question="Is snow cold? Answer:", answers=["yes", "no"])
    tokenizer = loaded("true_or_false").tokenizer
    assert list(found.encoded.input_ids) == tokenizer("Is snow cold? Answer:")["input_ids"]
    row = task_rows("true_or_false")[0]
    (as_row,) = ask(made, rows=[row])
    assert as_row.answers == ("False", "True")


@pytest.mark.parametrize("name", [*TASKS, "two_choices"])
def test_every_task_of_choices_is_recognised(name):
    run = loaded()
    task = TASKS[name] if name in TASKS else get_task(run.settings.task.replace("four_choices", name))
    made = Asker(task, run.tokenizer, LIMITS, 512)
    assert made.own_choices == (name != "boolq")
    (found,) = ask(made, question="What is hot?", answers=["The sun.", "Snow."])
    prompt = run.tokenizer.decode(found.encoded.input_ids)
    assert "What is hot?" in prompt
    if name != "boolq":
        assert "A. The sun" in prompt
        assert "Snow" in prompt
        assert "Field" not in prompt


def test_a_task_with_a_field_for_each_choice_takes_as_many_answers():
    made = Asker(TASKS["winogrande_s"], loaded().tokenizer, LIMITS, 512)
    (found,) = ask(made, question="The _ is hot.", answers=["sun", "moon", "snow"])
    assert "Expected 2 answers, as in winogrande_s, but got 3" in str(found)


def test_ids_are_the_numbers_of_the_questions_where_none_are_given():
    questions = [{"question": "a?", "answers": ["x", "y"]}, {"id": "b", "question": "b?", "answers": ["x", "y"]}]
    assert [one.id for one in ask(asker(), questions=questions)] == ["0", "b"]


# --- rows that cannot be answered


def test_what_is_quoted_is_cut():
    assert len(str(refused(json.dumps({"question": "q", "answers": ["a", "b"], "x" * 200_000: 1})))) < 700


def test_a_long_answer_is_refused_and_the_tokens_of_many_are_not_remembered():
    made = asker("true_or_false")
    (found,) = ask(made, question="q", answers=["a" * 1001, "b"])
    assert str(found) == "Expected answers of at most 1000 characters, but one has 1001."
    assert ask(made, question="q", answers=["yes", "no"])
    known = dict(_CACHE[made.tokenizer])
    (found,) = ask(made, question="q", answers=[f"{letter} {'x' * 900}" for letter in "ABC"])
    assert len(found.encoded.label_tokens) == 3
    assert known == _CACHE[made.tokenizer]


@pytest.mark.parametrize(
    ("question", "answers", "reason"),
    [
        ("q", [], "2 to 64 answers, but got 0"),
        ("q", ["a"], "2 to 64 answers, but got 1"),
        ("q", [f"a{i}" for i in range(300)], "2 to 64 answers, but got 300"),
        ("q", [f"a{i}" for i in range(27)], "2 to 26 choices"),
        ("q", ["a", "b", "a"], "one is given twice"),
        ("q", ["a", " a "], "one is given twice"),
        ("q", ["a", " "], "one is empty"),
        (" ", ["a", "b"], "`question` to hold text"),
        ("\ud800", ["a", "b"], "no Unicode"),
        ("q", ["\udfff", "b"], "no Unicode"),
        ("word " * 600, ["a", "b"], "at most 512 tokens, but it has"),
    ],
)
def test_a_wrong_question_has_its_reason(question, answers, reason):
    (found,) = ask(asker(), question=question, answers=answers)
    assert isinstance(found, Refused)
    assert found.status == 422
    assert reason in str(found)
    assert len(str(found)) < 700


def test_answers_that_share_their_first_token_are_refused():
    (found,) = ask(asker("true_or_false"), question="Yes? Answer:", answers=["village", "village green"])
    assert "begin with different tokens" in str(found)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "a field `question`"),
        ({"question": "q", "choices": "ab", "id": "1"}, "`choices` to be a list"),
        ({"question": 3.5, "choices": ["a"], "id": "1"}, "2 to 26 choices"),
        ({"question": {"stem": "q"}, "choices": ["a", "b"], "id": "1"}, "`question` to be text"),
        ({"question": "q", "choices": ["a", {"b": 1}], "id": "1"}, "each choice"),
    ],
)
def test_a_wrong_row_has_its_reason(row, reason):
    (found,) = ask(asker(), rows=[row])
    assert isinstance(found, Refused)
    assert reason in str(found)


def test_a_row_of_a_type_that_nobody_thought_of_is_refused_alone(monkeypatch):
    made = asker()
    own = made.task.example

    def example(row, index):
        if index == 0:
            raise AttributeError("the user's secret")
        return own(row, index)

    object.__setattr__(made.task, "example", example)
    try:
        first, second = ask(made, rows=task_rows()[:2])
    finally:
        object.__setattr__(made.task, "example", own)
    assert "AttributeError" in str(first)
    assert "secret" not in str(first)
    assert second.id == task_rows()[1]["id"]


def test_one_wrong_question_leaves_the_others():
    questions = [{"question": "a?", "answers": ["x"]}, {"question": "b?", "answers": ["x", "y"]}]
    first, second = ask(asker(), questions=questions)
    assert isinstance(first, Refused)
    assert second.answers == ("x", "y")


def test_a_long_prompt_is_cut_where_that_is_allowed():
    made, text = asker(), "word " * 600
    (found,) = ask(made, question=text, answers=["a", "b"], cut=True)
    assert found.encoded.cut
    assert len(found.encoded.input_ids) <= 512
    example = made.task.example({"question": text, "choices": ["a", "b"], "id": "0"}, 0)
    assert found.encoded.input_ids == encode(loaded().tokenizer, example, 512).input_ids
