"""The grid: what waits for what, what is not repeated, what a failure or a dead worker costs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from functools import partial
from multiprocessing import active_children
from pathlib import Path

import psutil
import pytest
import torch

from varlora import grid
from varlora.config import settings_from
from varlora.demo.run import one_thread
from varlora.errors import Interrupted, VarloraError
from varlora.files import save_tensors, write_json
from varlora.grid import Cell, Outcome, Processes, RayTasks, run_cell, run_cells

STEPS = 200  # long enough to be killed in


def cell(folder: Path, name: str, *after: str, **evaluation) -> Cell:
    settings = {"task": "boolq", "run_dir": str(folder / name), "sources": [str(folder / one) for one in after]}
    return Cell(settings, evaluation)


class Fake:
    """A launcher with room for two cells, which end in the order in which they began, as they were told to."""

    def __init__(self, **ends: str | None) -> None:
        self.ends = {name: deque(end.split("|")) for name, end in ends.items()}
        self.begun: list[str] = []
        self.running: deque[Cell] = deque()
        self.stopped = False

    def submit(self, cell: Cell) -> int:
        self.begun.append(cell.run_dir.name)
        self.running.append(cell)
        return id(cell)

    def finished(self) -> tuple[int, Outcome | None]:
        cell = self.running.popleft()
        end = self.ends.get(cell.run_dir.name, deque([""])).popleft()
        return id(cell), None if end == "killed" else Outcome(str(cell.run_dir), 1.0, end)

    def stop(self) -> None:
        self.stopped = True


def ended(cells: list[Cell], launcher: Fake) -> dict[str, str]:
    return {Path(outcome.run_dir).name: outcome.failed for outcome in run_cells(cells, lambda: launcher)}


def test_a_cell_waits_for_those_that_it_builds_on(tmp_path):
    launcher = Fake()
    cells = [cell(tmp_path, "swa", "swag"), cell(tmp_path, "swag", "adamw"), cell(tmp_path, "adamw")]
    assert ended(cells, launcher) == {"adamw": "", "swag": "", "swa": ""}
    assert launcher.begun == ["adamw", "swag", "swa"]
    assert launcher.stopped


def test_a_failure_stops_only_what_builds_on_it(tmp_path):
    launcher = Fake(adamw="no memory")
    first = [cell(tmp_path, name) for name in ("adamw", "ivon")]
    cells = [cell(tmp_path, "swa", "swag"), cell(tmp_path, "swag", "adamw"), *first]
    found = ended(cells, launcher)
    assert found["adamw"] == "no memory"
    assert found["ivon"] == ""
    assert f"{tmp_path / 'adamw'}, which it builds on, failed." in found["swag"]
    assert f"{tmp_path / 'swag'}, which it builds on, failed." in found["swa"]
    assert launcher.begun == ["adamw", "ivon"]


def test_a_dead_worker_costs_one_more_attempt(tmp_path):
    launcher = Fake(once="killed|", always="killed|killed|")
    found = ended([cell(tmp_path, name) for name in ("once", "always", "fine")], launcher)
    assert found == {
        "once": "",
        "always": "Its worker ended 2 times without an answer. Is there enough memory?",
        "fine": "",
    }
    assert launcher.begun == ["once", "always", "fine", "once", "always"]


def test_what_is_done_is_not_repeated(tmp_path):
    """Done is: adapter, metrics and every further prediction that is asked for, made as it is asked for."""
    (tmp_path / "done" / "adapter").mkdir(parents=True)
    (tmp_path / "done" / "metrics.json").touch()
    made = {"samples": "10", "tau": "1.0", "seed": "0", "task": "boolq", "split": "dev"}

    def evaluated(name: str, **changes: str) -> None:
        path = tmp_path / "done" / f"{name}.safetensors"
        save_tensors(path, {"x": torch.zeros(1)}, {**made, **changes})

    evaluated("predictions")
    evaluated("predictions-tau-0.5", tau="0.5")
    assert not cell(tmp_path, "done").missing()
    assert not cell(tmp_path, "done", samples=10, taus=[0.5]).missing()
    assert cell(tmp_path, "done", samples=10, taus=[0.5, 1.5]).missing()
    assert cell(tmp_path, "done", samples=50).missing()
    assert cell(tmp_path, "done", samples=10, ood=["boolq"]).missing()
    assert cell(tmp_path, "done", samples=10, split="calibration").missing()
    assert ended([cell(tmp_path, "done", samples=10)], None) == {}  # nothing is launched
    by_hand = ({"tau": "8.0"}, {"seed": "9"}, {"split": "train"}, {"task": "obqa"}, {"noise": "latin"})
    for changes in ({"last_layers": "2"}, *by_hand):
        evaluated("predictions", **changes)
        assert cell(tmp_path, "done", samples=10).missing()


def test_predictions_of_rows_that_have_changed_are_made_again(tmp_path):
    """Of each task by its own checksum; predictions of an older version have none, and are taken for good."""
    (tmp_path / "done" / "adapter").mkdir(parents=True)
    (tmp_path / "done" / "metrics.json").touch()
    made = {"samples": "10", "tau": "1.0", "seed": "0", "split": "dev"}
    rows = {"boolq": "own", "openbookqa": "other"}
    wanted = Cell(cell(tmp_path, "done").settings, {"samples": 10, "ood": ["openbookqa"]}, rows)

    def predicted(**data: str) -> None:
        for end, task in (("", "boolq"), ("-ood-openbookqa", "openbookqa")):
            meta = {**made, "task": task, **({"data": data[task]} if task in data else {})}
            save_tensors(tmp_path / "done" / f"predictions{end}.safetensors", {"x": torch.zeros(1)}, meta)

    for data, missing in (
        ({}, False),
        (rows, False),
        ({**rows, "boolq": "changed"}, True),
        ({**rows, "openbookqa": "changed"}, True),
    ):
        predicted(**data)
        assert wanted.missing() == missing
    predicted(**rows)
    (tmp_path / "done" / "metrics.json").unlink()
    assert wanted.missing()


def test_a_run_is_evaluated_with_the_data_and_the_base_where_they_are_now(settings, tmp_path, monkeypatch):
    """Both may have been moved since it was trained."""
    asked = []
    monkeypatch.setattr(grid, "train", lambda wanted, **_: wanted.folder)
    monkeypatch.setattr(grid, "evaluate", lambda run_dir, **how: asked.append((how["data_dir"], how["model"])))
    then = settings_from({**settings, "run_dir": str(tmp_path / "run")}).to_dict()
    write_json(tmp_path / "run" / "config.json", {"settings": {**then, "model": "where it was"}})
    now = {**then, "data_dir": str(tmp_path)}
    assert not run_cell(now, {"samples": 2}).failed
    write_json(tmp_path / "run" / "config.json", {"settings": then})
    assert not run_cell(now, {"samples": 2}).failed
    assert asked == [(str(tmp_path), settings["model"]), (str(tmp_path), None)]


@pytest.fixture(scope="module")
def settings(bundled) -> dict:
    return {
        "task": str(bundled.parent / "tasks" / "true_or_false.yaml"),
        "model": str(bundled),
        "steps": STEPS,
        "batch_size": 2,
        "checkpoint_every": 40,
        "calibration_fraction": 0.0,
        "method": {"name": "adamw", "lr": 1e-3},
    }


def trained(settings: dict, run_dir: Path, **changes) -> Cell:
    return Cell(settings_from({**settings, "run_dir": str(run_dir), **changes}).to_dict())


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory) -> bytes:
    """The adapter of a run that was left alone."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    with one_thread():
        outcome = run_cell(trained(settings, run_dir).settings, {})
    assert not outcome.failed
    return adapter(run_dir)


def adapter(run_dir: Path) -> bytes:
    return (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def kill_after_a_checkpoint(run_dir: Path, pids, number: int = signal.SIGKILL) -> threading.Thread:
    """Signal the worker as soon as the run has a checkpoint."""

    def wait() -> None:
        while not (run_dir / "checkpoint-40" / "manifest.json").exists():
            time.sleep(0.02)
        for pid in pids():
            os.kill(pid, number)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_process_that_dies_is_replaced_and_leaves_its_neighbour_alone(settings, alone, tmp_path):
    """Two at a time: the one that is killed goes on in a new process, the other in the one that it has.

    And a failing one is reported beside; the finished ones are whole.
    """
    names, killed, left = ("one", "other"), [], []

    def one_of_them() -> list[int]:
        pids = [process.pid for process in active_children()]
        killed.append(pids[0])
        left.extend(pids[1:])
        return killed

    killer = kill_after_a_checkpoint(tmp_path / "one", one_of_them)
    bad = trained(settings, tmp_path / "bad", model=str(tmp_path / "absent"))
    cells = [*(trained(settings, tmp_path / name) for name in names), bad]
    found, alive = {}, []
    for outcome in run_cells(cells, partial(Processes, 2, 1)):
        found[Path(outcome.run_dir).name] = outcome.failed
        alive += [process.pid for process in active_children()]
    killer.join()
    assert len(left) == 1
    assert left[0] in alive
    assert killed[0] not in alive
    assert [found[name] for name in names] == ["", ""]
    assert [adapter(tmp_path / name) for name in names] == [alone] * 2
    assert "absent" in found["bad"]
    assert "Traceback" in (tmp_path / "bad.log").read_text()


@pytest.mark.slow
def test_a_process_that_is_asked_to_end_is_replaced(settings, alone, tmp_path):
    run_dir = tmp_path / "run"
    children = lambda: [process.pid for process in active_children()]  # noqa: E731
    killer = kill_after_a_checkpoint(run_dir, children, signal.SIGTERM)
    (outcome,) = run_cells([trained(settings, run_dir)], partial(Processes, 1, 1))
    killer.join()
    assert not outcome.failed
    assert adapter(run_dir) == alone


SCRIPT = """
import sys
from test_grid import Cell, Processes, run_cells
import json
if __name__ == "__main__":
    list(run_cells([Cell(one) for one in json.loads(sys.argv[1])], lambda: Processes(1, 1)))
"""


def test_processes_end_with_their_parent(settings, tmp_path):
    """After a checkpoint, and without another cell."""
    (tmp_path / "script.py").write_text(SCRIPT)
    cells = [trained(settings, tmp_path / name).settings for name in ("run", "next")]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), json.dumps(cells)], env={**os.environ, "PYTHONPATH": paths}
    )
    workers: list[psutil.Process] = []

    def of_parent() -> list[int]:
        workers.extend(psutil.Process(parent.pid).children(recursive=True))
        return [parent.pid]

    killer = kill_after_a_checkpoint(tmp_path / "run", of_parent)
    parent.wait(60)
    killer.join()
    _, alive = psutil.wait_procs(workers, timeout=30)
    for process in alive:
        process.kill()
    assert not alive
    assert not (tmp_path / "run" / "adapter").exists()
    steps = [int(path.name[11:]) for path in (tmp_path / "run").glob("checkpoint-*")]
    assert max(steps) > 40
    assert not (tmp_path / "next").exists()


def test_a_stopped_grid_goes_on(settings, alone, tmp_path):
    """Ctrl-C, which a terminal sends to all processes: the running cell writes a checkpoint, and no other one begins.

    The same call then ends in the bits of a run left alone.
    """
    run_dir = tmp_path / "run"
    everybody = lambda: [*(process.pid for process in active_children()), os.getpid()]  # noqa: E731
    killer = kill_after_a_checkpoint(run_dir, everybody, signal.SIGINT)
    with pytest.raises(Interrupted, match="has written a checkpoint"):
        list(run_cells([trained(settings, run_dir), trained(settings, tmp_path / "next")], partial(Processes, 1, 1)))
    killer.join()
    assert not active_children()
    assert not (tmp_path / "next").exists()
    assert not (run_dir / "adapter").exists()
    (outcome,) = run_cells([trained(settings, run_dir)], partial(Processes, 1, 1))
    assert not outcome.failed
    assert adapter(run_dir) == alone


def workers_of_ray() -> list[int]:
    """Processes that run a cell, by the title that Ray gives them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::_run_on_ray"):
                found.append(int(path.parent.name))
        except OSError:  # it has just ended
            continue
    return found


@pytest.mark.slow
def test_a_killed_ray_worker_is_retried_and_resumes(settings, alone, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # by default they wait for the other tests
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        with pytest.raises(VarloraError, match=r"The cluster has 1 GPUs, .* Pass `--gpus`"):
            RayTasks()
        with pytest.raises(VarloraError, match="Expected a cluster with 2 GPU for a cell, but it has 1"):
            RayTasks(gpus=2)
        run_dir = tmp_path / "run"
        killer = kill_after_a_checkpoint(run_dir, workers_of_ray)
        bad = trained(settings, tmp_path / "bad", model=str(tmp_path / "absent"))
        cells = [trained(settings, run_dir), bad]
        found = {Path(one.run_dir).name: one.failed for one in run_cells(cells, partial(RayTasks, gpus=0.5))}
        killer.join()
        assert found["run"] == ""
        assert "absent" in found["bad"]
        assert adapter(run_dir) == alone
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        (outcome,) = run_cells([trained(settings, tmp_path / "whole", steps=2)], partial(RayTasks, gpus=1))
        assert not outcome.failed
    finally:
        ray.shutdown()


def test_a_process_that_dies_while_it_has_nothing_to_do_is_replaced(tmp_path):
    processes = Processes(1, threads=1)
    try:
        for _ in range(2):
            processes.submit(Cell({"task": "no such task", "run_dir": str(tmp_path / "run")}, {}))
            _, outcome = processes.finished()
            assert outcome is not None
            assert "no such task" in outcome.failed
            (worker,) = set(active_children()) - processes.others
            worker.kill()
            worker.join()
            pool = processes.pools[0]
            assert pool is not None
            while not pool._broken:  # which a thread of the pool notices
                time.sleep(0.01)
    finally:
        processes.stop()


def test_a_process_sees_its_own_gpu_from_its_first_import_on_and_libraries_say_nothing(monkeypatch, capfd):
    """bitsandbytes warns while it is imported, where it has no kernels for a CPU."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(grid, "_device", lambda slot: str(slot + 5))
    processes = Processes(2, threads=1)
    try:
        seen = [processes._pool(slot).submit(os.getenv, "CUDA_VISIBLE_DEVICES").result() for slot in range(2)]
    finally:
        processes.stop()
    assert seen == ["5", "6"]
    assert "Failed to load" not in capfd.readouterr().err
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
