"""A mixture-of-experts language model of transformers, whose experts effk computes.

A small Qwen3-MoE with random weights, built here. The table says, for each way of computing its experts, how far the
logits are from float64's, and what a prompt and a generated token take: transformers' own code ("eager" and
"grouped_mm") and `effk.moe.replace_experts_`, on the same model, in turns. Errors are medians over tokens, since
rounding may bring a token to other experts.

    pip install -r examples/requirements.txt
    python examples/moe_transformers.py --batch 4
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import effk
import torch
from torch import Tensor

VOCABULARY = 512
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OURS = "effk"
WAYS = ("eager", "grouped_mm", OURS)
# effk rounds to the model's dtype where the others do, or less often; its float32 sums have another order. So its error
# is about theirs, or smaller. Some of either is chance.
ALLOWED = 2.0


@dataclass(frozen=True)
class Size:
    hidden: int
    inner: int
    layers: int
    experts: int
    chosen: int


def build(size: Size, dtype: torch.dtype) -> Any:
    """A Qwen3-MoE with random weights."""
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=size.hidden // 64,
        head_dim=64,
        moe_intermediate_size=size.inner,
        num_experts=size.experts,
        num_experts_per_tok=size.chosen,
        norm_topk_prob=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.Qwen3MoeForCausalLM(config)
    for name, parameter in model.named_parameters():
        if ".experts." in name:  # so large that they matter
            torch.nn.init.normal_(parameter, std=parameter.shape[2] ** -0.5)
    return model.to(dtype).eval().requires_grad_(False)


def switch(model: Any, way: str) -> None:
    if way == OURS:
        effk.moe.replace_experts_(model)
    else:
        model.set_experts_implementation(way)


def error(logits: Tensor, exact: Tensor) -> float:
    """Relative, of the median token."""
    return ((logits.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).median().item()


def generate(model: Any, prompt: Tensor, forced: Tensor) -> tuple[float, list[float]]:
    """Seconds for the prompt, and for each of the given tokens after it."""
    times = []
    start = time.perf_counter()
    out = model(input_ids=prompt, use_cache=True)
    out.logits.sum().item()  # waits for a device
    times.append(time.perf_counter() - start)
    for token in forced.split(1, 1):
        start = time.perf_counter()
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        out.logits.sum().item()
        times.append(time.perf_counter() - start)
    return times[0], times[1:]


def main(argv: Sequence[str] | None = None) -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024, help="size of the model (default 1024)")
    parser.add_argument("--layers", type=int, default=4, help="of the model (default 4)")
    parser.add_argument("--experts", type=int, default=32, help="of a layer (default 32)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default 1)")
    parser.add_argument("--prompt", type=int, default=256, help="tokens in a prompt (default 256)")
    parser.add_argument("--tokens", type=int, default=16, help="to generate (default 16)")
    parser.add_argument("--rounds", type=int, default=3, help="of measuring, in turns (default 3)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default bfloat16)")
    parser.add_argument("--device", default="cpu", help="default cpu")
    parser.add_argument("--quick", action="store_true", help="a tiny model, a few tokens")
    options = parser.parse_args(argv)
    size = Size(options.hidden, options.hidden // 2, options.layers, options.experts, 4)
    length, count, rounds = options.prompt, options.tokens, options.rounds
    if options.quick:
        size, length, count, rounds = Size(128, 64, 2, 8, 2), 24, 3, 1
    if size.hidden < 64 or size.hidden % 64 or size.experts < size.chosen:
        parser.error(f"--hidden is a multiple of 64, and --experts at least {size.chosen}")
    if min(size.layers, options.batch, length, count, rounds) < 1:
        parser.error("the other numbers are from 1 on")

    torch.manual_seed(0)
    device = torch.device(options.device)
    with torch.inference_mode():
        model = build(size, DTYPES[options.dtype]).to(device)
        switch(model, "eager")
        weights = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
        print(
            f"Qwen3-MoE of {size.layers} layers, {size.hidden} wide, {options.dtype}: {size.experts} experts in each, "
            f"{size.chosen} for a token, {weights / 2**20:.0f} MiB; {device}, {torch.get_num_threads()} threads, "
            f"CPU level {effk.status()['cpu_level']}"
        )
        prompt = torch.randint(0, VOCABULARY, (options.batch, length), device=device)
        forced = torch.randint(0, VOCABULARY, (options.batch, count), device=device)
        exact = copy.deepcopy(model).double()(input_ids=prompt).logits
        errors = {}
        for way in WAYS:
            switch(model, way)
            errors[way] = error(model(input_ids=prompt).logits, exact)
        prompts: dict[str, list[float]] = {way: [] for way in WAYS}
        tokens: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way in WAYS:
                switch(model, way)
                first, others = generate(model, prompt, forced)
                prompts[way].append(first)
                tokens[way] += others
    print(f"{options.batch} x {length} tokens, and {count} after them:")
    print(f"  {'experts':12} {'error':>9} {'ms, prompt':>11} {'ms a token':>11}")
    for way in WAYS:
        times = (1e3 * statistics.median(seconds[way]) for seconds in (prompts, tokens))
        print(f"  {way:12} {errors[way]:9.2e} {next(times):11.2f} {next(times):11.2f}")
    if not 0 < errors[OURS] <= ALLOWED * errors["eager"]:
        raise SystemExit("effk's logits differ by more than rounding")


if __name__ == "__main__":
    main()
