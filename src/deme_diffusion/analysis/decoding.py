"""What a sampler has on its way, as an image: itself, or decoded where a model denoises latents."""

from __future__ import annotations

import torch

from deme_diffusion.models.denoiser import Denoiser
from deme_diffusion.models.flux import unpacked
from deme_diffusion.models.latent import LatentDenoiser


@torch.no_grad()
def as_image(denoiser: Denoiser, x: torch.Tensor) -> torch.Tensor:
    """x_t or x_0 (b, ...) as the stock pipeline has them -> (b, c, h, w) in [-1, 1]; of a video the first frame."""
    if not isinstance(denoiser, LatentDenoiser):
        return x
    vae = denoiser.pipeline.vae
    own = next(vae.parameters())
    latents = _plain(denoiser, x.float()).to(own.device, own.dtype)
    decoded: torch.Tensor = vae.decode(latents, return_dict=False)[0].float()
    return decoded[:, :, 0] if decoded.ndim == 5 else decoded


def _plain(denoiser: LatentDenoiser, x: torch.Tensor) -> torch.Tensor:
    """Latents as the autoencoder decodes them: unpacked where they are tokens, shift and scale undone."""
    x = unpacked(x, *denoiser.sample_shape[-2:]) if x.ndim == 3 else x
    # Normalising is affine in every family: what 0 and 1 become says how it is undone.
    start = denoiser.normalised(torch.zeros_like(x))
    return (x - start) / (denoiser.normalised(torch.ones_like(x)) - start)
