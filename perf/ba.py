"""ba: problems, peers and goals.

Scenes are generated, with noise of known size: a solve has to end at a cost that such noise leaves. Real ones are added
from the folder that EFFK_BAL names, files of "Bundle Adjustment in the Large"; on those all have to agree.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import effk
import torch
from effk.ba import Problem as Scene
from effk.ba import generate
from effk.ba import levenberg_marquardt as steps
from effk.ba.reference import MIN_DIAGONAL
from torch import Tensor

from .harness.check import difference
from .harness.problem import BANDWIDTH, Call, Goal, Peer, Problem, Work, not_installed

SEED = 0
NOISE = 0.5  # pixels
SIGMAS = 6  # that a cost may be off from what the noise leaves
WORSE = 1e-5  # relative: the largest cost of a solve over the least that is known
EPS = 2.0**-52
RADIUS = 1e4


# --- Scenes -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def scene(kind: str, cameras: int, points: int, observations: int, device: torch.device) -> tuple[Scene, Scene]:
    """A scene to solve, and the true one."""
    start, true = generate(kind, cameras, points, observations, noise=NOISE, seed=SEED)
    return start.to(device), true.to(device)


@functools.lru_cache(maxsize=4)
def file(path: Path, device: torch.device) -> Scene:
    return Scene.from_bal(path).to(device)


def given(s: Scene) -> tuple[Tensor, ...]:
    return s.cameras, s.points, s.observations, s.camera_index, s.point_index


def scene_of(size: Mapping[str, Any], device: torch.device) -> Scene:
    return scene(size["scene"], size["C"], size["P"], size["O"], device)[0]


def bytes_of(s: Scene) -> int:
    """Read once: observations, both indices, points."""
    return sum(t.numel() * t.element_size() for t in given(s)[1:])


# Operations of an observation that all need, of snavely: projection and both derivatives; and with the loss.
PROJECT, JACOBIAN = 60, 140
N = 9  # of a camera


# --- The steps of an iteration ----------------------------------------------------------------------------------------


def _near(wanted: tuple[Tensor, ...], scales: tuple[Tensor, ...], roundings: float) -> Callable[[Any, bool], str]:
    """Each entry within so many roundings of its scale, the sum of the magnitudes that went into it."""

    def check(result: Any, is_effk: bool) -> str:
        found = result if isinstance(result, tuple) else (result,)
        for got, exact, scale in zip(found, wanted, scales, strict=False):
            if said := difference(got, exact, roundings * EPS * scale):
                return said
        return ""

    return check


def _reference(op: str, *args: Any, **kwargs: Any) -> Any:
    out = effk._registry.find(op).reference(*args, **kwargs)
    return out if isinstance(out, tuple) else (out,)


def step_problem(
    op: str,
    size: Mapping[str, Any],
    flops: Callable[[Scene], float],
    more: Callable[[Scene], tuple[Any, ...]] = lambda s: (),
    options: Mapping[str, Any] | None = None,
    quick: bool = False,
) -> Problem:
    """One of the ops that make up an iteration. Small scenes are checked with the reference; large ones, for which that
    would need hundreds of times the memory, by sums of the Jacobian."""

    def make(problem: Problem, device: torch.device) -> Work:
        s = scene_of(problem.size, device)
        extra, kwargs = more(s), dict(options or {})
        args = (*given(s)[: 2 if op == "ba_retract" else 5], *extra)
        if quick:
            wanted = _reference(op, *args, **kwargs)
            # Of sums: a whole problem's largest entry by output, which no rounding of a term exceeds.
            scales = tuple(t.double().abs().max().expand_as(t) if t.numel() else t.double() for t in wanted)
            check = _near(tuple(t.double() for t in wanted), scales, s.observations.shape[0] * 64)
        else:
            check = _consistent(op, s, extra)
        out = bytes_of(s)
        return Work(args, lambda inputs: (inputs, kwargs), check, out, flops(s), torch.float64)

    empty: dict[str, Any] = {"cpu": (), "cuda": ()}
    return Problem(op, size, make, empty, {"cpu": (BANDWIDTH,), "cuda": (BANDWIDTH,)}, quick=quick)


def _consistent(op: str, s: Scene, extra: tuple[Any, ...]) -> Callable[[Any, bool], str]:
    """Of large scenes: by the ops that this one isn't made of."""
    problem = given(s)

    def residuals() -> tuple[Tensor, Tensor, Tensor]:
        residual, of_camera, of_point, _ = torch.ops.effk.ba_jacobian(*problem)
        return residual, of_camera, of_point

    def check(result: Any, is_effk: bool) -> str:
        if op in ("ba_residual", "ba_jacobian"):
            few = slice(0, 1000)
            args = (*problem[:2], *(t[few] for t in problem[2:]))
            wanted = _reference(op, *args)
            for got, exact in zip(result[:-1], wanted[:-1], strict=True):
                bound = 256 * EPS * exact.abs().amax(tuple(range(1, exact.dim())), keepdim=True).expand_as(exact)
                if said := difference(got[few], exact, bound):
                    return said
            return ""
        if op == "ba_retract":
            wanted = _reference(op, *problem[:2], *extra)
            return _near(wanted, tuple(1 + t.abs() for t in wanted), 64)(result, is_effk)
        residual, of_camera, of_point = residuals()
        cost = 0.5 * residual.square().sum()
        index, count = problem[3].long(), s.cameras.shape[0]
        terms = (of_camera * residual[..., None]).sum(1)
        gradient = torch.zeros(count, N, dtype=torch.float64, device=terms.device).index_add_(0, index, terms)
        size = torch.zeros_like(gradient).index_add_(0, index, terms.abs())
        many = 4 * problem[2].shape[0]
        if op == "ba_cost":
            return _near((cost,), (cost,), many)(result, is_effk)
        if op == "ba_build":
            return _near((cost, gradient), (cost, size), many)(result, is_effk)
        if op == "ba_schur":
            return _near((gradient, cost), (size, cost), many)((result[2], result[5]), is_effk)
        # S x by parts: points' systems solved one by one.
        x = extra[0]
        u = (of_camera * x[index][:, None]).sum(-1)
        if op == "ba_backsubstitute":
            u = u + residual
        points = problem[4].long()
        of_points = torch.zeros(s.points.shape[0], 3, 3, dtype=torch.float64, device=u.device)
        of_points.index_add_(0, points, of_point.mT @ of_point)
        right = torch.zeros_like(s.points).index_add_(0, points, (of_point * u[..., None]).sum(1))
        diagonal = of_points.diagonal(dim1=1, dim2=2)
        damped = of_points + torch.diag_embed(diagonal.clamp_min(MIN_DIAGONAL) / RADIUS)
        step = torch.linalg.solve(damped, right)
        if op == "ba_backsubstitute":
            scale = step.norm(dim=1, keepdim=True).expand_as(step) * torch.linalg.cond(damped)[:, None]
            return _near((-step,), (scale,), 1024)(result, is_effk)
        rest = u - (of_point @ step[points][..., None]).squeeze(-1)
        terms = (of_camera * rest[..., None]).sum(1)
        wanted = torch.zeros_like(gradient).index_add_(0, index, terms)
        condition = torch.linalg.cond(damped)[points][:, None]
        size = torch.zeros_like(gradient).index_add_(
            0, index, (of_camera.abs() * u.abs()[..., None]).sum(1) * condition
        )
        return _near((wanted,), (size,), 1024)(result, is_effk)

    return check


def _tangents(s: Scene) -> tuple[Tensor]:
    draw = torch.Generator().manual_seed(SEED)
    return (torch.randn(s.cameras.shape[0], N, generator=draw, dtype=torch.float64).to(s.cameras.device),)


def _pairs(s: Scene) -> tuple[Tensor]:
    return (steps.covisible(s.camera_index, s.point_index, s.cameras.shape[0]),)


def _both_steps(s: Scene) -> tuple[Tensor, Tensor]:
    return 1e-3 * _tangents(s)[0], 1e-3 * torch.ones_like(s.points)


def _pcg(s: Scene) -> tuple[Tensor, Tensor, Tensor]:
    blocks, rhs, _, diagonal, _, _ = torch.ops.effk.ba_schur(*given(s))
    damping = diagonal / RADIUS
    return rhs, torch.linalg.inv(blocks + torch.diag_embed(damping)), damping


def _observations(each: float) -> Callable[[Scene], float]:
    return lambda s: each * s.observations.shape[0]


def _schur_flops(s: Scene) -> float:
    """Beside what each observation needs: a product [9, 2] [2, 9] for each pair that sees a point."""
    counts = torch.bincount(s.point_index.long()).double()
    return JACOBIAN * s.observations.shape[0] + float((counts * (counts + 1) / 2).sum()) * 2 * 2 * N * N


def step_problems(size: Mapping[str, Any], quick: bool = False) -> list[Problem]:
    pcg_iterations = 3 if quick else 10
    return [
        step_problem("ba_residual", size, _observations(PROJECT), quick=quick),
        step_problem("ba_jacobian", size, _observations(JACOBIAN), quick=quick),
        step_problem("ba_cost", size, _observations(PROJECT), quick=quick),
        step_problem("ba_build", size, _observations(JACOBIAN + 4 * (N + 3) * (N + 4)), quick=quick),
        step_problem("ba_schur", size, _schur_flops, _pairs, quick=quick),
        step_problem("ba_schur_mv", size, _observations(JACOBIAN + 8 * (N + 3)), _tangents, quick=quick),
        step_problem("ba_backsubstitute", size, _observations(JACOBIAN + 4 * (N + 3)), _tangents, quick=quick),
        step_problem("ba_retract", size, lambda s: 0, _both_steps, quick=quick),
        pcg_problem(size, pcg_iterations, quick),
    ]


def pcg_problem(size: Mapping[str, Any], iterations: int, quick: bool) -> Problem:
    """So many steps of conjugate gradients; the residual has to fall."""

    def make(problem: Problem, device: torch.device) -> Work:
        s = scene_of(problem.size, device)
        rhs, inverse, damping = _pcg(s)

        def check(result: Any, is_effk: bool) -> str:
            step, count = result
            left = rhs - torch.ops.effk.ba_schur_mv(*given(s), step) - damping * step
            before = float((rhs * (inverse @ rhs[..., None]).squeeze(-1)).sum())
            after = float((left * (inverse @ left[..., None]).squeeze(-1)).sum())
            if int(count) != iterations:
                return f"{int(count)} iterations; wanted {iterations}"
            return "" if after < before else f"the preconditioned residual went from {before:g} to {after:g}"

        kwargs = {"tolerance": 0.0, "max_iterations": iterations}
        work = (JACOBIAN + 8 * (N + 3)) * s.observations.shape[0] * iterations
        args = (*given(s), rhs, inverse, damping)
        return Work(args, lambda i: (i, kwargs), check, bytes_of(s) * iterations, work, torch.float64)

    empty: dict[str, Any] = {"cpu": (), "cuda": ()}
    size = {**size, "iterations": iterations}
    return Problem("ba_pcg", size, make, empty, {"cpu": (BANDWIDTH,), "cuda": (BANDWIDTH,)}, quick=quick)


# --- Whole solves -----------------------------------------------------------------------------------------------------


@dataclass
class Start:
    """What a solve begins with; copied in each call, since it is changed."""

    scene: Scene
    options: dict[str, Any]

    def __deepcopy__(self, memo: Any) -> Start:
        return Start(self.scene.clone(), self.options)


def _run(op: Callable[[str], Callable[..., Any]], name: str, start: Start) -> Call:
    s = start.scene

    def call() -> tuple[Tensor, Tensor]:
        cameras, points = s.cameras.clone(), s.points.clone()
        op(name)(cameras, points, *given(s)[2:], **start.options)
        return cameras, points

    return call


def _expected_cost(s: Scene) -> tuple[float, float]:
    """Of the noise that a fit leaves, and SIGMAS of its deviation. Two rows an observation."""
    free = 2 * s.observations.shape[0] - N * s.cameras.shape[0] - 3 * s.points.shape[0] + 7
    return 0.5 * NOISE**2 * free, SIGMAS * NOISE**2 * math.sqrt(free / 2)


def solve_problem(size: Mapping[str, Any], load: Callable[[torch.device], Scene], quick: bool = False) -> Problem:
    def make(problem: Problem, device: torch.device) -> Work:
        s = load(device)
        costs: dict[bool, float] = {}  # the least of effk's and of peers'
        quality: dict[str, float] = {}

        def check(result: tuple[Tensor, Tensor], is_effk: bool) -> str:
            cameras, points = (t.to(device) for t in result)
            cost = float(torch.ops.effk.ba_cost(cameras, points, *given(s)[2:]))
            if "O" in problem.size:
                wanted, off = _expected_cost(s)
                if not abs(cost - wanted) <= off:
                    return f"cost {cost:.8g}; noise leaves {wanted:.8g}, give or take {off:.2g}"
            costs[is_effk] = min(cost, costs.get(is_effk, cost))
            if len(costs) == 2:
                quality["cost-beyond-peers"] = costs[True] / costs[False] - 1
            least = min(costs.values())
            return "" if cost <= (1 + WORSE) * least or is_effk else f"cost {cost:.8g}; {least:.8g} was reached"

        flops = JACOBIAN * s.observations.shape[0]
        inputs = Start(s, {"max_iterations": 200})
        return Work(
            inputs,
            lambda i: ((), {}),
            check,
            bytes_of(s),
            flops,
            torch.float64,
            graph=False,
            steps=lambda op, i: _run(op, "ba_solve", i),
            quality=quality,
        )

    peers = {"cpu": tuple(_ceres(name, number) for name, number in CERES.items()), "cuda": ()}
    once = size.get("O", 0) >= 500_000
    return Problem("ba_solve", {**size, "caches": "warm"}, make, peers, {"cpu": (), "cuda": ()}, quick=quick, once=once)


CERES = {"ceres-dense": 0, "ceres-sparse": 1, "ceres-iterative": 2, "ceres-iterative-schur-jacobi": 3}
MOST_DENSE = 200  # cameras


@functools.cache
def ceres() -> ctypes.CDLL:
    """Compiled when it is first asked for."""
    compiler = shutil.which("g++")
    if not compiler:
        raise RuntimeError("no g++ to compile it with")
    folder = Path(tempfile.mkdtemp(prefix="effk-ceres-"))
    source = Path(__file__).parent / "peers" / "ceres.cpp"
    command = [compiler, "-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-I/usr/include/eigen3"]
    done = subprocess.run(
        [*command, str(source), "-o", str(folder / "ceres.so"), "-lceres", "-lglog"], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError("Ceres isn't installed (apt install libceres-dev)")
    library = ctypes.CDLL(str(folder / "ceres.so"))
    address, number = ctypes.c_void_p, ctypes.c_int64
    library.effk_ceres_problem.restype = address
    library.effk_ceres_problem.argtypes = [address, number, number, address, address, address, ctypes.c_double]
    library.effk_ceres_solve.restype = ctypes.c_double
    library.effk_ceres_solve.argtypes = [address, *[ctypes.c_int] * 3, ctypes.c_double, address]
    library.effk_ceres_free.argtypes = [address]
    return library


class CeresProblem:
    """Built beforehand, untimed; parameters are put back before each solve."""

    def __init__(self, start: Start, solver: int):
        s = start.scene
        self.solver, self.cameras, self.points = solver, s.cameras.shape, s.points.shape
        self.start = torch.cat([s.cameras.flatten(), s.points.flatten()])
        self.parameters = self.start.clone()
        self.kept = s.observations.contiguous(), s.camera_index.int(), s.point_index.int()
        addresses = (t.data_ptr() for t in self.kept)
        sizes = s.cameras.shape[0], s.observations.shape[0]
        self.state = ceres().effk_ceres_problem(self.parameters.data_ptr(), *sizes, *addresses, 0.0)

    def __call__(self) -> tuple[Tensor, Tensor]:
        self.parameters.copy_(self.start)
        iterations = ctypes.c_int()
        options = self.solver, torch.get_num_threads(), 200, 1e-6
        ceres().effk_ceres_solve(self.state, *options, ctypes.byref(iterations))
        size = math.prod(self.cameras)
        return self.parameters[:size].view(self.cameras).clone(), self.parameters[size:].view(self.points).clone()

    def __del__(self) -> None:
        ceres().effk_ceres_free(self.state)


def _ceres(name: str, number: int) -> Peer:
    def missing(work: Work) -> str:
        cameras = work.inputs.scene.cameras.shape[0]
        if number == 0 and cameras > MOST_DENSE:
            return f"not run above {MOST_DENSE} cameras"
        try:
            ceres()
        except RuntimeError as error:
            return str(error)
        return ""

    kind = name.removeprefix("ceres-").upper()
    note = (
        f"Ceres Solver, {kind}, automatic derivatives, built beforehand; the same tolerances, torch's number of threads"
    )
    return Peer(name, lambda start: CeresProblem(start, number), note, missing, own_threads=True)


# --- Global positioning -----------------------------------------------------------------------------------------------


def positioning_problem(
    size: Mapping[str, Any], load: Callable[[torch.device], Scene], quick: bool = False, until_peer: bool = False
) -> Problem:
    """From random centres and points, the same for all; the cost may be that of the true ones at most.

    pycolmap ends at costs that are far from those. until_peer: as few iterations as reach 1.01 times what it ends at.
    """

    def make(problem: Problem, device: torch.device) -> Work:
        from effk.ba.solve import to_directions

        s = to_directions(load(device))
        true = float(_gp_cost(s.cameras, s.points, s))
        draw = torch.Generator().manual_seed(SEED)
        for t in (s.cameras, s.points):
            t.copy_(200 * (torch.rand(t.shape, generator=draw, dtype=torch.float64) - 0.5))

        start = Start(s, {"function_tolerance": 1e-5})  # GLOMAP's
        quality: dict[str, float] = {}
        wanted = 1.01 * true
        if until_peer:
            peer: tuple[Tensor, Tensor] = PYCOLMAP.view(PYCOLMAP.make(start)())
            wanted = 1.01 * float(_gp_cost(*peer, s))
            history = torch.ops.effk.gp_solve(s.cameras.clone(), s.points.clone(), *given(s)[2:], **start.options)
            start.options["max_iterations"] = int((history[:, 0] <= wanted).nonzero()[0])
            quality["iterations"] = start.options["max_iterations"]

        def check(result: tuple[Tensor, Tensor], is_effk: bool) -> str:
            cameras, points = (t.to(device) for t in result)
            cost = float(_gp_cost(cameras, points, s))
            quality["cost-over-truth" if is_effk else "peer-cost-over-truth"] = cost / true
            return "" if cost <= wanted or not is_effk else f"cost {cost:.6g}; wanted {wanted:.6g}"

        return Work(
            start,
            lambda i: ((), {}),
            check,
            bytes_of(s),
            JACOBIAN * s.observations.shape[0],
            torch.float64,
            graph=False,
            steps=lambda op, i: _run(op, "gp_solve", i),
            quality=quality,
        )

    peers = {"cpu": (PYCOLMAP,), "cuda": ()}
    size = {**size, "until": "peer's cost" if until_peer else "converged", "caches": "warm"}
    return Problem("gp_solve", size, make, peers, {"cpu": (), "cuda": ()}, quick=quick, once=not quick)


def positioning_problems(size: Mapping[str, Any], load: Callable[[torch.device], Scene]) -> list[Problem]:
    ends = (False,) if not_installed("pycolmap") else (False, True)
    return [positioning_problem(size, load, until_peer=until) for until in ends]


def _gp_cost(cameras: Tensor, points: Tensor, s: Scene) -> Tensor:
    options = {"model": "position", "loss": "huber", "loss_scale": 0.1}
    return torch.ops.effk.ba_cost(cameras, points, *given(s)[2:], **options)


def _pycolmap(start: Start) -> Call:
    """A reconstruction whose cameras look along the mean of what they see, with a pinhole of focal length 1000."""
    import numpy as np
    import pycolmap

    s = start.scene
    centres, points, v = (t.numpy() for t in (s.cameras, s.points, s.observations))
    index, of_point = s.camera_index.numpy(), s.point_index.numpy()
    built = pycolmap.Reconstruction()
    camera = pycolmap.Camera(model="SIMPLE_PINHOLE", width=1000, height=1000, params=[1000.0, 0.0, 0.0])
    camera.camera_id = 1
    built.add_camera_with_trivial_rig(camera)
    slot = np.empty(len(index), np.int64)
    for c in range(len(centres)):
        rows = np.flatnonzero(index == c)
        slot[rows] = np.arange(len(rows))
        ahead = v[rows].mean(0) / np.linalg.norm(v[rows].mean(0))
        side = np.linalg.svd(ahead[None])[2][1:]
        turn = np.stack([*side, ahead])
        turn *= np.linalg.det(turn) * np.array([[1.0], [1.0], [np.linalg.det(turn)]])
        seen = v[rows] @ turn.T
        image = pycolmap.Image(name=str(c), camera_id=1, image_id=c + 1)
        image.points2D = pycolmap.Point2DList([pycolmap.Point2D(p) for p in 1000 * seen[:, :2] / seen[:, 2:]])
        pose = pycolmap.Rigid3d(pycolmap.Rotation3d(turn), -turn @ centres[c])
        built.add_image_with_trivial_frame(image, pose)
    ends = np.searchsorted(of_point, np.arange(len(points) + 1))
    pairs = set()
    for p in range(len(points)):
        track = pycolmap.Track()
        cameras = [int(index[o]) + 1 for o in range(ends[p], ends[p + 1])]
        for o, c in zip(range(ends[p], ends[p + 1]), cameras, strict=True):
            track.add_element(c, int(slot[o]))
        built.add_point3D(points[p], track, np.zeros(3, np.uint8))
        pairs |= {(a, b) for a in cameras for b in cameras if a < b}
    graph = pycolmap.PoseGraph()
    for a, b in pairs:
        graph.add_edge(a, b, pycolmap.PoseGraphEdge())
    options = pycolmap.GlobalPositionerOptions()
    options.use_gpu, options.min_num_view_per_track = False, 2
    options.generate_random_positions = options.generate_random_points = False

    def call() -> Any:
        own = pycolmap.Reconstruction(built)
        if not pycolmap.run_global_positioning(options, graph, own):
            raise RuntimeError("it found no solution")
        return own

    return call


def _of_pycolmap(found: Any) -> tuple[Tensor, Tensor]:
    import numpy as np

    centres = np.array([found.images[i].projection_center() for i in sorted(found.images)])
    points = np.array([found.points3D[i].xyz for i in sorted(found.points3D)])
    return torch.from_numpy(centres), torch.from_numpy(points)


PYCOLMAP = Peer(
    "pycolmap",
    _pycolmap,
    "run_global_positioning from the same start, all points with two views or more, Ceres' threads",
    lambda work: not_installed("pycolmap"),
    _of_pycolmap,
    own_threads=True,
)


# --- The lists --------------------------------------------------------------------------------------------------------

AERIAL: list[Mapping[str, Any]] = [
    {"scene": "aerial", "C": cameras, "P": 200 * cameras, "O": 1000 * cameras} for cameras in (10, 100, 1000)
]
RING: Mapping[str, Any] = {"scene": "ring", "C": 1000, "P": 200_000, "O": 1_000_000}
MEDIUM = {"scene": "ring", "C": 100, "P": 10_000, "O": 50_000}
SMALL = {"scene": "ring", "C": 12, "P": 400, "O": 2_000}
BAL = Path(os.environ.get("EFFK_BAL", ""))
FILES = sorted(BAL.glob("problem-*.txt*")) if os.environ.get("EFFK_BAL") else []


def _loading(size: Mapping[str, Any]) -> Callable[[torch.device], Scene]:
    return functools.partial(scene_of, size)


def _true(size: Mapping[str, Any], device: torch.device) -> Scene:
    return scene(size["scene"], size["C"], size["P"], size["O"], device)[1]


def _refined(load: Callable[[torch.device], Scene], device: torch.device) -> Scene:
    """After bundle adjustment: rotations that fit the directions."""
    s = load(device).clone()
    effk.ba.solve(s, loss="huber")
    return s


def _files() -> list[Problem]:
    found = []
    for path in FILES:
        size = {"scene": path.name.split("-pre")[0].split(".")[0]}
        load = functools.partial(file, path)
        found += [solve_problem(size, load), *positioning_problems(size, functools.partial(_refined, load))]
    return found


PROBLEMS = [
    *_files(),
    *(problem for size in AERIAL for problem in step_problems(size)),
    *(solve_problem(size, _loading(size)) for size in (*AERIAL, RING)),
    *positioning_problems(MEDIUM, functools.partial(_true, MEDIUM)),
    *step_problems(SMALL, quick=True),
    solve_problem(SMALL, _loading(SMALL), quick=True),
    positioning_problem(SMALL, functools.partial(_true, SMALL), quick=True),
]

GOALS = [
    *(
        Goal("ba_solve", "cpu", peer, 8.0, {"scene": path.name.split("-pre")[0].split(".")[0]})
        for path in FILES
        for peer in ("ceres-dense", "ceres-sparse")
    ),
    *(Goal("ba_solve", "cpu", peer, 5.0, {"C": 1000}) for peer in ("ceres-iterative", "ceres-iterative-schur-jacobi")),
    Goal("gp_solve", "cpu", "pycolmap", 20.0, {"until": "peer's cost"}),
]
