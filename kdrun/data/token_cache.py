"""Adds to datasets' fingerprints: where rows and tokens are kept, by all that they follow from.

The name of a folder is a hash of everything that its content depends on: the rows, the tokenizer,
its chat template, the settings, and the code that encodes. A changed tokenizer, an edited row or a
new version uses another folder, never a stale one. Folders may be removed at any time.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun.errors import InputError
from kdrun.paths import expand_home

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NONE = "none"
_WORTHWHILE = 500_000  # bytes: about a second of work
_LARGE = 64 * 2**20  # bytes that are not held in memory
_CODE = (
    "chat.py",
    "encode.py",
    "encode_report.py",
    "encoder.py",
    "encoding.py",
    "lost.py",
    "given.py",
    "messages.py",
    "templates.py",
    "token_store.py",
    "turn_ends.py",
    "view.py",
)
"""The source files that determine the encoding and its cache."""


@dataclass(frozen=True)
class TokenCache:
    """Where the rows of a run are kept.

    Attributes:
        folder: created when something is written; None keeps nothing for the next run.
        everything: also keep small sets of rows, which are quick to read and encode again.
    """

    folder: Path | None
    everything: bool = True

    @classmethod
    def at(cls, given: str | None) -> TokenCache:
        """Return the cache of ``data.cache_dir``.

        Args:
            given: a folder; ``none``; or None for the user's cache folder, which keeps only
                large sets of rows.

        Raises:
            InputError: the folder cannot be written.
        """
        if given == _NONE:
            return cls(None)
        if given is None:
            base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
            folder = Path(base) / "kdrun" / "tokens"
            # Users in containers may have no home folder.
            return cls(None if base.startswith("~") else folder, everything=False)
        folder = expand_home(given)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"data.cache_dir={given}: {error.strerror}; choose a writable folder"
            ) from error
        return cls(folder)

    def place(self, kind: str, key: Callable[[], str], size: int) -> Path | None:
        """Return the folder of a store, which may exist; None if it belongs in memory.

        Args:
            kind: first word of its name.
            key: returns a hash of everything that it follows from.
            size: about how many bytes it has.
        """
        worthwhile = self.everything or size >= _WORTHWHILE
        # A folder that has become read-only costs nothing but the time.
        if self.folder is not None and worthwhile and _is_writable(self.folder):
            return self.folder / f"{kind}-{key()[:40]}"
        return _passing_folder() / f"{kind}-{key()[:40]}" if size >= _LARGE else None


def token_key(tokenizer: PreTrainedTokenizerBase, what: Any) -> str | None:
    """Return a hash of a tokenizer, the code that encodes, and settings.

    Returns:
        The hash; None for a tokenizer written in Python, whose content does not determine its
        behaviour.
    """
    if not tokenizer.is_fast:
        return None
    key = hashlib.sha256(_print_code().encode())
    key.update(_print_tokenizer(tokenizer))
    key.update(json.dumps(what).encode())
    return key.hexdigest()


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


@lru_cache
def _passing_folder() -> Path:
    """Return a folder that goes with this process, for what is too large for memory."""
    folder, owner = Path(tempfile.mkdtemp(prefix="kdrun-rows-")), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not a forked worker
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


@lru_cache
def _print_code() -> str:
    """Hash the code that encodes, here and in the libraries that it uses."""
    here = Path(__file__).parent
    digest = hashlib.sha256(b"".join((here / name).read_bytes() for name in _CODE))
    versions = [version(name) for name in ("transformers", "tokenizers", "jinja2")]
    return json.dumps([digest.hexdigest(), *versions])


def _print_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """Hash a tokenizer's full content, with its chat template and special tokens."""
    template = json.dumps(tokenizer.chat_template)
    content = [
        tokenizer.backend_tokenizer.to_str(),
        json.dumps(tokenizer.special_tokens_map, default=str, sort_keys=True),
        template,
    ]
    return hashlib.sha256(json.dumps(content).encode()).digest()
