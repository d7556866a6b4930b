"""Other libraries' words, kept off the terminal. Imports none of them before it has spoken."""

from __future__ import annotations

import logging
import warnings

__all__ = ["quiet_libraries"]


def quiet_libraries() -> None:
    """Leave the terminal to our own words: errors of the libraries are shown, warnings and progress bars are not."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of kernels that are missing on a CPU
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
