"""Bundle adjustment problems, and the files of BAL and COLMAP that hold them.

Files are untrusted: no count in them is believed before the file is seen to be long enough for it, and what doesn't fit
together is refused with a ValueError that names the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._checks import INDICES, check_choice, check_range, check_tensor
from . import colmap, reference
from .files import read_bal, write_rows, writing
from .models import INTRINSICS

Array = NDArray[Any]
PathLike = str | os.PathLike[str]
Self = TypeVar("Self", bound="Problem")
T = TypeVar("T")


@dataclass(eq=False)
class Problem:
    """Cameras, points, and where the points were seen. Solvers change `cameras` and `points` in place.

    Problems that are read from files have their observations in ascending order of points, as most ops want them, and
    int32 indices. Copies, also those of `dataclasses.replace`, keep what else `to_colmap` writes.

    Attributes:
        cameras: [C, 6 + intrinsics], the rotation an angle-axis, or [C, 7 + intrinsics], a unit quaternion (w, x, y,
            z); then the translation, world to camera, and the model's intrinsics. float32 or float64. With the model
            "position": centres, [C, 3].
        points: [P, 3] of the same dtype.
        observations: [O, 2] of the same dtype, in pixels; with "position", directions [O, 3].
        camera_index, point_index: [O] int32 or int64.
        model: a key of `effk.ba.models.INTRINSICS`, or "position".
        depth: [O] of the same dtype, or None: observed depths; NaN or at most 0 where there is none.
        fixed_points: [P] bool, or None: points that stay where they are.
        columns: [C, n] int64, or None when all is free: for each entry of a camera's tangent (rotation 3, translation
            3, intrinsics) the number of its free parameter, from 0 on without gaps; -1 where it is fixed. Entries of
            the same number are tied: translations and intrinsics must then be equal, rotations turn alike.
        positions: [C, 3] of the same dtype, or None: where the cameras' centres are known to be; NaN where they aren't.
    """

    cameras: Tensor
    points: Tensor
    observations: Tensor
    camera_index: Tensor
    point_index: Tensor
    model: str = "snavely"
    depth: Tensor | None = None
    fixed_points: Tensor | None = None
    columns: Tensor | None = None
    positions: Tensor | None = None
    _source: colmap.Reconstruction | None = field(default=None, repr=False, kw_only=True)  # what COLMAP's files held

    @property
    def num_parameters(self) -> int:
        """n, of a camera's tangent."""
        _check(check_choice, "model", self.model, reference.MODELS)
        return reference.parameters(self.model)

    @property
    def _intrinsics(self) -> tuple[str, ...]:
        return INTRINSICS.get(self.model, ())

    def check(self) -> None:
        """Looks at everything, contents too.

        Raises:
            ValueError: a field has a wrong type, dtype, shape or device, isn't finite, or holds an index out of range;
                a quaternion has no direction; columns has gaps, or ties what isn't equal.
        """
        for name, value in self._fields().items():
            if not isinstance(value, Tensor) and name != "model" and (value is not None or name in REQUIRED):
                raise ValueError(f"{name} is a {type(value).__name__}; wanted a tensor")
        given = (self.cameras, self.points, self.observations, self.camera_index, self.point_index)
        _check(reference.check_problem, *given, self.depth, self.model, 1.0)
        _check(reference.check_indices, self.cameras, self.points, self.camera_index, self.point_index)
        for name, t in zip(REQUIRED, given[:3], strict=False):
            if len(bad := (~t.isfinite()).any(1).nonzero()):
                raise ValueError(f"{name} isn't finite in row {int(bad[0])}")
        count, n = len(self.cameras), self.num_parameters
        if self.cameras.shape[1] > n:
            norm = self.cameras[:, :4].double().norm(dim=1)
            if len(bad := ((norm < 1e-6) | (norm > 1e6)).nonzero()):
                raise ValueError(f"cameras has a quaternion of norm {float(norm[bad[0]]):g} in row {int(bad[0])}")
        if self.depth is not None and (self.depth == torch.inf).any():
            raise ValueError("depth holds infinity; wanted NaN where there is none")
        if self.fixed_points is not None:
            shape = (len(self.points),)
            _check(check_tensor, "fixed_points", self.fixed_points, (torch.bool,), shape, self.cameras)
        if self.positions is not None:
            if self.model == "position":
                raise ValueError("positions are given with model 'position'; wanted none")
            _check(check_tensor, "positions", self.positions, (self.cameras.dtype,), (count, 3), self.cameras)
        if self.columns is not None:
            _check(check_tensor, "columns", self.columns, (torch.int64,), (count, n), self.cameras)
            _check(check_range, "columns", self.columns, -1, count * n - 1)
            used = torch.bincount(self.columns.flatten() + 1)[1:] > 0
            if not used.all():
                raise ValueError(f"columns lacks the number {int((~used).nonzero()[0])}")
            self._check_tied(self.columns)

    def _check_tied(self, columns: Tensor) -> None:
        """That translations and intrinsics of the same number are equal."""
        names = ("tx", "ty", "tz", *self._intrinsics)  # of "position" the centre
        values = self.cameras[:, -len(names) :].flatten()
        numbers = columns[:, -len(names) :].flatten()
        at = (numbers >= 0).nonzero().flatten()
        first = at[_first(numbers[at])]
        unequal = (values[at] != values[first]).nonzero().flatten()
        if len(unequal):
            (x, a), (y, b) = (
                (f"{names[int(i) % len(names)]} of camera {int(i) // len(names)}", float(values[i]))
                for i in (first[unequal[0]], at[unequal[0]])
            )
            raise ValueError(f"columns ties {x}, which is {a:.17g}, to {y}, which is {b:.17g}; wanted equal ones")

    def _fields(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "_source"}

    # ---- what is free

    def fix_cameras(self, index: int | Sequence[int] | Tensor, pose: bool = True, intrinsics: bool = False) -> None:
        """Keeps cameras as they are, together with what is tied to them.

        Args:
            index: numbers of cameras, or [C] bool.
            pose: whether rotation and translation (of "position", the centre) are fixed.
            intrinsics: whether the intrinsics are.

        Raises:
            ValueError: no such camera.
        """
        rows = self._numbers("index", index)
        if rows.dtype == torch.bool and rows.shape == (len(self.cameras),):
            rows = rows.nonzero()
        elif rows.numel() and rows.dtype not in INDICES:
            raise ValueError(f"index is {rows.dtype} {list(rows.shape)}; wanted numbers, or bool [{len(self.cameras)}]")
        rows = rows.long().flatten()
        _check(check_range, "index", rows, 0, len(self.cameras) - 1)
        poses = self.num_parameters - len(self._intrinsics)
        columns = self._free()
        self._fix(columns, columns[rows, (0 if pose else poses) : (None if intrinsics else poses)])

    def fix_intrinsics(self, names: Sequence[str] | None = None) -> None:
        """Keeps intrinsics of all cameras as they are.

        Args:
            names: which, as the model calls them, such as ["cx", "cy"], the principal point, which COLMAP refines only
                when it is told to; all by default.

        Raises:
            ValueError: the model has none of that name.
        """
        known = self._intrinsics
        chosen = known if names is None else [names] if isinstance(names, str) else list(names)
        if unknown := [name for name in chosen if name not in known]:
            raise ValueError(f"names holds {unknown[0]!r}; {self.model!r} has {', '.join(known) or 'no intrinsics'}")
        columns = self._free()
        self._fix(columns, columns[:, [known.index(name) - len(known) for name in chosen]])

    def _fix(self, columns: Tensor, chosen: Tensor) -> None:
        columns[torch.isin(columns, chosen)] = -1
        self.columns = _dense(columns)

    def share_intrinsics(self, groups: Sequence[int] | Tensor | None = None) -> None:
        """Makes cameras have their intrinsics in common, in place of what they had in common before.

        Where an intrinsic of one of a group is fixed, that of all is.

        Args:
            groups: [C], cameras of the same number are a group; one group of all by default.

        Raises:
            ValueError: cameras of a group have different intrinsics, or groups isn't [C] integers.
        """
        count, kinds = len(self.cameras), len(self._intrinsics)
        group = self._numbers("groups", [0] * count if groups is None else groups)
        if group.shape != (count,) or (count and group.dtype not in INDICES):
            raise ValueError(f"groups is {group.dtype} {list(group.shape)}; wanted integers [{count}]")
        group = group.unique(return_inverse=True)[1]
        columns = self._free()
        own = columns[:, columns.shape[1] - kinds :]
        fixed = torch.zeros_like(own).index_add(0, group, (own < 0).long())[group] > 0
        own.copy_(columns.numel() + group[:, None] * kinds + torch.arange(kinds, device=group.device))
        self._check_tied(columns)
        own[fixed] = -1
        self.columns = _dense(columns)

    def _numbers(self, name: str, given: Any) -> Tensor:
        try:
            return torch.as_tensor(given, device=self.cameras.device)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{name} is {given!r}; wanted numbers") from None

    def _free(self) -> Tensor:
        """A copy of columns."""
        if self.columns is not None:
            return self.columns.clone()
        shape = len(self.cameras), self.num_parameters
        return torch.arange(shape[0] * shape[1], device=self.cameras.device).view(shape)

    # ---- copies

    def clone(self: Self) -> Self:
        """A copy that shares no tensor."""
        return self._map(Tensor.clone)

    def to(self: Self, target: torch.dtype | torch.device | str) -> Self:
        """The problem in float32 or float64, or on a device. Tensors that stay the same are shared.

        Raises:
            ValueError: another dtype, or no device's name.
        """
        if isinstance(target, str):
            try:
                target = torch.device(target)
            except RuntimeError:
                raise ValueError(f"target is {target!r}; wanted a dtype or a device") from None
        if isinstance(target, torch.dtype) and target not in reference.FLOATS:
            raise ValueError(f"dtype is {target}; wanted {' or '.join(map(str, reference.FLOATS))}")
        return self._map(lambda t: t.to(target) if t.is_floating_point() or not isinstance(target, torch.dtype) else t)

    def _map(self: Self, change: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {k: change(v) for k, v in self._fields().items() if isinstance(v, Tensor)}
        return replace(self, **changed)

    # ---- BAL

    @classmethod
    def from_bal(cls: type[Self], path: PathLike, dtype: torch.dtype = torch.float64) -> Self:
        """Reads a text file of "Bundle Adjustment in the Large" (Agarwal et al., 2010), plain, .bz2 or .gz.

        It holds the numbers of cameras, points and observations; camera, point, x and y of each observation; then
        angle-axis, translation, f, k1 and k2 of each camera; then the points. Observations are sorted by points if
        they aren't.

        Args:
            path: of the file.
            dtype: float32 or float64, of the problem.

        Raises:
            ValueError: the file is malformed, and where.
            OSError: it can't be read.
        """
        path = Path(path)
        cameras, points, observations, camera_index, point_index = read_bal(path)
        if (point_index[1:] < point_index[:-1]).any():
            order = point_index.argsort(kind="stable")
            observations = observations[order]
            camera_index, point_index = camera_index[order], point_index[order]
        problem = cls(
            torch.from_numpy(cameras),
            torch.from_numpy(points),
            torch.from_numpy(observations),
            torch.from_numpy(camera_index),
            torch.from_numpy(point_index),
        ).to(dtype)
        with _naming(path):
            problem.check()
        return problem

    def to_bal(self, path: PathLike) -> None:
        """Writes a text file of "Bundle Adjustment in the Large", compressed if its name ends in .bz2 or .gz.

        Numbers have 17 digits, so that float64 comes back to the bit; quaternions become angle-axes. What the format
        has no place for isn't written: depth, fixed_points, columns, positions. What was there is replaced when all is
        written.

        Raises:
            ValueError: the model isn't "snavely", or the problem doesn't pass `check`.
            OSError: the file can't be written.
        """
        self.check()
        if self.model != "snavely":
            raise ValueError(f"model is {self.model!r}; a BAL file holds 'snavely'")
        cameras = self.cameras
        if cameras.shape[1] > self.num_parameters:
            rotation, *rest = reference.parts(cameras, self.num_parameters)
            cameras = torch.cat([reference.logarithm(rotation), *rest], 1)
        with writing([Path(path)]) as (file,):
            file.write(b"%d %d %d\n" % (len(cameras), len(self.points), len(self.observations)))
            columns = (_array(self.camera_index), _array(self.point_index), *_array(self.observations).T)
            write_rows(file, "%d %d %.17g %.17g\n", columns)
            for t in (cameras, self.points):
                write_rows(file, "%.17g\n", (_array(t).flatten(),))

    # ---- COLMAP

    @classmethod
    def from_colmap(cls: type[Self], folder: PathLike) -> Self:
        """Reads a sparse model of COLMAP: cameras, images and points3D, .bin or, where these aren't, .txt.

        A camera of the problem is an image, with a quaternion; images of one COLMAP camera have their intrinsics tied.
        Pixels stay as they are in COLMAP. Rigs and frames aren't read: every image has its own pose. What the problem
        has no place for is kept for `to_colmap`.

        Args:
            folder: with the files. Cameras are all SIMPLE_PINHOLE, PINHOLE, SIMPLE_RADIAL, RADIAL or OPENCV.

        Raises:
            ValueError: a file is malformed, files contradict each other, or cameras have other models or several.
            OSError: files are missing or can't be read.
        """
        folder = Path(folder)
        read = colmap.read_binary if colmap.is_binary(folder) else colmap.read_text
        return cls._from_source(read(*colmap.paths(folder, read is colmap.read_binary)), folder)

    def to_colmap(self, folder: PathLike, binary: bool = True) -> None:
        """Writes a sparse model of COLMAP: cameras, images and points3D.

        Of a problem that came from COLMAP, poses, intrinsics, points and observations are written as they are now, and
        all else as it was read: ids, names, sizes, colours, errors, 2D points without a 3D point. Any other problem
        gets ids from 1 on, and a COLMAP camera for every image or, where `columns` ties all intrinsics, group. Files
        that were there are replaced when all are written.

        Args:
            folder: made if it doesn't exist.
            binary: .bin files rather than .txt.

        Raises:
            ValueError: COLMAP hasn't got the model; images of one COLMAP camera differ in intrinsics; observations are
                of other cameras or points than in the model that was read; a name doesn't fit into a text file; the
                folder has files that COLMAP would read instead of these or beside them; or `check` fails.
            OSError: files can't be written.
        """
        source = self._to_source()
        files = colmap.write_binary(source) if binary else colmap.write_text(source)
        folder = Path(folder)
        colmap.check_rivals(folder, binary)
        folder.mkdir(parents=True, exist_ok=True)
        with writing(colmap.paths(folder, binary)) as opened:
            for file, parts in zip(opened, files, strict=True):
                file.writelines(parts)

    @classmethod
    def from_pycolmap(cls: type[Self], reconstruction: Any) -> Self:
        """Takes over the images that have a pose, and the points, of a pycolmap.Reconstruction, as `from_colmap` does.

        Raises:
            ValueError: as for `from_colmap`.
        """
        cameras = [reconstruction.cameras[i] for i in sorted(reconstruction.cameras)]
        images = [reconstruction.images[i] for i in sorted(reconstruction.reg_image_ids())]
        poses = [image.cam_from_world() for image in images]
        seen = [list(image.points2D) for image in images]
        points = [(i, reconstruction.points3D[i]) for i in sorted(reconstruction.points3D)]
        tracks = [list(point.track.elements) for _, point in points]
        where = "reconstruction"
        with _naming(where):
            model = colmap.one_model([(c.camera_id, c.model_name) for c in cameras])
            source = colmap.Reconstruction(
                model,
                np.array([c.camera_id for c in cameras], np.uint32),
                colmap.rows_of([(c.width, c.height) for c in cameras], np.uint64, 2),
                colmap.rows_of([c.params for c in cameras], np.float64, len(INTRINSICS[model])),
                np.array([i.image_id for i in images], np.uint32),
                colmap.rows_of([(*np.roll(p.rotation.quat, 1), *p.translation) for p in poses], np.float64, 7),
                np.array([i.camera_id for i in images], np.uint32),
                [i.name.encode("utf-8", "surrogateescape") for i in images],
                np.array([len(s) for s in seen], np.int64),
                colmap.rows_of([q.xy for s in seen for q in s], np.float64, 2),
                np.array([q.point3D_id for s in seen for q in s], np.uint64),
                np.array([i for i, _ in points], np.uint64),
                colmap.rows_of([p.xyz for _, p in points], np.float64, 3),
                colmap.rows_of([p.color for _, p in points], np.uint8, 3),
                np.array([p.error for _, p in points], np.float64),
                np.array([len(t) for t in tracks], np.int64),
                colmap.rows_of([(e.image_id, e.point2D_idx) for t in tracks for e in t], np.uint32, 2),
            )
        return cls._from_source(source, where)

    def to_pycolmap(self, reconstruction: Any) -> None:
        """Gives poses, intrinsics and points to the pycolmap.Reconstruction (3.12 or later) that the problem came from.

        Images, cameras and points are found by their ids; those of a problem that didn't come from COLMAP go from 1 on.

        Raises:
            ValueError: as for `to_colmap`; the reconstruction lacks an id; or it has a frame of several images, whose
                poses depend on each other. Nothing has been changed then.
        """
        source = self._to_source()
        for what, found, wanted in (
            ("camera", reconstruction.cameras, source.camera_ids),
            ("image", reconstruction.images, source.image_ids),
            ("point", reconstruction.points3D, source.point_ids),
        ):
            if lacking := [i for i in wanted.tolist() if i not in found]:
                raise ValueError(f"reconstruction has no {what} {lacking[0]}")
        images = [reconstruction.images[i] for i in source.image_ids.tolist()]
        frames: dict[int, int] = {}
        for image in images:
            if (other := frames.setdefault(image.frame_id, image.image_id)) != image.image_id:
                raise ValueError(
                    f"reconstruction has images {other} and {image.image_id} in frame {image.frame_id}, so that their "
                    "poses depend on each other"
                )
        for i, intrinsics in zip(source.camera_ids.tolist(), source.intrinsics, strict=True):
            reconstruction.cameras[i].params = intrinsics
        for image, numbers in zip(images, source.poses, strict=True):
            pose = image.cam_from_world()
            rotation = type(pose.rotation)(np.roll(numbers[:4], -1))
            image.frame.set_cam_from_world(image.camera_id, type(pose)(rotation, numbers[4:]))
        for i, xyz in zip(source.point_ids.tolist(), source.xyz, strict=True):
            reconstruction.points3D[i].xyz = xyz

    @classmethod
    def _from_source(cls: type[Self], source: colmap.Reconstruction, where: object) -> Self:
        with _naming(where):
            camera_of, image_of, point_of, observed = source.resolve()
            problem = cls(
                torch.from_numpy(source.rows(camera_of)),
                torch.from_numpy(source.xyz.copy()),
                torch.from_numpy(source.xy[observed]),
                torch.from_numpy(image_of.astype(np.int32)),
                torch.from_numpy(point_of.astype(np.int32)),
                source.model,
            )
            problem.check()
            if len(np.unique(camera_of)) < len(camera_of):
                problem.share_intrinsics(torch.from_numpy(camera_of))
        problem._source = source
        return problem

    def _to_source(self) -> colmap.Reconstruction:
        """The COLMAP model as it is now."""
        self.check()
        if self.model not in colmap.MODELS:
            raise ValueError(f"model is {self.model!r}; COLMAP has {', '.join(colmap.MODELS)}")
        cameras = torch.cat(reference.parts(self.cameras, self.num_parameters), 1).numpy(force=True)
        if self._source is None:
            return self._new_source(cameras)
        source = self._source
        camera_of, image_of, point_of, observed = source.resolve()
        if (
            (self.model, len(cameras), len(self.points)) != (source.model, len(camera_of), len(source.xyz))
            or not np.array_equal(_array(self.camera_index), image_of)
            or not np.array_equal(_array(self.point_index), point_of)
        ):
            raise ValueError("cameras, points or observations aren't those of the COLMAP model that was read")
        # What hasn't changed is written as it was read: float32 would have rounded it, and a quaternion in a file is
        # only nearly a unit.
        old = source.rows(camera_of)
        if self.cameras.shape == old.shape:
            same = _array(self.cameras) == old.astype(_array(self.cameras).dtype)
            same[:, :4] = same[:, :4].all(1, keepdims=True)
            cameras = np.where(same, old, cameras)
        intrinsics = source.intrinsics.copy()
        intrinsics[camera_of] = cameras[:, 7:]
        if len(bad := np.flatnonzero((intrinsics[camera_of] != cameras[:, 7:]).any(1))):
            last = np.flatnonzero(camera_of == camera_of[bad[0]])[-1]
            raise ValueError(
                f"cameras {bad[0]} and {last} are images of COLMAP's camera {source.camera_ids[camera_of[last]]} and "
                "differ in intrinsics"
            )
        xy = source.xy.copy()
        xy[observed] = _kept(self.observations, xy[observed])
        return replace(source, poses=cameras[:, :7], intrinsics=intrinsics, xyz=_kept(self.points, source.xyz), xy=xy)

    def _new_source(self, cameras: Array) -> colmap.Reconstruction:
        """A COLMAP model of a problem that didn't come from one. cameras: [C, 7 + intrinsics]"""
        count, points = len(cameras), len(self.points)
        # Cameras of which an intrinsic is fixed may differ in it, so they aren't put together.
        keys = _array(self._free())[:, 6:]
        keys = np.where((keys < 0).any(1, keepdims=True), -1 - np.arange(count)[:, None], keys)
        _, first, camera_of = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        camera_of = camera_of.reshape(-1)
        camera_index, point_index = _array(self.camera_index), _array(self.point_index)
        xy = _array(self.observations.double())
        by_image, by_point = (index.argsort(kind="stable") for index in (camera_index, point_index))
        seen = np.bincount(camera_index, minlength=count)
        place = np.empty(len(xy), np.int64)  # of an observation in its image
        place[by_image] = np.arange(len(xy)) - np.repeat(np.cumsum(seen) - seen, seen)
        centre = [7 + self._intrinsics.index(name) for name in ("cx", "cy")]
        sizes = np.maximum(2 * cameras[first][:, centre], 1)
        np.maximum.at(sizes, camera_of[camera_index], xy)
        return colmap.Reconstruction(
            self.model,
            np.arange(1, len(first) + 1, dtype=np.uint32),
            np.ceil(sizes.clip(max=2**32)).astype(np.uint64),
            cameras[first, 7:],
            np.arange(1, count + 1, dtype=np.uint32),
            cameras[:, :7],
            camera_of.astype(np.uint32) + 1,
            [b"%06d.png" % i for i in range(1, count + 1)],
            seen,
            xy[by_image],
            point_index[by_image].astype(np.uint64) + 1,
            np.arange(1, points + 1, dtype=np.uint64),
            _array(self.points.double()),
            np.zeros((points, 3), np.uint8),
            np.full(points, -1.0),
            np.bincount(point_index, minlength=points),
            np.stack([camera_index[by_point] + 1, place[by_point]], 1).astype(np.uint32),
        )


# ---- tensors and arrays

REQUIRED = ("cameras", "points", "observations", "camera_index", "point_index")


def _check(check: Callable[..., object], *args: object) -> None:
    """A check of ops, which raises RuntimeErrors that begin with an op's name."""
    try:
        check("Problem", *args)
    except RuntimeError as error:
        raise ValueError(str(error).removeprefix("effk::Problem: ")) from None


def _first(numbers: Tensor) -> Tensor:
    """[k] -> where each number comes first, [k]."""
    values, inverse = numbers.unique(return_inverse=True)
    at = torch.arange(len(numbers), device=numbers.device)
    return at.new_full((len(values),), len(numbers)).scatter_reduce(0, inverse, at, "amin")[inverse]


def _dense(columns: Tensor) -> Tensor:
    """The numbers anew, from 0 on, in order of first appearance."""
    free = columns >= 0
    columns[free] = _first(columns[free]).unique(return_inverse=True)[1]
    return columns


def _array(tensor: Tensor) -> Array:
    return tensor.numpy(force=True)


def _kept(tensor: Tensor, old: Array) -> Array:
    """In float64; what hasn't changed since `old` was rounded to the tensor's dtype is `old`."""
    new = _array(tensor)
    return np.where(new == old.astype(new.dtype), old, new)


@contextmanager
def _naming(where: object) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
