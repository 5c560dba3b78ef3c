"""Losses on hidden states: values by hand, layer maps, specs, chunks, projectors, plugins."""

import numpy as np
import pytest
import torch

from kdlosses import (
    BrokenFeatureError,
    FeatureLoss,
    FeatureSpecError,
    FeatureTerm,
    Hidden,
    available_features,
    build_feature,
    feature_files,
    get_features,
    ignored_features,
    layer_pairs,
    parse_features,
    state_variable,
)
from kdlosses.feature_registry import FeatureSpec
from kdlosses.testing import (
    ConformanceError,
    check_feature,
    parametrize_with_feature_checks,
    report_feature_checks,
    run_feature_checks,
)

BUILT_IN = ("hidden_cosine", "hidden_mse", "hidden_mse:scale=teacher", "token_relation")
T = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
S = torch.tensor([[4.0, 3.0], [5.0, 0.0], [2.0, 2.0]], dtype=torch.float64)

SMOOTH = """
from pydantic import Field
from kdlosses import FeatureLoss

class Smooth(FeatureLoss):
    '''Mean absolute difference to a power, sum_i |t_i - s_i|^p / H.

    Reference: none, a test.
    '''

    power: float = Field(2.0, gt=1, description="p")

    def row(self, teacher_hidden, student_hidden):
        return ((teacher_hidden - student_hidden).abs() ** self.power).mean(-1)
"""


# Values.


def test_values_by_hand():
    # Cosines: 24 / 25, 0, 1.
    cosine = build_feature("hidden_cosine").row(T, S)
    assert cosine.tolist() == pytest.approx([0.04, 1.0, 0.0], abs=1e-12)
    each = build_feature("hidden_mse").row(T, S)
    assert each.tolist() == pytest.approx([0.08, 2.0, 0.0], abs=1e-5)
    # Mean squares of the teacher: 12.5, 2, 1; of the differences: 1, 14.5, 1.
    of_teacher = build_feature("hidden_mse:scale=teacher").row(T, S)
    assert of_teacher.tolist() == pytest.approx([0.08, 7.25, 1.0], abs=1e-5)


def test_relation_by_hand():
    # Between tokens 0 and 1: teacher 0.8, student 0.8; 0 and 2: both 7 / (5 sqrt 2); 1 and 2: both
    # 1 / sqrt 2, so turning the student's second token round is what differs.
    turned = S * torch.tensor([[1.0], [-1.0], [1.0]])
    relation = build_feature("token_relation")
    assert relation.sequence(T, S).tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-12)
    found = relation.sequence(T, turned)
    one, two = (2 * 0.8) ** 2 / 3, (2 / 2**0.5) ** 2 / 3
    assert found.tolist() == pytest.approx([one, one + two, two], abs=1e-9)
    matrix = np.array([[0, 1.6, 0], [1.6, 0, 2**0.5], [0, 2**0.5, 0]])
    assert found.mean().item() == pytest.approx((matrix**2).sum() / 9)


def test_the_term_is_a_mean_over_pairs_and_supervised_tokens():
    term = get_features("hidden_cosine:layers=1-1,2-2,weight=0.5", Hidden(2, 2), Hidden(2, 2))
    weighted, mean = term([T, S], [S, S], num_tokens=6)
    assert mean.item() == pytest.approx(1.04 / 6 / 2)
    assert weighted.item() == pytest.approx(0.5 * 1.04 / 6 / 2)


@pytest.mark.parametrize("spec", BUILT_IN)
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 100, None])
def test_neither_chunks_nor_micro_batches_change_gradients(spec, chunk_size):
    """The oracle: a loop over pairs and tokens or sequences, with autograd."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    teacher, student = draw(2, 7, 5), draw(2, 7, 4)
    lengths = [3, 1, 3]
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    term = get_features(
        spec + (":" if ":" not in spec else ",") + "layers=1-1,3-2,weight=0.7",
        Hidden(3, 5),
        Hidden(2, 4),
        seed=2,
        chunk_size=chunk_size,
    ).double()
    leaf = student.clone().requires_grad_()
    weights = [weight.detach().clone().requires_grad_() for weight in term.parameters()]
    assert len(weights) == (0 if spec == "token_relation" else 2)
    total = 0
    loss = build_feature(spec)
    for pair in range(2):
        states = leaf[pair] if not weights else leaf[pair] @ weights[pair].T
        for number, length in enumerate(lengths):
            t, s = teacher[pair][ids == number], states[ids == number]
            assert len(t) == length
            if isinstance(loss, FeatureLoss):
                total = total + sum(loss.row(t[i], s[i]) for i in range(length))
            else:
                total = total + loss.sequence(t, s).sum()
    expected = torch.autograd.grad(0.7 * total / 2 / 11, [leaf, *weights])
    other = student.clone().requires_grad_()
    for part in (slice(0, 4), slice(4, 7)):  # two micro-batches
        term(teacher[:, part], other[:, part], 11, ids[part])[0].backward()
    for found, wanted in zip(
        [other.grad, *(weight.grad for weight in term.parameters())], expected, strict=True
    ):
        assert (found - wanted).abs().max() < 1e-12


def test_no_tokens_give_zero_and_stay_connected():
    term = get_features("hidden_cosine", Hidden(2, 3), Hidden(2, 2))
    student = torch.ones(5, 2, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    weighted, mean = term([torch.zeros(0, 3)] * 2, [student[none]] * 2, 0, none)
    weighted.backward()
    assert mean.item() == weighted.item() == 0
    assert not student.grad.any()
    assert all(not weight.grad.any() for weight in term.parameters())


def test_the_incoming_gradient_scales_and_the_teacher_gets_none():
    term = get_features("hidden_mse:layers=last", Hidden(1, 2), Hidden(1, 2), chunk_size=2)
    found = []
    for factor in (1.0, 3.0):
        teacher, student = T.clone().requires_grad_(), S.clone().requires_grad_()
        (factor * term([teacher], [student], 3)[0]).backward()
        assert teacher.grad is None
        found.append(student.grad)
    assert torch.allclose(found[1], 3 * found[0], rtol=1e-12)
    assert found[0].any()


def test_half_precision_states_are_compared_in_float32():
    term = get_features("hidden_cosine:layers=last", Hidden(1, 64), Hidden(1, 64), chunk_size=7)
    generator = torch.Generator().manual_seed(0)
    for kind in (torch.bfloat16, torch.float16):
        teacher, student = torch.randn(2, 20, 64, generator=generator).to(kind)
        student.requires_grad_()
        weighted, mean = term([teacher], [student], 10**6)
        exact = term([teacher.double()], [student.detach().double()], 10**6)[1]
        assert mean.dtype == torch.float32
        assert mean.item() == pytest.approx(exact.item(), rel=1e-5)
        (weighted * 1e6).backward()  # as a scaler of fp16 does, before which nothing is lost
        whole = student.detach().double().requires_grad_()
        (term([teacher.double()], [whole], 10**6)[0] * 1e6).backward()
        assert student.grad.dtype == kind
        assert (student.grad - whole.grad).abs().max() < 1e-2 * whole.grad.abs().max()


def peak_of(pairs):
    """Peak bytes of values and gradients beyond what goes in, for a number of pairs of layers."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
                self.largest = max(self.largest, result.untyped_storage().nbytes())
            return result

    layers = ",".join(f"{n}-{n}" for n in range(1, pairs + 1))
    term = get_features(f"hidden_cosine:layers={layers}", Hidden(9, 8), Hidden(9, 8), chunk_size=4)
    states = [torch.ones(400, 8, dtype=torch.bfloat16) for _ in range(pairs)]
    with Largest() as seen:
        term(states, [s.clone().requires_grad_() for s in states], 400)[0].backward()
    return seen.largest


def test_no_float32_tensor_is_larger_than_a_chunk():
    assert peak_of(1) == peak_of(8) <= 4 * 8 * 4


@parametrize_with_feature_checks(BUILT_IN)
def test_built_in_losses_conform(loss, check):
    check(loss)


# Projectors.


def test_projectors_are_float32_and_the_same_for_a_seed():
    make = lambda seed: get_features("hidden_mse", Hidden(4, 6), Hidden(2, 5), seed=seed)  # noqa: E731
    one, two, other = make(1), make(1), make(2)
    assert [weight.shape for weight in one.parameters()] == [(6, 5)] * 2
    assert all(weight.dtype == torch.float32 for weight in one.parameters())
    for first, second, third in zip(*(m.parameters() for m in (one, two, other)), strict=True):
        assert torch.equal(first, second)
        assert not torch.equal(first, third)
    assert not torch.equal(*one.parameters())
    assert not list(get_features("token_relation", Hidden(4, 6), Hidden(2, 5)).parameters())
    assert not list(get_features("hidden_mse", Hidden(4, 5), Hidden(2, 5)).parameters())


# Layer maps.


@pytest.mark.parametrize(
    ("text", "teacher", "student", "pairs"),
    [
        ("last", 30, 10, ((30, 10),)),
        ("uniform", 12, 4, ((3, 1), (6, 2), (9, 3), (12, 4))),
        ("uniform", 5, 3, ((2, 1), (4, 2), (5, 3))),
        ("uniform", 2, 4, ((1, 1), (1, 2), (2, 3), (2, 4))),
        ("4-1,8-3", 8, 3, ((4, 1), (8, 3))),
    ],
)
def test_layer_pairs(text, teacher, student, pairs):
    assert layer_pairs(text, teacher, student) == pairs


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("4-9", "the student has 8 layers, not 9"),
        ("13-1", "the teacher has 12 layers, not 13"),
        ("0-1", "counted from 1"),
        ("1", "got '1'"),
        ("every", "expected uniform, last, or pairs"),
        ("1-1,1-1", "1-1 is given twice"),
        ("10-10", "the student has 8 layers, not 10"),
    ],
)
def test_layers_that_do_not_exist(text, said):
    with pytest.raises(ValueError, match=said):
        layer_pairs(text, 12, 8)


# Specs.


def test_specs():
    assert parse_features("hidden_mse") == FeatureSpec("hidden_mse", {})
    assert parse_features("a_b:layers=4-1, 8-3,weight=1e-1,c=2,tokens=all") == FeatureSpec(
        "a_b", {"c": "2"}, "4-1,8-3", 0.1, "all"
    )
    assert parse_features("a.py:B:weight=2") == FeatureSpec("a.py:B", {}, weight=2.0)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("hidden_cosin", "did you mean 'hidden_cosine'"),
        ("cosine", "did you mean 'hidden_cosine'"),
        ("Hidden", "expected hidden_cosine, hidden_cosine:layers=last"),
        ("hidden_cosine:weight=0", "weight=0: must be a number above 0"),
        ("hidden_cosine:weight=x", "weight=x: must be a number above 0"),
        ("hidden_cosine:weight=nan", "must be a number above 0"),
        ("hidden_cosine:weight=1,weight=2", "weight is given twice"),
        ("hidden_cosine:weight=1,8-3", "expected key=value after the colon, got '8-3'"),
        ("hidden_cosine:tokens=prompt", "expected supervised or all"),
        ("hidden_mse:scal=each", "no parameter 'scal', did you mean 'scale'"),
        ("missing.py:Loss", "there is no file missing.py"),
    ],
)
def test_wrong_specs_name_the_cure(spec, said):
    with pytest.raises(FeatureSpecError, match=said):
        build_feature(spec)


def test_state_is_refused_where_the_class_is_written():
    with pytest.raises(TypeError, match=r"Moving: a loss on hidden states has no state \(share\)"):

        class Moving(FeatureLoss):
            @state_variable
            def share(self):
                return 0.0

            def row(self, teacher_hidden, student_hidden):
                return (teacher_hidden - student_hidden).square().mean(-1)


def test_reserved_names_are_refused_where_the_class_is_written():
    with pytest.raises(TypeError, match=r"Odd\.layers: .* rename the parameter"):

        class Odd(FeatureLoss):
            layers: int = 1

            def row(self, teacher_hidden, student_hidden):
                return teacher_hidden


# Plugins.


def test_a_strangers_loss_works_by_name(install):
    install(
        "kdlosses-smooth",
        {"smooth": "smooth_features:Smooth"},
        "features",
        smooth_features=SMOOTH,
    )
    assert ("smooth", "kdlosses-smooth") in {(r.name, r.distribution) for r in available_features()}
    check_feature("smooth")
    term = get_features("smooth:power=3,layers=last", Hidden(2, 2), Hidden(2, 2), chunk_size=2)
    _, mean = term([T], [S], 3)
    assert mean.item() == pytest.approx((1 + (5**3 + 2**3) / 2 + 1) / 3)
    with pytest.raises(FeatureSpecError, match="power='1'"):
        build_feature("smooth:power=1")


def test_a_built_in_name_is_not_replaced_and_a_broken_plugin_harms_no_other(install):
    install("odd", {"hidden_mse": "no_such:Thing", "gone": "no_such:Thing"}, "features")
    assert [ref.distribution for ref in ignored_features()] == ["odd"]
    assert type(build_feature("hidden_mse")).__name__ == "HiddenMSE"
    with pytest.raises(BrokenFeatureError, match="of distribution 'odd'"):
        build_feature("gone")


def test_a_loss_of_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(SMOOTH, encoding="utf-8")
    spec = f"{file}:Smooth:power=4,layers=1-2"
    assert build_feature(spec).power == 4
    assert set(feature_files(spec)) == {str(file)}
    assert feature_files("hidden_mse") == {}
    with pytest.raises(FeatureSpecError, match="has no class 'Smoth', did you mean 'Smooth'"):
        build_feature(f"{file}:Smoth")


# The conformance checks find what they are for.


class Detached(FeatureLoss):
    """Detached, (t - s)^2."""

    def row(self, teacher_hidden, student_hidden):
        return (teacher_hidden - student_hidden).square().detach().mean(-1) + (
            student_hidden.sum(-1) * 0
        )


class Mixing(FeatureLoss):
    """Mixing, (t - s)^2 over the batch."""

    def row(self, teacher_hidden, student_hidden):
        gap = (teacher_hidden - student_hidden).square().mean(-1)
        return gap / (gap.mean() + 1)


class Negative(FeatureLoss):
    """Negative, sum t s."""

    scale_invariant = True

    def row(self, teacher_hidden, student_hidden):
        return (teacher_hidden * student_hidden).sum(-1)


class Unsafe(FeatureLoss):
    """Unsafe, |t - s|."""

    def row(self, teacher_hidden, student_hidden):
        return (teacher_hidden - student_hidden).norm(dim=-1).div(student_hidden.norm(dim=-1))


@pytest.mark.parametrize(
    ("loss", "failing"),
    [
        (Detached, {"finite_differences", "docstring"}),
        (Mixing, {"rows_are_independent", "chunks"}),
        (Negative, {"zero_at_equality", "nonnegative", "scale_invariant"}),
        (Unsafe, {"extremes"}),
    ],
)
def test_wrong_losses_fail(loss, failing):
    failed = {result.name for result in run_feature_checks(loss) if result.verdict == "failed"}
    assert failing <= failed
    with pytest.raises(ConformanceError):
        check_feature(loss)
    assert report_feature_checks(loss)["verdict"] == "failed"


def test_the_term_says_what_is_wrong_with_its_input():
    term = FeatureTerm(build_feature("token_relation"), Hidden(2, 2), Hidden(2, 2), layers="last")
    with pytest.raises(ValueError, match="sequences: required by a relation"):
        term([T], [S], 3)
    with pytest.raises(ValueError, match="teacher and student have 3 and 2 tokens"):
        term([T], [S[:2]], 3, torch.zeros(3))
    with pytest.raises(ValueError, match="expected states of 1 pairs"):
        term([T, T], [S], 3)
