"""Each benchmark runs at a tiny size, and what it concludes follows from what it measured."""

from __future__ import annotations

import importlib
import json
import math
import statistics
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from varlora import metrics
from varlora.data import collate
from varlora.model import class_logits, load_model
from varlora.overhead import Cost, Overhead
from varlora.predictions import Predictions, save_predictions

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
META = {"task": "toy", "split": "dev", "samples": "1", "tau": "1.0", "seed": "0", "cut": "0"}
QUALITY = "--seeds 21 42 --adamw-lr 1e-4 5e-4 --ivon-lr 0.3 1.0 --sigma0 0.03 --steps 2"
QUALITY += " --train-rows 24 --calibration-rows 24 --dev-rows 12"


@pytest.fixture
def load(monkeypatch):
    """Import a script as it sees itself when it is run: its folder is on the path."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(FOLDER / "gpu"))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name in (
            "_common",
            "optimizer",
            "train_step",
            "quality",
            "demo",
            "llama2_7b_shape",
            "inference",
            "draws",
            "beginnings",
            "temperatures",
        ):
            del sys.modules[name]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "results" / "found.json"


@pytest.fixture
def data(few_rows, monkeypatch):
    monkeypatch.setenv("VARLORA_SHARED", str(few_rows))


def check_origin(written):
    assert written["origin"]["versions"]["torch"] == torch.__version__
    assert {"commit", "time", "machine"} <= set(written["origin"])
    assert written["origin"]["machine"]["cpu"]
    assert written["origin"]["machine"]["torch_threads"] >= 1
    assert "seed" in written["settings"]


def test_the_optimizer_benchmark_measures_time_allocation_and_limits(load, out, capsys):
    optimizer = load("optimizer")
    optimizer.main(
        ["--layers", "1", "--hidden", "64", "--rank", "2", "--rounds", "3", "--flush-mb", "1", "--out", str(out)]
    )
    written = json.loads(out.read_text())
    check_origin(written)
    assert written["parameters"] == {"tensors": 4, "numel": 512, "bytes": 2048}
    assert {"IVON", "AdamW foreach", "AdamW fused", "AdamW plain"} <= set(written["seconds"])
    assert written["seconds"]["IVON"]["sample"]["min"] > 0
    assert written["ratio_to"]["AdamW foreach"]["IVON"]["of_medians"] > 0
    # foreach: the square roots of one moment; plain: those, and the quotient
    assert 2048 <= written["allocated_bytes"]["AdamW foreach"]["total"] < 2 * 2048
    assert written["allocated_bytes"]["AdamW plain"]["total"] >= 2 * 2048
    assert written["limits"]["bytes_moved"] == {
        "AdamW": {"step": 28 * 512},
        "IVON": {"sample": 12 * 512, "step": 32 * 512},
    }
    for name, parts in written["limits"]["traffic_seconds"].items():
        measured = written["seconds"][{"AdamW": "AdamW fused"}.get(name, name)]
        over = {part: measured[part]["median"] / limit for part, limit in parts.items()}
        assert written["limits"]["measured_over_traffic"][name] == pytest.approx(over)
    assert written["limits"]["noise_seconds"]["min"] > 0
    printed = capsys.readouterr().out
    assert "IVON: sample" in printed
    assert "measured / limit" in printed


def test_the_default_shapes_are_those_of_llama2_7b(load):
    args = load("optimizer")._parser().parse_args([])
    assert 4 * args.layers * args.rank * args.hidden == 4_194_304


def test_interleave_runs_every_part_in_every_round_after_a_flush(load):
    calls = []
    part = {name: (lambda name=name: calls.append(name)) for name in ("draw", "move", "other", "flush")}
    seconds, faults = load("_common").interleave(
        {"a": [("draw", part["draw"]), ("move", part["move"])], "b": [("move", part["other"])]},
        torch.device("cpu"),
        rounds=4,
        warmup=1,
        flush=part["flush"],
        progress=False,
    )
    assert [calls.count(name) for name in ("draw", "move", "other", "flush")] == [5, 5, 5, 15]
    assert calls[::2] == ["flush"] * 15
    assert [len(seconds["a"][name]) for name in ("draw", "move", "total")] == [4, 4, 4]
    for draw, move, total in zip(*seconds["a"].values()):
        assert draw + move == pytest.approx(total)
    assert faults["b"].keys() == {"move", "total"}


def test_statistics(load):
    common = load("_common")
    assert common.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "min": 1.0}
    assert common.spread([2.0])["q3"] == 2.0
    ratio = common.ratio([2.0, 2.0, 30.0], [1.0, 4.0, 10.0])
    assert ratio["of_medians"] == 0.5
    assert ratio["median_of_rounds"] == statistics.median([2.0, 0.5, 3.0])
    assert ratio["of_minima"] == 2.0


def test_the_training_step_benchmark_gives_overheads_of_the_whole_step(load, data, out):
    train_step = load("train_step")
    train_step.main(["--rounds", "2", "--warmup", "1", "--rows", "8", "--max-length", "24", "--out", str(out)])
    written = json.loads(out.read_text())
    check_origin(written)
    assert list(written["seconds"]["ivon"]) == ["sample", "forward_backward", "step", "total"]
    assert list(written["seconds"]["adamw"]) == ["forward_backward", "step", "total"]
    assert 0 < written["overhead_percent"]["ivon"]["of_medians"] < 100
    assert written["paper"]["overhead_percent"] == pytest.approx(100 * 2.8 / 319.1)


def test_the_profile_of_a_training_run_adds_up(load, data, out):
    profile = load("training_profile")
    settings = ["--steps", "3", "--warmup", "2", "--rows", "8", "--max-length", "24", "--batch-size", "2", "3"]
    settings += ["--rounds", "1"]
    profile.main([*settings, "--out", str(out)])
    written = json.loads(out.read_text())
    check_origin(written)
    assert list(written["batch_size"]) == ["2", "3"]
    for of in written["batch_size"].values():
        assert list(of["per_cent"]) == list(profile.PARTS)
        assert sum(of["per_cent"].values()) == pytest.approx(100)
        assert min(of["per_cent"].values()) > 0
        assert of["outside_per_cent"] == pytest.approx(sum(of["per_cent"][part] for part in profile.PARTS[3:]))
    for of in written["ivon_to_adamw"].values():
        assert 0.1 < of["median_step"]["of_medians"] < 10
        assert 0.1 < of["mean_step"]["of_medians"] < 10


def test_overhead_is_sampling_and_step_over_all(load):
    parts = {"sample": [1.0, 1.0], "forward_backward": [7.0, 7.0], "step": [2.0, 2.0], "total": [10.0, 10.0]}
    assert load("train_step")._overhead(parts)["of_medians"] == pytest.approx(30.0)


TINY_SHAPE = "--tiny --rounds 2 --warmup 1 --batch-size 2 --device cpu"


def test_the_gpu_benchmark_runs_at_a_tiny_shape_in_both_precisions(load, out, capsys):
    load("llama2_7b_shape").main([*TINY_SHAPE.split(), "--out", str(out)])
    written = json.loads(out.read_text())
    check_origin(written)
    full, quantized = written["measured"]["bfloat16"], written["measured"]["8bit"]
    layers, width, inner, vocabulary = 2, 64, 128, 256
    weights = layers * (4 * width * width + 3 * width * inner)
    assert full["base_bytes"] - quantized["base_bytes"] == weights  # one byte less for each weight of a linear layer
    assert full["base_bytes"] == 2 * (weights + 2 * vocabulary * width + (2 * layers + 1) * width)
    for found in (full, quantized):
        assert found["rounds"] == 2
        assert found["tokens_per_batch"] == 2 * 32
        assert found["parameters"] == 4 * layers * 8 * width
        assert found["methods"]["ivon"]["seconds"]["sampling"]["median"] > 0
        assert 0 < found["methods"]["ivon"]["share"] < 1
        limits = {name: parts["step"] * written["bytes_per_second"] for name, parts in found["limits"].items()}
        assert limits == pytest.approx({"adamw": 28 * found["parameters"], "ivon": 32 * found["parameters"]})
        assert found["limits"]["ivon"]["forward_backward"] is None  # no data sheet of a CPU
    assert written["paper"]["share"] == pytest.approx(2.8 / 319.1)
    assert "8bit: against the limits" in capsys.readouterr().out


def test_the_gpu_benchmark_starts_no_round_after_its_time_and_keeps_its_result_file(load, out, capsys):
    script = load("llama2_7b_shape")
    found = script.main([*TINY_SHAPE.split(), "--out", str(out), "--precisions", "bfloat16", "--budget-minutes", "0"])
    assert found["measured"]["bfloat16"]["rounds"] == 1
    for arguments, why in ((TINY_SHAPE, "pass --out"), ("--device cpu", "hours on a CPU")):
        with pytest.raises(SystemExit):
            script.main(arguments.split())
        assert why in capsys.readouterr().err


def test_the_gpu_benchmark_has_the_shape_of_llama2_7b(load):
    script = load("llama2_7b_shape")
    with torch.device("meta"):
        model = LlamaForCausalLM(script.shape(tiny=False))
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616


def test_operations_are_those_that_torch_counts(load, tmp_path):
    script = load("llama2_7b_shape")
    config = script.shape(tiny=True)
    script._save_random(config, tmp_path, torch.device("cpu"))
    model, _ = load_model(tmp_path, lora=script.ADAPTER, device="cpu")
    model.set_attn_implementation("eager")  # torch does not count the fused kernel's on a CPU
    batch = collate(script._rows(config, batch_size=2, length=24, seed=0)[:2], pad_token_id=0)
    with FlopCounterMode(display=False) as counter:
        class_logits(model.train(), batch).sum().backward()
    counted = script.count_operations(config, batch_size=2, length=24)
    assert counter.get_total_flops() == sum(counted.values()) + counted["attention"]  # torch's has the upper half too


def test_the_limit_of_forward_and_backward_is_at_the_peaks_of_the_data_sheet(load):
    script = load("llama2_7b_shape")
    seconds = {"sampling": (1.0,), "forward_backward": (1.0,), "step": (1.0,), "total": (3.0,)}
    overhead = Overhead({"ivon": Cost(seconds, 0, None)}, "a GPU", 4, 1.0, parameters=10)
    operations = {"base_forward": 600, "base_backward": 250, "adapter": 30, "attention": 20}
    limits = {
        quantized: script._limits(overhead, operations, {"bfloat16": 100.0, "int8": 200.0}, 40.0, quantized)["ivon"]
        for quantized in (False, True)
    }
    assert limits[False] == {"sampling": 3.0, "forward_backward": 9.0, "step": 8.0}
    assert limits[True]["forward_backward"] == 600 / 200 + 300 / 100


def test_the_rate_is_chosen_by_calibration_accuracy(load):
    choose = load("quality").choose
    best, worse, equal = ({"accuracy": a, "nll": n} for a, n in ((0.7, 0.9), (0.6, 0.6), (0.7, 0.8)))
    assert choose({0.1: worse, 0.3: best, 1.0: None}) == 0.3
    assert choose({0.1: best, 0.3: equal}) == 0.3
    assert choose({0.1: None}) is None


def test_sigma0_sets_the_initial_posterior(load):
    quality = load("quality")
    optimizer = quality.Variant("ivon", 0.03).at(0.5).optimizer({"w": torch.nn.Parameter(torch.zeros(2))}, 10, 4, 0)
    assert optimizer.posterior().std["w"].tolist() == pytest.approx([0.03, 0.03])
    assert optimizer.param_groups[0]["ess"] == 1e6


def test_the_quality_benchmark_stops_resumes_and_repeats_nothing(load, data, out, tmp_path, monkeypatch, capsys):
    quality = load("quality")
    arguments = [*QUALITY.split(), "--samples", "2", "--work", str(tmp_path / "work"), "--out", str(out)]

    quality.main([*arguments, "--budget-minutes", "0"])
    written = json.loads(out.read_text())
    assert written["complete"] is False
    assert written["rows"][0]["mean"] is None
    assert "adamw-lr0.0001-seed21" in written["missing"]
    assert "minutes to go" in capsys.readouterr().out

    quality.main(arguments)
    written = json.loads(out.read_text())
    check_origin(written)
    assert written["complete"] is True
    assert written["missing"] == []
    assert 0 <= written["zero_shot"]["accuracy"] <= 1
    adamw, ivon = written["rows"]
    assert adamw["draws"] is None
    assert ivon["seeds"] == [21, 42]
    assert ivon["draws"]["nll"]["standard_error"] > 0
    assert ivon["mean"]["accuracy"]["mean"] == pytest.approx(
        statistics.mean(one["accuracy"] for one in ivon["mean_by_seed"])
    )
    best = max(ivon["search"], key=lambda c: (c["calibration"]["accuracy"], -c["calibration"]["nll"]))
    assert ivon["lr"] == best["lr"]
    assert written["training_seconds"]["ivon"]["runs"] == 3
    predictions = importlib.import_module("varlora.predictions").load_predictions(
        tmp_path / "work" / f"ivon-sigma0.03-lr{ivon['lr']:g}-seed42" / "predictions.safetensors"
    )
    assert predictions.logits.shape == (2, 12, 2)

    def refuse(*_, **__):
        raise AssertionError("repeated")

    monkeypatch.setattr(quality, "fit", refuse)
    monkeypatch.setattr(quality, "predict", refuse)
    again = quality.main([*arguments, "--budget-minutes", "0"])
    assert again["rows"] == written["rows"]

    with pytest.raises(SystemExit, match=r"other conditions \(steps\)"):
        quality.main([*arguments, "--steps", "3"])


@pytest.mark.slow
def test_the_demo_benchmark_gives_error_bars_and_repeats_nothing(load, out, tmp_path, monkeypatch, capsys):
    demo = load("demo")
    arguments = ["--tasks", "four_choices", "--seeds", "0", "1", "--steps", "8"]
    arguments += ["--work", str(tmp_path / "work"), "--out", str(out)]
    demo.main(arguments)
    written = json.loads(out.read_text())
    check_origin(written)
    assert [row["method"] for row in written["rows"]] == [
        "zero-shot",
        "adamw",
        "adamw at 3e-4",
        "ivon@mean",
        "ivon x10",
    ]
    assert written["variants"]["adamw at 3e-4"]["method"]["lr"] == 3e-4
    for row in written["rows"][1:]:
        assert len(row["metrics"]["accuracy"]["values"]) == 2
        assert row["metrics"]["nll"]["stderr"] >= 0
        assert row["slices"].keys() == {"told", "never told"}
    assert out.with_name("demo-slices.png").stat().st_size > 1000
    assert "ivon x10" in capsys.readouterr().out

    def never(*args, **kwargs):
        raise AssertionError("a finished run was repeated")

    with monkeypatch.context() as patched:
        patched.setattr("varlora.training.fit", never)
        patched.setattr("varlora.evaluation.predict", never)
        demo.main(arguments)
    assert json.loads(out.read_text())["rows"] == written["rows"]
    monkeypatch.setattr(demo, "base_fingerprint", lambda model: "of another base")
    monkeypatch.setattr("varlora.training.fit", never)
    with pytest.raises(AssertionError, match="repeated"):
        demo.main(arguments)


def test_the_inference_benchmark_measures_speed_and_limits(load, out, bundled):
    inference = load("inference")
    inference.main([*["--draws", "1", "2", "--rows", "4", "--rounds", "2"], "--bases", str(bundled), "--out", str(out)])
    written = json.loads(out.read_text())
    check_origin(written)
    base = written["speed"]["base"]
    assert [(cell["draws"], cell["batch"]) for cell in base["cells"]] == [(1, 4), (2, 4)]
    for cell in base["cells"]:
        ways = cell["ways"]
        assert set(ways) == {"loop", "stack", "alike", "quarter", "mixed", "one pass"}
        assert ways["loop"]["operations"] == cell["draws"] * ways["one pass"]["operations"]
        fewer = ways["loop"]["operations"] - ways["stack"]["operations"]
        assert fewer > 0 if cell["draws"] > 1 else fewer == 0  # one draw is not stacked
        fewer = ways["stack"]["operations"] - ways["alike"]["operations"]
        assert fewer > 0 if cell["draws"] > 1 else fewer == 0
        assert ways["stack"]["differs_from_loop"] < 1e-4
        assert ways["mixed"]["differs_from_loop"] < 1e-4
        assert all(way["peak_bytes"] > 0 and way["limit_seconds"] > 0 for way in ways.values())
    page = inference.documented("before\n<!-- inference -->\nold\n<!-- end -->\nafter\n", written)
    assert "old" not in page
    assert "| loop / stack |" in page
    assert page.startswith("before")
    assert page.endswith("after\n")


SHAPE = "--llama2-7b --device cpu --rows 1 2 --rounds 1 --bases"


def test_the_inference_benchmark_begins_with_ten_draws_of_one_row_at_the_shape_of_llama2_7b(load, out, bundled, capsys):
    inference = load("inference")
    inference.main([*SHAPE.split(), str(bundled), "--tiny", "--out", str(out), "--budget-minutes", "0"])
    ((name, found),) = json.loads(out.read_text())["speed"].items()
    assert (name, found["layers"], found["hidden"]) == ("Llama-2-7B's shape", 2, 64)
    (cell,) = found["cells"]
    assert (cell["draws"], cell["batch"]) == (10, 1)
    assert {*inference.WAYS, "one pass"} == cell["ways"].keys()
    assert cell["ways"]["stack"]["operations"] < cell["ways"]["loop"]["operations"]
    assert "0 minutes are spent" in capsys.readouterr().out
    for arguments, why in ((["--tiny"], "pass --out"), (["--out", str(out)], "hours on a CPU")):
        with pytest.raises(SystemExit):
            inference.main([*SHAPE.split(), *arguments])
        assert why in capsys.readouterr().err


def test_the_inference_benchmark_keeps_what_it_had_measured_when_it_is_stopped(load, out, monkeypatch):
    inference, begun = load("inference"), []

    def stopped(ways, draws, rows, *_):
        begun.append((draws, rows))
        if len(begun) == 3:
            raise KeyboardInterrupt
        return {"draws": draws, "batch": rows}

    monkeypatch.setattr(inference, "cell_of", stopped)
    with pytest.raises(KeyboardInterrupt):
        inference.main([*SHAPE.split(), "--tiny", "--draws", "2", "1", "--out", str(out)])
    (found,) = json.loads(out.read_text())["speed"].values()
    assert [(cell["draws"], cell["batch"]) for cell in found["cells"]] == begun[:2] == [(2, 1), (2, 2)]


def test_the_benchmark_of_beginnings_runs_what_is_kept_no_second_time(load, out, bundled):
    beginnings = load("beginnings")
    beginnings.main([*["--rows", "1", "2", "--rounds", "2"], "--bases", str(bundled), "--out", str(out)])
    written = json.loads(out.read_text())
    check_origin(written)
    cells = written["speed"]["base"]
    assert [(cell["draws"], cell["batch"]) for cell in cells] == [(10, 1), (10, 2)]
    for cell in cells:
        ways = cell["ways"]
        assert ways["mean"]["operations"] < 0.2 * ways["one pass"]["operations"]  # 20 of 220 tokens
        assert ways["stack"]["operations"] < 0.2 * ways["loop"]["operations"]
        assert ways["stack"]["differs_from_loop"] < 1e-4
    assert "| one pass / mean |" in beginnings.documented("<!-- beginnings -->\n<!-- end -->", written)


@pytest.mark.slow
def test_the_benchmark_of_cheaper_draws_measures_what_they_cost(load, out, tmp_path):
    draws = load("draws")
    run = trained_run(tmp_path)
    draws.main([str(run), *["--few", "2", "4", "--repeats", "1", "--limit", "8"], "--out", str(out)])
    written = json.loads(out.read_text())
    check_origin(written)
    (found,) = written["runs"].values()
    assert found["rows"] == 8
    assert set(found["few"]["2"]) == {"independent", "antithetic", "latin"}
    assert 4 <= found["stop early"]["0.04"]["passes_a_row"] <= found["all draws"]["passes_a_row"] == draws.LONG
    assert found["calibrated"]["last quarter"]["tau"] in draws.TAUS
    assert "| 2 |" in draws.documented("<!-- draws -->\n<!-- end -->", written)


def trained_run(folder):
    """Train a run of a few steps on one of the demo's tasks."""
    from varlora.config import load_settings
    from varlora.demo.base import BUNDLED
    from varlora.training import train

    values = {"task": str(BUNDLED / "tasks" / "two_choices.yaml"), "model": str(BUNDLED / "base"), "steps": 4}
    values |= {"method": "ivon", "run_dir": str(folder / "run"), "calibration_fraction": 0.1}
    given = ["method.lr=0.3", "method.ess=1e6", "method.hess_init=1e-3"]
    (settings,) = load_settings(None, values, given)
    return train(settings, say=lambda text: None)


def test_the_benchmark_of_temperatures_finds_what_is_right(load, out, tmp_path, monkeypatch):
    """Logits that are too large by one factor on the held-out rows, and by another one on those reported."""
    temperatures = load("temperatures")
    monkeypatch.setattr(temperatures, "SLOPES", [-0.8, -0.4, 0.0, 0.4, 0.8, 1.2, 1.6])  # both that are right, 0 and 1
    generator = torch.Generator().manual_seed(0)
    right = 2 * torch.randn(4000, 4, generator=generator)
    labels = torch.multinomial(right.softmax(-1), 1, generator=generator).squeeze(1)
    for end, factor in ("", 3.0), ("-calibration", 2.0):
        found = Predictions(factor * right[None], factor * right, labels, tuple(map(str, range(4000))), meta=META)
        save_predictions(found, tmp_path / f"predictions{end}.safetensors")
    temperatures.main([str(tmp_path), "--out", str(out)])
    written = json.loads(out.read_text())
    check_origin(written)
    (run,) = written["runs"].values()
    held_out, reported, by_entropy, *_ = run["ways"].values()
    assert (held_out["temperature"], reported["temperature"]) == pytest.approx((2.0, 3.0), rel=0.05)
    assert reported["ece"] < 1.5 * reported["ece_if_calibrated"] < held_out["ece"]
    assert by_entropy["slope"] == pytest.approx(0, abs=0.41)  # of steps of 0.4
    bent = temperatures.tempered(right, 0.5, -1.0)
    temperature, slope = temperatures.chosen(bent, labels, prior=math.inf)
    probs = temperatures.tempered(bent, temperature, slope).double().softmax(-1)
    assert slope > 0.5
    assert temperatures.chosen(bent, labels, prior=0.01)[1] < slope  # which hardly lets it
    assert metrics.nll(probs, labels) == pytest.approx(metrics.nll(right.double().softmax(-1), labels), abs=0.01)
    assert "| held-out rows |" in temperatures.documented("<!-- temperatures -->\n<!-- end -->", written)


@pytest.mark.parametrize("name", ["inference", "beginnings", "draws", "temperatures"])
def test_a_document_is_made_from_the_results(load, name):
    script = load(name)
    found = json.loads((FOLDER / "results" / f"{name}.json").read_text(encoding="utf-8"))
    text = script.DOCUMENT.read_text(encoding="utf-8")
    assert script.documented(text, found) == text
