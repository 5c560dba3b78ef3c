"""Build the loss of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kdrun.config.sections import KD_RATIO
from kdrun.errors import InputError

if TYPE_CHECKING:
    from kdlosses import KDObjective, TokenLoss, TokenWeighting
    from kdrun.config.sections import LossConfig
    from kdrun.config.training_sections import TokenWeightConfig


def check_name(spec: str) -> None:
    """Refuse a spec with an unregistered name or a missing file, without importing losses.

    Raises:
        InputError: an unknown name, with a suggestion.
    """
    from kdlosses import BrokenLossError, LossSpecError, find_loss, parse_spec

    try:
        for term in parse_spec(spec).terms:
            find_loss(term.name)
    except (LossSpecError, BrokenLossError) as error:
        raise InputError(str(error)) from error


def files_of(spec: str) -> dict[str, str]:
    """The files of the losses of a spec, with their SHA-256.

    Raises:
        InputError: a file cannot be read.
    """
    from kdlosses import LossSpecError, loss_files

    try:
        return loss_files(spec)
    except LossSpecError as error:
        raise InputError(str(error)) from error


def changed_file(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """A file whose content differs; None if all that are known on both sides are equal."""
    return next((file for file, found in now.items() if before.get(file, found) != found), None)


def build_loss(config: LossConfig, vocab_size: int | None) -> TokenLoss:
    """Build the loss of a configuration.

    Raises:
        InputError: an unknown loss or parameter, or a value out of bounds.
    """
    from kdlosses import BrokenLossError, LossSpecError, get_loss

    try:
        return get_loss(
            config.spec,
            chunk_size=config.chunk_size,
            temperature=config.temperature,
            temperature_scaling=config.temperature_scaling,
            vocab_size=vocab_size,
            match_curvature=config.match_curvature,
            compiled=config.compiled,
            schedules={key: at for key, at in config.schedules.items() if key != KD_RATIO},
        )
    except (LossSpecError, BrokenLossError) as error:
        raise InputError(str(error)) from error


def notes_on_names(spec: str) -> list[str]:
    """Lines about ignored plugins that use the name of a built-in loss of a spec."""
    from kdlosses import ignored_losses, parse_spec

    names = {term.name for term in parse_spec(spec).terms}
    return [
        f"loss {ref.name}: the built-in loss is used; the one from {ref.distribution} "
        f"({ref.module}) is ignored, because built-in names cannot be replaced"
        for ref in ignored_losses()
        if ref.name in names
    ]


def unchunked(config: LossConfig) -> LossConfig:
    """The same loss with plain autograd, for checking whether it accepts a teacher."""
    from kdlosses import parse_spec

    spec = parse_spec(config.spec).text(chunked=False)
    plain = {"spec": spec, "chunk_size": None, "compiled": None}
    return config.model_copy(update=plain)


def build_weighting(config: TokenWeightConfig) -> TokenWeighting | None:
    """Build the token weight of a configuration, if any.

    Raises:
        InputError: an unknown weight or parameter, or a value out of bounds.
    """
    if config.spec is None:
        return None
    from kdlosses import BrokenWeightError, TokenWeighting, WeightSpecError, get_weight

    try:
        return TokenWeighting(get_weight(config.spec), config.on, config.normalize)
    except (WeightSpecError, BrokenWeightError) as error:
        raise InputError(str(error)) from error


def files_of_weight(spec: str | None) -> dict[str, str]:
    """The file of a token weight, if it is not registered, with its SHA-256.

    Raises:
        InputError: the file cannot be read.
    """
    from kdlosses import WeightSpecError, weight_files

    if spec is None:
        return {}
    try:
        return weight_files(spec)
    except WeightSpecError as error:
        raise InputError(str(error)) from error


def check_weighting(config: TokenWeightConfig, distilled: LossConfig) -> None:
    """Refuse a token weight that cannot be built or has no effect.

    Raises:
        InputError: as in :func:`build_weighting`, or no step with a teacher.
    """
    build_weighting(config)
    if config.spec is not None and distilled.kd_ratio == 0 and KD_RATIO not in distilled.schedules:
        raise InputError(
            f"--token-weight {config.spec}: has no effect with --kd-ratio 0, where no teacher is "
            "asked; remove it, or raise the ratio"
        )


def plain_objective(distilled: LossConfig, weight: TokenWeightConfig) -> KDObjective:
    """The loss with its token weight, unchunked, to find out whether they support a teacher.

    Raises:
        InputError: as in :func:`build_loss` and :func:`build_weighting`.
    """
    from kdlosses import KDObjective

    loss = build_loss(unchunked(distilled), None)
    return KDObjective(loss, 1.0, build_weighting(weight))
