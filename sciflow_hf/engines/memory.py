"""Memory of a training step on one device, estimated; and the options that make it fit, in the order of their cost."""

import copy
from collections.abc import Collection, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate.utils import gather_object

from ..errors import SciflowError
from ..options import arguments, option
from . import offload, quantisation
from .checkpointing import blocks_of, computed_again, share_of
from .optimizers import state_bytes

GIB = 2**30
USABLE = 0.9
"""Share of a device's memory that is counted on: the rest is for its context, kernels' workspaces and gaps."""
ACTIVATIONS_PER_BLOCK = 27  # values kept per token and hidden unit; fits klein 9B's 51 GB at 1024 px
ACTIVATIONS_PER_RESNET = 3  # per pixel and channel, in and out: two group norms and what they feed
PACKED = ("int8", "nf4")  # values of `--quantize_base` that are tried, by their rounding
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # values of `--activation_checkpointing_share` that are tried


@arguments
class MemoryArguments:
    """Options that are chosen by the memory of the device, see `fitting`."""

    heading: ClassVar[str] = "Memory"
    memory_is_fitted = False  # set by `fit_memory`

    auto_memory: bool = option(
        False,
        "Set --activation_checkpointing, --per_device_train_batch_size with --gradient_accumulation_steps, "
        "--quantize_base and --offload so that the run fits the device: the first that --dry_run lists. Options that "
        "are given stay, and so do the samples of a step; a resumed run takes those of its checkpoint.",
    )
    memory_gb: float | None = option(
        None,
        "Gigabytes (10^9 bytes) of a device that --dry_run and --auto_memory choose for; those of the GPU that they "
        "see, of several the smallest, when not given.",
        within="(0, inf)",
    )
    device_tflops: float | None = option(
        None,
        "TFLOP/s that a device reaches in training, for the hours that --dry_run prints; 400 when not given.",
        within="(0, inf)",
    )


class MemoryOptions(NamedTuple):
    """The options of training that are chosen by memory; the names are theirs."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    activation_checkpointing: bool
    activation_checkpointing_share: float | None
    quantize_base: str | None
    offload: bool

    @classmethod
    def of(cls, args: Any) -> "MemoryOptions":
        return cls(
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            bool(args.activation_checkpointing),
            args.activation_checkpointing_share,
            args.quantize_base,
            args.offload,
        )

    @property
    def share(self) -> float:
        """The share of the blocks that compute their activations again."""
        return share_of(self)

    def with_share(self, share: float) -> "MemoryOptions":
        """With another share, which has an option of its own where it is neither 0 nor 1, or where one was given."""
        named = self.activation_checkpointing_share is not None or share not in (0, 1)
        return self._replace(
            activation_checkpointing=share > 0, activation_checkpointing_share=share if named else None
        )

    def put_into(self, args: Any) -> None:
        for name, value in self._asdict().items():
            setattr(args, name, value)

    def flags(self, before: "MemoryOptions") -> str:
        """The flags that lead here from `before`, for a command line."""
        changed = {name: value for name, value in self._asdict().items() if value != getattr(before, name)}
        if "activation_checkpointing_share" in changed:
            changed.pop("activation_checkpointing", None)  # which follows
        named = {name: "" if value is True else f" {value}" for name, value in changed.items()}
        return " ".join(f"--{name}{value}" for name, value in named.items()) or "as it is"


class Estimate(NamedTuple):
    """Bytes: `optimizer` with gradients and averaged weights, `host` for what `--offload` keeps there."""

    weights: float
    optimizer: float
    activations: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """On the device."""
        return self.weights + self.optimizer + self.activations


class Way(NamedTuple):
    """Options of a run, and about what it takes with them."""

    options: MemoryOptions
    estimate: Estimate


def estimate(
    model: torch.nn.Module, network: Any, args: Any, *, tokens: int, image_tokens: int, options: MemoryOptions
) -> Estimate:
    """About what a training step takes. Weights may be on `meta`.

    Args:
        model: all that is loaded, with its adapter.
        network: the one in it that is trained, or carries the adapter.
        args: options of training; those of `options` are read there.
        tokens, image_tokens: of the largest sample: with its text, and of the image alone.
    """
    held, block = offload.held_bytes(network, options.share) if options.offload else (0, 0)
    weights: float = sum(p.numel() * p.element_size() for p in model.parameters()) - (held - block)
    weights -= quantisation.saved_bytes(network, options.quantize_base) if options.quantize_base else 0
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    blocks = _blocks(network, tokens, image_tokens) or [(0, 0)]
    again = computed_again(len(blocks), options.share)
    # Of the first ones what comes in, and one at a time, once what the others have kept is gone.
    inside = [inner for _, inner in blocks]
    needed = sum(taken for taken, _ in blocks[:again]) + max([sum(inside[again:]), *inside[:again]])
    kept = args.weight_dtype.itemsize * options.per_device_train_batch_size * needed
    average = 4 if args.ema_decay is not None and args.ema_device == "auto" else 0
    return Estimate(weights, trained * (4 + state_bytes(args.optim) + average), kept, held)


def extra_arithmetic(network: Any, share: float, *, tokens: int, image_tokens: int) -> float:
    """About how much more a step computes when the first blocks, `share` of them, compute their activations again.

    A step is a forward pass, one as large for the gradients of the activations, and the part of a third that is for the
    gradients of trained weights; a block counts by its activations.
    """
    inside = [inner for _, inner in _blocks(network, tokens, image_tokens)]
    sizes = [(p.numel(), p.requires_grad) for p in network.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained) / sum(size for size, _ in sizes)
    return sum(inside[: computed_again(len(inside), share)]) / max(sum(inside), 1) / (2 + trained)


def least_share(
    model: torch.nn.Module,
    network: Any,
    args: Any,
    *,
    memory: float,
    tokens: int,
    image_tokens: int,
    options: MemoryOptions,
) -> float | None:
    """The least `--activation_checkpointing_share` with which `options` fit; None where none does."""
    blocks = len(blocks_of(network))
    for again in range(blocks + 1):
        share = round(again / max(blocks, 1), 3)
        found = estimate(
            model, network, args, tokens=tokens, image_tokens=image_tokens, options=options.with_share(share)
        )
        if found.total <= USABLE * memory:
            return share
    return None


def fitting(
    model: torch.nn.Module,
    network: Any,
    args: Any,
    *,
    memory: float,
    tokens: int,
    image_tokens: int,
    given: Collection[str] = (),
) -> tuple[list[Way], Way, list[str]]:
    """The options with which a run fits into `memory` bytes, the cheapest in time first; each next takes less memory.

    The samples of a step stay. Smaller micro-batches cost no arithmetic, activation checkpointing computes the blocks
    twice, a packed base is unpacked where it is used, and rounded: so it comes after what is exact. Offloading copies
    the blocks twice a micro-batch, which takes longest.

    Args:
        model, network, args, tokens, image_tokens: see `estimate`.
        memory: of the device; `USABLE` of it is counted on.
        given: names of options to leave unchanged. The samples of a micro-batch stay if accumulation is also given.

    Returns:
        ways: that fit.
        smallest: the way that takes least, whether it fits or not.
        refused: why some options cannot work here.
    """
    tried: list[Way] = []
    refused: dict[str, None] = {}
    for options in _candidates(network, MemoryOptions.of(args), given):
        if (why := _refusal(args, options)) is not None:
            refused[why] = None
            continue
        needed = estimate(model, network, args, tokens=tokens, image_tokens=image_tokens, options=options)
        tried.append(Way(options, needed))
    ways: list[Way] = []
    for way in (way for way in tried if way.estimate.total <= USABLE * memory):
        if ways:  # less than those, and not only by a smaller batch; a middling share is for where none fits before
            only_batch = way.options[2:] == ways[-1].options[2:]
            if only_batch or way.options.share not in (0, 1) or way.estimate.total >= ways[-1].estimate.total:
                continue
        ways.append(way)
    if ways and ways[0].options.share not in (0, 1):
        options, sizes = ways[0].options, {"tokens": tokens, "image_tokens": image_tokens}
        options = options.with_share(least_share(model, network, args, memory=memory, options=options, **sizes) or 1.0)
        ways[0] = Way(options, estimate(model, network, args, options=options, **sizes))
    return ways, min(tried, key=lambda way: way.estimate.total), list(refused)


def _candidates(network: Any, now: MemoryOptions, given: Collection[str]) -> Iterator[MemoryOptions]:
    """Options with the same total batch, the cheapest in time first."""
    packed: tuple[str | None, ...] = tuple(kind for kind in PACKED if quantisation.saved_bytes(network, kind) > 0)
    values: dict[str, tuple[Any, ...]] = {
        "offload": (False, True) if offload.held_bytes(network)[0] else (False,),
        "quantize_base": (None, *packed),
    }
    values |= {name: (getattr(now, name),) for name in values if name in given}
    shares = possible_shares(network)
    if {"activation_checkpointing", "activation_checkpointing_share"} & set(given):
        shares = (now.share,)
    total = now.per_device_train_batch_size * now.gradient_accumulation_steps
    sizes = [n for n in range(now.per_device_train_batch_size, 0, -1) if total % n == 0]
    if {"per_device_train_batch_size", "gradient_accumulation_steps"} <= set(given):
        sizes = sizes[:1]
    for is_offloaded in values["offload"]:
        for kind in values["quantize_base"]:
            for share in shares:
                if is_offloaded and (kind or not share):  # see `offload.check`
                    continue
                for size in sizes:
                    yield MemoryOptions(
                        size, total // size, now.activation_checkpointing, now.activation_checkpointing_share, kind,
                        is_offloaded,
                    ).with_share(share)  # fmt: skip


def possible_shares(network: Any) -> tuple[float, ...]:
    """The shares that are tried: of a network that does not name its blocks all or none."""
    if not getattr(network, "_supports_gradient_checkpointing", False):
        return SHARES[:1]
    return SHARES if blocks_of(network) else (SHARES[0], SHARES[-1])


def _refusal(args: Any, options: MemoryOptions) -> str | None:
    """Why these options cannot work with the others; None where they can."""
    trial = copy.copy(args)
    options.put_into(trial)
    try:
        if options.offload:
            offload.check(trial)
        if options.quantize_base:
            quantisation.check(trial)
    except SciflowError as error:
        return str(error)
    return None


def device_memory(args: Any) -> float | None:
    """Bytes of the smallest device over the ranks, or `--memory_gb`; None on a CPU. All ranks call it."""
    if args.memory_gb is not None:
        return float(args.memory_gb * 1e9)
    own = None if args.device.type in ("cpu", "mps") else torch.accelerator.get_memory_info(args.device)[1]
    everywhere = gather_object([own])
    return None if None in everywhere else float(min(everywhere))


def _blocks(network: Any, tokens: int, deepest: int) -> list[tuple[int, int]]:
    """For each of `blocks_of`, how many numbers of a sample come in, and how many its backward pass needs.

    Args:
        tokens: of image and text.
        deepest: of the image where a UNet is narrowest; each level above has four times as many.
    """
    blocks = blocks_of(network)
    if not hasattr(network, "down_blocks"):
        # What comes into a block is what its first layer reads, and that of each of a network is as wide.
        width = next((m.in_features for _, b in blocks for m in b.modules() if isinstance(m, torch.nn.Linear)), 0)
        return [(tokens * width, ACTIVATIONS_PER_BLOCK * tokens * width)] * len(blocks)
    found, levels = [], len(network.down_blocks)
    for name, block in blocks:
        part, number = name.split(".")[:2]  # down_blocks.0 and up_blocks.2 are the widest of three levels
        above = int(number) if part == "up_blocks" else levels - 1 - int(number) if part == "down_blocks" else 0
        size = deepest * 4**above
        if type(block).__name__ == "ResnetBlock2D":
            channels = block.in_channels + block.out_channels
            found.append((size * block.in_channels, ACTIVATIONS_PER_RESNET * size * channels))
        else:
            found.append((size * block.dim, ACTIVATIONS_PER_BLOCK * size * block.dim))
    return found


def in_words(num_bytes: float) -> str:
    """ "1.5 GiB", or "200.0 MiB"."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"
