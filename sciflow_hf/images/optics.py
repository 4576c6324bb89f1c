"""A microscope's image of a sharp one: point-spread function, background, photons, read noise."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ..diffusion.randomness import generator
from ..errors import SciflowError
from ..options import check_range
from .files import SUFFIXES, read_image

PSFS = ("gaussian", "airy", "born_wolf")


def _setting(default: Any, help: str) -> Any:
    """A field with its explanation for `--help`."""
    return field(default=default, metadata={"help": help})


@dataclass
class ForwardModel:
    """Poisson(photons * (psf * x) / white_level + background) + Gaussian read noise, brought back to intensities.

    The image that it makes has the unit of the sharp one: background is taken off, and `white_level` is `photons`
    photons. Draws are keyed; all but the draw itself is differentiable.

    Saved pipelines carry a copy of this module: a plain dataclass, without the parser of options.
    """

    heading: ClassVar[str] = "Forward model of the microscope"

    psf: str = _setting(
        "gaussian",
        "gaussian; airy, the focal plane of a circular pupil (Born and Wolf, section 8.5); born_wolf, that of a plane "
        "`--defocus` away (section 8.8); or the image file of a measured one.",
    )
    psf_sigma: float = _setting(1.5, "Standard deviation of the gaussian PSF, pixels. Above 0.")
    wavelength: float = _setting(520.0, "Wavelength of emission, nm. Above 0.")
    numerical_aperture: float = _setting(1.2, "Numerical aperture of the objective, below `--refractive_index`.")
    refractive_index: float = _setting(1.33, "Refractive index of the medium of the objective.")
    pixel_size: float = _setting(100.0, "Size of a pixel in the specimen, nm. Above 0.")
    defocus: float = _setting(0.0, "Distance from the focal plane, nm (born_wolf).")
    psf_exponent: int = _setting(
        1, "2 for two-photon excitation, whose fluorescence goes with the square of the light. 1, 2 or 3."
    )
    photons: float = _setting(100.0, "Expected photons of a pixel at `--white_level`. Above 0.")
    background: float = _setting(2.0, "Photons per pixel from out of focus and stray light. At least 0.")
    read_noise: float = _setting(1.0, "Standard deviation of the camera's noise, photons. At least 0.")
    white_level: float = _setting(
        0.0, "Intensity of `--photons` photons; 0: the upper end of the intensity transform fitted to training images."
    )

    def __post_init__(self) -> None:
        if self.psf not in PSFS and Path(self.psf).suffix.lower() not in SUFFIXES:
            raise SciflowError(f"`psf` {self.psf!r}: use one of {', '.join(PSFS)}, or an image file.")
        for name in ("psf_sigma", "wavelength", "numerical_aperture", "refractive_index", "pixel_size", "photons"):
            check_range(name, getattr(self, name), "(0, inf)")
        for name in ("background", "read_noise", "white_level"):
            check_range(name, getattr(self, name), "[0, inf)")
        check_range("defocus", self.defocus, "(-inf, inf)")
        if self.numerical_aperture >= self.refractive_index:
            raise SciflowError(
                f"`numerical_aperture` {self.numerical_aperture}: below `refractive_index` {self.refractive_index}, "
                "whose light it collects. Oil has 1.515."
            )
        if self.psf_exponent not in (1, 2, 3):
            raise SciflowError(f"`psf_exponent` {self.psf_exponent}: 1, 2 (two photons) or 3.")

    @functools.cached_property
    def kernel(self) -> torch.Tensor:
        """The point-spread function on pixels, (k, k) with k odd, sum 1, float32."""
        psf = self._measured() if self.psf not in PSFS else self._computed()
        psf = psf**self.psf_exponent
        return (psf / psf.sum()).float()

    @property
    def radius(self) -> int:
        """Pixels that a pixel's light reaches: the margin that a tile needs."""
        return len(self.kernel) // 2

    def _computed(self) -> torch.Tensor:
        """Out to where 1 % of the light or less is left: 4 sigma, or 4 dark rings."""
        reach = 4 * self.psf_sigma
        if self.psf != "gaussian":
            airy_radius = 0.61 * self.wavelength / self.numerical_aperture / self.pixel_size
            reach = 4 * airy_radius + abs(self.defocus) / self.pixel_size * self.numerical_aperture
        steps = torch.arange(-math.ceil(reach), math.ceil(reach) + 1, dtype=torch.float64)
        r = torch.hypot(steps[:, None], steps[None, :])
        if self.psf == "gaussian":
            return torch.exp(-((r / self.psf_sigma) ** 2) / 2)
        v = 2 * math.pi / self.wavelength * self.numerical_aperture * r * self.pixel_size
        u = 2 * math.pi / self.wavelength * self.numerical_aperture**2 / self.refractive_index * self.defocus
        return born_wolf(v, u if self.psf == "born_wolf" else 0.0)

    def _measured(self) -> torch.Tensor:
        """The first plane of a file, made odd and cut to a square around its brightest pixel."""
        plane = torch.from_numpy(read_image(self.psf).planes[0, 0].astype("float64"))
        if not torch.isfinite(plane).all() or plane.min() < 0 or plane.sum() <= 0:
            raise SciflowError(f"`psf` {self.psf}: values must be finite and not negative, and not all 0.")
        y, x = divmod(int(plane.argmax()), plane.shape[1])
        radius = min(y, x, plane.shape[0] - 1 - y, plane.shape[1] - 1 - x)
        if radius == 0:
            raise SciflowError(f"`psf` {self.psf}: its brightest pixel lies on the border. Cut it out with a margin.")
        return plane[y - radius : y + radius + 1, x - radius : x + radius + 1]

    # -- the forward model -----------------------------------------------------------------------------------------

    def blur(self, intensities: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) convolved with the PSF, mirrored at the border; a linear map.

        Raises:
            SciflowError: a PSF that is larger than the image.
        """
        radius, channels = self.radius, intensities.shape[1]
        if radius >= min(intensities.shape[-2:]):
            raise SciflowError(
                f"`psf` {self.psf} is {len(self.kernel)} pixels wide, larger than the image of "
                f"{intensities.shape[-2]} x {intensities.shape[-1]}. Take larger tiles, or a smaller PSF."
            )
        padded = F.pad(intensities, (radius,) * 4, mode="reflect")
        kernel = self.kernel.flip(0, 1).to(intensities).expand(channels, 1, -1, -1)  # conv2d correlates
        return F.conv2d(padded, kernel, groups=channels)

    def expected_photons(self, intensities: torch.Tensor) -> torch.Tensor:
        """Mean photons of each pixel, (B, C, H, W), background included; at least 0."""
        return self.photons / self.white * self.blur(intensities).clamp_min(0) + self.background

    @property
    def white(self) -> float:
        """`white_level`; SciflowError where it is not known yet."""
        if not self.white_level:
            raise SciflowError("`white_level` 0: no training images have set it. Give the intensity of `photons`.")
        return self.white_level

    def to_intensities(self, photons: torch.Tensor) -> torch.Tensor:
        """Detected photons in the unit of the sharp image, background taken off."""
        return (photons - self.background) * (self.white / self.photons)

    def to_photons(self, intensities: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_intensities`."""
        return intensities * (self.photons / self.white) + self.background

    def detect(self, expected: torch.Tensor, keys: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """A camera's reading for `expected` photons (B, C, H, W), in photons; one key per sample, on the CPU."""
        rows = []
        for rate, key in zip(expected, keys, strict=True):
            source = generator(int(key), "photons")
            counts = torch.poisson(rate, generator=source)
            rows.append(counts + self.read_noise * torch.randn(rate.shape, generator=source))
        return torch.stack(rows)

    def measure(self, intensities: torch.Tensor, keys: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """The image that the microscope makes of (B, C, H, W), in the same unit."""
        return self.to_intensities(self.detect(self.expected_photons(intensities), keys))

    def log_likelihood(self, intensities: torch.Tensor, measured: torch.Tensor) -> torch.Tensor:
        """log p(measured | intensities) up to a constant: (B,); differentiable.

        Read noise of variance s^2 is counted as s^2 more photons on both sides, the shifted Poisson model (Snyder et
        al. 1993): y log(m) - m with y = photons + s^2, m = expected + s^2.
        """
        variance = self.read_noise**2
        mean = (self.expected_photons(intensities) + variance).clamp_min(1e-3)
        counts = (self.to_photons(measured) + variance).clamp_min(0)
        return (counts * mean.log() - mean).flatten(1).sum(dim=1)


def born_wolf(v: torch.Tensor, u: float, *, points: int = 512) -> torch.Tensor:
    """|2 int_0^1 J0(v rho) exp(-i u rho^2 / 2) rho d rho|^2, of any shape; 1 at v = u = 0 (Born and Wolf, 8.8.1).

    Args:
        v: k NA r, the distance from the axis in optical units.
        u: k NA^2 z / n, that from the focal plane.
        points: of the Gauss-Legendre rule.
    """
    import numpy as np

    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(points))
    rho, weights = (nodes + 1) / 2, weights / 2
    bessel = torch.special.bessel_j0(v.double()[..., None] * rho) * rho * weights
    phase = u * rho**2 / 2
    return 4 * ((bessel * phase.cos()).sum(-1) ** 2 + (bessel * phase.sin()).sum(-1) ** 2)
