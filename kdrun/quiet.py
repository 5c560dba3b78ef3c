"""Keeps other libraries' loading bars and advice off the screen."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Show only errors of transformers, and no progress bar but the run's own."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        # peft looks for the base model's config.json, which a GGUF file has not.
        warnings.filterwarnings("ignore", message="Could not find a config file in")
        yield
