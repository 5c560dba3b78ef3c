"""Checkpoints whose weights are quantised already."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from kdrun.errors import InputError
from kdrun.models.context import load_model_config

if TYPE_CHECKING:
    from kdrun.models.locate import ModelSource

# The modules and packages of common methods; transformers names those of the others itself.
_PACKAGES = {
    "awq": (("gptqmodel", "gptqmodel"),),
    "bitsandbytes": (("bitsandbytes", "bitsandbytes"),),
    "compressed-tensors": (("compressed_tensors", "compressed-tensors"),),
    "gptq": (("optimum", "optimum"), ("gptqmodel", "gptqmodel")),
    "torchao": (("torchao", "torchao"),),
}
# Methods that transformers can undo while it loads a checkpoint.
_UNDONE = {
    "compressed-tensors": "CompressedTensorsConfig",
    "fp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
}
# Undone in any case: its layers would be dequantised for good by their first forward pass.
_ALWAYS_UNDONE = ("compressed-tensors",)


def stored_method(source: ModelSource, trust_remote_code: bool = False) -> str | None:
    """Return the method by which a checkpoint is quantised, without reading weights.

    Args:
        source: the model; a GGUF file is always unpacked and counts as not quantised.
        trust_remote_code: whether its configuration may run its own code.
    """
    if source.gguf_file is not None:
        return None
    config = load_model_config(source, trust_remote_code)
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    found = settings if isinstance(settings, dict) else settings.to_dict()
    method = found.get("quant_method")
    return None if method is None else str(getattr(method, "value", method))


def check_stored(source: ModelSource, trust_remote_code: bool = False) -> str | None:
    """Refuse a quantised checkpoint whose package is missing, before weights are read.

    Returns:
        A line about the checkpoint, if it is quantised.

    Raises:
        InputError: names the package.
    """
    method = stored_method(source, trust_remote_code)
    if method is None:
        return None
    for module, package in _PACKAGES.get(method, ()):
        if find_spec(module) is None:
            raise InputError(
                f"{source}: its weights are quantised by {method}, which needs the package "
                f"{package}: pip install {package}, or pass a checkpoint that is not quantised"
            )
    if method in _ALWAYS_UNDONE:
        return f"{source}: its weights, quantised by {method}, are dequantised"
    return f"{source}: its weights are quantised by {method}; a dry run counts them in full"


def loading_options(source: ModelSource, trust_remote_code: bool, plain: bool) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that undo a quantisation, where necessary.

    Args:
        source: the model.
        trust_remote_code: whether its configuration may run its own code.
        plain: whether its weights will be trained, merged or quantised again.

    Raises:
        InputError: the weights are to be plain, and transformers cannot dequantise them.
    """
    import transformers

    method = stored_method(source, trust_remote_code)
    if method is None or not (plain or method in _ALWAYS_UNDONE):
        return {}
    if method not in _UNDONE:
        raise InputError(
            f"{source}: its weights are quantised by {method}, and transformers cannot dequantise "
            "them to be trained, merged or quantised again; pass the checkpoint that it was made "
            "from"
        )
    return {"quantization_config": getattr(transformers, _UNDONE[method])(dequantize=True)}


def check_plain(source: ModelSource, trust_remote_code: bool = False) -> None:
    """Refuse a checkpoint that cannot be trained, before weights are read.

    Raises:
        InputError: it is quantised, and transformers cannot dequantise it.
    """
    loading_options(source, trust_remote_code, plain=True)
