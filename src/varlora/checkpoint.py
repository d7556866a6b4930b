"""Save and load: the adapter with its posterior, and training checkpoints, as safetensors and JSON with checksums.

`adapter/` is a plain PEFT checkpoint of the posterior mean; `posterior.safetensors` and `posterior_config.json` lie
beside it. A training checkpoint is `transformers.Trainer`'s, except that nothing in it has to be unpickled, and that it
is written aside, flushed to the disk with its checksums, and then renamed.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import set_peft_model_state_dict
from torch import Tensor, nn
from transformers import Trainer, TrainerState

from varlora.errors import DamagedFileError, VarloraError, did_you_mean
from varlora.files import (
    MANIFEST,
    atomic_folder,
    complete,
    load_tensors,
    read_json,
    save_tensors,
    told_if_unwritten,
    verify_manifest,
    write_json,
)
from varlora.params import check_same_parameters, copied, not_finite, trainable
from varlora.posterior import POSTERIORS, Posterior, posterior_from_tensors

__all__ = [
    "CheckpointTrainer",
    "latest_checkpoint",
    "load_adapter",
    "load_posterior",
    "load_state",
    "restore",
    "save_adapter",
    "save_state",
    "step_of",
    "write_adapter",
]

ADAPTER_FILE = "adapter_model.safetensors"
STEP = re.compile(r"checkpoint-\d+")
LARGEST_STATE = 2**30
"""Bytes of a state's JSON, which names all its tensors: megabytes for large models, more for mixtures of experts."""
WRITING = ".checkpoint.tmp"
"""Where in a run directory a checkpoint is written, by all ranks, before it is renamed."""


# --- the adapter and its posterior ---


def save_adapter(model: nn.Module, posterior: Posterior, folder: str | Path) -> None:
    """Write the adapter at the posterior mean as a PEFT checkpoint, and the posterior beside it.

    Args:
        model: the `peft` model; its own weights are left as they are.
        posterior: the posterior over its trainable parameters.
        folder: where to; an adapter that is there is replaced as a whole once everything is written.

    Raises:
        VarloraError: the folder holds something else, which would be lost; or it cannot be written to.

    Example:
        >>> import tempfile
        >>> from varlora import Point, demo
        >>> from varlora.params import copied
        >>> model, scratch = demo.load().model, tempfile.TemporaryDirectory()
        >>> save_adapter(model, Point(copied(model)), f"{scratch.name}/adapter")
        >>> load_posterior(model, f"{scratch.name}/adapter")
        Point(16,384 weights)
    """
    folder = Path(folder)
    if folder.is_dir() and (lost := sorted({path.name for path in folder.iterdir()} - _of_an_adapter(folder))):
        some = f"{', '.join(lost[:3])}{' and more' if lost[3:] else ''}"
        raise VarloraError(
            f"Expected `folder` to be new, or to hold a saved adapter and no more, but {folder} has {some}, which "
            f"would be lost. Name a folder of its own, e.g. {folder / 'adapter'}."
        )
    write_adapter(model, posterior, folder)


def write_adapter(model: nn.Module, posterior: Posterior, folder: Path) -> None:
    """Do the work of `save_adapter` in a folder that is ours, whatever it holds."""
    with atomic_folder(folder) as temporary:
        with posterior.at_mean(model):
            model.save_pretrained(temporary)  # type: ignore[operator]
        save_tensors(temporary / "posterior.safetensors", posterior.tensors())
        write_json(temporary / "posterior_config.json", {"kind": posterior.kind})


def _of_an_adapter(folder: Path) -> set[str]:
    """Return the names in a folder of what `save_adapter`, `calibrate` and peft write."""
    names = {MANIFEST, ADAPTER_FILE, "adapter_config.json", "README.md", "calibration.json"}
    names |= {"posterior.safetensors", "posterior_config.json"}
    with suppress(DamagedFileError):  # which is replaced; peft has a folder for each further adapter
        if isinstance(listed := read_json(folder / MANIFEST), Mapping):
            names |= {Path(name).parts[0] for name in listed}
    return names


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Put a PEFT checkpoint's weights into an adapter that exists already, keeping its type and parameters.

    Raises:
        DamagedFileError: the file is absent or damaged, or of another model or rank.
    """
    tensors, _ = load_tensors(folder / ADAPTER_FILE)
    parameters = trainable(model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        result: Any = set_peft_model_state_dict(model, tensors)
    except (RuntimeError, KeyError) as error:  # wrong shapes, mostly, and the others are loaded
        _restore_values(parameters, before)
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise DamagedFileError(
            f"The adapter in {folder} is not of this model: {' '.join(str(error).split())[:300]}. "
            "Load it with the base model and the LoRA settings that it was trained with."
        ) from error
    wanted = set(parameters)
    missing = wanted & set(result.missing_keys)
    if missing or result.unexpected_keys:
        _restore_values(parameters, before)
        example = min(missing) if missing else result.unexpected_keys[0]
        raise DamagedFileError(
            f"The adapter in {folder} is not of this model: `{example}` is {'missing' if missing else 'unknown'}. "
            "Load it with the base model and the LoRA settings that it was trained with."
        )


def _restore_values(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(values[name])


def load_posterior(model: nn.Module, folder: str | Path) -> Posterior:
    """Read the posterior that lies beside an adapter.

    Args:
        model: the model that it is of, to check names and shapes and for the device.
        folder: what `save_adapter` wrote.

    Returns:
        A posterior of the kind that was saved, on the model's device; the model's own weights are left as they are.

    Raises:
        DamagedFileError: a file is absent, altered or of another model.
        VarloraError: nothing in the model can be trained, by which its adapter would be known.

    Example:
        >>> import tempfile
        >>> from varlora import DiagonalGaussian, demo
        >>> from varlora.params import copied
        >>> model, scratch = demo.load().model, tempfile.TemporaryDirectory()
        >>> mean = copied(model)
        >>> posterior = DiagonalGaussian(mean, {name: torch.full_like(value, 0.5) for name, value in mean.items()})
        >>> save_adapter(model, posterior, f"{scratch.name}/adapter")
        >>> load_posterior(model, f"{scratch.name}/adapter").std[min(mean)].unique()
        tensor([0.5000])
    """
    parameters = trainable(model)
    if not parameters:
        raise VarloraError(
            "Expected an adapter that can be trained, but all of the model is frozen. Load it by "
            "`PeftModel.from_pretrained(base, folder, is_trainable=True)`."
        )
    folder = Path(folder)
    verify_manifest(folder)
    config = read_json(folder / "posterior_config.json")
    kind = config.get("kind") if isinstance(config, Mapping) else None
    if kind not in POSTERIORS:
        raise DamagedFileError(
            f"Expected a known `kind` of posterior in {folder / 'posterior_config.json'}, but got {kind!r}. "
            f"{did_you_mean(str(kind), POSTERIORS)}"
        )
    tensors, _ = load_tensors(folder / "posterior.safetensors")
    on_device = {key: tensor.to(_device_of(key, parameters)) for key, tensor in tensors.items()}
    if lost := not_finite(tensors):
        raise DamagedFileError(
            f"Expected finite numbers in {folder / 'posterior.safetensors'}, but `{lost}` has others, with which every "
            "answer would be NaN. Train again: in float32 or bfloat16, or with a lower learning rate."
        )
    with _damaged_if_it_fails(folder / "posterior.safetensors"):
        posterior = posterior_from_tensors(kind, on_device)
    _check_of_model(posterior, parameters, f"the posterior in {folder}")
    return posterior


def _device_of(key: str, parameters: Mapping[str, Tensor]) -> torch.device:
    """Return the device of the parameter that a posterior's tensor is of, which its key ends with; else the first's."""
    parts = key.split(".")
    names = (".".join(parts[at:]) for at in range(len(parts)))
    found = next((parameters[name] for name in names if name in parameters), None)
    return (next(iter(parameters.values())) if found is None else found).device


@contextmanager
def _damaged_if_it_fails(path: Path) -> Iterator[None]:
    """Say of whatever goes wrong with what a file holds that it is the file: it could be read, but makes no sense."""
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError
        raise
    except (VarloraError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise DamagedFileError(
            f"What {path} holds does not fit together: {' '.join(str(error).split())[:300]}. "
            "Restore it from a copy, or make it anew."
        ) from error


def _check_of_model(posterior: Posterior, parameters: Mapping[str, nn.Parameter], what: str) -> None:
    for member in getattr(posterior, "members", ()):
        _check_of_model(member, parameters, what)
    if (mean := getattr(posterior, "mean", None)) is not None:
        check_same_parameters(parameters, mean, what)


# --- nested state as safetensors and JSON ---


def save_state(folder: Path, name: str, state: Any) -> None:
    """Write nested dicts, lists and tuples of tensors, arrays and plain values as `name.safetensors` and `name.json`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     save_state(Path(folder), "state", {0: (torch.ones(2), 0.1), "a": [None, True]})
        ...     load_state(Path(folder), "state")
        {0: (tensor([1., 1.]), 0.1), 'a': [None, True]}
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value
            return {"tensor": str(len(tensors) - 1)}
        if isinstance(value, np.ndarray):
            signed = value.astype(np.int64) if value.dtype.kind == "u" else value  # numpy's random state is uint32
            return {"array": plain(torch.from_numpy(signed))["tensor"], "dtype": str(value.dtype)}
        if isinstance(value, Mapping):
            return {"dict": [[plain(key), plain(item)] for key, item in value.items()]}
        if isinstance(value, tuple):
            return {"tuple": [plain(item) for item in value]}
        if isinstance(value, list):
            return [plain(item) for item in value]
        if isinstance(value, (str, int, float, bool, type(None))):
            return value
        raise TypeError(f"Expected tensors and plain values in a state, but got {type(value).__name__}.")

    tree = plain(state)
    save_tensors(folder / f"{name}.safetensors", tensors)
    write_json(folder / f"{name}.json", tree)


def load_state(folder: Path, name: str) -> Any:
    """Read what `save_state` wrote.

    Raises:
        DamagedFileError: a file is absent or damaged.
    """
    tensors, _ = load_tensors(folder / f"{name}.safetensors")

    def value(tree: Any) -> Any:
        if isinstance(tree, list):
            return [value(item) for item in tree]
        if not isinstance(tree, dict):
            return tree
        if "tensor" in tree:
            return tensors[tree["tensor"]]
        if "array" in tree:
            dtype = np.dtype(tree["dtype"])
            if dtype.kind not in "biuf":  # a stranger's texts of a million letters would take all memory
                raise TypeError(f"an array of {dtype} where numbers were expected")
            return tensors[tree["array"]].numpy().astype(dtype)
        if "tuple" in tree:
            return tuple(value(item) for item in tree["tuple"])
        return {value(key): value(item) for key, item in tree["dict"]}

    tree = read_json(folder / f"{name}.json", LARGEST_STATE)
    with _damaged_if_it_fails(folder / f"{name}.json"):
        return value(tree)


# --- training checkpoints ---


def latest_checkpoint(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """Return the newest complete checkpoint of a run, or None if there is none.

    Args:
        run_dir: the run directory.
        warn: told about each newer checkpoint that is not used, and why.
    """
    refused = False
    for path in reversed(_checkpoints(run_dir)):
        try:
            verify_manifest(path)
            _check_trainer_state(path)
        except DamagedFileError as error:
            warn(str(error))
            refused = True
        else:
            if refused:
                warn(f"Going on from {path}.")
            return path
    if refused:
        warn(f"There is no complete checkpoint in {run_dir}: starting from the beginning.")
    return None


def _check_trainer_state(checkpoint: Path) -> None:
    """Raise if the Trainer could not go on from its own state, which it reads by itself."""
    path, usual = checkpoint / "trainer_state.json", vars(TrainerState())
    stored = read_json(path, LARGEST_STATE)
    if isinstance(stored, dict) and (unknown := sorted(stored.keys() - usual.keys())):
        # Not damage, for which the run would begin anew, over checkpoints that are whole.
        raise VarloraError(
            f"Expected {path} as transformers {transformers.__version__} writes it, but it has `{unknown[0]}` as well. "
            "Go on with the version of transformers that wrote it, or train anew in another folder."
        )
    with _damaged_if_it_fails(path):
        state = TrainerState(**stored)
        callbacks: Any = state.stateful_callbacks
        counted = callbacks.get("varlora", {"not_finite": 0})["not_finite"]
        numbers = [name for name, value in usual.items() if isinstance(value, (int, float))]
        fits = {name: isinstance(getattr(state, name), (int, float)) for name in numbers} | {
            "global_step": type(state.global_step) is int and state.global_step == step_of(checkpoint),
            "logging_steps": isinstance(state.logging_steps, (int, float)) and state.logging_steps > 0,
            "train_batch_size": type(state.train_batch_size) is int,
            "best_model_checkpoint": isinstance(state.best_model_checkpoint, str | None),
            "log_history": all(isinstance(entry, dict) for entry in state.log_history),
            "stateful_callbacks": isinstance(callbacks["TrainerControl"], dict) and type(counted) is int,
        }
    if wrong := [name for name, does in fits.items() if not does]:
        found = str(getattr(state, wrong[0]))[:40]
        raise DamagedFileError(f"{path} holds what no Trainer can go on from: `{wrong[0]}` is {found}.")


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written.

    Example:
        >>> step_of(Path("runs/mine/checkpoint-500"))
        500
    """
    return int(checkpoint.name.rpartition("-")[2])


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], checkpoint: Path) -> None:
    """Put a checkpoint's adapter, optimizer state and method's state back, for a run that has no step left to make.

    Raises:
        DamagedFileError: a file is absent or damaged, or of another model; adapter and method's state are as they were.
    """
    found: dict[str, Any] = {}
    _put_back(checkpoint, "method", found.update)
    before = copied(model)
    load_adapter(model, checkpoint)
    try:
        _put_back(checkpoint, "optimizer", optimizer.load_state_dict)
    except DamagedFileError:
        _restore_values(trainable(model), before)
        raise
    state.update(found)


def _put_back(checkpoint: Path, name: str, load: Callable[[Any], Any]) -> None:
    state = load_state(checkpoint, name)
    with _damaged_if_it_fails(checkpoint / f"{name}.json"):
        load(state)


def _checkpoints(run_dir: Path) -> list[Path]:
    """Return a run's checkpoints, complete or not, oldest first."""
    return sorted((path for path in run_dir.glob("checkpoint-*") if STEP.fullmatch(path.name)), key=step_of)


def _rotate(newest: Path, limit: int) -> None:
    """Keep the last `limit` complete checkpoints up to `newest`; one of a later step is of an attempt given up."""
    complete = [path for path in _checkpoints(newest.parent) if (path / MANIFEST).is_file()]
    kept = [path for path in complete if step_of(path) <= step_of(newest)][-max(limit, 1) :]
    for path in _checkpoints(newest.parent):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


class CheckpointTrainer(Trainer):
    """A `Trainer` whose checkpoints are safetensors and JSON with a manifest, and carry a method's state.

    Args:
        method_state: what the method collects while training; a checkpoint's is put into it on resuming.
        warn: told in words what a user should know.
    """

    _is_writing = False

    def __init__(
        self,
        *args: Any,
        method_state: dict[str, Any] | None = None,
        warn: Callable[[str], None] = print,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.method_state = {} if method_state is None else method_state
        self.warn = warn

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model: Any = self.model
        model.save_pretrained(output_dir or self.args.output_dir, state_dict=state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # peft's own loading would turn a 16-bit adapter into a 32-bit one
        chosen = model or self.model
        assert chosen is not None
        load_adapter(chosen, Path(resume_from_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            optimizer, scheduler = self._stateful()
            save_state(Path(output_dir), "optimizer", optimizer.state_dict())
            save_state(Path(output_dir), "scheduler", scheduler.state_dict())
            save_state(Path(output_dir), "method", self.method_state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        optimizer, scheduler = self._stateful()
        _put_back(Path(checkpoint), "optimizer", optimizer.load_state_dict)
        _put_back(Path(checkpoint), "scheduler", scheduler.load_state_dict)
        _put_back(Path(checkpoint), "method", self.method_state.update)

    def _stateful(self) -> tuple[Any, Any]:
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        return self.optimizer, self.lr_scheduler

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            save_state(Path(output_dir), "scaler", scaler.state_dict())

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (Path(checkpoint) / "scaler.json").is_file():
            _put_back(Path(checkpoint), "scaler", self.accelerator.scaler.load_state_dict)

    def _save_rng_state(self, output_dir: str) -> None:
        state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
        state["numpy"] = np.random.get_state()  # noqa: NPY002
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state_all()
        # The Trainer forgets the losses since the last log line, so the next line would differ from an unbroken run's.
        state["loss"] = (self._tr_loss, self._globalstep_last_logged)
        save_state(Path(output_dir), f"rng_state_{self.args.process_index}", state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        name = f"rng_state_{self.args.process_index}"
        if checkpoint is None or not (Path(checkpoint) / f"{name}.json").is_file():
            return
        _put_back(Path(checkpoint), name, self._set_rng_state)

    def _set_rng_state(self, state: dict[str, Any]) -> None:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])  # noqa: NPY002
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available() and "cuda" in state:
            then, now = len(state["cuda"]), torch.cuda.device_count()
            if now < then:
                self.warn(f"There were {then} GPUs before the stop and are {now} now, so bits may differ.")
            torch.cuda.set_rng_state_all(state["cuda"][:now])
        loss, self._globalstep_last_logged = state["loss"]
        self._tr_loss.copy_(loss)

    def _get_output_dir(self, trial: Any) -> str:
        folder = Path(super()._get_output_dir(trial))
        return str(folder / WRITING if self._is_writing else folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        # The Trainer would delete older checkpoints before this one is known to be complete.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        if self.args.should_save:
            shutil.rmtree(run_dir / WRITING, ignore_errors=True)  # of an attempt that was cut short
        self.accelerator.wait_for_everyone()
        self._is_writing = True
        try:
            with told_if_unwritten(run_dir / name):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()  # each rank writes its random state
                if self.args.should_save:
                    complete(run_dir / WRITING / name, run_dir / name)
        finally:
            self._is_writing, self.args.save_total_limit = False, limit
            if self.args.should_save:
                shutil.rmtree(run_dir / WRITING, ignore_errors=True)
        if self.args.should_save and limit is not None:
            _rotate(run_dir / name, limit)
