"""Every loss with heads spread over the processes of torchrun, against one process."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist

import kdlosses
from kdlosses import Divergence, KDObjective, Projected, VocabParallel, get_loss

VOCAB, ROWS, STUDENT, TEACHER = 23, 9, 5, 7
SPECS = {"generalized_jsd": ("generalized_jsd", "generalized_jsd:beta=0.1")}


def specs():
    for ref in kdlosses.available_losses():
        for spec in SPECS.get(ref.name, (ref.name,)):
            loss = get_loss(spec).terms[0].loss
            yield spec, isinstance(loss, Divergence)


def make(dtype, softcap):
    generator = torch.Generator().manual_seed(3)

    def side(width):
        hidden = torch.randn(ROWS, width, generator=generator, dtype=torch.float64)
        weight = torch.randn(VOCAB, width, generator=generator, dtype=torch.float64)
        bias = torch.randn(VOCAB, generator=generator, dtype=torch.float64)
        return [tensor.to(dtype) for tensor in (hidden, weight, bias)], {"softcap": softcap}

    labels = torch.randint(0, 20, (ROWS,), generator=generator)
    labels[2] = -100
    return side(STUDENT), side(TEACHER), labels


def bounds(world, rank):
    """Parts of uneven size."""
    cuts = [0, *(VOCAB * part // world + 1 for part in range(1, world)), VOCAB]
    return cuts[rank], cuts[rank + 1]


def evaluate(objective, student, teacher, labels, cls, part):
    start, stop = part
    (hidden, weight, bias), more = student
    leaves = [hidden.clone(), weight[start:stop].clone(), bias[start:stop].clone()]
    for leaf in leaves:
        leaf.requires_grad_()
    (teacher_hidden, teacher_weight, teacher_bias), teacher_more = teacher
    out = objective(
        cls(*leaves, **more),
        cls(teacher_hidden, teacher_weight[start:stop], teacher_bias[start:stop], **teacher_more),
        labels,
    )
    (3 * out.loss).backward()
    return out, [leaf.grad for leaf in leaves]


def check(spec, chunked, dtype, temperature, softcap, token_weight=None):
    world, rank = dist.get_world_size(), dist.get_rank()
    student, teacher, labels = make(dtype, softcap)
    name, colon, parameters = spec.partition(":")
    more = {"chunk_size": 4, "compiled": False} if chunked else {}
    full_name = f"{name}{'_chunked' if chunked else ''}{colon}{parameters}"
    # One token less than the heads have: padding is cut on the last process.
    loss = get_loss(full_name, temperature=temperature, vocab_size=VOCAB - 1, **more)
    objective = KDObjective(loss, kd_ratio=0.6, token_weight=token_weight)
    expected, whole = evaluate(objective, student, teacher, labels, Projected, (0, VOCAB))
    part = bounds(world, rank)
    found, parts = evaluate(objective, student, teacher, labels, VocabParallel, part)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for name in ("loss", "class_loss", "kd_loss"):
        a, b = getattr(expected, name), getattr(found, name)
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
    whole[1:] = [gradient[slice(*part)] for gradient in whole[1:]]
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(b, a, rtol=10 * tolerance, atol=10 * tolerance)


def refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    additive = 0
    for spec, is_additive in specs():
        if not is_additive:
            case = (spec, False, torch.float64, 1.0, None)
            refused(lambda case=case: check(*case), "needs whole rows")
            continue
        additive += 1
        for chunked in (False, True):
            check(spec, chunked, torch.float64, 1.0, None)
            check(spec, chunked, torch.float64, 2.0, 4.0)
            check(spec, chunked, torch.float32, 1.0, None)
    assert additive >= 10, additive
    for ref in kdlosses.available_weights():
        weighting = kdlosses.TokenWeighting(kdlosses.get_weight(ref.name), "both")
        check("reverse_kl", True, torch.float64, 2.0, 4.0, weighting)
    (hidden, weight, _), _ = make(torch.float64, None)[0]
    rank, world = dist.get_rank(), dist.get_world_size()
    start, stop = bounds(world, rank)
    here = VocabParallel(hidden, weight[start:stop])
    assert (here.start, here.total, here.columns(VOCAB)) == (start, VOCAB, stop - start)
    labels = torch.zeros(ROWS, dtype=torch.int64)
    loss = get_loss("forward_kl")
    refused(lambda: loss(here, hidden @ weight.T, labels), "must be as well")
    refused(lambda: loss(hidden @ weight.T, here, labels), "but the student's is not")
    cut = get_loss("forward_kl", vocab_size=bounds(world, world - 1)[0])
    refused(lambda: cut(here, here, labels), "has none; shard the heads")
    refused(lambda: kdlosses.measure(loss, here, None, labels), "need the whole head")
    if rank == 0:
        print(f"{additive} losses", file=sys.stderr)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
