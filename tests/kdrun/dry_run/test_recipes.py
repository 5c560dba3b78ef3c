"""Recipes in a dry run, with local configurations of the shapes that they name.

The tables of memory in docs/recipes/README.md are what this prints:

    pytest -s tests/kdrun/dry_run/test_recipes.py
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, LlamaConfig, PreTrainedTokenizerFast

from kdrun.config.load import load_config
from kdrun.dry_run.report import DryRun, dry_run

RECIPES = Path(__file__).parents[3] / "docs" / "recipes"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' + eos_token + ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def llama(width: int, inner: int, layers: int, heads: int, tied: bool) -> Any:
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        tie_word_embeddings=tied,
    )


def qwen(width: int, inner: int, layers: int, heads: int) -> Any:
    """Qwen2 but for its name, for which transformers would rebuild the tokenizer."""
    return LlamaConfig(
        vocab_size=151936,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        attention_bias=True,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )


def smollm(layers: int) -> Any:
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )


SHAPES: dict[str, tuple[Callable[[], Any], int]] = {
    "meta-llama/Llama-3.1-8B-Instruct": (lambda: llama(4096, 14336, 32, 32, False), 128256),
    "meta-llama/Llama-3.2-1B-Instruct": (lambda: llama(2048, 8192, 16, 32, True), 128256),
    "meta-llama/Llama-3.2-3B-Instruct": (lambda: llama(3072, 8192, 28, 24, True), 128256),
    "Qwen/Qwen2-1.5B-Instruct": (lambda: qwen(1536, 8960, 28, 12), 151646),
    "runs/qwen2-1.5b-gsm8k/student": (lambda: qwen(1536, 8960, 28, 12), 151646),
    "Qwen/Qwen2-0.5B-Instruct": (lambda: qwen(896, 4864, 24, 14), 151646),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (lambda: smollm(30), 49152),
    "smollm2-10-layers": (lambda: smollm(10), 49152),
}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Makes a folder with the configuration and a tokenizer of a model, without weights."""
    folder = tmp_path_factory.mktemp("shapes")

    def make(name: str) -> str:
        place = folder / name.replace("/", "-")
        if not place.is_dir():
            shape, tokens = SHAPES[name]
            shape().save_pretrained(place)
            words = {f"w{i}": i for i in range(tokens - 2)} | {
                "<pad>": tokens - 2,
                "</s>": tokens - 1,
            }
            inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
            inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=inner, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
            )
            tokenizer.chat_template = TEMPLATE
            tokenizer.save_pretrained(place)
        assert AutoConfig.from_pretrained(place).vocab_size >= SHAPES[name][1]
        return str(place)

    return make


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that pack into exactly 256 tokens, and so into 512 and 1024."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    draw = random.Random(0)
    with open(file, "w", encoding="utf-8") as stream:
        for _ in range(200):
            words = [f"w{draw.randrange(40000)}" for _ in range(124)]
            row = {"prompt": " ".join(words[:40]), "response": " ".join(words[40:])}
            stream.write(json.dumps(row) + "\n")
    return file


@pytest.fixture(scope="module")
def planned(local: Callable[[str], str], rows: Path) -> Callable[..., DryRun]:
    def plan(recipe: str, device: str, processes: int | None = None) -> DryRun:
        file = RECIPES / f"{recipe}.yaml"
        named = load_config(file).model
        given: list[tuple[str, Any]] = [("data.train", str(rows)), ("data.cache_dir", "none")]
        given.append(("model.student", local(named.student)))
        if named.teacher not in (None, "self"):
            given.append(("model.teacher", local(named.teacher)))
        return dry_run(load_config(file, given), device, processes)

    return plan


def show(size: float | None) -> str:
    """As the tables of the recipes show it."""
    if not size:
        return "none"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def columns_of(found: DryRun) -> dict[str, str]:
    memory = found.memory
    tokens = f"{found.rows_per_step} rows of a step, up to {found.longest} tokens"
    return {"tokens": tokens} | {
        name: show(part) for name, part in (*memory.items(), ("total", found.total))
    }


def table_below(heading: str) -> dict[str, list[str]]:
    """The rows of the first table after a line that begins so."""
    lines = (RECIPES / "README.md").read_text(encoding="utf-8").split(heading)[1].splitlines()
    rows = {}
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = cells
    return rows


COLUMNS = (
    "llama3_1_8b_to_llama3_2_1b",
    "llama3_1_8b_to_llama3_2_3b_qlora",
    "qwen2_1_5b_fine_tune",
    "qwen2_1_5b_to_0_5b",
    "smollm2_cpu",
)


@pytest.mark.parametrize("recipe", sorted(file.stem for file in RECIPES.glob("*.yaml")))
def test_every_recipe_fits_and_none_trains_16_bit_weights_in_full(
    planned: Callable[..., DryRun], recipe: str
) -> None:
    config = load_config(RECIPES / f"{recipe}.yaml")
    device = "cpu" if recipe.endswith("cpu") else "rtx4090"
    found = planned(recipe, device, 4 if config.training.fsdp else None)
    if config.lora.rank is None:
        assert config.model.student_dtype is None
        whole = 4 * found.student.parameters
        assert found.student.weights == whole
        assert found.student.trained_weights == whole
    if device != "cpu":
        assert found.device.memory is not None
        assert found.total < 0.9 * found.device.memory
    cells = columns_of(found)
    print(recipe, cells)
    if recipe in COLUMNS:
        for name, row in table_below("| | Llama 3.1 to 3.2 |").items():
            assert row[COLUMNS.index(recipe)] == cells.get(name, "none"), name


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_the_table_of_sharded_models_is_what_the_dry_run_says(
    planned: Callable[..., DryRun], processes: int
) -> None:
    found = planned("llama3_1_8b_to_llama3_2_1b_fsdp", "rtx4090", processes)
    cells = columns_of(found)
    print(processes, cells)
    for name, row in table_below("| on each GPU |").items():
        assert row[[2, 4, 8].index(processes)] == cells[name], name
