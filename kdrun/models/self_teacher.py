"""The student as its own teacher, without a second copy of its weights."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kdlosses import Logits, Projected
from kdrun.errors import InputError
from kdrun.models.heads import HeadSplit, call, causal_lm, in_16_bits_where_needed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kdrun.config.sections import ModelConfig

FROZEN, LIVE = "self", "self:live"
_UNUSED = ("teacher_revision", "teacher_cache")
_OF_A_COPY = ("teacher_quantization", "teacher_device")


def is_self(teacher: str | None) -> bool:
    """Return whether the student is its own teacher."""
    return teacher is not None and teacher.partition(":")[0] == FROZEN


def refuse_self(teacher: str | None, command: str) -> None:
    """Refuse a command that needs the teacher's weights.

    Raises:
        InputError: the student would be its own teacher.
    """
    if is_self(teacher):
        raise InputError(
            f"--teacher {teacher}: {command} has no student in training; pass the student's folder "
            "as --teacher"
        )


def check_self(model: ModelConfig, adapters: bool) -> None:
    """Refuse keys that have no effect on a student that is its own teacher.

    Args:
        model: names the teacher.
        adapters: whether adapters are trained.

    Raises:
        InputError: names the key and the cure.
    """
    if not is_self(model.teacher):
        if model.teacher_ema is not None:
            raise InputError(
                "model.teacher_ema is a mean of the student's weights: it needs --teacher self"
            )
        return
    if model.teacher not in (FROZEN, LIVE):
        close = difflib.get_close_matches(str(model.teacher), (FROZEN, LIVE), n=1)
        raise InputError(
            f"--teacher {model.teacher}: unknown; did you mean {(close or [LIVE])[0]}?"
        )
    if model.teacher == LIVE and model.teacher_ema is not None:
        raise InputError(
            f"model.teacher_ema is a mean of the student's weights, and --teacher {LIVE} uses the "
            "present ones; use --teacher self, or remove it"
        )
    if model.teacher_ema is not None and not adapters and model.student_type != "float32":
        raise InputError(
            f"model.teacher_ema: in {model.student_type} the mean would not move; set "
            "model.student_dtype=float32"
        )
    follows = adapters or model.teacher == LIVE or model.teacher_ema is not None
    for name in (*_UNUSED, *(_OF_A_COPY if follows else ())):
        if getattr(model, name) is not None:
            raise InputError(
                f"model.{name} has no effect with --teacher {model.teacher}, which has "
                "the student's weights; remove it"
            )


class SelfTeacher:
    """The student's present weights, or those below its adapters, without gradient.

    The student is in eval mode meanwhile, so that dropout does not disturb the teacher.

    Args:
        model: the student, before adapters are added.
        split: how it computes logits.
        live: whether the present weights are used; otherwise adapters are switched off.

    Attributes:
        model: the student, wrapped by peft if adapters are trained.
    """

    def __init__(self, model: Any, split: HeadSplit, live: bool) -> None:
        self.model = model
        self.split = split
        self.exact = True
        self.is_live = live

    def begin(self, adapted: Any) -> None:
        """Use the student with its adapters, before the first step."""
        self.model = adapted

    def to(self, device: torch.device) -> None:
        """Do nothing: the weights are where the student is."""

    def source(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        shift_labels: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """Return the source of the logits, as :class:`kdrun.models.heads.FrozenTeacher` does."""
        import torch

        del shift_labels
        found: list[Logits | Projected] = []

        def keep(source: Logits | Projected) -> dict[str, Tensor]:
            found.append(source)
            return {}

        features = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        with torch.no_grad(), self._as_teacher():
            call(self.model, keep, **features)
        (source,) = found
        if isinstance(source, Logits):
            return source
        bias = None if source.bias is None else source.bias.detach()
        return replace(source, weight=source.weight.detach(), bias=bias)

    @contextmanager
    def _as_teacher(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            with _apart_from_the_students_pass(causal_lm(self.model)):
                if self.is_live:
                    yield
                else:
                    with self.model.disable_adapter():
                        yield
        finally:
            self.model.train(training)


def _apart_from_the_students_pass(model: Any) -> Any:
    """Return the context of a pass without gradient of weights that get one in the next pass.

    autocast keeps the 16-bit copies that it makes of weights. Copies made without gradient would be
    used by the student's own pass, whose weights would then get none.
    """
    import torch

    kind = model.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return in_16_bits_where_needed(model)
    return torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False)
