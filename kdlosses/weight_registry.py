"""The registry of token weights, the entry-point group ``kdlosses.weights``."""

from typing import TYPE_CHECKING, cast

from kdlosses.plugins import PluginGroup, PluginRef
from kdlosses.registry import BrokenLossError, LossSpecError, TermSpec, one_term

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
    """Find a token weight by name or ``FILE.py:CLASS``, without importing it.

    Raises:
        WeightSpecError: an unknown name (with a suggestion), one of two distributions, or a file
            that does not exist or has no such class.
    """
    return _GROUP.find(name)


def weight_files(spec: str) -> dict[str, str]:
    """The file of a token weight that is not registered, with its SHA-256; else empty.

    Raises:
        WeightSpecError: a malformed spec, or a file that cannot be read.
    """
    return _GROUP.files(_parse(spec).name)


def get_weight(spec: str) -> "TokenWeight":
    """Build a token weight from a spec such as ``"disagreement:power=0.5"``.

    ``FILE.py:CLASS`` takes the place of a name for a class that is not installed.

    Raises:
        WeightSpecError: another form, or an unknown token weight or parameter.
        BrokenWeightError: the token weight cannot be imported.
    """
    from kdlosses.token_weight import TokenWeight

    term = _parse(spec)
    kind = _GROUP.load(term.name, (TokenWeight,), "kdlosses.TokenWeight")
    built = _GROUP.build(term.name, kind, kind.model_fields, term.parameters)
    return cast("TokenWeight", built)


def _parse(spec: str) -> TermSpec:
    return one_term(spec, "token weight", "disagreement:power=0.5", WeightSpecError, files=True)
