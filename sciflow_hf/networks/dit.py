"""DiT, a diffusion transformer with adaLN-zero (Peebles and Xie 2023): features, and images out of them.

diffusers' `DiTTransformer2DModel` does not serve: it draws class dropout from torch's running generator, keeps the
timestep and class embeddings once per block, takes square images only, and has no features to give.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed_from_grid
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn


class DiTModel(ModelMixin, ConfigMixin):
    """The transformer: images to features, one vector for each patch.

    Args:
        image_size: height and width of the input, or one number for both. Other sizes work, as multiples of the patch.
        patch_size: side of a patch.
        in_channels: of the input: pixels, or latents of a VAE.
        hidden_size: width of a token.
        num_hidden_layers: blocks.
        num_attention_heads: divide `hidden_size`.
        num_classes: classes; one more embedding stands for none. 0: without classes.
        learn_sigma: twice the output channels, the second half for the variance.
        id2label: names of the classes, for people; not used here.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["DiTBlock"]
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str] | None] = ["norm_out", "proj_out"]  # of an image model

    @register_to_config
    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 3,
        hidden_size: int = 384,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 6,
        num_classes: int = 1000,
        learn_sigma: bool = False,
        id2label: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.x_embedder = nn.Linear(in_channels * patch_size**2, hidden_size)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(256, hidden_size)
        self.class_embedder = nn.Embedding(num_classes + 1, hidden_size)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_attention_heads) for _ in range(num_hidden_layers))
        self.apply(_initialise)
        for embedding in (self.class_embedder, self.time_embedder.linear_1, self.time_embedder.linear_2):
            nn.init.normal_(embedding.weight, std=0.02)
        for block in self.blocks:
            _zero(block.modulation)
        self._add_head()

    def _add_head(self) -> None:
        """Layers after the blocks; features need none."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Features of noisy images: (B, C, H, W) -> `sample` (B, N, D), a token a patch, row by row from the top left.

        Args:
            hidden_states: (B, C, H, W).
            timestep: (B,), 0 (data) to 1000 (noise), integers or not.
            class_labels: (B,), int64; `num_classes`, or None for all, means no class.
        """
        tokens, _ = self._features(hidden_states, timestep, class_labels)
        return Transformer2DModelOutput(sample=tokens) if return_dict else (tokens,)

    def _features(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, N, D) and what conditions them, (B, D)."""
        patch, dtype = self.config.patch_size, hidden_states.dtype
        height, width = (side // patch for side in hidden_states.shape[-2:])
        # (B, C, h p, w p) -> (B, h w, C p p)
        patches = hidden_states.unflatten(3, (width, patch)).unflatten(2, (height, patch))
        tokens = self.x_embedder(patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        tokens = tokens + positions(height, width, self.config.hidden_size, tokens.device).to(dtype)
        if class_labels is None:
            class_labels = timestep.new_full((len(tokens),), self.config.num_classes, dtype=torch.int64)
        condition = self.time_embedder(self.time_proj(timestep).to(dtype)) + self.class_embedder(class_labels)
        condition = F.silu(condition)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, condition)
            else:
                tokens = block(tokens, condition)
        return tokens, condition


class DiTForImageDiffusion(DiTModel):
    """The transformer with its last layer: noisy images to predictions. See `DiTModel`."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str] | None] = None

    def _add_head(self) -> None:
        hidden_size, out = self.config.hidden_size, self.config.in_channels * (1 + self.config.learn_sigma)
        self.norm_out = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.norm_out_modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj_out = nn.Linear(hidden_size, self.config.patch_size**2 * out)
        _zero(self.norm_out_modulation)
        _zero(self.proj_out)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Predictions for noisy images: (B, C, H, W) -> `sample` (B, C or 2 C, H, W). Arguments as of `DiTModel`."""
        tokens, condition = self._features(hidden_states, timestep, class_labels)
        shift, scale = self.norm_out_modulation(condition)[:, None].chunk(2, dim=-1)
        patches = self.proj_out(self.norm_out(tokens) * (1 + scale) + shift)
        patch = self.config.patch_size
        height, width = (side // patch for side in hidden_states.shape[-2:])
        # (B, h w, C p p) -> (B, C, h p, w p)
        patches = patches.unflatten(2, (-1, patch, patch)).unflatten(1, (height, width))
        sample = patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition; the gates start at 0 (adaLN-zero)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.to_qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.to_out = nn.Linear(hidden_size, hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.ff = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size), nn.GELU("tanh"), nn.Linear(4 * hidden_size, hidden_size)
        )

    def forward(self, tokens: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """(B, N, D) and (B, D) -> (B, N, D)."""
        modulation = self.modulation(condition)[:, None].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        tokens = tokens + gate1 * self._attention(self.norm1(tokens) * (1 + scale1) + shift1)
        return tokens + gate2 * self.ff(self.norm2(tokens) * (1 + scale2) + shift2)

    def _attention(self, tokens: torch.Tensor) -> torch.Tensor:
        # (B, N, 3 D) -> 3 x (B, heads, N, D / heads)
        query, key, value = self.to_qkv(tokens).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.to_out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def positions(height: int, width: int, hidden_size: int, device: torch.device) -> torch.Tensor:
    """Sine and cosine of column (first half) and row of each patch: (height width, hidden_size), float32."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid = torch.stack([columns, rows]).float()
    return get_2d_sincos_pos_embed_from_grid(hidden_size, grid).to(device, torch.float32)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def _zero(layer: Any) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
