"""The losses of single samples between two logs: their means by noise level and kind, and whether all are finite."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .evaluation import quarter_means

_MANY = 512  # notes that are joined, so that few small tensors are held


_Note = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]
"""Losses, levels, rows, steps, and further numbers (B, names) of a batch."""


class NotFinite(NamedTuple):
    """The first step at which a loss, or with finite losses the gradient, was not finite."""

    step: int
    rows: list[int] | None
    """Rows of this rank whose loss was not finite; None if only the gradient was not."""


class LossLog:
    """Losses per sample since the last log, on this rank; nothing is copied from the device before it is asked for.

    Args:
        prior: (N,) bool, which rows of the training data are there for prior preservation; None where none are.
        names: of further numbers that are noted of each sample.

    Attributes:
        notes: a tuple, never changed: keep it and put it back, and what came in between was never noted.
    """

    def __init__(self, prior: np.ndarray | None = None, names: Sequence[str] = ()) -> None:
        self.prior, self.names = prior, names
        self.notes: tuple[_Note, ...] = ()
        self._bad_norm: torch.Tensor | None = None  # the first step with such a gradient norm, or infinity

    def clear(self) -> None:
        """Begins anew."""
        self.notes, self._bad_norm = (), None

    def note(
        self,
        loss: torch.Tensor,
        levels: torch.Tensor,
        rows: torch.Tensor | None,
        step: int,
        numbers: torch.Tensor | None = None,
    ) -> None:
        """Losses, noise levels and rows of a batch of a step, (B,) each; the rows on the host; `numbers` (B, names)."""
        numbers = loss.new_empty(len(loss), 0) if numbers is None else numbers
        self.notes = (*self.notes, (loss.detach(), levels, rows, torch.full((len(loss),), step), numbers))
        if len(self.notes) >= _MANY:
            self.notes = (self._joined(),)

    def note_norm(self, norm: torch.Tensor | float, step: int) -> None:
        """The gradient norm of a step, the same on all ranks."""
        found = torch.where(torch.isfinite(torch.as_tensor(norm)), torch.inf, float(step))
        self._bad_norm = found if self._bad_norm is None else torch.minimum(self._bad_norm, found)

    def _joined(self) -> _Note:
        losses, levels, rows, *others = zip(*self.notes, strict=True)
        steps, numbers = map(torch.cat, others)
        return torch.cat(losses), torch.cat(levels), None if rows[0] is None else torch.cat(rows), steps, numbers

    def not_finite(self, accelerator: Any) -> NotFinite | None:
        """The first value since the last log that was not finite, on any rank. Called on all of them."""
        bad_norm = torch.inf if self._bad_norm is None else self._bad_norm.item()
        rows, steps, first = None, torch.empty(0, dtype=torch.int64), torch.inf
        if self.notes:
            losses, _, rows, steps, _ = self._joined()
            bad = ~torch.isfinite(losses).cpu()
            rows, steps = None if rows is None else rows[bad], steps[bad]
            first = float(steps.min()) if len(steps) else torch.inf
        bad_loss = accelerator.gather(torch.tensor([first], device=accelerator.device)).min().item()
        if bad_loss <= bad_norm and bad_loss < torch.inf:
            return NotFinite(int(bad_loss), [] if rows is None else rows[steps == bad_loss].tolist())
        return NotFinite(int(bad_norm), None) if bad_norm < torch.inf else None

    def table(self, accelerator: Any) -> np.ndarray:
        """Samples of all ranks since the last `means`: (N, 2 + ...) loss, level, prior or not, the further numbers."""
        losses, levels, rows, _, numbers = self._joined()
        columns = [losses.float(), levels.float()]
        if self.prior is not None and rows is not None:
            columns.append(torch.from_numpy(self.prior)[rows].to(losses.device, torch.float32))
        table = torch.cat([torch.stack(columns, 1), numbers.float()], dim=1)
        table = accelerator.pad_across_processes(table, pad_index=-1)
        gathered: np.ndarray = accelerator.gather(table).cpu().numpy()
        return gathered[gathered[:, 1] >= 0]

    def means(self, accelerator: Any, level_range: float) -> dict[str, float]:
        """Means of all ranks since the last call, which then begins anew: `loss_q1` to `loss_q4`, per noise range.

        With prior preservation these are of the user's own samples, and `instance_loss` and `prior_loss` are the means
        of both kinds, without weights. The further numbers have their names.
        """
        if not self.notes:
            return {}
        table = self.table(accelerator)
        self.notes = ()
        split = table.shape[1] - len(self.names)
        table, numbers = table[:, :split], table[:, split:].astype(np.float64)
        more = dict(zip(self.names, numbers.mean(axis=0).tolist(), strict=True))
        if split == 2:
            return quarter_means(table[:, 0], table[:, 1] / level_range) | more
        own, prior = table[table[:, 2] == 0], table[table[:, 2] == 1]
        kinds = {"instance_loss": own[:, 0], "prior_loss": prior[:, 0]}
        means = {name: float(values.mean()) for name, values in kinds.items() if values.size}
        return quarter_means(own[:, 0], own[:, 1] / level_range) | means | more
