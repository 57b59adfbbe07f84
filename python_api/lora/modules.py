"""Many adapters beside one model: merged into its weights, or applied token by token, as a router chooses."""

from __future__ import annotations

import logging
import operator
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .._checks import FLOATS
from .._progress import progress_bar
from . import reference
from .adapters import Adapter, check_layer
from .selector import Selector, check_amount

log = logging.getLogger("effk")

MODES = ("merged", "token", "auto")

Source = str | os.PathLike[str] | Adapter
Ids = Tensor | Sequence[int | str] | int | str
Gates = Tensor | Sequence[float] | float


class Router(nn.Module):
    """Chooses adapters for tokens, as LoRA-Switch does (arXiv:2405.17741): once for all layers, from hidden states.

    The k adapters with the highest scores of a linear layer; the softmax over those k scores gives the gates.

    Args:
        hidden_size: of the hidden states.
        num_adapters: to choose from.
        k: adapters of a token.
        device, dtype: of the weight. The dtype should be that of the hidden states.

    Raises:
        ValueError: k isn't from 1 to num_adapters.
    """

    def __init__(
        self,
        hidden_size: int,
        num_adapters: int,
        k: int = 2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not 1 <= k <= num_adapters:
            raise ValueError(f"k is {k}; wanted 1 to {num_adapters}, the number of adapters")
        self.k = k
        self.scores = nn.Linear(hidden_size, num_adapters, bias=False, device=device, dtype=dtype)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[..., hidden_size] -> ids [..., k] int64 and gates [..., k] float32 that add up to 1."""
        scores, ids = self.scores(hidden).float().topk(self.k, dim=-1)
        return ids, scores.softmax(-1)

    def extra_repr(self) -> str:
        return f"k={self.k}"


@dataclass(eq=False)
class Layer:
    """A layer of the model with the factors of all adapters.

    Attributes:
        path, module, weight: in the model.
        w: the weight's memory.
        a: [adapters, rank, in features].
        b: [adapters, out features, rank].
        merge_a, merge_b: the same for the weight as it is stored; exchanged and transposed where it is [in, out].
        base: a copy of the weight as it was, if kept.
        ranks: [adapters] int32, how much of `rank` each uses here; None where all use it.
        version: of the weight's contents, as far as torch counts.
    """

    path: str
    module: nn.Module
    weight: nn.Parameter
    w: Tensor
    a: Tensor
    b: Tensor
    merge_a: Tensor
    merge_b: Tensor
    base: Tensor | None
    ranks: Tensor | None
    version: int | None = None

    def add(self, x: Tensor, y: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        """y, which this layer made of x, with the adapters of each token, or with [k] for all tokens."""
        lead = x.shape[:-1]
        if ids.dim() == 1:
            ids, gates = ids.expand(*lead, -1), gates.expand(*lead, -1)
        elif ids.shape[:-1] != lead:
            if x.dim() != 2 or ids.shape[:-1].numel() != x.shape[0]:
                raise RuntimeError(
                    f"layer {self.path} got tokens of sizes {list(lead)}, but adapters were chosen for tokens of sizes "
                    f"{list(ids.shape[:-1])}: choose anew, or choose the same for all tokens"
                )
            ids, gates = ids.flatten(0, -2), gates.flatten(0, -2)
        dtype = self.a.dtype  # autocast may have made another one of y
        out = torch.ops.effk.lora_apply(x.to(dtype), self.a, self.b, ids, gates, y.to(dtype), self.ranks)
        return out.to(y.dtype)


class _Choice:
    """What the layers apply now, token by token; None is nothing. ids [k] or [..., k], gates with scalings.

    Compiled code doesn't notice routers that come or go, as those are hooks. It notices that `routers` changes.
    """

    ids: Tensor | None = None
    gates: Tensor | None = None
    routers: str = "0"


class AdapterBank:
    """LoRA adapters for a model, of which some are in use at a time: a set for all tokens, or a set for each token.

    A set that all tokens share can be merged into the weights, which costs one pass over them and then nothing, or
    applied beside them, which costs a little in every layer and pass. `mode` says which of it `route` does:
    "merged" merges, "token" doesn't, "auto" takes what costs less (see `Selector`). Sets that differ between tokens
    are always applied beside the unmerged weights.

    Adapters add up: x (W + sum over the set of gate * scaling * B A)^T. They are kept in the model's dtype, those of a
    layer in one tensor with zeros up to its largest rank. A scaling is applied with the gate, so that factors are not
    rounded again; where a layer's differs from the adapter's commonest, their ratio is multiplied into B, in float32.

    Layers are nn.Linear and transformers' Conv1D; what an adapter lacks of them it leaves as it is. The parameters
    stay the model's own, and its state_dict keeps its names, but holds merged weights while something is merged. Each
    layer gets a hook, which does nothing while weights are merged.

    Args:
        model: holds the layers, all on one device and of one float dtype.
        adapters: by name, folders that PEFT wrote, or `Adapter`s; or folders alone, whose names are the adapters'.
            Folders are untrusted. Numbers of adapters follow this order.
        keep_base: keeps a copy of each weight: whatever was merged before, merging gives the same bits and unmerging
            the old ones. False saves that memory, and rounds the weights anew at each switch: errors add up.
        mode: as above.
        selector: for the mode "auto"; by default one that is calibrated when it is first needed.
        progress: shows bars, where rich is installed and stderr is a terminal.

    Attributes:
        names: of the adapters, by number.
        layers: what is adapted, in the model's order.
        scaling: [adapters] float32, of each adapter.
        ranks: [adapters] int32, the largest of each adapter, or None where all are the same.

    Raises:
        ValueError: an adapter can't be read, needs something that isn't supported or doesn't fit the model, or a layer
            can't be adapted: quantized, tied to another parameter, in memory of another parameter or buffer, not
            contiguous. The model is as it was.
        TypeError: the selector is none.
        OSError: a file can't be read.
        ImportError: an adapter comes from a folder, and safetensors isn't installed.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Mapping[str, Source] | Sequence[str | os.PathLike[str]],
        *,
        keep_base: bool = True,
        mode: str = "merged",
        selector: Selector | None = None,
        progress: bool = True,
    ):
        _check_mode(mode)
        if selector is not None and not isinstance(selector, Selector):
            raise TypeError(f"selector is a {type(selector).__name__}; wanted a Selector")
        named = _named(adapters)
        self.names = tuple(named)
        self.keep_base = keep_base
        self.selector = selector
        self._model: nn.Module | None = model
        self._numbers = {name: i for i, name in enumerate(self.names)}
        self._mode = mode
        with torch.inference_mode(False), torch.no_grad():  # tensors of that mode couldn't be used outside of it
            read = _read(named, progress)
            found = _find_layers(model, read)
            _check_memory(model, found)
            scalings = [_common_scaling(adapter) for adapter in read.values()]
            self.layers = _stack(found, read, scalings, keep_base, progress)
            self.device, self.dtype = self.layers[0].w.device, self.layers[0].w.dtype
            ranks = [max((a.shape[0] for a, _ in adapter.layers.values()), default=0) for adapter in read.values()]
            self._ranks = tuple(ranks)
            self.scaling = torch.tensor(scalings, dtype=torch.float32, device=self.device)
            self.ranks = _ranks(ranks, max(layer.a.shape[1] for layer in self.layers), self.device)
            none = torch.zeros(0, dtype=torch.int64, device=self.device)
            self._nothing = (none, none.float())
        self._scaled = any(s != 1 for s in scalings)
        self._w = [layer.w for layer in self.layers]
        self._a = [layer.merge_a for layer in self.layers]
        self._b = [layer.merge_b for layer in self.layers]
        self._base = [layer.base for layer in self.layers if layer.base is not None] if keep_base else None
        self._merged: tuple[Tensor, Tensor] | None = None  # with scalings in the gates
        self._choice = _Choice()
        self._router: torch.utils.hooks.RemovableHandle | None = None
        self._remember()
        # All the time, as code that torch compiled may not notice hooks that come later.
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        try:
            for layer in self.layers:
                hook = _LayerHook(layer, self._choice)
                self._hooks.append(layer.module.register_forward_hook(hook, with_kwargs=True))
        except BaseException:  # also an interrupt: the model is as it was
            for handle in self._hooks:
                handle.remove()
            raise
        log.info(
            "lora: %d adapters of rank %s for %d layers, %d bytes, and %d of copies of weights",
            len(self.names),
            "/".join(map(str, sorted(set(ranks)))),
            len(self.layers),
            sum(layer.a.nbytes + layer.b.nbytes for layer in self.layers),
            sum(w.nbytes for w in self._base or ()),
        )

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return (
            f"AdapterBank({len(self)} adapters, {len(self.layers)} layers, mode={self.mode!r}, "
            f"keep_base={self.keep_base}, {self.dtype}, {self.device})"
        )

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise TypeError("an AdapterBank can't be copied, as it belongs to one model: make another one of a copy")

    def __reduce__(self) -> NoReturn:
        raise TypeError("an AdapterBank can't be copied or pickled, as it belongs to one model: make another one")

    # ---- choosing

    @property
    def mode(self) -> str:
        """What `route` does with a set that all tokens share: "merged", "token" or "auto"."""
        return self._mode

    def apply_mode(self, mode: str) -> None:
        """Changes `mode`, from the next `route` on. "auto" calibrates the selector if there is none yet.

        Raises:
            ValueError: there is no such mode.
        """
        _check_mode(mode)
        self._alive()
        self._mode = mode
        if mode == "auto":
            self._calibrated()

    @property
    def merged(self) -> list[tuple[str, float]] | None:
        """Names and gates (times scaling) of what is merged now, or None. Waits for the device."""
        return None if self._merged is None else self._as_list(*self._merged)

    @property
    def chosen(self) -> bool:
        """Whether adapters are applied token by token now."""
        return self._choice.ids is not None

    def switch(self, ids: Ids, gates: Gates | None = None) -> None:
        """Merges a set of adapters into all layers, in place of what was merged, in one call of `lora_switch_`.

        Whatever the mode; a choice token by token ends. Gradients don't flow through it.

        Args:
            ids: [k], names or numbers, -1 for none; one may come more than once. On a GPU tensors are read there.
            gates: [k]; by default 1 each.

        Raises:
            ValueError: an unknown name or number in a list, or wrong shapes or dtypes.
            RuntimeError: a weight was moved, replaced or changed since; a number in a tensor is out of range.
        """
        ids, gates = self._pairs(ids, gates)
        if ids.dim() != 1:
            raise ValueError(f"ids has shape {list(ids.shape)}; wanted [k], as a merged set is for all tokens")
        self._switch(ids, gates)

    def unmerge(self) -> None:
        """No adapter from now on: the weights as they were, bit by bit with `keep_base`, and nothing token by token.

        Raises:
            RuntimeError: a weight was moved, replaced or changed since.
        """
        self._alive()
        self._restore()
        self._choice.ids = self._choice.gates = None

    def route(self, ids: Ids, gates: Gates | None = None, *, steps: float = 1, tokens: int = 1) -> None:
        """Sets the adapters of the coming passes through the model: for each token its own, or for all the same.

        Args:
            ids: [..., k] with the sizes of the tokens that layers will get, or [k] for all tokens, whose number may
                then change; names or numbers, -1 for none. Of tokens that layers get as rows, [batch, length] may be
                flattened. The bank keeps copies of ids and gates.
            gates: [..., k]; by default 1 each. In a pass with gradients they get theirs, unless merged.
            steps: passes expected until another set is routed, for "auto".
            tokens: expected in each of them, for "auto".

        Raises:
            ValueError: an unknown name or number in a list, wrong shapes or dtypes, or steps or tokens is no number or
                negative.
            RuntimeError: as in `switch`, where it merges or unmerges. In "token" mode numbers in tensors are checked
                when layers use them.
        """
        check_amount("steps", steps)
        check_amount("tokens", tokens)
        ids, gates = self._pairs(ids, gates)
        if self._mode != "token" and ids.numel() == ids.shape[-1]:  # one set for all
            ids, gates = ids.reshape(-1), gates.reshape(-1)
            if self._mode == "merged" or self._merge_is_cheaper(ids, gates, steps, tokens):
                self._switch(ids, gates)
                return
        if self._merged is not None:
            self._restore()
        # Copies, as the caller may write into his.
        self._choice.ids, self._choice.gates = ids.clone(), self._with_scaling(ids, gates.clone())

    def attach_router(
        self, module: nn.Module | str, router: Callable[[Tensor], tuple[Tensor, Tensor]], *, steps: float = 1
    ) -> None:
        """Lets a router choose in each pass: before a module runs, from its first argument, for all layers.

        As in LoRA-Switch the module is the first decoder layer and its argument the hidden states, so that all layers
        of the bank come after it. Passes of a single token may be merged, as `mode` says; others can't.

        Args:
            module: in the model, or its path.
            router: called with hidden states [..., H]; returns ids and gates [..., k], as `Router` does.
            steps: as in `route`.

        Raises:
            ValueError: there is no such module, another router is there, or steps is no number or negative.
        """
        model = self._alive()
        check_amount("steps", steps)
        if self._router is not None:
            raise ValueError("there is a router already: detach_router() takes it away")
        if isinstance(module, str):
            module = _module_at(model, module)
        elif not any(m is module for m in model.modules()):
            raise ValueError("the module is not in the model")

        self._router = module.register_forward_pre_hook(_RouterHook(self, router, steps), with_kwargs=True)
        self._choice.routers += "+"

    def detach_router(self) -> None:
        """Takes the router away, if there is one. What is merged stays; a choice token by token ends."""
        if self._router is not None:
            self._router.remove()
            self._choice.ids = self._choice.gates = None
            self._router = None
            self._choice.routers += "-"

    def remove(self, *, unmerge: bool = True) -> None:
        """Leaves the model as it was: unmerges, and takes hooks and routers away. The bank can't be used any more.

        Args:
            unmerge: False leaves the weights, whatever is merged into them.

        Raises:
            RuntimeError: as in `unmerge`; the bank is still there.
        """
        if self._model is None:
            return
        if unmerge:
            self.unmerge()
        self._choice.ids = self._choice.gates = None
        self.detach_router()
        for handle in self._hooks:
            handle.remove()
        self._model = None
        self._hooks = []

    # ---- inside

    def _alive(self) -> nn.Module:
        if self._model is None:
            raise RuntimeError("the bank was removed from its model")
        return self._model

    def _pairs(self, ids: Ids, gates: Gates | None) -> tuple[Tensor, Tensor]:
        """Numbers int32 or int64 and gates float32, of the same shape [..., k], on the model's device."""
        self._alive()
        if not isinstance(ids, Tensor):
            ids = torch.tensor([self._number(i) for i in _items("ids", ids)], dtype=torch.int64, device=self.device)
        elif ids.dtype not in reference.INDICES:
            raise ValueError(f"ids has dtype {ids.dtype}; wanted torch.int32 or torch.int64")
        if ids.dim() == 0 or ids.shape[-1] > reference.MAX_PAIRS:
            raise ValueError(f"ids has shape {list(ids.shape)}; wanted [..., k], k at most {reference.MAX_PAIRS}")
        ids = ids.to(self.device)
        if gates is None:
            return ids, torch.ones(ids.shape, device=self.device)
        if not isinstance(gates, Tensor):
            gates = torch.tensor([_gate(g) for g in _items("gates", gates)], dtype=torch.float32)
        elif gates.is_complex():
            raise ValueError(f"gates has dtype {gates.dtype}; wanted real numbers")
        if gates.shape != ids.shape:
            raise ValueError(f"gates has shape {list(gates.shape)}; wanted that of ids, {list(ids.shape)}")
        return ids, gates.to(self.device, torch.float32)

    def _number(self, adapter: int | str) -> int:
        if isinstance(adapter, str):
            if adapter not in self._numbers:
                raise ValueError(f"there is no adapter {adapter!r}; there are {', '.join(self.names)}")
            return self._numbers[adapter]
        try:
            number = operator.index(adapter)
        except TypeError as error:
            raise ValueError(f"ids holds {adapter!r}; wanted names or whole numbers") from error
        if not -1 <= number < len(self.names):
            raise ValueError(f"ids holds {number}; wanted -1 to {len(self.names) - 1}")
        return number

    def _with_scaling(self, ids: Tensor, gates: Tensor) -> Tensor:
        if not self._scaled:
            return gates
        return gates * self.scaling[ids.clamp(0, len(self.names) - 1)]  # what is out of range is for the op to see

    def _as_list(self, ids: Tensor, gates: Tensor) -> list[tuple[str, float]]:
        pairs = zip(ids.tolist(), gates.tolist(), strict=True)
        return [(self.names[i], g) for i, g in pairs if 0 <= i < len(self.names)]

    # Writing into parameters is nothing for a traced graph: it would have to see through their aliases.
    # torch.compiler.disable says the same, but would have `import effk` import the compiler, which takes a second.
    @torch._disable_dynamo
    def _switch(self, ids: Tensor, gates: Tensor) -> None:
        gates = self._with_scaling(ids, gates.detach())
        old = self._merged or self._nothing
        if self._is_merged(ids, gates):
            self._check_weights()
        else:
            with _writing(self._w):
                self._check_weights()
                torch.ops.effk.lora_switch_(self._w, self._a, self._b, *old, ids, gates, self._base, self.ranks)
            # Copies, as the caller may write into his.
            self._merged = (ids.clone(), gates.clone())
            self._remember()
        self._choice.ids = self._choice.gates = None

    def _is_merged(self, ids: Tensor, gates: Tensor) -> bool:
        """Whether that is merged already, where looking costs no wait for a device."""
        if self._merged is None or ids.device.type != "cpu":
            return False
        return torch.equal(ids, self._merged[0]) and torch.equal(gates, self._merged[1])

    @torch._disable_dynamo
    def _restore(self) -> None:
        if self._merged is None:
            return
        with _writing(self._w):
            self._check_weights()
            torch.ops.effk.lora_unmerge_(self._w, self._a, self._b, *self._merged, self._base, self.ranks)
        self._merged = None
        self._remember()

    def _check_weights(self) -> None:
        for layer in self.layers:
            weight = layer.module._parameters.get("weight")
            # `.to()` changes what a parameter holds, assigning changes the parameter.
            if weight is not layer.weight or weight.data_ptr() != layer.w.data_ptr() or weight.dtype != layer.w.dtype:
                raise RuntimeError(
                    f"the weight of {layer.path} was moved or replaced after the bank was made: make another bank "
                    "(of this one, remove(unmerge=False))"
                )
            if layer.version is not None and layer.version != layer.w._version:
                raise RuntimeError(
                    f"the weight of {layer.path} was changed after the bank was made: make another bank (of this one, "
                    "remove(unmerge=False))"
                )

    def _remember(self) -> None:
        """The weights' versions, which the ops raise."""
        for layer in self.layers:
            if not layer.w.is_inference():
                layer.version = layer.w._version

    # ---- the cheaper way

    def _calibrated(self) -> Selector:
        if self.selector is None:
            self.selector = Selector.calibrate(self)
        return self.selector

    @torch._disable_dynamo
    def _merge_is_cheaper(self, ids: Tensor, gates: Tensor, steps: float, tokens: int) -> bool:
        gates = self._with_scaling(ids, gates.detach())
        if self._is_merged(ids, gates):
            return True
        old = None if self._merged is None else self._ranks_of(self._merged[0])
        return self._calibrated().choose(tokens, steps, self._ranks_of(ids), merged=old) == "merged"

    def _ranks_of(self, ids: Tensor) -> list[int]:
        if ids.device.type != "cpu":  # no wait for the device
            return [max(self._ranks)] * ids.numel()
        return [self._ranks[i] for i in ids.tolist() if 0 <= i < len(self._ranks)]


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; wanted one of {', '.join(MODES)}")


def _writing(weights: list[Tensor]) -> torch.inference_mode | torch.no_grad:
    """Weights made in inference mode can be written to in that mode only."""
    return torch.inference_mode() if any(w.is_inference() for w in weights) else torch.no_grad()


def _items(name: str, given: Any) -> list[Any]:
    """Of a sequence, or the only one."""
    if isinstance(given, Mapping):
        raise ValueError(f"{name} is a {type(given).__name__}; wanted a sequence")
    try:
        return [given] if isinstance(given, str) else list(given)
    except TypeError:
        return [given]


def _gate(gate: Any) -> float:
    try:
        if not isinstance(gate, str | bytes):
            return float(gate)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"gates holds {gate!r}; wanted numbers")


class _Hook:
    """A hook of a bank. Copies of the model would have it, too, and follow a bank that never writes their weights."""

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise TypeError("a model with an AdapterBank can't be copied or pickled: call the bank's remove() before")

    def __reduce__(self) -> NoReturn:
        self.__deepcopy__(None)


class _LayerHook(_Hook):
    """Adds the chosen adapters to what a layer makes."""

    def __init__(self, layer: Layer, choice: _Choice):
        self.layer, self.choice = layer, choice

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        choice = self.choice
        if choice.routers == "" or choice.ids is None or choice.gates is None:  # each is looked at when compiled
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        return self.layer.add(x, output, choice.ids, choice.gates)


class _RouterHook(_Hook):
    """Lets a router choose, from the first argument of the module."""

    def __init__(self, bank: AdapterBank, router: Callable[[Tensor], tuple[Tensor, Tensor]], steps: float):
        self.bank, self.router, self.steps = bank, router, steps

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states", kwargs.get("input", kwargs.get("x")))
        if not isinstance(hidden, Tensor):
            raise RuntimeError(f"the router's {type(module).__name__} got no hidden states as its first argument")
        self.bank.route(*self.router(hidden), steps=self.steps)


# ---- making a bank


def _named(adapters: Mapping[str, Source] | Sequence[str | os.PathLike[str]]) -> dict[str, Source]:
    if isinstance(adapters, Mapping):
        named = dict(adapters)
    else:
        if isinstance(adapters, str | os.PathLike):
            raise ValueError("adapters is a single path; wanted folders, or folders by name")
        named = {}
        for folder in adapters:
            name = Path(folder).resolve().name
            if name in named:
                raise ValueError(f"two folders are named {name}: give adapters by name, {{name: folder}}")
            named[name] = folder
    if not named:
        raise ValueError("there are no adapters")
    return named


def _read(named: Mapping[str, Source], progress: bool) -> dict[str, Adapter]:
    read = {}
    with progress_bar("Reading adapters", len(named), progress) as advance:
        for name, source in named.items():
            try:
                read[name] = source if isinstance(source, Adapter) else Adapter.from_folder(source)
            except ValueError as error:
                raise ValueError(f"adapter {name}: {error}") from error
            advance()
    return read


@dataclass(frozen=True)
class _Found:
    """A layer that adapters are for.

    Attributes:
        path: its first one in the model.
        module: it.
        transposed: its weight is [in, out].
        factors: of each adapter that has some, its factors and the path under which it has them.
    """

    path: str
    module: nn.Module
    transposed: bool
    factors: dict[str, tuple[Tensor, Tensor, str]]


def _module_at(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"the model has no module {path!r}") from error


def _find_layers(model: nn.Module, adapters: Mapping[str, Adapter]) -> list[_Found]:
    """The layers that adapters are for, in the model's order; everything is checked."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    parameters: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameters.setdefault(id(parameter), []).append(name)
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[int, _Found] = {}
    for name, adapter in adapters.items():
        if not adapter.layers:
            raise ValueError(f"adapter {name}: has no layers")
        for path, (a, b) in adapter.layers.items():
            try:
                if path not in modules:
                    raise ValueError(f"the model has no layer {path}")
                module = modules[path]
                if id(module) not in found:
                    if problem := _obstacle(module, paths[id(module)], parameters):
                        raise ValueError(f"layer {path} can't be adapted: {problem}")
                    found[id(module)] = _Found(paths[id(module)][0], module, not isinstance(module, nn.Linear), {})
                layer = found[id(module)]
                if name in layer.factors:
                    raise ValueError(f"layer {path} is the same as {layer.factors[name][2]}")
                assert isinstance(module.weight, Tensor)
                cols, rows = module.weight.shape if layer.transposed else module.weight.shape[::-1]
                check_layer(path, a, b, cols, rows)
                _scaling_of(adapter, path)
            except ValueError as error:
                raise ValueError(f"adapter {name}: {error}") from error
            layer.factors[name] = (a, b, path)
    order = {key: i for i, key in enumerate(paths)}
    layers = sorted(found.values(), key=lambda layer: order[id(layer.module)])
    first = layers[0]
    for layer in layers:
        weight, wanted = layer.module.weight, first.module.weight
        assert isinstance(weight, Tensor) and isinstance(wanted, Tensor)
        if (weight.dtype, weight.device) != (wanted.dtype, wanted.device):
            raise ValueError(
                f"layer {layer.path} has a weight of {weight.dtype} on {weight.device}; wanted that of {first.path}, "
                f"{wanted.dtype} on {wanted.device}, as all layers are changed in one call"
            )
    return layers


def _obstacle(module: nn.Module, paths: list[str], parameters: Mapping[int, list[str]]) -> str:
    """Why a layer can't have adapters, or nothing."""
    transformers = sys.modules.get("transformers.pytorch_utils")  # not imported: then the model has none of its layers
    if type(module) is not nn.Linear and type(module) is not getattr(transformers, "Conv1D", nn.Linear):
        return f"is a {type(module).__name__}; only nn.Linear and transformers' Conv1D are supported, not quantized"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is not a plain parameter (after torch.nn.utils.prune, call prune.remove)"
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor (quantized or distributed?)"
    if weight.dtype not in FLOATS or weight.layout != torch.strided:
        return f"its weight is {weight.dtype}, {weight.layout}; wanted float32, float16 or bfloat16, strided"
    if weight.is_meta:
        return "its weight is on the meta device"
    if (weight.shape[1] > 1 and weight.stride(1) != 1) or (weight.shape[0] > 1 and weight.stride(0) < weight.shape[1]):
        return f"its weight has strides {list(weight.stride())}; wanted contiguous rows that don't overlap"
    if tied := [name for name in parameters[id(weight)] if name not in [f"{p}.weight".lstrip(".") for p in paths]]:
        return f"its weight is tied to {', '.join(tied)}"
    return ""


def _scaling_of(adapter: Adapter, path: str) -> float:
    scaling = adapter.scaling.get(path) if isinstance(adapter.scaling, Mapping) else adapter.scaling
    if not isinstance(scaling, int | float) or not _fits_float32(scaling):
        raise ValueError(f"layer {path}: scaling is {scaling!r}; wanted a number that float32 holds")
    return float(scaling)


def _fits_float32(number: float) -> bool:
    """As neither an infinity nor NaN, and, unless it is 0, with all digits."""
    limits = torch.finfo(torch.float32)
    return number == 0 or limits.tiny <= abs(number) <= limits.max


def _common_scaling(adapter: Adapter) -> float:
    """The commonest scaling that isn't 0, or 0; gates are multiplied by it."""
    scalings = Counter(s for path in adapter.layers if (s := _scaling_of(adapter, path)) != 0)
    return scalings.most_common(1)[0][0] if scalings else 0.0


def _stack(
    found: Sequence[_Found], adapters: Mapping[str, Adapter], scalings: Sequence[float], keep_base: bool, progress: bool
) -> list[Layer]:
    layers = []
    with progress_bar("Stacking adapters", len(found), progress) as advance:
        for layer in found:
            weight = layer.module.weight
            assert isinstance(weight, nn.Parameter)
            cols, rows = weight.shape if layer.transposed else weight.shape[::-1]
            used = [layer.factors[name][0].shape[0] if name in layer.factors else 0 for name in adapters]
            a = weight.new_zeros((len(adapters), max(used), cols))
            b = weight.new_zeros((len(adapters), rows, max(used)))
            for i, (name, adapter) in enumerate(adapters.items()):
                if name in layer.factors:
                    from_a, from_b, path = layer.factors[name]
                    scaling = _scaling_of(adapter, path)
                    ratio = 1.0 if scaling == scalings[i] else scaling / scalings[i]
                    try:
                        if not _fits_float32(ratio):
                            raise ValueError(
                                f"scaling is {scaling}; that of most layers is {scalings[i]}, and float32 does not "
                                "hold their ratio"
                            )
                        a[i, : used[i]] = _fitted(from_a, 1.0, weight)
                        b[i, :, : used[i]] = _fitted(from_b, ratio, weight)
                    except ValueError as error:
                        raise ValueError(f"adapter {name}: layer {path}: {error}") from error
            layers.append(
                Layer(
                    layer.path,
                    layer.module,
                    weight,
                    weight.detach(),
                    a,
                    b,
                    b.transpose(1, 2).contiguous() if layer.transposed else a,
                    a.transpose(1, 2).contiguous() if layer.transposed else b,
                    weight.detach().clone() if keep_base else None,
                    _ranks(used, max(used), weight.device),
                )
            )
            advance()
    return layers


def _ranks(used: Sequence[int], rank: int, device: torch.device) -> Tensor | None:
    return None if set(used) == {rank} else torch.tensor(used, dtype=torch.int32, device=device)


def _fitted(t: Tensor, ratio: float, like: Tensor) -> Tensor:
    """Times a ratio, in the dtype and on the device of the model."""
    t = t.detach()
    scaled = t if ratio == 1 else t.to(torch.promote_types(t.dtype, torch.float32)) * ratio
    out = scaled.to(like.device, like.dtype)
    if (ratio != 1 or out.dtype != t.dtype) and bool((~out.isfinite() & t.isfinite().to(out.device)).any()):
        factor = "" if ratio == 1 else f", times a ratio of scalings of {ratio:g},"
        raise ValueError(f"numbers of {t.dtype}{factor} are too large for the model's {out.dtype}")
    return out


def _check_memory(model: nn.Module, found: Sequence[_Found]) -> None:
    """No weight of a layer shares memory with another tensor of the model, which would be changed with it."""
    weights = {id(layer.module.weight) for layer in found}
    device = found[0].module._parameters["weight"].device  # type: ignore[union-attr]
    extents = []
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if torch.nn.parameter.is_lazy(t) or t.device != device or t.layout != torch.strided or t.numel() == 0:
            continue
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        try:
            extents.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size(), name, id(t) in weights))
        except RuntimeError:  # some kinds of quantized tensors have no memory of their own
            continue
    # By their beginnings: what overlaps anything before it overlaps the one that ends last.
    before: dict[bool, tuple[int, str]] = {True: (0, ""), False: (0, "")}
    for begin, end, name, written in sorted(extents):
        for other_written, (other_end, other) in before.items():
            if (written or other_written) and begin < other_end:
                raise ValueError(f"weights of the model overlap in memory, and can't be adapted: {other} and {name}")
        before[written] = max(before[written], (end, name))
