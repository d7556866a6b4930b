"""A process of its own for `test_fit.py`: trains in forked children, kills some with SIGKILL, and resumes them.

    python kill_and_resume.py FOLDER SEED
    python kill_and_resume.py FOLDER SEED --random RANKS
    python kill_and_resume.py FOLDER SEED --stop RANK
    python kill_and_resume.py FOLDER SEED --spoil

For each method, FOLDER then holds the run `<method>/whole` and, for each way to die, a run that died and was resumed.
With `--random` it holds one run with IVON, `whole`, and the same one, `killed`, which died 20 times at random moments;
with `--stop`, of two ranks, `killed` was stopped by a SIGTERM to one; with `--spoil`, `0`, `1` and `01` had a loss that
was not finite, of these of two ranks.
The children share no state but the imports, which are what takes long.
"""

from __future__ import annotations

import math
import os
import random
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import helpers
import torch

import varlora.files
from varlora import checkpoint, trainer
from varlora.errors import Interrupted
from varlora.methods import AdamW, Ivon
from varlora.optim.bucket import Bucket
from varlora.predictions import save_predictions

STEPS, ACCUMULATION, EVERY = 8, 2, 2
STOPPED = 3  # exit status of a run that was interrupted after a checkpoint
LONG, MOMENTS = 40, (200, 25)  # of the first rank, which writes, and of another
RARE, OF_A_KIND = ("in a backward pass", "in a step"), 8  # few among all, so that some deaths are aimed at them
METHODS = {"adamw": AdamW(lr=2e-2), "ivon": Ivon(lr=1.0, clip_radius=2e-2)}
DEATHS = ("in a forward pass", "while a checkpoint is written", "while the adapter is written")


def die_in(module: Any, name: str, when: Callable[..., bool]) -> None:
    """Replace a function by one that dies at the call that it is told to."""
    function = getattr(module, name)

    def replacement(*args: Any, **kwargs: Any) -> Any:
        if when(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(module, name, replacement)


def prepare(death: str, source: random.Random) -> None:
    """Choose the moment, after the first checkpoint."""
    if death == "in a forward pass":
        left = source.randrange(EVERY * ACCUMULATION, STEPS * ACCUMULATION)
        forwards = iter(range(left, -1, -1))
        die_in(trainer, "class_logits", lambda model, batch: next(forwards) == 0)
    elif death == "while a checkpoint is written":
        step = source.randrange(2 * EVERY, STEPS + 1, EVERY)
        die_in(varlora.files, "write_manifest", lambda folder: folder.name == f"checkpoint-{step}")
    else:
        die_in(checkpoint, "write_json", lambda path, value: path.name == "posterior_config.json")


class Death(NamedTuple):
    """A signal at one of the moments that are numbered from now on: all of them, or those of a kind."""

    moment: int
    kind: str = ""
    number: int = signal.SIGKILL


def die_at(death: Death) -> None:
    """Get the signal in a forward or a backward pass, when a step has moved some weights, or at what files are for."""
    left = iter(range(death.moment, -1, -1))

    def count(what: str) -> None:
        if death.kind in what and next(left, None) == 0:
            print(f"died {what}", flush=True)
            os.kill(os.getpid(), death.number)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.mkdir"):
            names = [os.fspath(name) for name in arguments[:2] if isinstance(name, (str, os.PathLike))]
            if any("killed" in name for name in names):
                count("while writing" if any(".checkpoint.tmp" in name for name in names) else "at a file")

    class_logits, update = trainer.class_logits, Bucket.update

    def forward(*arguments: Any) -> Any:
        count("in a forward pass")
        logits = class_logits(*arguments)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: count("in a backward pass"))
        return logits

    def step(bucket: Bucket, draws: int) -> None:
        update(bucket, draws)
        count("in a step")

    trainer.class_logits, Bucket.update = forward, step
    sys.addaudithook(audit)


def spoil(step: int) -> None:
    """Make a loss of one step infinite; its gradients stay as they are."""
    compute_loss = trainer.MethodTrainer.compute_loss

    def spoiled(self: Any, *arguments: Any, **more: Any) -> Any:
        found = compute_loss(self, *arguments, **more)
        if self.state.global_step + 1 == step:
            self.varlora_watch.losses[-1] = self.varlora_watch.losses[-1] + math.inf
        return found

    trainer.MethodTrainer.compute_loss = spoiled


def run(run_dir: Path, method: str, resume: bool, steps: int = STEPS) -> None:
    model = helpers.tiny_model(dropout=0.1)
    settings: dict[str, Any] = {"steps": steps, "batch_size": 2, "accumulation": ACCUMULATION}
    settings |= {"checkpoint_every": EVERY, "training_arguments": {"logging_steps": 1}}
    posterior = helpers.run_fit(model, METHODS[method], run_dir, resume=resume, **settings)
    save_predictions(helpers.run_predict(model, posterior), run_dir / "predictions.safetensors")


def in_a_child(run_dir: Path, method: str, resume: bool = False, death: str | None = None, seed: int = 0) -> int:
    """Run in a child; return how it ended, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            if death:
                prepare(death, random.Random(f"{seed} {method}"))
            run(run_dir, method, resume)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def start(rank: int, ranks: int, port: int, run_dir: Path, steps: int, death: Death | None, spoiled: bool) -> int:
    """Go on with a run in a child, which may be to die, as one of several ranks; return its process."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            if ranks > 1:
                of_all = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in of_all.items()} | {"MASTER_ADDR": "127.0.0.1"}
            if death:
                die_at(death)
            if spoiled:
                spoil(step=4)
            run(run_dir, "ivon", resume=True, steps=steps)
        except Interrupted:
            os._exit(STOPPED)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def go_on(
    run_dir: Path,
    ranks: int,
    victim: int = 0,
    death: Death | None = None,
    steps: int = LONG,
    spoiled: Sequence[int] = (),
) -> list[int]:
    """Go on with a run; return how each rank ended. With a victim of SIGKILL the others are killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [
        start(rank, ranks, port, run_dir, steps, death if rank == victim else None, rank in spoiled)
        for rank in range(ranks)
    ]
    ended = {victim: os.waitpid(children[victim], 0)[1]}
    for rank, child in enumerate(children):
        if rank != victim:
            if death and death.number == signal.SIGKILL:
                os.kill(child, signal.SIGKILL)
            ended[rank] = os.waitpid(child, 0)[1]
    return [os.waitstatus_to_exitcode(ended[rank]) for rank in range(ranks)]


def kill_at_random(folder: Path, seed: int, ranks: int) -> None:
    source = random.Random(seed)
    for name in ("whole", "killed"):
        (folder / name).mkdir()
    assert go_on(folder / "whole", ranks) == [0] * ranks
    kinds = [*RARE * 2, *[""] * 16]
    source.shuffle(kinds)
    for number, kind in enumerate(kinds):
        victim = number % ranks
        death = Death(source.randrange(OF_A_KIND if kind else MOMENTS[victim]), kind)
        assert go_on(folder / "killed", ranks, victim, death)[victim] == -signal.SIGKILL
    assert go_on(folder / "killed", ranks) == [0] * ranks


def stop_one_of_two(folder: Path, victim: int) -> None:
    for name in ("whole", "killed"):
        (folder / name).mkdir()
    assert go_on(folder / "whole", 2, steps=STEPS) == [0, 0]
    death = Death(MOMENTS[victim] // 4, number=signal.SIGTERM)
    assert go_on(folder / "killed", 2, victim, death, STEPS) == [STOPPED, STOPPED]
    assert go_on(folder / "killed", 2, steps=STEPS) == [0, 0]


def spoil_one_of_two(folder: Path) -> None:
    for spoiled in ((0,), (1,), (0, 1)):
        run_dir = folder / "".join(map(str, spoiled))
        run_dir.mkdir()
        assert go_on(run_dir, 2, steps=STEPS, spoiled=spoiled) == [0, 0]


def main(folder: Path, seed: int) -> None:
    helpers.base_folder()
    for method in METHODS:
        assert in_a_child(folder / method / "whole", method) == 0
        for death in DEATHS:
            run_dir = folder / method / death
            assert in_a_child(run_dir, method, death=death, seed=seed) == -signal.SIGKILL
            assert any(run_dir.glob("checkpoint-*/manifest.json"))
            assert not (run_dir / "adapter").exists()
            assert in_a_child(run_dir, method, resume=True) == 0


if __name__ == "__main__":
    if "--random" in sys.argv:
        helpers.base_folder()
        kill_at_random(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[4]))
    elif "--stop" in sys.argv:
        helpers.base_folder()
        stop_one_of_two(Path(sys.argv[1]), int(sys.argv[4]))
    elif "--spoil" in sys.argv:
        helpers.base_folder()
        spoil_one_of_two(Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]), int(sys.argv[2]))
