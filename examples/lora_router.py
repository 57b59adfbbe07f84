"""A language model whose tokens choose their adapters: routed as in LoRA-Switch, merged, token by token, and in PEFT.

A small Llama with random weights, built here, and eight adapters that PEFT makes, saves, and `effk.lora.AdapterBank`
loads. For fixed choices of adapters the logits of all ways must agree to rounding. Then a router chooses two adapters
for each token before the first layer, and the table says what a generated token takes: without adapters, with those of
the token merged into the weights, applied beside them, whichever of both the bank holds for cheaper, and the same two
ways in PEFT (its layers switched directly, without walking over the model; in inference mode). Every row generates the
same tokens after the same prompt.

    pip install -r examples/requirements.txt
    python examples/lora_router.py --tokens 32
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import effk
import torch
from effk.lora import AdapterBank, Router
from torch import Tensor, nn

ADAPTERS, CHOSEN = 8, 2
VOCABULARY = 512
FIRST_LAYER = "model.layers.0"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# The logits' error is that of the model without adapters, which rounds in every layer, and besides that of merged
# weights, which are rounded once, or of sums that are. Either is about as large as what a layer's own rounding makes.
ALLOWED = 2.0
# PEFT rounds A x, B of it, the scaled product and the sum for each adapter, in the model's dtype.
ALLOWED_PEFT = 2.0 + CHOSEN


@dataclass(frozen=True)
class Size:
    hidden: int
    layers: int
    rank: int


def build(size: Size, dtype: torch.dtype) -> nn.Module:
    """A Llama with random weights."""
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=size.hidden // 64,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    return model.to(dtype).eval().requires_grad_(False)


def make_adapters(model: nn.Module, size: Size, folder: Path) -> dict[str, Path]:
    """Adapters with random factors for all nn.Linear but the last, saved by PEFT."""
    import peft

    names = [f"expert{i}" for i in range(ADAPTERS)]
    config = peft.LoraConfig(r=size.rank, lora_alpha=size.rank, target_modules="all-linear")
    wrapped = peft.get_peft_model(copy.deepcopy(model), config, names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        wrapped.add_adapter(name, config, autocast_adapter_dtype=False)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # PEFT begins with zeros
            nn.init.normal_(parameter, std=0.02)
    wrapped.save_pretrained(folder)
    return {name: folder / name for name in names}


class Peft:
    """The same adapters in PEFT, as quick as its public interface lets them be switched."""

    def __init__(self, model: nn.Module, folders: dict[str, Path]):
        import peft

        self.names = list(folders)
        first, *rest = self.names
        self.model = peft.PeftModel.from_pretrained(model, folders[first], first, autocast_adapter_dtype=False)
        for name in rest:
            self.model.load_adapter(folders[name], name, autocast_adapter_dtype=False)
        self.model.eval()
        self.layers = [m for m in self.model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        self.merged = False

    def clear(self) -> None:
        if self.merged:
            for layer in self.layers:
                layer.unmerge()
        self.merged = False

    def choose(self, names: Sequence[str], gates: Sequence[float], merge: bool) -> None:
        self.clear()
        for layer in self.layers:
            layer.set_adapter(list(names), inference_mode=True)
            for name, gate in zip(names, gates, strict=True):
                layer.set_scale(name, gate)
            if merge:
                layer.merge(adapter_names=list(names))
        self.merged = merge

    def attach(self, router: Router, merge: bool) -> Callable[[], None]:
        """Routes passes of one token; of a prompt it takes the last token's choice. Returns what ends it."""

        def choose(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids, gates = router(args[0] if args else kwargs["hidden_states"])
            names = [self.names[i] for i in ids[0, -1].tolist()]
            self.choose(names, gates[0, -1].tolist(), merge)

        module = self.model.base_model.model.get_submodule(FIRST_LAYER)
        handle = module.register_forward_pre_hook(choose, with_kwargs=True)

        def end() -> None:
            handle.remove()
            self.clear()

        return end


def error(y: Tensor, exact: Tensor) -> float:
    """Root of the mean square, relative."""
    return ((y.double() - exact).norm() / exact.norm()).item()


def exact_logits(model: nn.Module, bank: AdapterBank, ids: list[int], gates: list[float], prompt: Tensor) -> Tensor:
    """In float64, with adapters merged there."""
    exact = copy.deepcopy(model).double()
    for layer in bank.layers:
        weight = exact.get_submodule(layer.path).weight
        for i, gate in zip(ids, gates, strict=True):
            weight += gate * bank.scaling[i].item() * layer.b[i].double() @ layer.a[i].double()
    return exact(input_ids=prompt).logits


def compare(original: nn.Module, model: nn.Module, bank: AdapterBank, peft: Peft, prompt: Tensor) -> float:
    """Checks logits of fixed choices; returns the error that rounding in the model without adapters makes.

    Raises:
        SystemExit: they differ by more than rounding.
    """
    exact = copy.deepcopy(original).double()(input_ids=prompt).logits
    own = error(original(input_ids=prompt).logits, exact)
    print(f"error of logits to float64: {own:.2e} without adapters; allowed {ALLOWED:g}x that, PEFT {ALLOWED_PEFT:g}x")
    print(f"  {'adapters':28} {'merged':>9} {'token':>9} {'PEFT merged':>12} {'PEFT token':>11}")
    for ids, gates in [([3], [1.0]), ([0, 5], [0.7, 0.3]), ([6, 1], [0.25, 0.75])]:
        exact = exact_logits(original, bank, ids, gates, prompt)
        names = [bank.names[i] for i in ids]
        found = []
        bank.switch(names, gates)
        found.append(error(model(input_ids=prompt).logits, exact))
        bank.apply_mode("token")
        bank.route(names, gates)
        found.append(error(model(input_ids=prompt).logits, exact))
        for merge in (True, False):
            peft.choose(names, gates, merge)
            found.append(error(peft.model(input_ids=prompt).logits, exact))
        peft.clear()
        bank.unmerge()
        changed = error(original(input_ids=prompt).logits, exact)
        title = " + ".join(f"{gate:g} {name}" for name, gate in zip(names, gates, strict=True))
        print(f"  {title:28} {found[0]:9.2e} {found[1]:9.2e} {found[2]:12.2e} {found[3]:11.2e}")
        if not max(found[:2]) <= ALLOWED * own or not max(found[2:]) <= ALLOWED_PEFT * own:
            raise SystemExit("logits with adapters differ by more than rounding")
        if changed < 10 * own:
            raise SystemExit("the adapters change too little to be seen")
    return own


def generate(model: nn.Module, prompt: Tensor, forced: Tensor | None, count: int) -> tuple[Tensor, Tensor, list[float]]:
    """Tokens one by one, the most likely or the given ones; their logits, and the seconds that each took."""
    out = model(input_ids=prompt, use_cache=True)
    logits, times, tokens = [], [], []
    for i in range(count):
        token = out.logits[:, -1:].argmax(-1) if forced is None else forced[:, i : i + 1]
        start = time.perf_counter()
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits.float().cpu())  # waits for a device
        times.append(time.perf_counter() - start)
        tokens.append(token)
    return torch.cat(tokens, 1), torch.cat(logits, 1), times


def main(argv: Sequence[str] | None = None) -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024, help="size of the model (default 1024)")
    parser.add_argument("--layers", type=int, default=6, help="of the model (default 6)")
    parser.add_argument("--rank", type=int, default=64, help="of the adapters (default 64)")
    parser.add_argument("--tokens", type=int, default=24, help="to generate (default 24)")
    parser.add_argument("--rounds", type=int, default=3, help="of measuring, in turns (default 3)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default bfloat16)")
    parser.add_argument("--device", default="cpu", help="default cpu")
    parser.add_argument("--quick", action="store_true", help="a tiny model, a few tokens")
    options = parser.parse_args(argv)
    size = Size(128, 2, 8) if options.quick else Size(options.hidden, options.layers, options.rank)
    count, rounds = (6, 1) if options.quick else (options.tokens, options.rounds)
    if size.hidden < 64 or size.hidden % 64 or min(size.layers, size.rank, count, rounds) < 1:
        parser.error("--hidden is a multiple of 64, and the other numbers are from 1 on")

    torch.manual_seed(0)
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        original = build(size, DTYPES[options.dtype])
        with torch.inference_mode(False):
            folders = make_adapters(original, size, Path(folder))
        original = original.to(device)
        model = copy.deepcopy(original)
        bank = AdapterBank(model, folders)
        peft = Peft(copy.deepcopy(original), folders)
        linears = sum(layer.w.nbytes for layer in bank.layers)
        adapters = sum(layer.a.nbytes + layer.b.nbytes for layer in bank.layers)
        print(
            f"Llama of {size.layers} layers, {size.hidden} wide, {options.dtype}: {len(bank.layers)} adapted weights, "
            f"{linears / 2**20:.1f} MiB; {ADAPTERS} adapters of rank {size.rank}, "
            f"{adapters / ADAPTERS / 2**20:.2f} MiB each; {device}, "
            f"{torch.get_num_threads()} threads, CPU level {effk.status()['cpu_level']}"
        )
        prompt = torch.randint(0, VOCABULARY, (1, 12), device=device)
        own = compare(original, model, bank, peft, prompt)

        router = Router(size.hidden, ADAPTERS, CHOSEN, device=device, dtype=original.dtype)
        nn.init.normal_(router.scores.weight, std=1.0)  # scores far enough apart, for gates that differ
        bank.attach_router(FIRST_LAYER, router)
        bank.apply_mode("auto")
        tokens, _, _ = generate(model, prompt, None, count)
        print(f"tokens: {' '.join(map(str, tokens[0, :12].tolist()))} ...")
        bank.detach_router()
        bank.unmerge()

        def ours(mode: str) -> tuple[nn.Module, Callable[[], None]]:
            bank.apply_mode(mode)
            bank.attach_router(FIRST_LAYER, router)

            def end() -> None:
                bank.detach_router()
                bank.unmerge()

            return model, end

        ways: dict[str, Callable[[], tuple[nn.Module, Callable[[], None]]]] = {
            "no adapters": lambda: (original, lambda: None),
            "merged": lambda: ours("merged"),
            "token by token": lambda: ours("token"),
            "auto": lambda: ours("auto"),
            "PEFT merged": lambda: (peft.model, peft.attach(router, True)),
            "PEFT token by token": lambda: (peft.model, peft.attach(router, False)),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        logits: dict[str, Tensor] = {}
        for _ in range(rounds):
            for name, begin in ways.items():
                used, end = begin()
                _, logits[name], taken = generate(used, prompt, tokens, count)
                end()
                times[name] += taken[1:] if count > 1 else taken  # the first one warms up
        print(f"{CHOSEN} of {ADAPTERS} adapters for each token:")
        print(f"  {'':20} {'ms a token':>10} {'of adapters':>11} {'as fast as PEFT':>15}")
        medians = {name: 1e3 * statistics.median(taken) for name, taken in times.items()}
        best = min(medians["PEFT merged"], medians["PEFT token by token"])
        for name, ms in medians.items():
            share = "" if name == "no adapters" else f"{ms - medians['no adapters']:11.2f} {best / ms:14.2f}x"
            print(f"  {name:20} {ms:10.2f} {share}".rstrip())
        # Twice what each may be off by. The prompt's tokens chose for themselves in all three.
        for name in ("merged", "auto"):
            found = error(logits[name], logits["token by token"].double())
            if not found <= 2 * ALLOWED * own:
                raise SystemExit(f"generated logits of {name!r} differ by {found:.2e}, more than rounding")
        bank.remove()
        if any(not torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True)):
            raise SystemExit("the model is not as it was")
    print("merged and token by token agree; the model is as it was, bit by bit")


if __name__ == "__main__":
    main()
