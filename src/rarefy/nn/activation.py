"""An activation that torch has no module for."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class SquaredReLU(nn.Module):
    """max(x, 0)^2, of any shape and dtype (Primer: So et al. 2021, arXiv:2109.08668, section 4.1).

    Between two sparse layers `sparsify` makes it one call with them.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()
