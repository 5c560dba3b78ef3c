"""A served teacher that reads its own prompts, against the live model on its own text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pretend import Pretend
from runs import TOP_K, command, start, steps
from test_correct import K, opened

from kdlosses import Projected, TopK
from kdrun.data.collate import Collator
from kdrun.models.view import source_of
from kdrun.served.teacher import Ahead

SIDES = (("input_ids", "labels"), ("teacher_input_ids", "teacher_labels"))


def example(own: int, there: int, answers: list[list[int]]) -> dict[str, list[int]]:
    """Answers after prompts of two lengths."""
    found: dict[str, list[int]] = {}
    for (name, labels), length in zip(SIDES, (own, there), strict=True):
        ids: list[int] = []
        kept: list[int] = []
        for turn, answer in enumerate(answers):
            prompt = [20 + 7 * turn + place for place in range(length)]
            ids += [*prompt, *answer]
            kept += [-100] * length + answer
        found |= {name: ids, labels: kept}
    return found


EXAMPLES = [example(3, 9, [[70, 71], [72, 73, 74]]), example(8, 2, [[90, 91, 92]])]


@pytest.mark.parametrize("form", ["top_k", "states"])
def test_answers_are_at_the_students_positions(form: str, server: Pretend, tiny_pair: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_pair.teacher, dtype=torch.float64).eval()
    teacher = opened(server, tiny_pair, form)
    try:
        (batch,) = Ahead([Collator(0)(EXAMPLES)].__iter__(), teacher)  # type: ignore[arg-type]
        source = source_of(teacher, batch)
    finally:
        teacher.close()
    labels = batch["shift_labels"]
    for row, one in enumerate(EXAMPLES):
        with torch.no_grad():
            logits = model(torch.tensor([one["teacher_input_ids"]])).logits[0]
        before = [i - 1 for i, label in enumerate(one["teacher_labels"]) if label >= 0]
        here = labels[row] >= 0
        if isinstance(source, TopK):
            wanted = TopK.from_logits(logits[before], K)
            assert torch.equal(source.indices[row][here], wanted.indices)
            assert torch.allclose(source.log_probs[row][here].double(), wanted.log_probs, atol=1e-5)
        else:
            assert isinstance(source, Projected)
            found = source.hidden[row][here] @ source.weight.T
            assert torch.allclose(found.double(), logits[before], atol=1e-4)


def test_a_run_is_that_of_the_live_teacher(
    server: Pretend, tiny_pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--max-steps", 2, "--set", "data.teacher_template=think: {prompt} the answer {answer}"]
    more += ["--set", "data.teacher_max_length=200"]
    of_states = [*more, "--set", "served.form=states", "--set", f"served.folder={server.states}"]
    losses = []
    for name, address, given in (
        ("live", str(tiny_pair.teacher), more),
        ("states", server.address, of_states),
        ("top-k", server.address, [*more, *TOP_K]),
    ):
        folder = tmp_path / name
        code, said = command(capsys, *start(tiny_pair, address, folder, *given))
        assert code == 0, said
        losses.append([line["kd_loss"] for line in steps(folder) if "kd_loss" in line])
    live, states, top_k = losses
    assert states == pytest.approx(live, rel=1e-4)
    assert all(0 < part < whole for part, whole in zip(top_k, live, strict=True))
