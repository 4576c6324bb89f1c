"""Latents and prompts as the networks of several families take them: 2x2 pixels a token, token ids."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

PATCH = 2


def pack(latents: torch.Tensor) -> torch.Tensor:
    """2x2 pixels become a token, in the order (c, ph, pw): (B, C, h, w) -> (B, h/2 * w/2, 4C)."""
    size, channels, height, width = latents.shape
    patches = latents.reshape(size, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(size, -1, channels * PATCH**2)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The inverse of `pack`: (B, h/2 * w/2, 4C) -> (B, C, h, w)."""
    patches = tokens.reshape(len(tokens), height // PATCH, width // PATCH, -1, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)


def patchify(latents: torch.Tensor) -> torch.Tensor:
    """2x2 pixels become channels, in the order (c, ph, pw): (B, C, h, w) -> (B, 4C, h/2, w/2)."""
    batch_size, channels, height, width = latents.shape
    latents = latents.view(batch_size, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return latents.permute(0, 1, 3, 5, 2, 4).reshape(batch_size, -1, height // PATCH, width // PATCH)


@functools.lru_cache(maxsize=256)
def position_ids(*sizes: int, device: torch.device, time: int = 0) -> torch.Tensor:
    """Rotary position ids (time, i, j, ...) of a grid of these sizes: (product of them, 1 + their number), int64."""
    axes = (torch.arange(size, device=device) for size in sizes)
    return torch.cartesian_prod(torch.tensor([time], device=device), *axes)


def own_tokens(prompt_embeds: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Each text (l, D) of `prompt_embeds` (B, L, D), without the padding behind it; none is padded without a `mask`."""
    lengths = [prompt_embeds.shape[1]] * len(prompt_embeds) if mask is None else mask.sum(1).tolist()
    return [text[:length] for text, length in zip(prompt_embeds, lengths, strict=True)]


def alone(prompt: Mapping[str, torch.Tensor], negative: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Embeddings of both prompts, (1, l, D), without padding, from rows (1, ...) of `padded`."""
    rows = {"prompt_embeds": prompt, "negative_prompt_embeds": negative}
    texts = {name: own_tokens(row["prompt_embeds"], row.get("prompt_embeds_mask")) for name, row in rows.items()}
    return {name: text[None] for name, (text,) in texts.items()}


def padded(texts: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """`prompt_embeds` (B, L, D) of texts (l, D), with zeros to the longest, and where any is padded the mask (B, L)."""
    prompt_embeds = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    lengths = torch.tensor([[len(text)] for text in texts], device=prompt_embeds.device)
    mask = torch.arange(prompt_embeds.shape[1], device=prompt_embeds.device) < lengths
    return {"prompt_embeds": prompt_embeds} | ({} if mask.all() else {"prompt_embeds_mask": mask})


def chat_counts(prompts: Iterable[str], tokenizer: Any, **template: Any) -> list[int]:
    """How many tokens each prompt has in the chat template, before it is cut; `template`: options of that."""
    options = {"tokenize": False, "add_generation_prompt": True} | template
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **options) for prompt in prompts]
    return token_counts(texts, tokenizer)


def token_counts(prompts: Iterable[str], tokenizer: Any, dropped: int = 0) -> list[int]:
    """How many tokens each prompt has before it is cut, without the first, of a template, that are `dropped`."""
    return [len(ids) - dropped for ids in tokenizer(list(prompts), verbose=False).input_ids]


def token_ids(prompts: Sequence[str], tokenizer: Any, length: int) -> torch.Tensor:
    """(B, length): padded or cut; the end token stays."""
    ids: torch.Tensor = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids
