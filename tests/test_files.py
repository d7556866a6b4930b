from __future__ import annotations

import errno
import math
import os
import stat
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from varlora import files
from varlora.errors import DamagedFileError, VarloraError
from varlora.files import (
    atomic_folder,
    load_tensors,
    read_json,
    save_tensors,
    verify_manifest,
    write_json,
    write_manifest,
    write_text,
    written_by_line,
)


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


# --- files ---


def test_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "old")
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444

    def crash(*args):
        raise OSError("disk full")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, crash)
            with pytest.raises(OSError, match="disk full"):
                write_text(path, "new")
        assert path.read_text() == "old"
        assert entries(path.parent) == ["file.txt"]
    write_text(path, "new")
    assert path.read_text() == "new"


def test_lines_take_the_place_of_a_file_once_all_are_there(tmp_path):
    path, kept = tmp_path / "answers.jsonl", []
    write_text(path, "older\n")
    with written_by_line(path, lambda *told: kept.append(told)) as write:
        write("one")
        assert path.read_text() == "older\n"
        write("zwölf")
    assert path.read_bytes() == "one\nzwölf\n".encode()
    assert (entries(tmp_path), kept) == (["answers.jsonl"], [])


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_lines_are_kept_where_not_all_are_there_and_nothing_is_lost(error, tmp_path, monkeypatch):
    path, kept = tmp_path / "answers.jsonl", []
    write_text(path, "older\n")
    write_text(tmp_path / "answers.jsonl.part", "of an earlier run\n")

    def stop_after(lines):
        with written_by_line(path, lambda *told: kept.append(told)) as write:
            for line in range(lines):
                write(f"line {line}")
            raise error

    for lines in (0, 2):
        with pytest.raises(error):
            stop_after(lines)
    assert kept == [(tmp_path / "answers.jsonl.part1", 2)]
    monkeypatch.setattr(files.os, "replace", raising(error))
    with pytest.raises(error), written_by_line(path, lambda *told: kept.append(told)) as write:
        write("all")
    assert kept[1:] == [(tmp_path / "answers.jsonl.part2", 1)]
    texts = {name: (tmp_path / name).read_text() for name in entries(tmp_path)}
    assert texts == {
        "answers.jsonl": "older\n",
        "answers.jsonl.part": "of an earlier run\n",
        "answers.jsonl.part1": "line 0\nline 1\n",
        "answers.jsonl.part2": "all\n",
    }


def test_a_line_that_did_not_fit_on_the_disk_is_not_kept(tmp_path):
    """A limit on the size of files cuts the second line off, as a full disk does."""
    code = f"""
import resource, signal
from pathlib import Path
from varlora.files import written_by_line
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
with written_by_line(Path({str(tmp_path / "x")!r}), print) as write:
    write("a" * 60)
    write("b" * 60)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "OSError" in result.stderr
    assert result.stdout.strip() == f"{tmp_path / 'x.part'} 1"
    assert (tmp_path / "x.part").read_text() == "a" * 60 + "\n"


def raising(error):
    def function(*args, **kwargs):
        raise error

    return function


@pytest.mark.parametrize("value", [0.1, 1e-300, math.pi, -0.0, math.inf, 2**70, "σ ✓", [None, True, {"a": 1 / 3}]])
def test_json_comes_back_bit_for_bit(tmp_path, value):
    write_json(tmp_path / "x.json", value)
    assert repr(read_json(tmp_path / "x.json")) == repr(value)


def test_json_that_is_nested_without_end_is_named(tmp_path):
    (tmp_path / "x.json").write_text("[" * 100_000)
    with pytest.raises(DamagedFileError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "value", ['{"a":' * 101 + "1" + "}" * 101, "[" * 900 + "]" * 900, '["\\ud800"]', '{"\\udfff": 1}']
)
def test_json_that_could_not_be_gone_through_or_written_again_is_named(tmp_path, value):
    (tmp_path / "x.json").write_text(value)
    with pytest.raises(DamagedFileError, match=r"x\.json, but it cannot be read"):
        read_json(tmp_path / "x.json")


def test_json_of_many_levels_and_characters_beyond_the_first_plane_is_read(tmp_path):
    (tmp_path / "x.json").write_text("[" * 100 + r'"\ud83d\ude00"' + "]" * 100)
    value = read_json(tmp_path / "x.json")
    for _ in range(100):
        (value,) = value
    assert value == "😀"


def test_what_does_not_end_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**24 + 1)
    for name, why in (("pipe", "no file"), ("device", "no file"), ("large", "more than 16,777,216 bytes")):
        with pytest.raises(DamagedFileError, match=rf"{name}, but it cannot be read \(it .*{why}"):
            read_json(tmp_path / name)
    for name in ("pipe", "device"):
        with pytest.raises(DamagedFileError, match=rf"{name}, but it is damaged"):
            load_tensors(tmp_path / name)
    (tmp_path / "manifest.json").symlink_to("/dev/zero")
    with pytest.raises(DamagedFileError, match="has no manifest"):
        verify_manifest(tmp_path)


def test_a_listed_file_that_cannot_be_read_is_damage(tmp_path, monkeypatch):
    """A bad sector, or a name that no file can have: resume then falls back to the checkpoint before."""
    write_text(tmp_path / "a", "text")
    write_manifest(tmp_path)

    def broken(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, "file_digest", broken)
    with pytest.raises(DamagedFileError, match=r"a cannot be read \(Input/output error\)"):
        verify_manifest(tmp_path)
    write_json(tmp_path / "manifest.json", {"n" * 300: "0"})
    with pytest.raises(DamagedFileError, match=r"cannot be read \(File name too long\)"):
        verify_manifest(tmp_path)


def test_json_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DamagedFileError, match=r"absent\.json, but it is absent"):
        read_json(tmp_path / "absent.json")
    write_text(tmp_path / "cut.json", '{"a": 1')
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    for name in ("cut.json", "bytes.json"):
        with pytest.raises(DamagedFileError, match=f"{name}, but it cannot be read"):
            read_json(tmp_path / name)


def test_tensors_come_back_bit_for_bit(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    tensors = {
        "float": torch.tensor([0.1, -0.0, math.inf, math.nan]),
        "bfloat16": torch.randn(3, generator=torch.Generator().manual_seed(0)).bfloat16(),
        "int": torch.tensor(2**62),
        "bool": torch.tensor([True, False]),
        "view": whole.t(),
        "same storage": whole[0],
        "empty": torch.empty(0, 3),
        "with a graph": torch.ones(2, requires_grad=True),
    }
    save_tensors(tmp_path / "deep" / "x.safetensors", tensors, {"from": "here"})
    loaded, metadata = load_tensors(tmp_path / "deep" / "x.safetensors")
    assert metadata == {"from": "here"}
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        torch.testing.assert_close(loaded[name], value.detach(), rtol=0, atol=0, equal_nan=True)
    assert entries(tmp_path / "deep") == ["x.safetensors"]


@pytest.mark.parametrize("metadata", [None, {}, {"a": "b"}])
def test_no_tensors_come_back_as_none(tmp_path, metadata):
    save_tensors(tmp_path / "x.safetensors", {}, metadata)
    assert load_tensors(tmp_path / "x.safetensors") == ({}, metadata or {})


def test_tensors_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.zeros(2)})

    def crash(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(files, "save_file", crash)
    with pytest.raises(OSError, match="disk full"):
        save_tensors(path, {"a": torch.ones(2)})
    assert load_tensors(path)[0]["a"].tolist() == [0, 0]
    assert entries(tmp_path) == ["x.safetensors"]


def test_tensors_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DamagedFileError, match=r"absent.safetensors, but it is absent"):
        load_tensors(tmp_path / "absent.safetensors")
    save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(100)})
    content = (tmp_path / "x.safetensors").read_bytes()
    for size in (0, 5, 20, len(content) - 1):
        (tmp_path / "cut.safetensors").write_bytes(content[:size])
        with pytest.raises(DamagedFileError, match=r"cut.safetensors, but it is damaged or cut short"):
            load_tensors(tmp_path / "cut.safetensors")
    with pytest.raises(DamagedFileError, match="damaged"):
        load_tensors(tmp_path)


# --- folders ---


def make_folder(folder):
    (folder / "sub").mkdir(parents=True)
    write_text(folder / "a.txt", "a" * 100)
    write_text(folder / "sub" / "b.txt", "")
    write_manifest(folder)
    return folder


def test_manifest_says_that_a_folder_is_complete(tmp_path):
    folder = make_folder(tmp_path / "x")
    verify_manifest(folder)
    write_manifest(folder)  # the manifest itself is not listed
    verify_manifest(folder)
    write_text(folder / "extra.txt", "users may add what they like")
    verify_manifest(folder)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("[1]"), "manifest.json"),
        (lambda folder: (folder / "sub" / "b.txt").unlink(), "b.txt is absent"),
        (lambda folder: (folder / "a.txt").write_text("a" * 99), "a.txt is damaged"),
        (lambda folder: (folder / "a.txt").write_text("a" * 99 + "b"), "a.txt is damaged"),
    ],
)
def test_damage_to_a_folder_is_found_and_named(tmp_path, damage, named):
    folder = make_folder(tmp_path / "x")
    damage(folder)
    with pytest.raises(DamagedFileError, match=named) as caught:
        verify_manifest(folder)
    assert str(folder) in str(caught.value)


def test_folder_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "runs" / "adapter"
    with atomic_folder(path) as folder:
        write_text(folder / "x.txt", "old")
        assert not path.exists()
    verify_manifest(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    with pytest.raises(AttributeError), atomic_folder(path) as folder:
        write_text(folder / "x.txt", None)
    assert (path / "x.txt").read_text() == "old"
    with atomic_folder(path) as folder:
        write_text(folder / "y.txt", "new")
    assert entries(path) == ["manifest.json", "y.txt"]
    assert entries(path.parent) == ["adapter"]


def test_a_folder_beside_it_is_left_alone(tmp_path):
    """Whatever its name: what it replaces is put aside under a name of its own."""
    write_text(tmp_path / ".folder.old" / "thesis.txt", "important")
    for text in ("first", "second"):
        with atomic_folder(tmp_path / "folder") as folder:
            write_text(folder / "x.txt", text)
    assert (tmp_path / ".folder.old" / "thesis.txt").read_text() == "important"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".folder.old", "folder"]


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_who_may_read_files_is_as_the_umask_says(tmp_path, umask, expected):
    """Ours, and those that a library wrote into a folder of ours: a server may run as another user."""
    before = os.umask(umask)
    try:
        write_text(tmp_path / "x.txt", "x")
        save_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(1)})
        with atomic_folder(tmp_path / "folder") as folder:
            save_file({"x": torch.zeros(1)}, folder / "y.safetensors")
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in written} == {
        "x.txt": expected,
        "x.safetensors": expected,
        "y.safetensors": expected,
        "manifest.json": expected,
    }


def test_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "adapter"
    with atomic_folder(path) as folder:
        write_text(folder / "x.txt", "old")
    rename = type(path).rename

    def crash(self, target):
        if target == path and self.suffix == ".tmp":
            raise OSError("no space")
        return rename(self, target)

    monkeypatch.setattr(type(path), "rename", crash)
    with pytest.raises(VarloraError, match="could not be written: no space"), atomic_folder(path) as folder:
        write_text(folder / "x.txt", "new")
    assert (path / "x.txt").read_text() == "old"
    assert entries(tmp_path) == ["adapter"]


def test_a_link_is_replaced_and_not_followed(tmp_path):
    """In a stranger's run directory a checkpoint may be a link to anywhere."""
    write_text(tmp_path / "mine" / "thesis.txt", "all of it")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-5").symlink_to(tmp_path / "mine")
    for text in ("one", "two"):
        with atomic_folder(tmp_path / "run" / "checkpoint-5") as folder:
            write_text(folder / "x.txt", text)
        assert not (tmp_path / "run" / "checkpoint-5").is_symlink()
        assert (tmp_path / "run" / "checkpoint-5" / "x.txt").read_text() == text
    assert entries(tmp_path / "run") == ["checkpoint-5"]
    assert entries(tmp_path / "mine") == ["thesis.txt"]


def test_a_manifest_of_nothing_is_none(tmp_path):
    write_json(tmp_path / "manifest.json", {})
    with pytest.raises(DamagedFileError, match="checksums"):
        verify_manifest(tmp_path)
