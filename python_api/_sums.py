"""Sums that gradients need, in a fixed order on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_rows(rows: Tensor, place: Tensor, size: int) -> Tensor:
    """[size, K]: the sum of the rows [n, K] that go to each place [n]; places out of range get nothing.

    On a GPU index_add adds atomically, while index_put sorts first.
    """
    there = (place >= 0) & (place < size)  # on a GPU nothing has looked at what place holds
    place = torch.where(there, place, size).long()
    rows = torch.where(there[:, None], rows, 0.0)
    sums = rows.new_zeros(size + 1, rows.shape[1])
    if rows.device.type == "cpu":
        return sums.index_add(0, place, rows)[:size]
    return sums.index_put((place,), rows, accumulate=True)[:size]
