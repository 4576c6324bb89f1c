"""`--activation_checkpointing_share`: which blocks keep their activations, and which compute them again."""

from typing import Any, ClassVar

import torch
from torch.utils.checkpoint import checkpoint

from ..errors import SciflowError
from ..options import arguments, option

_UNET_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
_UNET_PARTS = ("down_blocks", "mid_block", "up_blocks")


@arguments
class CheckpointingArguments:
    """How many blocks compute their activations again in the backward pass."""

    heading: ClassVar[str] = "Activation checkpointing"

    activation_checkpointing_share: float | None = option(
        None,
        "Share of the blocks that compute their activations again in the backward pass instead of keeping them, the "
        "first ones; it switches --activation_checkpointing on, and 0 off. All when not given. --dry_run lists what "
        "shares cost.",
        within="[0, 1]",
    )


def share_of(args: Any) -> float:
    """The share of the blocks that compute their activations again."""
    if args.activation_checkpointing_share is not None:
        return float(args.activation_checkpointing_share)
    return float(bool(args.activation_checkpointing))


def block_kinds(network: Any) -> list[str]:
    """The classes of a network's blocks: those that must not be split, else those that repeat, as diffusers says."""
    return getattr(network, "_no_split_modules", None) or getattr(network, "_repeated_blocks", None) or []


def blocks_of(network: Any) -> list[tuple[str, Any]]:
    """The blocks that diffusers checkpoints, with their paths, in the order in which they compute; [] if unknown."""
    named: list[tuple[str, torch.nn.Module]] = list(network.named_modules())
    if hasattr(network, "down_blocks"):
        unet = [(path, module) for path, module in named if type(module).__name__ in _UNET_BLOCKS]
        return sorted(unet, key=lambda found: _place_in_unet(found[0]))
    return [(path, module) for path, module in named if type(module).__name__ in block_kinds(network)]


def _place_in_unet(path: str) -> tuple[int, ...]:
    """By part, block and number: of `up_blocks.1.attentions.2.transformer_blocks.0` and the resnet before it."""
    part, *rest = path.split(".")
    block = rest.pop(0) if rest[0].isdigit() else 0
    kind, number, *inner = rest
    return _UNET_PARTS.index(part), int(block), int(number), kind == "attentions", *map(int, inner[-1:])


def computed_again(blocks: int, share: float) -> int:
    """How many of so many blocks, the first ones, compute their activations again.

    The last ones keep theirs: the backward pass frees them first, so that they are gone when it computes the first of
    the others again. With a block kept anywhere else, both would be in memory at once.
    """
    return round(share * blocks)


def enable(model: Any, network: Any, share: float) -> None:
    """Switches activation checkpointing on for the first blocks, `share` of them; of text encoders for all of them.

    Args:
        model: all that is trained.
        network: the one in it that has the blocks.
        share: above 0.

    Raises:
        SciflowError: the network does not name its blocks, and `share` is neither 0 nor 1.
    """
    if share == 1:
        model.enable_gradient_checkpointing()
        return
    blocks = [block for _, block in blocks_of(network)]
    if not blocks:
        raise SciflowError(
            f"`activation_checkpointing_share` {share:g}: {type(network).__name__} does not name its blocks "
            "(`_no_split_modules`, `_repeated_blocks`). Use `--activation_checkpointing` for all of it."
        )
    kept = frozenset(blocks[computed_again(len(blocks), share) :])

    def run(block: Any, *inputs: Any) -> Any:
        return block(*inputs) if block in kept else checkpoint(block.__call__, *inputs, use_reentrant=False)

    model.enable_gradient_checkpointing(run)
