"""The options of training that noise levels and losses are made of, as `DiffusionTrainingArguments` has them."""

from typing import Protocol


class LevelArguments(Protocol):
    """Which noise levels are trained on."""

    weighting_scheme: str
    logit_mean: float
    logit_std: float
    mode_scale: float
    timestep_shift: str
    stratified_levels: bool

    @property
    def total_batch(self) -> int: ...


class LossArguments(LevelArguments, Protocol):
    """All that a step reads."""

    loss_type: str
    huber_delta: float
    min_snr_gamma: float | None
    edit_loss: str
    edit_weight: float
    edit_balance: float
