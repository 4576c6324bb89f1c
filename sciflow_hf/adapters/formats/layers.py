"""An adapter as its layers: what each format holds, whatever it calls them. Fusing and splitting matrices, exactly."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from ...errors import SciflowError

LORA, DORA, LOHA, LOKR, OFT = "lora", "dora", "loha", "lokr", "oft"

MAGNITUDE = "lora_magnitude_vector"
_ROWS = {LORA: ("lora_B",), DORA: ("lora_B", MAGNITUDE), LOHA: ("hada_w1_a", "hada_w2_a")}
_COLUMNS = {LORA: ("lora_A",), DORA: ("lora_A",), LOHA: ("hada_w1_b", "hada_w2_b")}
"""Factors of an update (rows, rank) and (rank, columns), in the same order; the magnitude has rows only."""


@dataclass(frozen=True)
class Layer:
    """The adapter of one layer.

    Args:
        kind: `lora`, `dora`, `loha`, `lokr` or `oft`.
        weights: PEFT's names of its parameters, such as `lora_A`, and their values.
        scale: the update is multiplied by it: alpha / rank, or alpha / sqrt(rank) of rank-stabilised LoRA.
    """

    kind: str
    weights: dict[str, torch.Tensor]
    scale: float

    @property
    def rank(self) -> int | None:
        """Inner dimension; None where nothing is decomposed (LoKr of two whole matrices)."""
        for name in ("lora_A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if name in self.weights:
                return self.weights[name].shape[0]
        return None

    @property
    def alpha(self) -> float:
        """What makes alpha / rank the scale; 1 where there is no rank."""
        return float(f"{self.scale * (self.rank or 1):.9g}")

    def scaled(self, factor: float) -> "Layer":
        """The same update with `factor` less in its scale and more in its weights."""
        if factor == 1:
            return self
        weights = dict(self.weights)
        first = next(n for n in ("lora_B", "hada_w1_a", "lokr_w1", "lokr_w1_a") if n in weights)
        weights[first] = weights[first] * factor
        return replace(self, weights=weights, scale=self.scale / factor)


Adapter: TypeAlias = dict[str, Layer]
"""Full path of a layer, `transformer.` and the like included -> its adapter."""


def fuse(layers: Sequence[Layer | None], ratios: Sequence[int]) -> Layer:
    """One adapter for a matrix whose rows are several layers; those without adapter get zeros (norms: ones).

    The ranks add up: a block of the new factor (rows, rank) for each layer, zero elsewhere. Where all layers share
    the factor on the input side (a fused adapter that was split), it stays one.

    Args:
        ratios: rows of the layers relative to each other.
    """
    there = [layer for layer in layers if layer is not None]
    kind, scale = there[0].kind, there[0].scale
    there = [layer.scaled(layer.scale / scale) for layer in there]
    weights: dict[str, torch.Tensor] = {}
    shared = len(there) == len(layers) and all(
        torch.equal(layer.weights[name], there[0].weights[name]) for layer in there[1:] for name in _COLUMNS[kind]
    )
    for name in _COLUMNS[kind]:
        factors = [layer.weights[name] for layer in there]
        weights[name] = factors[0] if shared else torch.cat(factors)
    for name in _ROWS[kind]:
        factors = [layer.weights[name] for layer in there]
        if shared:
            weights[name] = torch.cat(factors)
            continue
        pairs = list(zip(layers, ratios, strict=True))
        unit = next(len(layer.weights[name]) // ratio for layer, ratio in pairs if layer is not None)
        if name == MAGNITUDE:  # a row that nothing reads may have any norm
            weights[name] = torch.cat(
                [factors[0].new_ones(unit * r) if x is None else x.weights[name] for x, r in pairs]
            )
            continue
        whole = factors[0].new_zeros(unit * sum(ratios), sum(factor.shape[1] for factor in factors))
        row = column = 0
        for layer, ratio in pairs:
            if layer is not None:
                factor = factors.pop(0)
                whole[row : row + len(factor), column : column + factor.shape[1]] = factor
                column += factor.shape[1]
            row += unit * ratio
        weights[name] = whole
    return Layer(kind, weights, scale)


def split(layer: Layer, ratios: Sequence[int], name: str) -> list[Layer | None]:
    """The adapters of several layers out of that of the matrix they are the rows of; None for one without.

    Where the layers use columns of their own, as after `fuse`, each keeps those only; otherwise all of them.

    Args:
        name: of the matrix, for errors.

    Raises:
        SciflowError: the update is a Kronecker product, whose rows are none.
    """
    if layer.kind not in _ROWS:
        raise SciflowError(
            f"{name}: a {layer.kind} of the fused matrix is none of the {len(ratios)} layers that it is made of "
            "here (query, key, value). Train such an adapter on networks in diffusers' layout."
        )
    rows = len(layer.weights[_ROWS[layer.kind][0]])
    if rows % sum(ratios):
        raise SciflowError(f"{name}: {rows} rows cannot be cut in the ratio {':'.join(map(str, ratios))}.")
    sizes = [rows // sum(ratios) * ratio for ratio in ratios]
    cut = {key: layer.weights[key].split(sizes) for key in _ROWS[layer.kind]}
    used = {key: [part.ne(0).any(dim=0) for part in parts] for key, parts in cut.items() if key != MAGNITUDE}
    apart = _apart(used, len(ratios))
    found: list[Layer | None] = []
    for i in range(len(ratios)):
        weights = {key: parts[i] for key, parts in cut.items()}
        weights |= {key: layer.weights[key] for key in _COLUMNS[layer.kind]}
        if apart:
            for row, column in zip((n for n in _ROWS[layer.kind] if n != MAGNITUDE), _COLUMNS[layer.kind], strict=True):
                mask = used[row][i]
                if layer.kind == DORA and not mask.any():  # its norms count all the same
                    mask = torch.ones_like(mask)
                weights[row], weights[column] = weights[row][:, mask], weights[column][mask]
        nothing = not weights[_COLUMNS[layer.kind][0]].shape[0]
        found.append(None if nothing else replace(layer, weights=weights))
    return found


def _apart(used: dict[str, list[torch.Tensor]], parts: int) -> bool:
    """Whether no column belongs to two layers. An adapter of zeros, not yet trained, is cut into equal pieces."""
    for masks in used.values():
        rank = len(masks[0])
        if not any(bool(mask.any()) for mask in masks):
            if rank % parts:
                return False
            for i, mask in enumerate(masks):
                mask[i * rank // parts : (i + 1) * rank // parts] = True
    counts = [[int(mask.sum()) for mask in masks] for masks in used.values()]
    return all(counts[0] == other for other in counts) and all(
        int(torch.stack(masks).sum(dim=0).max()) <= 1 for masks in used.values()
    )
