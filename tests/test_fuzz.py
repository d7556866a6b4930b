"""Damaged files, thousands of them: a clear error that names the file, and nothing half loaded; never another error.

Damage of two kinds: a disk's, which checksums find, and a stranger's, who wrote checksums that fit.
"""

from __future__ import annotations

import copy
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace as replaced
from functools import partial
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

from varlora.checkpoint import latest_checkpoint, load_adapter, load_posterior, restore
from varlora.errors import DamagedFileError, VarloraError
from varlora.files import load_tensors, read_json, save_tensors, write_manifest
from varlora.fit import TUNED
from varlora.methods import METHODS
from varlora.params import trainable
from varlora.posterior import POSTERIORS

TIMES = 150
SETTINGS: dict[str, dict[str, Any]] = {"swag": {"every": 1}}


def cut(content: bytes, source: random.Random) -> bytes:
    return content[: source.randrange(len(content))]


def flip(content: bytes, source: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(source.randint(1, 8)):
        changed[source.randrange(min(len(changed), 2_000))] ^= 1 << source.randrange(8)
    return bytes(changed)


def splice(content: bytes, source: random.Random) -> bytes:
    at, other = source.randrange(len(content)), source.randrange(len(content))
    return content[:at] + content[other : other + source.randint(1, 40)] + content[at:]


def replace(content: bytes, source: random.Random) -> bytes:
    """Words of ours, numbers and brackets by others."""
    old = source.choice([b"tensor", b"dict", b"kind", b"F32", b"mean", b"0", b"1", b"[", b"{", b'"', b"shape", b"null"])
    new = source.choice([b"", b"x", b"9" * 30, b"-1", b"[[[[", b"null", b"I64", b'"', b"1e999", b"true"])
    return content.replace(old, new, source.choice([1, -1]))


DAMAGES = (cut, flip, splice, replace)


def damaged(folder: Path, names: list[str], source: random.Random) -> Callable[[], None]:
    """Damage one file; return what mends it."""
    path = folder / source.choice(names)
    content = path.read_bytes()
    path.write_bytes(source.choice(DAMAGES)(content, source))
    return lambda: path.write_bytes(content) and None


def attempt(load: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
    """Return what a function loads, and what it says of a damaged file. Other errors pass."""
    try:
        return load(*arguments), None
    except DamagedFileError as error:
        return None, str(error)


@pytest.fixture(scope="module")
def model() -> Any:
    return helpers.tiny_model()


@pytest.fixture(scope="module", params=["ivon", "swag", "laplace_kfac"])
def run_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a checkpoint."""
    folder = tmp_path_factory.mktemp("run") / request.param
    method = METHODS[request.param](**SETTINGS.get(request.param, {}))
    helpers.run_fit(helpers.tiny_model(), method, folder, steps=6)
    return folder


@pytest.mark.parametrize("fitting", [False, True], ids=["of a disk", "of a stranger"])
def test_a_damaged_posterior_is_refused_or_whole(model: Any, run_dir: Path, fitting: bool) -> None:
    folder, source = run_dir / "adapter", random.Random(0)
    manifest = (folder / "manifest.json").read_bytes()
    names = ["posterior.safetensors", "posterior_config.json", "adapter_config.json"]
    refused = 0
    for _ in range(TIMES):
        mend = damaged(folder, names if fitting else [*names, "manifest.json"], source)
        if fitting:
            write_manifest(folder)
        posterior, said = attempt(load_posterior, model, folder)
        if said is not None:
            refused += 1
            assert str(folder) in said
        else:
            assert posterior.kind in POSTERIORS
            with posterior.sampled(model, torch.Generator().manual_seed(0)):
                pass
        mend()
        (folder / "manifest.json").write_bytes(manifest)
    assert refused > TIMES / 4


def test_a_posterior_that_cannot_be_drawn_from_is_refused(model: Any, run_dir: Path) -> None:
    path = run_dir / "adapter" / "posterior.safetensors"
    whole = path.read_bytes()
    tensors, _ = load_tensors(path)
    changes = [{name: value.to(dtype) for name, value in tensors.items()} for dtype in (torch.int32, torch.bool)]
    changes += [{**tensors, name: -tensors[name]} for name in tensors if "variance." in name or name.endswith("rest")]
    for changed in changes:
        save_tensors(path, changed)
        write_manifest(path.parent)
        assert str(path) in str(attempt(load_posterior, model, path.parent)[1])
    path.write_bytes(whole)
    write_manifest(path.parent)


def test_a_damaged_adapter_is_refused_and_leaves_the_model(model: Any, run_dir: Path) -> None:
    folder, source = run_dir / "adapter", random.Random(1)
    refused = 0
    for _ in range(TIMES):
        before = {name: p.detach().clone() for name, p in trainable(model).items()}
        mend = damaged(folder, ["adapter_model.safetensors"], source)
        _, said = attempt(load_adapter, model, folder)
        if said is not None:
            refused += 1
            assert str(folder) in said
            assert all(torch.equal(p, before[name]) for name, p in trainable(model).items())
        mend()
    assert refused > TIMES / 4


def test_a_checkpoint_that_a_disk_damaged_is_never_chosen(run_dir: Path) -> None:
    source, told = random.Random(2), []
    newest = latest_checkpoint(run_dir, told.append)
    assert newest is not None
    names = [path.name for path in newest.iterdir() if path.stat().st_size]
    for _ in range(TIMES):
        before = {path.name: path.read_bytes() for path in newest.iterdir()}
        mend = damaged(newest, names, source)
        chosen = latest_checkpoint(run_dir, told.append)
        if chosen == newest:  # damage that changes nothing, or white space in the manifest
            assert all((newest / name).read_bytes() == before[name] for name in names if name != "manifest.json")
        else:
            assert str(newest) in told[0]
        mend()
        told.clear()


def test_a_stranger_s_state_is_refused_by_name_and_nothing_of_it_put_back(model: Any, run_dir: Path) -> None:
    source = random.Random(3)
    checkpoint = latest_checkpoint(run_dir, print)
    assert checkpoint is not None
    method: Any = METHODS[run_dir.name](**SETTINGS.get(run_dir.name, {}))
    if (run_dir / TUNED).is_file():  # what the method found, which the groups of its optimizer hang on
        method = replaced(method, **read_json(run_dir / TUNED)["settings"])
    names = [f"{name}.{kind}" for name in ("optimizer", "method") for kind in ("json", "safetensors")]
    refused = 0
    for number in range(TIMES):
        optimizer, state = method.optimizer(trainable(model), 12, 4, 0), {}
        for p in trainable(model).values():
            p.data += 1  # other weights than the checkpoint's
        before, fresh = helpers.bits(model), copy.deepcopy(optimizer.state_dict())
        mend = damaged(checkpoint, names, source) if number else lambda: None
        _, said = attempt(restore, model, optimizer, state, checkpoint)
        assert number or said is None  # whole, it is put back
        if said is not None:
            refused += 1
            assert str(checkpoint) in said
            assert helpers.same(helpers.bits(model), before)
            assert optimizer.state_dict() == fresh  # which has no tensors yet
            assert state == {}
        mend()
    assert refused > TIMES / 4


class Planted:
    """Makes a folder where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


PICKLES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin")
PICKLES += ("pytorch_model.bin", "adapter_model.bin")


def plant(run_dir: Path, folder: Path) -> tuple[Path, Path]:
    """Copy a run, and plant in its newest checkpoint what the Trainer would unpickle; return that, and the marker."""
    checkpoint, marker = latest_checkpoint(shutil.copytree(run_dir, folder / "planted"), print), folder / "unpickled"
    assert checkpoint is not None
    for name in PICKLES:
        torch.save(Planted(marker), checkpoint / name)
    write_manifest(checkpoint)
    return checkpoint, marker


def test_pickles_in_a_checkpoint_are_not_read(run_dir: Path, tmp_path: Path) -> None:
    _, marker = plant(run_dir, tmp_path)
    shutil.copytree(run_dir, tmp_path / "plain")
    for name in ("plain", "planted"):
        method = METHODS[run_dir.name](**SETTINGS.get(run_dir.name, {}))
        helpers.run_fit(helpers.tiny_model(), method, tmp_path / name, steps=7, resume=True)
    assert helpers.outcome(tmp_path / "planted") == helpers.outcome(tmp_path / "plain")
    assert not marker.exists()
    torch.load(plant(run_dir, tmp_path / "again")[0] / PICKLES[0], weights_only=False)
    assert (tmp_path / "again" / "unpickled").is_dir()  # as the other would be


@pytest.mark.parametrize("name", ["adapter_model", "optimizer", "scheduler"])
def test_a_pickle_in_the_place_of_a_file_of_ours_is_refused_by_name(run_dir: Path, name: str, tmp_path: Path) -> None:
    checkpoint, marker = plant(run_dir, tmp_path)
    for kind in ("json", "safetensors"):
        (checkpoint / f"{name}.{kind}").unlink(missing_ok=True)
    write_manifest(checkpoint)
    method = METHODS[run_dir.name](**SETTINGS.get(run_dir.name, {}))
    with pytest.raises(DamagedFileError, match=str(checkpoint / name)):
        helpers.run_fit(helpers.tiny_model(), method, tmp_path / "planted", steps=7, resume=True)
    assert not marker.exists()


RESUMED = ["scheduler.json", "rng_state_0.json", "method.json", "adapter_config.json"]


@pytest.mark.parametrize("names", [["trainer_state.json"], RESUMED])
def test_a_run_goes_on_from_a_stranger_s_checkpoint_or_refuses_it_by_name(
    run_dir: Path, names: list[str], tmp_path: Path
) -> None:
    """`trainer_state.json` is read by the Trainer itself, after a look at it: the checkpoint before is used instead."""
    source, refused = random.Random(4), 0
    for number in range(TIMES // 5):
        copied = shutil.copytree(run_dir, tmp_path / str(number))
        newest = latest_checkpoint(copied, print)
        assert newest is not None
        damaged(newest, names, source)
        write_manifest(newest)
        method, told = METHODS[run_dir.name](**SETTINGS.get(run_dir.name, {})), []
        goes_on = partial(helpers.run_fit, helpers.tiny_model(), method, copied, steps=7, resume=True)
        try:
            goes_on(warn=told.append)
        except VarloraError as error:  # of a name that no version has, it is not known that it is damage
            told.append(str(error))
            assert str(newest) in told[-1]
        refused += any(str(newest) in line for line in told)
    assert refused > TIMES / 20
