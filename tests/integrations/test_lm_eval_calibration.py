"""Calibration of logged samples: which choice is the right one, and what is refused. Needs no lm-eval."""

from __future__ import annotations

import json
import math

import pytest
import torch

from varlora import metrics
from varlora.errors import VarloraError
from varlora.integrations.lm_eval_calibration import calibration_of, choices_of


def sample(lls, target, choices=("no", "yes", "perhaps"), **more):
    """Return a row as the harness logs it."""
    return {
        "doc_id": 7,
        "target": target,
        "arguments": [("Is it?", f" {choice}") for choice in choices[: len(lls)]],
        "filtered_resps": [(ll, False) for ll in lls],
        **more,
    }


def written(row):
    """Return a row as the harness writes it to a file: numbers as text."""
    pairs = {f"gen_args_{i}": {"arg_0": pair[0], "arg_1": pair[1]} for i, pair in enumerate(row["arguments"])}
    texts = [[str(value) for value in pair] for pair in row["filtered_resps"]]
    return {**row, "arguments": pairs, "filtered_resps": texts, "target": str(row["target"])}


def test_rows_of_different_lengths():
    probs, labels = choices_of([sample([-1.0, -2.0], 0), sample([-3.0, -1.0, -2.0], 2)])
    assert labels.tolist() == [0, 2]
    assert probs[0].tolist() == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1)), 0.0])
    torch.testing.assert_close(probs[1], torch.tensor([-3.0, -1.0, -2.0], dtype=torch.float64).softmax(0))
    values = calibration_of([sample([-1.0, -2.0], 0), sample([-3.0, -1.0, -2.0], 2)], bins=5)
    assert values == {**metrics.evaluate(probs, labels, bins=5), "rows": 2}


@pytest.mark.parametrize(
    ("row", "right"),
    [
        (sample([-1.0, -2.0], 1), 1),
        (sample([-1.0, -2.0], "yes"), 1),
        (sample([-1.0, -2.0], " yes"), 1),
        (sample([-1.0, -2.0], "B", brier_score=(1, [0.7, 0.3])), 1),
        (sample([-1.0, -2.0, -1.5], "neither", f1=(2, 0)), 2),
        (sample([-1.0, -2.0], "the rest of a sentence", acc=0.0), 1),  # WinoGrande's: choices are in the contexts
        (sample([-1.0, -2.0, -3.0], "the rest of a sentence", acc=1.0), 0),
        (sample([-1.0, -1.0], "the rest of a sentence", acc=1.0), 0),  # the first of equal ones
        (sample([-1.0, -2.0], 1, choices=("1", "2")), 1),
        (sample([-1.0, -2.0], "1", choices=("1", "2"), acc=1.0), 0),  # of the texts "1" and "2"
    ],
)
def test_the_right_choice_is_found(row, right, tmp_path):
    assert choices_of([row])[1].tolist() == [right]
    told = {**written(row), "text": "one line\u2028to JSON\x85"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(told, ensure_ascii=False) + "\n", encoding="utf-8")
    if row["target"] != 1 or row["arguments"][0][1] != " 1":  # in a file, the index 1 and the text 1 are the same
        assert choices_of(tmp_path / "samples.jsonl")[1].tolist() == [right]


def test_the_choices_without_a_question_are_left_out():
    row = sample([-1.0, -2.0], 0, acc_mutual_info=1.0)
    row["arguments"] += [("", text) for _, text in row["arguments"]]
    row["filtered_resps"] += [(-9.0, False), (-8.0, False)]
    assert torch.equal(choices_of([row])[0], choices_of([sample([-1.0, -2.0], 0)])[0])


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([], "log_samples=True"),
        ([{"doc_id": 0}], "as the harness logs it"),
        (["text"], "as the harness logs it"),
        ([sample([-1.0], 0)], "at least two choices in row 7"),
        ([{**sample([-1.0], 0), "filtered_resps": ["some text"]}], "as the harness logs it"),
        ([sample([-1.0, -2.0], [0, 1])], "several right choices"),
        ([sample([-1.0, -2.0], 5)], "none of them"),
        ([sample([-1.0, -2.0, -3.0], "?", acc=0.0)], "brier_score"),
        ([sample([-1.0, -2.0], "1", choices=("1", "2"))], "says [0, 1]"),
        ([sample([math.nan, -2.0], 0)], "NaN"),
    ],
)
def test_what_has_no_calibration_is_refused(rows, what):
    with pytest.raises(VarloraError) as caught:
        calibration_of(rows)
    assert what in str(caught.value)


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "samples.jsonl").write_text("not json\n")
    for path in (tmp_path / "samples.jsonl", tmp_path / "absent.jsonl"):
        with pytest.raises(VarloraError, match=path.name):
            calibration_of(path)
