"""Hashes that identify a cached teacher, tokenizer or row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from kdrun.data.collate import IGNORE_INDEX
from kdrun.errors import InputError

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


@dataclass(frozen=True, eq=False)
class BatchRow:
    """A row of a batch without its padding.

    Attributes:
        number: index of the row in the batch.
        positions: supervised positions in the padded row, ascending.
        ids: tokens of the row.
        key: hash of the tokens and of the supervised positions among them.
    """

    number: int
    positions: Tensor
    ids: list[int]
    key: bytes


def rows_of(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    shift_labels: Tensor,
    position_ids: Tensor | None = None,
) -> Iterator[BatchRow]:
    """The rows of a batch with supervised positions, without padding on either side.

    A packed row is split into its examples, which are the cached rows.

    Args:
        input_ids: ``[rows, length]``.
        attention_mask: same shape; 0 is padding. None if there is no padding.
        shift_labels: same shape, aligned with the logits.
        position_ids: same shape, for packed rows: 0 at the start of each example.

    Raises:
        InputError: a padded position is supervised.
    """
    import torch

    # Keys are bytes, so they are computed on the CPU.
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    columns = (input_ids, mask.bool(), shift_labels != IGNORE_INDEX)
    ids, kept, supervised = (tensor.cpu() for tensor in columns)
    for number in range(len(ids)):
        if (supervised[number] & ~kept[number]).any():
            raise InputError(
                f"row {number + 1} of a batch supervises a padded position; with left padding, "
                "the first token of a row must not be a target (label -100)"
            )
        for part in _parts(len(ids[number]), position_ids, number):
            if not supervised[number, part].any():
                continue
            tokens = ids[number, part][kept[number, part]].long()
            targets = supervised[number, part][kept[number, part]]
            content = hashlib.sha256(tokens.numpy().tobytes())
            content.update(targets.numpy().tobytes())
            positions = supervised[number, part].nonzero().squeeze(1) + part.start
            yield BatchRow(number, positions, tokens.tolist(), content.digest())


def _parts(length: int, position_ids: Tensor | None, number: int) -> list[slice]:
    """The slices of the examples in a row."""
    starts = [0] if position_ids is None else (position_ids[number] == 0).nonzero()[:, 0].tolist()
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], length], strict=True)]


def _content(tensor: Tensor) -> Any:
    """The bytes of a tensor, as a buffer."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _hash_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
