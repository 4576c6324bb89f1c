"""Between intensities and what the network sees, about [-1, 1]: percentile, Anscombe, log, each with its inverse."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ..errors import SciflowError

KINDS = ("percentile", "anscombe", "log")


@dataclass(frozen=True)
class IntensityTransform:
    """x -> 2 (g(x) - g(low)) / (g(high) - g(low)) - 1 for each channel, without clipping, so that it can be undone.

    g is the identity (`percentile`); 2 sign(u) sqrt(|u|) of u = x / gain + 3/8 (`anscombe`: Anscombe 1948, which
    gives Poisson counts about the variance 1); or sign(x) log(1 + |x| / gain) (`log`). Both continue below zero, where
    background that was taken off and read noise lead.

    Args:
        kind: "percentile", "anscombe" or "log".
        low, high: (C,), the intensities that become -1 and 1.
        gain: intensity of one photon (`anscombe`); where the logarithm sets in (`log`).
    """

    kind: str
    low: tuple[float, ...]
    high: tuple[float, ...]
    gain: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SciflowError(f"`intensity_transform` {self.kind!r}: use one of {', '.join(KINDS)}.")
        if not self.gain > 0:
            raise SciflowError(f"`intensity_gain` {self.gain}: above 0.")
        for channel, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            if not low < high:
                raise SciflowError(
                    f"`intensity_percentiles` lead to the same intensity, {low:g}, at both ends of channel {channel}. "
                    "Take them farther apart, or look whether the images are flat."
                )

    @classmethod
    def fit(
        cls,
        planes: Iterable[np.ndarray],
        *,
        kind: str = "percentile",
        percentiles: Sequence[float] = (0.1, 99.9),
        gain: float = 1.0,
    ) -> "IntensityTransform":
        """The transform whose ends are percentiles of all pixels of `planes`, each (C, H, W).

        Call it with training images only: it is saved with the network.
        """
        pixels = [plane.reshape(len(plane), -1) for plane in planes]
        if not 0 <= percentiles[0] < percentiles[-1] <= 100 or len(percentiles) != 2:
            raise SciflowError(f"`intensity_percentiles` {list(percentiles)}: two, rising, from 0 to 100.")
        low, high = np.percentile(np.concatenate(pixels, axis=1).astype(np.float64), percentiles, axis=1)
        return cls(kind, tuple(map(float, low)), tuple(map(float, high)), gain)

    def __call__(self, intensities: torch.Tensor) -> torch.Tensor:
        """(..., C, H, W) -> the same, in the network's units; float32."""
        low, high = self._ends(intensities)
        return 2 * (self._g(intensities.float()) - low) / (high - low) - 1

    def inverse(self, values: torch.Tensor) -> torch.Tensor:
        """(..., C, H, W) in the network's units -> intensities, float32."""
        low, high = self._ends(values)
        y = (values.float() + 1) / 2 * (high - low) + low
        if self.kind == "anscombe":
            return self.gain * (torch.sign(y) * (y / 2) ** 2 - 3 / 8)
        return self.gain * torch.sign(y) * torch.expm1(y.abs()) if self.kind == "log" else y

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `IntensityTransform.from_dict` reads them."""
        return asdict(self) | {"low": list(self.low), "high": list(self.high)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "IntensityTransform":
        return cls(values["kind"], tuple(values["low"]), tuple(values["high"]), values["gain"])

    def _g(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "anscombe":
            u = x / self.gain + 3 / 8
            return 2 * torch.sign(u) * u.abs().sqrt()
        return torch.sign(x) * torch.log1p(x.abs() / self.gain) if self.kind == "log" else x

    def _ends(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """g(low), g(high): (C, 1, 1)."""
        if like.shape[-3] != len(self.low):
            raise SciflowError(f"{like.shape[-3]} channels: the intensity transform was fitted to {len(self.low)}.")
        ends = torch.tensor([self.low, self.high], dtype=torch.float32)
        low, high = self._g(ends).to(like.device)[:, :, None, None]
        return low, high
