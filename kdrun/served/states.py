"""Hidden states that a server leaves in a folder, and the space that they may take there."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from kdrun.served.client import BadAnswerError

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "/dev/shm/kdrun-states"
"""Where a server on the same machine leaves its states: in memory."""
_NAME = re.compile(r"[\w-][\w.-]*\.safetensors")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5e-4, 2e-2


class Space:
    """Bytes that answers on their way may take together.

    Args:
        total: their limit.
    """

    def __init__(self, total: int) -> None:
        self._total, self._used = total, 0
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, needed: int) -> Iterator[None]:
        """Wait until so many bytes are free, and take them."""
        with self._changed:
            self._changed.wait_for(lambda: self._used + needed <= self._total)
            self._used += needed
        try:
            yield
        finally:
            with self._changed:
                self._used -= needed
                self._changed.notify_all()


def read_states(folder: Path, named: str, ids: Sequence[int], first: int, timeout: float) -> Tensor:
    """Read the states of a prompt, and remove their file.

    Args:
        folder: as this process sees it.
        named: path of the file as the server sees it; only its last part is used.
        ids: the prompt.
        first: number of the first token whose state was asked for.
        timeout: seconds to wait for the file.

    Returns:
        ``[len(ids) - first, H]``, before the final norm, in the server's type.

    Raises:
        BadAnswerError: the states are missing, of another prompt, or not finite.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    name = PurePath(named).name
    if not _NAME.fullmatch(name):
        raise BadAnswerError(f"it names {named!r} as the file of its states")
    path = folder / name
    try:
        _wait_for(path, timeout)
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadAnswerError(f"the file {path} of states cannot be read ({error})") from error
    finally:
        for left in (path, path.with_name(name + ".failed")):
            with suppress(OSError):
                left.unlink()
    states, tokens = found.get("states"), found.get("token_ids")
    if states is None or tokens is None or tokens.tolist() != list(ids):
        raise BadAnswerError("its states are those of another prompt")
    if states.ndim == 3:  # one layer of several
        states = states[:, -1]
    if states.ndim != 2 or len(states) != len(ids) - first:
        raise BadAnswerError(
            f"it gives states of shape {list(states.shape)} for {len(ids) - first} tokens"
        )
    if not torch.isfinite(states).all():
        raise BadAnswerError("its states are not finite")
    return states


def _wait_for(path: Path, timeout: float) -> None:
    """Wait until a file appears, or the one that says why it does not.

    Raises:
        BadAnswerError: it does not.
    """
    until = time.monotonic() + timeout
    pause = _FIRST_PAUSE_S
    failed = path.with_name(path.name + ".failed")
    while not path.exists():
        if failed.exists():
            raise BadAnswerError(
                f"the server could not write its states ({failed.read_text(errors='replace')})"
            )
        if time.monotonic() > until:
            raise BadAnswerError(
                f"the server wrote no states to {path.parent} as this process sees it "
                "(served.folder)"
            )
        time.sleep(pause)
        pause = min(_LONGEST_PAUSE_S, 2 * pause)
