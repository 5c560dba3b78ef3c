"""A validated batch: sources, supervised rows, weights and denominator."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kdlosses.compressed import Compressed, TeacherSource, TopK, as_teacher, check_once
from kdlosses.engine import Supervised, supervised_rows
from kdlosses.sources import Source, VocabParallel, as_source

Denominator = int | float | Tensor


@dataclass(frozen=True)
class Batch:
    """The input of a loss.

    Attributes:
        student: source of the student's logits.
        teacher: source of the teacher, or None.
        rows: the supervised rows.
        vocab_size: both sides are cut to this many entries.
    """

    student: Source
    teacher: TeacherSource | None
    rows: Supervised
    vocab_size: int

    @classmethod
    def of(
        cls,
        student: Tensor | Source,
        teacher: Tensor | TeacherSource | None,
        labels: Tensor,
        ignore_index: int,
        vocab_size: int | None,
    ) -> "Batch":
        """Check shapes and labels.

        Raises:
            TypeError: an argument is neither logits nor a source.
            ValueError: inconsistent shapes, labels outside the vocabulary, or a compressed teacher
                over more tokens than the vocabulary has.
        """
        student = as_source(student, "student")
        given = None if teacher is None else as_teacher(teacher)
        sides: dict[str, TeacherSource] = {"student": student}
        if given is not None:
            sides["teacher"] = given
        for name, source in sides.items():
            if source.leading_shape != labels.shape:
                raise ValueError(
                    f"{name}: positions {list(source.leading_shape)} differ from the shape of "
                    f"labels {list(labels.shape)}"
                )
        _check_spread(student, given)
        size = min(source.vocab_size for source in sides.values())
        if vocab_size is not None:
            size = min(size, vocab_size)
        if isinstance(student, VocabParallel) and size <= student.last:
            raise ValueError(
                f"student: if cut to {size} tokens, the last process, whose tokens begin at "
                f"{student.last}, has none; shard the heads after cutting them"
            )
        if isinstance(given, Compressed) and given.vocab_size > size:
            raise ValueError(
                f"teacher: was compressed over {given.vocab_size} tokens, but the shared "
                f"vocabulary has {size}; cut the logits to that size before compressing them"
            )
        rows = supervised_rows(labels, ignore_index, size)
        if isinstance(given, TopK):
            check_once(given, rows.kept)
        return cls(student, given, rows, size)

    @property
    def dtype(self) -> torch.dtype:
        """The data type of values: float32, or float64 for float64 students."""
        double = self.student.tensors[0].dtype == torch.float64
        return torch.float64 if double else torch.float32

    def scalar(self, value: float) -> Tensor:
        """A number as a 0-d tensor on the device of the student."""
        return torch.tensor(value, dtype=self.dtype, device=self.student.tensors[0].device)

    def weights(self, token_weights: Tensor | None) -> Tensor:
        """The weight of each supervised row, ``[n]``.

        Raises:
            ValueError: ``token_weights`` differ in shape from the labels.
        """
        if token_weights is None:
            values = self.student.tensors[0]
            return torch.ones(len(self.rows.labels), dtype=self.dtype, device=values.device)
        if token_weights.shape != self.rows.shape:
            raise ValueError(
                f"token_weights: shape {list(token_weights.shape)} differs from the shape of "
                f"labels {list(self.rows.shape)}"
            )
        return self.rows.pick(token_weights.to(self.dtype))

    def denominator(self, num_tokens: Denominator | None) -> Denominator:
        """The denominator, at least 1 so that a batch without supervised tokens gives 0."""
        if num_tokens is None:
            return max(1, len(self.rows.labels))
        if isinstance(num_tokens, Tensor):
            return num_tokens.clamp_min(1)
        return max(1, num_tokens)


def _check_spread(student: Source, teacher: TeacherSource | None) -> None:
    """Check that teacher and student have the same tokens on each process."""
    spread = isinstance(student, VocabParallel)
    if teacher is None:
        return
    if not isinstance(teacher, VocabParallel):
        if spread:
            raise ValueError(
                "teacher: the student's head is sharded across processes (VocabParallel), so the "
                "teacher's must be as well"
            )
        return
    if not isinstance(student, VocabParallel):
        raise ValueError(
            "student: the teacher's head is sharded across processes, but the student's is not"
        )
    if (student.start, student.group) != (teacher.start, teacher.group):
        raise ValueError(
            f"teacher: its tokens on this process begin at {teacher.start}, but the student's at "
            f"{student.start}; shard both heads in the same way"
        )
