"""Which causal language models are split into backbone and head; writes docs/architectures.md.

    python tests/kdrun/architectures.py docs/architectures.md

Every class that AutoModelForCausalLM maps is built with random weights in a small configuration.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from shrink import VOCAB, model_class, small_config
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as MODEL_CLASSES,
)

from kdrun.models.heads import HeadSplit, find_split

OUTCOMES = {
    "split": ("Split", "backbone"),
    "fallback": ("Fallback to logits", "reason"),
    "not built": ("Not built", "reason"),
}
_MOST_WEIGHTS = 10_000_000

_INTRODUCTION = """\
# Models that are split

With a `_chunked` loss, kdrun splits a model into its backbone and its output head, so that its
logits are never stored in full. Before training it checks on the model itself that the head is a
linear layer on the backbone's last hidden states, and that the scale and soft cap of its logits are
known. A model that does not pass falls back: it computes its own logits. The loss and its
gradients are the same, but the memory for the logits is not saved.

`AutoModelForCausalLM` of transformers {version} maps {types} model types: {split} are split,
{fallback} fall back, and {not_built} were not built. For each that was built, with random weights
in a small configuration, plain and chunked losses and gradients agree. The tables are written by

```bash
python tests/kdrun/architectures.py docs/architectures.md
```

and `pytest tests/kdrun/models/test_architectures.py` compares them with what it finds.
"""
_TRAINS_ONLY_IN_TRAIN_MODE = {"reformer"}

NOT_BUILDABLE = {
    "gemma3n": "its vision part needs the package timm",
    "gemma4_assistant": "it drafts from the states of another model and takes no token ids",
    "gemma4_unified_assistant": "it drafts from the states of another model and takes no token ids",
    "musicgen": "it predicts several audio codes for each position",
    "musicgen_melody": "it predicts several audio codes for each position",
}


@dataclass(frozen=True)
class Finding:
    """What became of a model type: ``split``, ``fallback`` or ``not built``, and where or why."""

    model_type: str
    class_name: str
    outcome: str
    detail: str

    @property
    def row(self) -> str:
        """Line of the page's table."""
        return f"| `{self.model_type}` | `{self.class_name}` | {self.detail} |"


def build(model_type: str, seed: int) -> Any:
    """Build a small random model of a type, in eval mode or without dropout."""
    config = small_config(model_type)
    with torch.device("meta"):  # what does not shrink must not take all memory
        weights = sum(p.numel() for p in model_class(model_type)(config).parameters())
    assert weights < _MOST_WEIGHTS, f"{model_type} did not shrink: {weights:,} weights"
    torch.manual_seed(seed)
    model = model_class(model_type)(config).train(model_type in _TRAINS_ONLY_IN_TRAIN_MODE)
    with torch.no_grad():  # with weights of the default scale, all logits are alike
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return model


def rows() -> dict[str, torch.Tensor]:
    """Two rows of token ids, the second one padded."""
    ids = torch.randint(4, VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def describe(model_type: str, split: HeadSplit) -> Finding:
    """Describe the split of a model that could be built."""
    name = MODEL_CLASSES[model_type]
    if split.reason is not None:
        return Finding(model_type, name, "fallback", split.reason)
    return Finding(model_type, name, "split", f"`{split.backbone}`")


def examine(model_type: str) -> Finding:
    """Build a model and find its split."""
    if model_type in NOT_BUILDABLE:
        reason = NOT_BUILDABLE[model_type]
        return Finding(model_type, MODEL_CLASSES[model_type], "not built", reason)
    return describe(model_type, find_split(build(model_type, 0)))


def page(findings: list[Finding]) -> str:
    """Return the page in Markdown."""
    chosen = {
        outcome: [finding for finding in findings if finding.outcome == outcome]
        for outcome in OUTCOMES
    }
    lines = _INTRODUCTION.format(
        version=transformers.__version__,
        types=len(findings),
        split=len(chosen["split"]),
        fallback=len(chosen["fallback"]),
        not_built=len(chosen["not built"]),
    ).splitlines()
    for outcome, (title, column) in OUTCOMES.items():
        lines += ["", f"## {title}", "", f"| model type | class | {column} |", "|---|---|---|"]
        lines += [finding.row for finding in chosen[outcome]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found = [examine(model_type) for model_type in MODEL_CLASSES]
    Path(sys.argv[1]).write_text(page(found), encoding="utf-8")
