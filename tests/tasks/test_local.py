"""Task files for data of one's own: what they can say, and what they are told if it is wrong."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from varlora.errors import ConfigError, TaskError
from varlora.tasks import get_task, load_rows, make_examples, parse_rows

LOCAL = Path(__file__).parents[1] / "assets" / "local"
RECIPE = Path(__file__).parents[2] / "recipes" / "local" / "sst2.yaml"
BASE = {
    "name": "toy",
    "prompt": "{text} Answer:",
    "label": "y",
    "answers": ["no", "yes"],
    "files": {"dev": "dev.jsonl"},
}


def task_file(folder: Path, *rows: dict, **changes) -> Path:
    """A task file of `BASE` with some keys changed (`...`: taken out), and its dev rows beside it."""
    config = {key: value for key, value in (BASE | changes).items() if value is not ...}
    (folder / "toy.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    (folder / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "toy.yaml"


def dev(path: Path, **options):
    return load_rows(get_task(path), "dev", **options).examples


def test_csv_and_tsv_beside_the_task_file():
    task = get_task(LOCAL / "reviews.yaml")
    train = load_rows(task, "train").examples  # with BOM, quoted commas, quotes and line breaks
    assert [e.context for e in train] == [
        "A slow film, and long.",
        'Two lines,\r\none joy: "see it".',
        "Café scenes are fine",
    ]
    assert [e.label for e in train] == [0, 1, 1]
    assert train[0].prompt == "Review: A slow film, and long.\nGood or bad? Answer:"
    assert [(e.context, e.answers, e.label) for e in load_rows(task, "dev").examples] == [
        ('a "must', ("bad", "good"), 0),
        ("see it twice", ("bad", "good"), 1),
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "a: &a [x, x]\n"
            + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24))
            + "files: *y\n",
            "without aliases",
        ),
        ("[" * 100_000, "of at most 20 levels"),
        ("]" * 50_000 + "[" * 50_000, "to be YAML"),
        ("name: " + "- " * 100_000, "to be YAML"),
        ("- " * 100_000, "of at most 20 levels"),
        ("\n".join(" " * i + "x:" for i in range(600)), "of at most 20 levels"),
        ("name: 2020-99-99", "to be YAML"),
        ("name: [1, 2", "to be YAML"),
        (f"[{'x, ' * 50_000}y]", "to hold keys"),
        (f"{{files: [{'x, ' * 50_000}y]}}", "`files`"),
        (f"[{'x, ' * 1_000_000}y]", "at most 262,144 bytes"),
        ("".join(f"key{i}: 1\n" for i in range(300)), "Unknown key `key0`"),
        (json.dumps(BASE | {"evaluation": ["dev"]}), "`evaluation` to be text"),
    ],
    ids=[
        "aliases",
        "deep",
        "deep after too many ends",
        "deep block",
        "deep list",
        "deep keys",
        "date",
        "cut",
        "long list",
        "long files",
        "large",
        "many keys",
        "no text",
    ],
)
def test_a_strangers_file_is_refused_in_few_words(tmp_path, text, why):
    (tmp_path / "task.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=why) as raised:
        get_task(tmp_path / "task.yaml")
    assert len(str(raised.value)) < 20_000


def test_choices_of_their_own():
    first, second, third = dev(LOCAL / "quiz.yaml")
    assert first.prompt == "What is 2 + 2? A. 3 B. 4 C. 5 (1) Answer:"
    assert (first.head, first.context) == ("", "What is 2 + 2?")
    assert [(e.id, e.answers, e.label) for e in (first, second, third)] == [
        ("q1", ("A", "B", "C"), 1),  # by its text
        ("q2", ("A", "B"), 0),  # by its letter
        ("q3", ("A", "B", "C", "D"), 2),  # by its index
    ]
    assert third.choices == ("chair", "stone", "pear", "rope")
    assert get_task(LOCAL / "quiz.yaml").version == "2"


def test_files_lie_in_the_data_folder_if_given(tmp_path):
    (tmp_path / "quiz.jsonl").write_text(
        '{"key": "z", "question": "?", "options": ["a", "b"], "right": "b", "level": 1}\n'
    )
    assert [e.id for e in dev(LOCAL / "quiz.yaml", data_dir=tmp_path)] == ["z"]


def test_answers_as_a_list_by_text_or_index(tmp_path):
    rows = [{"text": "a", "y": y} for y in ("yes", 1, "1", "no", 0)]
    assert [e.label for e in dev(task_file(tmp_path, *rows))] == [1, 1, 1, 0, 0]


@pytest.mark.parametrize(("label_as", "labels"), [("text", ["2", 1]), ("index", [1, "0"])])
def test_answers_that_are_numbers_by_text_or_index(tmp_path, label_as, labels):
    rows = [{"text": "a", "y": y} for y in labels]
    assert [e.label for e in dev(task_file(tmp_path, *rows, answers=["1", "2"], label_as=label_as))] == [1, 0]


@pytest.mark.parametrize(("label_as", "label"), [("text", 1), ("letter", 0), ("index", 2)])
def test_choices_whose_texts_are_letters_and_numbers(tmp_path, label_as, label):
    row = {"text": "a", "y": {"text": "A", "letter": "A", "index": 2}[label_as], "c": ["2", "A", "3"]}
    assert dev(task_file(tmp_path, row, answers=..., choices="c", label_as=label_as))[0].label == label


def test_answers_by_booleans_and_numbers_that_yaml_reads_as_such(tmp_path):
    path = task_file(tmp_path, {"text": "a", "y": True}, {"text": "b", "y": False})
    path.write_text('{name: t, prompt: "{text}", label: y, answers: {false: bad, true: good}, files: {dev: dev.jsonl}}')
    assert [e.label for e in dev(path)] == [1, 0]
    task_file(tmp_path, {"text": "a", "y": 7}, {"text": "b", "y": "3"})
    path.write_text('{name: t, prompt: "{text}", label: y, answers: {3: bad, 7: good}, files: {dev: dev.jsonl}}')
    assert [e.label for e in dev(path)] == [1, 0]


def test_the_longest_field_is_cut_unless_another_is_named(tmp_path):
    row = {"a": "short", "b": "somewhat longer", "y": 0}
    example = dev(task_file(tmp_path, row, prompt="1 {a} 2 {b} 3 {a} 4"))[0]
    assert (example.head, example.context, example.tail) == ("1 short 2 ", "somewhat longer", " 3 short 4")
    example = dev(task_file(tmp_path, row, prompt="1 {a} 2 {b} 3 {a} 4", cut="a"))[0]
    assert (example.head, example.context, example.tail) == ("1 ", "short", " 2 somewhat longer 3 short 4")


def test_braces_in_prompt_and_in_data_stand_for_themselves(tmp_path):
    example = dev(task_file(tmp_path, {"my text": "{y} {0.__class__}", "y": 0}, prompt="{{json}} {my text}"))[0]
    assert example.prompt == "{json} {y} {0.__class__}"


def test_limit_takes_a_fixed_part_in_the_order_of_the_file(tmp_path):
    rows = [{"text": str(i), "y": i % 2} for i in range(50)]
    kept = [int(e.id) for e in dev(task_file(tmp_path, *rows, limit={"dev": 10}))]
    assert kept == sorted(set(kept))
    assert len(kept) == 10
    assert kept != list(range(10))
    assert kept == [int(e.id) for e in dev(task_file(tmp_path, *rows, limit={"dev": 10}))]
    assert set(kept) < {int(e.id) for e in dev(task_file(tmp_path, *rows, limit={"dev": 20}))}
    assert len(dev(task_file(tmp_path, *rows, limit={"dev": 99}))) == 50


PROBLEMS = [
    ({"promt": "x"}, "Unknown key `promt`. Did you mean `prompt`?"),
    ({"name": ...}, "Expected a key `name`"),
    ({"name": "../../elsewhere"}, "Expected `name` to be letters, digits, spaces and . _ - +"),
    ({"name": ".hidden"}, "not beginning with a dot"),
    ({"label": 3}, "Expected `label` to be text, but got 3"),
    ({"prompt": "no field"}, "Expected `prompt` to hold a field in braces"),
    ({"prompt": "{text"}, "Expected `prompt` to name fields"),
    ({"prompt": "{text!r}"}, "a field's name and nothing else"),
    ({"prompt": "{}"}, "a field's name and nothing else"),
    ({"cut": "txt"}, "Expected `cut` to be a field of the prompt, but got 'txt'. Did you mean `text`?"),
    ({"answers": ...}, "Expected `answers` to be a list or mapping of two or more (or `choices`)"),
    ({"answers": ["yes"]}, "two or more"),
    ({"answers": [True, False]}, "Expected each of `answers` to be text, but got True. Quote it"),
    ({"answers": ["yes", ""]}, "Expected each of `answers` to be text, but got ''"),
    ({"answers": ["yes", "yes"]}, "Expected `answers` to differ"),
    ({"answers": ["no", "0"]}, "Expected each label to name one of `answers`, but '0' may be several"),
    ({"label_as": "letter"}, "Expected `label_as` to be one of text, index, but got 'letter'"),
    ({"label_as": ["text"]}, "Expected `label_as` to be one of text, index, but got ['text']"),
    ({"answers": {0: "no", 1: "yes"}, "label_as": "index"}, "Expected no `label_as`, as the mapping of `answers`"),
    ({"choices": "options"}, "Expected either `answers` or `choices`"),
    ({"files": {}}, "Expected `files` to name a file for each split"),
    ({"files": {"dev": "dev.csv", "calibration": "c.csv"}}, "Expected no split `calibration`, which is what is held"),
    ({"files": {"dev": "dev.parquet"}}, "Expected the file of split `dev` to end in .jsonl, .csv, .tsv"),
    ({"evaluation": "devel"}, "Expected `evaluation` to be a split of `files`, but got 'devel'. Did you mean `dev`?"),
    ({"limit": {"den": 5}}, "Unknown split `den` in `limit`. Did you mean `dev`?"),
    ({"limit": {"dev": 0}}, "Expected `limit` of split `dev` to be a number of rows >= 1"),
    ({"limit": 5}, "Expected `limit` to give rows by split"),
]


@pytest.mark.parametrize(("changes", "message"), PROBLEMS)
def test_problem_of_a_task_file(tmp_path, changes, message):
    with pytest.raises(ConfigError) as caught:
        get_task(task_file(tmp_path, **changes))
    assert len(caught.value.problems) == 1
    assert message in caught.value.problems[0]
    assert "toy.yaml" in caught.value.problems[0]


def test_labels_that_are_the_same_as_text_are_refused(tmp_path):
    path = task_file(tmp_path)
    path.write_text(path.read_text().replace('["no", "yes"]', '{1: "no", "1": "yes"}'))
    with pytest.raises(ConfigError, match="to differ as text, as they are compared so, but got 1, '1'"):
        get_task(path)


def test_all_problems_are_reported_together(tmp_path):
    path = task_file(tmp_path, promt="x", answers=["a", "a"], limit={"dev": -1}, cut="nothing", evaluation=4)
    with pytest.raises(ConfigError) as caught:
        get_task(path)
    assert len(caught.value.problems) == 6


@pytest.mark.parametrize(("text", "message"), [("a: [", "to be YAML"), ("- a", "to hold keys"), ("", "to hold keys")])
def test_no_task_file(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        get_task(tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        get_task(tmp_path / "absent.yaml")


BAD_ROWS = [
    ({}, {"txt": "a", "y": 0}, "a field `text`, but found the fields txt, y. Did you mean `txt`?"),
    ({}, {"text": None, "y": 0}, "field `text` to be text, but got None"),
    ({}, {"text": "a", "y": 2}, "field `y` to be one of 'no', 'yes', '0', '1', but got '2'"),
    ({}, {"text": "a", "y": [1]}, "field `y` to be one of"),
    ({}, {"text": "a"}, "a field `y`, but found the fields text"),
    ({}, {"text": "a", "y": ""}, "field `y` to hold the right answer"),
    ({"id": "key"}, {"text": "a", "y": 0}, "a field `key`"),
    ({"answers": ..., "choices": "c"}, {"text": "a", "y": 0}, "a field `c`"),
    ({"answers": ..., "choices": "c"}, {"text": "a", "y": 0, "c": "a b"}, "field `c` to be a list of 2 to 26 choices"),
    (
        {"answers": ..., "choices": "c"},
        {"text": "a", "y": 0, "c": ["a", 2]},
        "each choice in field `c` to be non-empty text",
    ),
    ({"answers": ..., "choices": "c"}, {"text": "a", "y": 5, "c": ["a", "b"]}, "field `y` to be one of 'a', 'b', 'A'"),
    (
        {"answers": ..., "choices": "c"},
        {"text": "a", "y": "s", "c": ["s", "s"]},
        "name one choice, but 's' may be several",
    ),
    (
        {"answers": ..., "choices": "c"},
        {"text": "a", "y": 1, "c": ["1", "2"]},
        "name one choice, but '1' may be several",
    ),
    ({"answers": ..., "choices": "c", "label_as": "letter"}, {"text": "a", "y": 0, "c": ["a", "b"]}, "one of 'A', 'B'"),
]


@pytest.mark.parametrize(("changes", "row", "message"), BAD_ROWS)
def test_malformed_row_is_named(tmp_path, changes, row, message):
    with pytest.raises(TaskError) as caught:
        dev(task_file(tmp_path, row, **changes))
    assert "dev.jsonl, line 1: Expected " in str(caught.value)
    assert message in str(caught.value)


def test_two_choices_of_one_text_are_told_apart_by_their_letters(tmp_path):
    row = {"text": "a", "y": "B", "c": ["s", "s"]}
    assert dev(task_file(tmp_path, row, answers=..., choices="c"))[0].label == 1


@pytest.mark.parametrize(
    ("suffix", "lines", "number", "message"),
    [
        (".tsv", [b"text\ty\n", b"a\t0\n", b"a\tb\t0\n"], 3, "Expected 2 columns as in line 1, but found 3"),
        (".csv", [b"text,y\n", b'"two\n', b'lines",0\n', b"a\n"], 4, "Expected 2 columns as in line 1, but found 1"),
        (".csv", [b"text,y\n", b'"never closed,0\n'], 2, "cannot be read"),
        (".csv", [b"text,y\n", b"caf\xe9,0\n"], 2, "Expected UTF-8"),
        (".csv", [b"y,y\n", b"a,0\n"], 1, "Expected column names that differ"),
    ],
)
def test_unreadable_table_row_is_named(tmp_path, suffix, lines, number, message):
    task = get_task(task_file(tmp_path))
    with pytest.raises(TaskError, match=f"mine, line {number}: ") as caught:
        make_examples(task, parse_rows(lines, suffix), "mine")
    assert message in str(caught.value)


def test_a_quote_that_swallows_rows_is_never_skipped(tmp_path):
    lines = [b"text,y\n", b"a,0\n", b'"never closed,0\n', *[b"b,1\n"] * 50]
    with pytest.raises(TaskError, match=r"mine, line 3: .*lines up to 53"):
        make_examples(get_task(task_file(tmp_path)), parse_rows(lines, ".csv"), "mine", skip_bad_rows=True)


def test_a_long_text_over_several_lines_is_a_field(tmp_path):
    lines = [b"text,y\n", b'"', *[b"a long line\n"] * 20_000, b'",1\n']
    (example,) = make_examples(get_task(task_file(tmp_path)), parse_rows(lines, ".csv"), "mine").examples
    assert len(example.prompt) > 200_000


def test_half_a_character_is_a_bad_row(tmp_path):
    """Legal JSON, as of an emoji that was cut in two; no tokenizer takes it."""
    task = get_task(task_file(tmp_path))
    lines = [b'{"text": "whole \\ud83d\\ude00", "y": 0}', b'{"text": "half \\ud83d", "y": 0}']
    with pytest.raises(TaskError, match=r"line 2: .*lone surrogate"):
        make_examples(task, parse_rows(lines, ".jsonl"), "mine")
    found = make_examples(task, parse_rows(lines, ".jsonl"), "mine", skip_bad_rows=True)
    assert (len(found.examples), found.skipped) == (1, 1)


def test_unlabelled_rows_for_prediction(tmp_path):
    rows = parse_rows([b"text\n", b"fine\n"], ".csv")
    assert make_examples(get_task(task_file(tmp_path)), rows, "mine", labelled=False).examples[0].label is None


def test_nan_is_no_text(tmp_path):
    """Python's JSON has it, and pandas writes it for what is missing."""
    rows = parse_rows([b'{"text": NaN, "y": 0}\n'], ".jsonl")
    with pytest.raises(TaskError, match="field `text` to hold text or a number, but it is NaN"):
        make_examples(get_task(task_file(tmp_path)), rows, "mine")


def test_the_choices_stand_in_the_prompt_by_that_name(tmp_path):
    with pytest.raises(ConfigError, match=r"Expected `\{choices\}` in `prompt`.*but got `\{options\}`"):
        get_task(task_file(tmp_path, prompt="{text} {options}", choices="options", answers=...))


def test_a_label_that_is_not_there_is_not_said_to_be_found(tmp_path):
    rows = parse_rows([b'{"txt": "fine"}\n'], ".jsonl")
    with pytest.raises(TaskError, match=r"Expected a field `text`, but found the fields txt\. Did you mean `txt`"):
        make_examples(get_task(task_file(tmp_path)), rows, "mine", labelled=False)


def test_sst2_all_real_rows(shared):
    task = get_task(RECIPE)
    dev = load_rows(task, "dev", shared / "data").examples
    assert Counter(e.label for e in dev) == {0: 428, 1: 444}
    assert dev[0].prompt.startswith("Review: it 's a charming and often affecting journey . \nIs this review ")
    train = load_rows(task, "train", shared / "data").examples
    assert len(train) == 67349
    for example in train:
        assert example.answers == ("negative", "positive")
        assert example.label in (0, 1)
        assert example.tail == "\nIs this review positive or negative? Answer:"
        assert example.context.strip()


def test_rows_are_sliced_by_a_field(tmp_path):
    rows = [{"text": "a", "y": 1, "seen": True}, {"text": "b", "y": 0, "seen": "in part"}, {"text": "c", "y": 0}]
    examples = dev(task_file(tmp_path, *rows, slice="seen"))
    assert [example.slice for example in examples] == ["true", "in part", ""]
    assert [example.slice for example in dev(task_file(tmp_path, *rows))] == ["", "", ""]
    with pytest.raises(ConfigError, match="Expected `slice` to be text, but got 3"):
        get_task(task_file(tmp_path, slice=3))
