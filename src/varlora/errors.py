"""The exceptions that varlora raises for wrong input, and the wording they share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["ConfigError", "DamagedFileError", "Interrupted", "TaskError", "VarloraError", "did_you_mean"]


class VarloraError(ValueError):
    """Wrong input that the user can mend; the message says how. The command line prints it without a traceback."""


class ConfigError(VarloraError):
    """One or more problems of a configuration, all reported together."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        super().__init__(f"{head} in the configuration:\n" + "\n".join(f"  - {problem}" for problem in self.problems))


class TaskError(VarloraError):
    """A row of a dataset that cannot be made an example: says file, line, field and what was expected."""


class DamagedFileError(VarloraError):
    """A checkpoint or posterior that is cut short, altered, or of another model."""


class Interrupted(VarloraError):
    """Training was stopped by the user, after a checkpoint."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence that offers the nearest known names, or all of them.

    Args:
        name: what the user wrote.
        known: the names that exist.

    Example:
        >>> did_you_mean("ivn", ["adamw", "ivon"])
        'Did you mean `ivon`?'
        >>> did_you_mean("zzz", ["adamw", "ivon"])
        'Known: adamw, ivon.'
    """
    names = sorted(known)
    if not names:
        return ""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return "Did you mean " + " or ".join(f"`{match}`" for match in near) + "?"
    return f"Known: {', '.join(names)}."
