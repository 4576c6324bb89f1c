"""The losses of single samples between two logs: their means by noise level and kind, and whether all are finite."""

from typing import Any

import numpy as np
import torch

from .evaluation import quarter_means

_MANY = 512  # notes that are joined, so that few small tensors are held


class LossLog:
    """Losses per sample since the last log, on this rank; nothing is copied from the device before it is asked for.

    Args:
        prior: (N,) bool, which rows of the training data are there for prior preservation; None where none are.

    Attributes:
        notes: a tuple, never changed: keep it and put it back, and what came in between was never noted.
    """

    def __init__(self, prior: np.ndarray | None = None) -> None:
        self.prior = prior
        self.notes: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], ...] = ()

    def note(self, loss: torch.Tensor, levels: torch.Tensor, rows: torch.Tensor | None) -> None:
        """Losses, noise levels and rows of a batch, (B,) each; the rows on the host."""
        self.notes = (*self.notes, (loss.detach(), levels, rows))
        if len(self.notes) >= _MANY:
            self.notes = (self._joined(),)

    def _joined(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        losses, levels, rows = zip(*self.notes, strict=True)
        return torch.cat(losses), torch.cat(levels), None if rows[0] is None else torch.cat(rows)

    def bad_rows(self, accelerator: Any) -> list[int] | None:
        """None where all losses of all ranks are finite; else the rows of this rank whose loss is not. All ranks."""
        if not self.notes:
            return None
        losses, _, rows = self._joined()
        bad = ~torch.isfinite(losses)
        if not accelerator.reduce(bad.any().float(), "sum").item():
            return None
        return [] if rows is None else rows[bad.cpu()].tolist()

    def means(self, accelerator: Any, level_range: float) -> dict[str, float]:
        """Means of all ranks since the last call, which then begins anew: `loss_q1` to `loss_q4`, per noise range.

        With prior preservation these are of the user's own samples, and `instance_loss` and `prior_loss` are the means
        of both kinds, without weights.
        """
        if not self.notes:
            return {}
        losses, levels, rows = self._joined()
        self.notes = ()
        columns = [losses.float(), levels.float()]
        if self.prior is not None and rows is not None:
            columns.append(torch.from_numpy(self.prior)[rows].to(losses.device, torch.float32))
        table = accelerator.pad_across_processes(torch.stack(columns, 1), pad_index=-1)
        table = accelerator.gather(table).cpu().numpy()
        table = table[table[:, 1] >= 0]
        if len(columns) == 2:
            return quarter_means(table[:, 0], table[:, 1] / level_range)
        own, prior = table[table[:, 2] == 0], table[table[:, 2] == 1]
        kinds = {"instance_loss": own[:, 0], "prior_loss": prior[:, 0]}
        means = {name: float(values.mean()) for name, values in kinds.items() if values.size}
        return quarter_means(own[:, 0], own[:, 1] / level_range) | means
