"""Names, specs, and distributions that register losses, good and broken."""

import json
import subprocess
import sys

import pytest

from kdlosses import (
    BrokenLossError,
    Divergence,
    LossSpecError,
    available_losses,
    get_loss,
    ignored_losses,
)
from kdlosses.registry import LossSpec, TermSpec, parse_spec

LOSS = """
from pydantic import Field
from kdlosses import Divergence

class Triangular(Divergence):
    '''Triangular discrimination, sum (p - q)^2 / (p + q).'''

    power: float = Field(1.0, gt=0, description="of the terms")

    def integrand(self, teacher_log_probs, student_log_probs):
        p, q = teacher_log_probs.exp(), student_log_probs.exp()
        return ((p - q) ** 2 / (p + q).clamp_min(1e-30)) ** self.power
"""


# Specs.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("forward_kl", LossSpec((TermSpec("forward_kl", {}),), False)),
        ("forward_kl_chunked", LossSpec((TermSpec("forward_kl", {}),), True)),
        (" a_b:c=1 ", LossSpec((TermSpec("a_b", {"c": "1"}),), False)),
        ("a_chunked:c=1e-3, d = x", LossSpec((TermSpec("a", {"c": "1e-3", "d": "x"}),), True)),
        (
            "0.7*a_chunked + .3 * b_chunked:c=1e+3,d=+2+1e-1*c_chunked",
            LossSpec(
                (
                    TermSpec("a", {}, 0.7),
                    TermSpec("b", {"c": "1e+3", "d": "+2"}, 0.3),
                    TermSpec("c", {}, 0.1),
                ),
                True,
            ),
        ),
        ("a+b", LossSpec((TermSpec("a", {}), TermSpec("b", {})), False)),
    ],
)
def test_specs(text, expected):
    assert parse_spec(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "a:", "a:b", "a:b=", "a:=1", "a:b=1,", "a:b=1,,c=2", "A", "a-b", "1a"),
        *("_chunked", "a+", "+a", "a++b", "*a", "x*a", "0.5*", "0.5 a", "a*0.5", "1e*a"),
    ],
)
def test_malformed_specs(text):
    with pytest.raises(LossSpecError, match="expected"):
        parse_spec(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a_chunked+b+c_chunked+d", "mixed; write _chunked after b, d too"),
        ("0*a+b", "weight 0 must be above 0"),
        ("-1*a", "weight -1 must be above 0"),
        ("1e999*a", "must be above 0"),
    ],
)
def test_sums_without_meaning(text, message):
    with pytest.raises(LossSpecError, match=message):
        parse_spec(text)


def test_a_sum_that_names_a_loss_twice():
    with pytest.raises(LossSpecError, match="forward_kl is given twice; use one term"):
        get_loss("0.5*forward_kl+forward_kl")
    loss = get_loss("skew_forward_kl:alpha=0.1+skew_forward_kl:alpha=0.2")
    assert [term.name for term in loss.terms] == [
        "skew_forward_kl:alpha=0.1",
        "skew_forward_kl:alpha=0.2",
    ]
    with pytest.raises(ValueError, match="no single loss"):
        _ = loss.loss


def test_a_parameter_given_twice():
    with pytest.raises(LossSpecError, match="alpha is given twice"):
        get_loss("skew_forward_kl:alpha=0.1,alpha=0.2")


def test_parameters_reach_the_loss():
    assert get_loss("skew_forward_kl_chunked:alpha=0.25").loss.alpha == 0.25
    jsd = get_loss("generalized_jsd:beta=0.1,normalize=true").loss
    assert (jsd.beta, jsd.normalize) == (0.1, True)


def test_options_reach_the_module():
    loss = get_loss("forward_kl_chunked", chunk_size=7, temperature=2.0, vocab_size=5)
    assert "chunked" in repr(loss)
    assert (loss.chunking.size, loss.temperature, loss.vocab_size) == (7, 2.0, 5)
    assert get_loss("forward_kl").chunking is None


@pytest.mark.parametrize("options", [{"chunk_size": 8}, {"compiled": False}])
def test_chunk_options_with_an_unchunked_loss(options):
    with pytest.raises(LossSpecError, match=rf"{next(iter(options))}.*write forward_kl_chunked"):
        get_loss("forward_kl", **options)


@pytest.mark.parametrize("size", [0, -3])
def test_an_impossible_chunk_size(size):
    with pytest.raises(LossSpecError, match="chunk_size"):
        get_loss("forward_kl_chunked", chunk_size=size)


def test_an_impossible_vocabulary():
    with pytest.raises(ValueError, match="vocab_size"):
        get_loss("forward_kl", vocab_size=0)


@pytest.mark.parametrize("name", ["foward_kl", "foward_kl_chunked", "forwardkl", "forward_kll"])
def test_an_unknown_loss_is_told_its_neighbour(name):
    with pytest.raises(LossSpecError, match=r"unknown loss .* did you mean 'forward_kl'\?"):
        get_loss(name)


def test_an_unknown_loss_like_no_other():
    with pytest.raises(LossSpecError, match="unknown loss 'zzz'; "):
        get_loss("zzz")


def test_an_unknown_parameter():
    with pytest.raises(LossSpecError, match=r"no parameter 'alhpa', did you mean 'alpha'\?; it"):
        get_loss("skew_forward_kl:alhpa=0.1")
    with pytest.raises(LossSpecError, match="takes no parameters"):
        get_loss("forward_kl:alpha=0.1")


def test_a_parameter_out_of_bounds():
    with pytest.raises(LossSpecError, match=r"skew_forward_kl.*alpha='2'.*less than 1"):
        get_loss("skew_forward_kl_chunked:alpha=2")


# Distributions.


def test_listing_names_the_distribution_and_no_twins():
    refs = available_losses()
    assert list(refs) == sorted(refs, key=lambda ref: (ref.name, ref.distribution))
    assert not any(ref.name.endswith("_chunked") for ref in refs)
    forward = next(ref for ref in refs if ref.name == "forward_kl")
    assert forward.distribution == "kdlosses"
    assert forward.module == "kdlosses.losses.forward_kl:ForwardKL"


def test_listing_imports_no_loss_and_no_torch():
    code = (
        "import sys, json, kdlosses; refs = kdlosses.available_losses(); assert refs;"
        "kdlosses.registry.parse_spec('forward_kl');"
        "print(json.dumps(sorted(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    modules = json.loads(result.stdout)
    assert "kdlosses.registry" in modules
    assert not [
        name for name in modules if name.split(".")[0] in {"torch", "pydantic", "transformers"}
    ]
    assert not [name for name in modules if name.startswith("kdlosses.losses")]


def test_a_plugin_comes_in_by_the_same_door(install):
    install("shapes", {"triangular": "shapes_loss:Triangular"}, shapes_loss=LOSS)
    listed = {ref.name: ref for ref in available_losses()}
    assert listed["triangular"].distribution == "shapes"
    assert "shapes_loss" not in sys.modules
    loss = get_loss("triangular_chunked:power=2", chunk_size=4)
    assert isinstance(loss.loss, Divergence)
    assert loss.loss.power == 2
    with pytest.raises(LossSpecError, match=r"power='0'"):
        get_loss("triangular:power=0")


@pytest.mark.parametrize(
    "text",
    ["raise ImportError('no such thing')", "import absent_thing", "raise SystemExit(3)", "("],
)
def test_r14_a_broken_plugin_breaks_only_itself(install, text):
    install("broken-plugin", {"broken": "broken_module:Loss"}, broken_module=text)
    assert "broken" in {ref.name for ref in available_losses()}
    get_loss("forward_kl")
    with pytest.raises(BrokenLossError, match=r"'broken'.*'broken-plugin'.*cannot be imported"):
        get_loss("broken_chunked")


def test_a_broken_plugin_shows_its_traceback_on_request(install, monkeypatch):
    install("broken-plugin", {"broken": "broken_module:Loss"}, broken_module="1 / 0")
    monkeypatch.setenv("KDLOSSES_DEBUG", "1")
    with pytest.raises(BrokenLossError, match=r"(?s)Traceback.*broken_module.py.*ZeroDivision"):
        get_loss("broken")


def test_a_plugin_without_its_class(install):
    install("broken-plugin", {"broken": "broken_module:Loss"}, broken_module="")
    with pytest.raises(BrokenLossError, match="Loss"):
        get_loss("broken")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def Loss(): pass", "not a subclass"),
        ("class Loss: pass", "not a subclass"),
        ("from kdlosses import Divergence as Loss", "does not define integrand"),
        ("from kdlosses import RowLoss\nclass Loss(RowLoss): pass", "does not define row"),
        (LOSS.replace("Triangular", "Loss").replace("Field(1.0,", "Field("), "power.*required"),
    ],
)
def test_a_plugin_that_is_no_loss(install, text, message):
    install("odd", {"odd": "odd_module:Loss"}, odd_module=text)
    with pytest.raises(LossSpecError, match=rf"(?s)'odd'.*{message}"):
        get_loss("odd")


def test_r15_two_plugins_that_claim_one_name(install):
    install("one", {"shared": "one_loss:Triangular"}, one_loss=LOSS)
    install("two", {"shared": "two_loss:Triangular"}, two_loss=LOSS)
    assert [ref.distribution for ref in available_losses() if ref.name == "shared"] == [
        "one",
        "two",
    ]
    with pytest.raises(LossSpecError, match="'shared' is registered by one and two"):
        get_loss("shared")
    get_loss("forward_kl")


def test_a_plugin_cannot_replace_a_built_in(install):
    install("thief", {"forward_kl": "thief_loss:Triangular"}, thief_loss=LOSS)
    assert type(get_loss("forward_kl").loss).__name__ == "ForwardKL"
    assert "thief_loss" not in sys.modules


@pytest.mark.parametrize("text", ["mine_chunked", "mine_chunked_chunked"])
def test_the_suffix_is_reserved(install, text):
    install("greedy", {"mine_chunked": "greedy_loss:Triangular"}, greedy_loss=LOSS)
    with pytest.raises(LossSpecError, match=r"'mine_chunked' of greedy .* reserved suffix"):
        get_loss(text)


def test_the_suffix_is_written_once():
    with pytest.raises(LossSpecError, match=r"'forward_kl_chunked': .* only once in a spec"):
        get_loss("forward_kl_chunked_chunked")


def test_a_half_removed_distribution_breaks_nothing(install):
    folder = install("leftover", {"left": "gone:Loss"})
    (folder / "METADATA").unlink()
    assert "left" in {ref.name for ref in available_losses()}
    get_loss("forward_kl")
    with pytest.raises(BrokenLossError, match="left"):
        get_loss("left")


# Names of other tools, and names that are taken.


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("kl", "forward_kl"),
        ("fkl", "forward_kl"),
        ("rkl", "reverse_kl"),
        ("jsd", "generalized_jsd"),
        ("jsd_chunked", "generalized_jsd"),
        ("jsd:beta=0.1", "generalized_jsd"),
        ("ForwardKL", "forward_kl"),
        ("ForwardKLLoss", "forward_kl"),
        ("ReverseKLWithChunkedOutputLoss", "reverse_kl"),
        ("0.5*ForwardKL+0.5*rkl", "forward_kl"),
        ("tvd", "total_variation"),
        ("dkd", "decoupled_kd"),
        ("skewed_reverse_kl", "skew_reverse_kl"),
        ("forward-kl", "forward_kl"),
        ("forwrad_kl", "forward_kl"),
    ],
)
def test_the_names_of_other_tools_are_known(theirs, ours):
    with pytest.raises(LossSpecError, match=f"did you mean '{ours}'"):
        get_loss(theirs)


def test_every_name_of_another_tool_stands_for_a_registered_loss():
    from kdlosses.registry import _ELSEWHERE

    assert set(_ELSEWHERE.values()) <= {ref.name for ref in available_losses()}


def test_a_loss_under_a_built_in_name_is_listed_as_ignored(install):
    assert ignored_losses() == ()
    install("twin", {"forward_kl": "twin_module:Triangular", "own": "twin_module:Triangular"})
    (ignored,) = ignored_losses()
    assert (ignored.name, ignored.distribution) == ("forward_kl", "twin")
