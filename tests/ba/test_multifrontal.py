"""Nested dissection and the sparse Cholesky factorization over it, against dense matrices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from effk.ba import multifrontal
from effk.ba.multifrontal import LEAF, Graph, SparseCholesky, dissect, flops
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ..kit.tensors import generator, same_bits

UNIT = 2.0**-53
Parts = list[tuple[np.ndarray, int]]


def path(nodes: int) -> np.ndarray:
    return np.stack([np.arange(nodes - 1), np.arange(1, nodes)], 1).reshape(-1, 2)


def grid(rows: int, columns: int) -> np.ndarray:
    at = np.arange(rows * columns).reshape(rows, columns)
    right, down = (at[:, :-1], at[:, 1:]), (at[:-1], at[1:])
    return np.concatenate([np.stack([a.ravel(), b.ravel()], 1) for a, b in (right, down)])


def complete(nodes: int) -> np.ndarray:
    return np.argwhere(np.tri(nodes, k=-1))


@dataclass(frozen=True)
class Case:
    kind: str
    nodes: int
    seed: int

    @property
    def edges(self) -> np.ndarray:
        """[E, 2], nodes under any names, some edges twice, some both ways, and some loops."""
        rng, n = np.random.default_rng(self.seed), self.nodes
        edges = {
            "none": lambda: np.empty((0, 2), np.int64),
            "path": lambda: path(n),
            "tree": lambda: np.stack([np.arange(1, n), rng.integers(0, np.arange(1, n))], 1).reshape(-1, 2),
            "star": lambda: np.stack([np.arange(1, n), np.zeros(n - 1, np.int64)], 1).reshape(-1, 2),
            "complete": lambda: complete(n),
            "grid": lambda: np.array([e for e in grid(int(n**0.5) + 1, int(n**0.5) + 1) if max(e) < n]).reshape(-1, 2),
            "sparse": lambda: rng.integers(0, n, (n, 2)),  # falls apart
            "dense": lambda: rng.integers(0, n, (5 * n, 2)),
        }[self.kind if n > 1 else "none"]()
        edges = np.concatenate([edges, edges[::3], edges[::4, ::-1], np.repeat(np.arange(min(n, 2)), 2).reshape(-1, 2)])
        return rng.permutation(n)[rng.permutation(edges)] if n else edges

    @property
    def parts(self) -> Parts:
        return dissect(Graph(self.edges, self.nodes), self.nodes)

    @property
    def matrix(self) -> Tensor:
        """Symmetric and positive definite, with entries where there are edges, of many magnitudes."""
        g = generator(self.seed)
        a = torch.zeros(self.nodes, self.nodes, dtype=torch.float64)
        for i, j in self.edges.tolist():
            a[i, j] = a[j, i] = float(torch.randn((), generator=g))
        a.diagonal().zero_()
        a.diagonal().add_(a.abs().sum(1) * 1.01 + 1e-3)
        scale = 10 ** (4 * torch.rand(self.nodes, generator=g, dtype=torch.float64) - 2)
        return a * scale * scale[:, None]


KINDS = ("none", "path", "tree", "star", "complete", "grid", "sparse", "dense")


def cases(most: int = 120) -> st.SearchStrategy[Case]:
    return st.builds(Case, st.sampled_from(KINDS), st.integers(0, most), st.integers(0, 2**20))


def ancestors(parts: Parts) -> list[set[int]]:
    """Of each part, itself among them."""
    found: list[set[int]] = [set() for _ in parts]
    for i in reversed(range(len(parts))):
        parent = parts[i][1]
        found[i] = {i} | (found[parent] if parent >= 0 else set())
    return found


@given(cases(300))
def test_dissection_is_of_all_nodes_and_separates(case: Case) -> None:
    """Children come before parents, and only a part and its ancestors touch."""
    parts = case.parts
    assert sorted(np.concatenate([nodes for nodes, _ in parts]).tolist() if parts else []) == list(range(case.nodes))
    assert all(parent == -1 or i < parent < len(parts) for i, (_, parent) in enumerate(parts))
    assert sum(parent == -1 for _, parent in parts) == (case.nodes > 0)
    part_of = {int(node): i for i, (nodes, _) in enumerate(parts) for node in nodes}
    above = ancestors(parts)
    for a, b in case.edges.tolist():
        i, j = part_of[a], part_of[b]
        assert i in above[j] or j in above[i], (a, b)


@pytest.mark.parametrize(("edges", "nodes", "most"), [(path(2000), 2000, LEAF), (grid(40, 40), 1600, 2 * 40)])
def test_parts_are_small_where_they_can_be(edges: np.ndarray, nodes: int, most: int) -> None:
    """A level of a grid is a diagonal, of no more than its side; what a path has are single nodes and leaves.

    Each separator leaves a fifth or more on either side: 0.8 ** 30 of 2000 is less than a leaf.
    """
    parts = dissect(Graph(edges, nodes), nodes)
    assert max(own.size for own, _ in parts) <= most
    assert max(map(len, ancestors(parts))) <= 30


@given(cases(60))
def test_neighbours_and_levels(case: Case) -> None:
    graph = Graph(case.edges, case.nodes)
    near: list[set[int]] = [set() for _ in range(case.nodes)]
    for a, b in case.edges.tolist():
        if a != b:
            near[a].add(b)
            near[b].add(a)
    for node in range(case.nodes):
        assert set(graph.around(np.array([node])).tolist()) == near[node]
    if case.nodes < 2:
        return
    inside = np.arange(case.nodes) != 1
    seen, level = {0}, {0}
    for found in graph.levels(0, inside):
        assert set(found.tolist()) == level
        level = {b for a in level for b in near[a]} - seen - {1}
        seen |= level
    assert not level


def entries(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and values of the lower triangle, zeros left out."""
    rows, columns = matrix.tril().nonzero().unbind(1)
    return rows, columns, matrix[rows, columns]


def prepared(rows: Tensor, columns: Tensor, parts: Parts, size: int) -> SparseCholesky:
    """Values come in the order of the entries."""
    return SparseCholesky(torch.arange(len(rows)).int(), rows.int(), columns.int(), parts, size)


def solved(cholesky: SparseCholesky, values: Tensor, b: Tensor) -> Tensor:
    assert cholesky.factorize(values, torch.zeros_like(b))
    return cholesky.solve(b)


def assert_solves(matrix: Tensor, x: Tensor, b: Tensor, off: float = 0.0) -> None:
    """A Cholesky factor R, summed up in any order, solves A + E with |E| <= 3 n u |R|^T |R| (Higham, 2002), in which
    the entry i, j is at most sqrt(a_ii a_jj), since the diagonal of R^T R is A's. Entries may be `off` on top."""
    root = matrix.diagonal().sqrt()
    bound = (3 * len(matrix) + 10) * UNIT * (root * (root @ x.abs()) + b.abs() + matrix.abs() @ x.abs())
    bound += off * ((matrix != 0).double() @ x.abs())
    away = (matrix @ x - b).abs()
    assert bool((away <= bound).all()), f"{(away / bound).max():.3g} times the bound"


@given(cases())
def test_solution(case: Case) -> None:
    a = case.matrix
    rows, columns, values = entries(a)
    b = torch.randn(case.nodes, generator=generator(case.seed + 1), dtype=torch.float64)
    kept = b.clone()
    x = solved(prepared(rows, columns, case.parts, case.nodes), values, b)
    assert same_bits(b, kept)
    assert_solves(a, x, b)
    if case.nodes:  # and so it is what torch finds, as far as that is well known; A with a diagonal of 1 counts
        scale = a.diagonal().sqrt()
        condition = float(torch.linalg.cond(a / scale / scale[:, None]))
        dense = torch.linalg.solve(a, b)
        away = ((x - dense) * scale).norm() / (dense * scale).norm()
        assert away <= 10 * case.nodes**1.5 * UNIT * condition


@given(cases(60), st.integers(1, 4))
def test_nodes_of_several_variables(case: Case, width: int) -> None:
    """As cameras have them: a part's variables are those of its nodes, in any order; and what damping adds."""
    pattern = torch.zeros(case.nodes, case.nodes, dtype=torch.bool)
    for i, j in case.edges.tolist():
        pattern[i, j] = pattern[j, i] = True
    pattern.diagonal().fill_(True)
    size, g = case.nodes * width, generator(case.seed)
    block = torch.randn(size, size, generator=g, dtype=torch.float64)
    a = torch.where(pattern.repeat_interleave(width, 0).repeat_interleave(width, 1), block + block.T, 0.0)
    diagonal = a.abs().sum(1) + 0.1
    rng = np.random.default_rng(case.seed)
    parts = [
        (rng.permutation((nodes[:, None] * width + np.arange(width)).ravel()), parent) for nodes, parent in case.parts
    ]
    rows, columns, values = entries(a)
    cholesky = prepared(rows, columns, parts, size)
    assert cholesky.factorize(values, diagonal)
    b = torch.randn(size, generator=g, dtype=torch.float64)
    assert_solves(a + diagonal.diag(), cholesky.solve(b), b)


@given(cases(60))
def test_entries_of_one_place_are_added_up(case: Case) -> None:
    """Given as (i, j) or (j, i), in any order, in pieces, and some values for several places."""
    g = generator(case.seed)
    a = torch.zeros(case.nodes, case.nodes, dtype=torch.float64)
    for i, j in case.edges.tolist():
        a[i, j] = a[j, i] = 1 + (i + j) % 5
    a.diagonal().copy_(a.abs().sum(1) + 1)
    rows, columns, values = entries(a)
    count = len(values)
    pieces = torch.randint(-9, 9, (3, count), generator=g).double()
    # All pieces and what is left; and 7, which each place gets and gives back as -7.
    given_values = torch.cat([pieces.flatten(), values - pieces.sum(0), torch.tensor([7.0, -7.0]).double()])
    source = torch.cat([torch.arange(4 * count), torch.full((count,), 4 * count), torch.full((count,), 4 * count + 1)])
    order = torch.randperm(len(source), generator=g)
    flipped = torch.rand(len(source), generator=g) < 0.5
    i, j = (
        torch.where(flipped, rows.repeat(6), columns.repeat(6)),
        torch.where(flipped, columns.repeat(6), rows.repeat(6)),
    )
    pieced = SparseCholesky(source[order].int(), i[order].int(), j[order].int(), case.parts, case.nodes)
    b = torch.randn(case.nodes, generator=g, dtype=torch.float64)
    # Whole numbers, none above 100, whose sums are exact but for what elimination had left there: six roundings.
    largest = 200 + float(a.max()) if case.nodes else 0.0
    assert_solves(a, solved(pieced, given_values, b), b, 6 * UNIT * largest)


@given(cases(60), st.booleans())
def test_not_positive_definite(case: Case, is_nan: bool) -> None:
    """Says so, and the next matrix is none the worse for it."""
    if not case.nodes:
        return
    a = case.matrix
    rows, columns, values = entries(a)
    cholesky = prepared(rows, columns, case.parts, case.nodes)
    first = solved(cholesky, values, a[0])
    at = case.seed % case.nodes
    bad = values.clone()
    # What elimination leaves of a diagonal entry is less than it was.
    bad[(rows == at) & (columns == at)] = torch.nan if is_nan else -1e-3 * a[at, at]
    none = torch.zeros(case.nodes, dtype=torch.float64)
    assert not cholesky.factorize(bad, none)
    lowered = none.clone()
    lowered[at] = -1.001 * a[at, at]
    assert not cholesky.factorize(values, lowered)
    assert same_bits(first, solved(cholesky, values, a[0]))


@pytest.mark.parametrize("nodes", [0, 1])
def test_smallest(nodes: int) -> None:
    cholesky = prepared(torch.arange(nodes), torch.arange(nodes), Case("none", nodes, 0).parts, nodes)
    one = torch.ones(nodes, dtype=torch.float64)
    assert torch.equal(solved(cholesky, 4 * one, 2 * one), 0.5 * one)
    assert cholesky.factorize(-4 * one, one) == (nodes == 0)


def test_no_entries() -> None:
    """The matrix is what is added to its diagonal."""
    none = torch.empty(0, dtype=torch.int64)
    cholesky = prepared(none, none, dissect(Graph(np.empty((0, 2), np.int64), 50), 50), 50)
    assert cholesky.factorize(torch.empty(0, dtype=torch.float64), torch.full((50,), 4.0).double())
    assert torch.equal(cholesky.solve(torch.ones(50).double()), torch.full((50,), 0.25).double())


def test_parts_without_variables() -> None:
    """Of fixed cameras: they only hand on what their children have to say."""
    none = np.empty(0, np.int64)
    parts: Parts = [(np.array([0]), 1), (none, 3), (none, 3), (np.array([2, 1]), -1)]
    a = torch.tensor([[4.0, 1.0, 2.0], [1.0, 5.0, 3.0], [2.0, 3.0, 6.0]], dtype=torch.float64)
    rows, columns, values = entries(a)
    b = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    assert_solves(a, solved(prepared(rows, columns, parts, 3), values, b), b)


def test_work() -> None:
    """A dense matrix costs n^3 / 3, in whichever part; a path costs no more than its leaves."""

    def work(edges: np.ndarray, nodes: int) -> float:
        return flops(edges, dissect(Graph(edges, nodes), nodes), np.ones(nodes, np.int64))

    assert work(complete(90), 90) == pytest.approx(90**3 / 3)
    assert work(path(2000), 2000) <= 2000 / LEAF * 2 * (LEAF + 2) ** 3


@given(cases(60), st.integers(0, 3))
def test_work_is_that_of_the_fronts(case: Case, shared: int) -> None:
    """Of nodes with several variables, and variables that all nodes are tied to."""
    widths = np.random.default_rng(case.seed).integers(1, 4, case.nodes)
    first = np.cumsum(widths) - widths
    of_node = [np.arange(a, a + w) for a, w in zip(first, widths, strict=True)]
    last = np.arange(widths.sum(), widths.sum() + shared)
    own = [np.concatenate([of_node[i] for i in nodes] + [last[:0]]) for nodes, _ in case.parts]
    parts = [
        (o, parent if parent >= 0 or not shared else len(own)) for o, (_, parent) in zip(own, case.parts, strict=True)
    ]
    parts += [(last, -1)] if shared else []
    tied = [(a, b) for a, b in case.edges.tolist()] + [(i, i) for i in range(case.nodes)]
    blocks = [np.array(np.meshgrid(of_node[a], of_node[b])).reshape(2, -1) for a, b in tied]
    blocks += [np.array(np.meshgrid(last, np.arange(last.size + widths.sum()))).reshape(2, -1)]
    rows, columns = torch.from_numpy(np.concatenate(blocks, 1))
    fronts = prepared(rows, columns, parts, len(last) + int(widths.sum())).fronts
    sizes = [(f.own.numel(), f.boundary.numel()) for f in fronts]
    wanted = sum(a**3 / 3 + a**2 * b + a * b**2 for a, b in sizes)
    assert flops(case.edges, case.parts, widths, shared) == pytest.approx(wanted)


@pytest.mark.parametrize("rows", [1, 5, 15, 16])
def test_updates_some_rows_at_a_time(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of large fronts are; of a grid's separators of up to 15."""
    monkeypatch.setattr(multifrontal, "ROWS", rows)
    edges, nodes = grid(15, 15), 225
    a = torch.zeros(nodes, nodes, dtype=torch.float64)
    a[edges[:, 0], edges[:, 1]] = a[edges[:, 1], edges[:, 0]] = -1.0
    a.diagonal().fill_(4.1)
    of_rows, columns, values = entries(a)
    b = torch.randn(nodes, generator=generator(0), dtype=torch.float64)
    assert_solves(a, solved(prepared(of_rows, columns, dissect(Graph(edges, nodes), nodes), nodes), values, b), b)
