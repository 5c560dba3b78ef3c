"""What the build of a cache needs of a teacher, wherever the teacher runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdlosses import Logits, Projected, TopK
from kdrun.cache.fingerprint import TeacherPrint, print_served, print_teacher
from kdrun.cache.manifest import DType

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from kdrun.models.heads import FrozenTeacher
    from kdrun.served.teacher import ServedTeacher

Batch = dict[str, "Tensor"]
"""``input_ids``, ``attention_mask`` and ``shift_labels``, each ``[rows, length]``."""

Outputs = Logits | Projected | TopK


@dataclass(frozen=True, eq=False)
class TeacherOutputs:
    """A teacher as the build of a cache sees it.

    Attributes:
        name: name of the teacher, as given by the user.
        fingerprint: identifies the teacher; a cache is continued only with the same.
        dtype: data type of the hidden states and the head.
        device: device on which the batches are passed to ``sources``.
        sources: called with batches, yields the outputs of each, in order. It may take batches in
            advance, from any thread, to keep several requests in flight. Outputs have the leading
            shape ``[rows, length]`` and must be right at the supervised positions, where
            ``shift_labels`` is not -100. A :class:`kdlosses.TopK` is stored as it is.
        weight: output head ``[V, width]``; None if hidden states are not available.
        bias: bias of the head ``[V]``, or None.
        logit_scale: factor on the logits.
        softcap: bound of the logits, or None.
        reason: why hidden states cannot be cached, for the message; None if they can.
    """

    name: str
    fingerprint: TeacherPrint
    dtype: DType
    device: torch.device
    sources: Callable[[Iterable[Batch]], Iterator[Outputs]]
    weight: Tensor | None = None
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    reason: str | None = None


def local_outputs(teacher: FrozenTeacher, name: str) -> TeacherOutputs:
    """The outputs of a model in this process; reads every weight once for the fingerprint.

    Args:
        teacher: the teacher, on its device.
        name: name of the teacher, as given by the user.
    """
    head = teacher.model.get_output_embeddings()
    whole = teacher.split.reason is None

    def sources(batches: Iterable[Batch]) -> Iterator[Outputs]:
        return (teacher.source(**batch) for batch in batches)

    return TeacherOutputs(
        name=name,
        fingerprint=print_teacher(teacher.model),
        dtype=dtype_name(head.weight.dtype),
        device=teacher.model.device,
        sources=sources,
        weight=head.weight.detach() if whole else None,
        bias=head.bias.detach() if whole and head.bias is not None else None,
        logit_scale=teacher.split.logit_scale,
        softcap=teacher.split.softcap,
        reason=teacher.split.reason,
    )


def served_outputs(
    teacher: ServedTeacher, name: str, tokenizer: PreTrainedTokenizerBase
) -> TeacherOutputs:
    """The outputs of a teacher on a server, asked for several batches ahead.

    Args:
        teacher: the teacher, on its device.
        name: its address, as given by the user.
        tokenizer: encodes the probe by which the server's model is recognised.

    Raises:
        ServerError: the server fails.
    """
    import torch

    from kdrun.served.teacher import Ahead
    from kdrun.served.writer import identity

    asked, head = teacher.asked, teacher.asked.head
    dtype: DType = "float32" if head is None else dtype_name(head.weight.dtype)

    def sources(batches: Iterable[Batch]) -> Iterator[Outputs]:
        return (teacher.source(**batch) for batch in Ahead(batches, teacher))

    return TeacherOutputs(
        name=name,
        fingerprint=print_served(identity(asked.engine, asked.model, tokenizer)),
        dtype=dtype,
        device=torch.device("cpu"),
        sources=sources,
        weight=None if head is None else head.weight,
        bias=None if head is None else head.bias,
        logit_scale=teacher.split.logit_scale,
        softcap=teacher.split.softcap,
        reason="the server gives no hidden states" if head is None else None,
    )


def dtype_name(dtype: torch.dtype) -> DType:
    """The name of a data type in the configuration."""
    import torch

    names: dict[torch.dtype, DType] = {
        torch.float32: "float32",
        torch.bfloat16: "bfloat16",
        torch.float16: "float16",
    }
    return names[dtype]
