"""The six tasks: prompts to the letter, both schemas, malformed rows, the hub, and every row of the real data."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from varlora.errors import ConfigError, TaskError
from varlora.tasks import TASKS, Task, get_task, load_rows, make_examples, parse_rows

ASSETS = Path(__file__).parents[1] / "assets"

PROMPTS = {
    "winogrande_s": (
        "Select one of the choices that answers the following question: The boat passed the raft because the _ was "
        "fast. Choices: A. boat. B raft. Answer:"
    ),
    "arc_challenge": (
        "Select one of the choices that answers the following question: A plant in a dark box turns pale. What does "
        "it lack? Choices: A. Light. B. Soil. C. Air. D. Warmth. Answer:"
    ),
    "openbookqa": (
        "Select one of the choices that answers the following question: A candle under a glass goes out because it "
        "runs out of Choices: A. Wax. B. Oxygen. C. Light. D. Glass. Answer:"
    ),
    "boolq": (
        "Answer the question with only True or False: is snow made of water Context: Snow is made of crystals of "
        "frozen water. It falls from clouds in cold weather."
    ),
}
PROMPTS |= {"winogrande_m": PROMPTS["winogrande_s"], "arc_easy": PROMPTS["arc_challenge"]}

ROWS = {
    "winogrande_s": {"train": 640, "dev": 1267},
    "winogrande_m": {"train": 2558, "dev": 1267},
    "arc_challenge": {"train": 1119, "dev": 299, "test": 1170},
    "arc_easy": {"train": 2251, "dev": 570, "test": 2376},
    "openbookqa": {"train": 4956, "dev": 500, "test": 500},
    "boolq": {"train": 2270, "dev": 1000},
}


def first_row(name: str) -> dict[str, Any]:
    return json.loads((ASSETS / TASKS[name].files["dev"]).read_text(encoding="utf-8").splitlines()[0])


def write(folder: Path, task: Task, *lines: str) -> Path:
    path = folder / task.files["dev"]
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def changed(row: dict[str, Any], path: str, value: Any) -> str:
    """The row as JSON with the field at a dotted path replaced, or taken out if the value is `...`."""
    row = json.loads(json.dumps(row))
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place: Any = row
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(row)


@pytest.mark.parametrize("name", TASKS)
def test_prompt_is_the_papers_to_the_letter(name):
    assert load_rows(TASKS[name], "dev", ASSETS).examples[0].prompt == PROMPTS[name]


@pytest.mark.parametrize("name", TASKS)
def test_registry_key_is_the_name_and_results_are_reported_on_dev(name):
    assert get_task(name).name == name
    assert get_task(name).evaluation == "dev"
    assert set(TASKS[name].hub_splits) == set(TASKS[name].files)


def test_the_part_that_may_be_cut():
    boolq = load_rows(TASKS["boolq"], "dev", ASSETS).examples[0]
    assert boolq.head.endswith("is snow made of water Context: ")
    assert (boolq.tail, boolq.cut) == ("", "right")
    for name in ("winogrande_s", "arc_easy", "openbookqa"):
        example = load_rows(TASKS[name], "dev", ASSETS).examples[0]
        assert example.head.endswith("question: ")
        assert example.tail.startswith(" Choices: A. ")
        assert example.cut == "left"


def test_answers_and_labels():
    examples = load_rows(TASKS["boolq"], "dev", ASSETS).examples
    assert [(e.answers, e.label, e.id) for e in examples] == [(("False", "True"), 1, "0"), (("False", "True"), 0, "1")]
    examples = load_rows(TASKS["arc_easy"], "train", ASSETS).examples
    assert ["".join(e.answers) for e in examples] == ["ABCD", "ABCD", "ABC", "ABCDE", "ABC"]
    assert [e.label for e in examples] == [1, 0, 1, 2, 1]
    assert examples[0].choices == ("Iron.", "Water.", "Sand.", "Glass.")


def test_winogrande_twins_share_a_group():
    examples = load_rows(TASKS["winogrande_m"], "train", ASSETS).examples
    assert [e.group for e in examples] == ["VASE", "VASE", "KITE-A", "KITE-A", "SOUP", "SOUP"]
    assert [e.id for e in examples][:2] == ["VASE-1", "VASE-2"]


def test_row_filter_keeps_four_choices():
    rows = load_rows(TASKS["arc_challenge"], "train", ASSETS, row_filter=True)
    assert (len(rows.examples), rows.filtered, rows.skipped) == (2, 3, 0)
    assert load_rows(TASKS["boolq"], "train", ASSETS, row_filter=True).filtered == 0


BAD = [
    ("winogrande_s", "sentence", ..., "a field `sentence`"),
    ("winogrande_s", "option1", 3, "field `option1` to be text, but got 3"),
    ("winogrande_s", "option2", " ", "field `option2` to hold text, but it is empty"),
    ("winogrande_s", "answer", "3", "field `answer` to be one of '1', '2', but got '3'"),
    ("winogrande_s", "answer", 1, "field `answer` to be one of '1', '2', but got 1"),
    ("winogrande_s", "answer", "", "field `answer` to hold the right answer"),
    ("winogrande_s", "answer", ..., "a field `answer`, but found the fields qID, sentence"),
    ("arc_easy", "question", ..., "a field `question`"),
    ("arc_easy", "question.stem", ..., "a field `stem`"),
    ("arc_easy", "question.choices", ..., "field `choices` to be a list of choices"),
    ("arc_easy", "question.choices", [], "two or more choices"),
    ("arc_easy", "question.choices.0.text", "", "to be non-empty text, but got ''"),
    ("arc_easy", "question.choices.0.text", 7, "to be non-empty text, but got 7"),
    ("arc_easy", "question.choices.1.label", "1", "labels in field `choices` to differ"),
    ("arc_easy", "answerKey", "5", "field `answerKey` to be one of '1', '2', '3', '4', but got '5'"),
    ("openbookqa", "question.stem", 1, "field `stem` to be text"),
    ("openbookqa", "answerKey", None, "field `answerKey` to hold the right answer"),
    ("boolq", "answer", "true", "field `answer` to be one of False, True, but got 'true'"),
    ("boolq", "answer", 1, "field `answer` to be one of False, True, but got 1"),
    ("boolq", "passage", "", "field `passage` to hold text"),
]


@pytest.mark.parametrize(("name", "field", "value", "message"), BAD)
def test_malformed_row_is_named(tmp_path, name, field, value, message):
    row = first_row(name)
    good = json.dumps(row)
    path = write(tmp_path, TASKS[name], good, changed(row, field, value))
    with pytest.raises(TaskError) as caught:
        load_rows(TASKS[name], "dev", tmp_path)
    assert f"{path}, line 2: Expected" in str(caught.value)
    assert message in str(caught.value)
    assert "--skip-bad-rows" in str(caught.value)
    rows = load_rows(TASKS[name], "dev", tmp_path, skip_bad_rows=True)
    assert (len(rows.examples), rows.skipped) == (1, 1)
    assert message in rows.problems[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"question": ', "no valid JSON"),
        (b"[1, 2]", "a JSON object, but got list"),
        (b'{"question": "caf\xe9"}', "UTF-8"),
        (b"[" * 100_000, "no valid JSON"),
    ],
)
def test_unreadable_line_is_named(tmp_path, line, message):
    good = json.dumps(first_row("boolq")).encode()
    path = write(tmp_path, TASKS["boolq"])
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\n\n" + line + b"\n")  # BOM and empty lines are no error
    with pytest.raises(TaskError, match="line 3: ") as caught:
        load_rows(TASKS["boolq"], "dev", tmp_path)
    assert message in str(caught.value)
    assert load_rows(TASKS["boolq"], "dev", tmp_path, skip_bad_rows=True).skipped == 1


def test_two_rows_of_one_id(tmp_path):
    write(tmp_path, TASKS["openbookqa"], *[json.dumps(first_row("openbookqa"))] * 2)
    with pytest.raises(TaskError, match="line 2: Expected ids that differ, but `1-1` is that of line 1 too"):
        load_rows(TASKS["openbookqa"], "dev", tmp_path)


def test_two_choices_of_one_text_are_no_error(tmp_path):
    write(tmp_path, TASKS["openbookqa"], changed(first_row("openbookqa"), "question.choices.0.text", "oxygen"))
    assert load_rows(TASKS["openbookqa"], "dev", tmp_path).examples[0].choices[:2] == ("Oxygen.", "Oxygen.")


def test_no_row_left_says_why(tmp_path):
    write(tmp_path, TASKS["boolq"], "{}")
    with pytest.raises(TaskError, match=r"none is left \(1 malformed, 0 filtered out\).*line 1: Expected a field"):
        load_rows(TASKS["boolq"], "dev", tmp_path, skip_bad_rows=True)


def test_unlabelled_rows_for_prediction():
    row = {"question": "is it wet", "passage": "Water is wet."}
    rows = parse_rows([json.dumps(row).encode()], ".jsonl")
    assert make_examples(TASKS["boolq"], rows, "stdin", labelled=False).examples[0].label is None


def test_unknown_names():
    with pytest.raises(ConfigError, match=r"`winogrande`.*Did you mean `winogrande_.`"):
        get_task("winogrande")
    with pytest.raises(ConfigError, match=r"task file \(.yaml\)"):
        get_task("sst2")
    with pytest.raises(TaskError, match=r"`test`. Known: dev, train"):
        load_rows(TASKS["boolq"], "test", ASSETS)
    with pytest.raises(TaskError, match=r"--data-dir.*`boolq/dev.jsonl`"):
        load_rows(TASKS["boolq"], "dev", ASSETS / "nowhere")
    with pytest.raises(TaskError, match=r"Expected a .jsonl, .csv or .tsv file"):
        list(parse_rows([], ".parquet"))


def hub_row(name: str) -> dict[str, Any]:
    """The first dev row in the schema of the hub."""
    row = first_row(name)
    if name in ("arc_challenge", "arc_easy", "openbookqa"):
        question = row.pop("question")
        row["question_stem" if name == "openbookqa" else "question"] = question["stem"]
        row["choices"] = {key: [choice[key] for choice in question["choices"]] for key in ("text", "label")}
    row.pop("qID", None)
    row.pop("title", None)
    return row


HUB = {
    "winogrande_s": ("allenai/winogrande", "winogrande_s"),
    "winogrande_m": ("allenai/winogrande", "winogrande_m"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
    "openbookqa": ("allenai/openbookqa", "main"),
    "boolq": ("google/boolq", None),
}


@pytest.mark.parametrize("name", TASKS)
def test_hub(monkeypatch, name):
    asked = []

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        return datasets.Dataset.from_list([hub_row(name)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_rows(TASKS[name], "dev")
    assert asked == [(*HUB[name], "validation")]
    assert [e.prompt for e in rows.examples] == [PROMPTS[name]]
    local = load_rows(TASKS[name], "dev", ASSETS).examples[0]
    assert (rows.examples[0].label, rows.examples[0].answers) == (local.label, local.answers)
    assert HUB[name][0] in rows.source


def test_hub_twins_share_a_group_without_ids(monkeypatch):
    lines = (ASSETS / "winogrande/train_m.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{key: value for key, value in json.loads(line).items() if key != "qID"} for line in lines]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    examples = load_rows(TASKS["winogrande_m"], "train").examples
    assert [e.id for e in examples] == ["0", "1", "2", "3", "4", "5"]
    groups = [e.group for e in examples]
    assert groups[::2] == groups[1::2]
    assert len(set(groups)) == 3


@pytest.mark.parametrize("error", [ConnectionError("offline"), datasets.exceptions.DatasetNotFoundError("gated")])
def test_hub_out_of_reach_says_what_to_do(monkeypatch, error):
    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(TaskError, match=r"allenai/ai2_arc.*--data-dir.*`arc_easy/train.jsonl`.*official release"):
        load_rows(TASKS["arc_easy"], "train")


def test_malformed_hub_row_is_named(monkeypatch):
    row = hub_row("openbookqa") | {"answerKey": "Z"}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([row]))
    with pytest.raises(TaskError, match=r"allenai/openbookqa \(main\), split validation, row 1: Expected .*'Z'"):
        load_rows(TASKS["openbookqa"], "dev")


@pytest.mark.parametrize("name", TASKS)
def test_all_real_rows(shared, name):
    task = TASKS[name]
    sizes: Counter[int] = Counter()
    for split, count in ROWS[name].items():
        rows = load_rows(task, split, shared / "data")
        assert (len(rows.examples), rows.skipped) == (count, 0)
        for example in rows.examples:
            sizes[len(example.answers)] += 1
            assert example.label is not None
            assert 0 <= example.label < len(example.answers)
            assert example.prompt == example.head + example.context + example.tail
            if name == "boolq":
                assert example.head.startswith("Answer the question with only True or False: ")
                assert (example.answers, example.tail) == (("False", "True"), "")
            else:
                assert example.prompt.startswith("Select one of the choices that answers the following question: ")
                assert example.tail.startswith(" Choices: A. ")
                assert example.tail.endswith(". Answer:")
                assert "".join(example.answers) == "ABCDE"[: len(example.answers)]
    assert set(sizes) == ({3, 4, 5} if name.startswith("arc") else {4} if name == "openbookqa" else {2})


def test_row_filter_on_real_rows(shared):
    for split, count in ROWS["arc_easy"].items():
        rows = load_rows(TASKS["arc_easy"], split, shared / "data", row_filter=True)
        assert len(rows.examples) + rows.filtered == count
        assert {len(example.answers) for example in rows.examples} == {4}
        assert rows.filtered > 0
