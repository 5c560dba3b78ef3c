"""Initialise a student from some of the teacher's layers.

The layers are evenly spaced, the first and the last among them; a student of one layer keeps the
first, which reads the embeddings. Everything else - embeddings, final norm, head, tokenizer,
chat template, generation settings - is the teacher's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun.errors import InputError
from kdrun.models.load import load_model, rebuild
from kdrun.models.locate import ModelSource, locate_model
from kdrun.models.tokenizers import load_tokenizer
from kdrun.paths import expand_home, make_output_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_LAYER_LISTS = ("layers", "h")
# Configuration entries that list layers by index, and those that count the first layers.
_INDEX_LISTS = (
    "cross_attention_layers",
    "full_attn_idxs",
    "local_layer_ids",
    "mlp_only_layers",
    "moe_layers",
    "rope_scaling_layers",
)
_FIRST_COUNTS = ("first_k_dense_replace", "max_window_layers")
# Attributes that depend on a layer's index; all others must agree in two copies of a layer.
_PLACES = frozenset({"layer_idx", "layer_id", "layer_number", "training"})


@dataclass(frozen=True)
class InitialStudent:
    """The new student.

    Attributes:
        folder: The student's folder.
        kept_layers: The indices of the teacher's layers that it contains.
        teacher_layers: Number of layers of the teacher.
        parameters: Number of parameters of the student, tied ones counted once.
    """

    folder: Path
    kept_layers: tuple[int, ...]
    teacher_layers: int
    parameters: int


def init_student(
    teacher: str | Path | ModelSource,
    keep_layers: int,
    output: str | Path,
    trust_remote_code: bool = False,
    say: Callable[[str], None] | None = None,
) -> InitialStudent:
    """Create a student from evenly spaced layers of a teacher, and save it as a folder.

    Args:
        teacher: A folder, a GGUF file, or a hub name.
        keep_layers: Number of layers of the student, from 1 to the teacher's number.
        output: A folder that does not exist or is empty.
        trust_remote_code: Run Python code that comes with the teacher.
        say: Called with a line for each unused file of the teacher; None reports nothing.

    Raises:
        InputError: The teacher cannot be loaded or taken apart, `keep_layers` is out of range, or
            the output folder is not empty. Nothing is written in that case.
    """
    source = teacher if isinstance(teacher, ModelSource) else locate_model(teacher)
    folder = expand_home(output)
    _check_free(folder)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    # A folder keeps its stored data type; a GGUF file has no such type.
    dtype = "float32" if source.gguf_file else "auto"
    model = load_model(
        source, dtype=dtype, trust_remote_code=trust_remote_code, say=say, plain=True
    )
    layers = model.config.get_text_config().num_hidden_layers
    kept = spaced_layers(layers, keep_layers)
    student = keep_only(model, kept)
    make_output_folder(folder)
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return InitialStudent(folder, kept, layers, student.num_parameters())


def _check_free(folder: Path) -> None:
    if folder.is_file():
        raise InputError(f"{folder} is a file; choose a folder for the student")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; choose another folder for the student")


def spaced_layers(layers: int, keep: int) -> tuple[int, ...]:
    """Return indices of evenly spaced layers, including the first and, if several, the last.

    Example:
        >>> spaced_layers(30, 10)
        (0, 3, 6, 10, 13, 16, 19, 23, 26, 29)

    Raises:
        InputError: `keep` is not between 1 and `layers`.
    """
    if not 1 <= keep <= layers:
        raise InputError(
            f"--keep-layers {keep}: the teacher has {layers} layers; keep between 1 and {layers}"
        )
    if keep == 1:
        return (0,)
    gaps = keep - 1
    # Rounds half up in integers; Python's round() rounds half to even.
    return tuple((2 * i * (layers - 1) + gaps) // (2 * gaps) for i in range(keep))


def keep_only(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """Create a model from some of another model's layers.

    The new model is built from its configuration, so that every layer has its new index, and then
    compared with the old one layer by layer.

    Args:
        model: A model whose decoder layers transformers calls ``layers`` or ``h``.
        kept: The indices of the layers to keep, ascending.

    Raises:
        InputError: The layers are not found, or one would behave differently at its new index.
    """
    prefix = _find_layers(model)
    config = copy.deepcopy(model.config)
    _keep_in_config(config.get_text_config(), kept)
    student = rebuild(model, config, _keep_in_weights(model.state_dict(), prefix, kept))
    for new, old in enumerate(kept):
        before, after = _traits(model, f"{prefix}.{old}"), _traits(student, f"{prefix}.{new}")
        changed = sorted(
            key for key in before.keys() | after.keys() if before.get(key) != after.get(key)
        )
        if changed:
            raise InputError(
                f"{type(model).__name__}: layer {old} of the teacher would behave differently "
                f"as layer {new} of the student ({changed[0]}); layers of this kind of model "
                "cannot be removed"
            )
    return student


def _find_layers(model: PreTrainedModel) -> str:
    """Return the name of the list of decoder layers."""
    from torch.nn import ModuleList

    count = model.config.get_text_config().num_hidden_layers
    found: list[str] = [
        name
        for name, module in model.named_modules()
        if isinstance(module, ModuleList)
        and name.rpartition(".")[2] in _LAYER_LISTS
        and len(module) == count
    ]
    if len(found) != 1:
        raise InputError(
            f"{type(model).__name__}: {'no' if not found else 'more than one'} list of {count} "
            "decoder layers called 'layers' or 'h'; init-student cannot remove layers from this "
            "kind of model"
        )
    return found[0]


def _keep_in_config(config: Any, kept: Sequence[int]) -> None:
    """Set the number of layers, and all per-layer entries of a configuration."""
    layers = config.num_hidden_layers
    new_place = {old: new for new, old in enumerate(kept)}
    changes: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name in _INDEX_LISTS and isinstance(value, list):
            changes[name] = [new_place[old] for old in value if old in new_place]
        elif name in _FIRST_COUNTS and isinstance(value, int):
            changes[name] = sum(old < value for old in kept)
        elif isinstance(value, list) and len(value) == layers and _is_by_layer(name):
            changes[name] = [value[old] for old in kept]
    if "attention_layers" in changes and hasattr(config, "attention_types"):
        # GPT-Neo repeats the list in a compressed form, and reads only that.
        changes["attention_types"] = [[[kind], 1] for kind in changes["attention_layers"]]
    for name, value in changes.items():
        setattr(config, name, value)
    config.num_hidden_layers = len(kept)


def _is_by_layer(name: str) -> bool:
    """Return whether a list with as many entries as layers is per layer, judging by its name."""
    return name != "architectures" and "token" not in name


def _keep_in_weights(
    weights: dict[str, torch.Tensor], prefix: str, kept: Sequence[int]
) -> dict[str, torch.Tensor]:
    new_place = {str(old): str(new) for new, old in enumerate(kept)}
    result: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if not name.startswith(f"{prefix}."):
            result[name] = tensor
            continue
        index, _, rest = name.removeprefix(f"{prefix}.").partition(".")
        if index in new_place:
            result[f"{prefix}.{new_place[index]}.{rest}"] = tensor
    return result


def _traits(model: PreTrainedModel, layer: str) -> dict[str, Any]:
    """Return all plain attributes of a layer and its parts: windows, scales, kinds, sizes."""
    root = model.get_submodule(layer)
    return {
        f"{name}.{attribute}".lstrip("."): value
        for name, part in root.named_modules()
        for attribute, value in vars(part).items()
        if attribute not in _PLACES
        and not attribute.startswith("_")
        and (value is None or isinstance(value, bool | int | float | str))
    }
