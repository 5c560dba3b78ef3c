"""The teacher cache: equal to the live teacher however rows come, and refused where it is wrong."""

from __future__ import annotations

import copy
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from bare import bare_arguments

import kdlosses
from kdrun import DistillTrainer
from kdrun.cache.build import Recipe, build_cache
from kdrun.cache.choose import check_loss
from kdrun.cache.fingerprint import print_teacher, print_tokenizer
from kdrun.cache.manifest import MANIFEST, PLAN
from kdrun.cache.outputs import local_outputs
from kdrun.cache.read import Cache
from kdrun.cache.teacher import CachedTeacher
from kdrun.data.batch_rows import rows_of
from kdrun.data.collate import Collator, shift_labels
from kdrun.data.encode import encode_chats
from kdrun.data.formats import ChatRow
from kdrun.data.messages import Message
from kdrun.data.records import Position
from kdrun.errors import InputError, TrainingError
from kdrun.models.heads import FrozenTeacher, HeadSplit, find_split

TEXT = "the user asks a question and the assistant gives an answer to it"
WORDS = TEXT.split()


def model(seed: int, vocab: int, **options: Any) -> Any:
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.5,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, **options})).eval()


def chat(number: int) -> ChatRow:
    question = " ".join(WORDS[: 1 + number % 9])
    answer = " ".join(WORDS[number % 5 : 3 + number % 11]) + f" {number}"
    messages = (Message("user", question), Message("assistant", answer))
    return ChatRow(messages, Position("rows.jsonl", number + 1))


@dataclass
class Setting:
    tokenizer: Any
    teacher: FrozenTeacher
    examples: list[Any]
    folder: Path

    def build(self, folder: Path, kind: Any = "hidden", entries: int = 5, **options: Any) -> Any:
        recipe: dict[str, Any] = {
            "kind": kind,
            "entries": entries,
            "temperature": 1.0,
            "seed": 0,
            "vocab_size": len(self.tokenizer),
            "max_length": 64,
            "batch_size": 3,
        }
        recipe.update((k, options.pop(k)) for k in list(options) if k in recipe)
        return build_cache(
            folder,
            local_outputs(self.teacher, "tiny"),
            self.tokenizer,
            self.examples,
            Recipe(**recipe),
            **options,
        )

    def cached(self, folder: Path | None = None) -> CachedTeacher:
        return CachedTeacher(Cache(folder or self.folder), self.tokenizer)


@pytest.fixture(scope="module")
def setting(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    examples = encode_chats([chat(i) for i in range(20)], tiny_tokenizer, 64).examples
    teacher = model(0, len(tiny_tokenizer) + 7)  # a padded head
    folder = tmp_path_factory.mktemp("cache") / "hidden"
    made = Setting(tiny_tokenizer, FrozenTeacher(teacher, find_split(teacher)), examples, folder)
    made.build(folder, shard_bytes=4000)  # several shards
    return made


def left_padded(examples: list[Any], pad: int) -> dict[str, torch.Tensor]:
    """What Collator does, with the padding on the other side."""
    length = max(len(example["input_ids"]) for example in examples)
    ids, mask, labels = [], [], []
    for example in examples:
        gap = length - len(example["input_ids"])
        ids.append([pad] * gap + example["input_ids"])
        mask.append([0] * gap + [1] * len(example["input_ids"]))
        labels.append([-100] * gap + example["labels"])
    shifted = shift_labels(torch.tensor(labels))
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "shift_labels": shifted,
    }


def features(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: batch[key] for key in ("input_ids", "attention_mask", "shift_labels")}


def value(loss: str, source: Any, batch: dict[str, torch.Tensor], vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(*batch["shift_labels"].shape, vocab, generator=generator)
    made = kdlosses.get_loss(loss, vocab_size=vocab)
    return made(student, source, batch["shift_labels"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [1, 4, 20])
@pytest.mark.parametrize("loss", ["forward_kl", "generalized_jsd", "decoupled_kd"])
def test_d8_d17_a_shuffled_batch_has_the_loss_of_the_live_teacher(
    setting: Setting, side: str, size: int, loss: str
) -> None:
    cached = setting.cached()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1)).tolist()
    rows = [setting.examples[i] for i in order]
    for first in range(0, 20, size):
        part = rows[first : first + size]
        batch = left_padded(part, 2) if side == "left" else Collator(0)(part)
        found = value(loss, cached.source(**features(batch)), batch, len(setting.tokenizer))
        live = setting.teacher.source(**features(batch))
        wanted = value(loss, live, batch, len(setting.tokenizer))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_hidden_states_are_those_of_each_row_run_alone(setting: Setting) -> None:
    cached = setting.cached()
    batch = left_padded(setting.examples[:6], 2)
    source = cached.source(**features(batch))
    for number, example in enumerate(setting.examples[:6]):
        ids = torch.tensor([example["input_ids"]])
        alone = setting.teacher.model.model(input_ids=ids).last_hidden_state[0]
        gap = batch["input_ids"].shape[1] - ids.shape[1]
        for place, label in enumerate(batch["shift_labels"][number].tolist()):
            if label != -100:
                torch.testing.assert_close(
                    source.hidden[number, place], alone[place - gap], rtol=1e-5, atol=1e-5
                )


def test_several_shards_hold_every_row_once(setting: Setting, tmp_path: Path) -> None:
    manifest = json.loads((setting.folder / MANIFEST).read_text(encoding="utf-8"))
    assert len(manifest["shards"]) > 2
    assert manifest["rows"] == 20
    doubled = copy.copy(setting)
    doubled.examples = [*setting.examples, *setting.examples[:7]]
    assert doubled.build(tmp_path / "c").rows == 20
    assert manifest["vocab_size"] == len(setting.tokenizer)


def test_d17_an_edited_row_is_refused_and_shown(setting: Setting) -> None:
    cached = setting.cached()
    example = copy.deepcopy(setting.examples[3])
    example["input_ids"][-3] = 17
    with pytest.raises(InputError, match=r"lacks the row that begins '<\|im_start\|>user"):
        cached.source(**features(Collator(0)([setting.examples[1], example])))
    assert cached.missing(setting.examples) is None
    assert "max-length" in str(cached.missing([*setting.examples, example]))


def test_a_row_whose_supervised_positions_changed_is_refused(setting: Setting) -> None:
    example = copy.deepcopy(setting.examples[3])
    example["labels"][5] = example["input_ids"][5]
    with pytest.raises(InputError, match="supervised"):
        setting.cached().source(**features(Collator(0)([example])))


def test_a_supervised_padding_position_is_refused(setting: Setting) -> None:
    rows = copy.deepcopy(setting.examples[:2])
    for row in rows:
        row["labels"] = list(row["input_ids"])
    with pytest.raises(InputError, match="padded position"):
        list(rows_of(**features(left_padded(rows, 2))))


def test_a_batch_without_supervised_positions_has_loss_zero(setting: Setting) -> None:
    masked = [{"input_ids": [5, 6, 7], "labels": [-100] * 3}]
    batch = Collator(0)(masked)
    source = setting.cached().source(**features(batch))
    assert value("forward_kl", source, batch, len(setting.tokenizer)) == 0


def test_d16_another_vocabulary_or_template_is_refused(setting: Setting) -> None:
    cache = Cache(setting.folder)
    other = copy.deepcopy(setting.tokenizer)
    other.chat_template = other.chat_template.replace("assistant", "model")
    with pytest.raises(InputError, match="chat template differs"):
        CachedTeacher(cache, other)
    grown = copy.deepcopy(setting.tokenizer)
    grown.add_tokens(["<|new|>"])
    with pytest.raises(InputError, match="vocabulary differs"):
        CachedTeacher(cache, grown)
    assert print_tokenizer(setting.tokenizer) == print_tokenizer(copy.deepcopy(setting.tokenizer))


def test_another_teacher_is_refused_and_a_saved_copy_is_not(
    setting: Setting, tmp_path: Path
) -> None:
    cache = Cache(setting.folder)
    setting.teacher.model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    cache.check_teacher(print_teacher(again), "copy")
    again.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1e-3
    with pytest.raises(InputError, match=r"another teacher \(tiny\) than copy: the weights differ"):
        cache.check_teacher(print_teacher(again), "copy")
    again.config.rms_norm_eps = 0.5
    with pytest.raises(InputError, match="configuration differs"):
        cache.check_teacher(print_teacher(again), "copy")


@pytest.fixture
def damaged(setting: Setting, tmp_path: Path) -> Path:
    return Path(shutil.copytree(setting.folder, tmp_path / "damaged"))


def test_a_truncated_missing_or_overwritten_shard_is_refused(damaged: Path) -> None:
    shard = damaged / "rows-00002.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(InputError, match=r"rows-00002.safetensors is truncated"):
        Cache(damaged)
    shard.write_bytes(b"\xff" * len(data))
    with pytest.raises(InputError, match=r"rows-00002.safetensors is damaged"):
        Cache(damaged)
    shard.unlink()
    with pytest.raises(InputError, match=r"rows-00002.safetensors is missing"):
        Cache(damaged)


def test_a_folder_without_a_whole_manifest_is_refused(damaged: Path, tmp_path: Path) -> None:
    manifest = damaged / MANIFEST
    text = manifest.read_text(encoding="utf-8")
    manifest.write_text(text[: len(text) // 2], encoding="utf-8")
    with pytest.raises(InputError, match="unreadable"):
        Cache(damaged)
    manifest.write_text(text.replace('"format": 1', '"format": 9'), encoding="utf-8")
    with pytest.raises(InputError, match="format 9"):
        Cache(damaged)
    manifest.unlink()
    with pytest.raises(InputError, match="is incomplete"):
        Cache(damaged)
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="not a teacher cache"):
        Cache(tmp_path / "other")
    with pytest.raises(InputError, match="no such cache"):
        Cache(tmp_path / "nothing")


def test_an_interrupted_build_is_refused_and_can_be_continued(
    setting: Setting, tmp_path: Path
) -> None:
    folder = tmp_path / "c"

    def stop(rows: int, total: int, tokens: int) -> None:
        if rows > 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        setting.build(folder, report=stop, shard_bytes=2000)
    assert list(folder.glob("rows-*"))
    with pytest.raises(InputError, match=r"is incomplete.*again, which continues it"):
        Cache(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("rows-*")}
    setting.build(folder)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(folder.glob("rows-*"))) == len(before) + 1
    assert setting.cached(folder).missing(setting.examples) is None


def test_a_folder_that_holds_something_is_kept(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="already contains a cache"):
        setting.build(setting.folder)
    (tmp_path / "note.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="not empty"):
        setting.build(tmp_path)
    assert (tmp_path / "note.txt").read_text(encoding="utf-8") == "mine"


def test_a_full_disk_gives_one_line_before_or_while_writing(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
        with pytest.raises(InputError, match="MB are free"):
            setting.build(tmp_path / "small")
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(TrainingError, match="could not be written"):
            setting.build(tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert [path.name for path in (tmp_path / "full").glob("*")] == [PLAN]
    setting.build(tmp_path / "full")


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_is_what_the_live_teacher_compresses_to(
    setting: Setting, tmp_path: Path, temperature: float
) -> None:
    vocab = len(setting.tokenizer)
    manifest = setting.build(tmp_path / "c", "top_k", 5, temperature=temperature)
    cached = setting.cached(tmp_path / "c")
    batch = Collator(0)(setting.examples[::-1])
    kept = batch["shift_labels"] != -100
    logits = setting.teacher.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits[kept][:, :vocab]
    wanted = kdlosses.TopK.from_logits(logits, 5, temperature)
    found = cached.source(**features(batch))
    # The distance to the most likely token has 11 significant bits; then sums are made 1 again.
    rounding = 2.0**-11 * (wanted.log_probs[:, :1] - wanted.log_probs)
    shift = (wanted.log_probs.exp() * rounding).sum(-1)
    error = (found.log_probs[kept] - wanted.log_probs).abs()
    assert (error <= rounding + shift[:, None] + 1e-5).all()
    tail_error = (found.tail_log_prob[kept] - wanted.tail_log_prob).abs()
    assert (tail_error <= shift + 1e-4).all()
    assert (found.indices[kept] == wanted.indices).float().mean() > 0.99  # near ties may swap
    probs = torch.softmax(logits.double() / temperature, -1)
    mass = probs.topk(5, -1).values.sum(-1).mean()
    assert manifest.kept_mass == pytest.approx(float(mass), abs=1e-6)


def test_all_tokens_kept_give_the_full_loss(setting: Setting, tmp_path: Path) -> None:
    vocab = len(setting.tokenizer)
    manifest = setting.build(tmp_path / "c", "top_k", vocab)
    batch = Collator(0)(setting.examples)
    full = value("forward_kl", setting.teacher.source(**features(batch)), batch, vocab)
    found = setting.cached(tmp_path / "c").source(**features(batch))
    torch.testing.assert_close(value("forward_kl", found, batch, vocab), full)
    assert manifest.kept_mass == pytest.approx(1)
    with pytest.raises(InputError, match="--k 9999"):
        setting.build(tmp_path / "d", "top_k", 9999)


def test_draws_keep_the_teachers_log_probabilities_and_estimate_the_loss(
    setting: Setting, tmp_path: Path
) -> None:
    vocab = len(setting.tokenizer)
    setting.build(tmp_path / "c", "sampled", 4000)
    batch = Collator(0)(setting.examples)
    kept = batch["shift_labels"] != -100
    found = setting.cached(tmp_path / "c").source(**features(batch))
    logits = setting.teacher.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits[kept][:, :vocab]
    log_probs = torch.log_softmax(logits, -1).gather(-1, found.indices[kept])
    torch.testing.assert_close(found.log_probs[kept], log_probs, rtol=0, atol=1e-5)
    full = value("forward_kl", setting.teacher.source(**features(batch)), batch, vocab)
    estimate = value("forward_kl", found, batch, vocab)
    assert float(estimate) == pytest.approx(float(full), rel=0.05)


def test_a_compressed_cache_refuses_other_temperatures_and_unfit_losses(
    setting: Setting, tmp_path: Path
) -> None:
    setting.build(tmp_path / "k", "top_k", 5, temperature=2.0)
    setting.build(tmp_path / "s", "sampled", 5)
    kept, drawn = setting.cached(tmp_path / "k"), setting.cached(tmp_path / "s")
    check_loss(kept, kdlosses.get_loss("forward_kl", temperature=2.0), "cache")
    with pytest.raises(InputError, match="stored at temperature 2"):
        check_loss(kept, kdlosses.get_loss("forward_kl"), "cache")
    with pytest.raises(InputError, match="full distribution"):
        check_loss(kept, kdlosses.get_loss("decoupled_kd", temperature=2.0), "cache")
    check_loss(drawn, kdlosses.get_loss("reverse_kl"), "cache")
    with pytest.raises(InputError, match="draws"):
        check_loss(drawn, kdlosses.get_loss("adaptive_kl"), "cache")
    check_loss(setting.cached(), kdlosses.get_loss("adaptive_kl", temperature=3.0), "cache")


def test_a_teacher_that_cannot_be_split_is_cached_compressed_only(
    setting: Setting, tmp_path: Path
) -> None:
    whole = model(0, len(setting.tokenizer) + 7)
    unsplit = copy.copy(setting)
    unsplit.teacher = FrozenTeacher(whole, HeadSplit(reason="its head is odd"))
    with pytest.raises(InputError, match="--kind top-k"):
        unsplit.build(tmp_path / "c")
    unsplit.build(tmp_path / "c", "top_k", 5)
    setting.build(tmp_path / "d", "top_k", 5)
    batch = features(Collator(0)(setting.examples))
    ours, theirs = (setting.cached(tmp_path / name).source(**batch) for name in "cd")
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=0, atol=1e-5)


def test_scale_soft_cap_and_bias_of_the_head_are_kept(setting: Setting, tmp_path: Path) -> None:
    torch.manual_seed(0)
    capped = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=len(setting.tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            final_logit_softcapping=3.0,
            initializer_range=0.5,
        )
    ).eval()
    other = copy.copy(setting)
    other.teacher = FrozenTeacher(capped, find_split(capped))
    other.build(tmp_path / "c")
    batch = Collator(0)(setting.examples)
    source = setting.cached(tmp_path / "c").source(**features(batch))
    assert source.softcap == 3.0
    live = other.teacher.source(**features(batch))
    found, wanted = (value("reverse_kl", s, batch, len(setting.tokenizer)) for s in (source, live))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_a_bfloat16_cache_is_half_as_large_and_close(setting: Setting, tmp_path: Path) -> None:
    half = copy.copy(setting)
    rounded = model(0, len(setting.tokenizer) + 7).bfloat16()
    half.teacher = FrozenTeacher(rounded, find_split(rounded))
    manifest = half.build(tmp_path / "c")
    whole = Cache(setting.folder).manifest
    sizes = [sum(f.bytes for f in m.shards) / m.tokens for m in (manifest, whole)]
    assert sizes[0] < 0.7 * sizes[1]
    batch = Collator(0)(setting.examples)
    found = setting.cached(tmp_path / "c").source(**features(batch))
    assert found.hidden.dtype == torch.float32
    live = setting.teacher.source(**features(batch))
    a, b = (value("forward_kl", s, batch, len(setting.tokenizer)) for s in (found, live))
    assert float(a) == pytest.approx(float(b), rel=0.02)


def train(setting: Setting, teacher: Any, folder: Path, batch: int, steps: int = 6) -> Any:
    trainer = DistillTrainer(
        model=model(1, len(setting.tokenizer)),
        teacher=teacher,
        loss=kdlosses.get_loss("forward_kl_chunked", compiled=False),
        args=bare_arguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=1e-3,
            logging_steps=1,
        ),
        data_collator=Collator(0),
        train_dataset=setting.examples,
        eval_dataset=setting.examples,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("batch", [2, 5])
def test_training_and_evaluation_with_the_cache_are_those_with_the_teacher(
    setting: Setting, tmp_path: Path, batch: int
) -> None:
    live = train(setting, copy.deepcopy(setting.teacher.model), tmp_path / "a", batch)
    cached = train(setting, setting.cached(), tmp_path / "b", batch)
    for ours, theirs in zip(live.state.log_history, cached.state.log_history, strict=True):
        for key in ("loss", "kd_loss", "grad_norm"):
            if key in ours:
                assert theirs[key] == pytest.approx(ours[key], rel=1e-5)
    a, b = live.evaluate(), cached.evaluate()
    for key in ("eval_forward_kl", "eval_reverse_kl", "eval_top1_agreement", "eval_loss"):
        assert b[key] == pytest.approx(a[key], rel=1e-5)


def test_without_a_teacher_to_evaluate_with_the_measures_are_null(
    setting: Setting, tmp_path: Path
) -> None:
    setting.build(tmp_path / "c", "top_k", 5)
    trainer = train(setting, setting.cached(tmp_path / "c"), tmp_path / "run", 4)
    assert all(math.isfinite(x["kd_loss"]) for x in trainer.state.log_history if "kd_loss" in x)
    trainer.eval_teacher = None
    found = trainer.evaluate()
    assert found["eval_ce"] > 0
    assert found["eval_forward_kl"] is found["eval_loss"] is None
