"""Locating models: a folder, a GGUF file, or a name on the hub."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from kdrun.errors import InputError
from kdrun.paths import did_you_mean, expand_home

STUDENT = "student"
"""Subfolder of a run with the trained student."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ADAPTER = "adapter_config.json"
_GGUF_ON_HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)/([\w.-]+\.gguf)")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The location of a model.

    Attributes:
        path: A folder, or the name of a model on the hub.
        gguf_file: The GGUF file in it that contains the weights, if any.
        adapters: Folders of adapters on top of it, the innermost first.
        revision: Branch, tag or commit on the hub; None is main, or a folder.
    """

    path: str
    gguf_file: str | None = None
    adapters: tuple[str, ...] = ()
    revision: str | None = None

    def __str__(self) -> str:
        """The model as messages name it."""
        if self.revision is None or self.adapters:
            return self.name
        return f"{self.name}@{self.revision}"

    @property
    def name(self) -> str:
        """The model without its revision, as :func:`locate_model` accepts it."""
        if self.adapters:
            return self.adapters[-1]
        return f"{self.path}/{self.gguf_file}" if self.gguf_file else self.path

    @property
    def options(self) -> dict[str, str]:
        """Keyword arguments of ``from_pretrained`` besides the path."""
        given = {"gguf_file": self.gguf_file, "revision": self.revision}
        return {key: value for key, value in given.items() if value is not None}

    @property
    def base(self) -> ModelSource:
        """The model without its adapters."""
        return replace(self, adapters=())

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine, rather than on the hub."""
        return Path(self.path).is_dir()


def locate_model(given: str | Path) -> ModelSource:
    """Resolve a model's name or path, without loading anything.

    Args:
        given: A folder with a ``config.json``; a folder with one GGUF file; a GGUF file; a folder
            with an adapter of peft, which names its model; ``owner/name`` or ``name`` on the hub,
            also with ``/file.gguf`` after it.

    Returns:
        The folder or hub name, and the GGUF file.

    Raises:
        InputError: It does not exist, or the folder contains no model, or more than one.
    """
    path = expand_home(given)
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return ModelSource(str(path.parent), path.name)
        raise InputError(
            f"{given} is not a model; pass the folder that contains its config.json, or a GGUF file"
        )
    name = str(given)
    if not _is_path(name):
        if on_hub := _GGUF_ON_HUB.fullmatch(name):
            return ModelSource(on_hub[1], on_hub[2])
        if _HUB_ID.fullmatch(name):
            return ModelSource(name)
    raise InputError(f"{given}: no such file or folder{did_you_mean(path)}")


def _is_path(name: str) -> bool:
    """Return whether a missing name was meant as a local path rather than one on the hub."""
    first, *rest = name.split("/")
    if name.endswith(".gguf") and len(rest) < 2:
        return True
    return bool(rest) and Path(first).is_dir()


def _in_folder(folder: Path) -> ModelSource:
    if is_adapter(folder):
        return _adapter(folder)
    if (folder / "config.json").is_file():
        return ModelSource(str(folder))
    gguf_files = sorted(p.name for p in folder.iterdir() if p.suffix.lower() == ".gguf")
    if len(gguf_files) == 1:
        return ModelSource(str(folder), gguf_files[0])
    if gguf_files:
        raise InputError(
            f"{folder} contains {len(gguf_files)} GGUF files; choose one of them: "
            f"{', '.join(gguf_files[:3])}"
        )
    if holds_model(folder / "student"):
        raise InputError(f"{folder} is the folder of a run; its model is {folder / 'student'}")
    raise InputError(f"{folder} contains no model: it has neither a config.json nor a GGUF file")


def holds_model(folder: Path) -> bool:
    """Return whether a folder contains a model or an adapter in Hugging Face's formats."""
    return (folder / "config.json").is_file() or (folder / _ADAPTER).is_file()


def is_adapter(folder: Path) -> bool:
    """Return whether a folder contains a peft adapter and no complete model."""
    return (folder / _ADAPTER).is_file() and not any(folder.glob("model*.safetensors"))


def _adapter(folder: Path) -> ModelSource:
    """Return an adapter with the model that its ``adapter_config.json`` names."""
    file = folder / _ADAPTER
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{file}: not the configuration of an adapter; save it again") from error
    if not base:
        raise InputError(f"{file} names no base model; set base_model_name_or_path")
    # A run's folder may have been moved together with its base model.
    candidates = (Path(base), folder / base, folder.parent / Path(base).name)
    there = next((str(path) for path in candidates if path.exists()), str(base))
    if Path(there).resolve() == folder.resolve():
        raise InputError(f"{file} names its own folder as base model; name the model itself")
    try:
        found = locate_model(there)
    except InputError as error:
        raise InputError(
            f"{folder} contains an adapter whose base model {base} does not exist; set "
            f"base_model_name_or_path in {file} to its path"
        ) from error
    if not (found.is_local or found.adapters):
        found = replace(found, revision=revision)
    return replace(found, adapters=(*found.adapters, str(folder)))


def commit_of(source: ModelSource) -> str | None:
    """Return the commit that a model on the hub is loaded from; None for a folder."""
    from transformers.utils.hub import resolve_revision

    if source.is_local:
        return None
    found = resolve_revision(source.path, source.revision)
    commit = getattr(found, "resolved", found)  # a commit itself is already resolved
    return None if commit is None or _COMMIT.fullmatch(commit) is None else str(commit)


def at_revision(source: ModelSource, revision: str | None, key: str) -> ModelSource:
    """Return a model on the hub at a revision.

    Args:
        source: the model.
        revision: branch, tag or commit; None changes nothing.
        key: key of the configuration that gives it.

    Raises:
        InputError: the model is a folder, which has no revisions.
    """
    if revision is None:
        return source
    if source.is_local or source.adapters:
        raise InputError(
            f"{key}={revision} has no effect: {source} is a local folder; remove the key, or pass "
            "the model's name on the hub"
        )
    return replace(source, revision=revision)
