"""Exported draws: plain PEFT adapters that give the loop's probabilities, and a client that averages them."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from varlora import client
from varlora.arguments import command_line
from varlora.checkpoint import save_adapter
from varlora.config import settings_from
from varlora.data import collate
from varlora.drawing import Drawing
from varlora.draws import distinct
from varlora.errors import VarloraError
from varlora.evaluation import answer_rows
from varlora.export import _notes, _script, export
from varlora.files import file_digest, read_json, write_json
from varlora.loading import Loaded, encode_rows, load
from varlora.metrics import average_probs
from varlora.model import class_logits
from varlora.params import copied
from varlora.posterior import (
    POSTERIORS,
    DiagonalGaussian,
    Dropout,
    KroneckerGaussian,
    Linearised,
    LowRankGaussian,
    Mixture,
    Point,
    Posterior,
    Tempered,
)
from varlora.prompt import encode
from varlora.tasks import Example, get_task, load_rows
from varlora.training import train

ASSETS = Path(__file__).parent / "assets"
pytestmark = pytest.mark.usefixtures("one_thread")


def silent(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def trained(bundled: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Loaded:
    """A run whose adapter tests replace by others."""
    folder = tmp_path_factory.mktemp("export") / "run"
    settings = {"task": "boolq", "model": str(bundled), "data_dir": str(ASSETS), "calibration_fraction": 0.0}
    method = {"name": "adamw", "lr": 0.01}
    train(settings_from({**settings, "steps": 3, "method": method, "run_dir": str(folder)}), say=silent)
    return load(folder)


def run_with(trained: Loaded, posterior: Posterior, folder: Path) -> Path:
    """Return a run directory that ended with a posterior."""
    shutil.copytree(trained.settings.folder, folder)
    save_adapter(trained.model, posterior, folder / "adapter")
    return folder


def mean_of(trained: Loaded) -> dict[str, Tensor]:
    return copied(trained.model)


def other(trained: Loaded, seed: int) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {n: v + 0.05 * torch.randn(v.shape, generator=source) for n, v in mean_of(trained).items()}


def gaussian(trained: Loaded, seed: int = 0) -> DiagonalGaussian:
    mean = other(trained, seed)
    return DiagonalGaussian(mean, {name: torch.full_like(value, 0.05) for name, value in mean.items()})


def low_rank(trained: Loaded) -> LowRankGaussian:
    source = torch.Generator().manual_seed(5)
    of = gaussian(trained)
    spread = {n: 0.05 * torch.randn(3, *v.shape, generator=source) for n, v in of.mean.items()}
    return LowRankGaussian(of.mean, of.std, spread)


def kronecker(trained: Loaded) -> KroneckerGaussian:
    mean = other(trained, 0)
    sides = [{n: torch.eye(v.shape[side])[:, :2] for n, v in mean.items()} for side in (0, 1)]
    return KroneckerGaussian(mean, *sides, {n: torch.full((2, 2), 0.04) for n in mean}, torch.tensor(0.002))


def dropout(trained: Loaded) -> Dropout:
    mean = other(trained, 0)
    return Dropout(mean, {name: torch.tensor(0.5) for name in mean if ".lora_A." in name})


ALL: dict[str, Callable[[Loaded], Any]] = {
    "point": lambda trained: Point(mean_of(trained)),
    "diagonal_gaussian": gaussian,
    "low_rank_gaussian": low_rank,
    "kronecker_gaussian": kronecker,
    "dropout": dropout,
    "linearised": lambda trained: Linearised(kronecker(trained)),
    "mixture": lambda trained: Mixture(
        [Point(other(trained, 1)), gaussian(trained, 2), Mixture([gaussian(trained, 3), Point(other(trained, 4))])]
    ),
    "pruned": lambda trained: low_rank(trained).prune(0.4),
    "tempered": lambda trained: Tempered(Mixture([gaussian(trained), Tempered(low_rank(trained), 0.7, 0.8)]), 1.5, 1.2),
}
"""One of each kind, so that a new kind needs a row here."""


def rows_of(trained: Loaded) -> tuple[list[Any], list[Any]]:
    examples = load_rows(get_task("boolq"), "dev", ASSETS).examples
    return examples, encode_rows(trained.model, trained.tokenizer, examples, trained.settings, silent).rows


def in_plain_peft(bundled: Path, adapter: Path, trained: Loaded) -> Tensor:
    """Return the class logits of an adapter, loaded by PEFT alone."""
    _, encoded = rows_of(trained)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bundled), adapter).eval()
    with torch.no_grad():
        return class_logits(model, collate(encoded, trained.tokenizer.pad_token_id))


def served(bundled: Path, folder: Path, manifest: dict[str, Any], trained: Loaded) -> Tensor:
    """Average the probabilities of an export's adapters as the manifest says."""
    probs, weights = [], []
    for draw in manifest["draws"]:
        logits = in_plain_peft(bundled, folder / draw["name"], trained)
        probs.append((logits.double() / draw["temperature"]).softmax(-1))
        weights.append(draw["weight"])
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return (torch.stack(probs) * shares[:, None, None]).sum(0)


def test_every_kind_has_a_row() -> None:
    assert set(ALL) == set(POSTERIORS)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("samples", [5, 0])
def test_adapters_in_plain_peft_give_the_probabilities_of_the_draws(
    bundled: Path, trained: Loaded, tmp_path: Path, kind: str, samples: int
) -> None:
    posterior = ALL[kind](trained)
    run_dir, said = run_with(trained, posterior, tmp_path / "run"), []
    manifest = export(run_dir, tmp_path / "out", samples=samples, seed=3, say=said.append)
    assert manifest["posterior"] == kind
    examples, encoded = rows_of(trained)
    batch = collate(encoded, trained.tokenizer.pad_token_id)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        if kind == "linearised" and samples:  # what is served is not linearised
            assert any("no adapter can serve" in words for words in said)
            posterior = posterior.weights
            expected = average_probs(
                posterior.drawn(samples, generator, Drawing(stacked=False)).logits(trained.model, batch, class_logits)
            )
        else:
            predicted = list(answer_rows(load(run_dir), examples, samples=samples, seed=3, say=silent))
            expected = torch.tensor([list(row["probabilities"].values()) for row in predicted], dtype=torch.float64)
    found = served(bundled, tmp_path / "out", manifest, trained)
    if kind == "tempered" and not samples:  # the temperature of an average cannot be served
        assert any("divides their average's" in words for words in said)
        torch.testing.assert_close(found, expected, rtol=0, atol=0.01)
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ALL)
def test_each_adapter_in_plain_peft_is_the_mean_or_a_draw_by_itself(
    bundled: Path, trained: Loaded, tmp_path: Path, kind: str
) -> None:
    """An average would hide draws that are exchanged, or a `mean/` that is none."""
    posterior, out = ALL[kind](trained), tmp_path / "out"
    manifest = export(run_with(trained, posterior, tmp_path / "run"), out, samples=3, seed=3, say=silent)
    batch = collate(rows_of(trained)[1], trained.tokenizer.pad_token_id)
    of_weights = posterior.weights if kind == "linearised" else posterior
    loop = of_weights.drawn(3, torch.Generator().manual_seed(3), Drawing(stacked=False))
    with torch.no_grad():
        draws = loop.logits(trained.model, batch, class_logits)
        with posterior.at_mean(trained.model):
            mean = class_logits(trained.model, batch)
    torch.testing.assert_close(in_plain_peft(bundled, out / "mean", trained), mean, rtol=0, atol=1e-4)
    once = [one for i, one in enumerate(draws) if not any(torch.equal(one, other) for other in draws[:i])]
    assert [draw["weight"] for draw in manifest["draws"]] == [sum(torch.equal(a, b) for b in draws) for a in once]
    for draw, logits in zip(manifest["draws"], once):
        found = in_plain_peft(bundled, out / draw["name"], trained) / draw["temperature"]
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ALL)
def test_draws_are_those_of_the_posterior_bit_for_bit(trained: Loaded, kind: str) -> None:
    posterior = ALL[kind](trained)
    seen: list[Tensor] = []

    def looked(model: Any, batch: Any) -> Tensor:
        seen.append(torch.cat([value.flatten() for value in copied(model).values()]))
        return torch.zeros(1, 2)

    of_weights = posterior.weights if kind == "linearised" else posterior
    of_weights.draw_logits(trained.model, None, 5, torch.Generator().manual_seed(1), looked)
    draws = [draw.weights for draw in posterior.drawn(5, torch.Generator().manual_seed(1)).models()]
    found = [torch.cat([draw[name].flatten() for name in copied(trained.model)]) for draw in draws]
    if kind in ("mixture", "tempered"):  # which run member after member, and then take their logits in turn
        assert {tuple(one.tolist()) for one in found} <= {tuple(one.tolist()) for one in seen}
    else:
        assert all(map(torch.equal, found, seen))
        assert len(found) == len(seen)


def test_what_is_drawn_again_is_exported_once(trained: Loaded) -> None:
    members = [Point(other(trained, seed)) for seed in range(3)]
    found = distinct(Mixture(members).drawn(10, torch.Generator().manual_seed(0)).models())
    assert [draw.weight for draw in found] == [4, 4, 4]
    assert len(distinct(gaussian(trained).scale(0).drawn(4, torch.Generator()).models())) == 1


def test_a_point_is_its_mean_alone_and_that_is_said(trained: Loaded, tmp_path: Path) -> None:
    said: list[str] = []
    run_dir = run_with(trained, Point(mean_of(trained)), tmp_path / "run")
    manifest = export(run_dir, tmp_path / "out", say=said.append)
    assert [draw["name"] for draw in manifest["draws"]] == ["mean"]
    assert any("nothing to average" in words for words in said)
    assert not list((tmp_path / "out").glob("draw-*"))


def test_a_calibrated_run_is_exported_as_it_is_to_be_used(bundled: Path, trained: Loaded, tmp_path: Path) -> None:
    run_dir = run_with(trained, gaussian(trained), tmp_path / "run")
    chosen: dict[str, Any] = {"tau": 0.5, "pruned": 0.25, "temperature": 1.7, "temperature_mean": 1.9, "samples": 4}
    chosen |= {"last_layers": 1, "noise": "latin"}
    digest = file_digest(run_dir / "adapter" / "manifest.json")
    write_json(run_dir / "adapter" / "calibration.json", {**chosen, "adapter": digest})
    examples, _ = rows_of(trained)
    for options, samples in (({}, 4), ({"samples": 3}, 3)):
        manifest = export(run_dir, tmp_path / "out", overwrite=True, say=silent, **options)
        assert (manifest["calibration"], manifest["tau"], manifest["samples"]) == (chosen, 0.5, samples)
        assert {draw["temperature"] for draw in manifest["draws"]} == {1.7}
        predicted = list(answer_rows(load(run_dir), examples, **options, say=silent))
        expected = torch.tensor([list(row["probabilities"].values()) for row in predicted], dtype=torch.float64)
        found = served(bundled, tmp_path / "out", manifest, trained)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    plain = export(run_dir, tmp_path / "out", calibration=False, overwrite=True, say=silent)
    assert (plain["calibration"], plain["tau"], plain["samples"], plain["draws"][0]["temperature"]) == (None, 1, 10, 1)
    scaled = export(run_dir, tmp_path / "out", tau=2.0, samples=2, overwrite=True, say=silent)
    assert (scaled["calibration"], scaled["tau"]) == (None, 2)
    predicted = list(answer_rows(load(run_dir), examples, samples=2, tau=2.0, say=silent))
    expected = torch.tensor([list(row["probabilities"].values()) for row in predicted], dtype=torch.float64)
    torch.testing.assert_close(served(bundled, tmp_path / "out", scaled, trained), expected, rtol=0, atol=1e-5)


def test_another_base_has_not_the_revision_of_the_first(bundled: Path, trained: Loaded, tmp_path: Path) -> None:
    run_dir = run_with(trained, Point(mean_of(trained)), tmp_path / "run")
    config = read_json(run_dir / "config.json")
    write_json(run_dir / "config.json", {**config, "settings": {**config["settings"], "revision": "v1"}})
    moved = shutil.copytree(bundled, tmp_path / "moved")
    for model, revision in ((None, "v1"), (str(moved), None)):
        manifest = export(run_dir, tmp_path / "out", model=model, overwrite=True, say=silent)
        assert manifest["base"]["revision"] == revision


# --- the folder ---


@pytest.fixture(scope="module")
def exported(trained: Loaded, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with a Gaussian, and an export of it."""
    folder = tmp_path_factory.mktemp("exported")
    run_dir = run_with(trained, gaussian(trained), folder / "run")
    export(run_dir, folder / "out", samples=3, say=silent)
    return run_dir, folder / "out"


def test_the_folder_holds_what_its_manifest_says(exported: tuple[Path, Path]) -> None:
    _, out = exported
    manifest = json.loads((out / "manifest.json").read_text())
    assert {"versions", "commit", "time", "seed", "tau", "task", "posterior", "base_checksum"} <= manifest.keys()
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} - {"manifest.json"}
    assert manifest["files"] == {name: file_digest(out / name) for name in files}
    for name in ("mean", "draw-00", "draw-01", "draw-02"):
        assert {path.name for path in (out / name).iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_link_that_is_named_is_followed(exported: tuple[Path, Path], tmp_path: Path) -> None:
    run_dir, _ = exported
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for samples in (1, 2, 3):
        export(run_dir, tmp_path / "link", samples=samples, overwrite=True, say=silent)
        assert (tmp_path / "link").is_symlink()
        assert read_json(tmp_path / "real" / "manifest.json")["samples"] == samples
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_nothing_but_an_export_is_replaced_and_that_only_if_asked(
    exported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, out = exported
    before = (out / "manifest.json").read_text()
    with pytest.raises(VarloraError, match="--overwrite"):
        export(run_dir, out, say=silent)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(VarloraError, match="not an export"):
        export(run_dir, tmp_path / "mine", overwrite=True, say=silent)
    with pytest.raises(VarloraError, match="is a file"):
        export(run_dir, tmp_path / "mine" / "thesis.txt", overwrite=True, say=silent)
    with pytest.raises(VarloraError, match=r"thesis.txt, where it would lie, is a file"):
        export(run_dir, tmp_path / "mine" / "thesis.txt" / "new" / "one", say=silent)
    with pytest.raises(VarloraError, match="number of draws"):
        export(run_dir, tmp_path / "new", samples=-1, say=silent)

    def stopped(*arguments: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("varlora.export._script", stopped)
    with pytest.raises(KeyboardInterrupt):
        export(run_dir, out, samples=2, overwrite=True, say=silent)
    with pytest.raises(KeyboardInterrupt):
        export(run_dir, tmp_path / "new", samples=2, say=silent)
    assert (out / "manifest.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]
    assert (tmp_path / "mine" / "thesis.txt").is_file()


def test_the_folder_may_be_the_one_that_one_is_in(
    exported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    export(exported[0], ".", samples=0, say=silent)
    assert (tmp_path / "manifest.json").is_file()


def test_what_cannot_be_written_is_said_with_what_to_do(
    exported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> str:
        raise OSError("No space left on device")

    monkeypatch.setattr("varlora.export._script", full)
    with pytest.raises(VarloraError, match=r"could not be written: No space left.*, and export again"):
        export(exported[0], tmp_path / "out", samples=0, say=silent)
    assert not any(tmp_path.iterdir())


def test_without_rows_the_answers_have_to_be_given(exported: tuple[Path, Path], tmp_path: Path) -> None:
    run_dir = shutil.copytree(exported[0], tmp_path / "run")
    config = json.loads((run_dir / "config.json").read_text())
    config["settings"]["data_dir"] = str(tmp_path / "gone")
    write_json(run_dir / "config.json", config)
    with pytest.raises(VarloraError, match="--answers"):
        export(run_dir, tmp_path / "out", samples=1, say=silent)
    manifest = export(run_dir, tmp_path / "out", samples=1, answers=["True", "False"], say=silent)
    assert [token["answer"] for token in manifest["answers"][0]] == ["True", "False"]


def test_the_answers_tokens_are_those_of_training_whatever_ends_the_prompt(
    exported: tuple[Path, Path], trained: Loaded, tmp_path: Path
) -> None:
    """Also where no prompt was there to look at."""
    given = export(exported[0], tmp_path / "out", samples=0, answers=["False", "True"], say=silent)
    found = set()
    for manifest in (json.loads((exported[1] / "manifest.json").read_text()), given):
        for prompt in ("Is it? Answer:", "Is it? Answer: ", "Is it?\nAnswer:\n"):
            tokens = encode(trained.tokenizer, Example("0", prompt, "", "", ("False", "True"), None)).label_tokens
            found.add(tokens)
            chosen = client._tokens(manifest, prompt, None)
            assert [token["id"] for token in chosen] == list(tokens)
            assert chosen == client._tokens(manifest, prompt, ["False", "True"])
    assert len(found) == 2


def test_a_base_that_lies_here_is_found_from_anywhere(
    exported: tuple[Path, Path], bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundled.parent)
    manifest = export(exported[0], tmp_path / "out", samples=0, model=f"./{bundled.name}", say=silent)
    assert manifest["base"]["model"] == str(bundled.resolve())
    for script in ("serve_vllm.sh", "serve_sglang.sh"):
        assert f"\nbase={bundled.resolve()}\n" in (tmp_path / "out" / script).read_text()


def _adapters(name: str, items: Sequence[str]) -> list[tuple[str, str]]:
    """Return name and path of each adapter, as vLLM's `LoRAParserAction` and SGLang's `LoRAPathAction` read them."""
    found = []
    for item in items:
        if name == "serve_vllm.sh" and "=" in item and "," not in item:
            adapter, path = item.split("=")
        elif name == "serve_vllm.sh":
            adapter, path = map(json.loads(item).pop, ("name", "path"))
        else:
            assert not item.startswith("{")
            adapter, path = item.strip().split("=", 1)
        found.append((adapter, path))
    return found


@pytest.mark.parametrize("name", ["serve_vllm.sh", "serve_sglang.sh"])
def test_scripts_say_what_is_meant_whatever_the_base_is_called(
    exported: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    """Run with a program in the server's place that shows what it is given."""
    _, out = exported
    settings = settings_from({"task": "boolq", "model": "m", "dtype": "bfloat16", "lora": {"rank": 48}})
    base = "a folder'; touch $(echo hacked) `id`\n\"x"
    program = tmp_path / {"serve_vllm.sh": "vllm", "serve_sglang.sh": "python3"}[name]
    program.write_text('#!/bin/sh\nfor a in "$@"; do printf "%s\\0" "$a"; done\n')
    program.chmod(0o755)
    folder = tmp_path / 'lr=0.1,seed=0 \\ "served'
    folder.mkdir()
    script = folder / name
    script.write_text(_script(name, ["mean", "draw-00"], {"model": base, "revision": None}, settings))
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", script, "--port", "8001"], capture_output=True, text=True, env=environment, cwd=tmp_path, check=True
    )
    given = done.stdout.rstrip("\0").split("\0")
    here = [(adapter, f"{folder}/{adapter}") for adapter in ("mean", "draw-00")]
    assert _adapters(name, given[-2:]) == here
    del given[-2:]
    common = ["--dtype", "bfloat16", "--enable-lora", "--max-lora-rank"]
    if name == "serve_vllm.sh":
        many = ["64", "--max-loras", "2", "--max-cpu-loras", "2", "--port", "8001", "--lora-modules"]
        assert given == ["serve", base, *common, *many]
    else:
        many = ["48", "--max-loras-per-batch", "2", "--port", "8001", "--lora-paths"]
        assert given == ["-m", "sglang.launch_server", "--model-path", base, *common, *many]
    assert not (tmp_path / "hacked").exists()
    assert subprocess.run(["bash", "-n", out / name]).returncode == 0


def test_the_commands_of_the_page_can_be_parsed() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "export.md").read_text(encoding="utf-8")
    lines = [line.split()[1:] for line in text.splitlines() if line.startswith("varlora ")]
    assert {line[0] for line in lines} == {"export", "evaluate", "push"}
    for line in lines:
        command_line().parse_args(line)


# --- the client ---


class Fake:
    """A server of several adapters by plain PEFT, which answers as vLLM, as an older version of it, or as SGLang."""

    def __init__(self, bundled: Path, out: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(bundled)
        base = AutoModelForCausalLM.from_pretrained(bundled)
        self.model = PeftModel.from_pretrained(base, out / "mean", adapter_name="mean").eval()
        for folder in sorted(out.glob("draw-*")):
            self.model.load_adapter(folder, adapter_name=folder.name)
        self.lock, self.requests = threading.Lock(), []
        self.knows_ids = True
        self.by_number = True

    def logprobs(self, adapter: str, prompt: str) -> Tensor:
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        with self.lock, torch.no_grad():  # one adapter at a time is active
            self.model.set_adapter(adapter)
            return self.model(input_ids=ids).logits[0, -1].double().log_softmax(-1)

    def reply(self, path: str, body: dict[str, Any]) -> Any:
        self.requests.append((path, body))
        if path == "/generate":
            values = self.logprobs(body["lora_path"], body["text"])
            chosen = [[values[id].item(), id, None] for id in body["token_ids_logprob"]]
            return {"text": "", "meta_info": {"output_token_ids_logprobs": [chosen]}}
        prompt = body["prompt"] if path == "/v1/completions" else body["messages"][0]["content"]
        values = self.logprobs(body["model"], prompt)
        ids = (
            body["logprob_token_ids"]
            if self.knows_ids
            else values.topk(body.get("top_logprobs") or body["logprobs"])[1].tolist()
        )
        names = [f"token_id:{id}" if self.by_number else self.tokenizer.decode([id]) for id in ids]
        top = {name: values[id].item() for name, id in zip(names, ids)}
        if path == "/v1/completions":
            return {"choices": [{"text": "", "logprobs": {"top_logprobs": [top]}}]}
        each = [{"token": name, "logprob": value} for name, value in top.items()]
        return {"choices": [{"logprobs": {"content": [{**each[0], "top_logprobs": each}]}}]}


@pytest.fixture(scope="module")
def fake(bundled: Path, exported: tuple[Path, Path]) -> Fake:
    return Fake(bundled, exported[1])


@contextmanager
def serving(fake: Any) -> Iterator[str]:
    """Serve on a free port, and give its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                status, reply = 200, fake.reply(self.path, body)
            except ValueError as error:  # PEFT knows no such adapter
                status, reply = 404, {"message": f"no {error}"}
            content = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    with listening(Handler) as url:
        yield url


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Listen on a free port, and give its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def run_client(out: Path, *arguments: Any, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the export's client as a user does, where neither varlora nor torch can be imported."""
    command = [sys.executable, "-I", "-S", str(out / "client.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=60)


@pytest.mark.parametrize("api", ["openai", "sglang"])
def test_the_client_gives_what_predict_gives(
    exported: tuple[Path, Path], trained: Loaded, fake: Fake, api: str
) -> None:
    run_dir, out = exported
    examples, _ = rows_of(trained)
    expected = list(answer_rows(load(run_dir), examples, samples=3, say=silent))
    questions = "".join(
        json.dumps({"id": one.id, "prompt": one.prompt, "answers": one.answers}) + "\n" for one in examples
    )
    with serving(fake) as url:
        done = run_client(
            out, "--input", "-", "--api", api, "--url", url + ("/v1" if api == "openai" else ""), stdin=questions
        )
    assert (done.returncode, done.stderr) == (0, "")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(one["id"], one["answer"]) for one in found] == [(one["id"], one["answer"]) for one in expected]
    for one, wanted in zip(found, expected):
        assert one["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-5)
        assert one["uncertainty"] == pytest.approx(wanted["uncertainty"], abs=1e-5)
    example = json.loads((out / "example.jsonl").read_text().splitlines()[0])
    assert (example["prompt"], example["answers"]) == (examples[0].prompt, list(examples[0].answers))


def test_by_text_and_by_chat_too_and_with_temperatures(
    exported: tuple[Path, Path], trained: Loaded, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.loads((exported[1] / "manifest.json").read_text())
    for draw, temperature, weight in zip(manifest["draws"], (1.0, 2.0, 0.5), (1, 2, 3)):
        draw |= {"temperature": temperature, "weight": weight}
    examples, _ = rows_of(trained)
    prompt, ids = examples[0].prompt, [token["id"] for token in manifest["answers"][0]]
    draws = [fake.logprobs(draw["name"], prompt)[ids] / draw["temperature"] for draw in manifest["draws"]]
    shares = torch.tensor([1, 2, 3], dtype=torch.float64) / 6
    expected = (torch.stack(draws).softmax(-1) * shares[:, None]).sum(0).tolist()
    everything = len(fake.tokenizer)
    for knows_ids, by_number, chat in ((True, True, True), (False, True, False), (False, False, False)):
        monkeypatch.setattr(fake, "knows_ids", knows_ids)
        monkeypatch.setattr(fake, "by_number", by_number)
        with serving(fake) as url:
            server = client.Server(f"{url}/v1", logprobs=everything)
            found = client.ask({**manifest, "chat": chat}, server, prompt)
        assert list(found["probabilities"].values()) == pytest.approx(expected, abs=1e-9)
        path, body = fake.requests[-1]
        assert path == ("/v1/chat/completions" if chat else "/v1/completions")
        assert (body["temperature"], body["top_p"], body["repetition_penalty"], body["max_tokens"]) == (1, 1, 1, 1)


def test_two_hundred_answers_are_exported_and_asked_for(
    exported: tuple[Path, Path], fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, out, everything = exported[0], tmp_path / "out", len(fake.tokenizer)
    vocabulary = fake.tokenizer.batch_decode([[id] for id in range(everything)])
    answers = [text for text in vocabulary if text.isalpha()][:200]
    assert len(answers) == 200
    export(run_dir, out, samples=3, answers=answers, say=silent)
    prompt = "Which one is it? "
    (expected,) = answer_rows(
        load(run_dir), [Example("0", prompt, "", "", tuple(answers), None)], samples=3, say=silent
    )
    with serving(fake) as url:
        done = run_client(out, "--prompt", prompt, "--answers", *answers, "--url", f"{url}/v1")
        assert json.loads(done.stdout)["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)
        monkeypatch.setattr(fake, "knows_ids", False)  # and so the likeliest tokens are asked for
        done = run_client(out, "--prompt", prompt, "--url", f"{url}/v1")
        assert "Raise --logprobs (it is 20)" in json.loads(done.stdout)["error"]
        done = run_client(out, "--prompt", prompt, "--url", f"{url}/v1", "--logprobs", everything)
        assert json.loads(done.stdout)["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)


def test_what_the_client_cannot_do_it_says(
    exported: tuple[Path, Path], fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out = exported
    manifest = json.loads((out / "manifest.json").read_text())
    monkeypatch.setattr(fake, "knows_ids", False)
    with serving(fake) as url:
        done = run_client(out, "--prompt", "Is it?", "--url", f"{url}/v1", "--logprobs", 1)
        assert done.returncode == 1
        for cure in ("--logprobs", "--max-logprobs", "logprob_token_ids", "processed_logprobs", "--api sglang"):
            assert cure in done.stderr
        monkeypatch.setattr(fake, "by_number", False)
        tokens = [[{**token, "shared": True} for token in manifest["answers"][0]]]
        with pytest.raises(client.Failure, match="several of them"):
            client.ask({**manifest, "answers": tokens}, client.Server(f"{url}/v1"), "Is it?")
        with pytest.raises(client.Failure, match="answered 404"):
            client.Server(url + "/v1", prefix="base:").logprobs_of("mean", "?", manifest["answers"][0], False)
    done = run_client(out, "--prompt", "Is it?", "--url", "http://127.0.0.1:9/v1")
    assert done.returncode == 1
    assert "Is the server running?" in done.stderr
    done = run_client(out, "--prompt", "Is it?", "--answers", "Perhaps", "--url", url)
    assert "Known: False, True" in done.stderr
    done = run_client(out, "--input", "-", stdin="no json")
    assert "line 1: Expected" in done.stderr
    for refused in ("file:///etc/passwd", "localhost:8000"):
        with pytest.raises(client.Failure, match="http://"):
            client.Server(refused)
    with pytest.raises(client.Failure, match="chat template"):
        client.Server("http://x", "sglang").logprobs_of("mean", "?", [{"id": 1}], True)


@pytest.mark.parametrize(("how", "code", "text"), [("reader", 1, ""), ("signal", 130, "Interrupted.\n")])
def test_the_client_ends_quietly(exported: tuple[Path, Path], fake: Fake, how: str, code: int, text: str) -> None:
    """When its reader leaves, and on Ctrl-C, though the server does not answer."""
    # Ctrl-C is ignored below a shell's `&`, and by what is started there
    heard = "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); del sys.argv[0]; "
    heard += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-I", "-S", "-c", heard, str(exported[1] / "client.py"), "--input", "-"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with socket.create_server(("127.0.0.1", 0)) as silent_server, serving(fake) as url:
        if how == "signal":
            url = f"http://127.0.0.1:{silent_server.getsockname()[1]}"
        with subprocess.Popen([*command, "--url", f"{url}/v1"], text=True, **pipes) as process:
            if how == "reader":
                process.stdout.close()
                process.stdin.write('{"prompt": "Is it?"}\n' * 3)
                process.stdin.close()
            else:
                process.stdin.write('{"prompt": "Is it?"}\n')
                process.stdin.close()
                connection, _ = silent_server.accept()
                connection.recv(1)  # a draw is asked for, and it is about to wait for the reply
                process.send_signal(signal.SIGINT)
            try:
                assert (process.wait(30), process.stderr.read()) == (code, text)
            finally:
                process.kill()


class Saying:
    """A server that replies by a function of the prompt, and keeps what it was sent."""

    def __init__(self, values: Callable[[str], Sequence[Any]]) -> None:
        self.values, self.seen = values, []

    def reply(self, path: str, body: dict[str, Any]) -> Any:
        self.seen.append((path, body))
        top = {f"token_id:{id}": value for id, value in zip(body["logprob_token_ids"], self.values(body["prompt"]))}
        return {"choices": [{"logprobs": {"top_logprobs": [top]}}]}


@pytest.mark.parametrize(
    "values",
    [(math.nan, math.nan), (-math.inf, -math.inf), (-1.0, math.nan), (None, -1.0), (-9999.0, -9999.0)],
)
def test_probabilities_that_are_none_are_an_error(exported: tuple[Path, Path], values: tuple[Any, Any]) -> None:
    """As a server sends them whose logits overflow in 16 bit."""
    with serving(Saying(lambda prompt: values)) as url:
        done = run_client(exported[1], "--prompt", "Is it?", "--url", f"{url}/v1")
    assert done.returncode == 1
    assert "overflow" in json.loads(done.stdout)["error"]
    assert "Traceback" not in done.stderr


def test_one_answer_at_the_least_that_vllm_sends_has_probability_0(exported: tuple[Path, Path]) -> None:
    manifest = json.loads((exported[1] / "manifest.json").read_text())
    for draw in manifest["draws"]:
        draw["temperature"] = 1e4  # the number itself would be a probability then
    with serving(Saying(lambda prompt: (-9999.0, -5.0))) as url:
        found = client.ask(manifest, client.Server(f"{url}/v1"), "Is it?")
    assert found["probabilities"] == {"False": 0.0, "True": 1.0}
    assert found["uncertainty"] == {"total": 0.0, "aleatoric": 0.0, "epistemic": 0.0}


def test_a_question_that_fails_does_not_end_the_others(exported: tuple[Path, Path], tmp_path: Path) -> None:
    rows: list[Any] = [
        {"id": "a", "prompt": "bad"},
        {"prompt": "Is it?", "answers": 3},
        {"id": "c", "prompt": 5},
        "no object",
        {"id": "e", "prompt": "Is it?", "answers": "True"},
        {"id": "f", "prompt": "Is it?", "answers": ["Perhaps"]},
        {"id": "g", "prompt": "Is it\u2028so?"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    server = Saying(lambda prompt: (math.nan,) * 2 if prompt == "bad" else (-1.0, -1.0))
    with serving(server) as url:
        done = run_client(exported[1], "--input", tmp_path / "rows.jsonl", "--url", f"{url}/v1")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["id"] for row in found] == ["a", "1", "c", "3", "e", "f", "g"]
    for row, why in zip(found, ("overflow", "answers", "all of it text", "prompt", "all of it text", "Known: ")):
        assert why in row["error"]
    assert found[-1]["probabilities"] == {"False": 0.5, "True": 0.5}
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_a_key_goes_where_it_is_meant_to_and_nowhere_else(
    exported: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-for-this-server")
    monkeypatch.setenv("MY_KEY", "sk-mine\n")
    seen: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            seen.append((self.path, self.headers["Authorization"]))
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_address[1]}/elsewhere")
            self.end_headers()

        def do_GET(self) -> None:
            seen.append((self.path, self.headers["Authorization"]))
            self.send_error(404)

        def log_message(self, *arguments: Any) -> None:
            pass

    with listening(Handler) as url:
        done = run_client(exported[1], "--prompt", "Is it?", "--url", url)
        assert "/elsewhere" in json.loads(done.stdout)["error"]
        assert {key for _, key in seen} == {None}
        run_client(exported[1], "--prompt", "Is it?", "--url", url, "--api-key-env", "MY_KEY")
        assert {key for _, key in seen} == {None, "Bearer sk-mine"}
        assert {path for path, _ in seen} == {"/completions"}
        monkeypatch.setenv("MY_KEY", "sk-\u2026")
        for name in ("MY_KEY", "NO_SUCH_KEY"):
            done = run_client(exported[1], "--prompt", "Is it?", "--url", url, "--api-key-env", name)
            assert done.returncode == 1
            assert f"by the name {name}" in done.stderr
            assert "sk-" not in done.stderr


class FakeTokenizer:
    """One that may end each text with EOS, or have a chat template."""

    bos_token_id, eos_token_id, name_or_path = 1, 2, "fake"

    def __init__(self, ends: bool = False, chat_template: str = "{{ messages }}") -> None:
        self.ends, self.chat_template = ends, chat_template

    def get_chat_template(self) -> str:
        return self.chat_template

    def __call__(self, texts: Any, **settings: Any) -> dict[str, Any]:
        ids = [1, 7, *([2] if self.ends else [])]
        return {"input_ids": ids if isinstance(texts, str) else [ids for _ in texts]}


@pytest.mark.parametrize(
    ("tokenizer", "chat", "said"),
    [
        (FakeTokenizer(), False, []),
        (FakeTokenizer(ends=True), False, ["Send token ids"]),
        (FakeTokenizer(), True, []),
        (FakeTokenizer(chat_template="{{ strftime_now('%Y') }}"), True, ["writes the date"]),
    ],
)
def test_a_prompt_that_a_server_would_read_otherwise_is_said(tokenizer: Any, chat: bool, said: list[str]) -> None:
    settings = settings_from({"task": "boolq", "model": "base", "chat": chat})
    notes = _notes(Point({}), 0, [], settings, tokenizer)
    assert len(notes) == len(said)
    assert all(words in note for words, note in zip(said, notes))


def test_more_than_a_hundred_draws_are_in_order_by_name(
    exported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PeftModel, "save_pretrained", lambda self, folder: folder.mkdir())
    manifest = export(exported[0], tmp_path / "out", samples=101, say=silent)
    names = [draw["name"] for draw in manifest["draws"]]
    assert names == sorted(path.name for path in (tmp_path / "out").glob("draw-*"))
    assert (len(names), names[0], names[-1]) == (101, "draw-000", "draw-100")


def test_uncertainty_is_by_the_shares_of_the_draws() -> None:
    """Of an even draw with 3/4 and a sure one with 1/4: the entropy within draws is 3/4 log 2."""
    average, parts = client.combine([[0.0, 0.0], [0.0, -math.inf]], [1.0, 1.0], [3, 1])
    assert average == pytest.approx([0.625, 0.375])
    total = -0.625 * math.log(0.625) - 0.375 * math.log(0.375)
    aleatoric = 0.75 * math.log(2)
    assert parts == pytest.approx({"total": total, "aleatoric": aleatoric, "epistemic": total - aleatoric})


@pytest.mark.parametrize(("rank", "most"), [(4, 8), (8, 8), (9, 16), (512, 512)])
def test_the_least_rank_that_vllm_takes_and_that_is_enough_is_asked_for(rank: int, most: int) -> None:
    settings = settings_from({"task": "boolq", "model": "m", "lora": {"rank": rank}})
    script = _script("serve_vllm.sh", ["mean"], {"model": "m", "revision": None}, settings)
    assert f"--max-lora-rank {most} " in script.replace("\n", " ")
