"""Schedules of values during training: constant, linear, cosine and step.

Progress is the completed share of the optimiser steps, from 0 to 1, so the shape of a schedule does
not depend on the length of the run.
"""

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]


class _Schedule(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Constant(_Schedule):
    """A constant value."""

    kind: Literal["constant"] = "constant"
    value: float

    def __call__(self, progress: float) -> float:
        """The value."""
        return self.value

    @property
    def extremes(self) -> tuple[float, ...]:
        """Values that bound all others."""
        return (self.value,)


class _Ramp(_Schedule):
    start: float
    end: float
    begin: Share = Field(0.0, description="progress until which the value is start")
    until: Share = Field(1.0, description="progress from which the value is end")

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not self.begin < self.until:
            raise ValueError(f"begin ({self.begin:g}) must be less than until ({self.until:g})")
        return self

    def _travelled(self, progress: float) -> float:
        return min(1.0, max(0.0, (progress - self.begin) / (self.until - self.begin)))

    @property
    def extremes(self) -> tuple[float, ...]:
        """Values that bound all others."""
        return self.start, self.end


class Linear(_Ramp):
    """Linear from start to end between the progress ``begin`` and ``until``."""

    kind: Literal["linear"] = "linear"

    def __call__(self, progress: float) -> float:
        """The value at a progress."""
        x = self._travelled(progress)
        return (1 - x) * self.start + x * self.end


class Cosine(_Ramp):
    """From start to end along half a cosine, slow at both ends."""

    kind: Literal["cosine"] = "cosine"

    def __call__(self, progress: float) -> float:
        """The value at a progress."""
        x = (1 - math.cos(math.pi * self._travelled(progress))) / 2
        return (1 - x) * self.start + x * self.end


class Step(_Schedule):
    """``values[0]`` at first, then ``values[i]`` from the progress ``at[i - 1]``."""

    kind: Literal["step"] = "step"
    values: tuple[float, ...] = Field(min_length=1)
    at: tuple[Share, ...] = ()

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if len(self.values) != len(self.at) + 1:
            raise ValueError(
                f"expected one value more than entries in 'at', got {len(self.values)} and "
                f"{len(self.at)}"
            )
        if any(a >= b for a, b in zip(self.at, self.at[1:], strict=False)):
            raise ValueError(f"'at' must increase, got {list(self.at)}")
        return self

    def __call__(self, progress: float) -> float:
        """The value at a progress."""
        return self.values[sum(progress >= place for place in self.at)]

    @property
    def extremes(self) -> tuple[float, ...]:
        """All values."""
        return self.values


Schedule = Annotated[Constant | Linear | Cosine | Step, Field(discriminator="kind")]
