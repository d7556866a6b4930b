"""Share an adapter with its posterior on the Hugging Face hub, and load one from there.

A pushed repository has PEFT's files at its root, so that plain PEFT loads the mean, and varlora's beside them:

| file | what |
| --- | --- |
| `adapter_model.safetensors`, `adapter_config.json` | the mean, as PEFT reads it |
| `posterior.safetensors`, `posterior_config.json` | the posterior |
| `varlora.json` | settings, without anything of the machine; checksum of the base; versions |
| `task.yaml` | the task file, of a task of one's own |
| `manifest.json` | checksums of all of these |
| `calibration.json` | how the posterior is to be used, if that was chosen |
| `README.md`, `reliability.png` | the model card, which may be edited: in no manifest |

What comes from a repository is data from a stranger. Only files of these names are asked for; safetensors, JSON and
the task's YAML are read, and nothing is run; PEFT's configuration is not read at all, as the settings make the adapter.
Checksums say that a file is whole, not that it can be trusted.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from varlora.calibration import FILE as CALIBRATION
from varlora.calibration import load_calibration
from varlora.card import PICTURE, model_card
from varlora.config import TASK_FILE, Settings, settings_from
from varlora.errors import ConfigError, DamagedFileError, VarloraError
from varlora.files import (
    MANIFEST,
    atomic_folder,
    checksums,
    file_digest,
    read_json,
    verify_manifest,
    write_bytes,
    write_json,
    write_text,
)
from varlora.loading import Loaded, kept_task, load_parts, trained_settings
from varlora.predictions import CALIBRATED
from varlora.run import origin
from varlora.tasks import TASKS, get_task, is_task_file

__all__ = ["FILES", "from_pretrained", "push_to_hub"]

Say = Callable[[str], None]

ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "posterior.safetensors", "posterior_config.json")
FACTS, CARD = "varlora.json", "README.md"
READ = (*ADAPTER, FACTS, TASK_FILE, MANIFEST, CALIBRATION)
"""All that is downloaded."""
FILES = (*READ, CARD, PICTURE)
"""All that is uploaded."""
BASE = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
UNREACHED: tuple[Any, ...] = HfHubHTTPError.__bases__
"""OSError and the HTTP library's own error, of which its ConnectError is one: which library depends on the version."""
KEPT = ("versions", "commit", "task_version", "prompt_version", "base", "training_rows", "cut")
"""Of a run's config.json: what is true on any machine."""


def push_to_hub(
    run_dir: str | Path,
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    base_model: str | None = None,
    folder: str | Path | None = None,
    say: Say = print,
) -> str:
    """Upload a run's adapter, posterior, calibration and model card to the hub.

    Args:
        run_dir: a trained run; evaluated, if the card is to have metrics.
        name: of the repository, `user/name`; it is made if absent.
        private: only its owner sees it; one that is there already and is public is refused.
        revision: branch to upload to, made if absent; left out: the main branch.
        base_model: the base's name on the hub; left out: the run's, if that is one.
        folder: write the files here instead, and upload nothing.
        say: told in words what a user should know.

    Returns:
        Where it is: an address, or the folder.

    Raises:
        VarloraError: the run is not finished, a name is none, the base's is not known, or the hub refuses or is not
            reached.

    Example:
        >>> where = {"base_model": "me/base", "folder": scratch / "pushed"}  # without `folder` it is uploaded
        >>> folder = push_to_hub(run_dir, "me/mine", **where, say=lambda words: None)  # a run that `train` made
        >>> sorted(path.name for path in Path(folder).glob("*.safetensors"))
        ['adapter_model.safetensors', 'posterior.safetensors']
    """
    run_dir = Path(run_dir)
    _check_name("name", name, "me/my-adapter")
    settings = trained_settings(run_dir)
    if base_model is None and (Path(settings.model).is_dir() or not BASE.fullmatch(settings.model)):
        raise VarloraError(
            f"The base {settings.model} is a folder here, which says nothing to others. Pass `--base-model` with its "
            "name on the hub, such as meta-llama/Llama-3.2-1B."
        )
    if base_model is not None and base_model != settings.model:
        settings = dataclasses.replace(settings, model=base_model, revision=None)  # which is of the other base
    settings = dataclasses.replace(settings, task=kept_task(run_dir, settings))
    _check_name("base_model", settings.model, "meta-llama/Llama-3.2-1B")
    chosen, as_chosen = run_dir / "adapter" / CALIBRATION, run_dir / f"predictions{CALIBRATED}.safetensors"
    if not (run_dir / "predictions.safetensors").is_file():
        say(f"{run_dir} is not evaluated, so its card has no metrics. `varlora evaluate {run_dir}` gives them.")
    elif chosen.is_file() and not as_chosen.is_file():
        say(
            f"{run_dir} was calibrated after it was evaluated: its card has no metrics of it as it will be used. "
            f"`varlora evaluate {run_dir}` gives them."
        )
    if folder is not None:
        folder = Path(folder).resolve()  # `.` has no name, and what a link leads to is meant
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise VarloraError(f"Expected `folder` to be new or empty, but {folder} is not. Choose another name.")
        with atomic_folder(folder, lambda made: None, then="try again") as temporary:
            _lay_out(run_dir, name, settings, temporary)
        return str(folder)
    with tempfile.TemporaryDirectory() as scratch:
        _lay_out(run_dir, name, settings, Path(scratch))
        api = huggingface_hub.HfApi()
        try:
            address = api.create_repo(name, private=private, exist_ok=True, repo_type="model")
            if private and not api.repo_info(name).private:
                raise VarloraError(
                    f"Expected {name} to be private, but it is public, so nothing was uploaded. Make it private in its "
                    "settings on the hub, choose another name, or leave out `--private`."
                )
            if revision is not None:
                api.create_branch(name, branch=revision, exist_ok=True)
            api.upload_folder(
                repo_id=name,
                folder_path=scratch,
                revision=revision,
                commit_message=f"{settings.method} on {get_task(settings.task).name}",
                allow_patterns=list(FILES),
                delete_patterns=list(FILES),  # a calibration of an earlier run, say
            )
        except UNREACHED as error:
            raise VarloraError(
                f"The hub did not take {name}: {' '.join(str(error).split())[:300]}. Is the network there? Log in by "
                "`hf auth login` with a token that may write there."
            ) from error
    return str(address)


def _check_name(what: str, name: str, example: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise VarloraError(f"Expected `{what}` to be a name on the hub such as {example}, but got {name!r}.") from error


def _lay_out(run_dir: Path, name: str, settings: Settings, folder: Path) -> None:
    """Write the files of a repository."""
    adapter, config = run_dir / "adapter", read_json(run_dir / "config.json")
    verify_manifest(adapter)
    for file in ADAPTER:
        shutil.copyfile(adapter / file, folder / file)
    peft = read_json(folder / ADAPTER[0]) | {"base_model_name_or_path": settings.model, "revision": settings.revision}
    write_json(folder / ADAPTER[0], peft)
    card, picture = model_card(run_dir, name, settings)
    plain = settings.to_dict()
    # paths are of this machine, and a training argument may be a token
    plain |= {"data_dir": None, "run_dir": None, "sources": _numbered(settings.sources)}
    arguments = settings.training_arguments.items()
    plain["training_arguments"] = {key: value for key, value in arguments if isinstance(value, (bool, int, float))}
    if is_task_file(settings.task):
        text = yaml.safe_load(Path(settings.task).read_text(encoding="utf-8"))
        names = {split: Path(file).name for split, file in text["files"].items()}
        if len(set(names.values())) < len(names):  # in different folders
            names = {split: f"{number}-{names[split]}" for number, split in enumerate(names)}
        text["files"] = names
        write_text(folder / TASK_FILE, yaml.safe_dump(text, sort_keys=False, allow_unicode=True))
        plain["task"] = TASK_FILE
    facts = {"settings": plain, **{key: config[key] for key in KEPT if key in config}}
    sources = [{"method": source.get("method")} for source in config.get("concluded_from") or []]
    write_json(folder / FACTS, facts | {"concluded_from": sources, "pushed": _elsewhere(origin())})
    write_json(folder / MANIFEST, checksums(folder))
    chosen = load_calibration(adapter)
    if chosen is not None:
        stored = read_json(adapter / CALIBRATION)
        write_json(folder / CALIBRATION, _elsewhere(stored) | {"adapter": file_digest(folder / MANIFEST)})
    write_text(folder / CARD, card)
    if picture is not None:
        write_bytes(folder / PICTURE, picture)


def _elsewhere(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return where a result comes from, without the machine."""
    return {key: value for key, value in facts.items() if key != "machine"}


def _numbered(sources: Any) -> list[str]:
    """Return names for the runs that a run was built on: that there were some matters, where they lay does not."""
    return [f"source-{index}" for index, _ in enumerate(sources if isinstance(sources, (list, tuple)) else ())]


def from_pretrained(
    name_or_path: str | Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    device: str | None = None,
    say: Say = print,
) -> Loaded:
    """Load an adapter with its posterior from the hub: what `varlora.load` gives of the run that was pushed.

    Args:
        name_or_path: a repository, `user/name`, or a folder with its files.
        model: the base, if it is to come from elsewhere; it has to be the same one.
        revision: branch, tag or commit of the repository; left out: the main branch.
        device: where to load it to; left out: the current GPU, else the CPU.
        say: told the base's name before it is loaded.

    Returns:
        What `varlora.load` returns: the model at the posterior mean, the posterior, and the rest as fields.

    Raises:
        DamagedFileError: a file is absent, altered, or of another base.
        VarloraError: there is no such repository, it is none of varlora's, or its base cannot be loaded.

    Example:
        >>> from varlora.demo.base import BUNDLED
        >>> where = {"base_model": "me/base", "folder": scratch / "pushed-too"}
        >>> folder = push_to_hub(run_dir, "me/mine", **where, say=lambda words: None)  # or "me/mine" itself, of the hub
        >>> model, posterior = from_pretrained(folder, model=str(BUNDLED / "base"), say=lambda words: None)
        >>> posterior
        Point(16,384 weights)
    """
    folder = _folder(name_or_path, revision)
    facts, settings = _checked(folder, str(name_or_path), model)
    say(f"{name_or_path} is an adapter of {settings.model}" + (f", which is loaded from {model}." if model else "."))
    try:
        return load_parts(settings, folder, facts.get("base"), name=str(name_or_path), model=model, device=device)
    except DamagedFileError as error:
        raise DamagedFileError(
            f"{name_or_path} is an adapter of {settings.model}, and was not loaded. {error}"
        ) from error


def _folder(name_or_path: str | Path, revision: str | None) -> Path:
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    name = str(name_or_path)
    if isinstance(name_or_path, Path) or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise VarloraError(f"There is no folder {name}.")
    _check_name("name_or_path", name, "me/my-adapter")
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(READ)))
    except UNREACHED as error:
        raise VarloraError(
            f"The hub has no {name}{f' at {revision}' if revision else ''}, or it cannot be asked: "
            f"{' '.join(str(error).split())[:300]}. A private one needs `hf auth login`."
        ) from error


def _checked(folder: Path, name: str, model: str | None) -> tuple[Mapping[str, Any], Settings]:
    """Check a repository's files, as far as that goes without its base."""
    if not (folder / FACTS).is_file():
        raise VarloraError(
            f"{name} has no {FACTS}: `varlora push` did not make it. A plain adapter is loaded by PEFT, a run by "
            "`varlora.load`."
        )
    listed, facts = read_json(folder / MANIFEST), read_json(folder / FACTS)
    if not isinstance(listed, Mapping) or not {*ADAPTER, FACTS} <= {*listed} <= {*READ}:
        raise DamagedFileError(f"Expected {folder / MANIFEST} to list the files of an adapter, and no others.")
    if (folder / TASK_FILE).exists() and TASK_FILE not in listed:
        raise DamagedFileError(f"{folder / TASK_FILE} is in no manifest, so it is not used. Remove it.")
    verify_manifest(folder)
    stored = facts.get("settings") if isinstance(facts, Mapping) else None
    if not isinstance(stored, Mapping) or not isinstance(facts.get("base", ""), str):
        raise DamagedFileError(f"Expected settings in {folder / FACTS}, but there are none.")
    own = stored.get("task") == TASK_FILE
    if not (TASK_FILE in listed if own else isinstance(stored.get("task"), str) and stored["task"] in TASKS):
        raise DamagedFileError(
            f"Expected a task's name in {folder / FACTS}, or its own {TASK_FILE}, but got {stored.get('task')!r:.80}. "
            f"Known: {', '.join(TASKS)}."
        )
    here: dict[str, Any] = {"task": str(folder / TASK_FILE) if own else stored.get("task"), "data_dir": None}
    here |= {"run_dir": None, "sources": _numbered(stored.get("sources"))}
    try:
        settings = settings_from({**stored, **here}, stored=True)
    except ConfigError as error:
        raise ConfigError(f"{name}: {problem[:500]}" for problem in error.problems[:20]) from error
    files = get_task(settings.task).files.values() if own else ()
    if any(Path(file).name != file or "\\" in file for file in files):
        raise DamagedFileError(f"Expected plain file names in {folder / TASK_FILE}, but got {', '.join(files)[:200]}.")
    if model is None and not BASE.fullmatch(settings.model):
        raise DamagedFileError(
            f"Expected the base of {name} to be a name on the hub, but got {settings.model!r:.200}. If you know the "
            "base, pass it as `model`."
        )
    _check_rank(folder / ADAPTER[1], settings)
    return facts, settings


def _check_rank(path: Path, settings: Settings) -> None:
    """Refuse settings of another rank than the weights have, before an adapter of any size is made of them."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys() if ".lora_A." in name]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(f"Expected safetensors in {path}, but it is damaged or cut short ({error}).") from error
    ranks = {shape[0] if shape else 0 for shape in shapes}
    if ranks != {settings.lora.rank}:
        raise DamagedFileError(
            f"Expected an adapter of rank {settings.lora.rank} in {path}, as {FACTS} says, but got {sorted(ranks)[:9]}."
        )
