"""What docs/serve.md shows is what the service does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from serve_helpers import live

from varlora.arguments import command_line
from varlora.serve.base import Limits

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
BLOCKS = [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)]


def shape(value):
    """The keys and types of an example; its numbers are another run's."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    return [shape(inner) for inner in value] if isinstance(value, list) else type(value)


@pytest.fixture(scope="module")
def service():
    with live() as found:
        yield found


def test_the_request_gets_the_response_that_is_shown(service):
    request, response, by_row, _ = BLOCKS
    found = service.ask(**request)
    assert found.status == 200
    assert shape(found.json) == shape(response)
    assert found.json["risk"] == pytest.approx(response["risk"])
    assert service.ask(**by_row).json["results"][0]["id"] == by_row["rows"][0]["id"]
    for one in response["results"]:
        assert sum(one["probabilities"].values()) == pytest.approx(1, abs=1e-3)
        parts = one["uncertainty"]
        assert parts["total"] == pytest.approx(parts["aleatoric"] + parts["epistemic"], abs=1e-3)


def test_the_refusal_is_the_one_that_is_shown(service):
    assert service.ask(question="q", answers=["a"]).json == BLOCKS[-1]


def test_every_field_code_path_option_and_metric_is_named(service):
    schema = service.get("/openapi.json").json["paths"]
    body = schema["/v1/answer"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert [name for name in body["properties"] if f"`{name}`" not in TEXT] == []
    assert [path for path in schema if path not in TEXT] == []
    source = "".join(
        path.read_text() for path in (Path(__file__).resolve().parents[2] / "src/varlora/serve").glob("*.py")
    )
    codes = set(re.findall(r'Refused\(\s*\d+,\s*"(\w+)"', source)) - {"gone"}
    assert len(codes) > 12
    assert [code for code in codes if f"`{code}`" not in TEXT] == []
    metrics = re.findall(rb"# TYPE varlora_serve_(\w+) (\w+)", service.get("/metrics").body)
    names = {name.decode() for name, _ in metrics if not name.endswith(b"_created")}
    assert len(names) == 9
    assert [name for name in names if f"`{name}`" not in TEXT] == []
    arguments = vars(command_line().parse_args(["serve", "run"]))
    for name in ("queue", "batch_tokens", "max_body", "max_rows", "max_answers", "max_tau"):
        assert name in arguments
        row = re.search(rf"^\| `--{name.replace('_', '-')}` \| (\d+) \|", TEXT, re.MULTILINE)
        assert row
        assert float(row[1]) == getattr(Limits(), name)


def test_the_result_that_is_told_of_is_there():
    found = json.loads((Path(__file__).resolve().parents[2] / "benchmarks/results/serve_load.json").read_text())
    assert found["problems"] == {}
    assert found["settings"]["seconds"] == 60
    assert found["settings"]["times"] == 2
    assert found["sent"] == found["answered"] + found["refused"]
    assert found["refused"] > 0
