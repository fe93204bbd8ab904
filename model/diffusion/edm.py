"""Snap Video's rewritten EDM diffusion (paper section 3.2, Table 1, appendices D and E). Imports torch alone.

Legend: x data, eps unit Gaussian noise, sigma noise level, s_d = sigma_data (std of the data), s_i = sigma_in (input scale). The
forward process is ``x_sigma = x / s_i + sigma * eps``: larger s_i brings back the signal-to-noise ratio that EDM was designed for
when neighbouring pixels and frames repeat each other.

The denoiser is ``D = c_skip * x_sigma + c_out * F(c_in * x_sigma)`` and the network F learns ``c_nrm * v``. Stock EDM is
another set of the same functions (``stock_...`` below): at s_i = 1 the two agree but for the sign of F; at any other s_i stock
EDM's target has a term that explodes as sigma tends to 0, which is what the rewriting removes.

Where the paper contradicts itself the functions follow its mathematics, for which ``D(c_nrm * v) = x`` holds exactly: equations
41 and 42 print a plus before ``c_nrm F_tgt`` where equation 15 makes it a minus, and Table 1's EDM column squares sigma_data in
c_out where equation 7 does not.

sigma is (B,) or any shape that broadcasts, float32 or wider: under autocast nothing here is lowered.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MOST_DRAWN = 5.0  # standard deviations of ln sigma; once in 1.7 million draws it is farther out

Scale = float | Tensor  # of all samples, or one for each in a shape that broadcasts against sigma


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise process of one stage. Table 3's ablations are settings of it (yamls/ablations/)."""

    # "edm" is stock EDM, and with another sigma_in than 1 the naive scaling of appendix D.
    framework: Literal["snap_video", "edm"] = "snap_video"
    sigma_in: float = 4.0  # s * sqrt(T), s = resolution / 64: 4 for 16 frames at 64 px, 32 at 512 px
    # Images apart from videos (Table 3, the row without "images as videos"): an image is then one frame, with this scale and
    # with one noise for all its repetitions. None treats images as videos of infinite frame rate.
    image_sigma_in: float | None = None
    sigma_data: float = 1.0
    log_sigma_mean: float = -1.2  # ln sigma ~ N(mean, std^2) in training, as in EDM
    log_sigma_std: float = 1.2

    def __post_init__(self) -> None:
        for name in ("sigma_in", "image_sigma_in", "sigma_data", "log_sigma_std"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")


def target(x: Tensor, eps: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """v = F_tgt (equation 15): what the network predicts, before normalisation by ``c_nrm``."""
    return sigma_data**2 * eps - sigma * x


def c_in(sigma: Tensor, sigma_data: float, sigma_in: Scale) -> Tensor:
    """Input scale (equation 24): ``c_in * x_sigma`` has unit variance."""
    return (sigma_data**2 / sigma_in**2 + sigma**2).rsqrt()


def c_nrm(sigma: Tensor, sigma_data: float) -> Tensor:
    """Target scale (equation 20): ``c_nrm * v`` has unit variance. The same in both frameworks."""
    return 1 / (sigma_data * (sigma_data**2 + sigma**2).sqrt())


def c_skip(sigma: Tensor, sigma_data: float, sigma_in: Scale) -> Tensor:
    """Share of the noisy input in D (equation 35)."""
    return sigma_in * sigma_data**2 / (sigma_in * sigma**2 + sigma_data**2)


def c_out(sigma: Tensor, sigma_data: float, sigma_in: Scale) -> Tensor:
    """Share of the network's output in D (equation 35); negative, since v points from the data to the noise."""
    scale = (sigma**2 + sigma_data**2).sqrt() / (sigma_data**2 + sigma_in * sigma**2)
    return -sigma_in * sigma * sigma_data * scale


def c_noise(sigma: Tensor) -> Tensor:
    """The noise level as the network sees it (EDM, unaltered)."""
    return sigma.log() / 4


def loss_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """lambda (equation 36): weight of ``|D - x|^2`` (equation 1). The same in both frameworks."""
    return 1 / sigma_data**2 + 1 / sigma**2


def effective_weight(sigma: Tensor, sigma_data: float, sigma_in: Scale) -> Tensor:
    """w = lambda * c_out^2 (equation 43): weight of ``|F - c_nrm v|^2`` (equation 3).

    Tends to s_i^2 as sigma tends to 0, so losses do not compare across stages.
    """
    return ((sigma**2 + sigma_data**2) / (sigma**2 + sigma_data**2 / sigma_in)) ** 2


def stock_target(x: Tensor, eps: Tensor, sigma: Tensor, sigma_data: float, sigma_in: Scale) -> Tensor:
    """F_tgt of stock EDM on scaled data (equation 13); its last term explodes as sigma tends to 0, unless s_i is 1."""
    return sigma * x - sigma_data**2 * eps + sigma_data**2 * (sigma_in - 1) / (sigma * sigma_in) * x


def stock_c_in(sigma: Tensor, sigma_data: float) -> Tensor:
    """Input scale of stock EDM (equation 7), blind to s_i."""
    return (sigma_data**2 + sigma**2).rsqrt()


def stock_c_skip(sigma: Tensor, sigma_data: float) -> Tensor:
    """Share of the noisy input in stock EDM's D (equation 7)."""
    return sigma_data**2 / (sigma**2 + sigma_data**2)


def stock_c_out(sigma: Tensor, sigma_data: float) -> Tensor:
    """Share of the network's output in stock EDM's D (equation 7); its effective weight is 1 at all sigma."""
    return sigma * sigma_data * (sigma**2 + sigma_data**2).rsqrt()


@dataclass(frozen=True)
class Process:
    """The functions of Table 1 on tensors of a batch, in one framework. B batch; sigma is (B,), positive.

    Values are checked where that does not make the host wait for a GPU: on the CPU.
    """

    framework: Literal["snap_video", "edm"]
    sigma_data: float
    sigma_in: Scale  # (B,) where images have their own

    def add_noise(self, x: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        """The forward process ``x / s_i + sigma * eps``."""
        return x / self._scale(x) + _column(sigma, x) * eps

    def take_away(self, x_sigma: Tensor, known: Tensor) -> Tensor:
        """The noisy ``x - known`` from the noisy ``x``."""
        return x_sigma - known / self._scale(x_sigma)

    def network_target(self, x: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        """``c_nrm * F_tgt``, what F should return; in the rewritten framework of unit variance for data of std ``sigma_data``."""
        column = _column(sigma, x)
        if self.framework == "edm":
            return c_nrm(column, self.sigma_data) * stock_target(x, eps, column, self.sigma_data, self._scale(x))
        return c_nrm(column, self.sigma_data) * target(x, eps, column, self.sigma_data)

    def scale_input(self, x_sigma: Tensor, sigma: Tensor) -> Tensor:
        """``c_in * x_sigma``, what F should see."""
        column = _column(sigma, x_sigma)
        if self.framework == "edm":
            return stock_c_in(column, self.sigma_data) * x_sigma
        return c_in(column, self.sigma_data, self._scale(x_sigma)) * x_sigma

    def combine(self, x_sigma: Tensor, network_output: Tensor, sigma: Tensor) -> Tensor:
        """D, the estimate of the data: ``c_skip * x_sigma + c_out * F``."""
        column, s_d, s_i = _column(sigma, x_sigma), self.sigma_data, self._scale(x_sigma)
        if self.framework == "edm":
            return stock_c_skip(column, s_d) * x_sigma + stock_c_out(column, s_d) * network_output
        return c_skip(column, s_d, s_i) * x_sigma + c_out(column, s_d, s_i) * network_output

    def effective_weight(self, sigma: Tensor) -> Tensor:
        """(B,) w: weight of ``|F - c_nrm F_tgt|^2``, the training loss, which is stable at all sigma."""
        if self.framework == "edm":
            return torch.ones_like(sigma)
        return effective_weight(sigma, self.sigma_data, self.sigma_in)

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """(B,) lambda: weight of ``|D - x|^2``, the same loss in its other form."""
        return loss_weight(sigma, self.sigma_data)

    def _scale(self, like: Tensor) -> Scale:
        return expand(self.sigma_in, like) if isinstance(self.sigma_in, Tensor) else self.sigma_in


def process(config: DiffusionConfig, is_image: Tensor) -> Process:
    """The process of a batch, of which ``is_image`` (B,) says what is an image."""
    scale: Scale = config.sigma_in
    if config.image_sigma_in is not None:
        scale = torch.where(is_image, config.image_sigma_in, config.sigma_in)
    return Process(config.framework, config.sigma_data, scale)


def share_noise(eps: Tensor, is_image: Tensor, config: DiffusionConfig) -> Tensor:
    """Noise (B, T, C, H, W) for a batch: with a scale of their own, images are one frame and have the noise of one."""
    if config.image_sigma_in is None:
        return eps
    return torch.where(expand(is_image, eps), eps[:, :1], eps)


def training_sigma(normal: Tensor, config: DiffusionConfig) -> Tensor:
    """Noise levels for training from unit Gaussian draws: log-normal, of the draws' shape."""
    return (normal * config.log_sigma_std + config.log_sigma_mean).exp()


def drawn_c_noise(c_noise: Tensor, config: DiffusionConfig) -> Tensor:
    """``c_noise`` (B,) within what training can have drawn: beyond ``MOST_DRAWN`` standard deviations, the nearest such level.

    A network's answer to a level that it was never told is anything: where scales multiply each other, millions. At the paper's
    settings this leaves [0.0008, 121] alone, and with it all that its samplers ask for.
    """
    mean, reach = config.log_sigma_mean / 4, MOST_DRAWN * config.log_sigma_std / 4
    return c_noise.clamp(mean - reach, mean + reach)


def expand(scalars: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) with the rank of ``like``."""
    return scalars.reshape(-1, *[1] * (like.ndim - 1))


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity in a tensor on the CPU.

    Raises:
        ValueError: says the first bad value and where it is.
    """
    if tensor.device.type != "cpu" or bool(tensor.isfinite().all()):
        return
    place = tuple((~tensor.isfinite()).nonzero()[0].tolist())
    raise ValueError(f"{name} must be finite, got {float(tensor[place])} at {place}")


def _column(sigma: Tensor, like: Tensor) -> Tensor:
    """sigma (B,) expanded against ``like``, checked to be positive."""
    if sigma.device.type == "cpu" and not bool(((sigma > 0) & sigma.isfinite()).all()):
        bad = sigma[~((sigma > 0) & sigma.isfinite())]
        raise ValueError(f"sigma must be positive and finite, got {float(bad[0])}")
    return expand(sigma, like)
