"""The entry-point registry: names, specs, and losses that are imported only when asked for.

Built-in losses and plugins come in by the same door, the entry-point group ``kdlosses.losses``.
Listing reads metadata only; a plugin that cannot be imported breaks nothing but itself.
"""

import difflib
import inspect
import math
import os
import re
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdlosses.divergence import Loss
    from kdlosses.objective import TokenLoss
    from kdlosses.schedules import Schedule

GROUP = "kdlosses.losses"
CHUNKED = "_chunked"
BUILT_IN = "kdlosses"
DEBUG_VARIABLE = "KDLOSSES_DEBUG"

_TERM = re.compile(
    r"\s*(?:(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*)?"
    r"\s*(?P<name>[a-z][a-z0-9_]*)\s*(?::(?P<tail>.*))?"
)
# A plus sign before a term, not one inside a number such as 1e+3.
_PLUS = re.compile(r"\+(?=\s*(?:[+-]?[\d.]+(?:[eE][+-]?\d+)?\s*\*\s*)?[a-z])")


class LossSpecError(ValueError):
    """A spec that names no loss, or gives it parameters that it does not take."""


class BrokenLossError(ImportError):
    """A registered loss that cannot be imported; the message names its distribution."""


@dataclass(frozen=True)
class LossRef:
    """A registered loss, not yet imported.

    Attributes:
        name: the name on the command line.
        distribution: the installed distribution that registers it.
        module: ``package.module:Class``.
    """

    name: str
    distribution: str
    module: str


@dataclass(frozen=True)
class TermSpec:
    """One parsed term of a spec.

    Attributes:
        name: the registered name, without the chunked suffix.
        parameters: the given hyper-parameters, still as text.
        weight: its factor in the sum.
    """

    name: str
    parameters: Mapping[str, str]
    weight: float = 1.0

    @property
    def label(self) -> str:
        """Name and parameters, as logs show the term."""
        given = ",".join(f"{key}={value}" for key, value in self.parameters.items())
        return f"{self.name}:{given}" if given else self.name


@dataclass(frozen=True)
class LossSpec:
    """A parsed spec such as ``generalized_jsd_chunked:beta=0.1``, or a sum of several.

    Attributes:
        terms: the losses; several for a weighted sum.
        chunked: whether the suffix was there.
    """

    terms: tuple[TermSpec, ...]
    chunked: bool


def available_losses() -> tuple[LossRef, ...]:
    """All registered losses by name; imports none of them and lists no ``_chunked`` twins.

    Names that two distributions claim are listed once for each of them; using such a name is an
    error (the built-in losses excepted, which cannot be replaced).
    """
    return tuple(
        sorted(
            (LossRef(entry.name, _distribution(entry), entry.value) for entry in _entries()),
            key=lambda ref: (ref.name, ref.distribution),
        )
    )


def parse_spec(spec: str) -> LossSpec:
    """Split ``name[_chunked][:key=value[,key=value...]]``, or a sum ``0.7*first + 0.3*second``.

    Raises:
        LossSpecError: if the text has another form, or chunked and plain terms are mixed. Whether
            the names exist is not looked at.
    """
    parsed = [_parse_term(spec, text) for text in _PLUS.split(spec.strip())]
    if len({chunked for _, chunked in parsed}) > 1:
        plain = ", ".join(term.name for term, chunked in parsed if not chunked)
        raise LossSpecError(
            f"loss {spec!r}: chunked and plain terms are mixed; write {CHUNKED} after {plain} too"
        )
    return LossSpec(tuple(term for term, _ in parsed), parsed[0][1])


def _parse_term(spec: str, text: str) -> tuple[TermSpec, bool]:
    match = _TERM.fullmatch(text)
    if match is None or match["name"] == CHUNKED:
        raise LossSpecError(
            f"loss {spec!r}: expected a name such as forward_kl_chunked, "
            "generalized_jsd_chunked:beta=0.1, or a sum 0.7*forward_kl+0.3*reverse_kl"
        )
    weight = float(match["weight"] or 1.0)
    if not (math.isfinite(weight) and weight > 0):
        raise LossSpecError(f"loss {spec!r}: the weight {match['weight']} must be above 0")
    name, tail = match["name"], match["tail"]
    parameters: dict[str, str] = {}
    for item in () if tail is None else tail.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (equals and key and value):
            raise LossSpecError(f"loss {spec!r}: expected key=value after the colon, got {item!r}")
        if key in parameters:
            raise LossSpecError(f"loss {spec!r}: {key} is given twice")
        parameters[key] = value
    return TermSpec(name.removesuffix(CHUNKED), parameters, weight), name.endswith(CHUNKED)


def find_loss(name: str) -> LossRef:
    """The registered loss of a name (without the chunked suffix); imports nothing.

    Raises:
        LossSpecError: an unknown name, with a close one, or a name that two distributions claim.
    """
    entry = _find(name)
    return LossRef(entry.name, _distribution(entry), entry.value)


def load_loss(name: str) -> "type[Loss]":
    """Import the class registered under a name (without the chunked suffix).

    Raises:
        LossSpecError: unknown name, a name claimed by two distributions, or an object that is not
            a loss.
        BrokenLossError: the import failed. With the environment variable ``KDLOSSES_DEBUG`` set,
            the message holds the traceback.
    """
    entry = _find(name)
    origin = f"loss {name!r} of distribution {_distribution(entry)!r} ({entry.value})"
    try:
        loaded = entry.load()
    # SystemExit too: a plugin that calls sys.exit() on import must not end the command line.
    except (Exception, SystemExit) as error:
        detail = f"{type(error).__name__}: {error}"
        if os.environ.get(DEBUG_VARIABLE):
            detail = traceback.format_exc()
        raise BrokenLossError(
            f"{origin} cannot be imported: {detail}"
            + ("" if os.environ.get(DEBUG_VARIABLE) else f" (set {DEBUG_VARIABLE}=1 for more)")
        ) from error
    from kdlosses.divergence import Divergence, RowLoss

    if not (isinstance(loaded, type) and issubclass(loaded, Divergence | RowLoss)):
        raise LossSpecError(f"{origin} is not a subclass of kdlosses.Divergence or RowLoss")
    if inspect.isabstract(loaded):
        missing = ", ".join(sorted(loaded.__abstractmethods__))
        raise LossSpecError(f"{origin} does not define {missing}")
    return loaded


def build_loss(spec: TermSpec) -> "Loss":
    """Construct the loss of a parsed term, its parameters validated.

    Raises:
        LossSpecError: unknown parameter (with a suggestion) or a value out of bounds.
        BrokenLossError: see :func:`load_loss`.
    """
    from pydantic import ValidationError

    loss_class = load_loss(spec.name)
    known = list(loss_class.model_fields)
    for key in spec.parameters:
        if key not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes no parameters"
            raise LossSpecError(
                f"loss {spec.name!r} has no parameter {key!r}{_did_you_mean(key, known)}; {takes}"
            )
    try:
        return loss_class(**spec.parameters)
    except ValidationError as error:
        first: Any = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "parameters"
        raise LossSpecError(
            f"loss {spec.name!r}: {where}={first['input']!r}: {first['msg']}"
        ) from error


def get_loss(
    spec: str,
    *,
    chunk_size: int | None = None,
    temperature: float = 1.0,
    temperature_scaling: bool = True,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    match_curvature: bool = False,
    compiled: bool | None = None,
    schedules: "Mapping[str, Schedule]" = MappingProxyType({}),
) -> "TokenLoss":
    """Build a loss from a spec.

    Args:
        spec: ``name``, with the suffix ``_chunked`` for the chunked evaluation, and parameters
            after a colon: ``"skew_forward_kl_chunked:alpha=0.2"``. A weighted sum of losses is
            evaluated in one pass: ``"0.7*forward_kl_chunked+0.3*reverse_kl_chunked"``.
        chunk_size: tokens a chunk; by default chosen from vocabulary, width and device.
        temperature: T > 0 softens both sides of the loss.
        temperature_scaling: multiply by ``T ** temperature_power``.
        ignore_index: label of positions that are left out.
        vocab_size: cut both heads to this many entries before the softmax.
        match_curvature: divide by the loss's curvature, so that one ``kd_ratio`` is as strong for
            every loss near equality.
        compiled: compile the element-wise part of a chunk; by default where the vocabulary is
            large enough to pay for it.
        schedules: how the temperature and parameters of the loss move in training
            (:mod:`kdlosses.schedules`), by ``"temperature"``, ``"alpha"``, or in a sum
            ``"reverse_kl.alpha"``.

    Returns:
        An ``nn.Module`` called as ``loss(student, teacher, labels)``.

    Raises:
        LossSpecError: unknown loss or parameter, a value out of bounds, or ``chunk_size`` and
            ``compiled`` given to an unchunked loss.
        BrokenLossError: the loss cannot be imported.
    """
    parsed = parse_spec(spec)
    if not parsed.chunked and (chunk_size is not None or compiled is not None):
        option = "chunk_size" if chunk_size is not None else "compiled"
        raise LossSpecError(
            f"{option} was given to the unchunked loss {spec!r}; write "
            f"{'+'.join(term.name + CHUNKED for term in parsed.terms)}"
        )
    if chunk_size is not None and chunk_size < 1:
        raise LossSpecError(f"chunk_size: must be at least 1, got {chunk_size}")
    losses = [build_loss(term) for term in parsed.terms]
    from kdlosses.engine import Chunking
    from kdlosses.objective import TokenLoss
    from kdlosses.terms import Term

    try:
        return TokenLoss(
            [
                Term(loss, term.weight, term.label)
                for loss, term in zip(losses, parsed.terms, strict=True)
            ],
            chunking=Chunking(chunk_size, compiled) if parsed.chunked else None,
            temperature=temperature,
            temperature_scaling=temperature_scaling,
            ignore_index=ignore_index,
            vocab_size=vocab_size,
            match_curvature=match_curvature,
            schedules=schedules,
        )
    except ValueError as error:
        raise LossSpecError(f"loss {spec!r}: {error}") from error


def _entries() -> list[EntryPoint]:
    return list(entry_points(group=GROUP))


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "unknown"


def _find(name: str) -> EntryPoint:
    entries = _entries()
    matches = [entry for entry in entries if entry.name == name]
    twins = [entry for entry in entries if entry.name == name + CHUNKED]
    reserved = matches if name.endswith(CHUNKED) else [] if matches else twins
    if reserved:
        raise LossSpecError(
            f"loss {reserved[0].name!r} of {_distribution(reserved[0])} ends in the reserved "
            f"suffix {CHUNKED!r}; its author must rename it"
        )
    if not matches:
        names = sorted({entry.name for entry in entries})
        hint = _did_you_mean(name, names)
        raise LossSpecError(
            f"unknown loss {name!r}{hint}; 'kdrun losses list' shows all {len(names)}"
        )
    distributions = sorted({_distribution(entry) for entry in matches})
    if len(distributions) > 1 or len({entry.value for entry in matches}) > 1:
        built_in = [entry for entry in matches if _distribution(entry) == BUILT_IN]
        if built_in:
            return built_in[0]
        raise LossSpecError(
            f"loss {name!r} is registered by {' and '.join(distributions)}; uninstall all but one"
        )
    return matches[0]


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""
