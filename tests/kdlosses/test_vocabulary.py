"""The term of one token: its value, and its hand-written gradient by finite differences."""

import pytest
import torch

from kdlosses.vocabulary import WHOLE

TERMS = [[0.5, -1.0, 2.0], [3.0, 4.0, -7.0], [1.0, 0.0, 8.0], [2.0, 6.0, 9.0]]


def test_the_term_of_a_token_and_nothing_for_one_that_another_process_has():
    terms = torch.tensor(TERMS, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([2, 0, -1, 3])
    assert WHOLE.pick(terms, tokens).tolist() == [2.0, 3.0, 0.0, 0.0]
    assert torch.autograd.gradcheck(WHOLE.pick, (terms, tokens))
    assert torch.autograd.gradgradcheck(WHOLE.pick, (terms, tokens))


@pytest.mark.parametrize("infinite", [float("inf"), float("-inf")])
def test_infinite_terms_of_other_tokens_touch_neither_value_nor_gradient(infinite):
    terms = torch.tensor([[infinite, 1.5, infinite]], requires_grad=True)
    picked = WHOLE.pick(terms, torch.tensor([1]))
    picked.sum().backward()
    assert picked.tolist() == [1.5]
    assert terms.grad is not None
    assert terms.grad.tolist() == [[0.0, 1.0, 0.0]]
