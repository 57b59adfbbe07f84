"""w4a8: problems, peers and goals.

Inputs are made so that nothing is rounded but the result: weights and x lie on the grids that effk (and a peer that
quantizes x in the same groups) finds for them, all scales are powers of two, and the sum of magnitudes stays below 2^24
units, so that float32 sums are exact in any order. So effk's result must be the float64 one rounded once to its type,
whatever the back end; every entry of it is checked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import effk
import torch
import torch.nn.functional as F
from effk.w4a8 import Packed, reference
from torch import Tensor

from .harness.check import difference, inequality, rounding
from .harness.machine import Limits
from .harness.problem import BANDWIDTH, Call, Derived, Goal, Peer, Problem, Work, not_installed, only
from .harness.scenarios import Service
from .harness.timing import torch_threads

SEED = 0
GROUP = 128
SPREAD = 32  # standard deviation of 8-bit integers

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def per_column(of_groups: Tensor, cols: int) -> Tensor:
    """[..., groups] -> [..., cols]."""
    return of_groups.repeat_interleave(GROUP, -1)[..., :cols]


@dataclass
class Weight:
    """A weight on the grid, and the layouts that effk and the peers want, each made once."""

    q: Tensor  # [N, K] integers: weight = scale * q, the zero point already subtracted
    zero: Tensor  # [N, groups], of the 4-bit features
    scale: Tensor  # [N, groups]
    is8: Tensor  # [N]
    layouts: dict[Any, Any] = field(default_factory=dict)

    def layout(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.layouts:
            self.layouts[key] = make()
        return self.layouts[key]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Exact in every float type."""
        return self.layout(dtype, lambda: (self.q * per_column(self.scale, self.q.shape[1])).to(dtype))

    def packed(self) -> Packed:
        return self.layout("packed", lambda: effk.w4a8.pack(self.dense(torch.bfloat16), self.is8, GROUP))

    def unsigned(self) -> Tensor:
        """4-bit integers as they are stored, 0 to 15."""
        return (self.q + per_column(self.zero, self.q.shape[1])).to(torch.uint8)

    def row_scale(self) -> Tensor:
        """[N], of which every weight is a multiple of at most 127."""
        return self.scale.amin(1)


@dataclass
class Inputs:
    weight: Weight
    x: Tensor
    q: Tensor  # [T, K] the integers of x
    scale: Tensor  # [T], x = scale * q


def normal_integers(rows: int, cols: int, random: torch.Generator) -> Tensor:
    """From -127 to 127, with one of the ends in every group, so that the group's scale is the one meant."""
    q = (torch.randn(rows, cols, generator=random, device=random.device) * SPREAD).round().clamp(-127, 127)
    q[:, ::GROUP] = 127 * q[:, ::GROUP].sign()
    q[:, ::GROUP][q[:, ::GROUP] == 0] = -127
    return q


@functools.lru_cache(maxsize=1)  # problems of one weight follow each other
def weight(rows: int, cols: int, share8: float, device: torch.device) -> Weight:
    random = torch.Generator(device).manual_seed(SEED)
    groups = -(-cols // GROUP)

    def draw(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=random, device=device).float()

    q, zero = draw(0, 16, rows, cols), draw(0, 16, rows, groups)
    q[:, ::GROUP], q[:, 1::GROUP] = 0, 15  # the whole range, so that scale and zero point are those meant
    q -= per_column(zero, cols)
    scale = 2.0 ** draw(-9, -6, rows, groups)
    eight = torch.randperm(rows, generator=random, device=device)[: round(share8 * rows)]
    q[eight] = normal_integers(len(eight), cols, random)
    # One scale a feature, so that 8 bits with such scales can stand for the same weight.
    scale[eight] = scale[eight, :1]
    is8 = torch.zeros(rows, dtype=torch.bool, device=device)
    is8[eight] = True
    return Weight(q, zero, scale, is8)


def tokens_of(tokens: int, cols: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Integers [T, K] and a scale a token."""
    random = torch.Generator(device).manual_seed(SEED + 1)
    q = normal_integers(tokens, cols, random)
    return q, 2.0 ** torch.randint(-8, -5, (tokens,), generator=random, device=device)


def make_linear(problem: Problem, device: torch.device) -> Work:
    rows, cols, tokens = (problem.size[k] for k in ("rows", "cols", "tokens"))
    of = weight(rows, cols, problem.size["share8"], device)
    q, scale = tokens_of(tokens, cols, device)
    x = (q * scale[:, None]).to(DTYPES[problem.size["x"]])

    x64, w64 = x.double(), of.dense(torch.float32).double()
    expected, magnitude = x64 @ w64.T, x64.abs() @ w64.abs().T
    if (magnitude / scale[:, None] / of.row_scale()).max() >= 2**24:
        raise ValueError(f"{problem.name}: these inputs don't sum exactly in float32")

    def check(y: Tensor, own: bool) -> str:
        # A peer may keep partial sums in its result's type.
        return difference(y, expected, rounding(y.dtype) * (expected.abs() if own else magnitude))

    packed = of.packed()
    return Work(
        inputs=Inputs(of, x, q, scale),
        arguments=linear_arguments,
        check=check,
        bytes=sum(t.nbytes for t in (*packed, x)) + tokens * rows * x.element_size(),
        flops=2.0 * tokens * rows * cols,
        dtype=torch.int8,
    )


def linear_arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (inputs.x, *inputs.weight.packed(), GROUP), {}


def one_thread(inputs: Inputs) -> Call:
    args, _ = linear_arguments(inputs)
    op = torch.ops.effk.w4a8_linear.default

    def call() -> Tensor:
        with torch_threads(1):
            return op(*args)

    return call


def nibbles(q: Tensor) -> Tensor:
    """[N, n] of 0 to 15 -> [N, n/2 rounded up]: two a byte, the first in the low half."""
    q = F.pad(q.to(torch.uint8), (0, q.shape[1] % 2))
    return q[:, ::2] | q[:, 1::2] << 4


def onnxruntime_model(of: Weight) -> bytes:
    """x [T, K] float32 -> y [T, N] float32 by MatMulNBits."""
    from onnx import TensorProto, helper

    (rows, cols), groups = of.q.shape, of.scale.shape[1]
    q = F.pad(of.unsigned(), (0, groups * GROUP - cols))
    constants = {
        "w": nibbles(q).reshape(rows, groups, GROUP // 2),
        "scale": of.scale,
        "zero": nibbles(of.zero),
    }
    types = {torch.uint8: TensorProto.UINT8, torch.float32: TensorProto.FLOAT}
    node = helper.make_node(
        "MatMulNBits",
        ["x", *constants],
        ["y"],
        domain="com.microsoft",
        K=cols,
        N=rows,
        bits=4,
        block_size=GROUP,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", cols])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", rows])],
        [
            helper.make_tensor(name, types[t.dtype], t.shape, t.contiguous().numpy().tobytes(), raw=True)
            for name, t in constants.items()
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def onnxruntime(inputs: Inputs) -> Call:
    import numpy
    import onnxruntime as ort

    of, threads = inputs.weight, torch.get_num_threads()

    def make() -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        model = of.layout("onnx", lambda: onnxruntime_model(of))
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    # One for any number of tokens: each has a pool of threads.
    session = of.layout(("onnxruntime", threads), make)
    bound = x, y = inputs.x, torch.empty(len(inputs.x), len(inputs.weight.q))
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, numpy.float32, x.shape, x.data_ptr())
    binding.bind_output("y", "cpu", 0, numpy.float32, y.shape, y.data_ptr())

    def call() -> Tensor:
        session.run_with_iobinding(binding)
        return bound[1]  # both live as long as this function: the binding has but their addresses

    return call


def int4_pack(inputs: Inputs) -> Call:
    of, x = inputs.weight, inputs.x

    def make() -> tuple[Tensor, Tensor]:
        w = torch.ops.aten._convert_weight_to_int4pack_for_cpu(of.unsigned().int(), 1)
        # It computes scale * (q - 8) + zero.
        return w, torch.stack([of.scale, (8 - of.zero) * of.scale], -1).transpose(0, 1).contiguous()

    w, scale_and_zero = of.layout("int4pack", make)
    scale_and_zero = scale_and_zero.to(x.dtype)
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, GROUP, scale_and_zero)


def onednn_int8(inputs: Inputs) -> Call:
    of, x_type = inputs.weight, inputs.x.dtype
    row_scale = of.row_scale()
    w = (of.dense(torch.float32) / row_scale[:, None]).to(torch.int8)
    w = torch.ops.onednn.qlinear_prepack(w, list(inputs.x.shape))
    x, zeros = (inputs.q + 128).to(torch.uint8), torch.zeros(len(row_scale), dtype=torch.int64)
    linear = torch.ops.onednn.qlinear_pointwise.default
    scale = inputs.scale[:, None].to(x_type)
    return lambda: (linear(x, 1.0, 128, w, row_scale, zeros, None, 1.0, 0, x_type, "none", [], ""), scale)


def linear_in(dtype: torch.dtype) -> Callable[[Inputs], Call]:
    def make(inputs: Inputs) -> Call:
        x, w = inputs.x.to(dtype), inputs.weight.dense(dtype)
        return lambda: F.linear(x, w)

    return make


def no_onnxruntime(work: Work) -> str:
    return not_installed("onnx", "onnxruntime") or takes_f32(work) or is_4_bit(work)


is_bf16 = only(lambda i: i.x.dtype == torch.bfloat16, "x is float32 here; measured with bfloat16")
is_f32 = only(lambda i: i.x.dtype == torch.float32, "x is bfloat16 here; measured with float32")
takes_f32 = only(lambda i: i.x.dtype == torch.float32, "takes no bfloat16 x; measured with float32")
is_4_bit = only(lambda i: not i.weight.is8.any(), "has no 8-bit features beside 4-bit ones")
is_whole = only(lambda i: i.x.shape[1] % GROUP == 0 and len(i.weight.q) % 16 == 0, "takes whole groups and blocks only")
is_large = only(lambda i: i.x.shape[0] >= 16, "shown from 16 tokens on")
has_threads = only(lambda _: torch.get_num_threads() > 1, "this run has one thread anyway")
has_onednn = only(lambda _: torch.backends.mkldnn.is_available(), "this torch has no oneDNN")


LINEAR_PEERS = {
    "cpu": (
        Peer(
            "onnxruntime",
            onnxruntime,
            "ONNX Runtime's MatMulNBits: 4 bits with zero points, block_size 128, accuracy_level 4 (x becomes int8 in "
            "these blocks, as effk's), float32 x and result bound beforehand; a pool of as many threads as torch's, "
            "which spin. They are awake when a call is timed, and torch's are asleep",
            no_onnxruntime,
            own_threads=True,
        ),
        Peer(
            "torch-int4pack",
            int4_pack,
            "aten::_weight_int4pack_mm_for_cpu: 4 bits in groups of 128, x and products in bfloat16",
            lambda work: is_bf16(work) or is_4_bit(work) or is_whole(work),
        ),
        Peer(
            "onednn-u8s8",
            onednn_int8,
            "oneDNN's qlinear, weight reordered for this number of tokens beforehand. Less work than effk's: 8-bit "
            "weights with one scale a feature, x quantized beforehand with one scale for all",
            has_onednn,
            view=lambda result: result[0] * result[1],
        ),
        Peer("torch-bf16", linear_in(torch.bfloat16), "F.linear in bfloat16, dense weight", is_bf16),
        Peer("torch-f32", linear_in(torch.float32), "F.linear in float32, dense weight", is_f32),
        Peer(
            "effk-1-thread",
            one_thread,
            "effk itself, w4a8_linear with torch.set_num_threads(1)",
            lambda work: has_threads(work) or is_large(work),
        ),
    ),
    "cuda": (
        Peer("cublas-bf16", linear_in(torch.bfloat16), "F.linear in bfloat16, dense weight", is_bf16),
        Peer("cublas-f32", linear_in(torch.float32), "F.linear in float32, dense weight", is_f32),
    ),
}


def at_int8_peak(times: Mapping[str, float], work: Work, limits: Limits) -> float:
    return work.flops / limits.rate("int8")


INT8_PEAK = Derived(
    "int8-peak", (), at_int8_peak, "2 T N K operations at this machine's measured rate of int8 multiplications (VNNI)"
)
COLD_DERIVED = {"cpu": (INT8_PEAK,), "cuda": (INT8_PEAK, BANDWIDTH)}
WARM_DERIVED = {"cpu": (INT8_PEAK,), "cuda": (INT8_PEAK,)}


def make_accumulate(problem: Problem, device: torch.device) -> Work:
    rows, cols, tokens = (problem.size[k] for k in ("rows", "cols", "tokens"))
    of = weight(rows, cols, problem.size["share8"], device)
    q, _ = tokens_of(tokens, cols, device)
    # Exact in float32: 256 products of at most 127^2.
    sums = [x @ w.T for x, w in zip(q.split(GROUP, 1), of.q.split(GROUP, 1), strict=True)]
    expected = torch.stack(sums, 1).int()
    packed, q8 = of.packed(), q.to(torch.int8)
    return Work(
        inputs=(q8, of),
        arguments=lambda inputs: ((inputs[0], *inputs[1].packed(), GROUP), {}),
        check=lambda result, own: inequality(("the sums",), (result,), (expected,)),
        bytes=sum(t.nbytes for t in (packed.q4, packed.zero4, packed.q8, packed.perm, q8, expected)),
        flops=2.0 * tokens * rows * cols,
        dtype=torch.int8,
    )


def make_quantize(problem: Problem, device: torch.device) -> Work:
    tokens, cols = problem.size["tokens"], problem.size["cols"]
    q, scale = tokens_of(tokens, cols, device)
    x = (q * scale[:, None]).to(DTYPES[problem.size["x"]])
    expected = q.to(torch.int8), scale[:, None].expand(tokens, -(-cols // GROUP)).contiguous()
    return Work(
        inputs=x,
        arguments=lambda x: ((x, GROUP), {}),
        check=lambda result, own: inequality(("q", "scale"), result, expected),
        bytes=sum(t.nbytes for t in (x, *expected)),
        flops=0.0,
        dtype=x.dtype,
    )


def eager_quantize(x: Tensor) -> Call:
    groups = x.unflatten(-1, (-1, GROUP))

    def call() -> tuple[Tensor, Tensor]:
        scale = groups.abs().amax(-1, keepdim=True).float() / 127
        return (groups / scale).round_().to(torch.int8).flatten(-2), scale.squeeze(-1)

    return call


def moved(problem: Problem, device: torch.device) -> tuple[Weight, int]:
    """The weight of a packing problem, and the bytes of its packed tensors."""
    of = weight(*(problem.size[k] for k in ("rows", "cols", "share8")), device)
    return of, sum(t.nbytes for t in of.packed())


def make_pack(problem: Problem, device: torch.device) -> Work:
    of, nbytes = moved(problem, device)
    w = of.dense(torch.bfloat16)
    expected = of.layout("reference", lambda: reference.w4a8_pack(w, of.is8, GROUP))
    return Work(
        inputs=of,
        arguments=lambda of: ((of.dense(torch.bfloat16), of.is8, GROUP), {}),
        check=lambda result, own: inequality(Packed._fields, tuple(result), expected),
        bytes=nbytes + w.nbytes,
        flops=0.0,
        dtype=w.dtype,
        graph=False,  # the size of q8 comes from the device
    )


def make_unpack(problem: Problem, device: torch.device) -> Work:
    of, nbytes = moved(problem, device)
    w = of.dense(torch.float32)
    return Work(
        inputs=of,
        arguments=lambda of: ((*of.packed(), GROUP), {}),
        check=lambda result, own: inequality(("the matrix",), (result,), (w,)),
        bytes=nbytes + w.nbytes,
        flops=0.0,
        dtype=w.dtype,
    )


def make_salience(problem: Problem, device: torch.device) -> Work:
    """Integers so small that the sums, and the squares' halves, are exact in float32."""
    samples, rows, cols = (problem.size[k] for k in ("samples", "rows", "cols"))
    random = torch.Generator(device).manual_seed(SEED + 2)
    draw = functools.partial(torch.randint, generator=random, device=device)
    grad = draw(-1, 2, (samples, rows, cols)).float()
    w = draw(-8, 9, (rows, cols)).float()
    w4 = w + draw(-1, 2, (rows, cols))
    change = torch.einsum("snk,nk->sn", grad.double(), (w4 - w).double())
    expected = (change + change**2 / 2).abs().sum(0)
    if expected.max() >= 2**23:
        raise ValueError(f"{problem.name}: these inputs don't sum exactly in float32")
    return Work(
        inputs=(grad, w, w4),
        arguments=lambda inputs: (inputs, {}),
        check=lambda result, own: difference(result, expected, torch.zeros_like(expected)),
        bytes=sum(t.nbytes for t in (grad, w, w4)) + rows * 4,
        flops=0.0,
        dtype=torch.float32,
    )


def eager_salience(inputs: tuple[Tensor, Tensor, Tensor]) -> Call:
    grad, w, w4 = inputs

    def call() -> Tensor:
        change = torch.einsum("snk,nk->sn", grad, w4 - w)
        return (change + change**2 / 2).abs().sum(0)

    return call


def clone_of_dense(of: Weight) -> Call:
    return of.dense(torch.float32).clone


def one_read(times: Mapping[str, float], work: Work, limits: Limits) -> float:
    return work.inputs.dense(torch.bfloat16).nbytes / limits.read


QUANTIZE_PEERS = (Peer("torch-eager", eager_quantize, "torch ops: largest magnitudes, division, rounding, conversion"),)
UNPACK_PEERS = (Peer("torch-clone", clone_of_dense, "a copy of the dense matrix; not the same result"),)
SALIENCE_PEERS = (Peer("torch-eager", eager_salience, "torch ops: difference, einsum, sum"),)
ONE_READ = Derived("one-read", (), one_read, "the dense matrix read once at the measured read bandwidth")


FULL, SMALL = (4096, 4096), (1024, 1024)
AWKWARD = (4099, 4100)  # no multiple of a block, a chunk or a group
LONG = (4096, 11008)


def linear(
    tokens: int,
    x: str = "bf16",
    share8: float = 0.0,
    shape: tuple[int, int] = FULL,
    caches: str = "cold",
    quick: bool = False,
) -> Problem:
    rows, cols = shape
    size = {"rows": rows, "cols": cols, "share8": share8, "x": x, "caches": caches, "tokens": tokens}
    derived = WARM_DERIVED if caches == "warm" else COLD_DERIVED
    return Problem("w4a8_linear", size, make_linear, LINEAR_PEERS, derived, quick)


def other(
    op: str,
    size: Mapping[str, Any],
    make: Callable[[Problem, torch.device], Work],
    peers: tuple[Peer, ...] = (),
    derived: tuple[Derived, ...] = (),
    quick: bool = False,
) -> Problem:
    """One whose peers are the same on every device."""
    return Problem(
        op, size, make, dict.fromkeys(("cpu", "cuda"), peers), dict.fromkeys(("cpu", "cuda"), derived), quick
    )


def others(shape: tuple[int, int], tokens: int, quick: bool = False) -> list[Problem]:
    side = {"rows": shape[0], "cols": shape[1]}
    mixed = {**side, "share8": 0.1}
    return [
        other("w4a8_pack", mixed, make_pack, derived=(ONE_READ,), quick=quick),
        other("w4a8_unpack", mixed, make_unpack, UNPACK_PEERS, quick=quick),
        other("w4a8_accumulate", {**mixed, "tokens": 16}, make_accumulate, derived=(INT8_PEAK,), quick=quick),
        other(
            "w4a8_quantize",
            {"cols": shape[1], "x": "bf16", "tokens": tokens},
            make_quantize,
            QUANTIZE_PEERS,
            quick=quick,
        ),
        other("w4a8_salience", {**side, "samples": 2}, make_salience, SALIENCE_PEERS, quick=quick),
    ]


TOKENS = (1, 4, 16, 64, 128, 256, 1024)

PROBLEMS = [
    *(linear(tokens) for tokens in TOKENS),
    *(linear(tokens, caches="warm") for tokens in TOKENS),
    *(linear(tokens, "f32", caches=caches) for caches in ("cold", "warm") for tokens in (1, 16, 64, 128)),
    *(linear(tokens, share8=0.1) for tokens in TOKENS),
    *others(FULL, 1024),
    *(linear(tokens, x, shape=AWKWARD) for tokens in (1, 128) for x in DTYPES),
    *(linear(tokens, share8=0.1, shape=LONG) for tokens in (1, 128)),
    # For a look, not for a claim.
    linear(1, "f32", shape=SMALL, quick=True),
    linear(1, "f32", shape=SMALL, caches="warm", quick=True),
    linear(16, "f32", shape=SMALL, quick=True),
    *(linear(16, share8=share8, shape=SMALL, quick=True) for share8 in (0.0, 0.1)),
    *others(SMALL, 256, quick=True),
]

SERVED_BY = ("onnxruntime", "onednn-u8s8", "torch-f32", "cublas-bf16")
SERVICES = [
    # On a CPU with float32, which ONNX Runtime takes.
    *(
        Service(
            "w4a8_linear 4096x4096, 4 bits",
            functools.partial(linear, x=x, caches="warm"),
            "token",
            {device: bound},
            SERVED_BY,
            devices=(device,),
        )
        for device, x, bound in (("cpu", "f32", 5e-3), ("cuda", "bf16", 1e-3))
    ),
    Service(
        "w4a8_linear 1024x1024, 4 bits",
        lambda n: linear(n, "f32", shape=SMALL, caches="warm", quick=True),
        "token",
        {"cpu": 5e-3, "cuda": 1e-3},
        SERVED_BY,
        largest=8,
        quick=True,
    ),
]


def wanted(device: str, peer: str, ratios: Mapping[int, float], **size: Any) -> list[Goal]:
    """Goals of w4a8_linear at full size, with cold and warm caches if not said otherwise: tokens -> ratio."""
    full = {"rows": FULL[0], "cols": FULL[1], **size}
    return [Goal("w4a8_linear", device, peer, ratio, {**full, "tokens": tokens}) for tokens, ratio in ratios.items()]


GOALS = [
    *wanted("cpu", "onnxruntime", {16: 1.6, 64: 1.8, 128: 1.8}, x="f32", share8=0.0),
    *wanted("cpu", "onnxruntime", {1: 0.95}, x="f32", share8=0.0, caches="cold"),
    *wanted("cpu", "onnxruntime", {1: 1.3}, x="f32", share8=0.0, caches="warm"),
    *wanted("cpu", "torch-int4pack", {16: 5.0, 64: 5.0, 128: 5.0}, x="bf16", share8=0.0),
    *wanted("cpu", "int8-peak", {128: 0.75, 256: 0.75, 1024: 0.75}, x="bf16"),
    # Met by two threads; more would have to do better.
    *wanted("cpu", "effk-1-thread", {64: 1.85, 128: 1.85, 256: 1.85, 1024: 1.85}, x="bf16"),
    *wanted("cuda", "cublas-bf16", {1: 2.5, 4: 2.5, 16: 2.5, 1024: 1.2}, x="bf16"),
    *wanted("cuda", "bandwidth", {1: 0.8, 4: 0.8, 16: 0.8}, x="bf16"),
]
