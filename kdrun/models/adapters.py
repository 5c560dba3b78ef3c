"""Low-rank adapters through peft: adding them to a student, and describing them."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kdrun.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdrun.config.training_sections import LoraConfig

INSTALL_PEFT = "pip install 'kdlosses[lora]'"
# Names of the parts of stacked experts in checkpoints.
_FORMER = {
    "w1": "gate_up_proj",
    "w3": "gate_up_proj",
    "w2": "down_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


def check_peft(config: LoraConfig) -> None:
    """Refuse adapters if peft is not installed, without importing it.

    Raises:
        InputError: peft is not installed; gives the command.
    """
    from importlib.util import find_spec

    if config.rank is not None and find_spec("peft") is None:
        raise InputError(f"lora.rank={config.rank} needs the package peft: {INSTALL_PEFT}")


def add_adapters(
    model: PreTrainedModel,
    config: LoraConfig,
    base: str,
    seed: int,
    revision: str | None = None,
) -> Any:
    """Freeze a model and add trainable adapters to it.

    Args:
        model: the student.
        config: configuration with a rank.
        base: the model's folder or hub id, which is saved with the adapters.
        seed: seed of their initial weights, which depend on nothing else, such as random numbers
            drawn before.
        revision: the base model's revision on the hub, which is saved with the adapters.

    Raises:
        InputError: a layer that does not exist, the output head, or settings that peft does
            not support.
    """
    import peft
    from transformers import set_seed

    modules: str | list[str] = []
    parameters: list[str] = []
    if isinstance(config.target_modules, str):
        modules = config.target_modules
    else:
        modules, parameters = _resolve(model, config.target_modules)
    set_seed(seed)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        use_dora=config.dora,
        task_type="CAUSAL_LM",
    )
    try:
        with without_advice():
            adapted = peft.get_peft_model(model, settings)
    except ValueError as error:  # for example dropout or DoRA on stacked experts
        reason = " ".join(str(error).split())
        raise InputError(
            f"lora: peft cannot add these adapters to the student ({reason}); change lora.dropout, "
            "lora.dora or lora.target_modules"
        ) from error
    for kept in adapted.peft_config.values():
        kept.base_model_name_or_path = base
        kept.revision = revision
    return adapted


def _resolve(model: PreTrainedModel, names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Return what peft should adapt: linear layers by module, experts and routers by parameter.

    Raises:
        InputError: a name is neither, or is the output head.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    others = _experts_and_routers(model)
    modules: list[str] = []
    parameters: list[str] = []
    for wanted in names:
        hit = [m for n, m in linear.items() if n == wanted or n.endswith(f".{wanted}")]
        if any(module is head for module in hit):
            raise InputError(
                f"lora.target_modules: {wanted} is the output head; the losses project with its "
                "own weight, so an adapter on it would not be trained; remove it"
            )
        if hit:
            modules.append(wanted)
        elif wanted in others:
            parameters.append(others[wanted])
        else:
            known = {n.rpartition(".")[2] for n, m in linear.items() if m is not head}
            known |= {name for name in others if name not in _FORMER and "." not in name}
            raise InputError(_no_such_layer(wanted, sorted(known)))
    return modules, list(dict.fromkeys(parameters))


def _experts_and_routers(model: PreTrainedModel) -> dict[str, str]:
    """Return the adaptable parameters of a mixture of experts, by their accepted names.

    Experts are stacked in three-dimensional parameters, and routers are separate modules, so
    neither is a linear layer.
    """
    import torch

    config = model.config.get_text_config()
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if not experts:
        return {}
    found: dict[str, str] = {}
    for name, weight in model.named_parameters():
        owner, _, last = name.rpartition(".")
        if weight.ndim == 3:
            found[last] = last
            inside = f"{owner.rpartition('.')[2]}.{last}"
            found[inside] = inside
        elif last == "weight" and weight.ndim == 2 and weight.shape[0] == experts:
            module = model.get_submodule(owner)
            if not isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                router = owner.rpartition(".")[2]
                found[router] = f"{router}.weight"
    former = {old: new for old, new in _FORMER.items() if new in found}
    return former | found


def _no_such_layer(wanted: str, known: list[str]) -> str:
    close = difflib.get_close_matches(wanted, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
    return f"lora.target_modules: the student has no linear layer {wanted!r}; {hint}"


def describe_adapters(model: Any, config: LoraConfig) -> str:
    """Describe kind, rank, size and places of adapters."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kind = "DoRA" if config.dora else "LoRA"
    tuner = model.base_model
    places = {name.rpartition(".")[2] for name in tuner.targeted_module_names}
    places |= {".".join(name.split(".")[-2:]) for name in tuner.targeted_parameter_names}
    above = "" if config.quantization is None else f" above weights in {config.quantization}"
    return (
        f"adapters: {kind} of rank {config.rank} on {', '.join(sorted(places))}{above}; "
        f"{trained / 1e6:.2f} M parameters are trained"
    )


@contextmanager
def without_advice() -> Iterator[None]:
    """Suppress warnings caused by peft's own calls, in transformers and in peft."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        # About experts, whose ranks peft itself has set.
        warnings.filterwarnings("ignore", ".*_pattern keys did not match", RuntimeWarning)
        yield
