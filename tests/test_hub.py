"""A pushed adapter is loaded as what it was, by plain PEFT too, and a stranger's files are refused or harmless."""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from helpers import same, save_base
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects
from peft import PeftModel
from transformers import AutoModelForCausalLM

import varlora
from varlora.cli import main
from varlora.config import settings_from
from varlora.errors import ConfigError, DamagedFileError, VarloraError
from varlora.evaluation import calibrate, evaluate
from varlora.export import export
from varlora.files import checksums, file_digest, load_tensors, read_json, save_tensors, write_json
from varlora.hub import FILES, READ, from_pretrained, push_to_hub
from varlora.loading import load
from varlora.params import copied
from varlora.training import train

HfApi, snapshot_download = huggingface_hub.HfApi, huggingface_hub.snapshot_download
NAME, BASE = "me/my-adapter", "someone/tiny-base"
pytestmark = pytest.mark.usefixtures("one_thread")


def silent(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def run_dir(bundled: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A calibrated and evaluated run of a task of one's own, by a base that is a folder."""
    folder = tmp_path_factory.mktemp("hub")
    task = {"name": "signs", "prompt": "Sign of {n}:", "label": "sign", "answers": ["plus", "minus"]}
    rows = "".join(f"{n},{'plus' if n > 0 else 'minus'}\n" for n in range(-20, 20))
    for split in ("train", "dev"):
        (folder / f"{split}.csv").write_text(f"n,sign\n{rows}")
    files = {"train": str(folder / "train.csv"), "dev": str(folder / "dev.csv")}
    (folder / "signs.yaml").write_text(yaml.safe_dump({**task, "files": files}))
    settings = {"task": str(folder / "signs.yaml"), "model": str(bundled), "calibration_fraction": 0.25, "steps": 3}
    method = {"name": "ivon", "ess": 1e4, "hess_init": 1e-2, "lr": 0.1}
    arguments = {"hub_token": "hf_secret", "max_grad_norm": 1.0}
    run = settings_from(
        {**settings, "method": method, "training_arguments": arguments, "run_dir": str(folder / "run")}, stored=True
    )
    train(settings_from({**settings, "method": method, "run_dir": str(folder / "run")}), say=silent)
    config = read_json(folder / "run" / "config.json")
    config["settings"]["training_arguments"] = dict(run.training_arguments)
    write_json(folder / "run" / "config.json", config)
    calibrate(folder / "run", samples=2, say=silent)
    evaluate(folder / "run", samples=2, say=silent)
    return folder / "run"


class Hub:
    """Repositories in a folder, at the boundary where `HfApi` and `snapshot_download` would ask the network.

    Calls have to be such that the library takes them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.made, self.asked = folder, {}, []

    def __getattribute__(self, name: str) -> Any:
        found, real = object.__getattribute__(self, name), getattr(HfApi, name, None)
        if real is None or not callable(found):
            return found

        def checked(*arguments: Any, **settings: Any) -> Any:
            inspect.signature(real).bind(self, *arguments, **settings)
            return found(*arguments, **settings)

        return checked

    def repo_info(self, repo_id: str) -> Any:
        return SimpleNamespace(private=self.made[repo_id])

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool, repo_type: str) -> str:
        assert exist_ok
        self.made.setdefault(repo_id, private)
        (self.folder / repo_id / "main").mkdir(parents=True, exist_ok=True)
        return f"https://huggingface.co/{repo_id}"

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        (self.folder / repo_id / branch).mkdir(exist_ok=exist_ok)

    def upload_folder(self, *, repo_id: str, folder_path: str, revision: str | None, commit_message: str,
                      allow_patterns: list[str], delete_patterns: list[str]) -> None:  # fmt: skip
        target = self.folder / repo_id / (revision or "main")
        for name in filter_repo_objects([p.name for p in target.iterdir()], allow_patterns=delete_patterns):
            (target / name).unlink()
        for name in filter_repo_objects([p.name for p in Path(folder_path).iterdir()], allow_patterns=allow_patterns):
            shutil.copyfile(Path(folder_path) / name, target / name)

    def snapshot_download(self, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        source, target = self.folder / repo_id / (revision or "main"), self.folder / "cache"
        if not source.is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("no such repository")
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        self.asked = list(filter_repo_objects([path.name for path in source.iterdir()], allow_patterns=allow_patterns))
        for name in self.asked:
            (target / name).symlink_to(source / name)  # as the cache has them
        return str(target)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    return made


@pytest.fixture
def pushed(run_dir: Path, tmp_path: Path) -> Path:
    """A folder with the files of a repository, for a test to change."""
    push_to_hub(run_dir, NAME, base_model=BASE, folder=tmp_path / "pushed", say=silent)
    return tmp_path / "pushed"


def resealed(folder: Path) -> Path:
    """Write the checksums anew, as a stranger would who changes files."""
    for name in ("manifest.json", "calibration.json"):
        (folder / name).unlink(missing_ok=True)
    listed = checksums(folder)
    write_json(folder / "manifest.json", {n: d for n, d in listed.items() if n in READ})
    return folder


def changed(folder: Path, **settings: Any) -> Path:
    facts = read_json(folder / "varlora.json")
    facts["settings"] |= settings
    write_json(folder / "varlora.json", facts)
    return resealed(folder)


@pytest.fixture
def edited(run_dir: Path, tmp_path: Path) -> Path:
    """A copy of the run, whose task file was changed after it was trained."""
    copied = shutil.copytree(run_dir, tmp_path / "edited")
    config = read_json(copied / "config.json")
    task = yaml.safe_load(Path(config["settings"]["task"]).read_text())
    other = tmp_path / "signs.yaml"
    other.write_text(yaml.safe_dump({**task, "prompt": "Is {n} plus or minus?", "answers": ["minus", "plus"]}))
    config["settings"] |= {"task": str(other), "revision": "abc123"}
    write_json(copied / "config.json", config)
    return copied


def test_metrics_of_before_the_calibration_are_said_to_be(run_dir: Path, tmp_path: Path) -> None:
    copied, said = shutil.copytree(run_dir, tmp_path / "copied"), []
    push_to_hub(copied, NAME, base_model=BASE, folder=tmp_path / "one", say=said.append)
    assert not [words for words in said if "calibrated after" in words]
    (copied / "predictions-calibrated.safetensors").unlink()  # as `calibrate` leaves it
    push_to_hub(copied, NAME, base_model=BASE, folder=tmp_path / "other", say=said.append)
    assert [words for words in said if "calibrated after it was evaluated" in words and "varlora evaluate" in words]


# --- there and back ---


def test_what_is_pushed_is_loaded_as_it_was(run_dir: Path, bundled: Path, hub: Hub) -> None:
    said: list[str] = []
    where = varlora.push_to_hub(run_dir, NAME, private=True, base_model=BASE, say=silent)
    assert where == f"https://huggingface.co/{NAME}"
    assert hub.made == {NAME: True}
    found, was = varlora.from_pretrained(NAME, model=str(bundled), say=said.append), load(run_dir)
    assert BASE in said[0]
    assert set(hub.asked) == set(READ) == set(FILES) - {"README.md", "reliability.png"}
    assert same(found.posterior.tensors(), was.posterior.tensors())
    assert same(copied(found.model), copied(was.model))
    assert found.calibration == was.calibration is not None
    for name in ("lora", "max_length", "chat", "method", "seed", "steps", "calibration_fraction"):
        assert getattr(found.settings, name) == getattr(was.settings, name)
    assert found.settings.model == BASE
    model, posterior = found
    assert isinstance(posterior, varlora.DiagonalGaussian)
    assert not model.training


def test_what_is_to_be_private_is_not_uploaded_for_all_to_see(run_dir: Path, hub: Hub) -> None:
    push_to_hub(run_dir, NAME, base_model=BASE, say=silent)
    before = {path: path.stat().st_mtime_ns for path in (hub.folder / NAME / "main").iterdir()}
    with pytest.raises(VarloraError, match="it is public, so nothing was uploaded"):
        push_to_hub(run_dir, NAME, private=True, base_model=BASE, say=silent)
    assert {path: path.stat().st_mtime_ns for path in (hub.folder / NAME / "main").iterdir()} == before
    push_to_hub(run_dir, "me/other", private=True, base_model=BASE, say=silent)
    push_to_hub(run_dir, "me/other", private=True, base_model=BASE, say=silent)


def test_a_branch_and_what_an_earlier_push_left(run_dir: Path, bundled: Path, hub: Hub, tmp_path: Path) -> None:
    push_to_hub(run_dir, NAME, base_model=BASE, revision="v1", say=silent)
    assert from_pretrained(NAME, revision="v1", model=str(bundled), say=silent).calibration is not None
    plain = Path(shutil.copytree(run_dir, tmp_path / "plain"))
    (plain / "adapter" / "calibration.json").unlink()
    push_to_hub(plain, NAME, base_model=BASE, revision="v1", say=silent)
    assert from_pretrained(NAME, revision="v1", model=str(bundled), say=silent).calibration is None
    with pytest.raises(VarloraError, match="The hub has no me/my-adapter at v2"):
        from_pretrained(NAME, revision="v2", say=silent)


def test_plain_peft_loads_the_mean(pushed: Path, run_dir: Path, bundled: Path) -> None:
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bundled), pushed)
    expected = copied(load(run_dir).model)
    found = {name: value for name, value in plain.named_parameters() if name in expected}
    assert same(found, expected)
    assert read_json(pushed / "adapter_config.json")["base_model_name_or_path"] == BASE


def test_files_and_splits_may_have_names_that_a_repository_cannot(run_dir: Path, bundled: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(run_dir, tmp_path / "run")
    task = yaml.safe_load((copied / "task.yaml").read_text())
    files = {"train": "tr/d.csv", "dev/a": "de/d.csv"}
    (copied / "task.yaml").write_text(yaml.safe_dump({**task, "files": files, "evaluation": "dev/a"}))
    push_to_hub(copied, NAME, base_model=BASE, folder=tmp_path / "pushed", say=silent)
    assert from_pretrained(tmp_path / "pushed", model=str(bundled), say=silent).settings.method == "ivon"
    stored = yaml.safe_load((tmp_path / "pushed" / "task.yaml").read_text())["files"]
    assert stored == {"dev/a": "0-d.csv", "train": "1-d.csv"}


def test_the_folder_may_be_the_one_that_one_is_in(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert push_to_hub(run_dir, NAME, base_model=BASE, folder=".", say=silent) == str(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)


def test_nothing_of_the_machine_is_pushed(pushed: Path, run_dir: Path, bundled: Path) -> None:
    assert {path.name for path in pushed.iterdir()} == set(FILES)
    for path in pushed.iterdir():
        content = path.read_bytes()
        for private in (str(run_dir.parent), str(bundled), "hf_secret", '"machine"'):
            assert private.encode() not in content, path.name
    assert yaml.safe_load((pushed / "task.yaml").read_text())["files"] == {"train": "train.csv", "dev": "dev.csv"}


def test_the_card_may_be_edited_and_nothing_else(pushed: Path, bundled: Path) -> None:
    (pushed / "README.md").write_text("Mine.")
    from_pretrained(pushed, model=str(bundled), say=silent)
    for name in ("adapter_model.safetensors", "posterior.safetensors", "varlora.json", "task.yaml"):
        content = (pushed / name).read_bytes()
        (pushed / name).write_bytes(content + b" ")
        with pytest.raises(DamagedFileError, match=name):
            from_pretrained(pushed, model=str(bundled), say=silent)
        (pushed / name).write_bytes(content)
    (pushed / "calibration.json").write_text(json.dumps({"tau": 9, "adapter": "of another"}))
    with pytest.raises(DamagedFileError, match="of another adapter"):
        from_pretrained(pushed, model=str(bundled), say=silent)


# --- what is refused ---


def test_a_posterior_of_another_base_is_refused_by_name(pushed: Path, bundled: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(bundled, tmp_path / "other"))
    model = AutoModelForCausalLM.from_pretrained(bundled)
    with torch.no_grad():
        model.get_input_embeddings().weight += 1
    model.save_pretrained(other)
    with pytest.raises(DamagedFileError, match=f"adapter of {BASE}, .*{other} to be what .*pushed was trained with"):
        from_pretrained(pushed, model=str(other), say=silent)
    with pytest.raises(DamagedFileError, match=f"adapter of {BASE}, .*to be of this model"):
        from_pretrained(pushed, model=str(save_base(tmp_path / "smaller")), say=silent)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"model": "../../etc"}, "a name on the hub"),
        ({"model": "/elsewhere/base"}, "a name on the hub"),
        ({"task": "/etc/passwd.yaml"}, "a task's name"),
        ({"task": "../task.yaml"}, "a task's name"),
        ({"task": "nothing"}, "a task's name"),
        ({"task": "mine.yaml"}, "a task's name"),
        ({"task": ["boolq"]}, "a task's name"),
        ({"lora": {"rank": 10**9}}, "rank"),
        ({"method": "backdoor"}, "Unknown method"),
        ({"code": "import os"}, "Unknown setting"),
    ],
)
def test_a_strangers_settings_are_data(
    pushed: Path, settings: dict[str, Any], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(pushed / "task.yaml", "mine.yaml")  # of another, and none of the repository's
    with pytest.raises((ConfigError, DamagedFileError), match=why):
        from_pretrained(changed(pushed, **settings), say=silent)


def test_a_strangers_weights_may_have_no_shape(pushed: Path) -> None:
    weights, metadata = load_tensors(pushed / "adapter_model.safetensors")
    name = next(name for name in weights if ".lora_A." in name)
    save_tensors(pushed / "adapter_model.safetensors", weights | {name: torch.tensor(1.0)}, metadata)
    with pytest.raises(DamagedFileError, match="rank"):
        from_pretrained(resealed(pushed), say=silent)


def test_a_strangers_task_may_be_a_bomb(pushed: Path) -> None:
    (pushed / "task.yaml").write_text("a: &a [x]\nfiles: *a\n")
    with pytest.raises(ConfigError, match="without aliases"):
        from_pretrained(resealed(pushed), say=silent)


def test_a_strangers_files_stay_in_their_folder(pushed: Path, bundled: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    listed = read_json(pushed / "manifest.json")
    write_json(pushed / "manifest.json", {**listed, "../secret": file_digest(tmp_path / "secret")})
    with pytest.raises(DamagedFileError, match="no others"):
        from_pretrained(pushed, model=str(bundled), say=silent)
    write_json(pushed / "manifest.json", {n: d for n, d in listed.items() if n != "posterior.safetensors"})
    with pytest.raises(DamagedFileError, match="no others"):
        from_pretrained(pushed, model=str(bundled), say=silent)
    task = yaml.safe_load((pushed / "task.yaml").read_text())
    (pushed / "task.yaml").write_text(yaml.safe_dump({**task, "files": {"train": "../x.csv", "dev": "/etc/x.csv"}}))
    with pytest.raises(DamagedFileError, match="plain file names"):
        from_pretrained(resealed(pushed), model=str(bundled), say=silent)


def test_what_cannot_be_pushed_or_loaded_is_said(run_dir: Path, tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(VarloraError, match="--base-model"):
        push_to_hub(run_dir, NAME, say=silent)
    for name in ("a/b/c", "../me", "me/..", "me/my adapter"):
        with pytest.raises(VarloraError, match="a name on the hub"):
            push_to_hub(run_dir, name, base_model=BASE, say=silent)
    with pytest.raises(VarloraError, match="a name on the hub"):
        push_to_hub(run_dir, NAME, base_model="a folder/of mine", say=silent)
    with pytest.raises(VarloraError, match="new or empty"):
        push_to_hub(run_dir, NAME, base_model=BASE, folder=run_dir, say=silent)
    with pytest.raises(VarloraError, match="did not make it"):
        from_pretrained(run_dir / "adapter", say=silent)
    for missing in (tmp_path / "gone", "./gone", "/gone/too", "a/b/c"):
        with pytest.raises(VarloraError, match="There is no folder"):
            from_pretrained(missing, say=silent)
    with pytest.raises(VarloraError, match="The hub has no who/what"):
        from_pretrained("who/what", say=silent)


def test_a_hub_that_is_not_reached_or_refuses_is_said(run_dir: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the library's own errors: no one listens at port 9."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    gone = HfApi(endpoint="http://127.0.0.1:9", token=False)
    with pytest.raises(Exception) as raised:  # noqa: PT011
        gone.create_repo(NAME, private=False)
    assert not isinstance(raised.value, OSError)
    monkeypatch.setattr(hub, "create_repo", gone.create_repo)
    with pytest.raises(VarloraError, match="Is the network there"):
        push_to_hub(run_dir, NAME, base_model=BASE, say=silent)

    def nowhere(*arguments: Any, **settings: Any) -> str:
        return str(snapshot_download(*arguments, endpoint="http://127.0.0.1:9", token=False, **settings))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", nowhere)
    with pytest.raises(VarloraError, match="it cannot be asked"):
        from_pretrained("who/what", say=silent)

    def refused(*arguments: Any, **settings: Any) -> None:
        request = raised.value.request  # of the same HTTP library
        response = importlib.import_module(type(request).__module__.partition(".")[0]).Response(401, request=request)
        raise HfHubHTTPError("401 Unauthorized", response=response)

    monkeypatch.setattr(hub, "create_repo", refused)
    with pytest.raises(VarloraError, match=r"401 Unauthorized.*hf auth login"):
        push_to_hub(run_dir, NAME, base_model=BASE, say=silent)


def test_a_task_file_that_was_changed_since_does_not_change_a_run(
    edited: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it answers, and what is published of it, is as it was trained."""
    (tmp_path / "rows.csv").write_text("n\n3\n-4\n")
    said = []
    for run in (run_dir, edited):
        assert main(["predict", str(run), "--input", str(tmp_path / "rows.csv")]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert "plus" in said[0]
    push_to_hub(edited, NAME, base_model=BASE, folder=tmp_path / "pushed", say=silent)
    (edited / "predictions.safetensors").unlink()
    exported = export(edited, tmp_path / "exported", samples=0, say=silent)
    assert [answer["answer"] for answer in exported["answers"][0]] == ["plus", "minus"]
    assert "Sign of" in (tmp_path / "exported" / "example.jsonl").read_text()
    kept = yaml.safe_load((tmp_path / "pushed" / "task.yaml").read_text())
    assert (kept["prompt"], kept["answers"]) == ("Sign of {n}:", ["plus", "minus"])


def test_the_revision_of_another_base_is_not_pushed(edited: Path, tmp_path: Path) -> None:
    push_to_hub(edited, NAME, base_model=BASE, folder=tmp_path / "pushed", say=silent)
    stored = read_json(tmp_path / "pushed" / "adapter_config.json")
    assert (stored["base_model_name_or_path"], stored["revision"]) == (BASE, None)
    assert read_json(tmp_path / "pushed" / "varlora.json")["settings"]["revision"] is None
