"""The cases for workers: sizes, an implementation and a loss."""

from __future__ import annotations

from dataclasses import dataclass

FLOOR, PLAIN, CHUNKED = "floor", "plain", "chunked"


@dataclass(frozen=True)
class Settings:
    """The settings shared by all measurements of one command.

    Attributes:
        student_width: width of the student's hidden states.
        teacher_width: width of the teacher's hidden states.
        dtype: data type of hidden states and heads, as a name in torch.
        device: ``cpu`` or ``cuda``.
        threads: threads of torch; None uses torch's default.
        rounds: timed steps of each implementation.
        kd_ratio: weight of the loss; cross-entropy has the rest.
        chunk_size: rows per chunk; None chooses as in training.
        plain: whether to measure the plain evaluation, which takes most of the time.
        gradient_error: whether to compare gradients with float64.
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
    gradient_error: bool = False


@dataclass(frozen=True)
class Point:
    """One combination of batch size and vocabulary size."""

    tokens: int
    vocab: int

    @property
    def masked(self) -> int:
        """The number of masked rows, a quarter, like prompts and padding in training."""
        return self.tokens // 4

    @property
    def supervised(self) -> int:
        """The number of supervised rows."""
        return self.tokens - self.masked


@dataclass(frozen=True)
class Case:
    """The case measured by one worker.

    Attributes:
        settings: see :class:`Settings`.
        point: see :class:`Point`.
        implementation: ``floor``, ``plain``, ``chunked`` or the name of a peer.
        loss: spec without the chunked suffix; empty for the floor.
        beta: parameter of the generalised Jensen-Shannon divergence for peers.
    """

    settings: Settings
    point: Point
    implementation: str
    loss: str = ""
    beta: float = 0.0
