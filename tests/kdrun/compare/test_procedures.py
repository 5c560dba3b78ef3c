"""Procedures as an axis of a comparison."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml
from small import compare, options, records, refused, rows_file

from kdrun.compare import estimate
from kdrun.compare.command import comparison_of
from kdrun.compare.labels import label_arms
from kdrun.compare.plan import methods
from kdrun.compare.record import Arm, Trial
from kdrun.compare.trial import trial_config
from kdrun.config.load import validate

for package in ("scipy", "matplotlib", "jinja2"):
    pytest.importorskip(package)


def test_procedures_go_with_every_loss_and_one_baseline(tmp_path: Path) -> None:
    rows = rows_file(tmp_path)
    comparison = comparison_of(
        options(
            rows,
            losses=("forward_kl_chunked", "reverse_kl_chunked"),
            procedures=("none", "gkd:lambda=1", "seqkd"),
        )
    )
    axes = comparison.plan.axes
    found = [(method.loss, method.procedure) for method in methods(axes)]
    assert found == [
        (None, None),
        ("forward_kl_chunked", None),
        ("reverse_kl_chunked", None),
        ("forward_kl_chunked", "gkd:lambda=1"),
        ("reverse_kl_chunked", "gkd:lambda=1"),
        (None, "seqkd"),
        ("forward_kl_chunked", "seqkd"),
        ("reverse_kl_chunked", "seqkd"),
    ]
    trials = comparison.plan.planned([])
    labels = label_arms(trial.arm for trial in trials)
    assert len(set(labels.values())) == len(labels) == 8
    configs: dict[Any, Any] = {
        (trial.arm.loss, trial.arm.procedure): trial_config(
            comparison.base, trial, tmp_path / "t", "all", None
        )
        for trial in trials
    }
    # Each has what its procedure wants, unless the axes say otherwise.
    assert configs[None, "seqkd"].procedure.sampling_temperature == 0
    assert configs["forward_kl_chunked", "gkd:lambda=1"].procedure.sampling_temperature == 1
    assert configs["forward_kl_chunked", "seqkd"].loss.kd_ratio == 0.5
    assert configs[None, None].procedure.spec is None
    assert all(yaml.safe_load(config.to_yaml()) for config in configs.values())


def test_how_answers_are_sampled_is_shared(tmp_path: Path) -> None:
    rows = rows_file(tmp_path)
    given = options(rows).overrides
    made = comparison_of(
        options(
            rows,
            procedures=("seqkd", "gkd"),
            overrides=(*given, ("procedure.max_new_tokens", 5), ("procedure.top_k", 7)),
        )
    )
    configs = [
        trial_config(made.base, trial, tmp_path / "t", "all", None)
        for trial in made.plan.planned([])
        if trial.arm.procedure is not None
    ]
    assert {config.procedure.max_new_tokens for config in configs} == {5}
    assert {config.procedure.top_k for config in configs} == {7}
    assert {config.procedure.sampling_temperature for config in configs} == {0.0, 1.0}


def test_a_comparison_tells_wall_time_and_generated_tokens(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    printed = compare(
        *("--data", rows_file(tmp_path), "--loss", "forward_kl_chunked", "--seeds", 1),
        *("--procedure", "none", "--procedure", "gkd:lambda=1", "--output", folder),
        *("--set", "evaluation.answers=0", "--set", "procedure.max_new_tokens=4"),
    )
    assert "generated tokens" in printed
    assert "forward_kl_chunked, gkd:lambda=1" in printed
    written = {
        (record["trial"]["arm"]["loss"], record["trial"]["arm"]["procedure"]): record[
            "generated_tokens"
        ]
        for record in records(folder).values()
    }
    assert written.keys() == {
        (None, None),
        ("forward_kl_chunked", None),
        ("forward_kl_chunked", "gkd:lambda=1"),
    }
    tokens = written["forward_kl_chunked", "gkd:lambda=1"]
    assert 12 <= tokens <= 3 * 4 * 4
    assert written[None, None] == 0
    with open(folder / "results.csv", encoding="utf-8", newline="") as stream:
        lines = {line["procedure"]: line for line in csv.DictReader(stream)}
    assert int(lines["gkd:lambda=1"]["generated_tokens"]) == tokens
    assert "generated tokens" in (folder / "results.tex").read_text(encoding="utf-8")
    assert "wall time" in (folder / "report.html").read_text(encoding="utf-8")


def test_the_estimate_counts_what_is_written(
    tiny_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "_product_rate", lambda: 1e13)
    specs = ("gkd:lambda=0.5", "gkd:lambda=1", "minillm", "minillm:reuse=2", "seqkd")
    pair = {"teachers": (str(tiny_pair.teacher),), "students": (str(tiny_pair.student),)}
    comparison = comparison_of(options(tiny_pair.rows, procedures=("none", *specs), **pair))
    seconds = {
        trial.arm.procedure: estimate.trial_seconds(comparison.base, trial, cached=True)
        for trial in comparison.plan.planned([])
        if trial.arm.loss is not None
    }
    waits = {spec: seconds[spec] - seconds["seqkd"] for spec in specs}  # type: ignore[operator]
    token = estimate._TOKEN_SECONDS + 2 * estimate._LAYER_SECONDS  # two layers each
    written = 3 * 16 * token  # 3 steps of half of 32 tokens
    assert waits["gkd:lambda=1"] == pytest.approx(written, rel=0.05)
    assert waits["gkd:lambda=0.5"] == pytest.approx(written / 2, rel=0.05)
    assert waits["minillm"] == pytest.approx(2 * written, rel=0.05)
    assert waits["minillm:reuse=2"] == pytest.approx(written, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--procedure", "gdk"), "did you mean 'gkd'"),
        (("--procedure", "gkd", "--procedure", "gkd"), "--procedure gkd is given twice"),
        (("--set", "procedure.top_k=3"), "procedure.top_k has no effect without procedure.spec"),
        (("--procedure", "gkd", "--set", "procedure.top_k=-3"), "procedure.top_k=-3"),
        (("--procedure", "gkd", "--set", "procedure.max_new_tokens=600"), "leaves no room"),
    ],
)
def test_wrong_procedures_are_refused_before_anything_runs(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    given = ("--data", rows_file(tmp_path), "--output", tmp_path / "c")
    assert message in refused("compare-losses", *given, *arguments)
    assert not (tmp_path / "c").exists()


def test_cross_entropy_alone_has_no_term_on_hidden_states(tmp_path: Path) -> None:
    spec = "hidden_cosine:layers=last"
    base = validate({"features": {"spec": spec}})
    specs = {}
    for loss, ratio in (("forward_kl_chunked", 0.5), (None, 0.0)):
        arm = Arm(loss=loss, kd_ratio=ratio, lr=1e-3, teacher="builtin", student="builtin")
        trial = Trial(arm=arm, seed=0, stage="final")
        specs[loss] = trial_config(base, trial, tmp_path, "all", None).features.spec
    assert specs == {"forward_kl_chunked": spec, None: None}
