"""Text files of numbers, and those of "Bundle Adjustment in the Large", read without trusting them."""

from __future__ import annotations

import bz2
import gzip
import itertools
import re
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
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
NUMERIC = b"0123456789+-.eE"
COMPRESSED: dict[str, Any] = {".bz2": bz2.open, ".gz": gzip.open}


def open_file(path: Path, mode: str) -> IO[bytes]:
    """By the end of its name, compressed or not. What is read is a regular file: others may have no end."""
    if mode == "rb" and not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} isn't a regular file")
    opened: IO[bytes] = COMPRESSED.get(path.suffix.lower(), open)(path, mode)
    return opened


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
            values = np.fromiter(map(kind, tokens), dtype, len(tokens))
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


def _pieces(path: Path) -> Iterator[bytes]:
    """A text file in pieces that end where a token does."""
    try:
        with open_file(path, "rb") as file:
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


def read_bal(path: Path) -> tuple[tuple[int, ...], Array]:
    """The three counts, and all numbers of the file, from these on."""
    parts: list[Array] = []
    counts: tuple[int, ...] = ()
    wanted = have = read = 0
    line = 1

    def place(at: int) -> str:
        """Of a token of the piece."""
        token = next(itertools.islice(re.finditer(rb"\S+", data), at, None))
        return f"{path}, line {line + data.count(10, 0, token.start())}"

    for data in _pieces(path):
        tokens = data.split()
        if not counts:
            counts = _bal_counts(path, tokens)
            wanted = 3 + sum(size * count for size, count in zip((9, 3, 4), counts, strict=True))
            if path.suffix.lower() not in COMPRESSED and path.stat().st_size < 2 * wanted - 1:
                raise ValueError(
                    f"{path} has {path.stat().st_size} bytes, too few for the {wanted} numbers it tells of"
                )
        if have + len(tokens) > wanted:
            raise ValueError(f"{place(wanted - have)}: wanted the end, after {wanted} numbers")
        read += len(data)
        if read > ROOM * wanted + CHUNK:
            raise ValueError(f"{path} has {read} bytes and more for {wanted} numbers")
        try:
            parts.append(numbers_of(tokens, float, np.float64))
        except _NotANumberError as error:
            raise ValueError(f"{place(error.at)}: {error}") from None
        have += len(tokens)
        line += data.count(10)
    if have < wanted:
        raise ValueError(f"{path}, line {line}: ends after {have} of {wanted} numbers")
    return counts, np.concatenate(parts)


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
