"""A process of its own for `test_fit.py`: trains in a folder whose disk fills up, makes room, and goes on.

    python full_disk.py FOLDER WHOLE

FOLDER is a small file system; WHOLE, elsewhere, gets the same run left alone. Prints what the error said.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import helpers
from transformers import TrainerCallback

from varlora.errors import VarloraError
from varlora.files import verify_manifest
from varlora.methods import Ivon

ROOM = 16 * 1024  # bytes that are left: a checkpoint takes more


class FillUp(TrainerCallback):
    """Fills the disk after step 3, but for a little."""

    def __init__(self, ballast: Path) -> None:
        self.ballast = ballast

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            with suppress(OSError), self.ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            with self.ballast.open("r+b") as file:
                file.truncate(self.ballast.stat().st_size - ROOM)


def train(run_dir: Path, **settings: Any) -> None:
    helpers.run_fit(
        helpers.tiny_model(dropout=0.1), Ivon(lr=1.0, ess=1e6, hess_init=1e-3, clip_radius=2e-2), run_dir, **settings
    )


def main(folder: Path, whole: Path) -> None:
    run_dir, ballast = folder / "run", folder / "ballast"
    try:
        train(run_dir, callbacks=[FillUp(ballast)])
    except VarloraError as error:
        print(error)
    else:
        raise AssertionError("there was room enough")
    assert sorted(path.name for path in run_dir.iterdir() if path.is_dir()) == ["checkpoint-2"]
    verify_manifest(run_dir / "checkpoint-2")
    ballast.unlink()
    train(run_dir, resume=True)
    train(whole)
    assert helpers.outcome(run_dir) == helpers.outcome(whole)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
