"""Runs with a term on hidden states: values, refusals, checkpoints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cut_runs import cut_back
from safetensors.torch import load_file

from kdrun.errors import InputError
from kdrun.models.pairs import locate_pair
from kdrun.run.check import resolve
from kdrun.run.features import check_features_layers

COSINE = "hidden_cosine:layers=last,weight=0.5"


def lines(folder: Path) -> list[dict[str, float]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [row for row in map(json.loads, text.splitlines()) if "loss" in row]


def test_the_logged_loss_has_the_weighted_term(distil, tmp_path):
    said = []
    folder = distil(tmp_path / "run", said, features__spec=COSINE)
    for row in lines(folder):
        mixed = 0.5 * row["class_loss"] + 0.5 * row["kd_loss"]
        assert row["feature_loss"] > 0.1
        assert row["loss"] == pytest.approx(mixed + 0.5 * row["feature_loss"], rel=1e-5)
    saved = load_file(folder / "student" / "model.safetensors")
    assert not any("project" in name for name in saved)
    assert (folder / "checkpoints" / "checkpoint-2" / "projectors.pt").is_file()
    assert any(re.match(r"hidden states: layers \d+-\d+ .*are trained", line) for line in said)


def test_the_teacher_is_asked_at_ratio_0(distil, tmp_path):
    folder = distil(tmp_path / "run", features__spec=COSINE, loss__kd_ratio=0)
    row = lines(folder)[0]
    assert "kd_loss" not in row
    assert row["loss"] == pytest.approx(row["class_loss"] + 0.5 * row["feature_loss"], rel=1e-5)


@pytest.mark.parametrize("lora", [None, 2], ids=["whole", "lora"])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(distil, tmp_path, lora):
    settings = {
        "features__spec": "hidden_mse:weight=0.2",
        "training__max_steps": 4,
        "training__save_steps": 2,
        "training__gradient_accumulation_steps": 2,
        "lora__rank": lora,
    }
    whole = distil(tmp_path / "whole", **settings)
    again = distil(cut_back(whole, tmp_path / "cut"), resume=True, **settings)
    for name in ("projectors.pt", "optimizer.pt"):
        first, second = (
            (folder / "checkpoints" / "checkpoint-4" / name).read_bytes()
            for folder in (whole, again)
        )
        assert first == second, name
    students = [(folder / "student").glob("*.safetensors") for folder in (whole, again)]
    for one, two in zip(*map(sorted, students), strict=True):
        assert one.read_bytes() == two.read_bytes()
    assert lines(whole)[3] | {"supervised_tokens_per_second": 0} == lines(again)[3] | {
        "supervised_tokens_per_second": 0
    }


def test_a_run_with_the_term_is_not_resumed_without_it(distil, tmp_path):
    folder = distil(tmp_path / "run", features__spec="token_relation:layers=last")
    with pytest.raises(InputError, match=r"features.spec was 'token_relation:layers=last'"):
        distil(folder, resume=True, training__max_steps=4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"features__spec": "hiden_cosine"}, "did you mean 'hidden_cosine'"),
        ({"features__spec": "hidden_cosine:layers=9-1"}, "the teacher has 2 layers, not 9"),
        ({"features__spec": "hidden_cosine:layers=1-9"}, "the student has 2 layers, not 9"),
        ({"features__spec": "hidden_cosine:layers=0-1"}, "counted from 1"),
        ({"features__spec": "hidden_cosine:wight=1"}, "has no parameter 'wight'"),
        ({"features__spec": "hidden_cosine:weight=-1"}, "must be a number above 0"),
        ({"features__spec": "hidden_cosine:tokens=some"}, "expected supervised or all"),
        ({"features__spec": "hidden_mse:scale=both"}, "scale='both'"),
        ({"features__chunk_size": 5}, "no effect without features.spec"),
        (
            {"features__spec": COSINE, "model__teacher": None, "loss__kd_ratio": 0},
            "needs a --teacher, also at --kd-ratio 0",
        ),
        (
            {"features__spec": COSINE, "model__teacher": "http://localhost:1"},
            "a server gives no hidden states",
        ),
        (
            {"features__spec": COSINE, "model__teacher": None, "model__teacher_cache": "there"},
            "a teacher cache has no hidden states",
        ),
        ({"features__spec": COSINE, "training__torch_compile": True}, "compiled models"),
        ({"features__spec": COSINE, "model__teacher": "self"}, "a student that teaches itself"),
        (
            {"features__spec": COSINE, "data__teacher_system": "Judge."},
            "the teacher reads another prompt; remove data.teacher_system",
        ),
    ],
)
def test_refused_in_one_line(distil, tmp_path, given, said):
    with pytest.raises(InputError, match=re.escape(said)) as raised:
        distil(tmp_path / "run", **given)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_an_optimiser_without_parameter_groups_is_refused_if_there_are_projectors(tiny_pair):
    given = {
        "model": {"teacher": str(tiny_pair.teacher), "student": str(tiny_pair.student)},
        "data": {"train": str(tiny_pair.rows)},
        "features": {"spec": COSINE},
        "optimizer": {"name": "lomo"},
    }
    config = resolve(given)
    teacher, student = locate_pair(config.model)
    with pytest.raises(InputError, match="lomo does not train the projectors"):
        check_features_layers(config, teacher, student)
    assert check_features_layers(config, student, student) is not None
