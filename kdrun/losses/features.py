"""Build the term on hidden states of a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdrun.errors import InputError

if TYPE_CHECKING:
    from kdlosses import FeatureTerm, Hidden
    from kdrun.config.features_section import FeaturesConfig


@contextmanager
def features_as_input() -> Iterator[None]:
    """Report errors of a spec as wrong input.

    Raises:
        InputError: instead of the library's error.
    """
    from kdlosses import BrokenFeatureError, FeatureSpecError

    try:
        yield
    except (FeatureSpecError, BrokenFeatureError) as error:
        raise InputError(str(error)) from error


def check_features_name(spec: str) -> None:
    """Refuse a malformed spec or an unregistered name, without importing losses.

    Raises:
        InputError: states the problem, with a suggestion for a name.
    """
    from kdlosses import find_feature, parse_features

    with features_as_input():
        find_feature(parse_features(spec).name)


def files_of_features(spec: str | None) -> dict[str, str]:
    """The file of a loss on hidden states, if it is not registered, with its SHA-256.

    Raises:
        InputError: the file cannot be read.
    """
    from kdlosses import feature_files

    if spec is None:
        return {}
    with features_as_input():
        return feature_files(spec)


@dataclass(frozen=True)
class FeaturePlan:
    """What a term on hidden states compares, without its projectors.

    Attributes:
        pairs: ``(teacher layer, student layer)``, counted from 1.
        projected: number of weights of the projectors.
        relation: whether a whole sequence is evaluated at a time.
    """

    pairs: tuple[tuple[int, int], ...]
    projected: int
    relation: bool


def plan_features(spec: str, teacher: Hidden, student: Hidden) -> FeaturePlan:
    """Check a spec for two models.

    Raises:
        InputError: an unknown loss or parameter, or layers that a model does not have.
    """
    from kdlosses import LayerMapError, RelationLoss, build_feature, layer_pairs, parse_features

    with features_as_input():
        parsed = parse_features(spec)
        loss = build_feature(parsed)
    try:
        pairs = layer_pairs(parsed.layers, teacher.layers, student.layers)
    except LayerMapError as error:
        raise InputError(f"features {spec!r}: {error}") from error
    projected = loss.equal_widths and teacher.width != student.width
    weights = len(pairs) * teacher.width * student.width if projected else 0
    return FeaturePlan(pairs, weights, isinstance(loss, RelationLoss))


def build_features(
    config: FeaturesConfig, teacher: Hidden, student: Hidden, seed: int
) -> FeatureTerm | None:
    """Build the term of a configuration; None without one.

    Args:
        config: section ``features``.
        teacher: layers and width of the teacher.
        student: the same of the student.
        seed: of projectors.

    Raises:
        InputError: an unknown loss or parameter, or layers that a model does not have.
    """
    from kdlosses import get_features

    if config.spec is None:
        return None
    with features_as_input():
        return get_features(config.spec, teacher, student, seed=seed, chunk_size=config.chunk_size)
