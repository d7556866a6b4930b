"""YAML that anyone may have written, read without more time or memory than its few lines are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from varlora.errors import ConfigError

__all__ = ["read_yaml"]

LARGEST = 2**18
"""Bytes of a file; ours have some hundred. The parser takes seconds for so many."""
DEEPEST = 20
"""Levels of a file's YAML; ours have few. The parser's time grows with their square."""
BEGINS = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
ENDS = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)


def read_yaml(path: Path) -> Any:
    """Read a recipe, a plan or a task file.

    Raises:
        ConfigError: it is large, or a few lines of it would take more time or memory than anyone has.
        OSError: it cannot be read.
        ValueError: it is no UTF-8, or holds a value that is none, such as the date 2020-99-99.
        yaml.YAMLError: it is no YAML.
    """
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ConfigError([f"Expected {path} to have at most {LARGEST:,} bytes. Is it a file of settings?"])
    text = content.decode("utf-8")
    _check_bounded(text, path)
    return yaml.safe_load(text)


def _check_bounded(text: str, path: Path) -> None:
    """Raise where a few lines of YAML would take more time or memory than anyone has."""
    depth = 0
    for token in yaml.scan(text):
        if isinstance(token, yaml.AliasToken):
            raise ConfigError([f"Expected {path} without aliases (*name). Write out what they stand for."])
        depth += isinstance(token, BEGINS) - isinstance(token, ENDS)
        if depth > DEEPEST:
            raise ConfigError([f"Expected {path} to be YAML of at most {DEEPEST} levels, one within the other."])
        if depth < 0:
            return  # the parser stops here and says so
