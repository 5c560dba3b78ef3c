"""What a comparison is made of: arms, tuning, identities, settings that all trials share."""

from __future__ import annotations

from typing import Any

import pytest

from kdrun.compare.plan import (
    TUNING_FROM,
    Axes,
    Plan,
    choose,
    final_trials,
    find_yardstick,
    merge,
    methods,
    setting,
    shared_settings,
    trained_on,
    tuning_trials,
)
from kdrun.compare.record import Record, Trial
from kdrun.config.load import load_config
from kdrun.errors import InputError

CE = find_yardstick("ce")
AGREEMENT = find_yardstick("top1_agreement")


def axes(**changes: Any) -> Axes:
    values: dict[str, Any] = {
        "losses": ("forward_kl_chunked", "reverse_kl_chunked"),
        "kd_ratios": (0.5,),
        "lrs": (1e-3,),
        "teachers": ("builtin",),
        "students": ("builtin",),
        "seeds": 2,
        "tuning_seeds": 2,
    }
    return Axes(**{**values, **changes})


def record(trial: Trial, value: float | None, status: Any = "done", name: str = "ce") -> Record:
    measures = {} if value is None else {name: value}
    return Record(id=trial.identity("s"), trial=trial, status=status, measures=measures)


def test_one_arm_each_and_the_baseline_seed_by_seed() -> None:
    plain = axes()
    assert tuning_trials(plain) == []
    trials = final_trials(plain, [], CE)
    assert [(t.seed, t.arm.method, t.arm.kd_ratio) for t in trials] == [
        (seed, method, ratio)
        for seed in (0, 1)
        for method, ratio in (
            ("cross-entropy", 0.0),
            ("forward_kl_chunked", 0.5),
            ("reverse_kl_chunked", 0.5),
        )
    ]


def test_each_method_is_tuned_on_seeds_that_the_final_trials_do_not_use() -> None:
    grid = axes(kd_ratios=(0.25, 1.0), lrs=(1e-4, 3e-4))
    trials = tuning_trials(grid)
    counts = dict.fromkeys(("cross-entropy", *grid.losses), 0)
    for trial in trials:
        assert trial.stage == "tuning"
        assert trial.seed in (TUNING_FROM, TUNING_FROM + 1)
        counts[trial.arm.method] += 1
    # Every loss has the same budget; the baseline has no ratio to choose.
    assert counts == {"cross-entropy": 4, "forward_kl_chunked": 8, "reverse_kl_chunked": 8}
    assert final_trials(grid, [], CE) == []


def test_the_best_mean_is_chosen_and_a_diverged_arm_is_not() -> None:
    grid = axes(losses=("forward_kl_chunked",), kd_ratios=(0.25, 0.5, 1.0))
    trials = tuning_trials(grid)
    values = {0.0: 4.0, 0.25: 3.0, 0.5: 2.0, 1.0: 1.0}
    records = [
        record(t, None, "diverged")
        if t.arm.kd_ratio == 1.0 and t.seed == TUNING_FROM + 1
        else record(t, values[t.arm.kd_ratio] + 0.01 * (t.seed - TUNING_FROM))
        for t in trials
    ]
    assert {t.arm.kd_ratio for t in final_trials(grid, records, CE)} == {0.0, 0.5}
    arms = methods(grid)[1].arms(grid)
    assert choose(arms, grid, records[:-1], CE) is None  # not finished
    by_agreement = [record(t, values[t.arm.kd_ratio], name="top1_agreement") for t in trials]
    best = choose(arms, grid, by_agreement, AGREEMENT)
    assert best is not None
    assert best.kd_ratio == 0.25  # higher is better there


def test_a_method_all_of_whose_arms_diverged_keeps_its_first() -> None:
    grid = axes(losses=("forward_kl_chunked",), lrs=(1e-3, 1e-2))
    records = [record(t, None, "diverged") for t in tuning_trials(grid)]
    assert {t.arm.lr for t in final_trials(grid, records, CE)} == {1e-3}


def test_teachers_and_students_are_axes() -> None:
    pairs = axes(teachers=("a", "b"), students=("c", "d"), seeds=1)
    trials = final_trials(pairs, [], CE)
    assert len(trials) == 2 * 2 * 3
    assert len({t.identity("s") for t in trials}) == len(trials)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": ("forward_kl", "forward_kl")}, "--loss forward_kl is given twice"),
        ({"kd_ratios": (0.0,)}, r"--kd-ratio 0: must be in \(0, 1\]"),
        ({"kd_ratios": (1.5,)}, "--kd-ratio 1.5"),
        ({"lrs": (0.0,)}, "--lr 0: must be above 0"),
        ({"seeds": 0}, "--seeds: at least one"),
        ({"lrs": (1.0, 2.0), "tuning_seeds": 0}, "--tuning-seeds: at least one"),
    ],
)
def test_axes_without_meaning_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        axes(**changes).check()


def test_what_trials_vary_is_no_part_of_their_common_setting() -> None:
    base = load_config(None, [("training.max_steps", 5)])
    same = load_config(
        None,
        [
            *(("training.max_steps", 5), ("training.seed", 3), ("optimizer.lr", 1.0)),
            *(("loss.spec", "reverse_kl"), ("output.dir", "x"), ("loss.kd_ratio", 0.1)),
        ],
    )
    assert setting(shared_settings(base)) == setting(shared_settings(same))
    other = load_config(None, [("training.max_steps", 6)])
    assert setting(shared_settings(base)) != setting(shared_settings(other))


def test_losses_that_train_on_the_yardstick_are_named() -> None:
    several = axes(losses=("forward_kl_chunked", "reverse_kl+0.5*forward_kl", "reverse_kl"))
    assert trained_on(find_yardstick("forward_kl"), several) == list(several.losses[:2])
    assert trained_on(AGREEMENT, several) == []


def test_an_unknown_yardstick() -> None:
    with pytest.raises(InputError, match="--yardstick bleu: no such measure; known: ce,"):
        find_yardstick("bleu")


def plan(**changes: Any) -> Plan:
    return Plan(axes(**changes), CE, 0.02, "s")


def test_trials_measured_on_other_rows_have_other_names() -> None:
    # With one learning rate a final trial is measured on all held-out rows; after a tuning on
    # those that the tuning did not see.
    one, several = plan(), plan(lrs=(1e-3, 1e-2))
    trial = final_trials(one.axes, [], CE)[0]
    assert one.identity(trial) != several.identity(trial)
    kept = Record(id=one.identity(trial), trial=trial, status="done", measures={"ce": 3.0})
    assert one.own([kept]) == [kept]
    assert several.own([kept]) == []


def test_rows_to_report_on_are_reported_on_whatever_is_tuned() -> None:
    given = {
        lrs: Plan(axes(lrs=lrs), CE, 0.02, "s", test_rows=True) for lrs in ((1e-3,), (1e-3, 1e-2))
    }
    assert [plan.parts for plan in given.values()] == [("test",), ("validation", "test")]
    final = Trial(arm=methods(axes())[0].arms(axes())[0], seed=0)
    assert {plan.part_of(final) for plan in given.values()} == {"test"}
    # A trial of one is that of the other.
    assert len({plan.identity(final) for plan in given.values()}) == 1
    assert plan().part_of(final) == "all"


def test_a_record_whose_trial_was_edited_is_refused() -> None:
    trial = final_trials(axes(), [], CE)[0]
    edited = trial.model_copy(update={"seed": 9})
    record = Record(id=plan().identity(trial), trial=edited, status="done")
    with pytest.raises(InputError, match=rf"{record.id}.json: was edited"):
        plan().own([record])


def test_more_seeds_leave_the_tuning_as_it_is() -> None:
    grid = axes(lrs=(1e-3, 1e-2))
    assert tuning_trials(grid) == tuning_trials(axes(lrs=(1e-3, 1e-2), seeds=7))


def test_a_folder_gathers_losses_and_seeds_and_a_new_grid_is_a_new_comparison() -> None:
    before = axes(losses=("a", "b"), seeds=3, lrs=(1.0, 2.0))
    now = axes(losses=("c", "a"), seeds=2, lrs=(2.0, 1.0), teachers=("t",))
    together = merge(before, now)
    assert together.losses == ("a", "b", "c")
    assert together.teachers == ("builtin", "t")
    assert together.seeds == 3
    assert together.lrs == (1.0, 2.0)
    assert merge(together, now) == together
    other = axes(losses=("a",), lrs=(3.0,))
    assert merge(before, other) == other
