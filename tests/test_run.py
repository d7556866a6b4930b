from __future__ import annotations

import json
import subprocess

import pytest
import torch

from varlora.errors import VarloraError
from varlora.files import (
    write_json,
    write_text,
)
from varlora.run import alone, origin, prepare_run_dir


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def make_run(folder):
    write_json(folder / "config.json", {"settings": {"task": "boolq"}})
    (folder / "checkpoint-5").mkdir()
    return folder


# --- a new run directory ---


def test_prepare_makes_a_folder_with_its_parents(tmp_path):
    prepare_run_dir(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    prepare_run_dir(tmp_path / "a" / "b")  # an empty folder is as good as none


def test_prepare_refuses_what_exists(tmp_path):
    run_dir = make_run(tmp_path / "run")
    with pytest.raises(VarloraError, match=r"exists already.*--resume.*--overwrite"):
        prepare_run_dir(run_dir)
    assert entries(run_dir) == ["checkpoint-5", "config.json"]


def test_prepare_resumes_without_touching(tmp_path):
    run_dir = make_run(tmp_path / "run")
    prepare_run_dir(run_dir, resume=True)
    assert entries(run_dir) == ["checkpoint-5", "config.json"]


def test_prepare_puts_back_what_a_kill_left_half_replaced(tmp_path):
    """Killed between the two renames, the folder is there under its other name alone; killed after, under both."""
    make_run(tmp_path)
    for where in (tmp_path, tmp_path / "member-1"):
        write_text(where / ".adapter.0123abcd.old" / "x.txt", "whole")
        write_text(where / ".report.89abcdef.old" / "x.txt", "old")
        write_text(where / "report" / "x.txt", "new")
        write_text(where / ".checkpoint.tmp" / "x.txt", "half")
    write_text(tmp_path / ".notes.v2.00000000.old", "a file")
    (tmp_path / ".link.tmp").symlink_to(tmp_path / "report")
    prepare_run_dir(tmp_path, resume=True)
    for where in (tmp_path, tmp_path / "member-1"):
        assert (where / "adapter" / "x.txt").read_text() == "whole"
        assert (where / "report" / "x.txt").read_text() == "new"
        assert not list(where.glob(".*"))
    assert (tmp_path / "notes.v2").read_text() == "a file"


def test_prepare_overwrites_a_run(tmp_path):
    run_dir = make_run(tmp_path / "run")
    prepare_run_dir(run_dir, overwrite=True)
    assert entries(run_dir) == []


def test_what_a_kill_left_before_there_was_a_run_is_no_run_in_the_way(tmp_path):
    write_text(tmp_path / ".config.json.x.tmp", "{")
    prepare_run_dir(tmp_path)
    assert entries(tmp_path) == []


def test_one_process_at_a_time_trains_in_a_run_directory(tmp_path, monkeypatch):
    with alone(tmp_path / "run"):
        with pytest.raises(VarloraError, match=r"Another process is at work in .*run"), alone(tmp_path / "run"):
            pytest.fail("there were two")
        monkeypatch.setenv("RANK", "1")
        with alone(tmp_path / "run"):  # of the same training
            pass
    monkeypatch.undo()
    with alone(tmp_path / "run"):
        pass
    assert entries(tmp_path / "run") == []


def test_what_is_no_run_is_neither_deleted_nor_gone_on_with(tmp_path):
    (tmp_path / "thesis").mkdir()
    write_text(tmp_path / "thesis" / "chapter1.txt", "It was")
    (tmp_path / "model").mkdir()
    write_json(tmp_path / "model" / "config.json", {"model_type": "llama"})  # every base model has a config.json
    (tmp_path / "broken").mkdir()
    write_text(tmp_path / "broken" / "config.json", "{")
    (tmp_path / "list").mkdir()
    write_text(tmp_path / "list" / "config.json", "[]")
    for name in ("thesis", "model", "broken", "list"):
        write_text(tmp_path / name / ".draft.tmp", "a draft")
        write_text(tmp_path / name / ".notes.01234567.old", "notes")
        before = entries(tmp_path / name)
        for how in ({"overwrite": True}, {"resume": True}):
            with pytest.raises(VarloraError, match="not a run directory"):
                prepare_run_dir(tmp_path / name, **how)
            assert entries(tmp_path / name) == before


def test_prepare_refuses_a_file_and_both_options(tmp_path):
    write_text(tmp_path / "file", "x")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(VarloraError, match="is a file"):
            prepare_run_dir(tmp_path / "file", **options)
    with pytest.raises(VarloraError, match="got both"):
        prepare_run_dir(tmp_path / "new", resume=True, overwrite=True)
    assert not (tmp_path / "new").exists()


# --- origin ---


def test_origin_names_versions_machine_and_time():
    found = origin()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"] == torch.__version__
    assert set(found) == {"versions", "commit", "machine", "time"}


def test_commit_is_none_outside_a_checkout(monkeypatch):
    def absent(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", absent)
    assert origin()["commit"] is None
