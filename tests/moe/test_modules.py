"""MoEMLP: a module like others, that computes what its ops say."""

import copy
import pickle
from typing import Any

import effk
import pytest
import torch
from effk.moe import MoEMLP
from torch import Tensor, nn

from ..kit.tensors import generator, same_bits
from ..lscd.test_modules import same_state
from .strategies import Mlp, dense_mlp, dense_route

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
ACTIVATIONS = ["swiglu", "geglu", "geglu_tanh", "relu2"]
COLS, INNER, EXPERTS = 21, 13, 6  # nothing is a multiple of anything
UNIT = 2.0**-24
# Roundings of a gradient one after the other: both products, there and back, sums over 17 tokens' pairs, and 32 in
# between. They don't all go the same way, which makes up for sums that cancel.
COUNT = 2 * COLS + 2 * INNER + 3 * 17 + 32


def made(k: int = 2, *, dtype: torch.dtype = torch.float32, **options: Any) -> MoEMLP:
    torch.manual_seed(0)
    return MoEMLP(COLS, INNER, EXPERTS, k, dtype=dtype, **options)


def tokens(*lead: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*lead, COLS, generator=generator(seed)).to(dtype)


def case_of(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, activation: str) -> Mlp:
    """These tensors, for their error bound."""
    experts, cols, inner = w2.shape
    case = Mlp(cols, inner, experts, tuple(x.shape[:-1]), ids.shape[-1], activation, dtype=x.dtype)
    case.__dict__.update(x=x, w13=w13, w2=w2, weights=weights, ids=ids)
    return case


# ---- what it computes


@pytest.mark.parametrize("gemm", ["auto", "grouped", "dense"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_forward_is_within_the_bound(dtype: torch.dtype, activation: str, gemm: str) -> None:
    module = made(activation=activation, gemm=gemm, dtype=dtype)
    x = tokens(3, 5, dtype=dtype)
    weights, ids = module.route(x)
    y = module(x)
    assert y.dtype == dtype
    case_of(x, module.w13.detach(), module.w2.detach(), weights.detach(), ids, activation).exact(UNIT).assert_holds(y)
    assert same_bits(module(x, weights, ids), y)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("balance", [True, False])
def test_route_is_the_op_on_the_scores(score: str, renormalize: bool, balance: bool) -> None:
    module = made(3, score=score, renormalize=renormalize, balance=balance, scale=2.5)
    x = tokens(40)
    if balance:
        module.expert_bias.copy_(torch.linspace(1, -1, EXPERTS))
    wanted, ids = effk.moe.route(module.router(x), 3, module.expert_bias, score=score, renormalize=renormalize)
    got, got_ids = module.route(x)
    assert torch.equal(got_ids, ids) and same_bits(got, wanted * 2.5)
    with torch.no_grad():  # the bias took part in the choice, and in nothing else
        scores = module.router(x).softmax(-1) if score == "softmax" else module.router(x).sigmoid()
        top = (scores + (module.expert_bias if balance else 0)).topk(3).indices
        assert torch.equal(ids, top) and torch.equal(ids, scores.topk(3).indices) == (not balance)


def test_weights_of_any_dtype_and_ids_of_both() -> None:
    module, x = made(router=False), tokens(4)
    weights, ids = torch.tensor([[0.5, 2.0]] * 4), torch.tensor([[0, 5], [3, 3], [-1, 2], [-1, -1]])
    y = module(x, weights, ids)
    for dtype in (*FLOATS, torch.float64):
        assert same_bits(module(x, weights.to(dtype), ids.int()), y)
    assert not y[3].any() and y[:3].any(1).all()


def test_gradients_are_those_of_the_formula() -> None:
    """In float32, against float64."""
    module = made(3, score="sigmoid", scale=1.5)
    x, g = tokens(17).requires_grad_(), tokens(17, seed=2)
    module(x).backward(g)
    names = dict(module.named_parameters())
    leaves = [t.detach().double().requires_grad_() for t in (x, *names.values())]
    x64, (w13, w2, router) = leaves[0], leaves[1:]
    weights, ids = dense_route(x64 @ router.T, 3, score="sigmoid")
    dense_mlp(x64, w13, w2, 1.5 * weights, ids).backward(g.double())
    for got, leaf in zip((x, *names.values()), leaves, strict=True):
        assert got.grad is not None and leaf.grad is not None
        assert (got.grad - leaf.grad).norm() <= COUNT * UNIT * leaf.grad.norm() and leaf.grad.any()


def test_no_tokens() -> None:
    module, x = made(balance=True), tokens(2, 0).requires_grad_()
    y = module(x)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape and not module.w13.grad.any()
    module.update_bias_(module.route(x)[1])
    assert not module.expert_bias.any()


def test_any_module_may_route() -> None:
    module = made()
    module.router = nn.Sequential(nn.Linear(COLS, 4), nn.Linear(4, EXPERTS))
    y = module(tokens(3))
    y.sum().backward()
    assert module.router[0].weight.grad.any()
    module.reset_parameters()  # of what is not the module's own kind nothing


# ---- balancing


def test_update_bias_moves_loads_to_the_mean() -> None:
    module = made(balance=True)
    # Loads 4, 3, 2, 2, 1, 0; a pair without an expert doesn't count: the mean is 2.
    ids = torch.tensor([[0, 1, 2], [0, 1, 3], [0, 1, 2], [0, 3, 4], [-1, -1, -1]])
    module.update_bias_(ids, 0.5)
    assert module.expert_bias.tolist() == [-0.5, -0.5, 0, 0, 0.5, 0.5]
    module.update_bias_(ids.int()[:, :1])  # only expert 0; by default a thousandth
    wanted = torch.tensor([-0.5, -0.5, 0, 0, 0.5, 0.5]) + 0.001 * torch.tensor([-1, 1, 1, 1, 1, 1.0])
    assert torch.allclose(module.expert_bias, wanted, rtol=2.0**-22, atol=0)


def test_updates_even_out_a_skewed_router() -> None:
    module = made(balance=True, score="sigmoid")
    x = tokens(400)
    with torch.no_grad():
        module.router.weight[0] += 0.3 * x.mean(0) / x.mean(0).norm() ** 2

    def spread() -> float:
        counts = module.route(x)[1].flatten().bincount(minlength=EXPERTS).double()
        return (counts.max() / counts.mean()).item()

    before = spread()
    for _ in range(200):
        module.update_bias_(module.route(x)[1], 0.002)
    assert spread() < 1.1 < before


# ---- a module like others


def test_reset_parameters() -> None:
    module = made(balance=True)
    before = copy.deepcopy(module)
    module.expert_bias.fill_(1)
    torch.manual_seed(0)
    module.reset_parameters()
    assert not module.expert_bias.any()
    for (name, w), old in zip(module.named_parameters(), before.parameters(), strict=True):
        bound = w.shape[-1] ** -0.5  # what is summed: x's features, or the inner ones
        assert 0.8 * bound < w.abs().max() <= bound, name
        assert w.abs().mean().item() == pytest.approx(bound / 2, rel=0.2)  # uniform
        assert w.shape == old.shape


def test_state_dict() -> None:
    module, other = made(balance=True), made(balance=True)
    assert list(module.state_dict()) == ["w13", "w2", "expert_bias", "router.weight"]
    assert list(made(router=False).state_dict()) == ["w13", "w2"]
    assert module.w13.shape == (EXPERTS, 2 * INNER, COLS) and module.w2.shape == (EXPERTS, COLS, INNER)
    assert made(activation="relu2").w13.shape == (EXPERTS, INNER, COLS)
    with torch.no_grad():
        for t in module.state_dict().values():
            t.normal_()
    other.load_state_dict(module.state_dict())
    assert same_state(other, module) and same_bits(other(tokens(3)), module(tokens(3)))


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copy_of: Any) -> None:
    module = made(balance=True)
    again = copy_of(module)
    assert same_state(again, module) and again.w13.data_ptr() != module.w13.data_ptr()
    assert same_bits(again(tokens(2)), module(tokens(2)))


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_casts_leave_the_balancing_bias(dtype: torch.dtype) -> None:
    module = made(balance=True)
    module.expert_bias += 0.1
    bias = module.expert_bias.clone()
    module.to(dtype)
    assert module.w13.dtype == module.w2.dtype == module.router.weight.dtype == dtype
    assert same_bits(module.expert_bias, bias) and module(tokens(2, dtype=dtype)).dtype == dtype


def test_meta() -> None:
    module = MoEMLP(COLS, INNER, EXPERTS, balance=True, device="meta", dtype=torch.bfloat16)
    y = module(torch.empty(2, 3, COLS, device="meta", dtype=torch.bfloat16))
    assert y.is_meta and y.shape == (2, 3, COLS)
    full = module.to_empty(device="cpu")
    full.reset_parameters()
    assert full.expert_bias.dtype == torch.float32 and not full.expert_bias.any()
    assert full(tokens(2, dtype=torch.bfloat16)).isfinite().all()


def test_compile_and_export() -> None:
    module = made(balance=True, scale=2.0)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    tokens_dim = torch.export.Dim("tokens")
    exported = torch.export.export(module, (tokens(3),), dynamic_shapes=({0: tokens_dim},), strict=True).module()
    for n in (2, 7):
        x, grads = tokens(n), []
        assert same_bits(exported(x), module(x))
        for m in (compiled, module):
            module.zero_grad()
            y = m(x)
            y.backward(tokens(n, seed=2))
            grads.append([y, *(p.grad for p in module.parameters())])
        assert same_bits(grads[0][0], grads[1][0])
        # Of gradients, the compiler fuses what is between the ops.
        assert all((a - b).norm() <= COUNT * UNIT * b.norm() for a, b in zip(*grads, strict=True))


def test_autocast_casts_x() -> None:
    module, x = made(router=False), tokens(5)
    weights, ids = torch.ones(5, 2), torch.tensor([[0, 1]] * 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x.bfloat16(), weights, ids)
    assert same_bits(y, module(x.bfloat16().float(), weights, ids).bfloat16())
    with pytest.raises(RuntimeError, match="effk::moe_mlp"):
        module(x.bfloat16(), weights, ids)


def test_repr() -> None:
    module = made(3, balance=True, score="sigmoid", gemm="dense")
    assert "num_experts=6, activation=swiglu, gemm=dense, k=3, score=sigmoid" in repr(module)
    assert "balance=True" in repr(module) and " k=" not in repr(made(router=False))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"activation": "relu"}, "activation is 'relu'; wanted one of swiglu"),
        ({"gemm": "fast"}, "gemm is 'fast'"),
        ({"score": "tanh"}, "score is 'tanh'"),
        ({"k": 0}, "k is 0; wanted 1 to 6"),
        ({"k": 7}, "k is 7"),
        ({"router": False, "balance": True}, "balance needs a router"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**options)


def test_wrong_calls() -> None:
    module, x = made(router=False), tokens(2)
    with pytest.raises(ValueError, match="no router"):
        module(x)
    for pair in ((torch.ones(2, 2), None), (None, torch.zeros(2, 2, dtype=torch.int64))):
        with pytest.raises(ValueError, match="both of weights and ids"):
            module(x, *pair)
    with pytest.raises(RuntimeError, match=r"ids holds 6; wanted -1 to 5|ids"):
        module(x, torch.ones(2, 2), torch.tensor([[0, 1], [2, 6]]))
    with pytest.raises(ValueError, match="balance=True"):
        made().update_bias_(torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="moe_sort"):
        made(balance=True).update_bias_(torch.tensor([[6]]))
