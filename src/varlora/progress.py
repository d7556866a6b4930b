"""Progress on the terminal: a bar with loss, σ and the time left, or plain lines where there is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback

__all__ = ["TrainingProgress", "rows_progress"]


def _bar(console: Console, *texts: str) -> Progress:
    columns = [TextColumn(text) for text in texts]
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *columns,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


class TrainingProgress(TrainerCallback):
    """Shows steps, loss, σ and the time left; used as a context, it leaves the terminal in order after an error."""

    def __init__(self, console: Console, description: str) -> None:
        self.console, self.description = console, description
        self.bar = _bar(console, "{task.fields[numbers]}")

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar where training starts or resumes."""
        if state.global_step:
            self.console.print(f"Going on from step {state.global_step}.")
        self.task = self.bar.add_task(
            self.description, total=state.max_steps, completed=state.global_step, numbers="loss -"
        )
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show what was logged."""
        if not logs or "loss" not in logs:
            return
        numbers = f"loss {logs['loss']:.3f}"
        if "sigma" in logs:
            numbers += f"  σ {logs['sigma']:.2e}"
        self.bar.update(self.task, numbers=numbers)
        if not self.console.is_terminal:
            line = f"{self.description}  step {state.global_step}/{state.max_steps}  {numbers}"
            self.console.print(Text(line), soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the bar."""
        self.bar.stop()


def rows_progress(console: Console, description: str) -> Callable[[int], Any]:
    """Return a context over a number of rows, which gives a function to call with the rows done."""

    @contextmanager
    def over(rows: int) -> Iterator[Callable[[int], None]]:
        with _bar(console) as bar:
            task = bar.add_task(description, total=rows)
            yield lambda done: bar.advance(task, done)

    return over
