"""A whole run."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from deme_diffusion.config.analysis import AnalyzeSettings
from deme_diffusion.config.base import NonNegative, Positive, Settings
from deme_diffusion.config.evaluation import DIGITS_CNN, ClipSettings, EvaluateSettings, ExtractorSettings
from deme_diffusion.config.inputs import CacheSettings, DataSettings, ModelSettings, SimilaritySettings
from deme_diffusion.config.merging import MergeSettings
from deme_diffusion.config.training import DecoupleSettings, PretrainSettings

NO_LORA = ("ddpm", "dit")
"""Families whose stock pipelines have no `load_lora_weights`."""


class RuntimeSettings(Settings):
    """What changes no result but its last bits, and what serving costs; it stays out of all other digests."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="one of several GPUs: CUDA_VISIBLE_DEVICES")
    jobs: Positive = Field(1, description="experts trained at once, each in its own process")
    deterministic: bool = Field(
        False,
        description="on a GPU: bit-identical when run again on the same kind, at some cost in speed; torch refuses "
        "what it cannot run so, and does not know of use_8bit_adam's kernels",
    )
    compile: bool = Field(False, description="torch.compile the student, the teacher and the sampled model")
    channels_last: bool = Field(False, description="memory format of convolutions, faster on GPUs in half precision")
    gradient_checkpointing: bool = Field(False, description="activations computed anew: less memory, more time")
    offload_ema: bool = Field(False, description="the moving average in CPU memory")
    threads: NonNegative = Field(0, description="CPU threads of a process; 0 divides the cores among the jobs")
    dataloader_num_workers: NonNegative = 0
    checkpointing_steps: Positive = 500
    checkpoints_total_limit: Positive = 1
    logging_steps: Positive = 50
    preview_steps: NonNegative = Field(0, description="steps between preview grids; 0 is off")
    sample_batch_size: Positive = 256
    cache_images_gb: float = Field(4.0, ge=0.0, description="prepared images are stored up to it, else decoded anew")
    resident_experts: Positive = Field(8, description="most experts of an ensemble in memory at once")


class Recipe(Settings):
    """A whole run. `seeds` are training seeds: each repeats everything that is random, and the table shows spread."""

    name: str = Field("recipe", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    demonstration: bool = Field(False, description="label the run as a demonstration, not evidence")
    seeds: tuple[NonNegative, ...] = Field((0,), min_length=1)
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    cache: CacheSettings = CacheSettings()
    pretrain: PretrainSettings = PretrainSettings()
    extractor: ExtractorSettings = ExtractorSettings(pretrained=DIGITS_CNN)
    clip: ClipSettings = ClipSettings()
    similarity: SimilaritySettings = SimilaritySettings()
    decouple: DecoupleSettings = DecoupleSettings()
    merge: MergeSettings = MergeSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    analyze: AnalyzeSettings = AnalyzeSettings()
    runtime: RuntimeSettings = RuntimeSettings()

    @model_validator(mode="before")
    @classmethod
    def _digits_have_a_classifier(cls, values: Any) -> Any:
        """`extractor.pretrained` where it is not said: the packaged classifier is for the digits alone."""
        if not isinstance(values, dict):
            return values
        data, extractor = values.get("data", {}), values.get("extractor", {})
        source = data.get("source", "digits") if isinstance(data, dict) else getattr(data, "source", None)
        if not isinstance(extractor, dict):
            return values
        packaged = source == "digits" and extractor.get("kind", "classifier") == "classifier"
        return {**values, "extractor": {"pretrained": DIGITS_CNN if packaged else None, **extractor}}

    @model_validator(mode="after")
    def _extractor_fits_the_source(self) -> Self:
        if self.extractor.pretrained == DIGITS_CNN and self.data.source != "digits":
            raise ValueError(
                f"extractor.pretrained: {DIGITS_CNN} is for the digits, not for data.source={self.data.source}; null "
                "trains a classifier on the labels, extractor.kind=inception needs none"
            )
        return self

    @model_validator(mode="after")
    def _family_agrees(self) -> Self:
        family, changed = self.model.family, self.model.changed()
        if self.model.latent and self.model.pretrained is None:
            raise ValueError(f"model.pretrained: family {family} is not trained from scratch here; name a base")
        if not self.model.latent and (idle := [k for k in ("encoder_dtype",) if k in changed]):
            raise ValueError(f"model.{idle[0]}: family {family} has no encoder; leave it out")
        if not self.model.latent and (idle := list(self.cache.changed())):
            raise ValueError(f"cache.{idle[0]}: family {family} has no latents to keep; leave it out")
        if family == "stable_diffusion_xl" and self.data.crop == "random":
            raise ValueError(f"data.crop=random: family {family} would be told of whole images; set data.crop=center")
        if self.model.takes == "nothing" and self.decouple.proportion_empty_prompts:
            raise ValueError(f"decouple.proportion_empty_prompts: family {family} takes no prompts; leave it 0")
        return self

    @model_validator(mode="after")
    def _lora_agrees(self) -> Self:
        merge, family = self.merge, self.model.family
        if self.decouple.lora_rank is None:
            if said := [name for name in ("lora_rank", "fuse") if name in merge.changed()]:
                raise ValueError(f"merge.{said[0]}: the experts are no LoRAs; set decouple.lora_rank, or leave it out")
            return self
        if merge.fuse and merge.lora_rank is not None:
            raise ValueError("merge.lora_rank: a fused model has no rank; leave out one of lora_rank and fuse")
        if not merge.fuse and merge.max_shard_size is not None:
            raise ValueError("merge.max_shard_size: a merged LoRA is one small file; leave it out, or set merge.fuse")
        merged = merge.method != "none" or {"soup", "all-timesteps-searched"} & set(self.evaluate.controls)
        if family in NO_LORA and merged and not merge.fuse:
            raise ValueError(f"merge.fuse: stock pipelines of family {family} load no LoRA; set merge.fuse=true")
        return self

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        weights, ranges = self.merge.weights, self.decouple.num_ranges
        if weights is not None and len(weights) != ranges:
            raise ValueError(f"merge.weights has {len(weights)} values for decouple.num_ranges={ranges}")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)} holds one seed twice")
        if "all-timesteps-searched" in self.evaluate.controls and "all-timesteps" not in self.evaluate.controls:
            raise ValueError("evaluate.controls: all-timesteps-searched needs all-timesteps beside it")
        if self.decouple.init == "ema" and self.model.pretrained is None:
            made = "are their average already" if self.pretrain.use_ema else "have no average (pretrain.use_ema=false)"
            raise ValueError(f"decouple.init=ema: the base is pretrained here, and its weights {made}; use pretrained")
        if self.decouple.multi_task == "nash" and self.runtime.compile:
            raise ValueError("decouple.multi_task=nash takes several gradients of one graph: runtime.compile=false")
        if self.data.caption_column is not None and self.model.takes != "text":
            raise ValueError(f"data.caption_column: family {self.model.family} takes no captions; leave it null")
        return self
