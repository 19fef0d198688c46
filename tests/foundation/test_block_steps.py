"""Our own steps of a block that trains on a GPU, and their loops, which Triton interprets where it is without a GPU.

Without a GPU the steps go through stand-ins for the loops, in PyTorch.
"""

from __future__ import annotations

import copy
import importlib
import sys
from functools import partial
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scdlkit.foundation import _block_steps, _packed, _triton
from scdlkit.foundation._low_rank import low_rank
from scdlkit.foundation.model import Block, ScGPTConfig, ScGPTEncoder
from scdlkit.foundation.strategies._peft import inject

# of what is outside of masks, where it is interpreted
pytestmark = pytest.mark.filterwarnings("ignore:(invalid|overflow|divide):RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = torch.tensor(1_234_567_891, dtype=torch.int32, device=DEVICE)
LOOPS, STEPS = (f"scdlkit.foundation.{name}" for name in ("_block_triton", "_block_cuda"))


@pytest.fixture(scope="module")
def loops():
    triton = pytest.importorskip("triton", reason="needs Triton, which comes with PyTorch for CUDA")
    if DEVICE == "cpu" and not triton.knobs.runtime.interpret:
        pytest.skip("there is a GPU, but not for this PyTorch")
    return importlib.import_module(LOOPS)


@pytest.fixture
def steps(monkeypatch):
    if DEVICE == "cuda":
        return importlib.import_module(STEPS)
    monkeypatch.setitem(sys.modules, LOOPS, by_pytorch())
    monkeypatch.delitem(sys.modules, STEPS, raising=False)
    found = importlib.import_module(STEPS)
    monkeypatch.delitem(sys.modules, STEPS)
    monkeypatch.setattr(found, "loops", sys.modules[LOOPS])
    return found


def by_pytorch() -> ModuleType:
    """The loops once more, by autograd in double precision."""

    def whole(x, branch, branch_bias, weight, bias, eps, seed, p):
        total = x + dropped(branch + branch_bias, p, seed)
        return F.layer_norm(total, weight.shape, weight, bias, eps), total

    def add_and_norm(x, branch, branch_bias, weight, bias, eps, seed, p):
        branch_bias = torch.zeros_like(bias) if branch_bias is None else branch_bias
        exact = (part.double() for part in (x, branch, branch_bias, weight, bias))
        return tuple(part.to(x.dtype) for part in whole(*exact, eps, seed, p))

    def add_and_norm_back(slope, total, weight, eps, seed, p):
        # the branch has been added to the total already: what is left of it is its dropout
        zero = torch.zeros(slope.shape[1])
        parts = [part.double().requires_grad_() for part in (total, torch.zeros_like(total), zero, weight, zero)]
        with torch.enable_grad():
            out, _ = whole(*parts, eps, seed, p)
        x, branch, branch_bias, of_weight, bias = torch.autograd.grad(out, parts, slope.double())
        return x.to(slope.dtype), branch.to(slope.dtype), of_weight.float(), bias.float(), branch_bias.float()

    def relu_dropout(x, bias, seed, p):
        return dropped(F.relu(x.double() + bias), p, seed).to(x.dtype)

    def relu_dropout_back(slope, out, p):
        of_x = torch.where(out > 0, slope.double() / (1 - p), 0.0)
        return of_x.to(slope.dtype), of_x.sum(0).float()

    def dropout(x, seed, p):
        return dropped(x.double(), p, seed).to(x.dtype)

    def side_by_side(parts):
        together = torch.cat(parts, dim=1)
        return together, together.float().sum(0)

    module = ModuleType(LOOPS)
    vars(module).update(
        add_and_norm=add_and_norm,
        add_and_norm_back=add_and_norm_back,
        relu_dropout=relu_dropout,
        relu_dropout_back=relu_dropout_back,
        dropout=dropout,
        side_by_side=side_by_side,
    )
    return module


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def stays(n_rows: int, width: int, seed: Tensor, p: float) -> Tensor:
    """What dropout leaves, by a hash of row and column."""

    def mix(x: np.ndarray) -> np.ndarray:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
        return x ^ (x >> 16)

    keys = mix((np.arange(n_rows, dtype=np.uint64) + mix(np.array(int(seed), np.uint64))) & 0xFFFFFFFF)
    kept = mix(keys[:, None] ^ np.arange(width, dtype=np.uint64)) >> 8 >= round(p * 2**24)
    return torch.from_numpy(kept).to(DEVICE)


def dropped(x: Tensor, p: float, seed: Tensor | None = SEED) -> Tensor:
    return x if seed is None else torch.where(stays(*x.shape, seed, p), x / (1 - p), 0.0)


def check(found, expected, bits: int = 8):
    """Within some roundings of the largest, and not by chance the same."""
    for one, other in zip(found, (part.detach() for part in expected), strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other, rtol=0, atol=4 * float(other.abs().max()) / 2**bits + 1e-12)


SHAPES = [(1, 8), (7, 96), (33, 64), (5, 513), (3, 1030)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("biased", [False, True])
def test_add_and_norm(loops, shape, p, biased):
    half = [random(*shape, seed=i, dtype=torch.bfloat16) for i in range(3)]
    x, branch, slope = half
    weight, bias, branch_bias = (random(shape[1], seed=i) for i in range(3, 6))
    exact = [part.double().requires_grad_() for part in (x, branch, weight, bias, branch_bias)]
    total = exact[0] + dropped(exact[1] + (exact[4] if biased else 0), p)
    expected = F.layer_norm(total, (shape[1],), exact[2], exact[3], 1e-5)
    out, kept = loops.add_and_norm(x, branch, branch_bias if biased else None, weight, bias, 1e-5, SEED, p)
    check((out, kept), (expected, total))
    slopes = torch.autograd.grad(expected, exact if biased else exact[:4], slope.double())
    check(loops.add_and_norm_back(slope, kept, weight, 1e-5, SEED, p)[: len(slopes)], slopes, bits=7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_relu_dropout(loops, shape, p):
    x, slope = (random(*shape, seed=i, dtype=torch.bfloat16) for i in range(2))
    bias = random(shape[1], seed=2)
    exact = [part.double().requires_grad_() for part in (x, bias)]
    expected = dropped(F.relu(exact[0] + exact[1]), p)
    out = loops.relu_dropout(x, bias, SEED, p)
    check([out], [expected])
    check(loops.relu_dropout_back(slope, out, p), torch.autograd.grad(expected, exact, slope.double()))


@pytest.mark.parametrize("shape", SHAPES)
def test_dropout(loops, shape):
    x = random(*shape, seed=0, dtype=torch.bfloat16)
    check([loops.dropout(x, SEED, 0.2)], [dropped(x.double(), 0.2)])
    assert torch.equal(loops.dropout(x, None, 0.0), x)


def test_what_is_no_number_is_seen(loops):
    x = torch.tensor([[torch.nan, -1.0, torch.inf, 2.0]], dtype=torch.bfloat16, device=DEVICE)
    zero = torch.zeros(4, device=DEVICE)
    assert str(loops.relu_dropout(x, zero, SEED, 0.0).tolist()) == "[[nan, 0.0, inf, 2.0]]"
    out, _ = loops.add_and_norm(x, x, None, zero + 1, zero, 1e-5, SEED, 0.0)
    assert out.isnan().all()


@pytest.mark.parametrize("shape", [*SHAPES, (1500, 24)])
def test_side_by_side(loops, shape):
    parts = [random(*shape, seed=i, dtype=torch.bfloat16) for i in range(3)]
    together, sums = loops.side_by_side(parts)
    assert torch.equal(together, torch.cat(parts, dim=1))
    torch.testing.assert_close(sums, together.float().sum(0), rtol=1e-5, atol=1e-3)


def test_dropout_is_of_its_place_and_seed_alone(loops):
    ones = torch.ones(500, 64, dtype=torch.bfloat16, device=DEVICE)
    zero = torch.zeros(64, device=DEVICE)
    masks = [(loops.relu_dropout(ones, zero, seed, 0.3) == 0).cpu().numpy() for seed in (SEED, SEED, SEED + 1)]
    assert (masks[0] == masks[1]).all()
    n = masks[0].size
    for mask in (masks[0], masks[2]):
        assert abs(mask.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / n)
    # neighbours in any direction, and the same place under another seed, have nothing to do with each other
    for one, other in (
        (masks[0], masks[2]),
        (masks[0][1:], masks[0][:-1]),
        (masks[0][:, 1:], masks[0][:, :-1]),
        (masks[0][1:], masks[2][:-1]),
    ):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(n)


class Wrapped(nn.Module):
    """Something around a layer, which has to be asked as a whole."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


LENGTHS = [9, 6, 4]


def gradients(block: Block, x: Tensor, cells, slope: Tensor, **how: bool) -> dict[str, Tensor | None]:
    x = x.clone().requires_grad_()
    out = block.compute(x, cells, **how)
    out.backward(slope.to(out.dtype))
    of_parameters = {name.replace(".layer", ""): parameter.grad for name, parameter in block.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **of_parameters}


def compare(found: list[dict[str, Tensor | None]], exact: dict[str, Tensor | None]) -> None:
    """Gradients by PyTorch and by us are about as near to the exact ones."""
    for name, expected in exact.items():
        by_pytorch, by_us = (values[name] for values in found)
        assert (by_us is None) == (expected is None), name
        if expected is None or name == "k.bias":  # which is zero but for rounding
            continue
        assert by_us.shape == expected.shape and by_us.dtype is by_pytorch.dtype, name
        others, error = (float((one.double() - expected).norm() / expected.norm()) for one in (by_pytorch, by_us))
        assert error < max(1.5 * others, 0.01), (name, others, error)


def pack(x: Tensor) -> Tensor:
    return torch.cat([cell[:n] for cell, n in zip(x, LENGTHS, strict=True)])


@pytest.mark.parametrize("how", ["all", "cls_only", "again"])
@pytest.mark.parametrize("changed", ["", "q", "out", "fc1", "norm1", "frozen", "biases"])
@pytest.mark.parametrize("layout", ["padded", "packed", "alike"])
def test_a_block_has_the_gradients_of_pytorch(steps, monkeypatch, fits, layout, changed, how):
    torch.manual_seed(0)
    block = Block(ScGPTConfig(10, embsize=32, nheads=2, d_hid=48, nlayers=1, dropout=0.0)).to(DEVICE).train()
    for name, parameter in block.named_parameters():
        parameter.requires_grad_({"frozen": False, "biases": name.endswith("bias")}.get(changed, True))
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    with torch.no_grad():  # no number so near zero that rounding moves it across, which a gradient would show
        block.fc1.weight *= 0.2
        block.fc1.bias[:] = torch.tensor([1.0, -1.0], device=DEVICE).repeat(24)
    if changed in {"q", "out", "fc1", "norm1"}:
        setattr(block, changed, Wrapped(getattr(block, changed)))
    options = {how: True} if how != "all" else {}
    x = random(3, 9, 32, seed=1, dtype=torch.bfloat16)
    slope = random(3, 1 if how == "cls_only" else 9, 32, seed=2, dtype=torch.bfloat16)
    keep = torch.arange(9, device=DEVICE) < torch.tensor(LENGTHS, device=DEVICE)[:, None]
    if layout == "alike":
        keep[:] = True
    if how != "cls_only":
        slope *= keep[..., None]  # padding means nothing
    exact = gradients(copy.deepcopy(block).double(), x.double(), keep[:, None, None], slope.double(), **options)
    cells = keep[:, None, None]
    if layout == "packed":
        starts = torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32, device=DEVICE)
        cells, x, exact["x"] = _packed.Packed(starts, 9, alike=False), pack(x), pack(exact["x"])
        slope, exact["out"] = (part[:, 0] if how == "cls_only" else pack(part) for part in (slope, exact["out"]))
        if DEVICE == "cpu":
            monkeypatch.setattr(_packed, "_flash_kernel", lambda: fits.attend_by_cell)
    elif layout == "alike":
        starts = torch.arange(0, 28, 9, dtype=torch.int32, device=DEVICE)
        cells, x, exact["x"] = _packed.Packed(starts, 9, alike=True), x.flatten(0, 1), exact["x"].flatten(0, 1)
        slope, exact["out"] = (part.flatten(0, 1) for part in (slope, exact["out"]))
    used: list[str] = []
    for name in ("projected", "add_and_norm", "relu_dropout", "whole_block"):
        step = getattr(steps, name)
        monkeypatch.setattr(steps, name, lambda *args, name=name, step=step: (used.append(name), step(*args))[1])
    found = []
    for own in (False, True):
        monkeypatch.setattr(_block_steps, "_loops", lambda x, own=own: steps if own else None)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            found.append(gradients(copy.deepcopy(block), x, cells, slope, **options))
        assert bool(used) == own
    whole = how == "all" and changed not in {"q", "out", "fc1", "norm1"}
    assert used.count("whole_block") == whole
    assert used.count("add_and_norm") == (0 if whole else 1 if changed == "norm1" else 2)
    assert used.count("relu_dropout") == (changed != "fc1" and not whole)
    compare(found, exact)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("thawed", [False, True])
def test_a_low_rank_update(steps, p, thawed):
    """Against autograd in double precision; cells may be rows or padded, and products views."""
    x, products = random(3, 9, 32, seed=1, dtype=torch.bfloat16), random(3, 9, 2, 24, seed=2, dtype=torch.bfloat16)
    down, up = random(4, 32, seed=3).requires_grad_(), random(24, 4, seed=4).requires_grad_()
    slope = random(3, 9, 24, seed=5, dtype=torch.bfloat16)
    given = [x.requires_grad_(), products.requires_grad_(thawed), down, up]
    asked = [i for i, part in enumerate(given) if part.requires_grad]
    torch.manual_seed(0)
    (seed,) = steps._seeds(1, p, x.device)
    torch.manual_seed(0)
    out = steps.low_rank(x, products[..., 1, :], down, up, 1.5, p)
    exact = [part.detach().double().requires_grad_() for part in given]
    kept = dropped(exact[0].flatten(0, 1), p, seed).view_as(exact[0])
    expected = exact[1][..., 1, :] + 1.5 * kept @ exact[2].T @ exact[3].T
    check([out], [expected], bits=7)
    found = torch.autograd.grad(out, [given[i] for i in asked], slope)
    check(found, torch.autograd.grad(expected, [exact[i] for i in asked], slope.double()), bits=7)


TARGETS = ["q", "k", "v", "out", "fc1", "fc2"]


@pytest.mark.parametrize("targets", [["q", "v"], ["out", "fc1"], TARGETS], ids="-".join)
@pytest.mark.parametrize("how", ["all", "cls_only"])
def test_a_block_with_lora_has_the_gradients_of_peft(steps, monkeypatch, targets, how):
    from peft import LoraConfig

    encoder = ScGPTEncoder(ScGPTConfig(10, embsize=32, nheads=2, d_hid=48, nlayers=1, dropout=0.0)).requires_grad_(
        False
    )
    names = [f"blocks.0.{name}" for name in targets]
    inject(encoder, LoraConfig(r=4, lora_alpha=6, lora_dropout=0.0, target_modules=names))
    block = encoder.blocks[0].to(DEVICE).train()
    with torch.no_grad():
        for number, (name, value) in enumerate(block.named_parameters()):
            if "lora_" in name:
                value.copy_(0.3 * random(*value.shape, seed=number))
        base = getattr(block.fc1, "base_layer", block.fc1)  # no number so near zero that rounding moves it across
        base.weight *= 0.2
        base.bias[:] = torch.tensor([1.0, -1.0], device=DEVICE).repeat(24)
        if "fc1" in targets:
            block.fc1.lora_B["default"].weight *= 0.1
    options = {"cls_only": True} if how == "cls_only" else {}
    x, slope = (random(3, 1 if i and options else 9, 32, seed=i, dtype=torch.bfloat16) for i in (0, 1))
    exact = gradients(copy.deepcopy(block).double(), x.double(), None, slope.double(), **options)
    used: list[str] = []
    for name in ("low_rank", "projected", "add_and_norm", "relu_dropout"):
        step = getattr(steps, name)
        monkeypatch.setattr(steps, name, lambda *args, name=name, step=step: (used.append(name), step(*args))[1])
    found = []
    for own in (False, True):
        monkeypatch.setattr(_block_steps, "_loops", lambda x, own=own: steps if own else None)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            found.append(gradients(copy.deepcopy(block), x, None, slope, **options))
        assert bool(used) == own
    assert used.count("low_rank") == len(targets) and used.count("relu_dropout") == 1
    compare(found, exact)


def test_other_updates_are_asked_of_peft():
    """Of another kind, switched off, folded in, hooked on to, or two at once."""
    from peft import LoraConfig

    def layer(**options):
        encoder = ScGPTEncoder(ScGPTConfig(10, embsize=32, nheads=2, d_hid=48, nlayers=1))
        inject(encoder, LoraConfig(r=4, lora_alpha=6, target_modules=["blocks.0.q"], **options))
        return encoder.blocks[0].q

    plain = layer(lora_dropout=0.1)
    update = low_rank(plain)
    assert update.base is plain.base_layer and update.scale == 1.5 and update.dropout == 0.1
    assert update.down.shape == (4, 32) and update.up.shape == (32, 4)
    assert low_rank(plain.eval()).dropout == 0.0 and low_rank(layer()).dropout == 0.0
    assert low_rank(plain.base_layer) is None and low_rank(Wrapped(plain)) is None
    assert low_rank(layer(use_dora=True)) is None and low_rank(layer(lora_bias=True)) is None
    for change in (
        lambda found: found.enable_adapters(False),
        lambda found: found.merge(),
        lambda found: found.register_forward_hook(lambda *_: None),
        lambda found: found.lora_A["default"].register_forward_hook(lambda *_: None),
        lambda found: setattr(found, "base_layer", Wrapped(found.base_layer)),
        lambda found: found.lora_dropout.update({"default": Wrapped(nn.Identity())}),
        lambda found: found.set_adapter([]),
    ):
        changed = layer()
        change(changed)
        assert low_rank(changed) is None


@pytest.mark.parametrize("how", ["all", "again"])
@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
@pytest.mark.parametrize("name", ["norm1", "norm2", "dropout", "q", "fc2"])
def test_what_hooks_on_to_a_block_is_asked(steps, monkeypatch, name, hook, how):
    if DEVICE == "cpu":
        monkeypatch.setattr(_block_steps, "_loops", lambda x: steps)
    block = Block(ScGPTConfig(10, embsize=32, nheads=2, d_hid=32, nlayers=1, dropout=0.0)).to(DEVICE).train()
    seen = []
    getattr(getattr(block, name), hook)(lambda *_: seen.append(name))
    x = random(3, 9, 32, seed=1, dtype=torch.bfloat16).requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        block.compute(x, None, again=how == "again").sum().backward()
    assert len(seen) == (3 if name == "dropout" else 1)


@pytest.mark.parametrize("put", ["dropout", "norm1"])
def test_what_takes_the_place_of_a_layer_is_asked(steps, monkeypatch, put):
    """A module of another class, though it has the same attributes."""
    if DEVICE == "cpu":
        monkeypatch.setattr(_block_steps, "_loops", lambda x: steps)
    block = Block(ScGPTConfig(10, embsize=32, nheads=2, d_hid=32, nlayers=1, dropout=0.0)).to(DEVICE).train()
    seen = []

    class Other(type(getattr(block, put))):
        def forward(self, x):
            seen.append(put)
            return super().forward(x)

    getattr(block, put).__class__ = Other
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        block.compute(random(3, 9, 32, seed=1, dtype=torch.bfloat16), None)
    assert len(seen) == (3 if put == "dropout" else 1)


def test_without_a_compiler_the_gpu_is_used_without_triton(monkeypatch, caplog):
    """Triton is there, and fails when it starts the first kernel."""
    norm = ModuleType("norm")
    monkeypatch.setitem(sys.modules, "scdlkit.foundation._layer_norm_triton", norm)
    ones, ran = torch.ones, []
    second = torch.device("cuda", 1)
    monkeypatch.setattr(
        torch, "ones", lambda *shape, device: ones(*shape) if device == second else pytest.fail("elsewhere")
    )

    def forget() -> None:
        _triton.kernels.cache_clear()
        _triton.works.cache_clear()
        caplog.clear()

    for fails in (True, False):

        def layer_norm_(*_, fails=fails):
            ran.append(fails)
            if fails:
                raise RuntimeError("Failed to find C compiler.")

        norm.layer_norm_ = layer_norm_
        forget()
        assert [_triton.kernels("_layer_norm_triton", second) for _ in range(2)] == [None if fails else norm] * 2
        assert caplog.text.count("cannot run (Failed to find C compiler.)") == fails
    assert ran == [True, False]  # each asked once
    forget()
    monkeypatch.setitem(sys.modules, "scdlkit.foundation._layer_norm_triton", None)  # as without Triton
    assert _triton.kernels("_layer_norm_triton", second) is None and not caplog.text
    forget()


def test_the_way_back_may_go_forward_again(steps, monkeypatch):
    """Gradient checkpointing draws the same dropout twice."""
    if DEVICE == "cpu":
        monkeypatch.setattr(_block_steps, "_loops", lambda x: steps)
    torch.manual_seed(0)
    block = Block(ScGPTConfig(10, embsize=32, nheads=2, d_hid=32, nlayers=1, dropout=0.3)).to(DEVICE).train()
    block.attention_dropout = 0.0
    x = random(3, 9, 32, seed=1, dtype=torch.bfloat16)
    found = []
    for seed, again in ((5, False), (5, True), (6, False)):
        given = x.clone().requires_grad_()
        torch.manual_seed(seed)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            if again:
                out = checkpoint(partial(block, again=True), given, None, use_reentrant=False)
            else:
                out = block(given, None, again=True)
            out.square().sum().backward()
        found.append((out.detach(), given.grad))
    once, twice, otherwise = found
    for one, other, third in zip(once, twice, otherwise, strict=True):
        assert torch.equal(one, other) and not torch.equal(one, third)
