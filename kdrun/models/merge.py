"""Merging saved peft adapters into the weights of their base model."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun.errors import InputError
from kdrun.models.adapters import INSTALL_PEFT, without_advice
from kdrun.models.cast import cast_weights
from kdrun.models.failures import PICKLED
from kdrun.models.heads import causal_lm
from kdrun.models.nf4 import dequantize, is_nf4

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Their names in the model families of transformers.
_TABLES = ("embed_tokens", "wte", "embed_in", "word_embeddings")
_HEADS = ("lm_head", "embed_out", "output")
_MISSING = "Found missing adapter keys"


def merge_adapter(
    model: PreTrainedModel, folder: str, say: Callable[[str], None]
) -> PreTrainedModel:
    """Load a saved adapter and merge it into the weights of its base model.

    Args:
        model: the base model. It is resized if the adapter has more or fewer rows of
            embeddings and head.
        folder: folder of the adapter.
        say: called with a line for each unused part of the adapter.

    Returns:
        The base model with merged weights, all trainable.

    Raises:
        InputError: peft is missing, or the adapter is broken, of another kind or for another model.
    """
    try:
        import peft
    except ImportError as error:
        raise InputError(
            f"{folder} contains an adapter, which needs peft: {INSTALL_PEFT}"
        ) from error

    with _one_line(folder):
        _resize(model, folder)
        with without_advice(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            device = str(model.device)
            adapted = peft.PeftModel.from_pretrained(model, folder, torch_device=device)
            # peft reports unused weights only if an adapter exists already.
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
        warnings.simplefilter("ignore", UserWarning)  # about an untied head: see load.py
        merged: PreTrainedModel = adapted.merge_and_unload()
    for weight in merged.parameters():  # peft has frozen them
        weight.requires_grad_(weight.is_floating_point())
    return merged.eval()


def merge_trained(
    adapted: Any, dtype: str | None, folder: str, say: Callable[[str], None]
) -> PreTrainedModel:
    """Merge the adapters of a trained student into a type of weights.

    Each layer is summed in float32 and rounded once; a 16-bit sum would be rounded twice. Weights
    in 4 bits are first dequantised: the merged model has the values that the adapters were trained
    above, and is not quantised again.

    Args:
        adapted: a model with adapters of peft; changed in place.
        dtype: type of the merged weights; None keeps that of the base model.
        folder: folder of its saved adapters.
        say: as for :func:`merge_adapter`.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    wanted = causal_lm(adapted).dtype if dtype is None else getattr(torch, dtype)
    if is_nf4(causal_lm(adapted)):
        base: PreTrainedModel = adapted.unload()
        dequantize(base)
        cast_weights(base, torch.float32)
        return cast_weights(merge_adapter(base, folder, say), wanted)
    for layer in list(adapted.modules()):
        if isinstance(layer, BaseTunerLayer):
            cast_weights(layer, torch.float32)
            layer.merge()
            cast_weights(layer, wanted)
    merged: PreTrainedModel = adapted.unload()
    return cast_weights(merged, wanted)


def merged_weights(model: Any) -> dict[str, Any]:
    """Return a model's weights with its adapters added, without changing the model.

    Args:
        model: a causal language model, perhaps with active adapters of LoRA in its layers.

    Returns:
        Tensors by the names that the model has without adapters.
    """
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return dict(model.state_dict())
    found = dict(model.state_dict())
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        own = {key: value for key, value in found.items() if key.startswith(f"{name}.")}
        for key in own:
            del found[key]
        base = f"{name}.base_layer."
        plain = {key.removeprefix(base): value for key, value in own.items() if base in key}
        for adapter in layer.active_adapters:
            delta = layer.get_delta_weight(adapter)
            plain["weight"] = (plain["weight"].float() + delta.float()).to(plain["weight"].dtype)
        found |= {f"{name}.{key}": value for key, value in plain.items()}
    return found


@contextmanager
def _one_line(folder: str) -> Iterator[None]:
    """Turn errors of a broken adapter, in peft or below it, into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{folder}: its adapter_model.bin {PICKLED}; pass an adapter with {ADAPTER_WEIGHTS}"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # torch names the mismatched weight on a second line.
        reason = " ".join(line.strip() for line in lines[:2])
        raise InputError(
            f"{folder}: the adapter does not fit its base model or is broken ({reason})"
        ) from error


def _refuse_missing(told: Sequence[str]) -> None:
    """Refuse an adapter that lacks weights; peft only warns, as it does of harmless things."""
    for line in told:
        if line.startswith(_MISSING):
            raise ValueError(line)


def _unknown_settings(folder: str, config: Any, version: str) -> list[str]:
    """Return a line about the settings of a newer peft."""
    written = json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    unknown = {name: value for name, value in written.items() if not hasattr(config, name)}
    if not unknown:
        return []
    shown = ", ".join(f"{name}={json.dumps(value)}" for name, value in unknown.items())
    return [
        f"{folder}: written by peft {written.get('peft_version', 'of another version')}; peft "
        f"{version} does not know these settings and ignores them: {shown}"
    ]


def describe_unread(source: object, names: Sequence[str], what: str) -> list[str]:
    """Return a line about weights that are on disk but not in the model; none if there are none.

    Args:
        source: the model or adapter.
        names: names of the weights.
        what: the object that the weights belong to.
    """
    if not names:
        return []
    some = "1 weight" if len(names) == 1 else f"{len(names)} weights"
    isnt = "is" if len(names) == 1 else "are"
    return [
        f"{source}: {some} of the {what} {isnt} not part of the model's class and {isnt} ignored, "
        f"such as {min(names)}"
    ]


def adapter_rows(folder: str | Path) -> int | None:
    """Return the number of rows of an adapter's embeddings or head; None if it has neither.

    Damage is reported when the adapter is loaded.
    """
    from safetensors import SafetensorError

    try:
        shapes = _shapes(folder)
    except (OSError, SafetensorError):
        return None
    rows = [*_rows(shapes, _TABLES), *_rows(shapes, _HEADS)]
    return min(rows) if rows else None


def _resize(model: PreTrainedModel, folder: str) -> None:
    """Resize the base model to the rows of the adapter's own embeddings and head.

    Raises:
        ValueError: the adapter has only one of them, and they are two matrices.
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
            f"it was trained on {max(found)} tokens, but its base model has {now}; resize the base "
            "model's embeddings and head, and use that model as its base"
        )
    model.resize_token_embeddings(found.pop(), mean_resizing=False)


def _rows(shapes: dict[str, list[int]], names: Sequence[str]) -> list[int]:
    """Return the rows of the full matrices of modules with certain names."""
    found = []
    for key, shape in shapes.items():
        parts = key.split(".")
        if "lora" not in key and parts[-1] == "weight" and set(names) & {*parts[-3:-1]}:
            found.append(shape[0])
    return found


def _shapes(folder: str | Path) -> dict[str, list[int]]:
    """Return the shape of each weight of an adapter, reading only the header of its file."""
    from safetensors import safe_open

    file = Path(folder) / ADAPTER_WEIGHTS
    if not file.is_file():
        return {}
    with safe_open(file, "pt") as opened:
        return {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
