"""Files that are written whole or not at all, and read however they are: JSON, safetensors, folders with a manifest.

What is written goes to a name of its own beside its place, to the disk, and is then renamed. What is read may be a
stranger's, or cut short: it has a largest size, is no pipe, and where it cannot be read, the error names it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from varlora.errors import DamagedFileError, VarloraError

__all__ = [
    "MANIFEST",
    "atomic_folder",
    "check_name",
    "check_writable",
    "checksums",
    "complete",
    "deeper_than",
    "file_digest",
    "load_tensors",
    "parse_json",
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


def check_name(path: str | Path) -> None:
    """Refuse a path that is not UTF-8: safetensors opens none, and JSON and reports cannot name it.

    Raises:
        VarloraError: it is not.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise VarloraError(f"Expected a path whose name is UTF-8, but got {str(path)!r}. Rename it.") from None


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
def written_by_line(path: Path, kept: Callable[[Path, int], None]) -> Iterator[Callable[[str], None]]:
    """Give a function that writes a line to a file, which takes the place of `path` once the context ends.

    If it ends with an error or an interrupt, the whole lines that are there lie beside `path`, under a name with
    `.part` that nothing had before. A process that is killed leaves them under a hidden name.

    Args:
        path: the file, whose folder exists.
        kept: told in that case where they lie, and how many they are.
    """
    temporary, size, lines = _temporary(path), 0, 0
    try:
        with temporary.open("xb") as file:

            def write(line: str) -> None:
                nonlocal size, lines
                file.write(f"{line}\n".encode())
                file.flush()
                size, lines = file.tell(), lines + 1

            yield write
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if not lines:
            temporary.unlink(missing_ok=True)
        elif temporary.exists():
            with suppress(OSError):
                os.truncate(temporary, size)  # of a line that a full disk cut off
            names = (path.with_name(f"{path.name}.part{number or ''}") for number in itertools.count())
            part = next(name for name in names if not os.path.lexists(name))
            temporary.rename(part)
            kept(part, lines)
        raise
    _flush(path.parent)


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
        DamagedFileError: the manifest is absent (writing was interrupted), or a file is absent, altered or cannot be
            read.
    """
    if not (folder / MANIFEST).is_file():
        raise DamagedFileError(f"{folder} has no {MANIFEST}: writing it was interrupted, so it is not used.")
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, Mapping) or not manifest:
        raise DamagedFileError(f"Expected file names and checksums in {folder / MANIFEST}, but there are none.")
    for name, digest in manifest.items():
        try:
            if not (folder / name).is_file():
                raise DamagedFileError(f"{folder / name} is absent, but {MANIFEST} lists it. Restore it from a copy.")
            found = file_digest(folder / name)
        except OSError as error:
            raise DamagedFileError(
                f"{folder / name} cannot be read ({error.strerror}), but {MANIFEST} lists it. Restore it from a copy."
            ) from error
        if found != digest:
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


def _discard(path: Path) -> None:
    """Remove what is not needed any more, if it is there and as far as that goes."""
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


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
