"""Calibration of a student, against a loop over bins in float64."""

import pytest
import torch
from draws import Draws

from kdlosses import calibration_error, get_loss, measure

BINS = 15


def expected_error(probs, labels):
    """Guo et al. 2017, equation 3, row by row."""
    confidence, correct = probs.max(-1), probs.argmax(-1) == labels
    error = 0.0
    for b in range(BINS):
        inside = (confidence > b / BINS) & (confidence <= (b + 1) / BINS)
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return error


@pytest.mark.parametrize("name", ["forward_kl", "forward_kl_chunked"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_error_is_that_of_the_paper_over_several_batches(name, compiled):
    draws = Draws(0)
    loss = get_loss(name, chunk_size=7) if name.endswith("chunked") else get_loss(name)
    total = torch.zeros(3, BINS, dtype=torch.float64)
    probs, labels = [], []
    for scale in (0.5, 2.0, 6.0):
        logits = draws.normal(40, 9) * scale
        target = draws.integers(9, 40)
        target[::3] = logits[::3].argmax(-1)
        target[::7] = -100
        found = measure(loss, logits, None, target, compiled=compiled)
        total += found.calibration
        kept = target != -100
        probs.append(logits[kept].double().softmax(-1))
        labels.append(target[kept])
        assert found.calibration[0].sum() == found.num_tokens
    expected = expected_error(torch.cat(probs).cpu().numpy(), torch.cat(labels).cpu().numpy())
    assert expected > 0.05
    assert calibration_error(total).item() == pytest.approx(expected, abs=1e-6)


def test_certain_and_right_is_calibrated_certain_and_wrong_is_not():
    logits = torch.full((4, 3), -1e4)
    logits[:, 1] = 0.0
    loss = get_loss("forward_kl")
    right = measure(loss, logits, None, torch.ones(4, dtype=torch.int64))
    wrong = measure(loss, logits, None, torch.zeros(4, dtype=torch.int64))
    assert calibration_error(right.calibration) == 0
    assert calibration_error(wrong.calibration) == 1
    assert right.calibration[:, -1].tolist() == [4, 4, 4]


def test_the_base_rate_is_calibrated():
    logits = torch.tensor([0.75, 0.25]).log().expand(400, 2)
    labels = (torch.arange(400) % 4 == 0).long()
    found = measure(get_loss("forward_kl"), logits, None, labels)
    assert calibration_error(found.calibration).item() == pytest.approx(0, abs=1e-7)


def test_no_tokens_have_no_error():
    found = measure(get_loss("forward_kl"), torch.randn(3, 4), None, torch.full((3,), -100))
    assert calibration_error(found.calibration).isnan()
