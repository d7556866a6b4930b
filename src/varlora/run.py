"""A run directory: what it holds, written so that a crash leaves the old or the new file, never half of one.

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

import hashlib
import json
import os
import platform
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from varlora.errors import DamagedFileError, VarloraError

fcntl: Any
try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

__all__ = [
    "alone",
    "atomic_folder",
    "check_name",
    "check_place",
    "check_writable",
    "checksums",
    "complete",
    "deeper_than",
    "file_digest",
    "is_run",
    "load_tensors",
    "origin",
    "parse_json",
    "part_of",
    "prepare_run_dir",
    "read_json",
    "save_tensors",
    "told_if_unwritten",
    "verify_manifest",
    "write_bytes",
    "write_json",
    "write_manifest",
    "write_text",
    "written_by_line",
    "written_together",
]

MANIFEST = "manifest.json"
LARGEST = 2**24
"""Bytes of a JSON file that is read; ours have some thousand, and a stranger's may have any number."""
DEEPEST = 100
"""Levels of JSON, one within the other; ours has 20 at the most. What goes through them calls itself once for each."""
PACKAGES = ("varlora", "torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "safetensors")


def check_name(path: str | Path) -> None:
    """Refuse a path that is not UTF-8: safetensors opens none, and JSON and reports cannot name it.

    Raises:
        VarloraError: it is not.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise VarloraError(f"Expected a path whose name is UTF-8, but got {str(path)!r}. Rename it.") from None


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


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep other processes that train out of a run directory, which is made if it is not there.

    The lock is the kernel's, on the folder itself: it leaves no file and ends with its process, however that ends
    (after a SIGKILL, with the children that it forked). Of several ranks the first one has it. Where the system or the
    file system has no such locks there is none.

    Raises:
        VarloraError: another process has it.
    """
    path.mkdir(parents=True, exist_ok=True)
    if fcntl is None or os.environ.get("RANK", "0") != "0":
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise VarloraError(
                f"Another process is training in {path}. Wait for it or stop it, or give another run directory."
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


def _discard(path: Path) -> None:
    """Remove what is not needed any more, if it is there and as far as that goes."""
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def is_run(path: Path) -> bool:
    """Whether a folder is a run of ours; a base model has a config.json as well, but no settings in it."""
    try:
        config = read_json(path / "config.json")
    except DamagedFileError:
        return False
    return isinstance(config, Mapping) and "settings" in config


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: to a temporary name in the same folder, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def written_by_line(path: Path) -> Iterator[IO[str]]:
    """Give a file to write lines of UTF-8 to, one after the other; on success it takes the place of `path`.

    Until then it lies beside it, as its `part_of`, and stays there if anything was written.
    """
    part = part_of(path)
    part.unlink(missing_ok=True)
    with part.open("x", encoding="utf-8") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            if not part.stat().st_size:
                part.unlink()
            raise
    os.replace(part, path)
    _flush(path.parent)


def part_of(path: Path) -> Path:
    """Return where the lines lie that `written_by_line` has written so far.

    Example:
        >>> part_of(Path("answers.jsonl")).name
        'answers.jsonl.part'
    """
    return path.with_name(f"{path.name}.part")


def _temporary(path: Path, kind: str = "tmp") -> Path:
    """Return a name of no other's beside a path, to write to; unlike `tempfile`'s, what is there is as umask says."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{kind}")


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all; numbers come back bit for bit."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, largest: int = LARGEST) -> Any:
    """Read JSON.

    Args:
        path: the file.
        largest: bytes that it may have.

    Raises:
        DamagedFileError: the file is absent, cut short, too large, no regular file, or no JSON for `parse_json`.
    """
    try:
        _check_ends(path)
        with path.open("rb") as file:
            content = file.read(largest + 1)
        if len(content) > largest:
            raise ValueError(f"it has more than {largest:,} bytes")
        return parse_json(content.decode("utf-8"))
    except FileNotFoundError:
        raise DamagedFileError(f"Expected a file {path}, but it is absent. Is {path.parent} complete?") from None
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"Expected JSON in {path}, but it cannot be read ({error}).") from error


def parse_json(text: str) -> Any:
    """Read JSON that anyone may have written: what it holds can be gone through, and written again.

    Raises:
        ValueError: it is no JSON, has too many levels, or has half a character, which UTF-8 cannot hold.

    Example:
        >>> parse_json('{"a": [1]}')
        {'a': [1]}
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"it has more than {DEEPEST} levels, one within the other") from error
    if deeper_than(value, DEEPEST):
        raise ValueError(f"it has more than {DEEPEST} levels, one within the other")
    json.dumps(value, ensure_ascii=False).encode()  # raises where there is half a character
    return value


def deeper_than(value: Any, levels: int) -> bool:
    """Whether JSON has more levels of lists and objects, one within the other; found without calling itself.

    Example:
        >>> deeper_than([[1]], 2), deeper_than([[1]], 1)
        (False, True)
    """
    level: list[Any] = [[value]]
    for _ in range(levels + 1):
        inner = [one.values() if isinstance(one, dict) else one for one in level]
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
    return bool(level)


def _check_ends(path: Path) -> None:
    """Raise if a path is there and no file: to read a pipe or a device, a stranger's link to one say, may never end."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write safetensors whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        temporary.touch()
        permissions = temporary.stat().st_mode
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        # an empty mapping would make a file that cannot be read back
        save_file(own, temporary, metadata=dict(metadata) if metadata else None)
        temporary.chmod(permissions)  # safetensors would keep it to its owner
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read safetensors: tensors and metadata.

    Raises:
        DamagedFileError: the file is absent, cut short or no safetensors file.
        VarloraError: its path is not UTF-8.
    """
    check_name(path)
    try:
        _check_ends(path)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except FileNotFoundError:
        raise DamagedFileError(f"Expected a file {path}, but it is absent. Is {path.parent} complete?") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedFileError(
            f"Expected safetensors in {path}, but it is damaged or cut short ({error}). "
            "Restore it from a copy, or make it anew."
        ) from error


def write_manifest(folder: Path) -> None:
    """Write down the SHA-256 of each file of a folder; its presence says that all of them are on the disk."""
    write_json(folder / MANIFEST, checksums(folder))


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a folder but manifests, once all of them are on the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    for path in files:
        _flush(path)
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def verify_manifest(folder: Path) -> None:
    """Check a folder against its manifest.

    Raises:
        DamagedFileError: the manifest is absent (writing was interrupted), or a file is absent or altered.
    """
    if not (folder / MANIFEST).is_file():
        raise DamagedFileError(f"{folder} has no {MANIFEST}: writing it was interrupted, so it is not used.")
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, Mapping) or not manifest:
        raise DamagedFileError(f"Expected file names and checksums in {folder / MANIFEST}, but there are none.")
    for name, digest in manifest.items():
        if not (folder / name).is_file():
            raise DamagedFileError(f"{folder / name} is absent, but {MANIFEST} lists it. Restore it from a copy.")
        if file_digest(folder / name) != digest:
            raise DamagedFileError(f"{folder / name} is damaged: it differs from {MANIFEST}. Restore it from a copy.")


def file_digest(path: Path) -> str:
    """Return a file's SHA-256."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


@contextmanager
def atomic_folder(
    path: Path, manifest: Callable[[Path], None] | None = None, then: str = "go on with `resume`"
) -> Iterator[Path]:
    """Give an empty folder to write to; on success `manifest` writes its manifest and it takes the place of `path`.

    A link is replaced and not followed: it may be a stranger's. `then` is what a user is to do once it can be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with told_if_unwritten(path, then):
            temporary.mkdir()
            yield temporary
            complete(temporary, path, manifest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def written_together(folder: Path, last: str, then: str) -> Iterator[Path]:
    """Give an empty folder to write files to; on success they take the places of those in `folder`, else none does.

    (But for what a system that stops in the middle of renaming them leaves.) The file `last` is away meanwhile, and
    comes last: where it is, all are there. `then` is what a user is to do once they can be written.
    """
    temporary = _temporary(folder / "files")
    try:
        with told_if_unwritten(folder, then):
            temporary.mkdir()
            yield temporary
            (folder / last).unlink(missing_ok=True)
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == last):
                path.replace(folder / path.name)
            _flush(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def complete(temporary: Path, path: Path, manifest: Callable[[Path], None] | None = None) -> None:
    """Give a folder its manifest, flush all of it to the disk, and rename it to `path`, which it replaces."""
    permissions = temporary.stat().st_mode & 0o666
    for file in (found for found in temporary.rglob("*") if found.is_file()):
        file.chmod(file.stat().st_mode | permissions)  # safetensors would keep its own to their owner
    (manifest or write_manifest)(temporary)
    for folder in (temporary, *(found for found in temporary.rglob("*") if found.is_dir())):
        _flush(folder)
    old = _temporary(path, "old")
    if path.exists() or path.is_symlink():
        path.rename(old)
    try:
        temporary.rename(path)
    except BaseException:
        if old.exists() or old.is_symlink():
            old.rename(path)
        raise
    _flush(path.parent)
    _discard(old)


@contextmanager
def told_if_unwritten(path: Path, then: str = "go on with `resume`") -> Iterator[None]:
    """Say in words that what is being written to `path` cannot be: the disk is full, say."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise VarloraError(
            f"{path} could not be written: {error}. What was there before is whole. Make room or give access, and "
            f"{then}."
        ) from error


def check_writable(path: Path) -> None:
    """Raise unless a file can be written to `path`, whose folder is made.

    Raises:
        VarloraError: it cannot.
    """
    with told_if_unwritten(path, "try again"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":  # where folders cannot be opened
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems flush no folders, and the files are there
            raise
    finally:
        os.close(handle)


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
