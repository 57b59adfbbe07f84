"""Codebooks of a layer's keys, and attention that looks keys up by them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from .._checks import check_range, check_tensor
from .._progress import progress_bar
from . import reference

log = logging.getLogger("effk")

FORMAT = "effk.vq.codebook"
VERSION = "1"
Self = TypeVar("Self", bound="Codebook")


class Codebook(nn.Module):
    """The words that stand for a layer's keys, a codebook for each key head (A²ATS, arXiv:2502.12665).

    A key is cut into `num_subspaces` parts, and each part is replaced by the number of the nearest of `num_codes`
    words: one part of 4096 words takes 12 bits a key, 16 parts of 16 words 64 bits. With `transformed`, keys are
    multiplied by a matrix L first, and queries by L^-T. Where L L^T is the second moment of the queries, near words are
    those that change q k^T little. All stays float32 whatever dtype the module is cast to. Built directly, all words
    are 0: make it by `fit` or `load`.

    Args:
        heads: key heads.
        head_dim: of a key.
        num_codes: words of a part, 1 to 32768.
        num_subspaces: parts, a divisor of head_dim.
        transformed: whether there are `chol` and `inv`.
        device: of all tensors.

    Attributes:
        words: [heads, num_subspaces, num_codes, head_dim / num_subspaces].
        chol, inv: L and L^-T, [heads, head_dim, head_dim], or None.

    Raises:
        ValueError: impossible sizes.
    """

    words: Tensor
    chol: Tensor | None
    inv: Tensor | None

    def __init__(
        self,
        heads: int,
        head_dim: int,
        num_codes: int = 4096,
        num_subspaces: int = 1,
        *,
        transformed: bool = False,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if heads < 1 or head_dim < 1:
            raise ValueError(f"heads is {heads} and head_dim {head_dim}; wanted 1 or more")
        if not 1 <= num_codes <= reference.MAX_WORDS:
            raise ValueError(f"num_codes is {num_codes}; wanted 1 to {reference.MAX_WORDS}")
        if num_subspaces < 1 or head_dim % num_subspaces:
            raise ValueError(f"num_subspaces is {num_subspaces}; wanted a divisor of head_dim, {head_dim}")
        shape = (heads, num_subspaces, num_codes, head_dim // num_subspaces)
        self.register_buffer("words", torch.zeros(shape, dtype=torch.float32, device=device))
        eye = torch.eye(head_dim, dtype=torch.float32, device=device).repeat(heads, 1, 1) if transformed else None
        self.register_buffer("chol", eye)
        self.register_buffer("inv", None if eye is None else eye.clone())

    @classmethod
    @torch.no_grad()
    def fit(
        cls: type[Self],
        keys: Tensor,
        queries: Tensor | None = None,
        *,
        num_codes: int = 4096,
        num_subspaces: int = 1,
        balance: bool = True,
        iters: int = 20,
        samples: int = 2**16,
        seed: int = 0,
        progress: bool = True,
    ) -> Self:
        """Finds words for keys, and for the queries that will meet them.

        Head by head, so that it can be interrupted. The same samples and seed give the same codebook.

        Args:
            keys: [heads, n, head_dim] float32, float16 or bfloat16, as they will be encoded.
            queries: [heads, any, head_dim], those of all query heads of a group together; without them the codebook is
                plain. They should be as they will be scored (with RoPE's constant rotation, where that is used).
            num_codes: words of a part.
            num_subspaces: parts of a key.
            balance: whether the space is turned first so that all parts vary alike, as optimized product quantization
                does it (Ge et al., 2013). Of one part it makes no difference.
            iters: of Lloyd's algorithm.
            samples: so many keys of a head are used at most, drawn at random.
            seed: of the draw and of k-means++.
            progress: shows a bar, where rich is installed and stderr is a terminal.

        Raises:
            ValueError: impossible sizes.
            RuntimeError: wrong dtypes or shapes, fewer keys than words; on a CPU also NaN or infinity in either.
        """
        if keys.dim() != 3:
            raise ValueError(f"keys has shape {list(keys.shape)}; wanted [heads, n, head_dim]")
        heads, n, head_dim = keys.shape
        if queries is not None and (queries.dim() != 3 or queries.shape[::2] != keys.shape[::2]):
            raise ValueError(f"queries has shape {list(queries.shape)}; wanted [{heads}, any, {head_dim}]")
        book = cls(heads, head_dim, num_codes, num_subspaces, device=keys.device)
        if n > samples:
            drawn = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:samples]
            keys = keys[:, drawn.to(keys.device)]
        reference.check_finite("vq_train", "keys", keys)
        if queries is not None:
            book.chol, book.inv = torch.ops.effk.vq_metric(queries)
        if balance and num_subspaces > 1:
            turn = balancing(keys, book.chol, num_subspaces)
            # (L Q)^-T is L^-T Q.
            book.chol, book.inv = (turn if t is None else t @ turn for t in (book.chol, book.inv))
        with progress_bar("Training codebooks", heads, progress) as advance:
            for h in range(heads):
                chol = None if book.chol is None else book.chol[h : h + 1]
                book.words[h : h + 1] = torch.ops.effk.vq_train(
                    keys[h : h + 1], num_codes, chol, num_subspaces=num_subspaces, iters=iters, seed=seed
                )
                log.debug("vq: codebook of head %d of %d", h + 1, heads)
                advance()
        log.info("vq: %d codebooks of %d x %d words, %d bits a key", heads, num_subspaces, num_codes, book.bits)
        return book

    @property
    def heads(self) -> int:
        return self.words.shape[0]

    @property
    def num_subspaces(self) -> int:
        return self.words.shape[1]

    @property
    def num_codes(self) -> int:
        return self.words.shape[2]

    @property
    def head_dim(self) -> int:
        return self.words.shape[1] * self.words.shape[3]

    @property
    def packed(self) -> bool:
        """Whether two codes share a byte."""
        return self.num_codes <= 16 and self.num_subspaces % 2 == 0

    @property
    def bits(self) -> int:
        """Of information in a key's codes."""
        return self.num_subspaces * (self.num_codes - 1).bit_length()

    def encode(self, keys: Tensor) -> Tensor:
        """[B, heads, S, head_dim] -> codes, as `effk.vq.encode` makes them, packed where they can be."""
        return torch.ops.effk.vq_encode(keys, self.words, self.chol, pack=self.packed)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes -> the keys that they stand for, [B, heads, S, head_dim] float32.

        Raises:
            RuntimeError: not codes of such a codebook; on a CPU also codes out of range. On a GPU these are clamped.
        """
        dtype = torch.uint8 if self.num_codes <= 256 else torch.int16
        last = self.num_subspaces // 2 if self.packed else self.num_subspaces
        check_tensor("Codebook.decode", "codes", codes, (dtype,), (None, self.heads, None, last))
        number = reference.unpack(codes, self.packed)  # [B, heads, S, m]
        if codes.device.type == "cpu":
            check_range("Codebook.decode", "codes", number, 0, self.num_codes - 1)
        number = number.clamp(0, self.num_codes - 1)
        batch, heads, keys, _ = number.shape
        at = number.transpose(2, 3)[..., None].expand(-1, -1, -1, -1, self.words.shape[3])
        parts = self.words[None].expand(batch, -1, -1, -1, -1).gather(3, at)  # [B, heads, m, S, D / m]
        found = parts.transpose(2, 3).reshape(batch, heads, keys, -1)
        return found if self.inv is None else found @ self.inv.mT

    def lut(self, q: Tensor) -> Tensor:
        """[B, H, head_dim] -> dot products with all words, [B, H, num_subspaces, num_codes]."""
        return torch.ops.effk.vq_lut(q, self.words, self.inv)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file.

        Raises:
            ImportError: safetensors isn't installed.
            OSError: the file can't be written.
        """
        from safetensors.torch import save_file

        tensors = {name: t.detach().cpu().contiguous() for name, t in self.named_buffers()}
        save_file(tensors, os.fspath(path), {"format": FORMAT, "version": VERSION})

    @classmethod
    def load(cls: type[Self], path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Self:
        """Reads what `save` wrote. Files are untrusted: what doesn't fit together is refused.

        Raises:
            ValueError: not such a file, or damaged.
            ImportError: safetensors isn't installed.
            OSError: the file can't be read.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(os.fspath(path), framework="pt", device=str(device)) as file:
                meta = file.metadata() or {}
                if meta.get("format") != FORMAT or meta.get("version") != VERSION:
                    raise ValueError(f"{path} isn't a codebook of effk: its metadata are {json.dumps(meta)[:200]}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} can't be read: {error}") from error
        names = set(tensors)
        if names not in ({"words"}, {"words", "chol", "inv"}):
            raise ValueError(f"{path} has tensors {str(sorted(names))[:200]}; wanted words, and maybe chol and inv")
        words = tensors["words"]
        if words.dim() != 4:
            raise ValueError(f"{path}: words has shape {list(words.shape)}; wanted [heads, m, C, d]")
        heads, subspaces, codes, width = words.shape
        try:
            book = cls(heads, subspaces * width, codes, subspaces, transformed="chol" in tensors, device="meta")
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(f"{path}: {error}") from error
        for name, t in tensors.items():
            wanted = getattr(book, name)
            if t.dtype != torch.float32 or t.shape != wanted.shape:
                raise ValueError(
                    f"{path}: {name} is {t.dtype} {list(t.shape)}; wanted {wanted.dtype} {list(wanted.shape)}"
                )
            setattr(book, name, t)
        return book

    def extra_repr(self) -> str:
        return (
            f"heads={self.heads}, head_dim={self.head_dim}, num_codes={self.num_codes}, "
            f"num_subspaces={self.num_subspaces}, transformed={self.chol is not None}, bits={self.bits}"
        )

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves, and doesn't cast."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, t in before.items():
            after = getattr(self, name)
            if after.dtype != t.dtype:
                setattr(self, name, t.to(after.device))
        return self


def balancing(keys: Tensor, chol: Tensor | None, num_subspaces: int) -> Tensor:
    """Rotations Q [heads, D, D]: the parts of (k L) Q have about the same product of variances, along its axes.

    Axes of the largest variance go first, each to the part that has least so far.
    """
    turns = []
    for h in range(len(keys)):
        x = keys[h].double() if chol is None else keys[h].double() @ chol[h].double()
        x = x - x.mean(0)
        variances, axes = torch.linalg.eigh(x.mT @ x)
        logs = variances.clamp(min=max(variances[-1].item() * 1e-12, 1e-300)).log()
        room = len(logs) // num_subspaces
        parts: list[list[int]] = [[] for _ in range(num_subspaces)]
        sizes = [0.0] * num_subspaces
        for i in reversed(range(len(logs))):
            part = min((p for p in range(num_subspaces) if len(parts[p]) < room), key=lambda p: sizes[p])
            parts[part].append(i)
            sizes[part] += (logs[i] - logs[0]).item()
        turns.append(axes[:, [i for part in parts for i in part]].float())
    return torch.stack(turns)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codes: Tensor,
    codebook: Codebook,
    top: int,
    *,
    lens: Tensor | None = None,
    sink: int = 8,
    window: int = 64,
    union_group: bool = True,
    table: str = "float32",
    scale: float | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Exact attention of one query token to the keys whose codes promise the highest scores.

    `vq_lut`, `vq_topk` and `vq_attend` after each other; works under torch.compile(fullgraph=True).

    Args:
        q: [B, H, D], float32, float16 or bfloat16.
        k: [B, HK, S, D], v: [B, HK, S, Dv], of q's dtype: for the attention itself, so with RoPE where there is one.
        codes: [B, HK, at least all that lens allows, ...], what `codebook.encode` made of the keys.
        codebook: of HK heads.
        top: keys taken for each query head, beside the first `sink` and the last `window`.
        lens: [B] int32 or int64, the keys that there are; all by default.
        union_group: whether the query heads of a group attend to what any of them took.
        table: "float32", or "int8" for tables of 8 bits.
        scale: of scores; D^-0.5 by default.
        rotation: cos and sin [D / 2], applied to the query by `vq_wrope` for the look-up alone.

    Returns:
        [B, H, Dv] of q's dtype.

    Raises:
        RuntimeError: wrong dtypes or shapes; on a CPU also lens or codes out of range.
    """
    looked_up = q if rotation is None else torch.ops.effk.vq_wrope(q, *rotation)
    idx, count = torch.ops.effk.vq_topk(
        codebook.lut(looked_up), codes, top, lens, sink=sink, window=window, union_group=union_group, table=table
    )
    return torch.ops.effk.vq_attend(q, k, v, idx, count, scale=scale)[0]
