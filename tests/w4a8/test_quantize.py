"""quantize_ on models, the choice of 8-bit features, clipping and GPTQ."""

import copy
import itertools
import logging
import math
import sys
from typing import Any

import effk
import pytest
import torch
from effk.w4a8 import Linear, calibrate, measure_salience, modules, quantize_, reference, rounding
from torch import Tensor, nn

from ..kit.errors import roundings
from ..kit.tensors import same_bits
from ..lscd.test_modules import IDS, LEFT_DENSE, Terminal, Tied, pruned_linear, same_state
from .test_modules import integers

GROUP = 32
UNIT = 2.0**-24
WIDTHS = (40, 24, 33, 10)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp() -> nn.Sequential:
    model = nn.Sequential(*(nn.Linear(k, n) for k, n in itertools.pairwise(WIDTHS)))
    for i, linear in enumerate(model):
        with torch.no_grad():
            linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator(i)) / math.sqrt(WIDTHS[i]))
            linear.bias.copy_(torch.randn(linear.bias.shape, generator=generator(i + 5)))
    return model


LINEARS, FEATURES = 3, sum(WIDTHS[1:])
BATCHES = [torch.randn(4, WIDTHS[0], generator=generator(10 + i)) for i in range(6)]


def square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().sum()


def is8_of(module: Linear) -> Tensor:
    flags = torch.zeros(module.out_features, dtype=torch.bool)
    flags[module.perm[module.out_features - module.features8 :].long()] = True
    return flags


def correlated(tokens: int, cols: int) -> Tensor:
    """Inputs with a few strong directions."""
    strength = torch.linspace(0, 3, cols).exp()
    mix = torch.randn(cols, cols, generator=generator(1))
    return torch.randn(tokens, cols, generator=generator(0)) * strength @ mix / cols


# ---- what is replaced


def test_records_say_what_became_of_each_weight() -> None:
    model = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 20)).eval()
    first, second = quantize_(model, 0.25, scores={"0": torch.zeros(40), "2": torch.arange(20.0)}, group_size=32)
    assert isinstance(model[0], Linear) and not model[0].training and model[0].group_size == 32
    assert (first.names, first.shape, first.features8, first.skipped) == (("0",), (40, 64), 0, "")
    assert (second.features8, second.share8) == (15, 0.75) and is8_of(model[2]).tolist() == [False] * 5 + [True] * 15
    assert first.bytes_before == 40 * 64 * 4 and first.bytes_after == model[0].nbytes and first.bits == model[0].bits


def test_ties_are_kept() -> None:
    model = Tied()
    records = {r.names: r for r in quantize_(model, calibration=[IDS], method="gptq", loss=lambda m, b: m(b).sum())}
    assert model.first is model.second and isinstance(model.first, Linear)
    assert model.embed.weight is model.head.weight and "embed.weight" in records["head",].skipped
    assert not records["first", "second"].skipped


@pytest.mark.parametrize("reason", LEFT_DENSE)
def test_what_is_left_dense(reason: str) -> None:
    model = LEFT_DENSE[reason]()
    before = list(model.modules())
    records = quantize_(model, filter=(lambda name, linear: False) if reason == "filter" else None)
    assert list(model.modules()) == before
    assert records and all(reason in r.skipped and r.bytes_after == r.bytes_before for r in records)


@pytest.mark.parametrize("stage", range(5))
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_interruption_changes_nothing(stage: int, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While salience is measured, inputs are gathered or weights are quantized."""
    model = mlp()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[0].bias.requires_grad_(False)
    before = copy.deepcopy(model)
    # The model is called once a batch for salience and once for the inputs; in_4_bits runs in the backward pass.
    holder, name, after = [
        (calibrate, "call", 2),
        (calibrate, "in_4_bits", 4),
        (calibrate, "call", len(BATCHES) + 2),
        (modules, "_quantized", 0),
        (modules, "_quantized", 2),
    ][stage]
    original, count = getattr(holder, name), itertools.count()

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        if next(count) == after:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(holder, name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize_(model, calibration=BATCHES, method=method, clip=True, group_size=GROUP)
    assert same_state(model, before) and [m.training for m in model.modules()] == [True] * (1 + LINEARS)
    assert not any(m._forward_pre_hooks for m in model)
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad and torch.equal(p.grad, torch.ones_like(p))


@pytest.mark.parametrize("progress", [True, False])
def test_progress_and_log(progress: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with caplog.at_level(logging.INFO, logger="effk"):
        quantize_(mlp(), calibration=BATCHES, method="gptq", progress=progress)
    for title in ("Measuring salience", "Gathering inputs", "Quantizing weights"):
        assert (title in sys.stderr.getvalue()) == progress
    assert f"quantized {LINEARS} of {LINEARS} weights" in caplog.text
    assert f"{round(0.1 * FEATURES)} of {FEATURES} output features" in caplog.text


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ratio8": -0.1}, "ratio8"),
        ({"ratio8": math.nan}, "ratio8"),
        ({"group_size": 100}, "group_size"),
        ({"method": "awq"}, "method"),
        ({"budget": "bits"}, "budget"),
        ({"method": "gptq"}, "calibration"),
        ({"method": "gptq", "calibration": []}, "calibration"),
        ({"scores": {"0": torch.zeros(24)}}, "lack 1"),
        ({"scores": {str(i): torch.zeros(7) for i in range(LINEARS)}}, "shape"),
        ({"scores": {str(i): torch.full((n,), math.nan) for i, n in enumerate(WIDTHS[1:])}}, "finite"),
        ({"calibration": [torch.full((1, WIDTHS[0]), math.inf)], "method": "gptq", "ratio8": 0}, "inputs of 0"),
        ({"calibration": [torch.ones(1, WIDTHS[0])], "method": "gptq", "ratio8": 0, "damping": 0}, "0: .*singular"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    model = mlp()
    before = list(model.modules())
    with pytest.raises(ValueError, match=message):
        quantize_(model, **options)
    assert list(model.modules()) == before
    with pytest.raises(ValueError, match="from_linear"):
        quantize_(nn.Linear(4, 4))


# ---- which features get 8 bits


def exact_salience(samples: Tensor) -> tuple[Tensor, Tensor]:
    """The formula in float64, of g * D for each sample [S, N, K], and what float32 may lose of it: sums over K of
    products that are rounded, with two more roundings each, and sums over samples of squares.
    """
    d, size = samples.sum(2), samples.abs().sum(2)
    lost = roundings(samples.shape[2] + 2, UNIT) * size
    bound = (lost * (1 + size + lost)).sum(0) + roundings(len(d) + 4, UNIT) * (d.abs() + d**2).sum(0)
    return (d + d**2 / 2).abs().sum(0), bound


def test_salience_is_the_formula() -> None:
    model = mlp()
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    found = measure_salience(model, iter(BATCHES), square, group_size=GROUP)
    assert all(torch.equal(p.grad, torch.full_like(p, 7.0)) and p.requires_grad for p in model.parameters())
    assert model.training and all(m.training for m in model)
    assert list(found) == ["0", "1", "2"]
    for linear, salience in zip(model, found.values(), strict=True):
        w = linear.weight
        w4 = reference.w4a8_unpack(*reference.w4a8_pack(w.detach(), None, GROUP), GROUP)
        change = (w4 - w.detach()).double()
        samples = [torch.autograd.grad(square(model, b), w)[0].double() * change for b in BATCHES]
        wanted, bound = exact_salience(torch.stack(samples))
        assert ((salience.double() - wanted).abs() <= bound).all() and (wanted > 100 * bound).any()


@pytest.mark.parametrize("ratio8", [0.1, 0.3, 0.99])
def test_the_most_salient_features_of_the_whole_model_get_8_bits(ratio8: float) -> None:
    model = mlp()
    flat = torch.cat(list(measure_salience(model, BATCHES, square, group_size=GROUP).values()))
    records = quantize_(model, ratio8, BATCHES, loss=square, group_size=GROUP)
    chosen = torch.cat([is8_of(m) for m in model])
    assert int(chosen.sum()) == sum(r.features8 for r in records) == round(ratio8 * FEATURES)
    assert float(flat[chosen].min()) >= float(flat[~chosen].max())


def test_budget_in_parameters_weighs_what_features_cost() -> None:
    """Two layers with equal scores, one 4 times as wide: its features come last, and ratio8 counts weights."""
    narrow, wide = nn.Linear(32, 64), nn.Linear(128, 64)
    scores = {"0": torch.ones(64), "1": torch.full((64,), 2.0)}
    total = 64 * (32 + 128)
    for ratio8, n, w in ((0.1, 32, 0), (0.2, 64, 0), (0.5, 64, (total // 2 - 64 * 32) // 128), (1, 64, 64)):
        model = nn.ModuleList([copy.deepcopy(narrow), copy.deepcopy(wide)])
        records = quantize_(model, ratio8, scores=scores, budget="parameters")
        assert [r.features8 for r in records] == [n, w]
        assert sum(r.features8 * r.shape[1] for r in records) <= ratio8 * total
    model = nn.ModuleList([narrow, wide])
    assert [r.features8 for r in quantize_(model, 0.5, scores=scores)] == [0, 64]


def test_without_calibration_relative_error_decides() -> None:
    """Rows on the 4-bit grid have no error; others have, however the layer is scaled."""
    w = integers(-7, 8, 20, 64)
    w[:, ::GROUP], w[:, 1::GROUP] = -7, 8
    w[3, 5], w[11, 40] = 0.5, 0.25
    for scale in (1, 2.0**-60):
        model = nn.Sequential(nn.Linear(64, 20), nn.Linear(20, 8))
        with torch.no_grad():
            model[0].weight.copy_(w * scale)
            model[1].weight.zero_()
        quantize_(model, 2 / 28, group_size=GROUP)
        assert is8_of(model[0]).nonzero().flatten().tolist() == [3, 11] and not is8_of(model[1]).any()


def test_without_calibration_the_scale_of_a_layer_does_not_matter() -> None:
    plain, scaled = mlp(), mlp()
    with torch.no_grad():
        scaled[1].weight *= 2.0**20
    for model in (plain, scaled):
        quantize_(model, 0.3)
    assert all(torch.equal(a.perm, b.perm) and a.features8 == b.features8 for a, b in zip(plain, scaled, strict=True))


def test_scores_may_have_any_name_of_a_tied_weight() -> None:
    model = Tied()
    scores = {"second": torch.arange(model.first.out_features).float()}
    quantize_(model, 1 / model.first.out_features, scores=scores)
    assert is8_of(model.first).nonzero().item() == model.first.out_features - 1


class Wrapped(nn.Module):
    """Takes its batch in several ways, returns it in several."""

    def __init__(self, returns: str):
        super().__init__()
        self.inner, self.returns = mlp(), returns

    def forward(self, x: Tensor, scale: float) -> Any:
        y = self.inner(x * scale)
        loss = y.square().sum()
        return {"tensor": loss, "dict": {"loss": loss, "y": y}, "tuple": (loss, y)}[self.returns]


def test_batches_are_arguments() -> None:
    wanted = measure_salience(mlp(), [2 * b for b in BATCHES], square)
    for batches in ([(b, 2) for b in BATCHES], [[b, 2] for b in BATCHES], [{"x": b, "scale": 2} for b in BATCHES]):
        found = measure_salience(Wrapped("dict"), batches)
        assert all(same_bits(found[f"inner.{name}"], s) for name, s in wanted.items())


def test_a_model_without_loss_needs_one() -> None:
    with pytest.raises(ValueError, match="tuple without a loss"):
        quantize_(Wrapped("tuple"), calibration=[(b, 2) for b in BATCHES])
    with pytest.raises(ValueError, match="depend"):
        quantize_(mlp(), calibration=BATCHES, loss=lambda model, batch: batch.sum())


def test_default_loss_is_how_far_the_output_moves() -> None:
    """One layer, one token: each feature moves the output along signs s by s (x.D) / sqrt(N)."""
    model, x, n = nn.Sequential(mlp()[0]), BATCHES[0][:1], WIDTHS[1]
    w = model[0].weight.detach()
    change = (in_4_bits(w) - w).double() * x.double() / math.sqrt(n)
    found = measure_salience(model, [x], group_size=GROUP)["0"]
    (up, bound), (down, _) = (exact_salience(sign * change[None]) for sign in (1, -1))
    bound = bound + roundings(4, UNIT) * change.abs().sum(1) * (1 + change.abs().sum(1))  # of the gradient
    is_up, is_down = ((found.double() - wanted).abs() <= bound for wanted in (up, down))
    assert (is_up | is_down).all() and not is_up.all() and not is_down.all()
    assert same_bits(measure_salience(model, [x], group_size=GROUP)["0"], found)  # the same signs each time


def test_layers_that_calibration_does_not_reach(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"used": nn.Linear(32, 8), "unused": nn.Linear(32, 8)})
    plain = copy.deepcopy(model)
    quantize_(plain, 0)
    batches = [torch.ones(2, 32)]
    options: dict[str, Any] = {"calibration": batches, "method": "gptq", "loss": lambda m, b: m["used"](b).sum()}
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    quantize_(model, 0.5, **options)
    assert "doesn't depend on unused" in caplog.text and "inputs of unused" in caplog.text
    assert model["used"].features8 == 8 and same_state(model["unused"], plain["unused"])


# ---- clipping


def objective(w: Tensor, rounded: Tensor, importance: Tensor) -> Tensor:
    """[N, groups] in float64."""
    error = importance.double() * (rounded.double() - w.double()).square()
    return torch.stack([e.sum(1) for e in error.split(GROUP, 1)], 1)


def in_4_bits(w: Tensor) -> Tensor:
    return effk.w4a8.unpack(*effk.w4a8.pack(w, None, GROUP), GROUP)


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "positive", "constant", "zero"])
@pytest.mark.parametrize("weighted", [True, False])
def test_clipping_never_makes_the_error_larger(kind: str, weighted: bool) -> None:
    w = torch.randn(50, 70, generator=generator(0))
    w = {"normal": w, "heavy tails": w**3, "positive": w.abs(), "constant": torch.ones(50, 70), "zero": 0 * w}[kind]
    importance = torch.rand(70, generator=generator(1)) * 5 if weighted else None
    weights = torch.ones(70) if importance is None else importance
    before = objective(w, in_4_bits(w), weights)
    after = objective(w, in_4_bits(rounding.clipped(w, GROUP, importance)), weights)
    # The search compares float32 sums of GROUP terms, each with 3 more roundings.
    assert (after <= before * (1 + 2 * roundings(GROUP + 3, UNIT))).all()
    if kind == "normal":
        assert (after < before).float().mean() > 0.5


def test_clipping_uses_what_quantize_is_given() -> None:
    plain, data_free, weighted = (mlp() for _ in range(3))
    w = [m.weight.detach() for m in plain]
    x = [BATCHES[0] * torch.linspace(0, 3, WIDTHS[0])]
    for model, options in ((plain, {}), (data_free, {"clip": True}), (weighted, {"clip": True, "calibration": x})):
        quantize_(model, 0, group_size=GROUP, **options)
    importance = x[0].square().sum(0)
    errors = [objective(w[0], m[0].to_linear().weight.detach(), importance).sum() for m in (plain, data_free, weighted)]
    assert errors[2] < min(errors[:2])
    errors = [objective(w[0], m[0].to_linear().weight.detach(), torch.ones(1)).sum() for m in (plain, data_free)]
    assert errors[1] < errors[0]


def test_8_bit_features_are_not_clipped() -> None:
    plain, clip = mlp(), mlp()
    quantize_(plain, 1)
    quantize_(clip, 1, clip=True)
    assert same_state(plain, clip)


# ---- GPTQ


@pytest.mark.parametrize("clip", [True, False])
def test_gptq_of_uncorrelated_inputs_rounds_to_nearest(clip: bool) -> None:
    w = torch.randn(37, 70, generator=generator(0))
    is8 = torch.arange(37) % 3 == 0
    moments = torch.rand(70, generator=generator(1)) + 0.1
    nearest = torch.where(is8[:, None], w, rounding.clipped(w, GROUP, moments)) if clip else w
    found = rounding.gptq(w, moments.diag(), is8, GROUP, clip=clip)
    assert all(same_bits(a, b) for a, b in zip(found, effk.w4a8.pack(nearest, is8, GROUP), strict=True))


@pytest.mark.parametrize("later", [1, GROUP + 3])
def test_gptq_corrects_later_columns_best(later: int) -> None:
    """The error e of a column is best made up for by -e H01 / H11 in the only one it is correlated with."""
    w = torch.zeros(3, GROUP + 5)
    for group in (0, GROUP):  # so that scales are 1
        w[:, group + 2], w[:, group + 4] = -7, 8
    w[:, 0], w[:, later] = torch.tensor([[0.3, -1.4, 3.4], [2.4, 0.7, -2.6]])
    h = torch.eye(GROUP + 5)
    h[0, later] = h[later, 0] = 0.9
    h[later, later] = 1.5
    wanted = w.round()
    wanted[:, later] = (w[:, later] - (wanted[:, 0] - w[:, 0]) * 0.9 / 1.5).round()
    found = effk.w4a8.unpack(*rounding.gptq(w, h, torch.zeros(3, dtype=torch.bool), GROUP, damping=0), GROUP)
    assert torch.equal(found, wanted) and (wanted[:, later] != w[:, later].round()).all()


@pytest.mark.parametrize("is8", ["none", "some", "all"])
def test_gptq_is_nearer_than_rounding_to_nearest(is8: str) -> None:
    w = torch.randn(48, 150, generator=generator(3))
    flags = {"none": torch.zeros(48), "some": torch.arange(48) % 4 == 0, "all": torch.ones(48)}[is8].bool()
    x = correlated(400, 150)

    def output_error(packed: Any) -> Tensor:
        return ((effk.w4a8.unpack(*packed, GROUP) - w).double() @ x.double().mT).square().sum(1)

    nearest = output_error(effk.w4a8.pack(w, flags, GROUP))
    found = output_error(rounding.gptq(w, x.mT @ x, flags, GROUP))
    for kind in (flags, ~flags):
        if kind.any():
            assert found[kind].sum() < nearest[kind].sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gptq_in_a_model(dtype: torch.dtype) -> None:
    """As by hand: moments of the inputs that layers of the dense model get, in one pass or in several."""
    model = mlp().to(dtype).eval()
    batches = [b.to(dtype) for b in BATCHES]
    x, wanted = [b.clone() for b in batches], []
    with torch.no_grad():
        for linear in model:
            moments = sum(b.float().mT @ b.float() for b in x)
            wanted.append(rounding.gptq(linear.weight, moments, torch.zeros(len(linear.weight)).bool(), GROUP))
            x = [linear(b) for b in x]
    quantize_(model, 0, batches, method="gptq", group_size=GROUP)
    for module, tensors in zip(model, wanted, strict=True):
        assert all(same_bits(a, b) for a, b in zip(tensors, (t for _, t in module.named_buffers()), strict=True))


def test_several_passes_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    one, several = mlp(), mlp()
    quantize_(one, 0, BATCHES, method="gptq")
    # Room for the moments of the widest layer, or of one of the others.
    monkeypatch.setattr(modules, "MOMENT_BYTES", 4 * WIDTHS[0] ** 2)
    original, calls = calibrate.call, []
    monkeypatch.setattr(calibrate, "call", lambda model, batch: calls.append(batch) or original(model, batch))
    quantize_(several, 0, BATCHES, method="gptq")
    assert same_state(one, several) and len(calls) == LINEARS * len(BATCHES)


def test_calibration_runs_in_eval_mode() -> None:
    plain = mlp()
    model = nn.Sequential(*(m for linear in mlp() for m in (linear, nn.Dropout(0.5))))
    for m in (plain, model):
        quantize_(m, 0.2, BATCHES, method="gptq", loss=square)
    assert all(same_state(a, b) for a, b in zip(plain, model[::2], strict=True)) and model[1].training


def test_calibration_without_batches_is_refused() -> None:
    """Such as an iterator that something else used up: the score would silently be another."""
    model = mlp()
    with pytest.raises(ValueError, match="no batches"):
        quantize_(model, 0.1, iter([]), progress=False)
    assert type(model[0]) is nn.Linear


def test_nothing_to_quantize() -> None:
    """With calibration as without."""
    for calibration in (None, BATCHES):
        assert quantize_(nn.Sequential(nn.ReLU()), 0.1, calibration, progress=False) == []
        model = mlp()
        records = quantize_(model, 0.1, calibration, filter=lambda path, linear: False, progress=False)
        assert len(records) == len(list(mlp())) and all(r.skipped for r in records)


def test_quantized_in_inference_mode_runs_outside_of_it() -> None:
    model = mlp()
    with torch.inference_mode():
        quantize_(model, 0.1, progress=False)
    x = BATCHES[0].clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None and x.grad.count_nonzero() > 0


def test_nan_weights_make_only_their_features_nan() -> None:
    w = torch.randn(20, 70, generator=generator(0))
    plain = rounding.gptq(w, torch.eye(70) + 0.1, torch.arange(20) < 4, GROUP)
    w[2, 40], w[7, 3] = math.nan, math.inf
    bad = torch.zeros(20, dtype=torch.bool)
    bad[[2, 7]] = True
    found, wanted = (
        effk.w4a8.unpack(*p, GROUP) for p in (rounding.gptq(w, torch.eye(70) + 0.1, torch.arange(20) < 4, GROUP), plain)
    )
    assert same_bits(found[~bad], wanted[~bad]) and found[bad].isnan().any(1).all()


def test_a_weight_used_twice_sees_both_inputs() -> None:
    linear = pruned_linear(8, 8)
    model = nn.Sequential(linear, nn.ReLU(), linear).eval()
    x = torch.randn(5, 8, generator=generator(0))
    weight = modules.linear_weights(model)
    moments = calibrate.second_moments(model, weight, [x], True, False)["0"].double()
    y = model[1](linear(x)).detach()
    exact = x.double().mT @ x.double() + y.double().mT @ y.double()
    size = x.double().abs().mT @ x.double().abs() + y.double().abs().mT @ y.double().abs()
    assert ((moments - exact).abs() <= roundings(2 * 5 + 1, UNIT) * size).all()
