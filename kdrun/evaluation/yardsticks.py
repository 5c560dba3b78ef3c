"""The yardsticks: measures of models that do not depend on the training loss."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Yardstick(BaseModel):
    """A measure on held-out rows that does not depend on the training loss.

    Attributes:
        name: key in tables and files; prefixed with ``eval_`` in ``summary.json``.
        title: title in tables.
        unit: unit of the values.
        lower_is_better: direction of the measure.
        difference: the smallest difference of interest.
        trained_on_by: registered losses whose value is this yardstick.
        asks: whether it scores answers to prompts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str
    unit: str
    lower_is_better: bool
    difference: float
    trained_on_by: tuple[str, ...] = ()
    asks: bool = False

    @property
    def explained(self) -> str:
        """Unit and direction, as text."""
        return f"{self.unit}, {'lower' if self.lower_is_better else 'higher'} is better"


YARDSTICKS = (
    Yardstick(
        name="ce",
        title="cross-entropy",
        unit="nats per token",
        lower_is_better=True,
        difference=0.02,
        trained_on_by=("cross-entropy",),
    ),
    Yardstick(
        name="forward_kl",
        title="forward KL to the teacher",
        unit="nats per token",
        lower_is_better=True,
        difference=0.02,
        trained_on_by=("forward_kl",),
    ),
    Yardstick(
        name="reverse_kl",
        title="reverse KL to the teacher",
        unit="nats per token",
        lower_is_better=True,
        difference=0.02,
        trained_on_by=("reverse_kl",),
    ),
    Yardstick(
        name="top1_agreement",
        title="top-1 agreement",
        unit="share of tokens",
        lower_is_better=False,
        difference=0.005,
    ),
    Yardstick(
        name="calibration_error",
        title="calibration error",
        unit="share of tokens",
        lower_is_better=True,
        difference=0.01,
    ),
    Yardstick(
        name="rouge_l",
        title="ROUGE-L of answers",
        unit="0 to 1",
        lower_is_better=False,
        difference=0.01,
        asks=True,
    ),
    Yardstick(
        name="exact_match",
        title="exact match of answers",
        unit="share of answers",
        lower_is_better=False,
        difference=0.02,
        asks=True,
    ),
)


SHOWN = (
    *YARDSTICKS,
    Yardstick(
        name="events_forward_kl",
        title="forward KL over the teacher's k tokens and the rest",
        unit="nats per token",
        lower_is_better=True,
        difference=0.02,
    ),
)
"""Those that a run shows: also the one against the teacher's most likely tokens alone."""
