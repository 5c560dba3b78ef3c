"""The registry of losses, the entry-point group ``kdlosses.losses``: names, specs and classes.

In a spec, ``FILE.py:CLASS`` takes the place of a name (:mod:`kdlosses.loss_file`).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

from kdlosses.loss_file import classes_in, split_name
from kdlosses.plugins import PluginGroup, PluginRef

if TYPE_CHECKING:
    from kdlosses.divergence import Loss
    from kdlosses.schedules import Schedule
    from kdlosses.token_loss import TokenLoss

CHUNKED = "_chunked"

_TERM = re.compile(
    r"\s*(?:(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*)?"
    r"\s*(?P<name>[a-z][a-z0-9_]*|[^*:]*[^*:\s/]\.py:[A-Za-z_]\w*)\s*(?::(?P<tail>.*))?"
)
# A plus sign before a term, but not in a number such as 1e+3.
_PLUS = re.compile(r"\+(?=\s*(?:[+-]?[\d.]+(?:[eE][+-]?\d+)?\s*\*\s*)?(?:[a-z]|[^\s*+:]*\.py:))")


class LossSpecError(ValueError):
    """A spec with an unknown loss or invalid parameters."""


class BrokenLossError(ImportError):
    """A registered loss that cannot be imported; the message names its distribution."""


class LossRef(PluginRef):
    """A registered loss, not yet imported."""


# Names in torchtune, TRL, Liger, DistiLLM, ABKD and papers, squeezed; see docs/names.md.
_ELSEWHERE = {
    **dict.fromkeys(("kl", "kd", "kld", "kldiv", "fkl", "fkld", "forwardkld"), "forward_kl"),
    **dict.fromkeys(
        ("forwardklwithchunkedoutput", "ligerkldiv", "ligerfusedlinearkldiv"), "forward_kl"
    ),
    **dict.fromkeys(("rkl", "rkld", "reversekld", "reverseklwithchunkedoutput"), "reverse_kl"),
    **dict.fromkeys(("skl", "symkl", "symmetrickld", "jeffreys"), "symmetric_kl"),
    **dict.fromkeys(("symmetricklwithchunkedoutput",), "symmetric_kl"),
    **dict.fromkeys(("js", "jsd", "gjsd", "gkd", "jsdistance", "jensenshannon"), "generalized_jsd"),
    **dict.fromkeys(
        ("generalizedjsdloss", "chunkeddivergence", "ligerjsd", "ligerfusedlinearjsd"),
        "generalized_jsd",
    ),
    **dict.fromkeys(
        ("sfkl", "skewfkl", "skewedforwardkl", "skewkl", "skewedkl"), "skew_forward_kl"
    ),
    **dict.fromkeys(("srkl", "skewrkl", "skewedreversekl"), "skew_reverse_kl"),
    **dict.fromkeys(("tv", "tvd", "tvdistance", "ligertvd"), "total_variation"),
    **dict.fromkeys(("ab", "abkd", "abdivergence"), "alpha_beta"),
    **dict.fromkeys(("akl", "akd"), "adaptive_kl"),
    **dict.fromkeys(("dkd",), "decoupled_kd"),
    **dict.fromkeys(("tokenwisedistillation",), "todi"),
    **dict.fromkeys(("eopd", "entropyaware", "entropyawareonpolicy"), "entropy_aware_kl"),
    **dict.fromkeys(("csd", "concretescorematching"), "concrete_score"),
    **dict.fromkeys(("alphamixture",), "amid"),
    **dict.fromkeys(("minifinetuning", "mftdistillation"), "mft"),
    **dict.fromkeys(("logitsdifference",), "bild"),
    **dict.fromkeys(("hellingerdistance", "squaredhellinger"), "hellinger"),
}
_GROUP = PluginGroup(
    "kdlosses.losses",
    "loss",
    "kdrun losses list",
    LossRef,
    LossSpecError,
    BrokenLossError,
    _ELSEWHERE,
)


@dataclass(frozen=True)
class TermSpec:
    """One parsed term of a spec.

    Attributes:
        name: the registered name or ``FILE.py:CLASS``, without the chunked suffix.
        parameters: the given hyper-parameters, as text.
        weight: factor in the sum.
    """

    name: str
    parameters: Mapping[str, str]
    weight: float = 1.0

    @property
    def label(self) -> str:
        """Name and parameters of the term, for logs."""
        return self.text(chunked=False)

    @property
    def short(self) -> str:
        """The name, or stem and class of a file, for names of folders: ``my_loss-Triangular``."""
        if self.file is None:
            return self.name
        return f"{PurePath(self.file).stem}-{self.name.rpartition(':')[2]}"

    @property
    def file(self) -> str | None:
        """The file of a loss that is not registered."""
        return self.name.rpartition(":")[0] or None

    def text(self, *, chunked: bool) -> str:
        """The term without its weight, as text, with or without the chunked suffix."""
        given = ",".join(f"{key}={value}" for key, value in self.parameters.items())
        name = self.name + (CHUNKED if chunked else "")
        return f"{name}:{given}" if given else name


@dataclass(frozen=True)
class LossSpec:
    """A parsed spec such as ``generalized_jsd_chunked:beta=0.1``, or a sum of several.

    Attributes:
        terms: the losses; several for a weighted sum.
        chunked: whether the suffix was given.
    """

    terms: tuple[TermSpec, ...]
    chunked: bool

    def text(self, *, chunked: bool) -> str:
        """The spec with or without the chunked suffix."""
        return "+".join(
            ("" if term.weight == 1 else f"{term.weight!r}*") + term.text(chunked=chunked)
            for term in self.terms
        )


def available_losses() -> tuple[LossRef, ...]:
    """All registered losses by name, without importing them and without ``_chunked`` variants.

    Names registered by two distributions are listed once for each; using such a name is an error
    (except for built-in losses, which cannot be replaced).
    """
    return _GROUP.available()


def ignored_losses() -> tuple[LossRef, ...]:
    """Plugin losses that are ignored because they use the name of a built-in loss."""
    return _GROUP.ignored()


def parse_spec(spec: str) -> LossSpec:
    """Split ``name[_chunked][:key=value[,key=value...]]``, or a sum ``0.7*first + 0.3*second``.

    A name may be ``FILE.py:CLASS``, whose path contains no ``+``, ``*`` or colon.

    Raises:
        LossSpecError: the text has another form, or mixes chunked and plain terms. Names are not
            checked.
    """
    parsed = [_parse_term(spec, text) for text in _PLUS.split(spec.strip())]
    if len({chunked for _, chunked in parsed}) > 1:
        plain = ", ".join(term.name for term, chunked in parsed if not chunked)
        raise LossSpecError(
            f"loss {spec!r}: chunked and plain terms are mixed; write {CHUNKED} after {plain} too"
        )
    return LossSpec(tuple(term for term, _ in parsed), parsed[0][1])


def one_term(
    spec: str, kind: str, example: str, wrong: type[Exception], *, files: bool = False
) -> TermSpec:
    """Parse a spec of a group without sums and chunked variants: ``name[:key=value,...]``.

    Args:
        spec: the text.
        kind: what it names, for messages.
        example: a right spec, for messages.
        wrong: the exception.
        files: whether ``FILE.py:CLASS`` may take the place of a name.

    Raises:
        Exception: of type ``wrong``: another form.
    """
    try:
        parsed = parse_spec(spec)
    except LossSpecError as error:
        raise wrong(
            f"{kind} {spec!r}: expected a name such as {example.partition(':')[0]}, or {example} "
            "with key=value after the colon, each key once"
        ) from error
    [term, *others] = parsed.terms
    if others or parsed.chunked or term.weight != 1 or (term.file is not None and not files):
        raise wrong(f"{kind} {spec!r}: expected one name; only losses have weights and sums")
    return term


def _parse_term(spec: str, text: str) -> tuple[TermSpec, bool]:
    match = _TERM.fullmatch(text)
    if match is None or match["name"] == CHUNKED:
        path = re.search(r"[^\s*:]+\.py\b", text)
        if path is not None:
            example = [*classes_in(path[0]), "MyLoss"][0]
            raise LossSpecError(
                f"loss {spec!r}: the loss of a file is written FILE.py:CLASS, such as "
                f"{path[0]}:{example} or {path[0]}:{example}{CHUNKED}"
            )
        word = re.search(r"[A-Za-z][\w-]*", text)
        meant = _GROUP.suggest(word[0]) if word else None
        hint = f"; did you mean {meant!r}?" if meant else ""
        raise LossSpecError(
            f"loss {spec!r}: expected a name such as forward_kl_chunked, "
            f"generalized_jsd_chunked:beta=0.1, or a sum 0.7*forward_kl+0.3*reverse_kl{hint}"
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
    """Find a loss by name (without the chunked suffix), without importing it.

    Raises:
        LossSpecError: an unknown name (with a suggestion), a name registered by two distributions,
            or a file that does not exist or has no such class.
        BrokenLossError: a file that is not valid Python.
    """
    if split_name(name) is None:
        _check_suffix(name)
    return _GROUP.find(name)


def load_loss(name: str) -> "type[Loss]":
    """Import the class registered under a name (without the chunked suffix), or of a file.

    Raises:
        LossSpecError: as in :func:`find_loss`, or an object that is not a loss.
        BrokenLossError: the import failed. If the environment variable ``KDLOSSES_DEBUG`` is set,
            the message contains the traceback.
    """
    find_loss(name)  # fails before torch is loaded
    from kdlosses.divergence import Divergence, RowLoss

    bases, expected = (Divergence, RowLoss), "kdlosses.Divergence or RowLoss"
    return _GROUP.load(name, bases, expected)


def loss_files(spec: str) -> dict[str, str]:
    """The files of the losses of a spec that are not registered, with their SHA-256.

    A changed file is another loss: record the result with what was computed, and compare it.

    Raises:
        LossSpecError: a malformed spec, or a file that cannot be read.
    """
    found: dict[str, str] = {}
    for term in parse_spec(spec).terms:
        found |= _GROUP.files(term.name)
    return found


def build_loss(spec: TermSpec) -> "Loss":
    """Construct the loss of a parsed term with validated parameters.

    Raises:
        LossSpecError: an unknown parameter (with a suggestion), or a value out of bounds.
        BrokenLossError: see :func:`load_loss`.
    """
    loss_class = load_loss(spec.name)
    built = _GROUP.build(spec.name, loss_class, loss_class.model_fields, spec.parameters)
    return cast("Loss", built)


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
        spec: ``name`` or ``FILE.py:CLASS``, with the suffix ``_chunked`` for the chunked
            evaluation, and parameters after a colon: ``"skew_forward_kl_chunked:alpha=0.2"``. A
            weighted sum of losses is evaluated in one pass:
            ``"0.7*forward_kl_chunked+0.3*reverse_kl_chunked"``.
        chunk_size: tokens per chunk; by default chosen by vocabulary, width and device.
        temperature: T > 0, softens both distributions.
        temperature_scaling: multiply by ``T ** temperature_power``.
        ignore_index: label of ignored positions.
        vocab_size: cut both heads to this many entries before the softmax.
        match_curvature: divide by the loss's curvature, so that near equality a ``kd_ratio`` has
            the same strength for every loss.
        compiled: compile the element-wise part of a chunk; by default if the vocabulary is large
            enough.
        schedules: schedules of the temperature and parameters of the loss during training
            (:mod:`kdlosses.schedules`), by ``"temperature"``, ``"alpha"``, or in a sum
            ``"reverse_kl.alpha"``.

    Returns:
        An ``nn.Module`` called as ``loss(student, teacher, labels)``.

    Raises:
        LossSpecError: an unknown loss or parameter, a value out of bounds, or ``chunk_size`` and
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
    from kdlosses.terms import Term
    from kdlosses.token_loss import TokenLoss

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


def _check_suffix(name: str) -> None:
    """Refuse a loss registered with the reserved chunked suffix."""
    registered = {ref.name: ref for ref in available_losses()}
    reserved = registered.get(name if name.endswith(CHUNKED) else name + CHUNKED)
    if reserved is not None and (reserved.name == name or name not in registered):
        raise LossSpecError(
            f"loss {reserved.name!r} of {reserved.distribution} ends in the reserved suffix "
            f"{CHUNKED!r}; its author must rename it"
        )
    if name.endswith(CHUNKED) and name.removesuffix(CHUNKED) in registered:
        raise LossSpecError(
            f"loss {name!r}: {CHUNKED!r} is not part of a name and may appear only once in a spec"
        )
