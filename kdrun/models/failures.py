"""Errors of transformers when a model cannot be loaded, as one line for the user."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdrun.errors import InputError
from kdrun.models.locate import ModelSource
from kdrun.paths import did_you_mean

PICKLED = "contains Python objects, which kdrun does not run, or is damaged"
"""About a file of torch that was not read with ``weights_only``."""
_ATTENTION = re.compile(r"attn_implementation|Flash ?Attention|flex_attention|flash-attn")

_WRONG_FILE = re.compile("size mismatch|mismatched|PytorchStreamReader|unexpected EOF")


@contextmanager
def one_clear_line(source: ModelSource, what: str) -> Iterator[None]:
    """Turn errors of loading into `InputError`.

    Args:
        source: What is loaded.
        what: Its kind, such as "model" or "tokenizer".

    Raises:
        InputError: Instead of the error, which is its cause.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (pickle.UnpicklingError, EOFError) as error:
        raise InputError(
            f"{source}: its pytorch_model.bin {PICKLED}; pass a model with model.safetensors"
        ) from error
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        raise InputError(_line(source, what, error)) from error
    except RuntimeError as error:
        # Wrong shapes in a file and broken files are input errors; a device out of memory is not.
        if not _WRONG_FILE.search(str(error)):
            raise
        raise InputError(_line(source, what, error)) from error


def _line(source: ModelSource, what: str, error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return (
            f"{source}: the {what} needs Python code that comes with it, which kdrun does not run "
            "by default; if you trust it, pass --set model.trust_remote_code=true, or "
            "--trust-remote-code with kdrun generate and kdrun init-student"
        )
    if "couldn't connect" in text or "valid model identifier" in text:
        if source.is_local:
            return f"{source} contains no usable {what}"
        return (
            f"{source}: no such folder or file{did_you_mean(Path(source.path))}, and no model of "
            "this name is on the hub or in its cache (is the hub reachable?)"
        )
    if "no file named" in text or "does not appear to have a file named" in text:
        return f"{source} has no weights; it needs model.safetensors next to config.json"
    if _ATTENTION.search(text):
        reason = text.strip().splitlines()[0].split(". ")[0].rstrip(".")
        return f"model.attention: {source} cannot use it ({reason}); choose another, such as eager"
    if unfit := re.search(r"Unrecognized configuration class <class '[\w.]*?(\w+)'>", text):
        return f"{source} is not a causal language model ({unfit[1]})"
    if unknown := re.search(r"has model type `([^`]*)` but", text):
        return (
            f"{source}: this version of transformers does not know the model type {unknown[1]!r}; "
            "upgrade transformers"
        )
    if source.gguf_file and isinstance(error, ImportError):
        return f"{source}: GGUF files need two more packages: pip install 'kdlosses[gguf]'"
    if "backend tokenizer" in text:
        return f"{source} contains no readable tokenizer; save one in the folder"
    reason = (text.strip() or type(error).__name__).splitlines()[0]
    return f"{source}: the {what} cannot be loaded ({reason})"
