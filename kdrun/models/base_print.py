"""Whether the model below an adapter is the one that the adapter was trained on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from kdrun.errors import InputError
from kdrun.files import write_json
from kdrun.models.locate import ModelSource
from kdrun.models.unread import weight_files

BASE_PRINT = "base_model.json"
"""Beside an adapter: what its base model was."""
_KEY = "weights"
_BLOCKS, _BLOCK = 1024, 16384


def print_weights(source: ModelSource) -> str | None:
    """A hash of a model's weight files as they lie on disk, of whatever type it is loaded in.

    A sample of each file is read, so that it takes no time with large models; training changes
    weights everywhere.

    Args:
        source: the model, and adapters on it.

    Returns:
        The hash; None of a model on the hub, or of one without weights.
    """
    files = weight_files(source)
    if not source.is_local or not files:
        return None
    found = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        found.update(f"{size}\n".encode())
        with open(file, "rb") as stream:
            for number in range(_BLOCKS if size > _BLOCKS * _BLOCK else 1):
                stream.seek(number * (size - _BLOCK) // (_BLOCKS - 1))
                found.update(stream.read(_BLOCK if size > _BLOCKS * _BLOCK else size))
    return found.hexdigest()


def keep_base_print(folder: Path, weights: str | None) -> None:
    """Write down beside an adapter what :func:`print_weights` gave of its base model."""
    if weights is not None:
        write_json(folder / BASE_PRINT, {_KEY: weights})


def check_base(source: ModelSource) -> None:
    """Refuse adapters whose base model holds other weights than they were trained on.

    Adapters that nothing was written down beside are taken as they are.

    Args:
        source: the model with its adapters.

    Raises:
        InputError: naming the adapter and the base model.
    """
    for number, adapter in enumerate(source.adapters):
        file = Path(adapter) / BASE_PRINT
        if not file.is_file():
            continue
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))[_KEY]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} is damaged; remove it, or save the adapter again") from error
        base = replace(source, adapters=source.adapters[:number])
        if print_weights(base) not in (None, kept):
            raise InputError(
                f"{adapter}: the weights of its base model {base} are not those that the adapter "
                f"was trained on; restore them, or remove {file} if they are the same in other "
                "files"
            )
