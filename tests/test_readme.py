"""What the README tells a user to write: the task file loads, the commands parse, the Python runs up to the model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import yaml

import varlora
from varlora.arguments import command_line
from varlora.tasks import load_rows
from varlora.tasks.local import load_task

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def test_your_own_data_in_ten_lines(tmp_path):
    (text,) = blocks("yaml")
    (tmp_path / "reviews.yaml").write_text(text, encoding="utf-8")
    for split in yaml.safe_load(text)["files"].values():
        (tmp_path / split).write_text("text,stars\nA fine film,5\nA dull one,1\n", encoding="utf-8")
    rows = load_rows(load_task(tmp_path / "reviews.yaml"), "train")
    assert [row.answers[row.label] for row in rows.examples] == ["positive", "negative"]
    assert rows.examples[0].prompt == "Review: A fine film\nIs this review positive or negative? Answer:"


def test_commands_can_be_parsed():
    lines = [line for block in blocks("") for line in block.splitlines() if line.startswith("varlora ")]
    assert len(lines) >= 8
    for line in lines:
        for command in line.split("&&"):
            command_line().parse_args(shlex.split(command, comments=True)[1:])


def test_python_names_exist():
    code = "\n".join(blocks("python"))
    compile(code, "README.md", "exec")
    names = set(re.findall(r"varlora\.(\w+)", code))
    assert {"load", "train", "evaluate", "Settings"} <= names <= set(varlora.__all__)


def test_no_placeholder_is_left():
    assert "@@" not in README
