"""The registry of token weights, the entry-point group ``kdlosses.weights``."""

from typing import TYPE_CHECKING, cast

from kdlosses.plugins import PluginGroup, PluginRef
from kdlosses.registry import BrokenLossError, LossSpecError, one_term

if TYPE_CHECKING:
    from kdlosses.token_weight import TokenWeight


class WeightSpecError(LossSpecError):
    """A spec with an unknown token weight or invalid parameters."""


class BrokenWeightError(BrokenLossError):
    """A registered token weight that cannot be imported; the message names its distribution."""


class WeightRef(PluginRef):
    """A registered token weight, not yet imported."""


_GROUP = PluginGroup(
    "kdlosses.weights",
    "token weight",
    "kdrun weights list",
    WeightRef,
    WeightSpecError,
    BrokenWeightError,
    {"hellinger": "disagreement", "dopd": "advantage_gap", "tip": "entropy"},
)


def available_weights() -> tuple[WeightRef, ...]:
    """All registered token weights by name, without importing them."""
    return _GROUP.available()


def find_weight(name: str) -> WeightRef:
    """Find a token weight by name, without importing it.

    Raises:
        WeightSpecError: an unknown name (with a suggestion), or one of two distributions.
    """
    return _GROUP.find(name)


def get_weight(spec: str) -> "TokenWeight":
    """Build a token weight from a spec such as ``"disagreement:power=0.5"``.

    Raises:
        WeightSpecError: another form, or an unknown token weight or parameter.
        BrokenWeightError: the token weight cannot be imported.
    """
    from kdlosses.token_weight import TokenWeight

    term = one_term(spec, "token weight", "disagreement:power=0.5", WeightSpecError)
    kind = _GROUP.load(term.name, (TokenWeight,), "kdlosses.TokenWeight")
    built = _GROUP.build(term.name, kind, kind.model_fields, term.parameters)
    return cast("TokenWeight", built)
