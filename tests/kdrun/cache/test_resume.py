"""An interrupted build goes on: nothing is lost, nothing is removed, and the cache is the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pair_configs import tiny_llama
from torch import Tensor

import kdlosses
from kdrun.cache.build import Recipe, build_cache
from kdrun.cache.manifest import MANIFEST, PLAN, Manifest, Plan, read_manifest
from kdrun.cache.outputs import Batch, Outputs, TeacherOutputs, local_outputs
from kdrun.cache.read import Cache
from kdrun.cache.resume import _CALLED
from kdrun.errors import InputError, TrainingError
from kdrun.models.heads import FrozenTeacher, find_split

VOCAB = 300
RECIPES = {
    "hidden": Recipe("hidden", 0, 1.0, 0, VOCAB, 64, 3),
    "top_k": Recipe("top_k", 5, 2.0, 0, VOCAB, 64, 3),
    "sampled": Recipe("sampled", 5, 1.0, 7, VOCAB, 64, 3),
}
Examples = list[dict[str, list[int]]]


def some_examples(count: int = 20) -> Examples:
    """Rows of different lengths, some of them supervised."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        ids = torch.randint(0, VOCAB, (6 + number % 13,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    return rows


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(VOCAB, 16, 0)


@pytest.fixture(scope="module")
def teacher(model: Any) -> TeacherOutputs:
    return local_outputs(FrozenTeacher(model, find_split(model)), "tiny")


class Build:
    """Builds caches of one teacher, and counts the batches that it runs."""

    def __init__(self, teacher: TeacherOutputs, tokenizer: Any) -> None:
        self.teacher, self.tokenizer = teacher, tokenizer
        self.said: list[str] = []
        self.reported: list[tuple[int, int, int]] = []

    def __call__(
        self,
        folder: Path,
        recipe: Recipe,
        examples: Examples | None = None,
        stop_at: int | None = None,
        error: BaseException | None = None,
        teacher: TeacherOutputs | None = None,
        **options: Any,
    ) -> Manifest:
        self.said, self.reported = [], []

        def report(rows: int, total: int, tokens: int) -> None:
            self.reported.append((rows, total, tokens))
            if stop_at is not None and rows >= stop_at:
                raise error or KeyboardInterrupt

        return build_cache(
            folder,
            teacher or self.teacher,
            self.tokenizer,
            some_examples() if examples is None else examples,
            recipe,
            report,
            self.said.append,
            **{"shard_bytes": 1, **options},  # a shard for each batch
        )


@pytest.fixture
def build(teacher: TeacherOutputs, tiny_tokenizer: Any) -> Build:
    return Build(teacher, tiny_tokenizer)


def content(folder: Path) -> dict[bytes, tuple[Tensor, ...]]:
    cache = Cache(folder)
    return {key: cache.read(key) for key in cache._places}


def assert_same_cache(ours: Path, theirs: Path) -> None:
    """Every tensor of every row, and the manifest but for the division into files."""
    found, wanted = content(ours), content(theirs)
    assert list(found) == list(wanted)
    for key, tensors in wanted.items():
        assert all(torch.equal(a, b) for a, b in zip(found[key], tensors, strict=True))
    manifests = [read_manifest(folder).model_dump(exclude={"shards"}) for folder in (ours, theirs)]
    assert manifests[0] == manifests[1]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("options", [{}, {"shard_bytes": 2000}, {"shard_bytes": 10**9}])
def test_an_interrupted_build_goes_on_with_the_first_missing_row(
    build: Build, tmp_path: Path, kind: str, options: dict[str, int]
) -> None:
    recipe = RECIPES[kind]
    build(tmp_path / "whole", recipe, **options)
    all_tokens = build.reported[-1][2]
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cut", recipe, stop_at=12, **options)
    first = build.reported[-1][2]
    build(tmp_path / "cut", recipe, **options)
    assert build.said == ["12 of 20 rows are there already; going on"]
    assert build.reported[0][:2] == (15, 20)
    assert build.reported[-1] == (20, 20, all_tokens - first)  # a rate is that of this session
    assert_same_cache(tmp_path / "cut", tmp_path / "whole")
    if options == {}:
        assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_what_was_computed_when_a_teacher_fails_is_kept(build: Build, tmp_path: Path) -> None:
    recipe = RECIPES["top_k"]
    gone = TrainingError("the server is gone")
    with pytest.raises(TrainingError, match="server"):
        build(tmp_path / "c", recipe, stop_at=6, error=gone, shard_bytes=10**9)
    build(tmp_path / "c", recipe)
    assert build.said == ["6 of 20 rows are there already; going on"]


def test_a_shard_is_written_at_an_age_and_its_division_is_not_seen(
    build: Build, tmp_path: Path
) -> None:
    recipe = RECIPES["top_k"]
    assert len(build(tmp_path / "old", recipe, shard_bytes=10**9, shard_seconds=0).shards) == 7
    assert len(build(tmp_path / "young", recipe, shard_bytes=10**9).shards) == 1
    assert_same_cache(tmp_path / "old", tmp_path / "young")


def test_draws_depend_on_the_row_alone(build: Build, tmp_path: Path) -> None:
    recipe = RECIPES["sampled"]
    build(tmp_path / "all", recipe)
    # The same batches but for their order among equally long rows, and fewer of them.
    build(tmp_path / "some", replace(recipe, batch_size=1), some_examples()[::-2])
    found, wanted = content(tmp_path / "some"), content(tmp_path / "all")
    assert len(found) == 10
    for key, (_, indices) in found.items():
        assert (indices == wanted[key][1]).float().mean() > 0.95  # rounding may move a draw
    build(tmp_path / "other", replace(recipe, seed=8))
    assert any(not torch.equal(a[1], wanted[k][1]) for k, a in content(tmp_path / "other").items())


def truncate(folder: Path) -> None:
    path = folder / "rows-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def overwrite(folder: Path) -> None:
    (folder / "rows-00004.safetensors").write_bytes(b"\xff" * 500)


def replace_by_another(folder: Path) -> None:
    shutil.copy(folder / "rows-00002.safetensors", folder / "rows-00004.safetensors")


def leave_half(folder: Path) -> None:
    path = folder / "rows-00004.safetensors"
    path.rename(folder / ".rows-00004.safetensors.partial")


def lose(folder: Path) -> None:
    (folder / "rows-00002.safetensors").unlink()


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("harm", [truncate, overwrite, replace_by_another, leave_half, lose])
def test_a_damaged_shard_is_made_again_and_the_others_are_kept(
    build: Build, tmp_path: Path, kind: str, harm: Callable[[Path], None]
) -> None:
    recipe = RECIPES[kind]
    build(tmp_path / "whole", recipe)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cut", recipe, stop_at=12)
    harm(tmp_path / "cut")
    build(tmp_path / "cut", recipe)
    assert build.said[-1] == "9 of 20 rows are there already; going on"
    if harm not in (leave_half, lose):
        assert "rows-00004.safetensors is damaged; its rows are computed again" in build.said[0]
    assert len(build.reported) == 4
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_complete_cache_without_its_manifest_runs_no_batch(build: Build, tmp_path: Path) -> None:
    build(tmp_path / "c", RECIPES["top_k"])
    before = files(tmp_path / "c")
    (tmp_path / "c" / MANIFEST).unlink()
    build(tmp_path / "c", RECIPES["top_k"])
    assert build.reported == []
    assert files(tmp_path / "c") == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kind": "hidden"}, r"the --kind differs \(top_k, now hidden\)"),
        ({"entries": 6}, r"entries per token \(--k, --draws\) differs \(5, now 6\)"),
        ({"temperature": 1.0}, r"--temperature differs \(2, now 1\)"),
        ({"batch_size": 4}, r"--batch-size differs \(3, now 4\)"),
        ({"max_length": 32}, r"--max-length differs \(64, now 32\)"),
        ({"date": "2024-02-29"}, r"data\.date\) differs \(none, now 2024-02-29\)"),
        ({"vocab_size": 299}, r"shared tokens differs \(300, now 299\)"),
    ],
)
def test_another_recipe_is_refused_and_nothing_is_removed(
    build: Build, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, RECIPES["top_k"], stop_at=12)
    (tmp_path / "rows-00002.safetensors").write_bytes(b"damaged")
    before = files(tmp_path)
    with pytest.raises(InputError, match=f"{told}.*or remove {tmp_path} to start over") as raised:
        build(tmp_path, replace(RECIPES["top_k"], **change))
    assert "\n" not in str(raised.value)
    assert files(tmp_path) == before


def edited() -> Examples:
    rows = some_examples()
    rows[4]["input_ids"][0] += 1
    return rows


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (edited(), "the content or order of the rows differs;"),
        (some_examples()[::-1], "the content or order of the rows differs;"),
        (some_examples(21), r"the number of rows differs \(20, now 21\)"),
    ],
    ids=["edited", "reordered", "more"],
)
def test_other_rows_are_refused(build: Build, tmp_path: Path, rows: Examples, told: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, RECIPES["sampled"], stop_at=12)
    before = files(tmp_path)
    with pytest.raises(InputError, match=told):
        build(tmp_path, RECIPES["sampled"], rows)
    with pytest.raises(InputError, match=r"seed of the draws .* differs \(7, now 8\)"):
        build(tmp_path, replace(RECIPES["sampled"], seed=8))
    assert files(tmp_path) == before


def test_another_teacher_is_refused_and_another_name_is_not(build: Build, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, RECIPES["hidden"], stop_at=12)
    before = files(tmp_path)
    print_of_other = build.teacher.fingerprint.model_copy(update={"parameters": "0" * 64})
    other = replace(build.teacher, fingerprint=print_of_other)
    with pytest.raises(InputError, match="the teacher differs; continue"):
        build(tmp_path, RECIPES["hidden"], teacher=other)
    assert files(tmp_path) == before
    moved = replace(build.teacher, name="elsewhere/tiny")
    assert build(tmp_path, RECIPES["hidden"], teacher=moved).teacher_name == "elsewhere/tiny"


def test_every_field_of_a_plan_is_compared_but_the_name_of_the_teacher() -> None:
    assert {*_CALLED, "teacher_name"} == set(Plan.model_fields)


def test_rows_without_a_plan_are_kept_and_refused(build: Build, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, RECIPES["hidden"], stop_at=12)
    plan = tmp_path / PLAN
    for damage in (lambda: plan.write_bytes(b"{"), lambda: plan.write_bytes(b"\xff"), plan.unlink):
        damage()
        before = files(tmp_path)
        with pytest.raises(InputError, match=f"choose another folder, or remove {tmp_path}"):
            build(tmp_path, RECIPES["hidden"])
        assert files(tmp_path) == before


def served(
    model: Any, teacher: TeacherOutputs, k: int, ahead: int, temperature: float = 2.0
) -> TeacherOutputs:
    """A teacher without weights here that returns top-k, with several requests in flight."""

    def answer(batch: Batch) -> Outputs:
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits.detach()
        return kdlosses.TopK.from_logits(logits, k, temperature)

    def sources(batches: Iterable[Batch]) -> Iterator[Outputs]:
        with ThreadPoolExecutor(ahead) as pool:
            yield from pool.map(answer, batches)  # takes every batch before the first answer

    reason = "the server returns only the most likely tokens"
    return replace(teacher, sources=sources, weight=None, bias=None, reason=reason)


def test_a_served_teacher_is_cached_and_continued_alike(
    build: Build, model: Any, tmp_path: Path
) -> None:
    recipe = RECIPES["top_k"]
    build(tmp_path / "local", recipe)
    remote = served(model, build.teacher, k=5, ahead=3)
    build(tmp_path / "whole", recipe, teacher=remote)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "served", recipe, stop_at=12, teacher=remote)
    build(tmp_path / "served", recipe, teacher=remote)
    assert build.said == ["12 of 20 rows are there already; going on"]
    assert_same_cache(tmp_path / "served", tmp_path / "whole")
    found, wanted = content(tmp_path / "served"), content(tmp_path / "local")
    for key, (log_probs, _, tail) in wanted.items():  # logits of a whole batch round differently
        torch.testing.assert_close(found[key][0], log_probs, rtol=0, atol=1e-3)
        torch.testing.assert_close(found[key][2], tail, rtol=0, atol=1e-3)


def test_outputs_that_do_not_fit_the_recipe_are_refused(
    build: Build, model: Any, tmp_path: Path
) -> None:
    remote = served(model, build.teacher, k=4, ahead=1, temperature=1.0)
    with pytest.raises(InputError, match="returned 4 tokens per position, at temperature 1"):
        build(tmp_path / "a", RECIPES["top_k"], teacher=remote)
    with pytest.raises(InputError, match="cannot be cached, because the server returns only"):
        build(tmp_path / "b", RECIPES["hidden"], teacher=remote)
    with pytest.raises(InputError, match="cannot be drawn"):
        build(tmp_path / "c", RECIPES["sampled"], teacher=remote)
