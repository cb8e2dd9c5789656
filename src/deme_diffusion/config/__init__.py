"""Every stage's settings: frozen, typed, refusing unknown keys by the nearest name; YAML in, YAML out. No torch.

A recipe is one `Recipe`. Settings that diffusers' scripts have keep their names there. Every technique has an off
value, so an ablation is one override.
"""

from deme_diffusion.config.analysis import FIGURES, AnalyzeSettings, FigureName
from deme_diffusion.config.base import Settings
from deme_diffusion.config.evaluation import (
    ClipSettings,
    EvaluateSettings,
    ExtractorSettings,
    LossSettings,
    PromptSettings,
    SamplerSettings,
)
from deme_diffusion.config.inputs import (
    FLOW,
    TAKES,
    AugmentSettings,
    CacheSettings,
    DataSettings,
    ModelSettings,
    ScheduleSettings,
    SimilaritySettings,
    UNetSettings,
)
from deme_diffusion.config.merging import MergeSettings, MethodName, MethodOptions
from deme_diffusion.config.recipe import Recipe, RuntimeSettings
from deme_diffusion.config.training import DecoupleSettings, PretrainSettings, TrainSettings

__all__ = [
    "FIGURES",
    "FLOW",
    "TAKES",
    "AnalyzeSettings",
    "AugmentSettings",
    "CacheSettings",
    "ClipSettings",
    "DataSettings",
    "DecoupleSettings",
    "EvaluateSettings",
    "ExtractorSettings",
    "FigureName",
    "LossSettings",
    "MergeSettings",
    "MethodName",
    "MethodOptions",
    "ModelSettings",
    "PretrainSettings",
    "PromptSettings",
    "Recipe",
    "RuntimeSettings",
    "SamplerSettings",
    "ScheduleSettings",
    "Settings",
    "SimilaritySettings",
    "TrainSettings",
    "UNetSettings",
]
