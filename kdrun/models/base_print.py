"""Check that an adapter's base model is the one that it was trained on."""

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
"""File next to an adapter that identifies its base model."""
_KEY = "weights"
_BLOCKS, _BLOCK = 1024, 16384


def print_weights(source: ModelSource) -> str | None:
    """Hash a model's weight files as stored on disk, whatever type they are loaded in.

    Only a sample of each file is read, to be fast for large models; training changes weights
    everywhere.

    Args:
        source: the model and its adapters.

    Returns:
        The hash; None for a model on the hub or without weights.
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
    """Save the result of :func:`print_weights` for the base model next to an adapter."""
    if weights is not None:
        write_json(folder / BASE_PRINT, {_KEY: weights})


def check_base(source: ModelSource) -> None:
    """Refuse adapters whose base model has other weights than they were trained on.

    Adapters without such a file are accepted.

    Args:
        source: the model with its adapters.

    Raises:
        InputError: the weights differ; names the adapter and the base model.
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
                f"was trained on; restore them, or remove {file} if the same weights are stored "
                "in other files"
            )
