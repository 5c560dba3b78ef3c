"""The description of a loss: the parts of its docstring, its parameters and traits."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdlosses import get_loss, parse_spec
from kdrun.errors import InputError

if TYPE_CHECKING:
    from pydantic import BaseModel

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
    """Build the single loss of a spec.

    Raises:
        LossSpecError: an unknown loss.
        BrokenLossError: the loss cannot be imported.
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
    """The parts of a loss's docstring, in the form that the conformance checks require.

    Attributes:
        title: the name in words.
        formula: the formula after the name in the summary.
        about: paragraphs that describe the loss and its use.
        limits: paragraphs that begin with "Not": when not to use it.
        reference: the reference.
    """

    title: str
    formula: str
    about: list[str]
    limits: list[str]
    reference: str


@dataclass(frozen=True)
class Parameter:
    """A hyper-parameter, as text.

    Attributes:
        name: name of the field.
        value: value in the described loss.
        bounds: bounds such as ``"> 0, < 1"``, or ``"-"``.
        meaning: description of the field.
    """

    name: str
    value: str
    bounds: str
    meaning: str


def doc_parts(loss: BaseModel) -> DocParts:
    """Split a docstring into its parts; missing parts are empty."""
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
    """The kind of loss: ``additive`` over the vocabulary, or on the whole ``row``."""
    from kdlosses import Divergence

    kind = "additive" if isinstance(loss, Divergence) else "row"
    return f"{kind}, stateful" if loss.stateful else kind


def parameters(loss: BaseModel) -> list[Parameter]:
    """The hyper-parameters with their bounds."""
    return [
        Parameter(name, str(getattr(loss, name)), bounds(info.metadata), info.description or "")
        for name, info in type(loss).model_fields.items()
    ]


def traits(loss: Loss) -> dict[str, Any]:
    """The traits of the loss, and its curvature."""
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
