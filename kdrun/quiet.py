"""Screen output: the console of a command, without progress bars and advice of libraries."""

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

# torchao and pytree log if torchao is installed, which transformers then imports: about CUDA
# libraries that a CPU does not need, and about changes that later versions of torch require.
# bitsandbytes logs while it is imported, about a kernel that would have to be downloaded.
_NOISY = ("torch.distributed", "torchao", "torch.utils._pytree", "bitsandbytes")


def make_console() -> Console:
    """Return the console of a command: standard error, so that output can be piped."""
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


def quiet_environment() -> None:
    """Set the environment of a training process, before the libraries are imported."""
    # Tokenizer threads conflict with forked data loaders; silence the advice about it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # a run displays its own progress
    _quiet_loggers()


def _quiet_loggers() -> None:
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.ERROR)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Show only errors of transformers, and only the run's own progress bar."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    _quiet_loggers()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        # peft looks for the base model's config.json, which does not exist for a GGUF file.
        warnings.filterwarnings("ignore", message="Could not find a config file in")
        yield
