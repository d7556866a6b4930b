"""The benchmark of all methods runs at a tiny size, and every number that is missing says why."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from varlora.methods import METHODS

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
TINY = "--rows 8 --held-out 3 --batch-size 2 --max-length 16 --rounds 1 --passes 1 --warmup 0"
TINY += " --layers 1 --hidden 32 --tokens 4 --flush-mb 1 --threads 1"


@pytest.fixture
def benchmark(monkeypatch):
    """Import the script as it sees itself when it is run, its folder on the path, and take back what it sets."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    yield importlib.import_module("methods")
    torch.set_num_threads(threads)
    for name in ("methods", "_common"):
        del sys.modules[name]


def test_every_method_has_all_its_costs_or_says_why_not(benchmark, few_rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VARLORA_SHARED", str(few_rows))
    out = tmp_path / "found.json"
    benchmark.main([*TINY.split(), "--out", str(out)])
    written = json.loads(out.read_text())
    assert written["origin"]["versions"]["torch"] == torch.__version__
    assert written["origin"]["machine"]["torch_threads"] == 1

    methods, numel = written["methods"], written["base"]["numel"]
    assert set(METHODS) < set(methods)
    for name, of in methods.items():
        for cost in ("training", "conclusion", "posterior", "prediction"):
            assert of[cost] or of["why_null"][cost], (name, cost)
    beyond = {name: of["training"]["state_bytes_beyond_adamw"] for name, of in methods.items() if of["training"]}
    assert {name for name, more in beyond.items() if not more} == set(METHODS) - {
        "ivon",
        "pruned",
        "swa",
        "swag",
        "blob",
    }
    assert beyond["swa"] == 4 * numel
    assert beyond["swag"] >= 4 * (2 + benchmark.KEPT) * numel  # mean, squares and deviations
    assert methods["adamw"]["training"]["ratio_to_adamw"]["of_medians"] == 1
    assert methods["ensemble"]["training"]["ratio_to_adamw"] == 3
    assert methods["adamw"]["posterior"]["bytes"] == 4 * numel
    assert methods["ivon"]["posterior"]["ratio_to_adamw"] == 2
    assert methods["laplace_diag"]["conclusion"]["predicted_models"] == 0
    assert methods["temperature"]["conclusion"]["predicted_models"] == 12  # 10 draws, their mean, and the mean alone

    large = written["llama2_7b"]
    assert large["adapter"] == {"matrices": 4, "numel": 4 * 8 * 32}
    assert large["steps"]["ivon"]["ratio_to_adamw"]["of_medians"] > 0
    assert large["curvature"]["diagonal"]["collector_bytes"] == 4 * 4 * 8 * 32
    assert large["draws"]["low rank"]["posterior_bytes"] == 4 * (2 + benchmark.KEPT) * 4 * 8 * 32
    for peer in written["peers"].values():
        assert peer.get("why_null") or peer["ours_to_it"]
    assert "torch AveragedModel" in capsys.readouterr().out


def test_held_memory_is_counted_once_and_whole(benchmark):
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.ones(4)
    optimizer = torch.optim.AdamW([weight])
    optimizer.step()
    buffer = torch.zeros(10)
    state = {"view": buffer[:2], "again": [buffer[5:]], "parameter": weight}
    trainee = benchmark.Trainee(METHODS["adamw"](), torch.nn.Identity(), optimizer, {"weight": weight}, state)
    assert (
        benchmark._held(trainee) == 4 * (4 + 4 + 1) + 40
    )  # two moments and a step count; the whole of what views keep


def test_the_peak_is_of_what_is_held_at_once(benchmark):
    def run():
        for _ in range(3):
            first = torch.zeros(1000)
            second = torch.zeros(500)
            del first, second

    assert 6000 <= benchmark.peak(run) < 6000 + 512
