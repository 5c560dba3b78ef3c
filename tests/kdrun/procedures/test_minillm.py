"""MiniLLM's gradient on a toy whose answers can be listed: vocabulary 4, length 3, float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdlosses import KDObjective, get_loss
from kdrun.data.collate import Collator
from kdrun.data.encoding import Example
from kdrun.procedures.base import ROLLOUT, LossRows, Origin
from kdrun.procedures.minillm import MiniLLM
from kdrun.procedures.sampling import Sample, Sampling
from kdrun.procedures.session import Place, Session

VOCAB, LENGTH, END, PROMPT = 4, 3, 3, 0
PLAIN: dict[str, Any] = {
    "importance": "sequence",
    "gamma": 1.0,
    "length_normalised": False,
    "reward_clip": 0.0,
    "clip": 0.0,
    "whiten": False,
}
Answer = tuple[int, ...]


def tables(table: Callable[..., Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the student that learns, of the one that sampled, and of the teacher.

    No answer ends at once: those are skipped, and would be missed in the mean.
    """
    found = [table(seed, scale=1.5).logits.detach() for seed in (0, 1, 2)]
    for logits in found:
        logits[PROMPT, END] = -60.0
    now, old, teacher = found
    return now + 0.0, now + 0.3 * old * (old > -30), teacher


def answers() -> list[Answer]:
    found: list[Answer] = []
    for first, second in itertools.product(range(END), range(VOCAB)):
        if second == END:
            found.append((first, END))
        else:
            found += [(first, second, third) for third in range(VOCAB)]
    return found


def steps(answer: Answer) -> tuple[list[int], list[int]]:
    return [PROMPT, *answer[:-1]], list(answer)


def along(log_probs: Tensor, answer: Answer) -> Tensor:
    return log_probs[steps(answer)]


def mixture(old: Tensor, teacher: Tensor, share: float) -> Tensor:
    return ((1 - share) * old.softmax(-1) + share * teacher.softmax(-1)).log()


def exact(now: Tensor, teacher: Tensor) -> Tensor:
    """The gradient of the reverse KL of whole answers, by autograd of its definition."""
    leaf = now.clone().requires_grad_()
    q, p = leaf.log_softmax(-1), teacher.log_softmax(-1)
    total = sum(
        along(q, y).sum().exp() * (along(q, y).sum() - along(p, y).sum()) for y in answers()
    )
    assert isinstance(total, Tensor)
    return torch.autograd.grad(total, leaf)[0]


def oracle(now: Tensor, old: Tensor, teacher: Tensor, m: MiniLLM, batch: Sequence[Answer]) -> Any:
    """The gradient of the estimator on a batch, summed over tokens, from the equations."""
    leaf = now.clone().requires_grad_()
    q, q_old, p = (x.log_softmax(-1) for x in (leaf, old, teacher))
    mixed = mixture(old, teacher, m.teacher_mix)
    returns = []
    for y in batch:
        rewards = along(p, y) - along(q_old, y)
        if m.reward_clip:
            rewards = rewards.clamp(-m.reward_clip, m.reward_clip)
        own = []
        for t in range(len(y)):
            later = [m.gamma**k * rewards[t + 1 + k] for k in range(len(y) - t - 1)]
            value = sum(later, torch.zeros((), dtype=torch.float64))
            own.append(value / max(1, len(later)) if m.length_normalised else value)
        returns.append(torch.stack(own))
    if m.whiten:
        every = torch.cat(returns)
        spread = (every.var(correction=0) + 1e-8).sqrt()
        returns = [(x - every.mean()) / spread for x in returns]
    loss = torch.zeros((), dtype=torch.float64)
    for y, later_returns in zip(batch, returns, strict=True):
        weights = (along(q_old, y) - along(mixed, y)).exp()
        if m.importance == "sequence":
            weights = weights.prod().expand(len(y))
        states = steps(y)[0]
        kl = (q[states].exp() * (q[states] - p[states])).sum(-1)
        ratio = weights * (along(q, y) - along(q_old, y)).exp()
        gain = ratio * later_returns
        if m.clip:
            bounded = ratio.clamp(1 - m.clip, 1 + m.clip) * later_returns
            gain = torch.minimum(gain, bounded)
        loss = loss + (weights * kl).sum() - gain.sum()
    return torch.autograd.grad(loss, leaf)[0]


class Scripted(Session):
    """A session whose samples are given."""

    script: Sequence[Sample] = ()

    def write(self, *args: Any, **options: Any) -> list[Sample]:
        return list(self.script)


def session(m: MiniLLM, kind: type[Session] = Session, **models: Any) -> Any:
    made = kind(
        procedure=m,
        settings=Sampling(max_new_tokens=LENGTH, max_length=8),
        student=models.get("student"),  # type: ignore[arg-type]
        teacher=models.get("teacher"),
        tokenizer=SimpleNamespace(eos_token_id=END, pad_token_id=0),  # type: ignore[arg-type]
        vocab_size=VOCAB,
        place=Place(batch_size=10**6),
        kd_ratio=1.0,
    )
    made._stops = {END}
    return made


def given(count: int) -> dict[str, Any]:
    row = Example(input_ids=[PROMPT, 1], labels=[-100, 1])
    batch: dict[str, Any] = Collator(0)([row] * count)
    return batch


def found_gradient(
    m: MiniLLM, now: Tensor, teacher: Tensor, batch: dict[str, Any], ratio: float = 1.0
) -> Tensor:
    """What the procedure's own loss gives on a micro-batch, summed over tokens."""
    leaf = now.clone().requires_grad_()
    counts = torch.ones(len(Origin), dtype=torch.int64)
    out = m.loss(
        LossRows(
            student=leaf[batch["input_ids"]],
            teacher=teacher[batch["input_ids"]],
            labels=batch["shift_labels"],
            origins=batch[ROLLOUT]["origins"],
            values=batch[ROLLOUT]["values"],
            objective=KDObjective(get_loss("reverse_kl"), ratio),
            step_tokens=counts.sum(),
            origin_tokens=counts,
        )
    )
    return torch.autograd.grad(out.loss, leaf)[0]


def samples(old: Tensor, teacher: Tensor, m: MiniLLM, batch: Sequence[Answer]) -> list[Sample]:
    q, p, mixed = old.log_softmax(-1), teacher.log_softmax(-1), mixture(old, teacher, m.teacher_mix)
    return [
        Sample(
            [PROMPT],
            list(y),
            Origin.STUDENT,
            {
                "drawn": along(mixed, y).tolist(),
                "student": along(q, y).tolist(),
                "teacher": along(p, y).tolist(),
            },
        )
        for y in batch
    ]


def scripted_gradient(
    m: MiniLLM, now: Tensor, old: Tensor, teacher: Tensor, batch: Sequence[Answer]
) -> Tensor:
    made = session(m, Scripted)
    made.script = samples(old, teacher, m, batch)
    (micro,) = m.batches([given(len(batch))], made)
    return found_gradient(m, now, teacher, micro)


def expectation(
    m: MiniLLM, old: Tensor, teacher: Tensor, gradient: Callable[[Sequence[Answer]], Tensor]
) -> Tensor:
    """The mean over all answers, each as likely as the mixture says it."""
    mixed = mixture(old, teacher, m.teacher_mix)
    listed = answers()
    chances = [along(mixed, y).sum().exp() for y in listed]
    assert float(sum(chances)) == pytest.approx(1.0)
    return sum(  # type: ignore[return-value]
        chance * gradient([y]) for chance, y in zip(chances, listed, strict=True)
    )


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_plain_with_product_weights_the_mean_is_the_gradient_of_reverse_kl(
    table: Callable[..., Any], share: float
) -> None:
    now, _, teacher = tables(table)
    m = MiniLLM(teacher_mix=share, **PLAIN)
    mean = expectation(m, now, teacher, lambda y: scripted_gradient(m, now, now, teacher, y))
    torch.testing.assert_close(mean, exact(now, teacher), rtol=0, atol=2e-6)


SWITCHED: list[dict[str, Any]] = [
    {"importance": "token"},
    {"gamma": 0.7},
    {"length_normalised": True},
    {"reward_clip": 0.5},
    {"clip": 0.2},
    {"importance": "token", "length_normalised": True, "reward_clip": 1.0, "clip": 0.2},
]


@pytest.mark.parametrize("moved", [False, True], ids=["fresh", "reused"])
@pytest.mark.parametrize("options", SWITCHED, ids=lambda options: "+".join(options))
def test_each_term_has_the_enumerated_expectation_of_its_estimator(
    table: Callable[..., Any], options: dict[str, Any], moved: bool
) -> None:
    now, other, teacher = tables(table)
    old = other if moved else now
    m = MiniLLM(teacher_mix=0.2, **{**PLAIN, **options})
    expected = expectation(m, old, teacher, lambda y: oracle(now, old, teacher, m, y))
    mean = expectation(m, old, teacher, lambda y: scripted_gradient(m, now, old, teacher, y))
    torch.testing.assert_close(mean, expected, rtol=0, atol=2e-6)
    off = MiniLLM(teacher_mix=0.2, **PLAIN)
    without = expectation(off, old, teacher, lambda y: oracle(now, old, teacher, off, y))
    assert (expected - without).abs().max() > 1e-3  # the option does something


def test_whitening_takes_mean_and_spread_of_the_micro_batch(table: Callable[..., Any]) -> None:
    now, _, teacher = tables(table)
    m = MiniLLM(teacher_mix=0.2, **{**PLAIN, "whiten": True})
    pairs = list(itertools.combinations_with_replacement(answers(), 2))
    for pair in pairs[::9]:  # equal for each batch, so equal in the mean
        found = scripted_gradient(m, now, now, teacher, pair)
        torch.testing.assert_close(found, oracle(now, now, teacher, m, pair), rtol=0, atol=2e-5)


@pytest.mark.parametrize("options", [{}, SWITCHED[-1]], ids=["plain", "all"])
def test_sampled_answers_have_the_same_mean_within_monte_carlo_error(
    table: Callable[..., Any], options: dict[str, Any]
) -> None:
    now, _, teacher = tables(table)
    count = 6000
    m = MiniLLM(teacher_mix=0.2, **{**PLAIN, **options})
    models = {"student": table(0), "teacher": table(1)}
    models["student"].logits.data, models["teacher"].logits.data = now, teacher
    made = session(m, **models)
    (micro,) = m.batches([given(count)], made)
    assert made.counts.empty_generations == 0
    mean = found_gradient(m, now, teacher, micro) / count
    expected = expectation(m, now, teacher, lambda y: oracle(now, now, teacher, m, y))
    square = expectation(m, now, teacher, lambda y: oracle(now, now, teacher, m, y) ** 2)
    error = ((square - expected**2).clamp_min(0) / count).sqrt()
    assert ((mean - expected).abs() <= 4.5 * error + 1e-6).all()
    if not options:
        torch.testing.assert_close(expected, exact(now, teacher))


def test_cross_entropy_on_the_data_is_the_rest_of_the_objective(table: Callable[..., Any]) -> None:
    now, _, teacher = tables(table)
    m = MiniLLM(teacher_mix=0.2)
    made = session(m, Scripted)
    made.script = samples(now, teacher, m, [(1, 2, END)])
    made.kd_ratio = 0.25
    (micro,) = m.batches([given(1)], made)
    assert micro[ROLLOUT]["origins"] == (Origin.DATA, Origin.STUDENT)
    found = found_gradient(m, now, teacher, micro, ratio=0.25)
    leaf = now.clone().requires_grad_()
    (language,) = torch.autograd.grad(-leaf.log_softmax(-1)[PROMPT, 1], leaf)
    sampled = oracle(now, now, teacher, m, [(1, 2, END)])
    torch.testing.assert_close(found, 0.75 * language + 0.25 * sampled, rtol=0, atol=1e-6)


def test_plain_text_takes_the_place_of_the_data() -> None:
    made = session(MiniLLM(), Scripted)
    numbers = {"drawn": [-1.0], "student": [-1.0], "teacher": [-1.0]}
    made.script = [Sample([PROMPT], [1], Origin.STUDENT, numbers)] * 2
    made.kd_ratio = 0.5
    made.text = [Example(input_ids=[1, 2, n], labels=[1, 2, n]) for n in range(50)]
    seen = set()
    for step in range(8):
        made.step = step
        (micro,) = MiniLLM().batches([given(2)], made)
        assert micro[ROLLOUT]["origins"] == (0, 0, 1, 1)
        assert micro["labels"][:2, :2].tolist() == [[1, 2]] * 2
        seen.update(micro["labels"][:2, 2].tolist())
    assert len(seen) > 8


def test_samples_serve_as_many_steps_as_asked() -> None:
    m = MiniLLM(reuse=3)
    made = session(m, Scripted)
    told = []
    for step in range(6):
        made.step = step
        value = math.log(0.5 + 0.05 * step)
        numbers = {"drawn": [value], "student": [value], "teacher": [value]}
        made.script = [Sample([PROMPT], [1], Origin.STUDENT, numbers)]
        (micro,) = m.batches([given(1)], made)
        told.append(micro[ROLLOUT]["values"]["old"][0, 0].item())
    assert told == pytest.approx([math.log(0.5)] * 3 + [math.log(0.65)] * 3)
