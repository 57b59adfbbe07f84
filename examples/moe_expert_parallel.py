"""A small language model whose experts are shared out over ranks, trained for some steps, and a look at the overlap.

Attention, embeddings and routers are on all ranks, with their gradients averaged; each rank has its share of every
layer's experts, and lines of text of its own. Afterwards the trained layers are compared with the same experts
gathered on one rank. With --timeline a layer of its own is profiled, and what each rank computed and exchanged is drawn
over time.

    torchrun --nproc-per-node 2 examples/moe_expert_parallel.py [--steps 60] [--timeline timeline.png]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import effk
import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later, its default arguments would keep a group, whose threads outlive Python
import torch.nn.functional as F
from torch import Tensor, nn

SENTENCES = Path(__file__).parent / "sentences.txt"
LENGTH = 64  # bytes of a sequence


class Block(nn.Module):
    def __init__(self, width: int, heads: int, experts: int, k: int, group: dist.ProcessGroup):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.moe = effk.moe.MoEMLP(width, 2 * width, experts, k, group=group)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.moe(self.norm2(x))


class Model(nn.Module):
    def __init__(self, group: dist.ProcessGroup, width: int = 64, layers: int = 2, experts: int = 8, k: int = 2):
        super().__init__()
        self.embed, self.place = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, 4, experts, k, group) for _ in range(layers)))
        self.head = nn.Linear(width, 256)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(text) + self.place.weight[: text.shape[1]]))

    def experts(self) -> set[nn.Parameter]:
        """Those parameters that no other rank has."""
        return {p for block in self.blocks for p in (block.moe.w13, block.moe.w2)}


def sequences(rank: int, ranks: int) -> Tensor:
    """[n, LENGTH + 1] bytes of this rank's lines."""
    text = "\n".join(SENTENCES.read_text().splitlines()[rank::ranks]).encode()
    count = len(text) // (LENGTH + 1)
    return torch.tensor(list(text[: count * (LENGTH + 1)])).view(count, LENGTH + 1)


def train(model: Model, steps: int, group: dist.ProcessGroup) -> tuple[float, float]:
    """The mean loss of all ranks, before and after."""
    ranks, own = group.size(), model.experts()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    data = sequences(group.rank(), ranks)
    losses = []
    for step in range(steps):
        batch = data[torch.randint(len(data), (8,))]
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        for p in model.parameters():
            if p.grad is None:
                continue
            if p not in own:  # an expert has got the gradients of all ranks' tokens already
                dist.all_reduce(p.grad, group=group)
            p.grad /= ranks
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean, group=group)
        losses.append(float(mean) / ranks)
        if group.rank() == 0 and (step % 10 == 0 or step == steps - 1):
            print(f"step {step:3d}  loss {losses[-1]:.3f}", flush=True)
    return losses[0], losses[-1]


@torch.no_grad()
def compare(model: Model, group: dist.ProcessGroup) -> float:
    """Largest difference of a layer from its experts gathered here, relative to the largest result."""
    worst = 0.0
    for block in model.blocks:
        moe = block.moe
        x = torch.randn(37 + group.rank(), moe.hidden_size)
        weights, ids = moe.route(x)
        y = moe(x, weights, ids)
        gathered = []
        for w in (moe.w13.detach(), moe.w2.detach()):
            parts = [torch.empty_like(w) for _ in range(group.size())]
            dist.all_gather(parts, w.contiguous(), group=group)
            gathered.append(torch.cat(parts))
        alone = effk.moe.mlp(x, *gathered, weights, ids)
        worst = max(worst, float((y - alone).abs().max() / alone.abs().max()))
    return worst


# --- The picture ------------------------------------------------------------------------------------------------------

Interval = tuple[str, float, float]  # kind, begin, end in seconds


def profiled(group: dist.ProcessGroup, args: argparse.Namespace) -> list[Interval]:
    """What this rank does in one call of a layer, in seconds since the epoch."""
    experts, k = args.experts // group.size(), 8
    draw = torch.Generator().manual_seed(group.rank())
    x = torch.randn(args.tokens, args.cols, generator=draw).bfloat16()
    w13 = torch.randn(experts, 2 * args.inner, args.cols, generator=draw).bfloat16()
    w2 = torch.randn(experts, args.cols, args.inner, generator=draw).bfloat16()
    weights = torch.rand(args.tokens, k, generator=draw)
    ids = torch.rand(args.tokens, args.experts, generator=draw).topk(k).indices

    def call() -> None:
        effk.moe.mlp_ep(x, w13, w2, weights, ids, group.group_name, stages=args.stages)

    with torch.inference_mode():
        call()
        dist.barrier(group)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
    base = float(trace.get("baseTimeNanoseconds", 0)) * 1e-9
    found = []
    for event in trace["traceEvents"]:
        name = event.get("name", "")
        kind = "communication" if "all_to_all" in name and "gloo" in name else None
        if name.startswith("moe_mlp_ep: "):
            kind = "computation" if "compute" in name else "waiting"
        if kind and "dur" in event:
            begin = base + event["ts"] * 1e-6
            found.append((kind, begin, begin + event["dur"] * 1e-6))
    return found


COLOURS = {"computation": "tab:blue", "communication": "tab:orange", "waiting": "tab:gray"}


def draw(ranks: list[list[Interval]], path: Path) -> None:
    from matplotlib.figure import Figure

    start = min(begin for rank in ranks for _, begin, _ in rank)
    figure = Figure(figsize=(10, 1 + 1.2 * len(ranks)), layout="constrained")
    axes = figure.subplots()
    for r, intervals in enumerate(ranks):
        for lane, kind in enumerate(COLOURS):
            bars = [(1e3 * (begin - start), 1e3 * (end - begin)) for k, begin, end in intervals if k == kind]
            axes.broken_barh(bars, (r + lane * 0.28, 0.25), color=COLOURS[kind], label=kind if r == 0 else None)
    axes.set_yticks([r + 0.4 for r in range(len(ranks))], [f"rank {r}" for r in range(len(ranks))])
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.set_title("A layer of experts over ranks")
    figure.legend(loc="outside lower center", ncols=len(COLOURS))
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--timeline", type=Path, metavar="FILE", help="picture of a layer's call (matplotlib)")
    parser.add_argument("--stages", type=int, default=4, help="of that call; 0: what is best")
    parser.add_argument("--tokens", type=int, default=512, help="likewise, of a rank")
    parser.add_argument("--experts", type=int, default=64, help="likewise, of all ranks")
    parser.add_argument("--cols", type=int, default=2048, help="likewise, K")
    parser.add_argument("--inner", type=int, default=768, help="likewise, I")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // group.size()))
    torch.manual_seed(0)  # what all ranks have is the same ...
    model = Model(group)
    torch.manual_seed(1 + group.rank())  # ... and experts aren't
    for w in model.experts():
        nn.init.normal_(w, std=0.05)
    begin = time.perf_counter()
    first, last = train(model, args.steps, group)
    seconds = time.perf_counter() - begin
    worst = compare(model, group)
    if group.rank() == 0:
        print(f"{group.size()} ranks, {args.steps} steps in {seconds:.1f} s: loss {first:.3f} -> {last:.3f}")
    print(f"rank {group.rank()}: layers are off those of gathered experts by {worst:.1e} of the largest result")
    assert worst < 1e-5 and (args.steps < 20 or last < first)
    if args.timeline:
        every: list[list[Interval]] = [[] for _ in range(group.size())]
        dist.all_gather_object(every, profiled(group, args))
        if group.rank() == 0:
            draw(every, args.timeline)
            print(f"wrote {args.timeline}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
