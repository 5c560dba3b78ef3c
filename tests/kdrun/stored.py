"""Tiny checkpoints whose weights are quantised already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
_FP8 = torch.finfo(torch.float8_e4m3fn).max
_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def say_quantised(folder: Path, **settings: Any) -> None:
    """Write a quantisation into a configuration."""
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    config["quantization_config"] = settings
    (folder / _CONFIG).write_text(json.dumps(config), encoding="utf-8")


def rewrite(folder: Path, change: Any) -> dict[str, torch.Tensor]:
    """Replace weights; returns the values that the new ones stand for."""
    stored: dict[str, torch.Tensor] = {}
    values = {}
    for name, weight in load_file(folder / _WEIGHTS).items():
        made = change(name, weight)
        stored |= {name: weight} if made is None else made[0]
        values[name] = weight if made is None else made[1]
    save_file(stored, folder / _WEIGHTS, metadata={"format": "pt"})
    return values


def to_fp8(folder: Path) -> dict[str, torch.Tensor]:
    """Store linear layers as DeepSeek's FP8 checkpoints do: one scale per 128 x 128 weights."""

    def change(name: str, weight: torch.Tensor) -> Any:
        if "proj" not in name:
            return None
        rows, columns = weight.shape
        blocks = weight.view(rows // 128, 128, columns // 128, 128)
        scales = blocks.abs().amax((1, 3)) / _FP8
        spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        small = (weight / spread).to(torch.float8_e4m3fn)
        return {name: small, f"{name}_scale_inv": scales}, small.float() * spread

    values = rewrite(folder, change)
    say_quantised(
        folder,
        quant_method="fp8",
        weight_block_size=[128, 128],
        activation_scheme="dynamic",
        fmt="e4m3",
    )
    return values


def to_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """Store gpt-oss's experts as its checkpoints do: 4 bits and a power of 2 per 32 weights."""

    def change(name: str, weight: torch.Tensor) -> Any:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return None
        turned = weight.transpose(1, 2).contiguous()  # [experts, out, in]
        blocks = turned.view(*turned.shape[:2], -1, 32)
        powers = (blocks.abs().amax(-1, keepdim=True) / 6).log2().ceil()
        scaled = blocks / 2**powers
        nearest = (scaled.abs().unsqueeze(-1) - _FP4).abs().argmin(-1)
        codes = nearest + 8 * (scaled < 0)
        packed = (codes[..., ::2] | (codes[..., 1::2] << 4)).to(torch.uint8)
        values = (_FP4[nearest] * scaled.sign() * 2**powers).view_as(turned).transpose(1, 2)
        scales = (powers.squeeze(-1) + 127).to(torch.uint8)
        return {f"{name}_blocks": packed, f"{name}_scales": scales}, values

    values = rewrite(folder, change)
    say_quantised(folder, quant_method="mxfp4", modules_to_not_convert=["lm_head"])
    return values


def to_compressed_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Store linear layers in 4 bits with one scale per 64 weights, by compressed-tensors itself."""
    import transformers
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
    )

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    kept = {name: weight.clone() for name, weight in model.state_dict().items()}
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 64,
    }
    config = QuantizationConfig(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head"],
        format="pack-quantized",
        quantization_status="frozen",
    )
    apply_quantization_config(model, config)
    for name, module in model.named_modules():
        if not hasattr(module, "weight_scale"):
            continue
        blocks = module.weight.detach().reshape(len(module.weight), -1, 64)
        scales = blocks.abs().amax(-1) / 7
        module.weight_scale.data = scales
        module.quantization_status = QuantizationStatus.FROZEN
        rounded = (blocks / scales.unsqueeze(-1)).round().clamp(-8, 7) * scales.unsqueeze(-1)
        kept[f"{name}.weight"] = rounded.view_as(module.weight)
    compressor = ModelCompressor.from_pretrained_model(model, "pack-quantized")
    compressor.compress_model(model)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})
    compressor.update_config(str(folder))
    return kept


def to_bitsandbytes(folder: Path) -> dict[str, torch.Tensor]:
    """Store linear layers in nf4, as transformers saves a model that was loaded so."""
    import bitsandbytes
    import transformers

    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=settings
    )
    values = {}
    for name, weight in model.named_parameters():
        state = getattr(weight, "quant_state", None)
        whole = weight if state is None else bitsandbytes.functional.dequantize_4bit(weight, state)
        values[name] = whole.detach().clone()
    model.save_pretrained(folder)
    return values
