"""Progressive resolution: training on coarse images first, with a noise schedule adapted to their resolution."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ...errors import SciflowError

if TYPE_CHECKING:
    from ...families.microscopy_unet import MicroscopyUNet

logger = logging.getLogger(__name__)


@dataclass
class ProgressiveResolution:
    """Stages of a run, each with images averaged over blocks; the schedule's SNR rises with the pixels of a block.

    Args:
        progressive_resolutions: sides of the blocks, falling to 1, e.g. 4 2 1; none trains at full resolution only.
        progressive_shares: share of the steps of each stage, in order; equal by default.
    """

    progressive_resolutions: list[int] = field(
        default_factory=list, metadata={"help": "Stages: images averaged over blocks of 4, 2, then 1 pixels."}
    )
    progressive_shares: list[float] = field(
        default_factory=list, metadata={"help": "Share of the steps of each stage; equal by default."}
    )

    def __post_init__(self) -> None:
        blocks, shares = self.progressive_resolutions, self.progressive_shares
        if blocks and (blocks[-1] != 1 or blocks != sorted(set(blocks), reverse=True)):
            raise SciflowError(f"`progressive_resolutions` {blocks}: sides of blocks that fall to 1, such as 4 2 1.")
        if shares and (len(shares) != len(blocks) or any(share <= 0 for share in shares)):
            raise SciflowError(f"`progressive_shares` {shares}: {len(blocks)} numbers above 0, one for each stage.")

    def callbacks(self, family: "MicroscopyUNet", *, tile_size: int) -> list[TrainerCallback]:
        """The callback that sets `family.block`; none without stages.

        Raises:
            SciflowError: tiles that the first stage would make too small for the network.
        """
        if not self.progressive_resolutions:
            return []
        smallest, step = self.progressive_resolutions[0], family.bucket_step()
        if tile_size % (smallest * step):
            raise SciflowError(
                f"`progressive_resolutions` {self.progressive_resolutions}: tiles of {tile_size} pixels become "
                f"{tile_size / smallest:g}, and this network takes multiples of {step}. Begin with smaller blocks."
            )
        return [ProgressiveResolutionCallback(family, self.progressive_resolutions, self.progressive_shares)]


class ProgressiveResolutionCallback(TrainerCallback):
    """Sets `family.block` before each step: a function of the step alone, so that a resumed run goes on the same way.

    Args:
        family: whose `compute_loss` averages training images over blocks of `block` pixels.
        blocks: falling to 1.
        shares: of the steps; equal where empty.
    """

    def __init__(self, family: "MicroscopyUNet", blocks: Sequence[int], shares: Sequence[float] = ()) -> None:
        self.family, self.blocks = family, list(blocks)
        self.shares = list(shares) or [1.0] * len(self.blocks)

    def block_at(self, step: int, max_steps: int) -> int:
        """The side of the blocks in optimizer step `step` (from 0) of `max_steps`."""
        done, total = 0.0, sum(self.shares)
        for block, share in zip(self.blocks, self.shares, strict=True):
            done += share / total
            if step < round(done * max_steps):
                return block
        return self.blocks[-1]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        block = self.block_at(state.global_step, state.max_steps)
        if block != self.family.block:
            logger.info("Step %d: images are averaged over %d x %d pixels.", state.global_step, block, block)
            self.family.block = block

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.family.block = 1
