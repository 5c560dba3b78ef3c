"""What a worker measures: sizes, an implementation, a loss. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

FLOOR, PLAIN, CHUNKED = "floor", "plain", "chunked"


@dataclass(frozen=True)
class Settings:
    """What all measurements of one command have in common.

    Attributes:
        student_width: length of the student's hidden states.
        teacher_width: length of the teacher's.
        dtype: of hidden states and heads, a name in torch.
        device: ``cpu`` or ``cuda``.
        threads: of the matrix products; None leaves torch's own number.
        rounds: timed steps of each implementation.
        kd_ratio: weight of the loss beside cross-entropy.
        chunk_size: rows a chunk; None chooses as training does.
        plain: whether the plain evaluation is measured too, which takes most of the time.
    """

    student_width: int
    teacher_width: int
    dtype: str
    device: str
    threads: int | None
    rounds: int
    kd_ratio: float
    chunk_size: int | None
    plain: bool = True


@dataclass(frozen=True)
class Point:
    """One size of the batch and the vocabulary."""

    tokens: int
    vocab: int

    @property
    def masked(self) -> int:
        """Rows without a label, a quarter, as prompts and padding are in training."""
        return self.tokens // 4

    @property
    def supervised(self) -> int:
        """Rows that the loss is about."""
        return self.tokens - self.masked


@dataclass(frozen=True)
class Case:
    """What one worker measures.

    Attributes:
        settings: see :class:`Settings`.
        point: see :class:`Point`.
        implementation: ``floor``, ``plain``, ``chunked`` or the name of a peer.
        loss: spec without the chunked suffix; empty for the floor.
        beta: the generalised Jensen-Shannon divergence that a peer is asked for.
    """

    settings: Settings
    point: Point
    implementation: str
    loss: str = ""
    beta: float = 0.0
