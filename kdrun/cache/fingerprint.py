"""Hashes that identify a cached teacher, tokenizer or row."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Keys of a configuration that do not affect the outputs: origin and storage of the model.
_NOT_THE_MODEL = frozenset(
    {
        "_name_or_path",
        "architectures",
        "dtype",
        "quantization_config",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)

_SERVED = "served:"


class TokenizerPrint(BaseModel):
    """A tokenizer's fingerprint.

    Attributes:
        vocabulary: hash of all tokens and their ids, added tokens included.
        chat_template: hash of the chat template, or of an empty one if there is none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    vocabulary: str
    chat_template: str


class TeacherPrint(BaseModel):
    """A teacher's fingerprint.

    Attributes:
        config: hash of the configuration.
        head: hash of the weight of the output head.
        parameters: hash of names, types, shapes and contents of all parameters and buffers.

    A server's weights cannot be read: all three then are a hash of how its model is recognised.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    config: str
    head: str
    parameters: str


def print_tokenizer(tokenizer: PreTrainedTokenizerBase) -> TokenizerPrint:
    """The fingerprint of a tokenizer."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return TokenizerPrint(
        vocabulary=_hash_json(vocabulary), chat_template=_hash_json(tokenizer.chat_template or "")
    )


def print_teacher(model: PreTrainedModel) -> TeacherPrint:
    """The fingerprint of a teacher, computed from its content; reads every weight once."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_THE_MODEL}
    everything = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        everything.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        everything.update(_content(tensor))
    return TeacherPrint(
        config=_hash_json(config),
        head=hashlib.sha256(_content(model.get_output_embeddings().weight)).hexdigest(),
        parameters=everything.hexdigest(),
    )


def print_served(identity: list[Any]) -> TeacherPrint:
    """The fingerprint of a teacher on a server, from what it is recognised by."""
    found = f"{_SERVED}{_hash_json(identity)}"
    return TeacherPrint(config=found, head=found, parameters=found)


def is_served(given: TeacherPrint) -> bool:
    """Whether a fingerprint is that of a teacher on a server."""
    return given.parameters.startswith(_SERVED)


def _content(tensor: Tensor) -> Any:
    """The bytes of a tensor, as a buffer."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _hash_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
