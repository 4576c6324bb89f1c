"""Prior preservation (Ruiz et al. 2023): samples of a second cache that keep what the network knew, with a weight."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Prior:
    """The rows of a data set that are there for prior preservation.

    Args:
        rows: (N,) bool.
        loss_weight: of the mean loss of these rows; that of the others has the weight 1.
    """

    rows: np.ndarray
    loss_weight: float

    def select(self, rows: np.ndarray) -> "Prior":
        """The subset `rows`."""
        return Prior(self.rows[rows], self.loss_weight)


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
