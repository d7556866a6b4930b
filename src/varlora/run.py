"""A run directory: what it holds, who may write to it, and where a result comes from.

| file | what |
| --- | --- |
| `config.json` | resolved settings, versions, commit, task and prompt version |
| `task.yaml` | the task file, of a task of one's own |
| `adapter/` | a plain PEFT checkpoint of the mean, with the posterior beside it |
| `member-<k>/` | training of an ensemble's member k: its adapter, log and checkpoints |
| `predictions.safetensors` | logits of every draw, labels, row ids |
| `predictions-calibrated.safetensors` | of the calibrated posterior, if `adapter/calibration.json` says how to use it |
| `predictions-tau-<tau>.safetensors`, `predictions-ood-<task>.safetensors` | at other variances, of other tasks' rows |
| `metrics.json` | metrics at the mean and with S draws |
| `predictions-calibration.safetensors`, `metrics-calibration.json` | the same of the rows that were held out |
| `tuned.json` | settings that were left to the method, and what it saw when it looked for them |
| `training.jsonl` | what was logged while training |
| `checkpoint-<step>/` | training checkpoints |
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from varlora.errors import DamagedFileError, VarloraError
from varlora.files import check_name, read_json

fcntl: Any
try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

__all__ = ["alone", "check_place", "is_first", "is_run", "origin", "prepare_run_dir"]

PACKAGES = ("varlora", "torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "safetensors")


def check_place(path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Refuse a run directory that `prepare_run_dir` would refuse, and change nothing.

    Raises:
        VarloraError: it exists and neither `resume` nor `overwrite` is given, or one of them on some other folder; or
            its name is not UTF-8.
    """
    check_name(path)
    if resume and overwrite:
        raise VarloraError("Expected `resume` or `overwrite`, but got both. Pass one of them.")
    if path.exists() and not path.is_dir():
        raise VarloraError(f"Expected `run_dir` to be a folder, but {path} is a file. Choose another name.")
    # What is left of a run that was killed before it had a config.json is as good as nothing.
    occupied = path.exists() and any(not entry.match(".config.json.*.tmp") for entry in path.iterdir())
    if occupied and not (resume or overwrite):
        raise VarloraError(
            f"The run directory {path} exists already. Pass `--resume` to go on with it, `--overwrite` to replace it, "
            "or another `--run-dir`."
        )
    if occupied and not is_run(path):
        what = "deleted" if overwrite else "gone on with"
        raise VarloraError(
            f"{path} is not a run directory (no config.json with settings), so it is not {what}. Choose another."
        )


def prepare_run_dir(path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Make a run directory, or refuse one that exists.

    Args:
        path: the directory.
        resume: go on in an existing directory.
        overwrite: delete what is in an existing one first; a folder that is no run of ours is never touched.

    Raises:
        VarloraError: see `check_place`.
    """
    check_place(path, resume=resume, overwrite=overwrite)
    path.mkdir(parents=True, exist_ok=True)
    if overwrite:
        for entry in sorted(path.iterdir(), key=lambda entry: entry.name == "config.json"):  # by which it is a run
            _remove(entry)
    for folder in (path, *path.glob("member-*")):
        _tidy(folder)


def is_first() -> bool:
    """Whether this process is the first, or the only one, of those that `torchrun` or another launcher started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep other processes out of a run directory, or a folder of runs, which is made if it is not there.

    The lock is the kernel's, on the folder itself: it leaves no file and ends with its process, however that ends
    (after a SIGKILL, with the children that it forked). Of several ranks the first one has it. Where the system or the
    file system has no such locks there is none.

    Raises:
        VarloraError: another process has it.
    """
    path.mkdir(parents=True, exist_ok=True)
    if fcntl is None or not is_first():
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise VarloraError(
                f"Another process is at work in {path}. Wait for it or stop it, or give another folder."
            ) from None
        except OSError:
            pass
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # or children that were forked would keep it
        os.close(handle)


def _tidy(folder: Path) -> None:
    """Remove what a process left that was killed while writing; what it was about to replace stays."""
    put_aside = folder.glob(f".?*.{'[0-9a-f]' * 8}.old")
    for old in sorted(put_aside, key=lambda path: path.lstat().st_ctime, reverse=True):  # the last one first
        name = folder / old.name[1:].rsplit(".", 2)[0]
        _remove(old) if name.exists() else old.rename(name)
    for leftover in folder.glob(".*.tmp"):
        _remove(leftover)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def is_run(path: Path) -> bool:
    """Whether a folder is a run of ours; a base model has a config.json as well, but no settings in it."""
    try:
        config = read_json(path / "config.json")
    except DamagedFileError:
        return False
    return isinstance(config, Mapping) and "settings" in config


def origin() -> dict[str, Any]:
    """Where a result comes from: versions, commit, machine and time."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
            "torch": torch.__version__,  # its build too, such as +cpu, which the package's own version may lack
        },
        "commit": _commit(),
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, with `+` if it has changes; None for an installed one."""
    here = Path(__file__).resolve().parent
    try:
        _, commit, changes = [
            subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout
            for command in (
                ["ls-files", "--error-unmatch", Path(__file__).name],  # fails in a checkout that is not ours
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no", "--", "."],
            )
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("+" if changes.strip() else "")
