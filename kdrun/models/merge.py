"""Saved adapters of peft: put on their base model and merged into its weights."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun.errors import InputError
from kdrun.models.adapters import INSTALL_PEFT, without_advice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The names under which the families of transformers keep them.
_TABLES = ("embed_tokens", "wte", "embed_in", "word_embeddings")
_HEADS = ("lm_head", "embed_out", "output")
_MISSING = "Found missing adapter keys"


def merge_adapter(
    model: PreTrainedModel, folder: str, say: Callable[[str], None]
) -> PreTrainedModel:
    """Put a saved adapter on its base model and merge it into the weights.

    Args:
        model: the base model. It is resized where the adapter brings more or fewer rows of its
            embeddings and head.
        folder: of the adapter.
        say: is told what of the adapter is not used.

    Returns:
        The base model with other weights, all of which can be trained.

    Raises:
        InputError: peft is missing, or the adapter is broken, of another kind or of another model.
    """
    try:
        import peft
    except ImportError as error:
        raise InputError(f"{folder} holds an adapter, which needs peft: {INSTALL_PEFT}") from error

    with _one_line(folder):
        _resize(model, folder)
        with without_advice(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            device = str(model.device)
            adapted = peft.PeftModel.from_pretrained(model, folder, torch_device=device)
            # peft tells which weights it has not used only where an adapter is there already.
            loaded = adapted.load_adapter(folder, "default", torch_device=device)
        _refuse_missing([str(warning.message) for warning in told])
    if not hasattr(adapted, "merge_and_unload"):
        raise InputError(
            f"{folder}: this kind of adapter cannot be merged into its model; use LoRA"
        )
    for note in (
        *_unknown_settings(folder, adapted.peft_config["default"], peft.__version__),
        *describe_unread(folder, loaded.unexpected_keys, "adapter"),
    ):
        say(note)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a head that is tied no more: see load.py
        merged: PreTrainedModel = adapted.merge_and_unload()
    for weight in merged.parameters():  # peft has frozen them
        weight.requires_grad_(weight.is_floating_point())
    return merged.eval()


@contextmanager
def _one_line(folder: str) -> Iterator[None]:
    """Turn what a broken adapter raises, in peft or below it, into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # torch says on a second line which weight has another size.
        reason = " ".join(line.strip() for line in lines[:2])
        raise InputError(
            f"{folder}: the adapter does not fit its base model or is broken ({reason})"
        ) from error


def _refuse_missing(told: Sequence[str]) -> None:
    """Refuse weights that the adapter lacks; peft only warns, as of much that does no harm."""
    for line in told:
        if line.startswith(_MISSING):
            raise ValueError(line)


def _unknown_settings(folder: str, config: Any, version: str) -> list[str]:
    """A line about the settings of a newer peft."""
    written = json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    unknown = {name: value for name, value in written.items() if not hasattr(config, name)}
    if not unknown:
        return []
    shown = ", ".join(f"{name}={json.dumps(value)}" for name, value in unknown.items())
    return [
        f"{folder}: written by peft {written.get('peft_version', 'of another version')}; peft "
        f"{version} does not know its settings and leaves them out: {shown}"
    ]


def describe_unread(source: object, names: Sequence[str], what: str) -> list[str]:
    """A line about weights that are on disk and not in the model; none where there are none.

    Args:
        source: the model or adapter.
        names: of the weights.
        what: they are the weights of.
    """
    if not names:
        return []
    some = "1 weight" if len(names) == 1 else f"{len(names)} weights"
    isnt = "is" if len(names) == 1 else "are"
    return [
        f"{source}: {some} of the {what} {isnt} not part of the model's class and {isnt} left out, "
        f"such as {min(names)}"
    ]


def adapter_rows(folder: str | Path) -> int | None:
    """Rows of the embeddings or head that an adapter brings; None where it brings neither.

    What is wrong with a damaged one is told when it is loaded.
    """
    from safetensors import SafetensorError

    try:
        shapes = _shapes(folder)
    except (OSError, SafetensorError):
        return None
    rows = [*_rows(shapes, _TABLES), *_rows(shapes, _HEADS)]
    return min(rows) if rows else None


def _resize(model: PreTrainedModel, folder: str) -> None:
    """Give the base model as many rows as the adapter's own embeddings and head have.

    Raises:
        ValueError: the adapter brings only one of them, and they are two matrices.
    """
    shapes = _shapes(folder)
    tables, heads = _rows(shapes, _TABLES), _rows(shapes, _HEADS)
    found = {*tables, *heads}
    has: Any = model.get_input_embeddings()
    now = has.weight.shape[0]
    if not found - {now}:
        return
    tied = model.get_output_embeddings().weight is has.weight
    if len(found) > 1 or not (tied or (tables and heads)):
        raise ValueError(
            f"it was trained on {max(found)} tokens, its base model has {now}; resize the base "
            "model's embeddings and head, and name that model as its base"
        )
    model.resize_token_embeddings(found.pop(), mean_resizing=False)


def _rows(shapes: dict[str, list[int]], names: Sequence[str]) -> list[int]:
    """Rows of the whole matrices that belong to modules of some names."""
    found = []
    for key, shape in shapes.items():
        parts = key.split(".")
        if "lora" not in key and parts[-1] == "weight" and set(names) & {*parts[-3:-1]}:
            found.append(shape[0])
    return found


def _shapes(folder: str | Path) -> dict[str, list[int]]:
    """The shape of each weight of an adapter; only the head of its file is read."""
    from safetensors import safe_open

    file = Path(folder) / ADAPTER_WEIGHTS
    if not file.is_file():
        return {}
    with safe_open(file, "pt") as opened:
        return {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
