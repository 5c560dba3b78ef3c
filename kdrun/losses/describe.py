"""What a loss says about itself: the parts of its docstring, its parameters, its traits."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdlosses import get_loss, parse_spec
from kdrun.errors import InputError

if TYPE_CHECKING:
    from kdlosses import Loss

TRAITS = (
    "zero_at_equality",
    "nonnegative",
    "coarse_graining_monotone",
    "linear_finish",
    "reduction",
    "temperature_power",
    "detached",
    "stateful",
    "supports_top_k",
    "expected_failures",
)

_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def single_loss(spec: str) -> Loss:
    """The one loss that a spec names.

    Raises:
        LossSpecError: no such loss.
        BrokenLossError: it cannot be imported.
        InputError: the spec is a sum.
    """
    first, *others = parse_spec(spec).terms
    if others:
        raise InputError(
            f"loss {spec!r} is a sum; show its terms one by one, starting with {first.name}"
        )
    return get_loss(spec).loss


@dataclass(frozen=True)
class DocParts:
    """A loss's docstring, taken apart as the conformance checks demand it to be written.

    Attributes:
        title: the name in words.
        formula: what follows it in the summary.
        about: paragraphs on what it does and when to use it.
        limits: paragraphs that begin with "Not": when not to use it.
        reference: where it comes from.
    """

    title: str
    formula: str
    about: list[str]
    limits: list[str]
    reference: str


@dataclass(frozen=True)
class Parameter:
    """A hyper-parameter; all texts.

    Attributes:
        name: of the field.
        value: its value in the loss that was described.
        bounds: such as ``"> 0, < 1"``, or ``"-"``.
        meaning: its description.
    """

    name: str
    value: str
    bounds: str
    meaning: str


def doc_parts(loss: Loss) -> DocParts:
    """Take a docstring apart; what it does not have is empty."""
    text = inspect.cleandoc(type(loss).__doc__ or "")
    summary, *paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    title, _, formula = summary.partition("," if "," in summary else "=")
    references = [part for part in paragraphs if re.match(r"References?:", part)]
    others = [part for part in paragraphs if part not in references]
    return DocParts(
        title=title.strip(),
        formula=formula.strip().removesuffix("."),
        about=[part for part in others if not part.startswith("Not ")],
        limits=[part for part in others if part.startswith("Not ")],
        reference=" ".join(part.partition(":")[2].strip() for part in references),
    )


def family(loss: Loss) -> str:
    """How the loss is made up: ``additive`` over the vocabulary, or of the whole ``row``."""
    from kdlosses import Divergence

    kind = "additive" if isinstance(loss, Divergence) else "row"
    return f"{kind}, stateful" if loss.stateful else kind


def parameters(loss: Loss) -> list[Parameter]:
    """The hyper-parameters with their bounds."""
    return [
        Parameter(name, str(getattr(loss, name)), bounds(info.metadata), info.description or "")
        for name, info in type(loss).model_fields.items()
    ]


def traits(loss: Loss) -> dict[str, Any]:
    """The traits that the loss has, and its curvature."""
    return {
        **{name: getattr(loss, name) for name in TRAITS if hasattr(loss, name)},
        "curvature": loss.curvature(),
    }


def bounds(metadata: list[Any]) -> str:
    """The bounds of a field in words, such as ``"> 0, < 1"``, or ``"-"``."""
    found = [
        f"{sign} {getattr(bound, name):g}"
        for bound in metadata
        for name, sign in _SIGNS.items()
        if isinstance(getattr(bound, name, None), int | float)
    ]
    return ", ".join(found) or "-"
