"""Hashes that tell whether a teacher, a tokenizer or a row is the one that was cached."""

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

# Of a configuration, what does not change the numbers: where it came from, and how it is stored.
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
        chat_template: hash of the chat template; of an empty one where there is none.
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
    """The fingerprint of a teacher, from its content alone; every weight is read once."""
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
        number: which row of the batch.
        positions: where in the padded row the supervised positions are, ascending.
        ids: the row's tokens.
        key: hash of the tokens and of which positions among them are supervised.
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
    """The rows of a batch that have supervised positions; padding on either side is taken off.

    A packed row is taken apart into its examples, which are the rows that were cached.

    Args:
        input_ids: ``[rows, length]``.
        attention_mask: likewise; 0 is padding. None where no position is.
        shift_labels: likewise, aligned with the logits.
        position_ids: likewise, of packed rows: 0 where an example begins.

    Raises:
        InputError: a padded position is supervised.
    """
    import torch

    # Looked up on the CPU: a key is bytes.
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
    """Where the examples of a row stand."""
    starts = [0] if position_ids is None else (position_ids[number] == 0).nonzero()[:, 0].tolist()
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], length], strict=True)]


def _content(tensor: Tensor) -> Any:
    """The bytes of a tensor, as a buffer."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _hash_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
