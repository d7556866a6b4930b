"""A process of its own for `test_fit.py`: trains in forked children, kills some with SIGKILL, and resumes them.

    python kill_and_resume.py FOLDER SEED

For each method, FOLDER then holds the run `<method>/whole` and, for each way to die, a run that died and was resumed.
The children share no state but the imports, which are what takes long.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import torch

from varlora import checkpoint, fit
from varlora.methods import AdamW, Ivon
from varlora.predictions import save_predictions

STEPS, ACCUMULATION, EVERY = 8, 2, 2
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
        die_in(fit, "class_logits", lambda model, batch: next(forwards) == 0)
    elif death == "while a checkpoint is written":
        step = source.randrange(2 * EVERY, STEPS + 1, EVERY)
        die_in(checkpoint, "write_manifest", lambda folder: folder.name == f"checkpoint-{step}")
    else:
        die_in(checkpoint, "write_json", lambda path, value: path.name == "posterior_config.json")


def run(run_dir: Path, method: str, resume: bool) -> None:
    model = helpers.tiny_model(dropout=0.1)
    settings: dict[str, Any] = {"steps": STEPS, "batch_size": 2, "accumulation": ACCUMULATION}
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
    main(Path(sys.argv[1]), int(sys.argv[2]))
