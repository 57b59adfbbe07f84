"""lscd: problems, peers and goals.

Inputs are made so that float32 sums of their products are exact in any order: weights are +-[64..255]/128 (all eight
bits of a bfloat16), x is [-8..8]/8, and the sum of magnitudes stays below 2^24 units. So effk's result must be the
float64 one rounded once to its type, whatever the back end; every entry of it is checked.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import effk
import torch
import torch.nn.functional as F
from effk.lscd import reference
from torch import Tensor

from .harness.check import difference, inequality, rounding
from .harness.machine import Limits
from .harness.problem import Call, Derived, Goal, Peer, Problem, Work, not_installed, only
from .harness.scenarios import Service

SEED = 0
X_UNIT = 1 / 8
W_UNIT = 1 / 128

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "f32": torch.float32, "int8": torch.int8}


def to_csr(w: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls CSR a beta
        return w.to_sparse_csr()


@dataclass
class Weight:
    """A pruned weight and the layouts that effk and the peers want, each made once."""

    w: Tensor
    scale: Tensor | None
    layouts: dict[Any, Any] = field(default_factory=dict)

    def layout(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.layouts:
            self.layouts[key] = make()
        return self.layouts[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> Weight:
        """Without CSR, whose storage torch can't copy: it is made again where a peer wants it."""
        layouts = {k: v for k, v in self.layouts.items() if k != "csr"}
        return Weight(*copy.deepcopy((self.w, self.scale, layouts), memo))

    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.layout("packed", lambda: effk.lscd.pack(self.w))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """What the weight stands for; exact in every float type."""

        def make() -> Tensor:
            w = self.w.to(dtype)
            return w if self.scale is None else w * self.scale[:, None].to(dtype)

        return self.layout(dtype, make)

    def csr(self) -> Tensor:
        def make() -> Tensor:
            csr = to_csr(self.dense(torch.float32))
            # MKL takes 32-bit indices; torch would convert 64-bit ones at every call.
            indices = csr.crow_indices().int(), csr.col_indices().int()
            return torch.sparse_csr_tensor(*indices, csr.values(), csr.shape, check_invariants=False)

        return self.layout("csr", make)


@dataclass
class Inputs:
    weight: Weight
    x: Tensor


@functools.lru_cache(maxsize=1)  # problems of one weight follow each other
def weight(rows: int, cols: int, dtype: torch.dtype, sparsity: float, device: torch.device) -> Weight:
    random = torch.Generator(device).manual_seed(SEED)
    draw = functools.partial(torch.randint, size=(rows, cols), generator=random, device=device)
    int8 = dtype == torch.int8
    w = draw(1, 128, dtype=torch.int8) if int8 else draw(64, 256, dtype=torch.int16).to(dtype) * W_UNIT
    w *= draw(0, 2, dtype=torch.int8) * 2 - 1
    w *= torch.rand(rows, cols, generator=random, device=device) >= sparsity
    # Powers of two, so that scaling is exact as well.
    scale = 2.0 ** torch.randint(-9, -6, (rows,), generator=random, device=device) if int8 else None
    return Weight(w, scale)


def make_linear(problem: Problem, device: torch.device) -> Work:
    rows, cols, tokens = (problem.size[k] for k in ("rows", "cols", "tokens"))
    dtype = DTYPES[problem.size["dtype"]]
    of = weight(rows, cols, dtype, problem.size["sparsity"], device)
    x_dtype = torch.bfloat16 if dtype == torch.int8 else dtype
    random = torch.Generator(device).manual_seed(SEED + 1)
    x = torch.randint(-8, 9, (tokens, cols), generator=random, device=device).to(x_dtype) * X_UNIT

    w64 = of.w.double()
    unit = X_UNIT * (1 if dtype == torch.int8 else W_UNIT)
    magnitude = x.double().abs() @ w64.abs().T
    if magnitude.max() >= 2**24 * unit:
        raise ValueError(f"{problem.name}: these inputs don't sum exactly in float32")
    expected = x.double() @ w64.T
    if of.scale is not None:
        expected, magnitude = expected * of.scale, magnitude * of.scale

    def check(y: Tensor, own: bool) -> str:
        # A peer may keep partial sums in its result's type.
        return difference(y, expected, rounding(y.dtype) * (expected.abs() if own else magnitude))

    def arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (inputs.x, *inputs.weight.packed(), rows, cols, None, inputs.weight.scale), {}

    packed = of.packed()
    return Work(
        inputs=Inputs(of, x),
        arguments=arguments,
        check=check,
        bytes=sum(t.nbytes for t in (*packed, x)) + tokens * rows * x.element_size(),
        flops=2.0 * tokens * int(of.w.count_nonzero()),
        dtype=x_dtype,
    )


def linear_in(dtype: torch.dtype) -> Callable[[Inputs], Call]:
    def make(inputs: Inputs) -> Call:
        x, w = inputs.x.to(dtype), inputs.weight.dense(dtype)
        return lambda: F.linear(x, w)

    return make


def prepacked(inputs: Inputs) -> Call:
    x = inputs.x.bfloat16()
    w = torch.ops.mkldnn._reorder_linear_weight(inputs.weight.dense(torch.bfloat16), x.shape[0])
    return lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


def int8_pack(inputs: Inputs) -> Call:
    x, w, scale = inputs.x, inputs.weight.w, inputs.weight.scale
    assert scale is not None  # is_int8
    scale = scale.to(x.dtype)
    return lambda: torch._weight_int8pack_mm(x, w, scale)


def csr_matrix(inputs: Inputs) -> Call:
    w, x = inputs.weight.csr(), inputs.x.float().T.contiguous()
    return lambda: w @ x


def csr_vector(inputs: Inputs) -> Call:
    w, x = inputs.weight.csr(), inputs.x.float()[0].contiguous()
    return lambda: w @ x


def scipy_csr(inputs: Inputs) -> Call:
    from scipy.sparse import csr_array

    csr = inputs.weight.csr()
    w = csr_array((csr.values().numpy(), csr.col_indices().numpy(), csr.crow_indices().numpy()), shape=csr.shape)
    x = inputs.x.float().T.contiguous().numpy()
    return lambda: w @ x


def no_scipy(work: Work) -> str:
    return not_installed("scipy") or (
        "" if work.inputs.x.shape[0] <= 16 else "one thread only: not run above 16 tokens"
    )


is_16_bit = only(lambda i: i.weight.w.element_size() <= 2, "the weight has 32 bits")
is_f32 = only(lambda i: i.weight.w.dtype == torch.float32, "the weight has fewer than 32 bits")
is_int8 = only(lambda i: i.weight.scale is not None, "the weight isn't int8")
in_blocks = only(
    lambda i: all(size % 64 == 0 for size in i.weight.w.shape), "crashes on sizes that aren't whole blocks"
)
is_one_token = only(lambda i: i.x.shape[0] == 1, "takes one token only")
has_mkldnn = only(lambda _: torch.backends.mkldnn.is_available(), "this torch has no oneDNN")


def transposed(y: Tensor) -> Tensor:
    return y.T


LINEAR_PEERS = {
    "cpu": (
        Peer("torch-bf16", linear_in(torch.bfloat16), "F.linear in bfloat16, dense weight", is_16_bit),
        Peer("torch-fp16", linear_in(torch.float16), "F.linear in float16, dense weight", is_16_bit),
        Peer("torch-f32", linear_in(torch.float32), "F.linear in float32, dense weight", is_f32),
        Peer(
            "onednn-prepacked",
            prepacked,
            "bfloat16, dense weight reordered by oneDNN for this number of tokens before timing, as torch.compile with "
            "freezing does",
            lambda work: is_16_bit(work) or has_mkldnn(work),
        ),
        Peer(
            "torch-int8",
            int8_pack,
            "torch._weight_int8pack_mm: int8 dense weight, bfloat16 x",
            lambda work: is_int8(work) or in_blocks(work),
        ),
        Peer(
            "csr-matrix",
            csr_matrix,
            "torch CSR @ x.T, x.T contiguous beforehand; MKL: float32 values and 32-bit indices, since 16-bit values "
            "raise and 64-bit indices are copied at every call. The types differ from effk's",
            view=transposed,
        ),
        Peer(
            "csr-vector",
            csr_vector,
            "torch CSR @ x as a vector; MKL, types as csr-matrix",
            is_one_token,
            view=lambda y: y[None],
        ),
        Peer(
            "scipy-csr",
            scipy_csr,
            "scipy.sparse csr_array @ x.T; float32, 32-bit indices, one thread",
            no_scipy,
            view=lambda y: torch.from_numpy(y).T,
        ),
    ),
    "cuda": (
        Peer("cublas-bf16", linear_in(torch.bfloat16), "F.linear in bfloat16, dense weight", is_16_bit),
        Peer("cublas-fp16", linear_in(torch.float16), "F.linear in float16, dense weight", is_16_bit),
        Peer("cublas-f32", linear_in(torch.float32), "F.linear in float32, dense weight", is_f32),
        Peer(
            "cusparse-csr",
            csr_matrix,
            "torch CSR @ x.T, x.T contiguous beforehand; cuSPARSE, types as on a CPU; launch time included",
            view=transposed,
            graph=False,
        ),
    ),
}


def fastest(times: Mapping[str, float], work: Work, limits: Limits) -> float | None:
    return min((times[name] for name in BOTH16 if name in times), default=None)


def one_read(times: Mapping[str, float], work: Work, limits: Limits) -> float:
    of: Weight = work.inputs
    return of.w.nbytes / limits.read


BOTH16 = ("torch-bf16", "torch-fp16")
BEST16 = Derived("torch-best16", BOTH16, fastest, "the faster of torch-bf16 and torch-fp16")
LINEAR_DERIVED: dict[str, tuple[Derived, ...]] = {"cpu": (BEST16,), "cuda": ()}


def moved(problem: Problem, device: torch.device) -> tuple[Weight, int]:
    """The weight of a packing problem, and the bytes of it and of its packed tensors."""
    rows, cols, dtype, sparsity = (problem.size[k] for k in ("rows", "cols", "dtype", "sparsity"))
    of = weight(rows, cols, DTYPES[dtype], sparsity, device)
    return of, sum(t.nbytes for t in (of.w, *of.packed()))


def make_pack(problem: Problem, device: torch.device) -> Work:
    of, nbytes = moved(problem, device)
    expected = of.layout("reference", lambda: reference.lscd_pack(of.w))

    def check(result: Any, own: bool) -> str:
        if own:
            return inequality(("values", "bitmap", "offsets"), result, expected)
        return inequality(("the matrix",), (result.to_dense(),), (of.w,))

    return Work(
        inputs=of,
        arguments=lambda of: ((of.w,), {}),
        check=check,
        bytes=nbytes,
        flops=0.0,
        dtype=of.w.dtype,
        graph=False,  # the size of values comes from the device
    )


def make_unpack(problem: Problem, device: torch.device) -> Work:
    of, nbytes = moved(problem, device)
    return Work(
        inputs=of,
        arguments=lambda of: ((*of.packed(), *of.w.shape), {}),
        check=lambda result, own: inequality(("the matrix",), (result,), (of.w,)),
        bytes=nbytes,
        flops=0.0,
        dtype=of.w.dtype,
    )


def from_csr(of: Weight) -> Call:
    return to_csr(of.w).to_dense


PACK_PEERS = (
    Peer("torch-to-csr", lambda of: lambda: to_csr(of.w), "Tensor.to_sparse_csr, 64-bit indices", graph=False),
)
UNPACK_PEERS = (
    Peer("torch-from-csr", from_csr, "Tensor.to_dense of a CSR matrix, 64-bit indices", graph=False),
    Peer("torch-clone", lambda of: of.w.clone, "a copy of the dense matrix"),
)
ONE_READ = Derived("one-read", (), one_read, "the dense matrix read once at the measured read bandwidth")


FULL, SMALL = (4096, 8192), (1024, 4096)  # 64 MiB and 8 MiB of dense bfloat16


def linear(dtype: str, sparsity: float, tokens: int, shape: tuple[int, int] = FULL, quick: bool = False) -> Problem:
    rows, cols = shape
    size = {"rows": rows, "cols": cols, "dtype": dtype, "sparsity": sparsity, "tokens": tokens}
    return Problem("lscd_linear", size, make_linear, LINEAR_PEERS, LINEAR_DERIVED, quick)


def packing(rows: int, cols: int, quick: bool = False) -> list[Problem]:
    size = {"rows": rows, "cols": cols, "dtype": "bf16", "sparsity": 0.6}
    derived = {"cpu": (ONE_READ,), "cuda": (ONE_READ,)}
    return [
        Problem("lscd_pack", size, make_pack, {"cpu": PACK_PEERS, "cuda": PACK_PEERS}, derived, quick),
        Problem("lscd_unpack", size, make_unpack, {"cpu": UNPACK_PEERS, "cuda": UNPACK_PEERS}, derived, quick),
    ]


PROBLEMS = [
    *(linear("bf16", sparsity, tokens) for sparsity in (0.5, 0.6, 0.7, 0.8, 0.9) for tokens in (1, 8, 16, 64, 256)),
    *(linear(dtype, 0.7, 1) for dtype in ("fp16", "f32", "int8")),
    *packing(4096, 11008),
    # For a look, not for a claim.
    *(linear("bf16", sparsity, 1, SMALL, quick=True) for sparsity in (0.5, 0.7)),
    linear("bf16", 0.7, 16, SMALL, quick=True),
    *(linear(dtype, 0.7, 1, SMALL, quick=True) for dtype in ("fp16", "f32", "int8")),
    *packing(*SMALL, quick=True),
]

SERVED_BY = ("torch-bf16", "onednn-prepacked", "cublas-bf16")
SERVICES = [
    Service(
        "lscd_linear 4096x8192, 70% zeros",
        lambda n: linear("bf16", 0.7, n),
        "token",
        {"cpu": 20e-3, "cuda": 1e-3},
        SERVED_BY,
    ),
    Service(
        "lscd_linear 1024x4096, 70% zeros",
        lambda n: linear("bf16", 0.7, n, SMALL, quick=True),
        "token",
        {"cpu": 5e-3, "cuda": 1e-3},
        SERVED_BY,
        largest=8,
        quick=True,
    ),
]


def wanted(device: str, peer: str, tokens: int, ratios: Mapping[float, float]) -> list[Goal]:
    """Goals of lscd_linear in bfloat16 at full size: sparsity -> ratio."""
    size = {"rows": FULL[0], "cols": FULL[1], "dtype": "bf16", "tokens": tokens}
    return [Goal("lscd_linear", device, peer, ratio, {**size, "sparsity": s}) for s, ratio in ratios.items()]


H200_SKINNY = {0.5: 1.35, 0.6: 1.6, 0.7: 1.9, 0.8: 2.4, 0.9: 3.2}

GOALS = [
    *wanted("cpu", "torch-best16", 1, {0.5: 2.0, 0.6: 2.6, 0.7: 3.0, 0.9: 3.2}),
    *wanted("cpu", "onednn-prepacked", 1, {0.5: 1.35, 0.6: 1.6, 0.7: 1.9, 0.9: 2.3}),
    *wanted("cpu", "csr-matrix", 1, {0.7: 5.0}),
    *wanted("cpu", "csr-vector", 1, {0.7: 3.0}),
    *wanted("cpu", "torch-bf16", 8, {0.7: 1.5}),
    *wanted("cpu", "torch-bf16", 16, {0.8: 1.3, 0.9: 2.0}),
    *(g for n in (64, 256) for g in wanted("cpu", "torch-bf16", n, dict.fromkeys((0.5, 0.6, 0.7, 0.8, 0.9), 0.95))),
    # A fifth of the speed of reading the matrix once.
    Goal("lscd_pack", "cpu", "one-read", 0.2, {"rows": 4096, "cols": 11008}),
    *(g for n in (1, 8, 16) for g in wanted("cuda", "cublas-bf16", n, H200_SKINNY)),
    *(g for n in (1, 8, 16) for g in wanted("cuda", "flash-llm", n, {0.7: 1.3})),  # no binding yet: stays open
    *wanted("cuda", "cublas-bf16", 256, dict.fromkeys((0.5, 0.6, 0.7, 0.8, 0.9), 0.9)),
]
