"""A short load test of the real process: at twice its capacity every request is answered once, with its own numbers."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from serve_helpers import trained

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def serve_load(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module("serve_load")
    for name in set(sys.modules) - before:
        if name in ("_common", "serve_load"):
            del sys.modules[name]


def test_at_twice_its_capacity_nothing_is_lost_or_answered_twice(serve_load, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "load.json"
    # Fewer clients than rows that may wait would make small batches, and twice what those give is no overload.
    options = "--seconds 2 --capacity-seconds 1 --warmup 0.3 --clients 16 --samples 2 --queue 12"
    found = serve_load.main(["--run", str(trained()), *options.split(), "--out", str(out)])
    assert found["problems"] == {}
    assert found["exit_status"] == 0
    assert found["sent"] == found["answered"] + found["refused"] > 20
    assert found["offered_times_capacity"] > 1.9
    assert found["answered"] > 0
    assert found["refused"] > 0  # so that there was more than it can do
    assert found["largest_deviation"] < 1e-5
    written = json.loads(out.read_text())
    assert written["origin"]["versions"]["torch"]
    assert written["sent"] == found["sent"]
    assert "refused" in capsys.readouterr().out


def test_the_capacity_is_what_is_answered_with_200_within_the_window(serve_load):
    sent = [serve_load.Sent(b"", [], [], status, ended=ended) for status, ended in ((200, 1), (200, 2), (200, 3))]
    others = [serve_load.Sent(b"", [], [], status, ended=2) for status in (503, 500)]
    lost = serve_load.Sent(b"", [], [])
    assert serve_load.answered_within([*sent, *others, lost], 1.5, 3) == [sent[1]]


def test_what_is_wrong_is_found(serve_load):
    """Each check of the script fails where it should."""
    sent = serve_load.Sent(b"", ["1"], [[0.25, 0.75]])

    def problems(status, body=None, **headers):
        sent.status, sent.problems = status, []
        serve_load._check(sent, headers, json.dumps(body).encode())
        return sent.problems

    right = {"results": [{"id": "1", "probabilities": {"a": 0.25, "b": 0.75}}]}
    assert problems(200, right) == []
    assert problems(200, {"results": [{**right["results"][0], "id": "2"}]}) == ["another request's ids"]
    swapped = {"results": [{"id": "1", "probabilities": {"a": 0.75, "b": 0.25}}]}
    assert problems(200, swapped) == ["another question's probabilities"]
    assert problems(503, **{"retry-after": "1"}) == []
    assert problems(503) == ["503 without Retry-After"]
    assert problems(500) == ["status 500"]
