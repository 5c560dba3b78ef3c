"""Low-rank adapters through peft: put on a student, and described."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kdrun.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdrun.config.sections import LoraConfig

INSTALL_PEFT = "pip install 'kdlosses[lora]'"


def check_peft(config: LoraConfig) -> None:
    """Refuse adapters where peft is not installed; it is not imported yet.

    Raises:
        InputError: with the command that installs it.
    """
    from importlib.util import find_spec

    if config.rank is not None and find_spec("peft") is None:
        raise InputError(f"lora.rank={config.rank} needs the package peft: {INSTALL_PEFT}")


def add_adapters(model: PreTrainedModel, config: LoraConfig, base: str, seed: int) -> Any:
    """Freeze a model and put trainable adapters on it.

    Args:
        model: the student.
        config: with a rank.
        base: the model's folder or hub id, which is saved with the adapters.
        seed: of their initial weights. They follow from it alone, whatever random numbers were
            drawn before.

    Raises:
        InputError: a layer that does not exist, or the output head.
    """
    import peft
    from transformers import set_seed

    if isinstance(config.target_modules, tuple):
        _check_names(model, config.target_modules)
    set_seed(seed)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=_as_peft(config),
        use_dora=config.dora,
        task_type="CAUSAL_LM",
    )
    with without_advice():
        adapted = peft.get_peft_model(model, settings)
    for kept in adapted.peft_config.values():
        kept.base_model_name_or_path = base
    return adapted


def _as_peft(config: LoraConfig) -> str | list[str]:
    given = config.target_modules
    return given if isinstance(given, str) else list(given)


def _check_names(model: PreTrainedModel, names: tuple[str, ...]) -> None:
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    last_names = sorted({name.rpartition(".")[2] for name, m in linear.items() if m is not head})
    for wanted in names:
        hit = [m for n, m in linear.items() if n == wanted or n.endswith(f".{wanted}")]
        if any(module is head for module in hit):
            raise InputError(
                f"lora.target_modules: {wanted} is the output head; the losses project with its "
                "own weight, so that an adapter on it would not be trained; leave it out"
            )
        if not hit:
            close = difflib.get_close_matches(wanted, last_names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(last_names)}"
            raise InputError(
                f"lora.target_modules: the student has no linear layer {wanted!r}; {hint}"
            )


def describe_adapters(model: Any, config: LoraConfig) -> str:
    """Kind, rank and size of adapters."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kind = "DoRA" if config.dora else "LoRA"
    return f"adapters: {kind} of rank {config.rank}, {trained / 1e6:.2f} M parameters are trained"


@contextmanager
def without_advice() -> Iterator[None]:
    """Leave out what peft's own calls to transformers bring up: they are not the user's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
