"""Build the term on hidden states of a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
