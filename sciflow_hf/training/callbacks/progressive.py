"""Progressive resolution: training on coarse images first, with a noise schedule adapted to their resolution."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import TrainerCallback

from ...errors import SciflowError
from ...options import Options, arguments, option

if TYPE_CHECKING:
    from ...families.microscopy_unet import MicroscopyUNet

logger = logging.getLogger(__name__)


def _check_blocks(args: Any) -> None:
    blocks = args.progressive_resolutions
    if blocks[-1] != 1 or blocks != sorted(set(blocks), reverse=True):
        raise SciflowError(f"`progressive_resolutions` {blocks}: sides of blocks that fall to 1, such as 4 2 1.")


def _check_shares(args: Any) -> None:
    stages, shares = len(args.progressive_resolutions), args.progressive_shares
    if len(shares) != stages or any(share <= 0 for share in shares):
        raise SciflowError(f"`progressive_shares` {shares}: {stages} numbers above 0, one for each stage.")


@arguments
class ProgressiveResolution(Options):
    """Stages of a run, each with images averaged over blocks; the schedule's SNR rises with the pixels of a block."""

    heading: ClassVar[str] = "Progressive resolution"

    progressive_resolutions: list[int] = option(
        [],
        "Stages: images are averaged over blocks with sides of so many pixels, falling to 1, such as 4 2 1; full "
        "resolution throughout when not given.",
        check=_check_blocks,
    )
    progressive_shares: list[float] = option(
        [], "Share of the steps of each stage, in order; equal when not given.", check=_check_shares
    )

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
    """Sets `family.block` before each step: a function of the step alone, so that a resumed run does the same.

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
