"""Weight files in a model's folder: those that are read, and those that are not."""

from __future__ import annotations

import json
from pathlib import Path

from kdrun.models.locate import ModelSource
from kdrun.models.merge import ADAPTER_WEIGHTS

_FORMATS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}
# Files of trainers next to the weights, which obviously are not part of the model.
_OF_TRAINERS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
_BASES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTERS = (ADAPTER_WEIGHTS, "adapter_model.bin")
_SHOWN = 3


def weight_files(source: ModelSource) -> list[Path]:
    """Return the files that a local model and its adapters are read from, in order."""
    files = [Path(source.path) / name for name in sorted(_read_of_base(source))]
    for adapter in map(Path, source.adapters):
        files += [adapter / name for name in sorted(_first_of(adapter, _ADAPTERS))]
    return [file for file in files if file.is_file()]


def _read_of_base(source: ModelSource) -> set[str]:
    return {source.gguf_file} if source.gguf_file else _first_of(Path(source.path), _BASES)


def describe_unread_files(source: ModelSource) -> list[str]:
    """Return a line for each folder of a model with unread weight files.

    Args:
        source: the model with its adapters; models on the hub are not checked.
    """
    lines = []
    if source.is_local:
        lines += _describe(Path(source.path), _read_of_base(source))
    for adapter in map(Path, source.adapters):
        lines += _describe(adapter, _first_of(adapter, _ADAPTERS))
    return lines


def _describe(folder: Path, read: set[str]) -> list[str]:
    names = sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix.lower() in _FORMATS
        and path.name not in read
        and not path.name.startswith(_OF_TRAINERS)
    )
    if not read or not names:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [
        f"{folder}: weights are read from {min(read)}{', ...' if len(read) > 1 else ''}; ignored: "
        f"{', '.join(names[:_SHOWN])}{more}"
    ]


def _first_of(folder: Path, names: tuple[str, ...]) -> set[str]:
    """Return the weight files that are read: those of the first name that exists."""
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        return set()
    if found.suffix != ".json":
        return {found.name}
    try:
        return set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):  # reported when the model is loaded
        return set()
