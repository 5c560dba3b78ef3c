"""Closed forms in float64, written from the definitions, with numpy and plain loops only.

Nothing here imports kdlosses: an error in the library cannot repeat itself in its oracle.
"""

import math

import numpy as np
import torch

P = np.array([0.7, 0.2, 0.1])
Q = np.array([0.2, 0.3, 0.5])
Q_ZERO = np.array([0.0, 0.4, 0.6])


def array(values, dtype=None):
    """A numpy array of numbers or of a tensor on any device."""
    return np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values, dtype)


def log_softmax(logits, temperature=1.0):
    """Log-probabilities ``[..., V]`` in float64; -inf stays."""
    x = array(logits, np.float64) / temperature
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def log(probabilities):
    """log p, -inf where p is 0."""
    with np.errstate(divide="ignore"):
        return np.log(array(probabilities, np.float64))


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


def hellinger(log_p, log_q):
    return 1 - np.exp((log_p + log_q) / 2).sum(axis=-1)


def alpha_beta_terms(log_p, log_q, a, b):
    if a == b == 0:
        return (log_p - log_q) ** 2 / 2
    if a == 0:
        return alpha_beta_terms(log_q, log_p, b, a)
    p, q = np.exp(a * log_p), np.exp(a * log_q)
    if b == 0:
        return np.where(p == 0, q, p * (a * log_p - a * log_q) - p + q) / a**2
    if a + b == 0:
        return (a * (log_q - log_p) + np.exp(a * (log_p - log_q)) - 1) / a**2
    bracket = (
        np.exp(a * log_p + b * log_q)
        - a / (a + b) * np.exp((a + b) * log_p)
        - b / (a + b) * np.exp((a + b) * log_q)
    )
    return -bracket / (a * b)


def alpha_beta(log_p, log_q, alpha=0.5, beta=0.5):
    with np.errstate(invalid="ignore"):
        terms = alpha_beta_terms(log_p, log_q, alpha, beta)
    # No term is negative: infinity minus infinity, by one impossible token, is infinity.
    terms = np.where(np.isnan(terms), np.inf, terms)
    return np.where(log_p == log_q, 0.0, terms).sum(axis=-1)


def adaptive_weights(log_p, log_q, mass=0.5):
    """The weight of forward KL: the gap in the head over the whole gap."""
    p, q = np.exp(log_p), np.exp(log_q)
    gap = np.abs(p - q)
    weights = np.empty(p.shape[:-1])
    for row in np.ndindex(weights.shape):
        # Equal probabilities are in the head or out of it together.
        levels, level, counts = np.unique(p[row], return_inverse=True, return_counts=True)
        held = np.cumsum((levels * counts)[::-1])[::-1]  # mass at this level and above
        in_head = ((held <= mass) | (levels == levels[-1]))[level]
        total = gap[row].sum()
        weights[row] = gap[row][in_head].sum() / total if total > 0 else 0.5
    return weights


def adaptive_kl(log_p, log_q, mass=0.5, weights=None):
    weight = adaptive_weights(log_p, log_q, mass) if weights is None else weights
    with np.errstate(invalid="ignore"):  # 0 times infinity
        forward, reverse = weight * kl(log_p, log_q), (1 - weight) * kl(log_q, log_p)
    return np.where(weight > 0, forward, 0.0) + np.where(weight < 1, reverse, 0.0)


def decoupled_kd(log_p, log_q, alpha=1.0, beta=1.0, labels=0):
    rows = np.broadcast_to(array(labels), log_p.shape[:-1])
    values = np.empty(rows.shape)
    for row in np.ndindex(rows.shape):
        label = rows[row]
        parts = []
        for x in (log_p[row], log_q[row]):
            rest = np.delete(x, label)
            finite = rest[rest > -np.inf]
            total = np.logaddexp.reduce(finite) if len(finite) else -np.inf
            within = np.array([r - total if r > -np.inf else -np.inf for r in rest])
            parts.append((np.array([x[label], total]), within))
        (p_split, p_rest), (q_split, q_rest) = parts
        terms = [(alpha, kl(p_split, q_split)), (beta, kl(p_rest, q_rest))]
        values[row] = sum(weight * value for weight, value in terms if weight)
    return values


def taid(log_p, log_q, t_start=0.4, t_end=1.0, student_in_target=None):
    """At the start of training; ``student_in_target`` holds the student's part of the target."""
    held = log_q if student_in_target is None else student_in_target
    mixed = np.full_like(log_p, -np.inf)
    possible = np.ones_like(log_p, dtype=bool)
    for share, x in ((1 - t_start, held), (t_start, log_p)):
        possible &= (x > -np.inf) | (share == 0)
    parts = (1 - t_start) * np.where(possible, held, 0) + t_start * np.where(possible, log_p, 0)
    mixed[possible] = parts[possible]
    return kl(log_softmax(mixed), log_q)


def todi_weights(log_p, log_q):
    """The logistic function of log(p / q), 1/2 where both are 0."""
    p, q = np.exp(log_p), np.exp(log_q)
    with np.errstate(invalid="ignore", over="ignore"):
        weights = 1 / (1 + np.exp(log_q - log_p))
    return np.where((p == 0) & (q == 0), 0.5, weights)


def todi(log_p, log_q, weights=None):
    w = todi_weights(log_p, log_q) if weights is None else weights
    total = np.zeros(log_p.shape[:-1])
    for token in range(log_p.shape[-1]):
        a, b, share = log_p[..., token], log_q[..., token], w[..., token]
        with np.errstate(invalid="ignore"):
            pieces = share * np.exp(a) * (a - b), (1 - share) * np.exp(b) * (b - a)
        total += np.where((share > 0) & (a > -np.inf), pieces[0], 0.0)
        total += np.where((share < 1) & (b > -np.inf), pieces[1], 0.0)
    return total


def entropy_aware_kl(log_p, log_q, threshold=0.8):
    p = np.exp(log_p)
    entropy = -np.where(p > 0, p * np.where(p > 0, log_p, 0.0), 0.0).sum(axis=-1)
    return kl(log_q, log_p) + np.where(entropy > threshold, kl(log_p, log_q), 0.0)


def pair_weights(log_p, log_q, kinds):
    """The weights of the first and of the second token of a pair."""
    some = (log_p > -np.inf) | (log_q > -np.inf)
    choices = {
        "teacher": np.exp(log_p),
        "student": np.exp(log_q),
        "uniform": some / some.sum(axis=-1, keepdims=True),
    }
    return [choices[kind] for kind in kinds]


def concrete_score(log_p, log_q, u="student", v="student", weights=None):
    first, second = pair_weights(log_p, log_q, (u, v)) if weights is None else weights
    values = np.empty(log_p.shape[:-1])
    for row in np.ndindex(values.shape):
        a, b = first[row], second[row]
        kept = (a > 0) | (b > 0)
        x = log_q[row][kept] - log_p[row][kept]
        a, b = a[kept], b[kept]
        if np.isinf(x).any():
            values[row] = np.inf
        elif len(x) < 100:  # the definition, over all pairs
            values[row] = (np.outer(a, b) * (x[:, None] - x) ** 2).sum()
        else:
            values[row] = (a * x**2).sum() + (b * x**2).sum() - 2 * (a * x).sum() * (b * x).sum()
    return values


def amid(log_p, log_q, alpha=0.5, share=0.5, order="pr", divergence="kl"):
    power = (1 - alpha) / 2
    if power == 0:
        logs = share * log_p + (1 - share) * log_q
    else:
        parts = math.log(share) + power * log_p, math.log(1 - share) + power * log_q
        logs = np.logaddexp(*parts) / power
    sides = {"p": log_p, "q": log_q, "r": log_softmax(logs)}
    first, second = sides[order[0]], sides[order[1]]
    return kl(first, second) if divergence == "kl" else alpha_beta(first, second, 0.2, 0.7)


def mft(log_p, log_q, threshold=0.2, everywhere=False, labels=0):
    rows = np.broadcast_to(array(labels), log_p.shape[:-1])
    values = np.empty(rows.shape)
    for row in np.ndindex(rows.shape):
        p, label = np.exp(log_p[row]), rows[row]
        target = log_p[row].copy()
        best = p.max()
        if p[label] < best:
            lead = best - p[label]
            share = (lead + threshold) / (1 + lead)
        elif everywhere:
            share = (min(1.0, p[label] + threshold) - p[label]) / (1 - p[label]) if best < 1 else 0
        else:
            share = 0.0
        if share > 0:
            kept = p[label] * (1 - share)
            target = target + log(1 - share)
            target[label] = log(kept + share)
        values[row] = kl(target, log_q[row])
    return values


_FAR = 1e6  # minus the log-probability of an impossible token, far beyond all others


def bild(log_p, log_q, k=8):
    values = np.zeros(log_p.shape[:-1])
    for row in np.ndindex(values.shape):
        for leader in (log_p[row], log_q[row]):
            ranking = np.argsort(-leader, kind="stable")[:k]
            tokens = [token for token in ranking if leader[token] > -np.inf]
            pairs = [(i, j) for n, i in enumerate(tokens) for j in tokens[n + 1 :]]
            if not pairs:
                continue
            sides = []
            for x in (log_p[row], log_q[row]):
                known = np.maximum(x, -_FAR)
                logs = log_softmax([known[i] - known[j] for i, j in pairs])
                sides.append(np.where(logs < -_FAR / 10, -np.inf, logs))
            values[row] += kl(*sides)
    return values


ORACLES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "symmetric_kl": symmetric_kl,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "generalized_jsd": generalized_jsd,
    "total_variation": total_variation,
    "hellinger": hellinger,
    "alpha_beta": alpha_beta,
    "adaptive_kl": adaptive_kl,
    "decoupled_kd": decoupled_kd,
    "taid": taid,
    "todi": todi,
    "entropy_aware_kl": entropy_aware_kl,
    "concrete_score": concrete_score,
    "amid": amid,
    "mft": mft,
    "bild": bild,
}
"""Every built-in loss by its registered name, as a function of log p and log q ``[..., V]``."""

LABELED = {"decoupled_kd", "mft"}
"""Those that also take ``labels``, by default 0 everywhere."""

DETACHED = {
    "adaptive_kl": {"weights": adaptive_weights},
    "concrete_score": {
        "weights": lambda log_p, log_q, u="student", v="student": pair_weights(log_p, log_q, (u, v))
    },
    "taid": {"student_in_target": lambda log_p, log_q, **parameters: log_q},
    "todi": {"weights": todi_weights},
}
"""Quantities that a loss declares detached; its oracle takes each as a keyword to hold it fixed."""

NAMES = sorted(ORACLES)

POWERS = {name: 1 if name in {"total_variation", "mft"} else 2 for name in NAMES}
"""The power of the temperature that multiplies each."""

NOT_ZERO = {"mft"}
"""Those whose value at equality is not 0."""

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
    ("hellinger", {}),
    ("alpha_beta", {}),
    ("alpha_beta", {"alpha": 0.2, "beta": 0.7}),
    ("adaptive_kl", {}),
    ("adaptive_kl", {"mass": 0.8}),
    ("decoupled_kd", {}),
    ("decoupled_kd", {"alpha": 0.5, "beta": 2}),
    ("taid", {}),
    ("taid", {"t_start": 0.9}),
    ("todi", {}),
    ("entropy_aware_kl", {}),
    ("entropy_aware_kl", {"threshold": 2.5}),
    ("concrete_score", {}),
    ("concrete_score", {"u": "teacher"}),
    ("concrete_score", {"u": "teacher", "v": "uniform"}),
    ("amid", {}),
    ("amid", {"alpha": 1, "share": 0.3}),
    ("amid", {"alpha": -3, "order": "rq"}),
    ("amid", {"alpha": -1, "share": 0.2, "order": "qr"}),
    ("amid", {"divergence": "alpha_beta", "order": "rp"}),
    ("mft", {}),
    ("mft", {"threshold": 0.5, "everywhere": True}),
    ("bild", {}),
    ("bild", {"k": 3}),
]
"""Losses with parameters, ``(name, parameters)``."""

EXTREMES = [
    ("alpha_beta", {"alpha": alpha, "beta": beta})
    for alpha, beta in [
        (0.4, 0), (1, 0), (-0.5, 0), (0, 0.7), (0, -0.5), (0.5, -0.5), (-0.3, 0.3), (0, 0),
        (1.5, -0.5), (-0.5, 1.2), (-0.4, -0.7), (0.01, 1), (1, 0.01), (0.6, -0.61), (2, 1.5),
    ]
]  # fmt: skip
"""The limits of alpha_beta, negative exponents, and values beside the limits."""


def spec(name, parameters=None, *, chunked=False):
    """The text that get_loss takes."""
    tail = ",".join(f"{key}={value}" for key, value in (parameters or {}).items())
    return name + ("_chunked" if chunked else "") + (f":{tail}" if tail else "")


def rows(name, teacher, student, temperature=1.0, labels=0, **parameters):
    """Values ``[...]`` of a loss on logits ``[..., V]``, without the temperature's factor."""
    log_p, log_q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    if name in LABELED:
        parameters = {**parameters, "labels": labels}
    return ORACLES[name](log_p, log_q, **parameters)


def detached(name, names, teacher, student, temperature=1.0, **parameters):
    """The quantities ``names`` that a loss declares detached, at these logits."""
    log_p, log_q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    return {key: DETACHED[name][key](log_p, log_q, **parameters) for key in names}


def cross_entropy(student, labels):
    """-log q[label] for logits ``[n, V]`` and labels ``[n]``."""
    log_q = log_softmax(student)
    return np.array([-log_q[i, label] for i, label in enumerate(array(labels))])


def objective(
    name, teacher, student, labels, *, kd_ratio=1.0, temperature=1.0, power=2, divisor=None, **more
):
    """(1 - kd_ratio) CE + kd_ratio T^power KD over the rows whose label is not -100."""
    labels = array(labels).reshape(-1)
    keep = labels != -100
    student, teacher = (
        array(x, np.float64).reshape(-1, np.shape(x)[-1])[keep] for x in (student, teacher)
    )
    labels = labels[keep]
    kd = rows(name, teacher, student, temperature, labels, **more).sum() * temperature**power
    ce = cross_entropy(student, labels).sum()
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
    values = [math.log(x) if x else -math.inf for x in array(probabilities).reshape(-1)]
    return torch.tensor(values, dtype=dtype).reshape(np.shape(probabilities))
