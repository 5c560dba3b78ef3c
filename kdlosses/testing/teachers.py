"""Checks of compressed teachers, for losses that support them."""

import torch
from torch import Tensor

from kdlosses.compressed import Sampled, TeacherSource, TopK
from kdlosses.divergence import Divergence, Loss, RowLoss
from kdlosses.testing.cases import close, pair, paths
from kdlosses.testing.catalogue import conformance
from kdlosses.token_loss import TokenLoss

_ROWS, _WIDTH = 5, 9


def _takes_top_k(loss: Loss) -> bool:
    return isinstance(loss, Divergence) or (isinstance(loss, RowLoss) and loss.supports_top_k)


def _takes_samples(loss: Loss) -> bool:
    return isinstance(loss, Divergence) and loss.linear_finish and loss.reduction == "sum"


@conformance(_takes_top_k)
def _top_k(loss: Loss) -> None:
    """All tokens give the full loss; fewer never exceed it if coarse-graining is monotone."""
    teacher, student, labels = pair(_ROWS, _WIDTH)
    for path, evaluate in paths(loss):
        full = _both(evaluate, student, teacher, labels)
        for what, got, wanted in zip(
            ("value", "gradient"),
            _both(evaluate, student, TopK.from_logits(teacher, _WIDTH), labels),
            full,
            strict=True,
        ):
            close(f"{path}: the {what} with all tokens kept", got, wanted)
        if not loss.coarse_graining_monotone:
            continue
        before = torch.zeros_like(full[0])
        for k in range(1, _WIDTH + 1):
            value, _ = _both(evaluate, student, TopK.from_logits(teacher, k), labels)
            if (value < before - 1e-12).any():
                raise AssertionError(
                    f"{path}: the value falls by {(before - value).max().item():.3g} from "
                    f"{k - 1} tokens to {k}; set coarse_graining_monotone = False"
                )
            before = value


@conformance(_takes_samples)
def _sampled(loss: Loss) -> None:
    """The expectation over sampled tokens is the full loss, in value and gradient."""
    teacher, student, labels = pair(_ROWS, _WIDTH)
    log_probs = teacher.log_softmax(-1)
    for path, evaluate in paths(loss):
        totals = [torch.zeros(_ROWS, dtype=student.dtype), torch.zeros_like(student)]
        for token in range(_WIDTH):
            drawn = Sampled(log_probs[:, [token]], torch.full((_ROWS, 1), token), _WIDTH)
            value, gradient = _both(evaluate, student, drawn, labels)
            share = log_probs[:, token].exp()
            totals[0] += share * value
            totals[1] += share[:, None] * gradient
        full = _both(evaluate, student, teacher, labels)
        for what, got, wanted in zip(("value", "gradient"), totals, full, strict=True):
            close(f"{path}: the expected {what} over draws", got, wanted)


def _both(
    evaluate: TokenLoss, student: Tensor, teacher: Tensor | TeacherSource, labels: Tensor
) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    values = evaluate(leaf, teacher, labels, reduction="none")
    return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]
