"""The compiled tile: the same numbers as eager, one graph for all chunks, and its fallback."""

import math
import os
import subprocess
import sys

import pytest
import torch
from draws import Draws
from oracles import NAMES
from pydantic import Field

from kdlosses import Divergence, KDObjective, Projected, TokenLoss, get_loss, measure
from kdlosses.engine import Chunking

VOCAB = 61

pytestmark = pytest.mark.slow


@pytest.fixture
def graphs():
    """Counts the graphs that the compiler makes from here on."""
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    return lambda: counters["stats"]["unique_graphs"] - before


def problem(rows, *, bias=True):
    draws = Draws(rows)
    random = draws.normal
    offset = random(VOCAB).requires_grad_() if bias else None
    student = Projected(random(rows, 5).requires_grad_(), random(VOCAB, 5).requires_grad_(), offset)
    labels = draws.integers(VOCAB, rows)
    return student, random(rows, VOCAB), labels


def evaluate(objective, student, teacher, labels):
    out = objective(student, teacher, labels)
    return [
        out.loss,
        out.class_loss,
        out.kd_loss,
        *torch.autograd.grad(out.loss, student.tensors),
    ]


def assert_same(compiled, eager, rounding=1e-6):
    for a, b in zip(compiled, eager, strict=True):
        scale = b.abs().max().item()
        atol = rounding * scale if math.isfinite(scale) else 0.0
        torch.testing.assert_close(a, b, rtol=2e-6, atol=atol)


def pair(name, **options):
    """The loss compiled and eager."""
    return [get_loss(f"{name}_chunked", compiled=compiled, **options) for compiled in (True, False)]


def pair_of(loss, size):
    """An unregistered loss compiled and eager."""
    return [TokenLoss(loss, chunking=Chunking(size, compiled)) for compiled in (True, False)]


@pytest.mark.parametrize("name", NAMES)
def test_compiled_equals_eager_in_one_graph(name, graphs):
    # The mean of amid is normalised, which rounds once more.
    rounding = 3e-6 if name == "amid" else 1e-6
    compiled, eager = (KDObjective(x, 0.3) for x in pair(name, chunk_size=4, temperature=1.7))
    # Chunks of 4, 4, 3; of 4, 1; of 2; of 1: one graph for all of them.
    for rows in (11, 5, 2, 1):
        inputs = problem(rows)
        assert_same(evaluate(compiled, *inputs), evaluate(eager, *inputs), rounding)
    assert graphs() == 1
    # Neither a weight nor a temperature that changes makes another one.
    for kd_ratio, temperature in [(0.7, 1.7), (0.9, 2.5), (1.0, 0.5)]:
        for objective in (compiled, eager):
            objective.kd_ratio, objective.loss.temperature = kd_ratio, temperature
        inputs = problem(7)
        assert_same(evaluate(compiled, *inputs), evaluate(eager, *inputs), rounding)
    # Nor do impossible tokens, on one side or both, whose gradients stay finite.
    student, teacher, labels = problem(6)
    with torch.no_grad():
        student.bias[:9] = -torch.inf
    teacher[:, 5:12] = -torch.inf
    values = [evaluate(objective, student, teacher, labels) for objective in (compiled, eager)]
    assert_same(*values, rounding)
    assert all(gradient.isfinite().all() for gradient in values[0][3:])
    assert graphs() == 1


def test_other_forms_compiled():
    """Unreduced values, weights that need gradients, the plain logits form, and measures."""
    compiled, eager = pair("total_variation", chunk_size=4)
    student, teacher, labels = problem(6)
    weights = torch.rand(6, requires_grad=True)
    for source in (student, torch.randn(6, VOCAB, requires_grad=True)):
        leaves = [*(source.tensors if isinstance(source, Projected) else [source]), weights]
        for reduction in ("mean", "none"):
            results = []
            for loss in (compiled, eager):
                value = loss(source, teacher, labels, token_weights=weights, reduction=reduction)
                results.append([value, *torch.autograd.grad(value.sum(), leaves)])
            assert_same(*results)
    a, b = (measure(eager, student, teacher, labels, compiled=x) for x in (True, False))
    for name in ("cross_entropy", "kd", "forward_kl", "reverse_kl", "top1_agreement"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=2e-6, atol=1e-6)


class Power(Divergence):
    """sum |p - q|^exponent."""

    exponent: float = Field(1.5, gt=0)

    def integrand(self, teacher_log_probs, student_log_probs):
        p, q = teacher_log_probs.exp(), student_log_probs.exp()
        return ((p - q) ** 2 + 1e-9) ** (self.exponent / 2)


def test_more_losses_than_the_recompile_limit(graphs):
    student, teacher, labels = problem(5)
    with torch._dynamo.config.patch(recompile_limit=2):
        for count in range(1, 5):
            results = []
            for loss in pair_of(Power(exponent=1 + count / 100), 5):
                results.append(evaluate(KDObjective(loss, 0.5), student, teacher, labels))
            assert_same(*results)  # a fallback would warn, and warnings are errors here
            assert graphs() == count


class Untraceable(Power):
    """Decides by a value, which no graph can hold."""

    def integrand(self, teacher_log_probs, student_log_probs):
        terms = super().integrand(teacher_log_probs, student_log_probs)
        return terms if float(teacher_log_probs.detach().sum()) < 0 else terms * 0


def test_an_integrand_that_cannot_be_traced_runs_eagerly_and_warns_once():
    compiled, eager = pair_of(Untraceable(), 2)
    inputs = problem(5)
    with pytest.warns(RuntimeWarning, match="runs eagerly") as caught:
        first = evaluate(KDObjective(compiled, 0.5), *inputs)
    assert len(caught) == 1
    assert_same(first, evaluate(KDObjective(eager, 0.5), *inputs))
    second = evaluate(KDObjective(compiled, 0.5), *inputs)  # no second warning: it would raise
    assert_same(second, first)


class Faulty(Power):
    """Fails whichever way it runs."""

    def integrand(self, teacher_log_probs, student_log_probs):
        return teacher_log_probs[..., :2] + student_log_probs[..., :3]


@pytest.mark.filterwarnings("ignore:torch.compile is not usable")
def test_an_authors_error_is_not_hidden_by_the_compiler():
    compiled = pair_of(Faulty(), 2)[0]
    with pytest.raises(RuntimeError, match="size of tensor"):
        compiled(*problem(5))


WITHOUT_COMPILER = """
import warnings, torch
from kdlosses import get_loss
torch.manual_seed(0)
student, teacher = torch.randn(2, 6, 61)
student.requires_grad_()
labels = torch.zeros(6, dtype=torch.int64)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name in ("forward_kl", "reverse_kl"):
        for _ in range(2):
            results = []
            for compiled in (True, False):
                loss = get_loss(name + "_chunked", chunk_size=4, compiled=compiled)
                value = loss(student, teacher, labels)
                results.append((value, *torch.autograd.grad(value, student)))
            for a, b in zip(*results):
                assert torch.equal(a, b)
caught = [x for x in caught if issubclass(x.category, RuntimeWarning)]
assert len(caught) == 1, [str(x.message) for x in caught]
print(caught[0].message)
"""


def test_without_a_compiler_it_runs_eagerly_and_warns_once(tmp_path):
    environment = os.environ | {
        "CXX": str(tmp_path / "nonexistent"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "torch.compile is not usable here" in result.stdout
    assert "nonexistent" in result.stdout or "compiler" in result.stdout.lower()


def test_a_strict_warning_filter_does_not_disturb_the_compiler(tmp_path):
    code = (
        "import torch, kdlosses\n"
        "loss = kdlosses.get_loss('total_variation_chunked', compiled=True)\n"
        "print(loss(torch.randn(3, 61), torch.randn(3, 61), torch.zeros(3, dtype=torch.int64)))"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_small_vocabularies_are_not_compiled_by_default(graphs):
    student, teacher, labels = problem(3)
    get_loss("forward_kl_chunked")(student, teacher, labels)
    assert graphs() == 0


def exponentials(name, hidden, **parameters):
    """A graph of a tile's operators, whose exponentials are counted before and after the pass.

    Half of the logits of either side may be -inf.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    from kdlosses.engine.reuse import ReuseExponentials
    from kdlosses.engine.rows import Program, row_gradients
    from kdlosses.registry import load_loss

    draws = Draws(5)
    raw, teacher = (3 * draws.normal(4, VOCAB) for _ in range(2))
    raw[:, :hidden] = -math.inf
    teacher[:, :hidden] = -math.inf
    labels = torch.tensor([VOCAB - 1, 40, 41, 42])
    weights = torch.full((4, 1), 0.3), torch.full((4,), 0.7)
    arguments = raw, (teacher,), labels, (torch.tensor(1.0),), *weights
    program = Program((load_loss(name)(**parameters),), ((),))

    def tile(*given):
        return row_gradients(program, False, *given)

    def count():
        return len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.exp.default))

    graph = make_fx(tile, tracing_mode="fake")(*arguments)
    before = count()
    ReuseExponentials()(graph.graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    exact = [x.double() if x.is_floating_point() else x for x in (raw, teacher, labels)]
    exact = exact[0], (exact[1],), exact[2], (torch.tensor(1.0),), *(w.double() for w in weights)
    return before, count(), graph(*arguments), tile(*exact)


@pytest.mark.cpu
@pytest.mark.parametrize("hidden", [0, 30])
@pytest.mark.parametrize(
    "name", ["forward_kl", "symmetric_kl", "generalized_jsd", "taid", "hellinger", "alpha_beta"]
)
def test_probabilities_reuse_the_exponentials_that_normalised_them(name, hidden):
    before, after, found, exact = exponentials(name, hidden)
    # One for each side's normalisation; TAID's teacher is normalised anew.
    assert before >= 4
    assert after == (3 if name == "taid" else 2)
    for mine, true in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-7)


@pytest.mark.cpu
def test_an_exponential_of_something_else_stays():
    before, after, found, exact = exponentials("alpha_beta", 0, alpha=0.3)
    assert before == after > 2
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-5, atol=1e-7)


FAULTS = """
import resource, torch
from kdlosses.engine.plan import keep_freed_tiles
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tile = [torch.ones(16, 49152) for _ in range(4)]
    del tile
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
keep_freed_tiles()
print(sorted(faults() for _ in range(9))[4])
"""


@pytest.mark.cpu
@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of Linux is meant")
def test_a_tile_finds_the_memory_of_the_tile_before():
    """Without, about half of all processes fault 3,000 pages in for each tile: six are tried."""
    for _ in range(6):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < 100
