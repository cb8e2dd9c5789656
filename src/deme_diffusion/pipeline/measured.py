"""The stages that measure models: samples, their features and CLIP scores, scores and losses, cost. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deme_diffusion.config import SamplerSettings
from deme_diffusion.data.sources import SplitName
from deme_diffusion.division import Runs, uniform
from deme_diffusion.pipeline import asking, extractors
from deme_diffusion.pipeline.asking import Asking
from deme_diffusion.pipeline.inputs import Input, check_unseen
from deme_diffusion.pipeline.models import Models, served_ranges
from deme_diffusion.pipeline.node import Node, Served

SERVING = ("device", "compile", "channels_last", "threads", "resident_experts")
"""Settings of `runtime` that change what serving costs."""


SERVED_BATCH = 16
"""Images that are sampled at once where serving is measured, or `runtime.sample_batch_size` where that is fewer."""


class Measured(Models):
    """How the rows of a table are measured."""

    published: Input | None
    asking: Asking
    clip: Node | Input | None
    """The model of the CLIP score, where the recipe has one."""
    loss_ranges: list[Runs]
    evaluations: list[tuple[str, int, Node]]
    served: dict[int, list[Served]]
    samples: dict[tuple[str, int], Node]

    def _loss_ranges(self) -> list[Runs]:
        """The ranges that the loss is told by: those that are served, or so many equal ones."""
        count = self.recipe.evaluate.loss_ranges
        if count is None:
            return served_ranges(self.division)
        return served_ranges(uniform(count, self.division.num_timesteps, key="evaluate.loss_ranges"))

    def waiting_for_ranges(self) -> dict[str, Any]:
        """What sets keys apart whose ranges of the loss wait for the division."""
        return self.waiting() if self.recipe.evaluate.loss_ranges is None else {}

    # -- scores and losses -------------------------------------------------------------------------

    def _evaluated(self, served: Served, seed: int) -> None:
        """The measurements of one model, or of real training images, which has no parts."""
        settings = self.recipe.evaluate
        sets = self._sample_sets(served, seed) if served.parts else {"real": None}
        if not served.parts and not self._scores_real_images():
            return
        has_fd = self.asking.measures_fd if served.parts else self.asking.measures_real_fd
        features = {name: self._features_of(name, node) for name, node in sets.items() if has_fd}
        clips = {
            f"clip {name}": self._clip_score(name, node) for name, node in sets.items() if self._is_captioned(node)
        }
        covered: dict[str, Any] = {name: getattr(settings, name) for name in ("neighbours", "density_neighbours")}
        parents: dict[str, Node | Input] = {"reference": self._reference()} if features else {}
        parents |= {**features, **clips}
        parents |= {"published": self.published} if self.published and features else {}
        if served.parts:
            covered |= {"ranges": self.loss_ranges, "loss": settings.loss.changed()}
            covered |= self.waiting_for_ranges()
            parents |= {"data": self.data, **model_parents(served, self.base), **self.cached()}
        arguments = {"served": served, "samples": list(features), "clips": list(clips)}
        label = self._named(f"evaluate {served.name}", seed)
        self.evaluations.append(
            (served.name, seed, self._add("evaluate", label, covered, parents, None, arguments=arguments))
        )

    def _scores_real_images(self) -> bool:
        return self.asking.measures_real_fd or self._is_captioned(None)

    def _sample_sets(self, served: Served, seed: int) -> dict[str, Node | None]:
        """The stages that sample a model, by sampler and number of the set."""
        settings, sets = self.recipe.evaluate, dict[str, Node | None]()
        for sampler in settings.samplers:
            for number in range(settings.sampling_seeds):
                node = self._sample(served, sampler, seed * settings.sampling_seeds + number, seed)
                sets[f"{sampler.label}/{number}"] = node
                self.samples.setdefault((served.name, seed), node)
        return sets

    def _reference(self) -> Node:
        """The features of what images are compared with."""
        asking = self.asking
        if asking.protocol is None or asking.reference is None:
            return self._features("report split", None, "report")
        how = {"side": asking.protocol.side, "fit": asking.protocol.fit}
        # The base says how large the images are that it makes; reference images are as large.
        parents: dict[str, Node | Input] = {
            "extractor": self.extractor,
            "reference": asking.reference,
            "base": self.base,
        }
        label = f"features of {asking.reference.label}"
        arguments = {"split": None, "count": None, "reference": how}
        return self._add("features", label, {"reference": how}, parents, None, arguments=arguments)

    def _features_of(self, name: str, images: Node | None) -> Node:
        if images is None:
            return self._features("training images", None, "train", self.recipe.evaluate.num_images)
        return self._features(images.label.removeprefix("sample "), images)

    def _features(
        self, label: str, images: Node | None, split: SplitName | None = None, count: int | None = None
    ) -> Node:
        """The features of sampled images, or of (the first `count` views of) a real split."""
        parents: dict[str, Node | Input] = {"extractor": self.extractor, "data": self.data}
        covered: dict[str, Any] = {}
        if images is not None:
            parents = {"extractor": self.extractor, "images": images}
        else:
            covered = {"split": split} | ({"count": count} if count else {})
        arguments = {"split": split, "count": count}
        return self._add("features", f"features of {label}", covered, parents, None, arguments=arguments)

    def _sample(self, served: Served, sampler: SamplerSettings, sampling_seed: int, seed: int) -> Node:
        count = self.recipe.evaluate.num_images
        covered: dict[str, Any] = {"sampler": sampler.changed(), "num_images": count, **self.asking.covered}
        covered |= {"route": self.division.as_dict()["route"]} if served.ensemble else {}
        label = self._named(f"sample {served.name} {sampler.label} #{sampling_seed}", seed)
        return self._add(
            "sample",
            label,
            covered,
            {**model_parents(served, self.base), **self.asked()},
            sampling_seed,
            arguments={"served": served, "sampler": sampler},
            images=count * sampler.num_inference_steps,
        )

    # -- prompts and the CLIP score ----------------------------------------------------------------

    def asked(self) -> dict[str, Node | Input]:
        """What holds the prompts of a table's images; nothing where the model takes none."""
        if self.asking.takes == "nothing":
            return {}
        return {"data": self.data} if self.asking.prompts is None else {"prompts": self.asking.prompts}

    def trained_clip(self) -> Node:
        """A small CLIP trained on the recipe's captions; where no score needs it, it comes into the graph here."""
        covered = {
            key: value for key, value in self.recipe.clip.changed().items() if key not in ("pretrained", "revision")
        }
        return self._add("clip", "CLIP", covered, {"data": self.data}, self.recipe.seeds[0])

    def _clip(self, download: bool) -> Node | Input | None:
        if not self.recipe.evaluate.clip_score:
            return None
        given = asking.given_clip(self.recipe.clip, download=download)
        if given is not None:
            check_unseen(given, self.recipe.data, self.images, key=asking.CLIP_KEY)
        return given or self.trained_clip()

    def _is_captioned(self, images: Node | None) -> bool:
        """Whether a set of images has a CLIP score: samples do, real images (None) where they have captions."""
        return self.clip is not None and (images is not None or self.asking.takes == "text")

    def _clip_score(self, name: str, images: Node | None) -> Node:
        """How well sampled images fit their prompts, or the first of the train split their captions."""
        assert self.clip is not None, "asked for only where there is one"
        label = "training images" if images is None else images.label.removeprefix("sample ")
        count = self.recipe.evaluate.num_images
        if images is None:
            covered, parents = {"split": "train", "count": count}, {"data": self.data}
        else:
            asked = self.asking.covered.get("asked")
            covered, parents = ({"asked": asked} if asked else {}), {"images": images, **self.asked()}
        parents = {"clip": self.clip, **parents}
        return self._add(
            "clip_score", f"CLIP score of {label}", covered, parents, None, arguments={"real": images is None}
        )

    @property
    def clip_name(self) -> str:
        """What the CLIP score is named by."""
        return asking.clip_name(self.recipe)

    # -- cost --------------------------------------------------------------------------------------

    def cost_of(self, models: Sequence[Served]) -> Node:
        """What serving these models costs, measured side by side."""
        parents: dict[str, Node | Input] = {"base": self.base}
        for served in models:
            parents |= {f"{served.name}/{i}": part for i, part in enumerate(served.parts)}
        sampler = self.recipe.evaluate.samplers[0]
        covered: dict[str, Any] = {"sampler": sampler.changed(), "models": [served.name for served in models]}
        runtime = self.recipe.runtime.changed()  # it changes what is measured here, as it does nowhere else
        covered |= {name: runtime[name] for name in SERVING if name in runtime}
        batch = self.served_batch
        covered |= {} if batch == SERVED_BATCH else {"batch": batch}
        arguments = {"models": models, "sampler": sampler}
        # Timings mean nothing beside another training.
        return self._add("cost", "cost of serving", covered, parents, None, arguments=arguments, exclusive=True)

    @property
    def served_batch(self) -> int:
        """How many images are sampled at once where serving is measured."""
        return min(SERVED_BATCH, self.recipe.runtime.sample_batch_size)

    def measured(self, names: Sequence[str]) -> list[Node]:
        """The stages that measure some rows of the table, in every seed, and what serving them costs."""
        models = [served for served in self.served[self.recipe.seeds[0]] if served.name in names]
        return [*(node for name, _, node in self.evaluations if name in names), self.cost_of(models)]

    @property
    def extractor_name(self) -> str:
        """What a metric is named by."""
        return extractors.extractor_name(self.recipe)


def model_parents(served: Served, base: Node | Input) -> dict[str, Node | Input]:
    """What a model is made of, as the inputs of a stage that runs it."""
    return {"base": base, **{f"model {i}": part for i, part in enumerate(served.parts)}}
