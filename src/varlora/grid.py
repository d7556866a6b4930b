"""A grid of runs: which cells there are and what they wait for, worked off by processes of this machine or by Ray.

A cell is one run directory: train (or conclude from other cells), then evaluate. What is done stays done: a cell whose
files are there is not touched again, one that was cut short goes on from its checkpoint, and one that fails is reported
and stops only those that build on it. A worker that dies is replaced and its cell is tried once more.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from inspect import signature
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any, Protocol

import torch

from varlora.config import settings_from, settings_of
from varlora.errors import Interrupted, VarloraError
from varlora.evaluation import evaluate
from varlora.predictions import CALIBRATED, CALIBRATION, made_unlike, meta_of
from varlora.quiet import quiet_libraries
from varlora.tasks import get_task
from varlora.trainer import left_to_parent
from varlora.training import train

__all__ = ["Cell", "Launcher", "Outcome", "Processes", "RayTasks", "interrupted_by_signals", "run_cells"]

DEFAULTS = {name: signature(evaluate).parameters[name].default for name in ("samples", "tau", "seed")}
"""How `evaluate` makes its draws where it is not told."""
ATTEMPTS = 2
"""How often a cell is begun whose worker dies."""


@dataclass(frozen=True)
class Cell:
    """A run of a grid; plain values, so that it can be sent to another process or machine."""

    settings: Mapping[str, Any]
    """The run's settings, `run_dir` and `sources` included."""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `varlora.evaluate`; empty: the run only serves others."""
    rows: Mapping[str, str] = field(default_factory=dict)
    """Checksums of the rows to evaluate on, by task; predictions of others are made anew."""

    @property
    def run_dir(self) -> Path:
        """The run directory, by which cells are told apart."""
        return Path(self.settings["run_dir"])

    @property
    def after(self) -> tuple[Path, ...]:
        """Run directories of the cells that must be done before."""
        return tuple(map(Path, self.settings["sources"]))

    def missing(self) -> bool:
        """Whether something is left to do."""
        if not (self.run_dir / "adapter").is_dir():
            return True
        if not self.evaluation:
            return False
        folder, task = self.run_dir, get_task(self.settings["task"])
        split = self.evaluation.get("split") or task.evaluation
        suffix = CALIBRATION if split == "calibration" else ""
        made = {name: str(type(value)(self.evaluation.get(name, value))) for name, value in DEFAULTS.items()}
        made |= {"task": task.name, "split": split}
        wanted = {suffix: made}
        wanted |= {f"-tau-{tau:g}": {**made, "tau": str(float(tau))} for tau in self.evaluation.get("taus", ())}
        for other in map(get_task, self.evaluation.get("ood", ())):
            wanted[f"-ood-{other.name}"] = {**made, "task": other.name, "split": other.evaluation}
        files = [folder / f"metrics{suffix}.json"]
        if self.evaluation.get("calibrated") and self.settings.get("calibration_fraction"):
            files += [folder / f"predictions{CALIBRATED}.safetensors", folder / "adapter" / "calibration.json"]
        return not all(file.is_file() for file in files) or any(
            self._unlike(meta_of(folder / f"predictions{end}.safetensors"), how) for end, how in wanted.items()
        )

    def _unlike(self, found: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
        """Whether predictions were made otherwise than wanted, or of other rows, by their meta data."""
        now = self.rows.get(wanted["task"])
        other_rows = now is not None and found.get("data", now) != now  # an older version has not written it
        return other_rows or bool(made_unlike(found, wanted, "task", "split"))


@dataclass(frozen=True)
class Outcome:
    """How a cell ended."""

    run_dir: str
    """Its run directory."""
    seconds: float
    """How long it took."""
    failed: str = ""
    """Why it failed, if it did."""


def run_cell(settings: Mapping[str, Any], evaluation: Mapping[str, Any]) -> Outcome:
    """Train and evaluate one cell, going on where it was cut short; what it says goes to a log beside its folder.

    Raises:
        Interrupted: stopped by a signal, after a checkpoint.
    """
    cell, started = Cell(settings, evaluation), time.monotonic()
    log = cell.run_dir.with_name(cell.run_dir.name + ".log")

    def say(text: str) -> None:
        with suppress(OSError), log.open("a", encoding="utf-8") as file:  # a full disk costs the log first
            file.write(text + "\n")

    failed = ""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        wanted = settings_from(settings)
        run_dir = train(wanted, resume=cell.run_dir.exists(), say=say)
        if evaluation:
            moved = wanted.model if settings_of(run_dir).model != wanted.model else None
            evaluate(run_dir, **evaluation, data_dir=wanted.data_dir, model=moved, say=say)
    except Interrupted:
        raise
    except Exception as error:  # whatever it is, the other cells go on
        failed = str(error) if isinstance(error, VarloraError | OSError) else f"{type(error).__name__}: {error}"
        say(traceback.format_exc())
    return Outcome(str(cell.run_dir), time.monotonic() - started, failed)


# --- where cells run -------------------------------------------------------------------------------------------------


class Launcher(Protocol):
    """Where cells run."""

    def submit(self, cell: Cell) -> Any:
        """Begin a cell as soon as there is room; return a key."""

    def finished(self) -> tuple[Any, Outcome | None]:
        """Wait for a cell; return its key and outcome, None if its worker died."""

    def stop(self) -> None:
        """Let the running cells write a checkpoint and end."""


class Processes:
    """Processes of this machine; they live on from cell to cell, and one that dies is replaced alone."""

    def __init__(self, workers: int = 1, threads: int | None = None) -> None:
        """Choose how many.

        Args:
            workers: cells at a time; with several GPUs they are dealt out in turn.
            threads: of torch in each; left out: the cores divided by the workers.
        """
        self.threads = threads or max(1, (os.cpu_count() or 1) // workers)
        self.others = set(active_children())
        self.pools: list[ProcessPoolExecutor | None] = [None] * workers
        self.backlog: deque[tuple[object, Cell]] = deque()
        self.running: dict[Future[Outcome], tuple[object, int]] = {}

    def submit(self, cell: Cell) -> object:
        """Begin a cell as soon as a process is free."""
        key = object()
        self.backlog.append((key, cell))
        self._fill()
        return key

    def _fill(self) -> None:
        """Give each free process one cell, and no more: what waits in its queue could not be taken back."""
        free = sorted({*range(len(self.pools))} - {slot for _, slot in self.running.values()})
        for slot, (key, cell) in zip(free, [*self.backlog]):
            self.backlog.popleft()
            try:
                future = self._pool(slot).submit(_run_in_worker, cell.settings, cell.evaluation)
            except BrokenProcessPool:  # it died while it had nothing to do
                self.pools[slot] = None
                future = self._pool(slot).submit(_run_in_worker, cell.settings, cell.evaluation)
            self.running[future] = key, slot

    def _pool(self, slot: int) -> ProcessPoolExecutor:
        """Return the pool of one process, started if it is not there."""
        pool = self.pools[slot]
        if pool is None:
            context = get_context("spawn")  # a fork of a process with threads, or with CUDA, may hang
            pool = self.pools[slot] = ProcessPoolExecutor(1, context, quiet_libraries)  # before more is imported
            with _sees_only(_device(slot)):
                pool.submit(_start_worker, self.threads)  # starts the process, which looks for GPUs as it imports
        return pool

    def finished(self) -> tuple[object, Outcome | None]:
        """Wait for a cell."""
        done: set[Future[Outcome]] = set()
        while not done:  # in short spells: a signal that comes before a wait without end would not be heard in it
            done = wait(self.running, timeout=1, return_when=FIRST_COMPLETED).done
        future = next(iter(done))
        key, slot = self.running.pop(future)
        try:
            outcome = future.result()
        except BrokenProcessPool:
            outcome, self.pools[slot] = None, None
        self._fill()
        return key, outcome

    def stop(self) -> None:
        """Ask the processes to write a checkpoint, and wait for them."""
        for process in set(active_children()) - self.others:
            process.terminate()
        for pool in self.pools:
            if pool is not None:
                pool.shutdown(cancel_futures=True)


def _device(slot: int) -> str | None:
    """Return the GPU of a process, one of those that this process may use."""
    if not torch.cuda.is_available():
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    return visible.split(",")[slot % torch.cuda.device_count()]


@contextmanager
def _sees_only(device: str | None) -> Iterator[None]:
    """Have processes that are started in the context see one GPU."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    try:
        yield
    finally:
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        elif device is not None:
            del os.environ["CUDA_VISIBLE_DEVICES"]


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, left_to_parent)  # which asks for a checkpoint
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := parent_process():
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _run_in_worker(settings: Mapping[str, Any], evaluation: Mapping[str, Any]) -> Outcome:
    try:
        return run_cell(settings, evaluation)
    except Interrupted:
        os._exit(1)  # asked to end, after a checkpoint: no further cell


class RayTasks:
    """Tasks of a Ray cluster, whose machines share the folder of the runs."""

    def __init__(self, address: str | None = None, cpus: float = 1, gpus: float | None = None) -> None:
        """Connect.

        Args:
            address: of the cluster, such as `auto`; left out: a new one on this machine.
            cpus: cores a cell.
            gpus: GPUs a cell; a fraction lets several cells share one, and 0 hides them; left out: none, in a cluster
                that has none.

        Raises:
            VarloraError: Ray is not installed, or there is no such cluster.
        """
        try:
            import ray
        except ImportError as error:
            raise VarloraError("`--launcher ray` needs Ray: pip install 'varlora[ray]'.") from error
        if not ray.is_initialized():
            try:
                ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
            except ConnectionError as error:
                raise VarloraError(f"Expected a Ray cluster at {address!r}, but {error}") from error
        self.ray = ray
        total = ray.cluster_resources()
        if gpus is None and total.get("GPU"):
            raise VarloraError(
                f"The cluster has {total['GPU']:g} GPUs, and nothing says how many of them a cell takes. "
                "Pass `--gpus`, 1 or 0.5 say, or 0 to stay on the CPUs."
            )
        gpus = gpus or 0
        for name, wanted in (("CPU", cpus), ("GPU", gpus)):
            if wanted > total.get(name, 0):
                raise VarloraError(
                    f"Expected a cluster with {wanted:g} {name} for a cell, but it has {total.get(name, 0):g}. "
                    f"Lower `--{name.lower()}s`."
                )
        self.threads, self.hidden = max(1, int(cpus)), not gpus
        self.task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_run_on_ray)
        self.running: list[Any] = []

    def submit(self, cell: Cell) -> Any:
        """Begin a cell as soon as the cluster has room."""
        key = self.task.remote(self.threads, self.hidden, dict(cell.settings), dict(cell.evaluation))
        self.running.append(key)
        return key

    def finished(self) -> tuple[Any, Outcome | None]:
        """Wait for a cell."""
        (key,), self.running = self.ray.wait(self.running, num_returns=1)
        errors = self.ray.exceptions
        try:
            found = self.ray.get(key)
            return key, found and Outcome(**found)
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError):
            return key, None

    def stop(self) -> None:
        """Interrupt the cells' processes, so that they write a checkpoint."""
        for key in self.running:
            self.ray.cancel(key)
        if self.running:
            self.ray.wait(self.running, num_returns=len(self.running), timeout=60)


def _run_on_ray(
    threads: int, hidden: bool, settings: Mapping[str, Any], evaluation: Mapping[str, Any]
) -> dict[str, Any] | None:
    quiet_libraries()
    torch.set_num_threads(threads)
    if hidden:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        return asdict(run_cell(settings, evaluation))
    except Interrupted:
        return None


# --- the grid --------------------------------------------------------------------------------------------------------


def run_cells(cells: Sequence[Cell], launcher: Callable[[], Launcher]) -> Iterator[Outcome]:
    """Work off what is missing of some cells, each after those that it builds on.

    Args:
        cells: in the order of their importance.
        launcher: makes where they run; not called if nothing is missing.

    Yields:
        How each cell ended that was not done before.

    Raises:
        Interrupted: by SIGINT or SIGTERM, after the running cells have written a checkpoint.
    """
    by_path = {cell.run_dir.resolve(): cell for cell in cells}
    waiting = [path for path, cell in by_path.items() if cell.missing()]
    if not waiting:
        return
    runner, running = launcher(), dict[Any, Path]()
    failed, attempts = set[Path](), dict.fromkeys(waiting, 0)
    with interrupted_by_signals():
        try:
            while waiting or running:
                for path in [*waiting]:
                    sources = [source.resolve() for source in by_path[path].after]
                    lost = next((source for source in sources if source in failed), None)
                    if lost is not None:
                        waiting.remove(path)
                        failed.add(path)
                        yield Outcome(str(by_path[path].run_dir), 0.0, f"{lost}, which it builds on, failed.")
                    elif not any(source in waiting or source in running.values() for source in sources):
                        waiting.remove(path)
                        attempts[path] += 1
                        running[runner.submit(by_path[path])] = path
                if not running:
                    continue  # something failed just now: look again at what waits for it
                key, outcome = runner.finished()
                path = running.pop(key)
                if outcome is None and attempts[path] < ATTEMPTS:
                    waiting.append(path)
                    continue
                killed = f"Its worker ended {ATTEMPTS} times without an answer. Is there enough memory?"
                outcome = outcome or Outcome(str(by_path[path].run_dir), 0.0, killed)
                if outcome.failed:
                    failed.add(path)
                yield outcome
        except KeyboardInterrupt:
            raise Interrupted("The grid was stopped; what was in training has written a checkpoint.") from None
        finally:
            runner.stop()


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Take SIGTERM for Ctrl-C, and hear both also where a shell has them ignored in the background."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    old = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
