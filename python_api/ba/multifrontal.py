"""Sparse Cholesky factorization of the cameras' reduced system, on any device: the multifrontal method (Duff and Reid,
1983) over a nested dissection of the cameras (George, 1973), whose dense fronts LAPACK or cuSOLVER factor for torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

LEAF = 24  # cameras that aren't worth dissecting
ROWS = 128  # added to a front at a time: what is in between stays in the caches


class Graph:
    """Undirected, without loops: neighbours[ends[i] : ends[i + 1]] of node i."""

    def __init__(self, pairs: Array, nodes: int):
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        both = np.concatenate([pairs, pairs[:, ::-1]])
        both = both[np.argsort(both[:, 0], kind="stable")]
        self.neighbours = both[:, 1]
        self.ends = np.searchsorted(both[:, 0], np.arange(nodes + 1))

    def around(self, nodes: Array) -> Array:
        """All neighbours of some nodes, with repetitions."""
        first, last = self.ends[nodes], self.ends[nodes + 1]
        counts = last - first
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.neighbours[np.repeat(first, counts) + within]

    def levels(self, start: int, inside: Array) -> list[Array]:
        """The nodes at each distance from start, among those that are `inside` [nodes] bool."""
        left = inside.copy()
        left[start] = False
        found = [np.array([start])]
        while True:
            next_level = np.unique(self.around(found[-1]))
            next_level = next_level[left[next_level]]
            if not next_level.size:
                return found
            left[next_level] = False
            found.append(next_level)


def dissect(graph: Graph, count: int) -> list[tuple[Array, int]]:
    """Nested dissection: (nodes, number of the parent or -1) of each part, children before parents.

    A part is what separates its children from each other; leaves are what is left.
    """
    parts: list[tuple[Array, int]] = []  # parents first

    def split(nodes: Array) -> tuple[Array, list[Array]]:
        """What separates, and what is separated."""
        inside = np.zeros(count, dtype=bool)
        inside[nodes] = True
        levels = graph.levels(int(nodes[0]), inside)
        reached = sum(level.size for level in levels)
        if reached < nodes.size:  # not connected
            found = np.concatenate(levels)
            inside[found] = False
            return found[:0], [found, nodes[inside[nodes]]]
        for _ in range(3):  # from an end of it
            again = graph.levels(int(levels[-1][0]), inside)
            if len(again) <= len(levels):
                break
            levels = again
        sizes = np.cumsum([level.size for level in levels])
        # The smallest level that leaves at least a fifth on both sides; if none does, the one in the middle.
        fair = [
            i for i in range(1, len(levels) - 1) if sizes[i - 1] >= reached / 5 and reached - sizes[i] >= reached / 5
        ]
        middle = int(np.searchsorted(sizes, reached / 2))
        at = min(fair, key=lambda i: levels[i].size) if fair else middle
        if not 0 < at < len(levels) - 1:
            return nodes, []
        below, above = np.concatenate(levels[:at]), np.concatenate(levels[at + 1 :])
        return levels[at], [below, above]

    todo = [(np.arange(count), -1)] if count else []
    while todo:
        nodes, parent = todo.pop()
        separator, rest = (nodes, []) if nodes.size <= LEAF else split(nodes)
        parts.append((separator, parent))
        todo += [(part, len(parts) - 1) for part in rest]
    last = len(parts) - 1
    return [(nodes, last - parent if parent >= 0 else -1) for nodes, parent in reversed(parts)]


class Elimination:
    """The order of elimination, and what it ties together.

    Args:
        rows, columns: [entries], where the matrix has some, in either triangle.
        parts: as of `SparseCholesky`.
        size: number of variables.

    Attributes:
        order: the variables; the part i is order[starts[i] : starts[i + 1]].
        by_part: the entries by the part that is eliminated first; those of part i are by_part[ends[i] : ends[i + 1]].
        low, high: [entries] in that order, the earlier and the later place in `order` of each.
        boundaries: of each part, the places behind it that it is tied to when it is eliminated.
    """

    def __init__(self, rows: Array, columns: Array, parts: Sequence[tuple[Array, int]], size: int):
        self.order = np.concatenate([own for own, _ in parts]) if parts else np.empty(0, np.int64)
        place = np.empty(size, np.int32)
        place[self.order] = np.arange(self.order.size, dtype=np.int32)
        sizes = [own.size for own, _ in parts]
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
        part_of = np.repeat(np.arange(len(parts), dtype=np.int32), sizes)  # by place
        low, high = place[rows], place[columns]
        low, high = np.minimum(low, high), np.maximum(low, high)
        self.by_part = np.argsort(part_of[low], kind="stable").astype(np.int32)
        self.low, self.high = low[self.by_part], high[self.by_part]
        self.ends = np.searchsorted(part_of[self.low], np.arange(len(parts) + 1))
        self.boundaries: list[Array] = []
        waiting: list[list[Array]] = [[] for _ in parts]  # boundaries of children
        for i, (_, parent) in enumerate(parts):
            own = np.unique(self.high[self.ends[i] : self.ends[i + 1]])
            reached = np.unique(np.concatenate([own, *waiting[i]]))
            self.boundaries.append(reached[reached >= self.starts[i + 1]])
            if parent >= 0:
                waiting[parent].append(self.boundaries[i])
            waiting[i] = []


def flops(edges: Array, parts: Sequence[tuple[Array, int]], widths: Array, shared: int = 0) -> float:
    """Of a factorization: at most that, and without `shared` just that.

    Args:
        edges: [E, 2] nodes that are tied.
        parts: of nodes, as of `SparseCholesky`.
        widths: [nodes] variables of each.
        shared: variables of no node that are eliminated last, and that each may be tied to.
    """
    e = Elimination(edges[:, 0], edges[:, 1], parts, widths.size)
    own = [float(widths[nodes].sum()) for nodes, _ in parts]
    behind = [float(widths[e.order[boundary]].sum()) + shared for boundary in e.boundaries]
    return shared**3 / 3 + sum(a**3 / 3 + a**2 * b + a * b**2 for a, b in zip(own, behind, strict=True))


@dataclass
class Front:
    """A dense part of the factor: `own` variables and, behind them, those of later fronts that these are tied to."""

    own: Tensor  # variables, in the order of elimination
    boundary: Tensor
    source: Tensor  # entries of the matrix that come in here
    place: Tensor  # where in the front, as a number of its flattened square
    to_parent: Tensor | None  # where its boundary is in the parent's variables
    parent: int
    factor: Tensor | None = None  # [own, own], lower
    below: Tensor | None = None  # [boundary, own]

    @property
    def size(self) -> int:
        return self.own.numel() + self.boundary.numel()


class SparseCholesky:
    """The factor of a symmetric matrix with entries at given places, for one set of values after the other.

    Args:
        source: [entries] int32: which value each entry is.
        rows, columns: [entries] int32: where it goes; those for one place are added up. (i, j) stands for (j, i), too:
            where both are there, both are added.
        parts: variables that are eliminated together and their parent's number, children before parents. Entries may
            tie variables of a part and of its ancestors only.
        size: number of variables.
    """

    def __init__(self, source: Tensor, rows: Tensor, columns: Tensor, parts: Sequence[tuple[Array, int]], size: int):
        device = rows.device
        e = Elimination(rows.cpu().numpy(), columns.cpu().numpy(), parts, size)
        values, starts, boundaries = source.cpu().numpy()[e.by_part], e.starts, e.boundaries

        def tensor(a: Array) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(a, dtype=np.int32)).to(device)

        self.fronts: list[Front] = []
        for i, ((own, parent), boundary) in enumerate(zip(parts, boundaries, strict=True)):
            entries = slice(e.ends[i], e.ends[i + 1])
            where, width = self._finder(starts[i], own.size, boundary), own.size + boundary.size
            if width * width >= 2**31:
                raise MemoryError(f"a dense front of {width} variables is too large")
            place = where(e.high[entries]) * width + where(e.low[entries])
            own_variables = tensor(e.order[starts[i] : starts[i + 1]])
            self.fronts.append(
                Front(own_variables, tensor(e.order[boundary]), tensor(values[entries]), tensor(place), None, parent)
            )
        for i, front in enumerate(self.fronts):
            if front.parent >= 0 and boundaries[i].size:
                p = front.parent
                where = self._finder(starts[p], starts[p + 1] - starts[p], boundaries[p])
                front.to_parent = tensor(where(boundaries[i]))

    @staticmethod
    def _finder(start: int, own: int, boundary: Array) -> Any:
        """Positions to numbers in a front."""
        return lambda at: np.where(at < start + own, at - start, own + np.searchsorted(boundary, at))

    def factorize(self, values: Tensor, diagonal: Tensor) -> bool:
        """Whether the matrix with these values, and `diagonal` [size] added, is positive definite."""
        failed = torch.zeros((), dtype=torch.int32, device=values.device)
        updates: list[Tensor | None] = [None] * len(self.fronts)  # what children leave for a front
        for i, front in enumerate(self.fronts):
            square, updates[i] = updates[i], None
            if square is None:
                square = values.new_zeros(front.size, front.size)
            square.view(-1).index_add_(0, front.place, values[front.source])
            own = front.own.numel()
            square.diagonal()[:own] += diagonal[front.own]
            front.factor, info = torch.linalg.cholesky_ex(square[:own, :own])
            failed += info
            if front.to_parent is None:
                continue
            front.below = torch.linalg.solve_triangular(front.factor.mT, square[own:, :own], upper=True, left=False)
            update = square[own:, own:].addmm_(front.below, front.below.mT, alpha=-1)
            if (parent := updates[front.parent]) is None:
                size = self.fronts[front.parent].size
                updates[front.parent] = parent = values.new_zeros(size, size)
            for rows in range(0, update.shape[0], ROWS):
                at = front.to_parent[rows : rows + ROWS, None], front.to_parent
                parent[at] += update[rows : rows + ROWS]
        return int(failed) == 0

    def solve(self, rhs: Tensor) -> Tensor:
        """x [size] of the matrix that was factorized. The factor is gone afterwards."""
        x = rhs.clone()
        for front in self.fronts:
            if not front.own.numel():
                continue
            y = torch.linalg.solve_triangular(front.factor, x[front.own, None], upper=False)
            x[front.own] = y.squeeze(1)
            if front.below is not None:
                x[front.boundary] -= (front.below @ y).squeeze(1)
        for front in reversed(self.fronts):
            if not front.own.numel():
                continue
            y = x[front.own, None]
            if front.below is not None:
                y = y - front.below.mT @ x[front.boundary, None]
            assert front.factor is not None
            x[front.own] = torch.linalg.solve_triangular(front.factor.mT, y, upper=True).squeeze(1)
            front.factor = front.below = None
        return x
