"""A key-value cache for transformers' models whose decoding attends to retrieved keys.

transformers looks up how attention is computed in a registry, by a name in the model's configuration. effk registers
one more way: for a query of one token whose keys come from a `QuantizedKeyCache` it retrieves, and for all else it is
transformers' own "sdpa". Nothing in the model is exchanged.

A cache gets keys after RoPE. As RoPE only rotates, the keys before it, which codes are made of, are had by turning them
back; and the query of the look-up is turned from its own position to the constant one of WRoPE in one step.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import FLOATS
from .._progress import progress_bar
from . import reference
from .codebook import Codebook, decode_attention

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.cache_utils import Cache, DynamicLayer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise ImportError(
        "QuantizedKeyCache needs transformers, version 5 or newer: pip install 'transformers>=5'"
    ) from error

log = logging.getLogger("effk")

NAME = "effk_vq"
UNSUPPORTED = ("softcap", "s_aux", "sliding_window", "position_bias")  # of attention functions' arguments
ROOM = 256  # keys that a cache has room for beyond a tenth of those in it


# --- RoPE ------------------------------------------------------------------------------------------------------------


class Rope:
    """A model's rotary embedding, for any position.

    Attributes:
        frequencies: [D / 2] float32.
    """

    def __init__(self, frequencies: Tensor):
        self.frequencies = frequencies.detach().float()

    def angles(self, positions: Tensor) -> Tensor:
        """[n, D / 2] in float64, of positions rounded as models do."""
        return (positions[:, None].float() * self.frequencies).double()

    def turned(self, x: Tensor, positions: Tensor, to: int) -> Tensor:
        """x [..., n, D] at these positions, turned to the position `to`; in float32."""
        first = self.angles(torch.tensor([to], device=x.device))
        angle = first - self.angles(positions)
        cos, sin = angle.cos().float(), angle.sin().float()
        a, b = x.float().chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def rotation(self, position: int, to: int) -> tuple[Tensor, Tensor]:
        """cos and sin [D / 2] that turn one token."""
        at = self.angles(torch.tensor([to, position], device=self.frequencies.device))
        return (at[0] - at[1]).cos().float(), (at[0] - at[1]).sin().float()


def attention_layers(model: PreTrainedModel) -> tuple[list[nn.Module], Rope]:
    """The attention modules in order and the rotary embedding of a model that a `QuantizedKeyCache` can serve.

    Raises:
        ValueError: says why it can't.
    """
    kind = type(model).__name__
    config = model.config.get_text_config(decoder=True)

    def refuse(reason: str) -> ValueError:
        return ValueError(f"{kind} can't decode with quantized keys: {reason}")

    if getattr(config, "is_encoder_decoder", False):
        raise refuse("it has an encoder")
    types = getattr(config, "layer_types", None) or ()
    if set(types) - {"full_attention"}:
        raise refuse(f"its layers are of types {sorted(set(types))}; wanted full attention in all")
    found: dict[Any, nn.Module] = {
        m.layer_idx: m
        for m in model.modules()
        if all(hasattr(m, name) for name in ("layer_idx", "num_key_value_groups", "scaling"))
    }
    if not found or sorted(found) != list(range(config.num_hidden_layers)):
        raise refuse(f"{len(found)} of its {config.num_hidden_layers} layers have attention of the usual structure")
    layers = [found[i] for i in range(len(found))]
    if not types and getattr(config, "sliding_window", None) is not None:
        raise refuse("its attention has a sliding window")
    if any(getattr(layer, "sinks", None) is not None for layer in layers):
        raise refuse("its attention has learned sinks")
    rotary = next((m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")), None)
    rope_type = getattr(rotary, "rope_type", None)
    if rotary is None or not isinstance(rope_type, str) or not isinstance(rotary.inv_freq, Tensor):
        raise refuse("it has no rotary embedding that all layers share")
    if "dynamic" in rope_type or rope_type == "longrope":
        raise refuse(f"frequencies of its rotary embedding ({rope_type}) change with the length")
    rope = Rope(rotary.inv_freq)
    apply = getattr(sys.modules[type(layers[0]).__module__], "apply_rotary_pos_emb", None)
    if apply is None or not _is_half_split(rotary, apply, rope, int(layers[0].head_dim)):  # type: ignore[arg-type]
        raise refuse("its rotary embedding doesn't turn the two halves of whole heads")
    return layers, rope


def _is_half_split(rotary: nn.Module, apply: Any, rope: Rope, dim: int) -> bool:
    """Tries it out."""
    if 2 * len(rope.frequencies) != dim:
        return False
    device = rope.frequencies.device
    if device.type == "meta":
        return True
    positions = torch.tensor([0, 3, 50], device=device)
    x = torch.arange(1.0, 3 * dim + 1, device=device).view(1, 1, 3, dim) / dim
    with torch.no_grad():
        turned, _ = apply(x, x, *rotary(x, positions[None]))
    want = x * getattr(rotary, "attention_scaling", 1.0)
    return torch.allclose(rope.turned(turned, positions, 0), want, rtol=1e-3, atol=1e-3)


# --- Attention -------------------------------------------------------------------------------------------------------


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: retrieves for one query token with a `QuantizedKeyCache`, and else is "sdpa".

    Raises:
        ValueError: the batch has padding, or the model asks for something that retrieval can't do.
    """
    layer = getattr(key, "_effk_layer", lambda: None)()
    if layer is not None:
        layer.see(query)
        if query.shape[2] == 1 and isinstance(layer, QuantizedKeyLayer):
            if attention_mask is not None:
                raise ValueError(
                    "QuantizedKeyCache got an attention mask for a decoded token: sequences of a batch must be of one "
                    "length, without padding"
                )
            if asked := [name for name in UNSUPPORTED if kwargs.get(name) is not None]:
                raise ValueError(f"QuantizedKeyCache can't do attention with {', '.join(asked)}")
            return layer.retrieve(query[:, :, 0], scaling)[:, None], None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


class QuantizedKeyLayer(DynamicLayer):
    """A layer's keys, values and codes, in memory that grows by a tenth at a time."""

    is_compileable = False

    def __init__(self, codebook: Codebook, rope: Rope, options: Options):
        super().__init__()
        self.codebook, self.rope, self.options = codebook, rope, options
        self.retrieved = 0  # tokens
        self._forget()

    def _forget(self) -> None:
        self._memory: dict[str, Tensor] = {}
        self._length = 0
        self._lens: Tensor | None = None

    def get_seq_length(self) -> int:
        return self._length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        if self.dtype not in FLOATS:
            raise ValueError(f"keys are {self.dtype}; wanted {', '.join(map(str, FLOATS))}")
        self.codebook.to(self.device)
        self.rope.frequencies = self.rope.frequencies.to(self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self._length
        end = begin + key_states.shape[2]
        positions = torch.arange(begin, end, device=self.device)
        codes = self.codebook.encode(self.rope.turned(key_states, positions, 0))
        added = {"keys": key_states.detach(), "values": value_states.detach(), "codes": codes}
        for name, t in added.items():
            memory = self._memory.get(name)
            if memory is not None and memory.shape[0] != t.shape[0]:
                raise ValueError(f"QuantizedKeyCache holds a batch of {memory.shape[0]} and got one of {t.shape[0]}")
            if memory is None or memory.shape[2] < end:
                grown = t.new_zeros((t.shape[0], t.shape[1], end + end // 10 + ROOM, t.shape[3]))
                if memory is not None:
                    grown[:, :, :begin] = memory[:, :, :begin]
                self._memory[name] = memory = grown
            memory[:, :, begin:end] = t
        return self._show(end)

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        """Lets `keys` and `values` be the first so many."""
        self.keys = keys = self._memory["keys"][:, :, :length]
        self.values = values = self._memory["values"][:, :, :length]
        # So that attention finds the codes. Weak: a cycle would keep the memory after the cache.
        keys._effk_layer = weakref.ref(self)  # type: ignore[attr-defined]
        self._length = length
        self._lens = torch.full((keys.shape[0],), length, device=self.device)
        return keys, values

    def see(self, query: Tensor) -> None:
        """Called with the query [B, H, n, D] of each pass."""

    def retrieve(self, q: Tensor, scale: float | None) -> Tensor:
        """Attention of the last token's q [B, H, D]: [B, H, Dv]."""
        options, length = self.options, self._length
        assert self.keys is not None and self.values is not None
        self.retrieved += 1
        return decode_attention(
            q,
            self.keys,
            self.values,
            self._memory["codes"],
            self.codebook,
            options.top(length),
            lens=self._lens,
            sink=options.sink,
            window=options.window,
            union_group=options.union_group,
            table=options.table,
            scale=scale,
            rotation=self.rope.rotation(length - 1, options.far),
        )

    def _rearrange(self, change: Any) -> None:
        if self._memory:
            self._memory = {name: change(t) for name, t in self._memory.items()}
            self._show(self._length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rearrange(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rearrange(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rearrange(lambda t: t[indices])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop got {tokens_to_remove}; wanted minus the number of tokens to remove")
        if self._memory:
            self._show(max(0, self._length + tokens_to_remove))

    def reset(self) -> None:
        super().reset()
        self._forget()

    def offload(self) -> None:
        raise NotImplementedError("QuantizedKeyCache can't be offloaded")


class Options:
    """How keys are retrieved."""

    def __init__(self, budget: float, sink: int, window: int, far: int, union_group: bool, table: str):
        share = isinstance(budget, float)
        if isinstance(budget, bool) or not (0 <= budget <= 1 if share else budget >= 0):
            raise ValueError(f"budget is {budget}; wanted a share from 0.0 to 1.0, or a whole number of keys")
        for name, value in (("sink", sink), ("window", window), ("far", far)):
            if value < 0:
                raise ValueError(f"{name} is {value}; wanted 0 or more")
        if table not in reference.TABLES:
            raise ValueError(f"table is {table!r}; wanted one of {', '.join(reference.TABLES)}")
        self.budget, self.sink, self.window, self.far = budget, sink, window, far
        self.union_group, self.table = union_group, table

    def top(self, length: int) -> int:
        return math.ceil(self.budget * length) if isinstance(self.budget, float) else self.budget


class QuantizedKeyCache(Cache):
    """A cache for a transformers model: each decoded token attends exactly to a few keys, found by their codes.

    Prompts are computed by ordinary attention. For a single token, each query head takes the keys whose codes promise
    the highest scores, as if all keys far away were at the same distance (WRoPE, A²ATS, arXiv:2502.12665); then
    ordinary attention, with ordinary RoPE on query and keys, goes over those, the first `sink` and the last `window`.
    Keys and values stay as they are, at full precision.

    Making one switches the model's attention to effk's ("effk_vq"), which is "sdpa" for everything but such caches;
    `model.set_attn_implementation("sdpa")` takes it back.

    Args:
        model: Llama, Mistral, Qwen2, Qwen3 or another one with full attention in all layers and RoPE over the halves of
            whole heads.
        codebooks: one of each layer, as `fit_codebooks` makes them. They are moved to the keys' device.
        budget: keys that each query head takes: a share (float) of those in the cache, or a number (int).
        sink, window: keys at the beginning and at the end that are always taken.
        far: the distance that look-ups assume. As in the samples that codebooks were made of.
        union_group: whether the query heads of a group attend to what any of them took.
        table: "float32", or "int8" for look-ups in tables of 8 bits.

    Raises:
        ValueError: the model isn't of that kind, codebooks don't fit, or options are out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        codebooks: Sequence[Codebook],
        *,
        budget: float = 0.03,
        sink: int = 8,
        window: int = 64,
        far: int = 2048,
        union_group: bool = True,
        table: str = "float32",
    ):
        options = Options(budget, sink, window, far, union_group, table)
        modules, rope = attention_layers(model)
        heads = model.config.get_text_config(decoder=True).num_key_value_heads
        if len(codebooks) != len(modules):
            raise ValueError(f"there are {len(codebooks)} codebooks; wanted one for each of {len(modules)} layers")
        for i, (book, module) in enumerate(zip(codebooks, modules, strict=True)):
            if (book.heads, book.head_dim) != (heads, module.head_dim):
                raise ValueError(
                    f"the codebook of layer {i} is for {book.heads} heads of size {book.head_dim}; wanted {heads} of "
                    f"{module.head_dim}"
                )
        switch(model)
        super().__init__(layers=[QuantizedKeyLayer(book, Rope(rope.frequencies), options) for book in codebooks])

    @property
    def retrieved(self) -> int:
        """Tokens whose attention was retrieved, summed over layers."""
        return sum(layer.retrieved for layer in self.layers if isinstance(layer, QuantizedKeyLayer))


def switch(model: PreTrainedModel) -> None:
    """Lets effk's function compute the model's attention."""
    if model.config.get_text_config(decoder=True)._attn_implementation != NAME:
        model.set_attn_implementation(NAME)
        if model.config.get_text_config(decoder=True)._attn_implementation != NAME:
            raise ValueError(
                f"{type(model).__name__} can't decode with quantized keys: its attention can't be switched"
            )


# --- Codebooks of a model --------------------------------------------------------------------------------------------


class SampleLayer(DynamicLayer):
    """Keeps nothing but a sample of keys before RoPE and of queries at the distance `far`."""

    def __init__(self, rope: Rope, far: int, keep: int, generator: torch.Generator):
        super().__init__()
        self.rope, self.far, self.keep, self.generator = rope, far, keep, generator
        self.drawn_keys: list[Tensor] = []
        self.drawn_queries: list[Tensor] = []

    def _draw(self, x: Tensor, keep: int, to: int) -> Tensor:
        """[heads, up to keep, D] of x [B, heads, n, D], turned from its positions."""
        batch, _, n, _ = x.shape
        order = torch.randperm(batch * n, generator=self.generator)[:keep].to(x.device)
        flat = x.transpose(0, 1).flatten(1, 2)[:, order]
        return self.rope.turned(flat, order % n, to).to(x.dtype)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.heads = key_states.shape[1]
        self.drawn_keys.append(self._draw(key_states, self.keep, 0))
        keys = key_states.view(key_states.shape)
        keys._effk_layer = weakref.ref(self)  # type: ignore[attr-defined]
        return keys, value_states

    def see(self, query: Tensor) -> None:
        group = query.shape[1] // self.heads
        drawn = self._draw(query, max(1, self.keep // group), self.far)  # [H, n, D]
        self.drawn_queries.append(drawn.unflatten(0, (self.heads, group)).flatten(1, 2))

    def get_seq_length(self) -> int:
        return 0


def note_or_compare(folder: Path, how: dict[str, Any]) -> None:
    """Notes in a folder how its codebooks are made; of another way it raises."""
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "fit.json"
    if not note.exists():
        part = note.with_suffix(".part")
        part.write_text(json.dumps(how))
        part.replace(note)
    try:
        noted = json.loads(note.read_text())
    except ValueError as error:
        raise ValueError(f"{note} is damaged: {error}") from error
    if noted != how:
        raise ValueError(f"{folder} has codebooks made with {str(noted)[:400]}; wanted {how}")


def fit_codebooks(
    model: PreTrainedModel,
    inputs: Sequence[Tensor],
    *,
    num_codes: int = 4096,
    num_subspaces: int = 1,
    query_aware: bool = True,
    far: int = 2048,
    samples: int = 2**15,
    iters: int = 20,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> list[Codebook]:
    """Codebooks for all layers of a model, from what its attention sees in some texts.

    Args:
        model: of the kind that `QuantizedKeyCache` can serve. Its attention is switched, as there.
        inputs: token ids, each [B, n] without padding.
        num_codes, num_subspaces, iters, seed: see `Codebook.fit`.
        query_aware: whether codebooks are made for the queries, too.
        far: see `QuantizedKeyCache`.
        samples: keys of a head that are kept, and about as many queries of a group: they take memory for all layers.
        folder: where each layer's codebook is saved as soon as it is there. Those that are there already are read, so
            that an interrupted call goes on where it was.
        progress: shows bars, where rich is installed and stderr is a terminal.

    Raises:
        ValueError: the model isn't of that kind, there are no inputs, or a file in the folder is no such codebook or
            made in another way.
        RuntimeError: fewer keys than words, and what the model raises.
    """
    modules, rope = attention_layers(model)
    if not inputs:
        raise ValueError("there are no inputs")
    paths = [None if folder is None else Path(folder) / f"layer_{i:03}.safetensors" for i in range(len(modules))]
    if folder is not None:
        how = {"layers": len(modules), "parameters": sum(p.numel() for p in model.parameters())}
        how |= {"num_codes": num_codes, "num_subspaces": num_subspaces, "query_aware": query_aware, "far": far}
        note_or_compare(Path(folder), how | {"samples": samples, "iters": iters, "seed": seed})
    if all(path is not None and path.exists() for path in paths):
        return [Codebook.load(path) for path in paths if path is not None]
    switch(model)
    keep = -(-samples // len(inputs))
    generator = torch.Generator().manual_seed(seed)
    layers = [SampleLayer(rope, far, keep, generator) for _ in modules]
    device = next(model.parameters()).device
    rope.frequencies = rope.frequencies.to(device)
    with torch.no_grad(), progress_bar("Sampling keys", len(inputs), progress) as advance:
        for ids in inputs:
            model(input_ids=ids.to(device), past_key_values=Cache(layers=list(layers)), use_cache=True)
            advance()
    books = []
    with torch.no_grad(), progress_bar("Training codebooks", len(layers), progress) as advance:
        for path, layer in zip(paths, layers, strict=True):
            if path is not None and path.exists():
                book = Codebook.load(path)
            else:
                book = Codebook.fit(
                    torch.cat(layer.drawn_keys, 1),
                    torch.cat(layer.drawn_queries, 1) if query_aware else None,
                    num_codes=num_codes,
                    num_subspaces=num_subspaces,
                    iters=iters,
                    samples=samples,
                    seed=seed,
                    progress=False,
                )
                if path is not None:
                    part = path.with_suffix(".part")
                    book.save(part)
                    part.replace(path)
            books.append(book)
            layer.drawn_keys, layer.drawn_queries = [], []
            advance()
    log.info("vq: codebooks of %d layers, %d bits a key", len(books), books[0].bits)
    return books
