"""Prior preservation (Ruiz et al. 2023): samples of a second cache that keep what the network knew, with a weight."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cache import LatentCache

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prior:
    """What of a data set is there for prior preservation.

    Args:
        rows: (N,) bool.
        loss_weight: of the mean loss of these rows, beside 1 of the mean loss of the others.
    """

    rows: np.ndarray
    loss_weight: float

    def select(self, rows: np.ndarray) -> "Prior":
        """Of some rows."""
        return Prior(self.rows[rows], self.loss_weight)


def with_prior(own: LatentCache, prior: LatentCache, *, loss_weight: float) -> LatentCache:
    """The rows of `own`, then those of `prior`, two views of one index; an epoch draws as many of either kind.

    Every row comes at least once an epoch.
    """
    rows = np.concatenate([own._rows, prior._rows])
    train = LatentCache(own._index, dtype=own.dtype, rows=rows)
    train.online_text = own.online_text
    train.prior = Prior(np.arange(len(rows)) >= len(own), loss_weight)
    repeats = np.ones(len(own)) if own.repeats is None else own.repeats
    draws = max(repeats.sum(), len(prior))
    train.repeats = np.concatenate([repeats * (draws / repeats.sum()), np.full(len(prior), draws / len(prior))])
    logger.info("%d samples of prior preservation: %.4g times each an epoch.", len(prior), draws / len(prior))
    return train


def loss_weights(dataset: Any) -> np.ndarray | None:
    """Weight of the loss of each row, (N,), float32; None where all count alike.

    So that their mean over what an epoch draws is the objective of Ruiz et al. 2023, equation 2, as diffusers'
    scripts compute it: mean loss of the own samples + `loss_weight` x mean loss of the prior samples.
    """
    prior = getattr(dataset, "prior", None)
    if prior is None:
        return None
    repeats = getattr(dataset, "repeats", None)
    draws = np.ones(len(prior.rows)) if repeats is None else repeats
    share = draws[prior.rows].sum() / draws.sum()
    weights: np.ndarray = np.where(prior.rows, prior.loss_weight / share, 1 / (1 - share)).astype(np.float32)
    return weights


def without_prior(dataset: Any) -> Any:
    """The user's own samples."""
    prior = getattr(dataset, "prior", None)
    return dataset if prior is None else dataset.select(np.flatnonzero(~prior.rows))
