"""Screen output: the console of a command, without progress bars and advice of libraries."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_LINES_WITHOUT_TERMINAL = 10
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


@contextmanager
def show_progress(
    console: Console, what: str, unit: str
) -> Iterator[Callable[[int, int, int], None]]:
    """Show a progress bar on a terminal; otherwise print a few lines.

    Args:
        console: where it is shown.
        what: the things that are counted, such as ``rows``.
        unit: what the rate is measured in, such as ``tokens``.

    Yields:
        A function of the things done, all of them, and the units done.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    started = time.monotonic()
    if not console.is_terminal:
        told = 0

        def tell(done: int, total: int, units: int) -> None:
            nonlocal told
            if done * _LINES_WITHOUT_TERMINAL // total > told:
                told = done * _LINES_WITHOUT_TERMINAL // total
                rate = units / (time.monotonic() - started)
                console.print(f"{what} {done}/{total}  {rate:.0f} {unit}/s")

        yield tell
        return
    columns = (
        TextColumn(f"{what} {{task.completed}}/{{task.total}}"),
        BarColumn(),
        TextColumn(f"{{task.fields[rate]:.0f}} {unit}/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=None, rate=0.0)

        def show(done: int, total: int, units: int) -> None:
            rate = units / (time.monotonic() - started)
            progress.update(task, completed=done, total=total, rate=rate)

        yield show
