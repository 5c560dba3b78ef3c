"""Compare the results of implementations, to detect wrong ones."""

from __future__ import annotations

import math
from collections.abc import Iterable

from kdrun.bench.cases import CHUNKED, PLAIN
from kdrun.bench.measure import Measurement

_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 3e-2}


def reference_of(loss: Iterable[Measurement]) -> Measurement | None:
    """The reference for a loss: plain, or chunked if plain did not fit into memory."""
    done = {result.case.implementation: result for result in loss if result.measured}
    return done.get(PLAIN) or done.get(CHUNKED)


def difference(result: Measurement, reference: Measurement) -> str | None:
    """Describe where a result differs from the reference beyond its precision, or return None."""
    if result.ready is None or reference.ready is None:
        return None
    pairs = {
        "hidden gradient": (result.ready.hidden_grad_norm, reference.ready.hidden_grad_norm),
        "head gradient": (result.ready.weight_grad_norm, reference.ready.weight_grad_norm),
    }
    if not _lacks_entropy(result):
        pairs["loss"] = (result.ready.loss, reference.ready.loss)
    limit = _TOLERANCE[result.case.settings.dtype]
    found = {name: _relative(*values) for name, values in pairs.items()}
    wrong = [f"{name} by {gap:.1e}" for name, gap in found.items() if not gap <= limit]
    if not wrong:
        return None
    return f"differs from {reference.case.implementation}: {', '.join(wrong)} (relative)"


def _lacks_entropy(result: Measurement) -> bool:
    """Whether a result is torchtune's forward KL, a cross-entropy with the same gradients."""
    return result.case.implementation == "torchtune" and result.case.beta == 0


def _relative(value: float, reference: float) -> float:
    if value == reference:
        return 0.0
    gap = abs(value - reference) / max(abs(reference), 1e-30)
    return gap if math.isfinite(gap) else math.inf
