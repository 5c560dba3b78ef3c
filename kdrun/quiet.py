"""What reaches the screen: the console of a command, and no other library's bars and advice."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# The latter two speak where torchao is installed, which transformers then imports: of CUDA
# libraries that a CPU has no use for, and of changes that later versions of torch will ask for.
_NOISY = ("torch.distributed", "torchao", "torch.utils._pytree")


def make_console() -> Console:
    """The console of a command: standard error, so that output can be piped."""
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


def quiet_environment() -> None:
    """For a process that trains; before the libraries are imported."""
    # A tokenizer's threads and the forks of data loaders do not mix; silence its advice about it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # a run shows its own progress
    _quiet_loggers()


def _quiet_loggers() -> None:
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.ERROR)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Show only errors of transformers, and no progress bar but the run's own."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    _quiet_loggers()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        # peft looks for the base model's config.json, which a GGUF file has not.
        warnings.filterwarnings("ignore", message="Could not find a config file in")
        yield
