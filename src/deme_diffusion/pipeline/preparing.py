"""What trainings read: the index of the images, and the cache of their latents and captions."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deme_diffusion.data.encoding import make_cache
from deme_diffusion.data.index import make_index
from deme_diffusion.merging.write import shard_bytes
from deme_diffusion.models.latent import LatentDenoiser
from deme_diffusion.pipeline import caching
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.workbench import Workbench

log = logging.getLogger(__name__)


class Preparing(Workbench):
    """Each method `_<stage>` fills the folder of one stage."""

    def _data(self, node: Node, folder: Path) -> Mapping[str, Any]:
        limit = self.recipe.runtime.cache_images_gb * 1e9
        commit, takes = self.graph.source.commit, self.recipe.model.takes
        held = {"captioned": takes == "text", "classed": takes == "class"}
        return make_index(self.recipe.data, folder, commit=commit, limit=limit, **held)

    def _cache(self, node: Node, folder: Path) -> Mapping[str, Any]:
        recipe, denoiser, views = self.recipe, self.denoiser, caching.stored_views(self.recipe)
        if problem := caching.frozen(recipe):
            log.warning("cache: %s", problem)
        elif views["train"] > 1:
            log.info("cache: %d augmented views of each training image (cache.views)", views["train"])
        assert isinstance(denoiser, LatentDenoiser), "checked by the settings"
        try:
            return make_cache(
                folder,
                self.splits,
                denoiser,
                recipe.cache,
                views=views,
                most_bytes=shard_bytes(recipe.cache.shard_size),
                device=self.device,
                workers=recipe.runtime.dataloader_num_workers,
                made_of=caching.made_of(node.key),
            )
        finally:
            denoiser.release()  # a training that follows in this process has the memory for itself
