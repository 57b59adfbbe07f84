"""COLMAP's sparse models, as https://colmap.github.io/format.html describes them, read without trusting them."""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .files import numbers_of, open_file, shortened
from .models import INTRINSICS

Array = NDArray[Any]

T = TypeVar("T")

FILES = ("cameras", "images", "points3D")
MODELS = ("simple_pinhole", "pinhole", "simple_radial", "radial", "opencv")  # by their numbers
NONE = 2**64 - 1  # the id of no 3D point; -1 in text

CAMERA = struct.Struct("<IiQQ")
IMAGE = struct.Struct("<I7dI")
COUNT = struct.Struct("<Q")
POINT2D = np.dtype([("xy", "<f8", 2), ("id", "<u8")])
POINT3D = np.dtype([("id", "<u8"), ("xyz", "<f8", 3), ("colour", "u1", 3), ("error", "<f8"), ("length", "<u8")])
TRACK = np.dtype("<u4")  # image, place among its 2D points


def paths(folder: Path, binary: bool) -> list[Path]:
    return [folder / f"{name}{'.bin' if binary else '.txt'}" for name in FILES]


def is_binary(folder: Path) -> bool:
    """Whether the model is in .bin files, which count more than .txt."""
    for binary in (True, False):
        if all(path.exists() for path in paths(folder, binary)):
            return binary
    raise FileNotFoundError(f"{folder} lacks some of {', '.join(FILES)}, as .bin and as .txt")


def check_rivals(folder: Path, binary: bool) -> None:
    """That COLMAP would read a model that is written there, and nothing else."""
    suffix = ".bin" if binary else ".txt"
    rivals = [f"rigs{suffix}", f"frames{suffix}"]  # whose poses count more than those of images
    if not binary:
        rivals += [f"{name}.bin" for name in FILES]
    if found := [name for name in rivals if (folder / name).exists()]:
        raise ValueError(f"{folder} has {', '.join(found)}, which would contradict the model; wanted another folder")


@dataclass(frozen=True)
class Reconstruction:
    """What the files of a COLMAP model hold: K cameras, C images of N 2D points, P points with O track elements."""

    model: str
    camera_ids: Array  # [K] uint32
    sizes: Array  # [K, 2] uint64: width, height
    intrinsics: Array  # [K, ..] float64
    image_ids: Array  # [C] uint32
    poses: Array  # [C, 7] float64
    image_cameras: Array  # [C] uint32, ids
    names: list[bytes]  # [C]
    seen: Array  # [C] int64: 2D points
    xy: Array  # [N, 2] float64
    xy_points: Array  # [N] uint64, ids
    point_ids: Array  # [P] uint64
    xyz: Array  # [P, 3] float64
    colours: Array  # [P, 3] uint8
    errors: Array  # [P] float64
    lengths: Array  # [P] int64: track elements
    tracks: Array  # [O, 2] uint32: image id, place among its 2D points

    def rows(self, camera_of: Array) -> Array:
        """Cameras of a Problem."""
        return np.hstack([self.poses, self.intrinsics[camera_of]])

    def resolve(self) -> tuple[Array, Array, Array, Array]:
        """Checks everything against everything else.

        Returns:
            Of images the places of their cameras [C]; of track elements those of their images, points and 2D points,
            [O] each; all int64.

        Raises:
            ValueError: something isn't finite, an id is there twice or isn't there, or tracks contradict images.
        """
        for name in ("intrinsics", "poses", "xy", "xyz", "errors"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name} aren't all finite")
        camera_of = _places("camera", self.camera_ids, self.image_cameras)
        image_of = _places("image", self.image_ids, self.tracks[:, 0])
        _places("point", self.point_ids, np.array([], np.uint64))
        point_of = np.repeat(np.arange(len(self.lengths)), self.lengths)
        place = self.tracks[:, 1].astype(np.int64)
        ids = self.point_ids[point_of]
        if len(bad := np.flatnonzero(place >= self.seen[image_of])):
            image, at = self.tracks[bad[0]]
            raise ValueError(f"the track of point {ids[bad[0]]} has 2D point {at} of image {image}, which there isn't")
        observed = (np.cumsum(self.seen) - self.seen)[image_of] + place
        if len(bad := np.flatnonzero((self.xy_points[observed] != ids) | (ids == NONE))):
            image, at = self.tracks[bad[0]]
            raise ValueError(
                f"the track of point {ids[bad[0]]} has 2D point {at} of image {image}, which is of point "
                f"{self.xy_points[observed[bad[0]]]}"
            )
        met = self.xy_points == NONE
        met[observed] = True
        if len(bad := np.flatnonzero(~met)):
            raise ValueError(f"point {self.xy_points[bad[0]]} isn't there, or lacks a 2D point of it in its track")
        if len(np.unique(observed)) < len(observed):
            raise ValueError("a track has a 2D point twice")
        return camera_of, image_of, point_of, observed


def _places(what: str, ids: Array, wanted: Array) -> Array:
    """Where wanted ids are among all, which must be different."""
    order = ids.argsort(kind="stable")
    ordered = ids[order]
    if len(twice := np.flatnonzero(ordered[1:] == ordered[:-1])):
        raise ValueError(f"{what} {ordered[twice[0]]} is there twice")
    at = np.searchsorted(ordered, wanted)
    lacking = at == len(ids)
    lacking[~lacking] = ordered[at[~lacking]] != wanted[~lacking]
    if lacking.any():
        raise ValueError(f"{what} {wanted[lacking][0]} isn't there")
    return order[at]


def one_model(cameras: Sequence[tuple[int, str]]) -> str:
    """Of cameras with ids and COLMAP's names of models; without any, one of them."""
    first, name = next(iter(cameras), (0, MODELS[0].upper()))
    for camera, other in cameras:
        _intrinsics_of(camera, other)
        if other != name:
            raise ValueError(f"cameras {first} and {camera} are {name} and {other}; wanted one model for all")
    return name.lower()


def _intrinsics_of(camera: int, name: str) -> int:
    """How many intrinsics one of COLMAP's models has."""
    if name not in (model.upper() for model in MODELS):
        raise ValueError(f"camera {camera} is {name}; wanted one of {', '.join(MODELS).upper()}")
    return len(INTRINSICS[name.lower()])


# ---- binary


class _Binary:
    """A binary file from front to back. Nothing is taken from behind its end."""

    def __init__(self, path: Path):
        with open_file(path) as file:
            self.data = file.read()
        self.at = 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError(f"ends {size - len(self.data) + self.at} bytes too early")
        self.at += size
        return self.data[self.at - size : self.at]

    def count(self, size: int) -> int:
        """The number of things that follow, of so many bytes each or more."""
        (count,) = COUNT.unpack(self.take(COUNT.size))
        if count * size > len(self.data) - self.at:
            raise ValueError(f"tells of {count} entries and has {len(self.data) - self.at} bytes for them")
        return int(count)

    def text(self) -> bytes:
        end = self.data.find(b"\0", self.at)
        if end < 0:
            raise ValueError("ends within a name")
        return self.take(end + 1 - self.at)[:-1]

    @classmethod
    @contextmanager
    def reading(cls, path: Path) -> Iterator[_Binary]:
        file = cls(path)
        try:
            yield file
            if file.at < len(file.data):
                raise ValueError("wanted the end")
        except ValueError as error:
            raise ValueError(f"{path}, byte {file.at}: {error}") from error


def read_binary(cameras: Path, images: Path, points: Path) -> Reconstruction:
    heads, models, intrinsics = [], [], []
    with _Binary.reading(cameras) as file:
        for _ in range(file.count(CAMERA.size)):
            camera, number, *size = CAMERA.unpack(file.take(CAMERA.size))
            name = MODELS[number].upper() if 0 <= number < len(MODELS) else f"of model {number}"
            intrinsics.append(file.take(8 * _intrinsics_of(camera, name)))
            models.append((camera, name))
            heads.append(size)
        model = one_model(models)
    poses, names, seen, xy = [], [], [], []
    with _Binary.reading(images) as file:
        for _ in range(file.count(IMAGE.size + 1 + COUNT.size)):
            poses.append(IMAGE.unpack(file.take(IMAGE.size)))
            names.append(file.text())
            seen.append(file.count(POINT2D.itemsize))
            xy.append(file.take(POINT2D.itemsize * seen[-1]))
    entries, tracks = [], []
    with _Binary.reading(points) as file:
        for _ in range(file.count(POINT3D.itemsize)):
            entries.append(file.take(POINT3D.itemsize - COUNT.size))
            length = file.count(2 * TRACK.itemsize)
            entries.append(COUNT.pack(length))
            tracks.append(file.take(2 * TRACK.itemsize * length))
    flat = np.frombuffer(b"".join(xy), POINT2D)
    entry = np.frombuffer(b"".join(entries), POINT3D)
    return Reconstruction(
        model,
        np.array([camera for camera, _ in models], np.uint32),
        rows_of(heads, np.uint64, 2),
        np.frombuffer(b"".join(intrinsics), "<f8").astype(np.float64).reshape(-1, len(INTRINSICS[model])),
        np.array([image for image, *_ in poses], np.uint32),
        rows_of([pose[1:8] for pose in poses], np.float64, 7),
        np.array([pose[8] for pose in poses], np.uint32),
        names,
        np.array(seen, np.int64),
        flat["xy"].astype(np.float64),
        flat["id"].astype(np.uint64),
        entry["id"].astype(np.uint64),
        entry["xyz"].astype(np.float64),
        entry["colour"].copy(),
        entry["error"].astype(np.float64),
        entry["length"].astype(np.int64),
        np.frombuffer(b"".join(tracks), TRACK).astype(np.uint32).reshape(-1, 2),
    )


def write_binary(source: Reconstruction) -> tuple[Iterable[bytes], ...]:
    """Pieces of the three files."""
    cameras = [COUNT.pack(len(source.camera_ids))]
    number = MODELS.index(source.model)
    for camera, size, row in zip(source.camera_ids, source.sizes, source.intrinsics, strict=True):
        cameras += [CAMERA.pack(camera, number, *size), row.astype("<f8").tobytes()]
    flat = np.empty(len(source.xy), POINT2D)
    flat["xy"], flat["id"] = source.xy, source.xy_points
    images = [COUNT.pack(len(source.image_ids))]
    for image, pose, camera, name, xy in zip(
        source.image_ids, source.poses, source.image_cameras, source.names, _split(flat, source.seen), strict=True
    ):
        images += [IMAGE.pack(image, *pose, camera), name, b"\0", COUNT.pack(len(xy)), xy.tobytes()]
    entries = np.empty(len(source.xyz), POINT3D)
    for key, values in zip(
        POINT3D.names or (),
        (source.point_ids, source.xyz, source.colours, source.errors, source.lengths),
        strict=True,
    ):
        entries[key] = values
    points = [COUNT.pack(len(entries))]
    for entry, track in zip(entries, _split(source.tracks.astype(TRACK), source.lengths), strict=True):
        points += [entry.tobytes(), track.tobytes()]
    return cameras, images, points


def _split(values: Array, counts: Array) -> Iterator[Array]:
    start = 0
    for count in counts.tolist():
        yield values[start : start + count]
        start += count


# ---- text


def _parsed(path: Path, parse: Callable[[Iterator[bytes]], T]) -> T:
    """What comes of a file's lines. A ValueError gets the number of the line."""
    number = 0

    def lines() -> Iterator[bytes]:
        nonlocal number
        with open_file(path) as file:
            for number, line in enumerate(file, 1):  # noqa: B007
                yield line.strip()

    try:
        return parse(lines())
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from error


def _entries(lines: Iterator[bytes], least: int, what: str, splits: int = -1) -> Iterator[list[bytes]]:
    """Tokens of lines that aren't comments."""
    for line in lines:
        if line and not line.startswith(b"#"):
            tokens = line.split(None, splits)
            if len(tokens) < least:
                raise ValueError(f"{len(tokens)} tokens; wanted {what}")
            yield tokens


def read_text(cameras: Path, images: Path, points: Path) -> Reconstruction:
    files: tuple[tuple[Any, ...], ...] = (
        _parsed(cameras, _parse_cameras),
        _parsed(images, _parse_images),
        _parsed(points, _parse_points),
    )
    return Reconstruction(*itertools.chain(*files))


def _parse_cameras(lines: Iterator[bytes]) -> tuple[str, Array, Array, Array]:
    ids, models, sizes, intrinsics = [], [], [], []
    for tokens in _entries(lines, 4, "CAMERA_ID, MODEL, WIDTH, HEIGHT and parameters"):
        ids += numbers_of(tokens[:1], int, np.uint32).tolist()
        name = tokens[1].decode("ascii", "backslashreplace")
        wanted = 4 + _intrinsics_of(ids[-1], name)
        if len(tokens) != wanted:
            raise ValueError(f"{len(tokens)} tokens; wanted {wanted} for {name}")
        models.append((ids[-1], name))
        sizes.append(numbers_of(tokens[2:4], int, np.uint64))
        intrinsics.append(numbers_of(tokens[4:], float, np.float64))
    model = one_model(models)
    width = len(INTRINSICS[model])
    return model, np.array(ids, np.uint32), rows_of(sizes, np.uint64, 2), rows_of(intrinsics, np.float64, width)


def _parse_images(lines: Iterator[bytes]) -> tuple[Array, Array, Array, list[bytes], Array, Array, Array]:
    ids, poses, cameras, names, seen = [], [], [], [], []
    xy, points = [np.zeros((0, 2))], [np.zeros(0, np.int64)]
    for tokens in _entries(lines, 10, "IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME", splits=9):
        ids.append(numbers_of(tokens[:1], int, np.uint32))
        poses.append(numbers_of(tokens[1:8], float, np.float64))
        cameras.append(numbers_of(tokens[8:9], int, np.uint32))
        names.append(tokens[9])
        if (line := next(lines, None)) is None:
            raise ValueError("ends before the 2D points of the last image")
        tokens = line.split()
        if len(tokens) % 3:
            raise ValueError(f"{len(tokens)} tokens; wanted X, Y, POINT3D_ID of each 2D point")
        points.append(numbers_of(tokens[2::3], int, np.int64))
        if (points[-1] < -1).any():
            raise ValueError(f"the 3D point {points[-1].min()}; wanted an id, or -1 for none")
        seen.append(len(points[-1]))
        del tokens[2::3]
        xy.append(numbers_of(tokens, float, np.float64).reshape(-1, 2))
    return (
        np.array(ids, np.uint32).reshape(-1),
        rows_of(poses, np.float64, 7),
        np.array(cameras, np.uint32).reshape(-1),
        names,
        np.array(seen, np.int64),
        np.concatenate(xy),
        np.concatenate(points).view(np.uint64),
    )


def _parse_points(lines: Iterator[bytes]) -> tuple[Array, Array, Array, Array, Array, Array]:
    ids, numbers, colours, lengths = [], [], [], []
    tracks = [np.zeros(0, np.uint32)]
    for tokens in _entries(lines, 8, "POINT3D_ID, X, Y, Z, R, G, B, ERROR and a track"):
        if len(tokens) % 2:
            raise ValueError(f"{len(tokens)} tokens; wanted IMAGE_ID, POINT2D_IDX of each element of the track")
        ids.append(numbers_of(tokens[:1], int, np.uint64))
        colours.append(numbers_of(tokens[4:7], int, np.uint8))
        numbers.append(numbers_of([*tokens[1:4], tokens[7]], float, np.float64))
        tracks.append(numbers_of(tokens[8:], int, np.uint32))
        lengths.append(len(tracks[-1]) // 2)
    number = rows_of(numbers, np.float64, 4)
    return (
        np.array(ids, np.uint64).reshape(-1),
        number[:, :3].copy(),
        rows_of(colours, np.uint8, 3),
        number[:, 3].copy(),
        np.array(lengths, np.int64),
        np.concatenate(tracks).reshape(-1, 2),
    )


def check_names(source: Reconstruction) -> None:
    """That a text file can hold them."""
    for name in source.names:
        if not re.fullmatch(rb"\S+", name):
            raise ValueError(
                f"an image has the name {shortened(name)}, which a text file can't hold; wanted binary=True"
            )


def write_text(source: Reconstruction) -> tuple[Iterable[bytes], ...]:
    """Pieces of the three files."""
    check_names(source)
    cameras = [b"# CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]\n"]
    for camera, size, row in zip(source.camera_ids, source.sizes, source.intrinsics, strict=True):
        cameras.append(b"%d %b %d %d %b\n" % (camera, source.model.upper().encode(), *size, _digits(row)))
    images = [b"# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME\n# POINTS2D[] as (X, Y, POINT3D_ID)\n"]
    flat = zip(*source.xy.T.tolist(), source.xy_points.view(np.int64).tolist(), strict=True)
    for image, pose, camera, name, seen in zip(
        source.image_ids, source.poses, source.image_cameras, source.names, source.seen.tolist(), strict=True
    ):
        images.append(b"%d %b %d %b\n" % (image, _digits(pose), camera, name))
        images.append(b" ".join(b"%.17g %.17g %d" % point for point in itertools.islice(flat, seen)) + b"\n")
    points = [b"# POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[] as (IMAGE_ID, POINT2D_IDX)\n"]
    for i, xyz, colour, error, track in zip(
        source.point_ids,
        source.xyz,
        source.colours,
        source.errors,
        _split(source.tracks, source.lengths),
        strict=True,
    ):
        elements = b"".join(b" %d" % number for number in track.flatten().tolist())
        points.append(b"%d %b %d %d %d %.17g%b\n" % (i, _digits(xyz), *colour, error, elements))
    return cameras, images, points


def _digits(row: Array) -> bytes:
    return b" ".join(b"%.17g" % number for number in row.tolist())


def rows_of(rows: Sequence[Any], dtype: Any, width: int) -> Array:
    return np.array(rows, dtype).reshape(-1, width)
