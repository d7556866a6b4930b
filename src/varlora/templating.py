"""The templates in `templates/`, as jinja2 reads them."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

__all__ = ["environment"]


def environment(*, autoescape: bool) -> Environment:
    """Return where templates come from; a name that a template does not get is an error.

    Args:
        autoescape: escape what HTML would read.
    """
    return Environment(
        loader=PackageLoader("varlora"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
