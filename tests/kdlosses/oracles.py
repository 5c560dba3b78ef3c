"""Closed forms in float64, written from the definitions, with numpy and plain loops only.

Nothing here imports kdlosses: an error in the library cannot repeat itself in its oracle.
"""

import math

import numpy as np
import torch

P = np.array([0.7, 0.2, 0.1])
Q = np.array([0.2, 0.3, 0.5])
Q_ZERO = np.array([0.0, 0.4, 0.6])


def log_softmax(logits, temperature=1.0):
    """Log-probabilities ``[..., V]`` in float64; -inf stays."""
    x = np.asarray(logits, dtype=np.float64) / temperature
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def log(probabilities):
    """log p, -inf where p is 0."""
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(probabilities, dtype=np.float64))


def kl(log_p, log_q):
    """sum p log(p / q), with 0 log 0 = 0 and p log(p / 0) = inf."""
    possible = log_p > -np.inf
    difference = np.where(possible, log_p, 0.0) - np.where(possible, log_q, 0.0)
    return np.where(possible, np.exp(log_p) * difference, 0.0).sum(axis=-1)


def mixture(log_p, log_q, share):
    """log(share p + (1 - share) q)."""
    return np.logaddexp(log_p + log(share), log_q + log(1 - share))


def forward_kl(log_p, log_q):
    return kl(log_p, log_q)


def reverse_kl(log_p, log_q):
    return kl(log_q, log_p)


def symmetric_kl(log_p, log_q, forward_weight=0.5):
    parts = [(forward_weight, kl(log_p, log_q)), (1 - forward_weight, kl(log_q, log_p))]
    return sum(weight * value for weight, value in parts if weight)


def skew_forward_kl(log_p, log_q, alpha=0.1):
    return kl(log_p, mixture(log_p, log_q, alpha))


def skew_reverse_kl(log_p, log_q, alpha=0.1):
    return kl(log_q, mixture(log_q, log_p, alpha))


def generalized_jsd(log_p, log_q, beta=0.5, normalize=False):
    if beta in {0, 1}:
        return kl(log_p, log_q) if beta == 0 else kl(log_q, log_p)
    log_m = mixture(log_p, log_q, beta)
    value = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    return value / (beta * (1 - beta)) if normalize else value


def total_variation(log_p, log_q):
    return np.abs(np.exp(log_p) - np.exp(log_q)).sum(axis=-1) / 2


ORACLES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "symmetric_kl": symmetric_kl,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "generalized_jsd": generalized_jsd,
    "total_variation": total_variation,
}
"""Every built-in loss by its registered name, as a function of log p and log q ``[..., V]``."""

NAMES = sorted(ORACLES)

SPECS = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("symmetric_kl", {}),
    ("symmetric_kl", {"forward_weight": 0.3}),
    ("skew_forward_kl", {}),
    ("skew_forward_kl", {"alpha": 0.4}),
    ("skew_reverse_kl", {}),
    ("skew_reverse_kl", {"alpha": 0.4}),
    ("generalized_jsd", {}),
    ("generalized_jsd", {"beta": 0.1}),
    ("generalized_jsd", {"beta": 0.3, "normalize": True}),
    ("generalized_jsd", {"beta": 0}),
    ("generalized_jsd", {"beta": 1}),
    ("total_variation", {}),
]
"""Losses with parameters, ``(name, parameters)``."""


def spec(name, parameters=None, *, chunked=False):
    """The text that get_loss takes."""
    tail = ",".join(f"{key}={value}" for key, value in (parameters or {}).items())
    return name + ("_chunked" if chunked else "") + (f":{tail}" if tail else "")


def rows(name, teacher, student, temperature=1.0, **parameters):
    """Values ``[...]`` of a loss on logits ``[..., V]``, without the temperature's factor."""
    log_p, log_q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    return ORACLES[name](log_p, log_q, **parameters)


def cross_entropy(student, labels):
    """-log q[label] for logits ``[n, V]`` and labels ``[n]``."""
    log_q = log_softmax(student)
    return np.array([-log_q[i, label] for i, label in enumerate(labels)])


def objective(
    name, teacher, student, labels, *, kd_ratio=1.0, temperature=1.0, power=2, divisor=None, **more
):
    """(1 - kd_ratio) CE + kd_ratio T^power KD over the rows whose label is not -100."""
    labels = np.asarray(labels).reshape(-1)
    keep = labels != -100
    student, teacher = (
        np.asarray(x, np.float64).reshape(-1, np.shape(x)[-1])[keep] for x in (student, teacher)
    )
    kd = rows(name, teacher, student, temperature, **more).sum() * temperature**power
    ce = cross_entropy(student, labels[keep]).sum()
    total = kd_ratio * kd + ((1 - kd_ratio) * ce if kd_ratio < 1 else 0.0)
    return total / max(1, keep.sum() if divisor is None else divisor)


def central_differences(function, point, step=1e-5):
    """Gradient of a scalar numpy function at ``point`` by a fourth-order central difference."""
    gradient = np.zeros_like(point)
    for index in np.ndindex(point.shape):
        moved = [point.copy() for _ in range(4)]
        for x, factor in zip(moved, (-2, -1, 1, 2), strict=True):
            x[index] += factor * step
        a, b, c, d = (function(x) for x in moved)
        gradient[index] = (a - 8 * b + 8 * c - d) / (12 * step)
    return gradient


def logits_of(probabilities, dtype=torch.float32):
    """``log p`` as a tensor, -inf where p is 0."""
    values = [math.log(x) if x else -math.inf for x in np.asarray(probabilities).reshape(-1)]
    return torch.tensor(values, dtype=dtype).reshape(np.shape(probabilities))
