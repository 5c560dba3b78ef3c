"""What the sections of a configuration share: their base, and types of several of them."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

ALL_LINEAR = "all-linear"
BUILT_IN = "builtin"
DType = Literal["float32", "bfloat16", "float16"]
Measure = Literal[
    "eval_loss",
    "eval_ce",
    "eval_kd_loss",
    "eval_forward_kl",
    "eval_reverse_kl",
    "eval_top1_agreement",
    "eval_calibration_error",
]
Precision = Literal["float32", "bf16", "fp16"]


class Section(BaseModel):
    """A section of a configuration: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def require(self, section: str, key: str) -> None:
        """Refuse any other key of this section that is set while ``key`` is null.

        Raises:
            ValueError: one is set; names it.
        """
        if getattr(self, key) is not None:
            return
        for name, field in type(self).model_fields.items():
            if getattr(self, name) != field.default:
                raise ValueError(f"{section}.{name} has no effect without {section}.{key}")
