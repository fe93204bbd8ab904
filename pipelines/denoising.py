"""How close the denoiser D comes to clips. Comparable between models of any sigma_in and framework, as losses are not.

Imports torch alone, so that it runs where Composer is not installed.
"""

from torch import Tensor

from model.denoiser import Denoiser
from model.diffusion import edm
from model.networks.conditioning import Conditioning


def squared_error(denoiser: Denoiser, x: Tensor, eps: Tensor, sigma: Tensor, told: Conditioning) -> Tensor:
    """(B,) mean of (D - x)^2 without the padding, of a network used as samplers use it.

    ``x`` and ``eps`` are (B, T, C, H, W) in model space, ``sigma`` (B,).
    """
    x_sigma = edm.process(denoiser.config.diffusion, told.is_image).add_noise(x, eps, sigma)
    estimate, latents = denoiser.denoise(x_sigma, sigma, told, None)
    if denoiser.config.self_conditioning:
        estimate, _ = denoiser.denoise(x_sigma, sigma, told, latents)
    mask = denoiser.codec.mask(x.device)
    return ((estimate - x) * mask).double().square().mean(dim=(1, 2, 3, 4)) / mask.mean()
