"""A teacher on other devices than its student: the same losses, and what is refused.

torch's lazy device is a second device on every machine: its tensors are computed on the CPU, and
an operation refuses tensors of two devices, as on an accelerator.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pair_configs import config_of

from kdlosses import Logits, Projected
from kdrun.dry_run.report import dry_run
from kdrun.errors import InputError
from kdrun.models.heads import FrozenTeacher, HeadSplit, find_split
from kdrun.models.placement import (
    check_teacher_device,
    device_map,
    free_devices,
    spread,
    teacher_devices,
)
from kdrun.run.check import check

Distil = Callable[..., Path]
CPU, OTHER = torch.device("cpu"), torch.device("lazy:0")
IDS = torch.arange(3, 60).view(1, -1)


@lru_cache
def start_lazy_device() -> None:
    import torch._lazy.ts_backend

    torch._lazy.ts_backend.init()


@pytest.fixture(autouse=True)
def lazy_device() -> None:
    start_lazy_device()


def make(tied: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        **options,
    )
    return transformers.LlamaForCausalLM(config).eval()


def source_of(teacher: FrozenTeacher, device: torch.device) -> Any:
    ids = IDS.to(device)
    return teacher.source(ids, torch.ones_like(ids))


def blocks(tied: bool) -> dict[str, Any]:
    """Half of the layers on each device; a tied head is where the embeddings are."""
    layers = {f"model.layers.{n}": "cpu" if n < 2 else str(OTHER) for n in range(4)}
    head = "cpu" if tied else str(OTHER)
    return {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        **layers,
        "model.norm": str(OTHER),
        "lm_head": head,
    }


def test_devices_do_not_mix() -> None:
    with pytest.raises(RuntimeError):
        make().to(OTHER)(IDS)


@pytest.mark.parametrize(("own", "of_batches"), [(OTHER, CPU), (CPU, OTHER)])
@pytest.mark.parametrize("tied", [True, False])
def test_its_values_come_to_the_batches(
    own: torch.device, of_batches: torch.device, tied: bool
) -> None:
    model = make(tied)
    plain = source_of(FrozenTeacher(make(tied), find_split(model)), CPU)
    teacher = FrozenTeacher(model, find_split(model), [str(own)])
    teacher.to(of_batches)
    found = source_of(teacher, of_batches)
    assert isinstance(found, Projected)
    assert {str(x.device) for x in model.parameters()} == {str(own)}
    assert found.hidden.device == found.weight.device == of_batches
    torch.testing.assert_close(found.hidden.cpu(), plain.hidden, rtol=0, atol=1e-4)
    assert torch.equal(found.weight.cpu(), plain.weight)
    # The copy of the head is made once.
    assert source_of(teacher, of_batches).weight is found.weight


def test_logits_of_a_model_without_split_come_too() -> None:
    model = make()
    with torch.no_grad():
        expected = model(IDS).logits
    teacher = FrozenTeacher(model, HeadSplit(reason="its head is odd"), [str(OTHER)])
    teacher.to(CPU)
    found = source_of(teacher, CPU)
    assert isinstance(found, Logits)
    torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_a_teacher_is_spread_over_two_devices(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "kdrun.models.heads.place", lambda model, devices: spread(model, blocks(tied))
    )
    model = make(tied)
    plain = source_of(FrozenTeacher(make(tied), find_split(model)), CPU)
    teacher = FrozenTeacher(model, find_split(model), ["cpu", str(OTHER)])
    for device in (CPU, OTHER):
        teacher.to(device)
        found = source_of(teacher, device)
        assert {str(x.device) for x in model.parameters()} == {"cpu", str(OTHER)}
        assert found.hidden.device == found.weight.device == device
        torch.testing.assert_close(found.hidden.cpu(), plain.hidden, rtol=0, atol=1e-4)
    with torch.no_grad():  # a teacher that writes answers uses its own head
        logits = model(IDS).logits
        expected = make(tied)(IDS).logits
    torch.testing.assert_close(logits.cpu(), expected, rtol=0, atol=1e-3)


def bytes_of(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_blocks_are_assigned_evenly(tied: bool) -> None:
    model = make(tied, pad_token_id=0)
    for devices in ([1, 2], [1, 2, 3]):
        placed = device_map(model, dict.fromkeys(devices, 2**30))
        assert set(placed.values()) == set(devices)
        layers = [placed[f"model.layers.{n}"] for n in range(4)]
        assert layers == sorted(layers, key=str)
        assert all(name.count(".") < 3 for name in placed), "no layer is split"


def test_a_teacher_that_does_not_fit_is_refused() -> None:
    model = make()
    with pytest.raises(InputError, match=r"does not fit in the .* of the other devices"):
        device_map(model, dict.fromkeys((1, 2), bytes_of(model) // 4))


@pytest.mark.parametrize(
    ("count", "students", "expected"),
    [
        (2, 1, [[1]]),
        (8, 1, [[1, 2, 3, 4, 5, 6, 7]]),
        (8, 2, [[2, 4, 6], [3, 5, 7]]),
        (5, 4, [[4], [], [], []]),
        (1, 1, [[]]),
        (0, 1, [[]]),
    ],
)
def test_no_two_processes_share_a_device(
    count: int, students: int, expected: list[list[int]]
) -> None:
    assert [free_devices(count, rank, students) for rank in range(students)] == expected


@pytest.mark.parametrize("procedure", [None, "gkd:lambda=0.5", "minillm"])
def test_a_run_with_it_reaches_the_same_measures(
    distil: Distil,
    still_student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    procedure: str | None,
) -> None:
    given: dict[str, Any] = {"model__student": str(still_student)}
    if procedure is not None:
        given |= {"procedure__spec": procedure, "procedure__max_new_tokens": 6}
    found = []
    for name, devices in (("here", None), ("there", [str(OTHER)])):
        monkeypatch.setattr("kdrun.models.pairs.teacher_devices", lambda given, at=devices: at)
        folder = distil(tmp_path / name, **given)
        found.append(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    here, there = found
    assert here["before"] == pytest.approx(there["before"], rel=1e-4)
    assert here["after"] == pytest.approx(there["after"], rel=1e-3)
    assert here["after"] != here["before"]


def test_a_teacher_beside_a_cache_is_moved_too(
    distil: Distil, tiny_pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is not exact, so that only held-out rows need the live teacher."""
    from click.testing import CliRunner

    from kdrun.cli import cli

    cache = tmp_path / "cache"
    arguments = ["cache-teacher", "--teacher", tiny_pair.teacher, "--student", tiny_pair.student]
    arguments += ["--data", tiny_pair.rows, "--max-length", 128, "--kind", "top-k", "--k", 8]
    arguments += ["--output", cache]
    done = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0
    placed: list[Any] = []

    def place(model: Any, devices: Any) -> None:
        placed.append(devices)
        model.to(devices[0])

    monkeypatch.setattr("kdrun.models.heads.place", place)
    given = {"model__teacher_cache": str(cache), "data__shift_windows": False}
    found = []
    for name, devices in (("here", None), ("there", [str(OTHER)])):
        monkeypatch.setattr("kdrun.cache.choose.teacher_devices", lambda given, at=devices: at)
        folder = distil(tmp_path / name, **given)
        found.append(json.loads((folder / "summary.json").read_text(encoding="utf-8"))["before"])
    assert placed == [[str(OTHER)]]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_the_dry_run_counts_the_copy_of_the_head(tiny_pair: Any, device: str) -> None:
    found = dry_run(config_of(tiny_pair, model__teacher_device=device), "h100")
    plain = dry_run(config_of(tiny_pair), "h100")
    assert found.memory["weights of the teacher"] == 296 * 32 * 2
    assert plain.memory["weights of the teacher"] == plain.teacher.weights > 296 * 32 * 2
    place = "the CPU" if device == "cpu" else "other devices"
    assert any(place in note and "teacher" in note for note in found.notes)


def test_on_a_cpu_the_teacher_stays_beside_the_student(tiny_pair: Any) -> None:
    found = dry_run(config_of(tiny_pair, model__teacher_device="cpu"), "cpu")
    assert found.memory == dry_run(config_of(tiny_pair), "cpu").memory


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"training__fsdp": True}, "conflicts with training.fsdp=true"),
        ({"model__teacher": None, "loss__kd_ratio": 0}, "no effect without a teacher"),
    ],
)
def test_what_has_no_sense_is_refused(tiny_pair: Any, given: dict[str, Any], said: str) -> None:
    for device in ("auto", "cpu"):
        config = config_of(tiny_pair, model__teacher_device=device, **given)
        with pytest.raises(InputError, match=f"model.teacher_device={device}.*{said}"):
            check(config)
        with pytest.raises(InputError, match=said):
            check_teacher_device(config.model, config.training.fsdp)


@pytest.mark.skipif(torch.accelerator.device_count() > 1, reason="there are other devices")
def test_one_device_cannot_be_shared_out(distil: Distil, tiny_pair: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.teacher_device=auto needs more accelerators"):
        distil(tmp_path / "run", model__teacher_device="auto")
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert teacher_devices(None) is None
    assert list(teacher_devices("cpu") or ()) == ["cpu"]


@pytest.mark.parametrize("command", ["evaluate", "compare-losses", "cache-teacher"])
def test_commands_without_a_student_refuse_it(tiny_pair: Any, tmp_path: Path, command: str) -> None:
    from click.testing import CliRunner

    from kdrun.cli import cli

    of = {
        "evaluate": [command, str(tiny_pair.student)],
        "compare-losses": [command, "--student", str(tiny_pair.student), "--output", "x"],
        "cache-teacher": [command, "--student", str(tiny_pair.student), "--output", "x"],
    }[command]
    arguments = [*of, "--teacher", str(tiny_pair.teacher), "--data", str(tiny_pair.rows)]
    arguments += ["--max-length", "64", "--set", "model.teacher_device=auto"]
    with pytest.raises(InputError, match=r"^model\.teacher_device"):
        CliRunner().invoke(cli, arguments, catch_exceptions=False)
