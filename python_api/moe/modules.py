"""A layer of experts with its router."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from . import reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Self = TypeVar("Self", bound="MoEMLP")


class MoEMLP(nn.Module):
    """A layer of experts: y = sum over a token's k experts of weight * w2[e] activation(w13[e] x).

    The router is a linear layer without bias; `moe_route` makes weights and experts of its scores. `router` may be
    replaced by any other module that makes [..., num_experts] scores of x, and left out, where something else routes.

    With `balance`, the buffer `expert_bias` is added to the scores for the choice alone, and `update_bias_` moves it
    towards equal loads: balancing without a loss (Wang et al., 2024, arXiv:2408.15664). It stays float32 whatever
    dtype the module is cast to.

    With `group`, the experts are shared out over its ranks and computed by `effk.moe.mlp_ep`: each rank holds its own,
    every rank has the router, and all have to call the layer together, each with tokens of its own. A rank's
    state_dict has its experts. From the same seed on all ranks, routers are alike and experts those that one process
    would have: each rank draws all and keeps its own.

    Weights and x share a dtype: float32, float16 or bfloat16. Under autocast x is cast to that of the weights, and y
    to that of x.

    Args:
        hidden_size: of x and y.
        intermediate_size: of an expert, between its two products.
        num_experts: how many there are.
        k: experts of a token.
        activation: "swiglu", "geglu" or "geglu_tanh", with gates, or "relu2", without.
        gemm: "auto", "grouped" or "dense", see `effk.moe.mlp`.
        router: whether there is one.
        score: "softmax" or "sigmoid" of the router's scores.
        renormalize: whether a token's weights are made to add up to 1.
        scale: what they are multiplied by then (DeepSeek's routed scaling factor).
        balance: whether there is an `expert_bias`.
        group: a process group of torch.distributed; experts are this process' own without.
        stages: with a group, as of `effk.moe.mlp_ep`.
        device, dtype: of the weights.

    Attributes:
        w13: [experts, 2 intermediate_size, hidden_size], rows of the gates and then those they multiply;
            [experts, intermediate_size, hidden_size] for "relu2". experts: num_experts, or the rank's share of them.
        w2: [experts, hidden_size, intermediate_size].
        router: the linear layer or None.
        expert_bias: [num_experts] float32 or None.

    Raises:
        ValueError: an unknown activation, gemm or score; k isn't from 1 to num_experts; `balance` without a router;
            num_experts isn't a multiple of the group's ranks; `group` isn't one that this process is in.
    """

    expert_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        k: int = 2,
        *,
        activation: str = "swiglu",
        gemm: str = "auto",
        router: bool = True,
        score: str = "softmax",
        renormalize: bool = True,
        scale: float = 1.0,
        balance: bool = False,
        group: ProcessGroup | None = None,
        stages: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_option("activation", activation, reference.ACTIVATIONS)
        check_option("gemm", gemm, reference.GEMMS)
        check_option("score", score, reference.SCORES)
        if router and not 1 <= k <= num_experts:
            raise ValueError(f"k is {k}; wanted 1 to {num_experts}, the number of experts")
        if balance and not router:
            raise ValueError("balance needs a router")
        self.hidden_size, self.intermediate_size, self.num_experts = hidden_size, intermediate_size, num_experts
        self.k, self.activation, self.gemm = k, activation, gemm
        self.score, self.renormalize, self.scale = score, renormalize, scale
        if group is not None and not hasattr(group, "group_name"):  # what new_group gives to those outside
            raise ValueError(f"group is {group!r}; wanted a process group that this process is in")
        self.group, self.stages = None if group is None else group.group_name, stages
        self.rank, self.ranks = (0, 1) if group is None else (group.rank(), group.size())
        if num_experts % self.ranks:
            raise ValueError(f"num_experts is {num_experts}; wanted a multiple of the group's {self.ranks} ranks")
        experts = num_experts // self.ranks
        rows = intermediate_size * (1 if reference.ACTIVATIONS[activation] is None else 2)
        self.w13 = nn.Parameter(torch.empty(experts, rows, hidden_size, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(experts, hidden_size, intermediate_size, device=device, dtype=dtype))
        self.router: nn.Module | None = None
        if router:
            self.router = nn.Linear(hidden_size, num_experts, bias=False, device=device, dtype=dtype)
        bias = torch.zeros(num_experts, dtype=torch.float32, device=device) if balance else None
        self.register_buffer("expert_bias", bias)
        self._reset_experts()

    def reset_parameters(self) -> None:
        """Random weights, distributed as nn.Linear's, and no bias."""
        self._reset_experts()
        if isinstance(self.router, nn.Linear):
            self.router.reset_parameters()

    def _reset_experts(self) -> None:
        with torch.no_grad():
            first = self.rank * len(self.w13)
            for w in (self.w13, self.w2):
                bound = max(1, w.shape[2]) ** -0.5
                other = torch.empty_like(w[:1])  # of which nothing is kept
                for e in range(self.num_experts):
                    (w[e - first] if first <= e < first + len(w) else other).uniform_(-bound, bound)
            if self.expert_bias is not None:
                self.expert_bias.zero_()

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., hidden_size] -> weights [..., k] float32 and ids [..., k] int64, as `forward` takes them.

        Raises:
            ValueError: there is no router.
        """
        if self.router is None:
            raise ValueError("there is no router: give weights and ids")
        logits = self.router(x)
        weights, ids = torch.ops.effk.moe_route(
            logits, self.k, self.expert_bias, score=self.score, renormalize=self.renormalize
        )
        return weights if self.scale == 1 else weights * self.scale, ids

    def forward(self, x: Tensor, weights: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        """[..., hidden_size] -> the same.

        Args:
            x: tokens.
            weights: [..., k] of any float dtype, used as they are; without them the router chooses.
            ids: [..., k] int32 or int64, the experts, -1 for none.

        Raises:
            ValueError: only one of weights and ids, or neither and there is no router.
            RuntimeError: wrong dtypes or shapes; on a CPU also ids out of range.
        """
        if weights is None and ids is None:
            weights, ids = self.route(x)
        elif weights is None or ids is None:
            raise ValueError("wanted both of weights and ids, or neither")
        inside = x.to(self.w13.dtype) if _autocast(x) else x
        given, options = (inside, self.w13, self.w2, weights.float(), ids), {"activation": self.activation}
        if self.group is None:
            y = torch.ops.effk.moe_mlp(*given, **options, gemm=self.gemm)
        else:
            y = torch.ops.effk.moe_mlp_ep(*given, self.group, **options, stages=self.stages, gemm=self.gemm)
        return y.to(x.dtype)

    @torch.no_grad()
    def update_bias_(self, ids: Tensor, rate: float = 0.001) -> None:
        """Makes experts with less than the mean load likelier and those with more less likely, each by `rate`.

        To be called once a training step. Doesn't wait for the device.

        Args:
            ids: [..., k], what `route` chose in this step; where several processes train one model, for the tokens of
                all of them.
            rate: by how much the bias moves.

        Raises:
            ValueError: the module was made without `balance`.
            RuntimeError: wrong dtype or shape; on a CPU also ids out of range.
        """
        if self.expert_bias is None:
            raise ValueError("there is no expert_bias: make the module with balance=True")
        ends = torch.ops.effk.moe_sort(ids, self.num_experts)[2].long()
        counts = ends.diff(prepend=ends.new_zeros(1))
        self.expert_bias += rate * (counts.sum() - self.num_experts * counts).sign()

    def extra_repr(self) -> str:
        text = (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"num_experts={self.num_experts}, activation={self.activation}, gemm={self.gemm}"
        )
        if self.router is not None:
            text += f", k={self.k}, score={self.score}, renormalize={self.renormalize}, scale={self.scale:g}"
            text += f", balance={self.expert_bias is not None}"
        if self.group is not None:
            text += f", rank={self.rank} of {self.ranks}, stages={self.stages}"
        return text

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts, as `.to()` and its like ask."""
        before = self.expert_bias
        super()._apply(fn, recurse)
        if before is not None and self.expert_bias is not None and self.expert_bias.dtype != before.dtype:
            self.expert_bias = before.to(self.expert_bias.device)
        return self


def check_option(name: str, value: str, choices: object) -> None:
    names = [str(c) for c in choices]  # type: ignore[attr-defined]
    if value not in names:
        raise ValueError(f"{name} is {value!r}; wanted one of {', '.join(names)}")


def _autocast(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
