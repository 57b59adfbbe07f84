"""Text files of numbers, and those of "Bundle Adjustment in the Large", read without trusting them."""

from __future__ import annotations

import bz2
import errno
import gzip
import itertools
import os
import re
import secrets
import shutil
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .._checks import MAX_SIDE

Array = NDArray[Any]

CHUNK = 2**20  # bytes read at once
BLOCK = 2**14  # rows written at once
MAX_TOKEN = 500  # characters of a number
ROOM = 64  # characters for a number of a BAL file, with the space around it, on the average
EXPANSION = 1032  # bytes that gzip may make of one; of bz2, which makes millions of zeros, so much is believed
NUMERIC = b"0123456789+-.eE"
COMPRESSED: dict[str, Any] = {".bz2": bz2.open, ".gz": gzip.open}


def open_file(path: Path) -> IO[bytes]:
    """To read, compressed or not by the end of its name. It is a regular file: others may have no end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} isn't a regular file")
    opened: IO[bytes] = COMPRESSED.get(path.suffix.lower(), open)(path, "rb")
    return opened


@contextmanager
def writing(paths: Sequence[Path]) -> Iterator[list[IO[bytes]]]:
    """Files to write, compressed or not by the ends of their names, that take their places together at the end.

    Whatever ends the block before, a full disk or Ctrl-C, leaves what was there.
    """
    parts: list[tuple[Path, Path]] = []
    try:
        with ExitStack() as opened:
            files = []
            for path in paths:
                target = Path(os.path.realpath(path))
                if _replaceable(target):
                    part = _part(target)
                    parts.append((part, target))
                    file = opened.enter_context(_begun(part, target, path))
                else:
                    file = opened.enter_context(open(target, "wb"))
                if path.suffix.lower() in COMPRESSED:
                    file = opened.enter_context(COMPRESSED[path.suffix.lower()](file, "wb"))
                files.append(file)
            yield files
        for part, target in parts:
            os.replace(part, target)
    finally:
        for part, _ in parts:
            with suppress(OSError):
                part.unlink()


def check_writable(path: Path) -> None:
    """That `writing` could begin there; an OSError if not."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    target = Path(os.path.realpath(path))
    if _replaceable(target):
        part = _part(target)
        _begun(part, target, path).close()
        part.unlink()


def _replaceable(target: Path) -> bool:
    """Devices and pipes aren't."""
    return target.is_file() or not target.exists()


def _part(target: Path) -> Path:
    return target.with_name(f".{secrets.token_hex(8)}.part")


def _begun(part: Path, target: Path, path: Path) -> IO[bytes]:
    """A new file with the rights of the one that it is to replace. Errors name the latter as `path`."""
    try:
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        # Opened by number, so that gzip doesn't write down a name.
        file = os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb")
        if target.exists():
            shutil.copymode(target, part)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    return file


def shortened(token: bytes) -> str:
    text = token[:40].decode("utf-8", "backslashreplace")
    return repr(text if len(token) <= 40 else text + "...")


class _NotANumberError(ValueError):
    """Of the token at a place among others."""

    def __init__(self, at: int, token: bytes):
        super().__init__(f"{shortened(token)} isn't a number that is wanted there")
        self.at = at


def numbers_of(tokens: Sequence[bytes], kind: Callable[[bytes], Any], dtype: Any) -> Array:
    """Tokens as finite numbers of a dtype, by `kind`: float or int."""
    try:
        # Python would read more than numbers: nan, 1_000.
        if not b"".join(tokens).translate(None, NUMERIC):
            numbers: Iterable[Any] = map(kind, tokens)
            if np.issubdtype(dtype, np.integer):
                numbers = _in_range(list(numbers), np.iinfo(dtype))
            values = np.fromiter(numbers, dtype, len(tokens))
            if np.isfinite(values).all():
                return values
    except (ValueError, OverflowError):
        pass
    if len(tokens) == 1:
        raise _NotANumberError(0, tokens[0])
    for i, token in enumerate(tokens):
        try:
            numbers_of([token], kind, dtype)
        except _NotANumberError as error:
            error.at = i
            raise
    raise AssertionError("numbers one by one, and not together")


def _in_range(numbers: list[int], limits: np.iinfo[Any]) -> Iterator[int]:
    """numpy 1 takes others without a word, modulo a power of two."""
    if numbers and not limits.min <= min(numbers) <= max(numbers) <= limits.max:
        raise OverflowError
    return iter(numbers)


def _pieces(path: Path) -> Iterator[bytes]:
    """A text file in pieces that end where a token does."""
    try:
        with open_file(path) as file:
            data = file.read(CHUNK)
            while following := file.read(CHUNK):
                cut = 1 + max(data.rfind(space) for space in b" \n\t\r\v\f")
                if len(data) - cut > MAX_TOKEN:
                    raise ValueError(f"{path}: {shortened(data[cut:])} has more than {MAX_TOKEN} characters")
                yield data[:cut]
                data = data[cut:] + following
            yield data
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{path} can't be decompressed: {error}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"{path} can't be decompressed: {error}") from error  # bz2 and gzip say it so


def read_bal(path: Path) -> tuple[Array, ...]:
    """Cameras [C, 9], points [P, 3], observations [O, 2], and the camera and the point of each, [O] int32."""
    pieces = _pieces(path)
    head = next(pieces)
    cameras, points, seen = counts = _bal_counts(path, head.split(None, 3))
    wanted = 3 + sum(size * count for size, count in zip((9, 3, 4), counts, strict=True))
    size, line = path.stat().st_size, 1
    # What a file tells of gets no more memory than goes with its size.
    if size * (EXPANSION if path.suffix.lower() in COMPRESSED else 1) < 2 * wanted - 1:
        raise ValueError(f"{path} has {size} bytes, too few for the {wanted} numbers it tells of")
    own, xyz, xy = np.empty(9 * cameras), np.empty(3 * points), np.empty((seen, 2))
    index = [np.empty(seen, np.int32) for _ in range(2)]
    have = read = 0

    def place(at: int) -> str:
        """Of a token of the piece."""
        token = next(itertools.islice(re.finditer(rb"\S+", data), at, None))
        return f"{path}, line {line + data.count(10, 0, token.start())}"

    for data in itertools.chain([head], pieces):
        tokens = data.split()
        if have + len(tokens) > wanted:
            raise ValueError(f"{place(wanted - have)}: wanted the end, after {wanted} numbers")
        read += len(data)
        if read > ROOM * wanted + CHUNK:
            raise ValueError(f"{path} has {read} bytes and more for {wanted} numbers")
        try:
            values = numbers_of(tokens, float, np.float64)
        except _NotANumberError as error:
            raise ValueError(f"{place(error.at)}: {error}") from None
        start = max(0, have - 3)  # behind the counts
        values = values[start + 3 - have :]
        have += len(tokens)
        line += data.count(10)
        for array, first in ((own, 4 * seen), (xyz, 4 * seen + 9 * cameras)):
            low, high = max(start, first), min(start + len(values), first + len(array))
            if low < high:
                array[low - first : high - first] = values[low - start : high - start]
        values = values[: max(0, 4 * seen - start)]
        for column, array in enumerate((*index, *xy.T)):
            part = values[(column - start) % 4 :: 4]
            row = -((column - start) // 4)
            if column < 2 and len(wrong := np.flatnonzero((part < 0) | (part >= counts[column]) | (part % 1 != 0))):
                raise ValueError(
                    f"{path}: observation {row + wrong[0]} is of {('camera', 'point')[column]} {part[wrong[0]]:.17g}; "
                    f"wanted 0 to {counts[column] - 1}"
                )
            array[row : row + len(part)] = part
    if have < wanted:
        raise ValueError(f"{path}, line {line}: ends after {have} of {wanted} numbers")
    return own.reshape(-1, 9), xyz.reshape(-1, 3), xy, *index


def _bal_counts(path: Path, tokens: list[bytes]) -> tuple[int, ...]:
    if len(tokens) < 3:
        raise ValueError(f"{path} begins with {len(tokens)} tokens; wanted counts of cameras, points and observations")
    for token, what in zip(tokens, ("cameras", "points", "observations"), strict=False):
        if not re.fullmatch(rb"[0-9]{1,10}", token) or int(token) > MAX_SIDE:
            raise ValueError(f"{path} tells of {shortened(token)} {what}; wanted 0 to 2^30")
    return tuple(map(int, tokens[:3]))


def write_rows(file: IO[bytes], form: str, columns: Sequence[Array]) -> None:
    for start in range(0, len(columns[0]), BLOCK):
        rows = [column[start : start + BLOCK].tolist() for column in columns]
        file.write((form * len(rows[0]) % tuple(itertools.chain(*zip(*rows, strict=True)))).encode())
