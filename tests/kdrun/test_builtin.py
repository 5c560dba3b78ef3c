import json
import math
import subprocess
import sys
import sysconfig
from collections import Counter

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kdrun.builtin import DEFAULTS, STUDENT_DIR, TEACHER_DIR
from kdrun.builtin.text import (
    is_held_out,
    load_text,
    normalised,
    paragraphs,
    split_topics,
    standard_library_docstrings,
)
from kdrun.data.windows import TextWindows, concatenate
from kdrun.errors import InputError
from kdrun.models import build_builtin as build


@pytest.fixture(scope="module")
def text():
    return load_text()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TEACHER_DIR)


def keys(texts):
    return [normalised(block) for document in texts for block in paragraphs(document)]


# The text


def test_no_paragraph_stands_on_both_sides_or_twice_on_one(text):
    train, held_out = keys(text.train), keys(text.held_out)
    assert set(train).isdisjoint(held_out)
    assert len(train) == len(set(train))
    assert len(held_out) == len(set(held_out))
    assert all(document.strip() for document in text.train + text.held_out)


def test_both_sides_are_large_enough_to_be_of_use(text):
    held_out, train = sum(map(len, text.held_out)), sum(map(len, text.train))
    assert held_out > 20_000
    assert train > 200_000


def test_the_split_depends_on_the_name_alone():
    assert [n for n in ("while", "with", "class", "compound", "import") if is_held_out(n)] == [
        "while",
        "with",
        "class",
    ]
    assert 90 < sum(is_held_out(f"topic {i}") for i in range(1000)) < 150


def test_a_shared_paragraph_is_held_out():
    topics = {
        "compound": "Head.\n\n   while  stands\n   here too.\n \nTail.\n\nTail.\n",
        "while": "Own words.\n\nwhile stands here\ntoo.\n",
        "import": "Tail.\n",
    }
    split = split_topics(topics)
    assert split.held_out == ("Own words.\n\nwhile stands here\ntoo.\n",)
    assert split.train == ("Head.\n\nTail.\n",)


def test_the_text_and_its_hash_are_deterministic(text):
    assert load_text() == text
    topics = {"compound": "One.\n\nTwo.", "while": "Three."}
    first = split_topics(topics)
    assert split_topics(dict(reversed(topics.items()))) == first
    assert split_topics(topics | {"while": "Four."}).sha256 != first.sha256
    assert split_topics(topics | {"compound": "One.\n\nTwo!"}).sha256 != first.sha256


def test_paragraphs_keep_their_indentation():
    assert paragraphs("\n   a\n   b  \n\t\n\n\n  c\n") == ["   a\n   b", "  c"]


def test_a_python_without_topics_is_wrong_input(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(InputError, match="pydoc_data") as caught:
        load_text()
    assert "\n" not in str(caught.value)


def test_docstrings_are_parsed_once_each_and_not_held_out(tmp_path, monkeypatch):
    files = {
        "a.py": '"""Module.\n\nHeld   out.\n"""\nraise RuntimeError\n',
        "b.py": 'class B:\n    r"""Module."""\n    def f(self):\n        """\\d is f."""\n',
        "c.py": 'async def g():\n    "\\d is g."\n    # not this\n',
        "broken.py": "def (:\n",
        "empty.py": "x = 1\n",
        "test/t.py": '"""Test."""',
        "email/tests/t.py": '"""Test."""',
        "site-packages/s.py": '"""Stranger."""',
    }
    for name, source in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    docstrings = standard_library_docstrings(["Held out.\n\nMore."])
    assert docstrings == ("Module.\n", "\\d is f.\n", "\\d is g.\n")


# The pair


def test_the_package_itself_imports_nothing_heavy():
    code = "import sys, kdrun.builtin; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_defaults_are_plain_values():
    assert json.loads(json.dumps(DEFAULTS)).keys() == DEFAULTS.keys()
    assert DEFAULTS["data"]["max_length"] == build.WINDOW


def test_the_pair_is_small():
    files = (*TEACHER_DIR.iterdir(), *STUDENT_DIR.iterdir())
    assert sum(path.stat().st_size for path in files) < 4 * 2**20


def test_teacher_student_and_tokenizer_share_one_vocabulary(tokenizer):
    teacher, student = (AutoConfig.from_pretrained(d) for d in (TEACHER_DIR, STUDENT_DIR))
    assert teacher.vocab_size == student.vocab_size == len(tokenizer)
    for config in (teacher, student):
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.bos_token_id == tokenizer.bos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id


def test_the_sizes_are_as_documented():
    student = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(STUDENT_DIR))
    teacher = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TEACHER_DIR))
    assert round(student.num_parameters() / 1e6, 2) == 0.42
    assert round(teacher.num_parameters() / 1e6, 2) == 1.05


def test_the_configurations_are_the_ones_that_build_writes():
    for folder, config in (
        (TEACHER_DIR, build.teacher_config()),
        (STUDENT_DIR, build.student_config()),
    ):
        stored, built = AutoConfig.from_pretrained(folder).to_dict(), config.to_dict()
        varying = {"dtype", "transformers_version", "_name_or_path"}
        assert {k: v for k, v in stored.items() if k not in varying} == {
            k: v for k, v in built.items() if k not in varying
        }


@pytest.mark.parametrize(
    "string", ["while True:\n    pass\n", "naïve 漢字 🙂", " a  b\t\n\nc ", ""]
)
def test_every_string_comes_back(tokenizer, string):
    ids = tokenizer(string)["input_ids"]
    assert tokenizer.decode(ids) == string
    assert tokenizer.eos_token_id not in ids


def test_a_prompt_is_the_beginning_of_its_dialogue(tokenizer):
    question = [{"role": "user", "content": "What does `with` do?"}]
    answer = [*question, {"role": "assistant", "content": "It wraps a block."}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    dialogue = tokenizer.apply_chat_template(
        answer, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = dialogue["input_ids"], dialogue["assistant_masks"]
    assert ids[: len(prompt)] == prompt
    assert mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    assert tokenizer.decode(ids[len(prompt) :]) == "It wraps a block.<|endoftext|>"


def test_the_teacher_knows_the_held_out_text(text, tokenizer):
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER_DIR, dtype=torch.float32).eval()
    tokens = concatenate(text.held_out, tokenizer)
    measured = build.held_out_cross_entropy(teacher, tokens)
    # No prediction that ignores the context can be better than the text's own frequencies.
    counts = Counter(tokens)
    unigram = -sum(n / len(tokens) * math.log(n / len(tokens)) for n in counts.values())
    assert measured < unigram - 1.5
    record = json.loads((TEACHER_DIR / "BUILD.json").read_text(encoding="utf-8"))
    if record["text_sha256"] == text.sha256:
        assert measured == pytest.approx(record["held_out_ce"], abs=0.005)


def test_held_out_cross_entropy_of_equal_logits_is_the_logarithm_of_the_vocabulary():
    class Uniform:
        def __call__(self, input_ids, use_cache):
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 50)})

    value = build.held_out_cross_entropy(Uniform(), list(range(50)) * 4, length=8, batch_size=3)
    assert value == pytest.approx(math.log(50), abs=1e-6)


def test_build_writes_the_same_pair_twice(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(build, "standard_library_docstrings", lambda held_out: ("Short.\n" * 200,))
    for name in "ab":
        build.main(["--output", str(tmp_path / name), "--steps", "2", "--seed", "3"])
    out, err = capfd.readouterr()
    assert err == ""
    assert out.count("held-out cross-entropy") == 2
    files = {p.relative_to(TEACHER_DIR.parent) for p in TEACHER_DIR.iterdir()}
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    record = json.loads((tmp_path / "a/teacher/BUILD.json").read_text(encoding="utf-8"))
    assert record["steps"] == 2
    assert record["text_sha256"] == load_text().sha256
    assert (tmp_path / "a/student/config.json").is_file()
    assert AutoConfig.from_pretrained(tmp_path / "a/teacher").use_cache


def test_the_shipped_tokenizer_is_the_one_that_build_trains(text, tokenizer):
    record = json.loads((TEACHER_DIR / "BUILD.json").read_text(encoding="utf-8"))
    if record["text_sha256"] != text.sha256:
        pytest.skip("this Python has another text than the one the tokenizer was trained on")
    assert build.train_tokenizer(text.train).get_vocab() == tokenizer.get_vocab()


def test_the_held_out_text_fills_windows(text, tokenizer):
    windows = TextWindows(concatenate(text.held_out, tokenizer), build.WINDOW, phase=False)
    assert len(windows) > 50
