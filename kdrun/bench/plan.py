"""The plan of a benchmark: sizes and implementations of each loss, with their validation."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from kdlosses import BrokenLossError, available_losses, get_loss, parse_spec
from kdrun.bench.cases import CHUNKED, PLAIN, Case, Point, Settings
from kdrun.bench.peers import PEERS, is_installed
from kdrun.errors import InputError
from kdrun.paths import make_output_folder

NO_PEER = "none"


@dataclass(frozen=True)
class Plan:
    """All measurements of one command.

    Attributes:
        settings: see :class:`Settings`.
        points: the grid of sizes.
        losses: specs without the chunked suffix, each with the peers that implement it.
        absent: peers that are not installed.
        folder: output folder of table and plots.
    """

    settings: Settings
    points: tuple[Point, ...]
    losses: dict[str, tuple[str, ...]]
    absent: tuple[str, ...]
    folder: Path

    def cases(self, point: Point, loss: str) -> list[Case]:
        """The cases of a loss: plain, chunked, then the peers."""
        beta = _beta(loss) if self.losses[loss] else 0.0
        ours = (PLAIN, CHUNKED) if self.settings.plain else (CHUNKED,)
        return [
            Case(self.settings, point, implementation, loss, beta or 0.0)
            for implementation in (*ours, *self.losses[loss])
        ]


def make_plan(
    settings: Settings,
    tokens: Sequence[int],
    vocabs: Sequence[int],
    losses: Sequence[str],
    peers: Sequence[str],
    folder: Path,
) -> Plan:
    """Check the options and make the plan.

    Args:
        settings: settings shared by all measurements.
        tokens: numbers of tokens.
        vocabs: vocabulary sizes.
        losses: specs, with or without the chunked suffix; empty for all registered losses.
        peers: names of peers, or ``none``; empty for the installed peers.
        folder: output folder of table and plots; created if it does not exist.

    Raises:
        InputError: a value that cannot be measured, or a folder that cannot be written.
        LossSpecError: an unknown loss or parameter.
    """
    _check_sizes(settings, tokens, vocabs)
    specs = _specs(losses)
    if NO_PEER in peers and len(set(peers)) > 1:
        raise InputError(f"--peer {NO_PEER} cannot be combined with other peers")
    absent = tuple(name for name in PEERS if not is_installed(name))
    for name in peers:
        if name in absent:
            package = PEERS[name].distribution
            raise InputError(
                f"--peer {name}: {package} is not installed in this environment; "
                f"pip install --no-deps {package}"
            )
    chosen = [name for name in PEERS if name in peers or (not peers and name not in absent)]
    if settings.device == "cuda":
        _require_cuda()
    make_output_folder(folder)
    return Plan(
        settings,
        tuple(Point(*sizes) for sizes in product(dict.fromkeys(tokens), dict.fromkeys(vocabs))),
        {spec: _peers_of(spec, chosen) for spec in specs},
        () if peers else absent,
        folder,
    )


def respell(spec: str, *, chunked: bool) -> str:
    """Rewrite a spec of a loss or sum with or without the chunked suffix."""
    return parse_spec(spec).text(chunked=chunked)


def _check_sizes(settings: Settings, tokens: Sequence[int], vocabs: Sequence[int]) -> None:
    lowest = [
        *(("--tokens", value, 1) for value in tokens),
        *(("--vocab", value, 2) for value in vocabs),  # a softmax over one entry has no gradient
        ("--student-width", settings.student_width, 1),
        ("--teacher-width", settings.teacher_width, 1),
        ("--rounds", settings.rounds, 1),
        ("--threads", settings.threads, 1),
        ("--chunk-size", settings.chunk_size, 1),
    ]
    for option, value, least in lowest:
        if value is not None and value < least:
            raise InputError(f"{option} {value}: must be at least {least}")
    if not 0 < settings.kd_ratio <= 1:
        raise InputError(
            f"--kd-ratio {settings.kd_ratio:g}: must be in (0, 1], because a loss with ratio 0 is "
            "not evaluated"
        )


def _specs(losses: Sequence[str]) -> list[str]:
    if not losses:
        return list(dict.fromkeys(ref.name for ref in available_losses()))
    specs = []
    for given in losses:
        spec = respell(given, chunked=False)
        # A loss that cannot be imported gets its own row, and the others are measured.
        with contextlib.suppress(BrokenLossError), _no_advice():
            get_loss(spec)
        specs.append(spec)
    return list(dict.fromkeys(specs))


def _peers_of(spec: str, chosen: Sequence[str]) -> tuple[str, ...]:
    beta = _beta(spec)
    if beta is None:
        return ()
    return tuple(name for name in chosen if PEERS[name].offers(beta))


def _beta(spec: str) -> float | None:
    """The beta of the equivalent generalised JSD (0 forward KL, 1 reverse KL), or None."""
    [term, *others] = parse_spec(spec).terms
    if others or term.weight != 1:
        return None
    if term.name != "generalized_jsd":
        return {"forward_kl": 0.0, "reverse_kl": 1.0}.get(term.name)
    with _no_advice():
        values = get_loss(spec).loss.model_dump()
    return None if values["normalize"] else float(values["beta"])


@contextlib.contextmanager
def _no_advice() -> Iterator[None]:
    """Hide warnings about parameter values, which the worker reports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _require_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device here; use --device cpu")
