"""Knowledge-distillation losses, each defined by one small function for all variants.

The public names are imported on first use, so that listing losses does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdlosses import testing as testing
    from kdlosses.compressed import Sampled as Sampled
    from kdlosses.compressed import TopK as TopK
    from kdlosses.definition import state_variable as state_variable
    from kdlosses.divergence import Divergence as Divergence
    from kdlosses.divergence import Loss as Loss
    from kdlosses.divergence import RowLoss as RowLoss
    from kdlosses.engine.plan import automatic_chunk_size as automatic_chunk_size
    from kdlosses.feature_registry import BrokenFeatureError as BrokenFeatureError
    from kdlosses.feature_registry import FeatureRef as FeatureRef
    from kdlosses.feature_registry import FeatureSpecError as FeatureSpecError
    from kdlosses.feature_registry import available_features as available_features
    from kdlosses.feature_registry import build_feature as build_feature
    from kdlosses.feature_registry import feature_files as feature_files
    from kdlosses.feature_registry import find_feature as find_feature
    from kdlosses.feature_registry import get_features as get_features
    from kdlosses.feature_registry import ignored_features as ignored_features
    from kdlosses.feature_registry import parse_features as parse_features
    from kdlosses.feature_term import FeatureTerm as FeatureTerm
    from kdlosses.feature_term import Hidden as Hidden
    from kdlosses.hidden_loss import FeatureLoss as FeatureLoss
    from kdlosses.hidden_loss import HiddenLoss as HiddenLoss
    from kdlosses.hidden_loss import RelationLoss as RelationLoss
    from kdlosses.layer_map import LayerMapError as LayerMapError
    from kdlosses.layer_map import layer_pairs as layer_pairs
    from kdlosses.measures import Measures as Measures
    from kdlosses.measures import calibration_error as calibration_error
    from kdlosses.measures import measure as measure
    from kdlosses.objective import KDObjective as KDObjective
    from kdlosses.objective import KDOutput as KDOutput
    from kdlosses.plugins import PluginGroup as PluginGroup
    from kdlosses.plugins import PluginRef as PluginRef
    from kdlosses.registry import BrokenLossError as BrokenLossError
    from kdlosses.registry import LossRef as LossRef
    from kdlosses.registry import LossSpecError as LossSpecError
    from kdlosses.registry import available_losses as available_losses
    from kdlosses.registry import find_loss as find_loss
    from kdlosses.registry import get_loss as get_loss
    from kdlosses.registry import ignored_losses as ignored_losses
    from kdlosses.registry import loss_files as loss_files
    from kdlosses.registry import one_term as one_term
    from kdlosses.registry import parse_spec as parse_spec
    from kdlosses.schedules import Constant as Constant
    from kdlosses.schedules import Cosine as Cosine
    from kdlosses.schedules import Linear as Linear
    from kdlosses.schedules import Schedule as Schedule
    from kdlosses.schedules import Step as Step
    from kdlosses.sources import Logits as Logits
    from kdlosses.sources import Projected as Projected
    from kdlosses.sources import VocabParallel as VocabParallel
    from kdlosses.terms import Term as Term
    from kdlosses.token_loss import TokenLoss as TokenLoss
    from kdlosses.token_weight import TokenWeight as TokenWeight
    from kdlosses.token_weight import TokenWeighting as TokenWeighting
    from kdlosses.weight_registry import BrokenWeightError as BrokenWeightError
    from kdlosses.weight_registry import WeightRef as WeightRef
    from kdlosses.weight_registry import WeightSpecError as WeightSpecError
    from kdlosses.weight_registry import available_weights as available_weights
    from kdlosses.weight_registry import find_weight as find_weight
    from kdlosses.weight_registry import get_weight as get_weight
    from kdlosses.weight_registry import weight_files as weight_files

_HOME = {
    "BrokenFeatureError": "feature_registry",
    "BrokenLossError": "registry",
    "BrokenWeightError": "weight_registry",
    "Constant": "schedules",
    "Cosine": "schedules",
    "Divergence": "divergence",
    "FeatureLoss": "hidden_loss",
    "FeatureRef": "feature_registry",
    "FeatureSpecError": "feature_registry",
    "FeatureTerm": "feature_term",
    "Hidden": "feature_term",
    "HiddenLoss": "hidden_loss",
    "KDObjective": "objective",
    "KDOutput": "objective",
    "LayerMapError": "layer_map",
    "Linear": "schedules",
    "Logits": "sources",
    "Loss": "divergence",
    "LossRef": "registry",
    "LossSpecError": "registry",
    "Measures": "measures",
    "PluginGroup": "plugins",
    "PluginRef": "plugins",
    "Projected": "sources",
    "RelationLoss": "hidden_loss",
    "RowLoss": "divergence",
    "Sampled": "compressed",
    "Schedule": "schedules",
    "Step": "schedules",
    "Term": "terms",
    "TokenLoss": "token_loss",
    "TokenWeight": "token_weight",
    "TokenWeighting": "token_weight",
    "TopK": "compressed",
    "WeightRef": "weight_registry",
    "WeightSpecError": "weight_registry",
    "VocabParallel": "sources",
    "automatic_chunk_size": "engine.plan",
    "available_features": "feature_registry",
    "available_losses": "registry",
    "available_weights": "weight_registry",
    "build_feature": "feature_registry",
    "calibration_error": "measures",
    "feature_files": "feature_registry",
    "find_feature": "feature_registry",
    "find_loss": "registry",
    "find_weight": "weight_registry",
    "get_features": "feature_registry",
    "get_loss": "registry",
    "get_weight": "weight_registry",
    "ignored_features": "feature_registry",
    "ignored_losses": "registry",
    "layer_pairs": "layer_map",
    "loss_files": "registry",
    "measure": "measures",
    "one_term": "registry",
    "parse_features": "feature_registry",
    "parse_spec": "registry",
    "state_variable": "definition",
    "weight_files": "weight_registry",
}

__all__ = sorted([*_HOME, "testing"])


def __getattr__(name: str) -> Any:
    if name == "testing":
        return import_module("kdlosses.testing")
    if name not in _HOME:
        raise AttributeError(f"module 'kdlosses' has no attribute {name!r}")
    return getattr(import_module(f"kdlosses.{_HOME[name]}"), name)
