"""Checkpoints in compressed-tensors' `sparse-bitmask` format, as LLM Compressor wrote them, into lscd's.

A weight is four tensors: `shape`; `compressed`, the nonzeros in row-major order; `bitmask`, uint8, a row of
ceil(columns / 8) bytes for each row with the first column in the lowest bit; `row_offsets`, the nonzeros before each
row. Their names are `<layer>.compressed` or, in older files, `<layer>.weight.compressed`, and so on. compressed-tensors
itself isn't needed to read them. Checkpoints are untrusted: everything is checked against everything else.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._checks import FLOATS
from .._modules import linear_weights
from .._progress import progress_bar
from ..lscd.modules import Record, sparsify_weight_

log = logging.getLogger("effk")

PARTS = ("shape", "compressed", "bitmask", "row_offsets")

Source = str | os.PathLike[str] | Mapping[str, Tensor]


class _Entry(NamedTuple):
    """A tensor of a checkpoint, not yet read."""

    load: Callable[[], Tensor]
    compressed: bool


def load_sparse_bitmask(source: Source) -> dict[str, Tensor]:
    """Reads a sparse-bitmask checkpoint as a dense state_dict.

    Args:
        source: a .safetensors file; a folder with such files (those that its model.safetensors.index.json lists, if
            there is one); or the tensors by name.

    Returns:
        All tensors by name, compressed ones dense and as `<layer>.weight`.

    Raises:
        ValueError: tensors of a weight are missing, contradict each other or hold a quantized weight.
        ImportError: safetensors isn't installed.
    """
    with _entries(source) as entries:
        return {name: entry.load() for name, entry in entries.items()}


def load_into(
    model: nn.Module, source: Source, *, min_sparsity: float = 0.45, strict: bool = True, progress: bool = True
) -> list[Record]:
    """Loads a sparse-bitmask checkpoint into a model, whose compressed nn.Linear layers become SparseLinear.

    Tensor by tensor, so that a model built under `torch.device("meta")` never is in memory as a dense one. Tensors
    take the model's dtypes and devices (on the meta device: the CPU), and ties between parameters are kept. Which
    layers can be replaced is as in `effk.lscd.sparsify_`; the others get the dense weight. When a tensor turns out to
    be corrupt, those before it have been loaded.

    Args:
        model: any; parameters and persistent buffers are filled.
        source: as for `load_sparse_bitmask`.
        min_sparsity: compressed weights with a smaller share of zeros become dense.
        strict: the names in the checkpoint must be those of the model.
        progress: shows a bar, where rich is installed and stderr is a terminal.

    Returns:
        A record for each compressed weight of an nn.Linear.

    Raises:
        ValueError: names differ (nothing has been loaded), a shape differs, or as for `load_sparse_bitmask`.
        ImportError: safetensors isn't installed.
    """
    # keep_vars: the parameters themselves, so that tied ones are the same object.
    current = model.state_dict(keep_vars=True)
    places: dict[int, list[str]] = {}
    for name, tensor in current.items():
        places.setdefault(id(tensor), []).append(name)
    linears = {f"{name}.weight": weight for weight in linear_weights(model) for name in weight.names}
    records = []
    with _entries(source) as entries, progress_bar("Loading weights", len(entries), progress) as advance:
        if strict:
            _check_names(entries.keys(), current.keys(), places.values())
        for name, entry in entries.items():
            # Of tied tensors the first one counts.
            if name in current and (names := places.pop(id(current[name]), None)):
                tensor = entry.load()
                if tensor.shape != current[name].shape:
                    raise ValueError(
                        f"{name} has shape {list(tensor.shape)} in the checkpoint; wanted {list(current[name].shape)}"
                    )
                _assign(model, names, tensor)
                if entry.compressed and name in linears:
                    records.append(sparsify_weight_(model, linears[name], min_sparsity))
            advance()
    log.info("lscd: packed %d of %d compressed weights", sum(not r.skipped for r in records), len(records))
    if empty := [name for name, t in chain(model.named_parameters(), model.named_buffers()) if t.is_meta]:
        log.warning("lscd: not in the checkpoint and still on the meta device: %s", ", ".join(empty))
    return records


def _check_names(found: Set[str], wanted: Set[str], tied: Iterable[list[str]]) -> None:
    problems = {
        "lacks": [names[0] for names in tied if found.isdisjoint(names)],
        "has, unlike the model,": sorted(found - wanted),
    }
    if any(problems.values()):
        raise ValueError(
            "the checkpoint " + " and ".join(f"{verb} {names}" for verb, names in problems.items() if names)
        )


def _assign(model: nn.Module, names: list[str], tensor: Tensor) -> None:
    """Puts a tensor where a model has, under all these names, one parameter or buffer."""
    path, _, attribute = names[0].rpartition(".")
    old = getattr(model.get_submodule(path), attribute)
    new = tensor.to(dtype=old.dtype, device="cpu" if old.is_meta else old.device)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for name in names:
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, new)


@contextmanager
def _entries(source: Source) -> Iterator[dict[str, _Entry]]:
    """The tensors of a checkpoint by the names that a dense state_dict has."""
    with ExitStack() as stack:
        if isinstance(source, Mapping):
            loads: dict[str, Callable[[], Tensor]] = {name: partial(source.__getitem__, name) for name in source}
        else:
            loads = _open(Path(source), stack)
        yield _group(loads)


def _open(path: Path, stack: ExitStack) -> dict[str, Callable[[], Tensor]]:
    """Opens the files of a checkpoint; the tensors are read when asked for."""
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError("reading checkpoints needs safetensors: pip install effk[safetensors]") from error
    loads: dict[str, Callable[[], Tensor]] = {}
    for file in _files(path):
        opened = stack.enter_context(safe_open(file, framework="pt"))
        for name in opened.keys():  # noqa: SIM118 (not a mapping)
            if name in loads:
                raise ValueError(f"{name} is in several files of {path}")
            loads[name] = partial(opened.get_tensor, name)
    return loads


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    index = path / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{path} has no .safetensors files")
        return files
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors files") from error
    if outside:
        raise ValueError(f"{index} names files outside of its folder: {outside}")
    return [path / name for name in names]


def _group(loads: dict[str, Callable[[], Tensor]]) -> dict[str, _Entry]:
    """Joins the four tensors of each compressed weight into one entry."""
    layers = {name.rpartition(".")[0] for name in loads if name.endswith((".compressed", ".bitmask", ".row_offsets"))}
    entries: dict[str, _Entry] = {}
    for name, load in loads.items():
        layer, _, part = name.rpartition(".")
        compressed = layer in layers and part in PARTS
        if compressed:
            name = layer if layer.endswith(".weight") else f"{layer}.weight"
            if lacking := [part for part in PARTS if f"{layer}.{part}" not in loads]:
                raise ValueError(f"the compressed weight {name} lacks {', '.join(lacking)} (not sparse-bitmask?)")
            if part != PARTS[0]:
                continue
            load = partial(_load_compressed, name, [loads[f"{layer}.{part}"] for part in PARTS])
        if name in entries:
            raise ValueError(f"the checkpoint has {name} twice, as dense and compressed or under two names")
        entries[name] = _Entry(load, compressed)
    return entries


def _load_compressed(name: str, parts: list[Callable[[], Tensor]]) -> Tensor:
    return decompress(*(load() for load in parts), name=name)


def decompress(shape: Tensor, compressed: Tensor, bitmask: Tensor, row_offsets: Tensor, *, name: str) -> Tensor:
    """The dense weight of the four tensors of sparse-bitmask.

    Args:
        shape: integers, the sizes of the weight.
        compressed: [nonzeros], float32, float16 or bfloat16.
        bitmask: [..., ceil(last size / 8)] uint8.
        row_offsets: integers, exclusive sums of the nonzeros in each row.
        name: of the weight, for errors.

    Raises:
        ValueError: they contradict each other, or the dtype isn't one of these.
    """

    def check(holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(f"the compressed weight {name} is corrupt: {message}")

    if compressed.dtype not in FLOATS:
        raise ValueError(
            f"the compressed weight {name} has dtype {compressed.dtype}; wanted float32, float16 or bfloat16 "
            "(quantized checkpoints are not supported)"
        )
    check(
        shape.dim() == 1 and shape.numel() > 0 and shape.dtype in (torch.int32, torch.int64),
        f"shape is {shape.dtype} {list(shape.shape)}; wanted a list of sizes",
    )
    size = shape.tolist()
    check(min(size) >= 0, f"shape holds {size}")
    wanted = [*size[:-1], (size[-1] + 7) // 8]
    check(
        bitmask.dtype == torch.uint8 and list(bitmask.shape) == wanted,
        f"bitmask is {bitmask.dtype} {list(bitmask.shape)}; wanted torch.uint8 {wanted}",
    )
    bits = (bitmask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=bitmask.device)).bitwise_and_(1)
    bits = bits.flatten(-2).bool()
    stored = bits[..., : size[-1]]
    check(not bits[..., size[-1] :].any(), "bitmask has ones after the end of a row")
    counts = stored.sum(-1)
    check(
        list(compressed.shape) == [int(counts.sum())],
        f"compressed has shape {list(compressed.shape)}; wanted the bitmask's [{int(counts.sum())}]",
    )
    check(
        not row_offsets.is_floating_point() and torch.equal(row_offsets.long(), counts.cumsum(0) - counts),
        "row_offsets disagrees with bitmask",
    )
    return compressed.new_zeros(size).masked_scatter_(stored, compressed)
