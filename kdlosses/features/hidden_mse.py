"""Mean square of the difference of normalised hidden states."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from kdlosses.hidden_loss import FeatureLoss

_SMALL = 1e-6


class HiddenMSE(FeatureLoss):
    """Mean square of RMS-normalised states, sum_i (t_i / rms(t) - s_i / r)^2 / H.

    t is the teacher's state of a token, s the student's, H the width, and r is rms(s), or with
    ``scale=teacher`` rms(t). Dividing by a root mean square makes the weight independent of the
    layer's scale. With ``scale=each`` this is twice ``hidden_cosine``, up to the 1e-6 that is added
    to mean squares: only directions count. With ``scale=teacher`` it is the error relative to the
    teacher's mean square, and norms count too.

    Not robust with ``scale=teacher`` if the student starts far from the teacher: the value grows
    with the square of the student's norm. Dimensions with very large values determine most of it.

    Reference: Jiao et al. 2020, arXiv:1909.10351 (states without normalisation); Zhang and Sennrich
    2019, arXiv:1910.07467 (the normalisation).
    """

    scale: Literal["each", "teacher"] = Field(
        "each",
        description="whose root mean square divides the student's state: its own (each), "
        "or the teacher's",
    )

    def row(self, teacher_hidden: Tensor, student_hidden: Tensor) -> Tensor:
        """Return the mean square of the difference."""
        teacher_scale = _inverse_rms(teacher_hidden)
        scale = teacher_scale if self.scale == "teacher" else _inverse_rms(student_hidden)
        return (teacher_hidden * teacher_scale - student_hidden * scale).square().mean(-1)


def _inverse_rms(states: Tensor) -> Tensor:
    return (states.square().mean(-1, keepdim=True) + _SMALL).rsqrt()
