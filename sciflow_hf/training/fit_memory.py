"""`--auto_memory`: the options that make a run fit its device, before the network is loaded."""

import logging
from pathlib import Path
from typing import Any

import torch

from ..adapters.adapter import add_adapter
from ..adapters.arguments import AdapterArguments
from ..adapters.layers import network_of
from ..data.batches.loader import is_stream
from ..engines.memory import USABLE, MemoryOptions, device_memory, fitting, in_words
from ..errors import SciflowError
from ..families.base import ModelFamily
from ..options import given_options
from ..report.plan import encoder_bytes, tokens_of
from .arguments import DiffusionTrainingArguments
from .checkpoints import resolve_checkpoint
from .resume import saved_facts

logger = logging.getLogger(__name__)


def fit_memory(
    args: DiffusionTrainingArguments,
    family: ModelFamily,
    train_dataset: Any,
    adapter_args: AdapterArguments | None = None,
) -> None:
    """With `--auto_memory`, sets the options of `args` that are chosen by memory, and says which; all ranks call it.

    Call it before the network is loaded. Options that were given stay, and so does the total batch. A resumed run
    takes the options of its checkpoint.

    Args:
        args: the options of the run, changed in place.
        family: its network is measured without weights.
        train_dataset: its largest bucket decides.
        adapter_args: None: the complete network is trained.

    Raises:
        SciflowError: nothing fits.
    """
    args.memory_is_fitted = True
    if not args.auto_memory:
        return
    checkpoint = resolve_checkpoint(args.resume_from_checkpoint, args.output_dir)
    before, given = MemoryOptions.of(args), given_options(args) & set(MemoryOptions._fields)
    if checkpoint is not None:
        found = _of_checkpoint(checkpoint, before, given)
        logger.info("`auto_memory`: %s, as in %s.", found.flags(before), checkpoint.name)
    elif (memory := device_memory(args)) is None:
        logger.info("`auto_memory`: there is no GPU to fit into, so nothing is changed; `--memory_gb` gives a size.")
        return
    else:
        found = _that_fits(args, family, train_dataset, adapter_args, memory, given)
    found.put_into(args)


def _of_checkpoint(checkpoint: Path, before: MemoryOptions, given: set[str]) -> MemoryOptions:
    """Its options but for those that are given; its micro-batch where that divides what a device takes now."""
    saved = {name: value for name, value in saved_facts(checkpoint)["options"].items() if name in before._fields}
    total = before.per_device_train_batch_size * before.gradient_accumulation_steps
    size = saved["per_device_train_batch_size"]
    if total % size or {"per_device_train_batch_size", "gradient_accumulation_steps"} <= given:
        size = before.per_device_train_batch_size
    saved |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": total // size}
    saved["activation_checkpointing"] = bool(saved["activation_checkpointing"])
    pinned = given - {"per_device_train_batch_size", "gradient_accumulation_steps"}
    if (both := {"activation_checkpointing", "activation_checkpointing_share"}) & pinned:
        pinned |= both
    return before._replace(**{name: value for name, value in saved.items() if name not in pinned})


def _that_fits(
    args: DiffusionTrainingArguments,
    family: ModelFamily,
    train_dataset: Any,
    adapter_args: AdapterArguments | None,
    memory: float,
    given: set[str],
) -> MemoryOptions:
    if is_stream(train_dataset) and not hasattr(train_dataset, "__len__"):
        raise SciflowError("`auto_memory`: a stream of your own does not say how large its samples are. Leave it out.")
    whole = adapter_args is None or adapter_args.no_adapter
    model: torch.nn.Module = family.load_model(dtype=args.load_dtype(trained=whole), meta=True)
    if adapter_args is not None:
        model = add_adapter(model, adapter_args, family=family, seed=args.seed, quiet=True)  # a network to count
    memory -= sum(encoder_bytes(model, family, args, train_dataset).values())
    sizes: dict[str, Any] = {"memory": memory, **tokens_of(train_dataset, family)}
    network, before, size = network_of(model), MemoryOptions.of(args), f"{memory / 1e9:.3g} GB"
    ways, smallest, refused = fitting(model, network, args, given=given, **sizes)
    if not ways:
        least = f"{smallest.options.flags(before)} takes least, about {in_words(smallest.estimate.total)}"
        kept = f" Given, and so kept: {', '.join(f'`{name}`' for name in sorted(given))}." if given else ""
        others, _, _ = fitting(model, network, args, **sizes)
        without = f" This would fit: {others[0].options.flags(before)}." if others else ""
        why = "".join(f" {reason}" for reason in refused)
        raise SciflowError(
            f"`auto_memory`: nothing fits into {USABLE:.0%} of {size}; {least}.{kept}{without}{why} docs/memory.md "
            "says what else makes a run smaller."
        )
    logger.info(
        "`auto_memory`: %s, about %s of %s.", ways[0].options.flags(before), in_words(ways[0].estimate.total), size
    )
    return ways[0].options
