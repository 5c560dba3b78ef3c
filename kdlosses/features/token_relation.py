"""Relation between the tokens of a sequence."""

from torch import Tensor
from torch.nn.functional import normalize

from kdlosses.hidden_loss import RelationLoss


class TokenRelation(RelationLoss):
    """Similarity-preserving relation, sum_j (cos(t_i, t_j) - cos(s_i, s_j))^2 / n for token i.

    t_i are the teacher's states of the n selected tokens of a sequence, s_i the student's. The mean
    over i is the squared Frobenius norm of the difference of two similarity matrices, divided by
    n^2. Different widths need no projector. The matrices have cosines, not inner products divided
    by the norms of rows as in the first reference: some tokens, often the first, have states
    hundreds of times larger than others, and would determine every row.

    Not suited to short answers: a sequence with one selected token has the value 0. Memory grows
    with the square of the selected tokens of a sequence, about 20 n^2 bytes.

    References: Tung and Mori 2019, arXiv:1907.09682; Liu et al. 2019, arXiv:1903.04197 (cosines).
    """

    equal_widths = False
    scale_invariant = True

    def sequence(self, teacher_hidden: Tensor, student_hidden: Tensor) -> Tensor:
        """Return the mean square of a token's row of differences."""
        return (_cosines(teacher_hidden) - _cosines(student_hidden)).square().mean(-1)


def _cosines(states: Tensor) -> Tensor:
    directions = normalize(states, dim=-1)
    return directions @ directions.mT
