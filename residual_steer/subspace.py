"""What features span: their second moments, summed batch by batch, and the directions that hold their energy.

The rule by which directions are added, task after task, is that of gradient projection memory (Saha et al. 2021, arXiv
2103.09762), on covariances as in Adam-NSCL (Wang et al. 2021, arXiv 2103.07113), which need no stored features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SecondMoment", "Subspace"]

_ROWS = 8192  # that are taken to fp64 at a time
_SLACK = 1e-12  # by which a sum of shares may miss what it adds up to


class SecondMoment:
    """Σ x xᵀ of the features x that went by, uncentred; nothing else of them is kept.

    Args:
        inputs: how many features there are, the 1 of a bias among them.
        bias: whether a 1 is put behind every x.
        device: where it is summed: in fp64, and so on the CPU for a device that has none.
    """

    def __init__(self, inputs: int, bias: bool, device: torch.device) -> None:
        self.device = torch.device("cpu") if device.type == "mps" else device
        self.bias, self.count = bias, 0
        self.sum = torch.zeros(inputs, inputs, dtype=torch.float64, device=self.device)

    def add(self, x: Tensor) -> None:
        """Add features, `(tokens, width)`."""
        self.count += len(x)
        for part in torch.split(x, _ROWS):
            rows = part.to(self.device).double()
            rows = F.pad(rows, (0, 1), value=1.0) if self.bias else rows
            self.sum.addmm_(rows.t(), rows)


@dataclass(frozen=True)
class Subspace:
    """A space of directions, and what lies outside of it.

    Attributes:
        basis: U, `(inputs, dimensions)` in fp64, with orthonormal columns.
    """

    basis: Tensor

    @classmethod
    def nothing(cls, inputs: int) -> Subspace:
        """Return the space without a direction."""
        return cls(torch.zeros(inputs, 0, dtype=torch.float64))

    @property
    def left(self) -> int:
        """How many dimensions lie outside."""
        return self.basis.shape[0] - self.basis.shape[1]

    def share(self, moment: Tensor) -> float:
        """Return the part of the features' energy that lies inside, tr(Uᵀ M U) / tr(M), from 0 to 1.

        Args:
            moment: M, `(inputs, inputs)`.
        """
        total = float(moment.trace())
        return _energy_inside(self.basis.to(moment), moment) / total if total else 1.0

    def extend(self, moment: Tensor, energy: float) -> Subspace:
        """Return the smallest space around this one that holds `energy` of the features' energy.

        What the space holds already counts. What is missing is taken from the rest, in the order of its eigenvalues.

        Args:
            moment: M, `(inputs, inputs)`, the second moment of a task's features.
            energy: from 0 to 1; 1 takes all that the numbers can tell from zero: eigenvalues above what fp32 (of the
                features) and fp64 (of their sum) resolve, the larger of ε₃₂² and inputs·ε₆₄ times the largest.
        """
        basis = self.basis.to(moment)
        total, inside = float(moment.trace()), _energy_inside(basis, moment)
        if not total or not self.left:
            return self
        outside = moment - basis @ (basis.t() @ moment)
        outside = outside - (outside @ basis) @ basis.t()
        values, vectors = torch.linalg.eigh((outside + outside.t()) / 2)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        largest = float(values[0] if not basis.shape[1] else torch.linalg.eigvalsh(moment)[-1])
        resolved = int((values > _tolerance(len(moment)) * largest).sum())
        before = inside + values.cumsum(0) - values  # what is held before each direction is added
        needed = resolved if energy == 1 else int((before < energy * total * (1 - _SLACK)).sum())
        more = vectors[:, : min(needed, resolved, self.left)]
        for _ in range(2):  # once leaves what rounding leaves
            more = torch.linalg.qr(more - basis @ (basis.t() @ more)).Q
        return Subspace(torch.cat([basis, more], dim=1).cpu())


def _energy_inside(basis: Tensor, moment: Tensor) -> float:
    return float(((moment @ basis) * basis).sum())


def _tolerance(inputs: int) -> float:
    return max(torch.finfo(torch.float32).eps ** 2, inputs * torch.finfo(torch.float64).eps)
