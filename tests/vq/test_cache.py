"""QuantizedKeyCache in transformers' models: what it retrieves, that attention to it is exact, and what it refuses."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import effk
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5")

import transformers
from effk.vq import Codebook, QuantizedKeyCache, decode_attention, fit_codebooks
from effk.vq.cache import Options, QuantizedKeyLayer, Rope

from ..kit import tensors
from ..kit.tensors import same_bits

HEADS, KEY_HEADS, DIM, VOCABULARY = 6, 2, 16, 64
UNIT = 2.0**-24
ALL = 1.0  # the whole budget


def model_of(dtype: torch.dtype = torch.float32, kind: str = "Llama", **options: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": HEADS * DIM,
            "head_dim": DIM,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KEY_HEADS,
            "max_position_embeddings": 1024,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            **options,
        }
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval().requires_grad_(False)


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=tensors.generator(seed))


def fitted(model: Any, **options: Any) -> list[Codebook]:
    chosen = {"num_codes": 16, "num_subspaces": 4, "iters": 3, "samples": 500, "far": 300, "progress": False}
    return fit_codebooks(model, [ids(1, 200, seed=1), ids(2, 100, seed=2)], **{**chosen, **options})


@pytest.fixture(scope="module")
def model() -> Any:
    return model_of()


@pytest.fixture(scope="module")
def books(model: Any) -> list[Codebook]:
    return fitted(model)


def decoded(model: Any, cache: Any, tokens: Tensor, prompt: int) -> Tensor:
    """Logits of the prompt's last token and of each token after it, one at a time."""
    out = [model(input_ids=tokens[:, :prompt], past_key_values=cache).logits[:, -1]]
    for token in tokens[:, prompt:].split(1, 1):
        out.append(model(input_ids=token, past_key_values=cache).logits[:, -1])
    return torch.stack(out, 1)


def distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).norm().item()


# --- At full budget --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen3"])
def test_all_keys_are_dense_attention(kind: str, dtype: torch.dtype) -> None:
    """As near to float64 as transformers' own attention is; some of either distance is chance."""
    model = model_of(dtype, kind, **({"sliding_window": None} if kind == "Mistral" else {}))
    books, tokens = fitted(model), ids(2, 60)
    cache = QuantizedKeyCache(model, books, budget=ALL, sink=0, window=0)
    have = decoded(model, cache, tokens, 40)
    assert cache.retrieved == 2 * 20 and cache.get_seq_length() == 60
    model.set_attn_implementation("sdpa")
    want = decoded(model, transformers.DynamicCache(config=model.config), tokens, 40)
    exact = copy.deepcopy(model).double()(input_ids=tokens).logits[:, 39:]
    assert 0 < distance(have, exact) <= 2 * distance(want, exact)


def test_the_prompt_is_ordinary_attention(model: Any, books: list[Codebook]) -> None:
    tokens = ids(2, 50)
    want = model(input_ids=tokens).logits
    cache = QuantizedKeyCache(model, books, budget=0)
    assert same_bits(model(input_ids=tokens, past_key_values=cache).logits, want) and cache.retrieved == 0
    cache.reset()
    parts = [model(input_ids=part, past_key_values=cache).logits for part in tokens.split(30, 1)]
    assert torch.allclose(torch.cat(parts, 1), want, atol=1e-5)


def test_a_window_over_all_keys_is_dense(model: Any, books: list[Codebook]) -> None:
    tokens = ids(1, 40)
    caches = [QuantizedKeyCache(model, books, budget=b, window=w) for b, w in ((0, 50), (ALL, 3))]
    assert same_bits(*(decoded(model, cache, tokens, 20) for cache in caches))


def test_generate(model: Any, books: list[Codebook]) -> None:
    cache = QuantizedKeyCache(model, books, budget=ALL)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    given = {"input_ids": ids(2, 30), "attention_mask": torch.ones(2, 30, dtype=torch.int64)}
    have = model.generate(**given, past_key_values=cache, **options)
    model.set_attn_implementation("sdpa")
    assert torch.equal(have, model.generate(**given, **options)) and cache.retrieved > 0


# --- What is retrieved -----------------------------------------------------------------------------------------------


def rotated(x: Tensor, position: Tensor, frequencies: Tensor) -> Tensor:
    """RoPE in float64."""
    angle = position[:, None].double() * frequencies.double()
    a, b = x.double().chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def test_retrieval_assumes_one_distance_and_attention_doesnt() -> None:
    """Each key is a word of its own, so that the look-up is exact: its choice is by (R_far q) k of keys before RoPE.

    The result is attention over the chosen keys with ordinary RoPE.
    """
    keys, top, far, sink, window = 120, 9, 300, 2, 5
    frequencies = 10000.0 ** (-torch.arange(DIM // 2) / (DIM // 2))
    k, v = (tensors.values((1, KEY_HEADS, keys, DIM), torch.float32, "normal", seed) for seed in (1, 2))
    q = tensors.values((1, HEADS, 1, DIM), torch.float32, "normal", 3)
    book = Codebook(KEY_HEADS, DIM, keys)
    book.words[:, 0] = k[0]
    positions = torch.arange(keys)
    after = rotated(k, positions, frequencies), rotated(q, positions[-1:], frequencies)
    layer = QuantizedKeyLayer(book, Rope(frequencies), Options(top, sink, window, far, False, "float32"))
    for some in positions.split(50):
        layer.update(after[0][:, :, some].float(), v[:, :, some])
    have = layer.retrieve(after[1][:, :, 0].float(), DIM**-0.5)

    looked_up = rotated(q, torch.tensor([far]), frequencies)[0, :, 0]
    ordinary = set()
    for h in range(HEADS):
        middle = slice(sink, keys - window)
        by = (k[0, h // 3].double() @ looked_up[h])[middle]
        chosen = torch.cat([by.topk(top).indices + sink, positions[:sink], positions[-window:]])
        scores = after[0][0, h // 3] @ after[1][0, h, 0] * DIM**-0.5
        want = scores[chosen].softmax(0) @ v[0, h // 3, chosen].double()
        assert (have[0, h] - want).abs().max() <= 64 * (DIM + len(chosen)) * UNIT * v.abs().max()
        ordinary.add(set(scores[middle].topk(top).indices.tolist()) == set(by.topk(top).indices.tolist()))
    assert ordinary == {False} or ordinary == {False, True}  # far isn't everywhere the same as near


def test_budgets(model: Any, books: list[Codebook]) -> None:
    """Fewer keys, a larger error; and a share is of the keys that there are."""
    tokens = ids(1, 260)
    exact = decoded(model, QuantizedKeyCache(model, books, budget=ALL), tokens, 250)
    errors = []
    for budget in (2, 0.1, 0.9):
        cache = QuantizedKeyCache(model, books, budget=budget, sink=1, window=4, union_group=False)
        errors.append(distance(decoded(model, cache, tokens, 250), exact))
    assert errors[0] > errors[1] > errors[2] > 0
    assert [Options(b, 0, 0, 0, True, "int8").top(100) for b in (0.03, 1.0, 0.001, 7, 0)] == [3, 100, 1, 7, 0]


def test_options_reach_the_look_up(model: Any, books: list[Codebook], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        asked.append((args[5], kwargs))
        return decode_attention(*args, **kwargs)

    monkeypatch.setattr(effk.vq.cache, "decode_attention", spy)
    options = {"sink": 3, "window": 5, "union_group": False, "table": "int8"}
    decoded(model, QuantizedKeyCache(model, books, budget=7, **options), ids(1, 60), 55)
    assert asked and all(top == 7 and kwargs.items() >= options.items() for top, kwargs in asked)


def test_memory_goes_with_the_cache(model: Any, books: list[Codebook]) -> None:
    """At once, not when Python looks for cycles."""
    cache = QuantizedKeyCache(model, books, budget=7)
    decoded(model, cache, ids(1, 60), 55)
    left = weakref.ref(cache.layers[0])
    gc.collect()
    gc.disable()
    try:
        del cache
        assert left() is None
    finally:
        gc.enable()


def test_another_batch_is_refused(model: Any, books: list[Codebook]) -> None:
    cache = QuantizedKeyCache(model, books, budget=7)
    decoded(model, cache, ids(2, 60), 55)
    with pytest.raises(ValueError, match="a batch of 2 and got one of 1"):
        model(input_ids=ids(1, 1), past_key_values=cache)


# --- The cache's own duties ------------------------------------------------------------------------------------------


def filled(model: Any, books: list[Codebook], tokens: Tensor) -> QuantizedKeyCache:
    cache = QuantizedKeyCache(model, books, budget=0.2, sink=1, window=4)
    model(input_ids=tokens, past_key_values=cache)
    return cache


def next_logits(model: Any, cache: QuantizedKeyCache, rows: int = 1) -> Tensor:
    return model(input_ids=torch.full((rows, 1), 5), past_key_values=cache).logits


def test_batches_are_rearranged(model: Any, books: list[Codebook]) -> None:
    tokens = ids(3, 80)
    order = torch.tensor([2, 0])
    want = next_logits(model, filled(model, books, tokens[order]), 2)
    for change in ("reorder_cache", "batch_select_indices"):
        cache = filled(model, books, tokens)
        getattr(cache, change)(order)
        assert torch.allclose(next_logits(model, cache, 2), want, atol=1e-6)
    cache = filled(model, books, tokens[:1])
    cache.batch_repeat_interleave(2)
    repeated = next_logits(model, cache, 2)
    assert torch.allclose(repeated, next_logits(model, filled(model, books, tokens[:1])).expand(2, -1, -1), atol=1e-6)


def test_crop_and_reset(model: Any, books: list[Codebook]) -> None:
    tokens = ids(1, 80)
    want = next_logits(model, filled(model, books, tokens[:, :60]))
    cache = filled(model, books, tokens)
    cache.crop(-20)
    assert cache.get_seq_length() == 60 and torch.allclose(next_logits(model, cache), want, atol=1e-6)
    cache.reset()
    assert cache.get_seq_length() == 0
    model(input_ids=tokens[:, :60], past_key_values=cache)
    assert torch.allclose(next_logits(model, cache), want, atol=1e-6)
    with pytest.raises(ValueError, match="crop got 5"):
        cache.crop(5)


def test_memory_grows(monkeypatch, model: Any, books: list[Codebook]) -> None:
    tokens = ids(1, 60)
    want = decoded(model, QuantizedKeyCache(model, books, budget=3), tokens, 20)
    monkeypatch.setattr("effk.vq.cache.ROOM", 1)
    assert torch.equal(decoded(model, QuantizedKeyCache(model, books, budget=3), tokens, 20), want)


# --- Codebooks of a model --------------------------------------------------------------------------------------------


def test_samples_are_keys_before_rope(model: Any) -> None:
    """A text of one token, again and again: before RoPE all its keys in the first layer are the same."""
    (first, _) = fit_codebooks(
        model, [torch.full((1, 50), 3)], num_codes=1, query_aware=False, iters=1, samples=50, progress=False
    )
    attention = model.model.layers[0]
    hidden = attention.input_layernorm(model.model.embed_tokens(torch.tensor([3])))
    key = attention.self_attn.k_proj(hidden).view(KEY_HEADS, DIM)
    assert torch.allclose(first.words[:, 0, 0], key, atol=1e-4)


def test_fitting_goes_on_where_it_was(tmp_path: Path, model: Any, books: list[Codebook], monkeypatch) -> None:
    fit, calls = Codebook.fit, []

    def interrupted(*args: Any, **kwargs: Any) -> Codebook:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(*args, **kwargs)

    monkeypatch.setattr(Codebook, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fitted(model, folder=tmp_path)
    again = fitted(model, folder=tmp_path)
    assert len(calls) == 3
    assert all(same_bits(a.words, b.words) for a, b in zip(again, books, strict=True))
    assert same_bits(fitted(model, folder=tmp_path)[1].words, books[1].words) and len(calls) == 3
    with pytest.raises(ValueError, match="made with"):
        fitted(model, folder=tmp_path, seed=1)
    with pytest.raises(ValueError, match="no inputs"):
        fit_codebooks(model, [])


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("Mistral", {"sliding_window": 8}, "sliding window"),
        ("GPTNeoX", {"rotary_pct": 0.5}, "halves of whole heads|rotary embedding|usual structure"),
        ("GPT2", {"n_layer": 1, "n_head": 2, "n_embd": 32}, "usual structure|rotary"),
        ("Cohere", {}, "halves of whole heads"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "change with"),
    ],
)
def test_models_of_other_kinds(kind: str, options: dict[str, Any], message: str) -> None:
    torch.manual_seed(0)
    model_class = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    config = getattr(transformers, f"{kind}Config")(**options) if kind == "GPT2" else None
    model = model_of(kind=kind, **options) if config is None else getattr(transformers, model_class)(config)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=f"can't decode with quantized keys: .*({message})"):
        QuantizedKeyCache(model, [])
    assert model.config._attn_implementation == before


def test_padding(model: Any, books: list[Codebook]) -> None:
    cache = filled(model, books, ids(2, 20))
    mask = torch.ones(2, 21, dtype=torch.int64)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="without padding"):
        model(input_ids=ids(2, 1), past_key_values=cache, attention_mask=mask)


def test_wrong_options(model: Any, books: list[Codebook]) -> None:
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (books[:1], {}, "1 codebooks; wanted one for each of 2"),
        ([books[0], Codebook(KEY_HEADS, 2 * DIM)], {}, "layer 1 is for 2 heads of size 32"),
        (books, {"budget": 1.5}, "budget is 1.5"),
        (books, {"budget": -1}, "budget is -1"),
        (books, {"budget": True}, "budget is True"),
        (books, {"window": -1}, "window is -1"),
        (books, {"table": "int4"}, "table is 'int4'"),
    ]
    for codebooks, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            QuantizedKeyCache(model, codebooks, **options)
    with pytest.raises(ValueError, match="float64"):
        filled(model_of(torch.float64), books, ids(1, 5))
