"""Names, specs, plugins, and what the command prints of them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kdrun.cli import cli
from kdrun.config.load import load_config
from kdrun.errors import InputError
from kdrun.procedures import available_procedures, get_procedure
from kdrun.procedures.gkd import GKD

EVERY_OTHER = textwrap.dedent(
    '''
    from pydantic import Field
    from kdrun.procedures import Procedure
    from kdrun.procedures.sampling import examples_of

    class EveryOther(Procedure):
        """The student answers in every n-th step.

        Reference: none, a test's.
        """

        every: int = Field(2, ge=1, description="steps from one to the next")

        def batches(self, given, session):
            if session.step % self.every:
                return list(given)
            return [
                session.collate(session.write(examples_of(batch), number), batch)
                for number, batch in enumerate(given)
            ]
    '''
)


def invoke(*arguments: object) -> tuple[int, str]:
    done = CliRunner(env={"COLUMNS": "300"}).invoke(cli, list(map(str, arguments)))
    return done.exit_code, done.output + str(done.exception or "")


def test_the_built_in_procedures_are_registered() -> None:
    names = [ref.name for ref in available_procedures()]
    assert names == ["distillm", "distillm2", "gkd", "minillm", "seqkd"]
    assert all(ref.distribution == "kdlosses" for ref in available_procedures())
    for name in names:
        get_procedure(name)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gdk", "unknown procedure 'gdk', did you mean 'gkd'"),
        ("nothing_like_it", "'kdrun procedures list' shows all"),
        (
            "gkd:lamda=0.5",
            "no parameter 'lamda', did you mean 'lambda'.; it takes lambda, ",
        ),
        ("gkd:lambda_=0.5", "no parameter 'lambda_', did you mean 'lambda'"),
        ("gkd:lambda=1.5", "lambda='1.5': Input should be less than or equal to 1"),
        ("gkd:lambda=-0.1", "lambda='-0.1': Input should be greater than or equal to 0"),
        ("gkd:lambda=much", "lambda='much': Input should be a valid number"),
        ("gkd:lambda", "expected a name such as gkd"),
        ("gkd:lambda=1,lambda=0", "each key once"),
        ("0.5*gkd", "only losses have weights"),
        ("gkd+seqkd", "only losses have weights and sums"),
        ("gkd_chunked", "expected one name"),
        ("distillm2:student_loss=skew_revers_kl", "did you mean 'skew_reverse_kl'"),
        ("distillm2:student_loss=reverse_kl_chunked", "remove _chunked"),
        ("distillm2:student_loss=my.py:Mine", "the loss of a file is not recorded"),
        ("minillm:importance=some", "'token' or 'sequence'"),
    ],
)
def test_wrong_specs_name_the_cure(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        get_procedure(spec)
    with pytest.raises(InputError, match=message):
        load_config(None, [("procedure.spec", spec)])


def test_a_parameter_that_is_a_keyword_is_given_by_its_name() -> None:
    assert get_procedure("gkd:lambda=0.25, class_loss=true") == GKD(lambda_=0.25, class_loss=True)
    inner = get_procedure("distillm2:student_loss=skew_reverse_kl:alpha=0.2")
    assert inner.student_loss == "skew_reverse_kl:alpha=0.2"  # type: ignore[attr-defined]


def test_a_procedure_fills_in_what_the_user_leaves_open() -> None:
    config = load_config(None, [("procedure.spec", "seqkd")])
    assert (config.loss.kd_ratio, config.procedure.sampling_temperature) == (0.0, 0.0)
    config = load_config(None, [("procedure.spec", "seqkd"), ("loss.kd_ratio", 0.3)])
    assert config.loss.kd_ratio == 0.3
    assert load_config(None, [("procedure.spec", "minillm")]).loss.spec == "reverse_kl_chunked"
    config = load_config(None, [("procedure.spec", "minillm"), ("loss.spec", "hellinger")])
    assert config.loss.spec == "hellinger"
    assert load_config(None, [("procedure.spec", "distillm")]).training.eval_steps == 100


def test_sampling_without_a_procedure_is_refused() -> None:
    with pytest.raises(InputError, match=r"procedure.top_k has no effect without procedure.spec"):
        load_config(None, [("procedure.top_k", 5)])


def test_a_plugin_comes_in_by_the_same_door(
    install: Callable[..., None], distil: Callable[..., Path], tmp_path: Path
) -> None:
    install(
        "other-procedures",
        {"every_other": "other_procedures:EveryOther"},
        other_procedures=EVERY_OTHER,
    )
    code, output = invoke("procedures", "list")
    assert code == 0
    assert "every_other  other-procedures  The student answers in every n-th step." in output
    code, output = invoke("procedures", "check", "every_other:every=3")
    assert code == 0, output
    folder = distil(
        tmp_path / "run",
        procedure__spec="every_other",
        procedure__max_new_tokens=4,
        training__max_steps=4,
    )
    assert '"student_share": 0.5' in (folder / "summary.json").read_text(encoding="utf-8")


def test_a_broken_plugin_breaks_nothing_but_itself(install: Callable[..., None]) -> None:
    install(
        "broken-procedures",
        {"broken": "broken_procedures:Nothing", "late": "late_procedures:Late"},
        broken_procedures="raise SystemExit('usage')",
        late_procedures="class Late: pass",
    )
    code, output = invoke("procedures", "list")
    assert code == 0
    assert "broken: procedure 'broken' of distribution 'broken-procedures'" in output
    assert get_procedure("gkd") == GKD()
    with pytest.raises(InputError, match="cannot be imported: SystemExit: usage"):
        get_procedure("broken")
    with pytest.raises(InputError, match=r"is not a subclass of kdrun\.procedures"):
        get_procedure("late")


def test_two_plugins_that_claim_a_name_and_one_that_claims_a_built_in(
    install: Callable[..., None],
) -> None:
    install("first-one", {"twice": "a_module:A", "gkd": "a_module:A"})
    install("second-one", {"twice": "b_module:B"})
    with pytest.raises(InputError, match="registered by first-one and second-one"):
        get_procedure("twice")
    assert get_procedure("gkd") == GKD()


def test_show_tells_parameters_defaults_and_where_it_comes_from() -> None:
    code, output = invoke("procedures", "show", "gkd:lambda=0.25")
    assert code == 0
    for piece in ("arXiv:2306.13649", "lambda", "0.25", ">= 0, <= 1", "registered by kdlosses"):
        assert piece in output
    assert "default: loss.kd_ratio=0.0" in invoke("procedures", "show", "seqkd")[1]
    code, output = invoke("procedures", "show", "gdk")
    assert code != 0
    assert "did you mean 'gkd'" in output


def test_a_failing_plugin_fails_its_checks(install: Callable[..., None]) -> None:
    careless = EVERY_OTHER.replace("Reference: none", "No word").replace(
        "session.step % self.every", "__import__('torch').rand(()).item() < 0.5"
    )
    install("careless", {"careless": "careless_module:EveryOther"}, careless_module=careless)
    code, output = invoke("procedures", "check", "careless")
    assert code == 1
    verdicts: dict[str, Any] = {
        line.split()[0]: line.split()[1] for line in output.splitlines() if len(line.split()) > 1
    }
    assert verdicts["documentation"] == "failed"
    assert verdicts["determinism"] == "failed"
    assert verdicts["labels"] == "passed"
