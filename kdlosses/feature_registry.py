"""The registry of losses on hidden states, the entry-point group ``kdlosses.features``.

In a spec, ``FILE.py:CLASS`` takes the place of a name (:mod:`kdlosses.loss_file`).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast, get_args

from kdlosses.layer_map import UNIFORM, LayerMapError, check_layers
from kdlosses.plugins import PluginGroup, PluginRef

if TYPE_CHECKING:
    from kdlosses.feature_term import FeatureTerm, Hidden
    from kdlosses.hidden_loss import HiddenLoss

_SPEC = re.compile(
    r"\s*(?P<name>[a-z][a-z0-9_]*|[^:]*[^:\s/]\.py:[A-Za-z_]\w*)\s*(?::(?P<tail>.*))?"
)
_EXPECTED = "hidden_cosine, hidden_cosine:layers=last,weight=0.1 or hidden_mse:layers=4-1,8-3"
Tokens = Literal["supervised", "all"]
"""Which tokens of a batch are compared."""


class FeatureSpecError(ValueError):
    """A spec with an unknown loss on hidden states, or with invalid parameters or layers."""


class BrokenFeatureError(ImportError):
    """A registered loss on hidden states that cannot be imported; names its distribution."""


class FeatureRef(PluginRef):
    """A registered loss on hidden states, not yet imported."""


_ELSEWHERE = {
    **dict.fromkeys(("cosine", "cos", "cosineembedding", "hiddencos"), "hidden_cosine"),
    **dict.fromkeys(("mse", "hiddenl2", "hiddenstates", "hiddenloss"), "hidden_mse"),
    **dict.fromkeys(("sp", "similarity", "similaritypreserving", "relation"), "token_relation"),
}
_GROUP = PluginGroup(
    "kdlosses.features",
    "feature loss",
    "kdrun features list",
    FeatureRef,
    FeatureSpecError,
    BrokenFeatureError,
    _ELSEWHERE,
)


@dataclass(frozen=True)
class FeatureSpec:
    """A parsed spec such as ``hidden_cosine:layers=uniform,weight=0.1``.

    Attributes:
        name: the registered name or ``FILE.py:CLASS``.
        parameters: the given hyper-parameters of the loss, as text.
        layers: pairs of layers, as :func:`kdlosses.layer_pairs` reads them.
        weight: factor of the term, which is added to the objective.
        tokens: which tokens are compared.
    """

    name: str
    parameters: Mapping[str, str]
    layers: str = UNIFORM
    weight: float = 1.0
    tokens: Tokens = "supervised"


def available_features() -> tuple[FeatureRef, ...]:
    """All registered losses on hidden states by name, without importing them."""
    return _GROUP.available()


def ignored_features() -> tuple[FeatureRef, ...]:
    """Plugins that are ignored because they use the name of a built-in one."""
    return _GROUP.ignored()


def parse_features(spec: str) -> FeatureSpec:
    """Split ``name[:key=value,...]``; ``layers``, ``weight`` and ``tokens`` are keys of every loss.

    A list of layers may contain commas: ``hidden_mse:layers=4-1,8-3,weight=0.1``.

    Raises:
        FeatureSpecError: another form. Names and parameters of the loss are not checked.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise FeatureSpecError(f"features {spec!r}: expected {_EXPECTED}")
    given: dict[str, str] = {}
    last = ""
    for item in () if match["tail"] is None else match["tail"].split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals and last == "layers" and key:
            given[last] += f",{key}"
            continue
        if not (equals and key and value):
            raise FeatureSpecError(
                f"features {spec!r}: expected key=value after the colon, got {item!r}"
            )
        if key in given:
            raise FeatureSpecError(f"features {spec!r}: {key} is given twice")
        given[key] = value
        last = key
    layers = given.pop("layers", UNIFORM)
    try:
        check_layers(layers)
    except LayerMapError as error:
        raise FeatureSpecError(f"features {spec!r}: {error}") from error
    weight, tokens = _weight(spec, given.pop("weight", "1")), given.pop("tokens", "supervised")
    if tokens not in get_args(Tokens):
        raise FeatureSpecError(
            f"features {spec!r}: tokens={tokens}: expected {' or '.join(get_args(Tokens))}"
        )
    return FeatureSpec(match["name"], given, layers, weight, cast("Tokens", tokens))


def _weight(spec: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise FeatureSpecError(f"features {spec!r}: weight={text}: must be a number above 0")
    return weight


def find_feature(name: str) -> FeatureRef:
    """Find a loss on hidden states by name, without importing it.

    Raises:
        FeatureSpecError: an unknown name (with a suggestion), a name registered by two
            distributions, or a file that does not exist or has no such class.
        BrokenFeatureError: a file that is not valid Python.
    """
    return _GROUP.find(name)


def feature_files(spec: str) -> dict[str, str]:
    """The file of a loss that is not registered, with its SHA-256; empty for a registered one.

    Raises:
        FeatureSpecError: a malformed spec, or a file that cannot be read.
    """
    return _GROUP.files(parse_features(spec).name)


def build_feature(spec: str | FeatureSpec) -> "HiddenLoss":
    """Construct the loss of a spec with validated parameters, without layers and projectors.

    Raises:
        FeatureSpecError: as in :func:`parse_features` and :func:`find_feature`, an object that is
            no such loss, an unknown parameter (with a suggestion), or a value out of bounds.
        BrokenFeatureError: the import failed. If the environment variable ``KDLOSSES_DEBUG`` is
            set, the message contains the traceback.
    """
    parsed = parse_features(spec) if isinstance(spec, str) else spec
    name = parsed.name
    find_feature(name)  # fails before torch is loaded
    from kdlosses.hidden_loss import FeatureLoss, RelationLoss

    bases, expected = (FeatureLoss, RelationLoss), "kdlosses.FeatureLoss or RelationLoss"
    kind = _GROUP.load(name, bases, expected)
    return cast("HiddenLoss", _GROUP.build(name, kind, kind.model_fields, parsed.parameters))


def get_features(
    spec: str, teacher: "Hidden", student: "Hidden", *, seed: int = 0, chunk_size: int | None = 1024
) -> "FeatureTerm":
    """Build the term of a spec for two models.

    Args:
        spec: such as ``"hidden_cosine:layers=uniform,weight=0.1"``; see :func:`parse_features`.
        teacher: number of layers and width of the teacher.
        student: number of layers and width of the student.
        seed: of the initial weights of projectors, the same in every process.
        chunk_size: tokens evaluated at a time; None evaluates all with plain autograd.

    Raises:
        FeatureSpecError: as in :func:`build_feature`, or layers that a model does not have.
        BrokenFeatureError: the loss cannot be imported.
    """
    from kdlosses.feature_term import FeatureTerm

    parsed = parse_features(spec)
    loss = build_feature(parsed)
    try:
        return FeatureTerm(
            loss,
            teacher,
            student,
            layers=parsed.layers,
            weight=parsed.weight,
            tokens=parsed.tokens,
            seed=seed,
            chunk_size=chunk_size,
        )
    except ValueError as error:
        raise FeatureSpecError(f"features {spec!r}: {error}") from error
