"""fused_cross_entropy against F.cross_entropy in float64, with an arbitrary upstream gradient for every token."""
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
from model import fused_cross_entropy
from tiny import relative

N, V, H = 37, 101, 24


@pytest.fixture(params=[1, 8, 64], ids=lambda rows: f"{rows}-row chunks")
def chunk_rows(request, monkeypatch):
    """37 rows: 37 chunks, 5 chunks of which the last is short, or one chunk."""
    monkeypatch.setitem(model.CHUNK_BYTES, "cpu", 4 * V * request.param)
    return request.param


def inputs(dtype=torch.float32, ignored=True):
    torch.manual_seed(1)
    hidden, weight = (2 * torch.randn(N, H)).to(dtype), torch.randn(V, H).to(dtype)
    targets, upstream = torch.randint(V, (N,)), torch.randn(N)
    if ignored:
        targets[[0, 3, 4, 20, N - 1]] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets, upstream


def oracle(hidden, weight, targets, upstream):
    """(losses, grad_hidden, grad_weight) in float64."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    losses = F.cross_entropy(h @ w.T, targets, reduction="none")
    return losses.detach(), *torch.autograd.grad(losses, (h, w), upstream.double())


@pytest.mark.parametrize("ignored", [False, True])
def test_losses_and_gradients_fp32(chunk_rows, ignored):
    hidden, weight, targets, upstream = inputs(ignored=ignored)
    losses = fused_cross_entropy(hidden, weight, targets)
    losses.backward(upstream)
    expected, grad_hidden, grad_weight = oracle(hidden, weight, targets, upstream)
    assert losses.dtype == torch.float32 and losses.shape == (N,)
    assert relative(losses, expected) < 1e-6
    assert relative(hidden.grad, grad_hidden) < 1e-5
    assert relative(weight.grad, grad_weight) < 1e-5
    assert (losses[targets == -100] == 0).all() and (hidden.grad[targets == -100] == 0).all()


def test_another_ignore_index():
    hidden, weight, targets, _ = inputs()
    losses = fused_cross_entropy(hidden, weight, targets.masked_fill(targets == -100, 7), ignore_index=7)
    assert ((losses == 0) == ((targets == 7) | (targets == -100))).all()


def test_large_logits_do_not_overflow():
    hidden, weight, targets, upstream = inputs(ignored=False)
    hidden = (hidden.detach() * 1000).requires_grad_()
    losses = fused_cross_entropy(hidden, weight, targets)
    losses.backward(upstream)
    expected, grad_hidden, _ = oracle(hidden, weight, targets, upstream)
    assert losses.max() > 1e4 and relative(losses, expected) < 1e-6
    assert torch.isfinite(hidden.grad).all() and relative(hidden.grad, grad_hidden) < 1e-5


def test_bf16_losses_are_float32(chunk_rows):
    hidden, weight, targets, upstream = inputs(torch.bfloat16)
    losses = fused_cross_entropy(hidden, weight, targets)
    losses.backward(upstream)
    expected, grad_hidden, grad_weight = oracle(hidden, weight, targets, upstream)
    assert losses.dtype == torch.float32
    assert (losses.double() - expected).abs().max() < 1e-4      # logits rounded to bf16 would be off by 0.02
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    # the gradients are rounded to bf16 (2^-9 an element) once or twice, but not summed in it
    assert relative(hidden.grad, grad_hidden) < 2 ** -8 and relative(weight.grad, grad_weight) < 2 ** -8


def test_bf16_weight_gradient_is_summed_in_float32(monkeypatch):
    """500 chunks whose gradients all point one way: summed in bf16, the last ones would be rounded away."""
    monkeypatch.setitem(model.CHUNK_BYTES, "cpu", 4 * V)
    hidden, weight = torch.rand(500, H).bfloat16(), torch.randn(V, H).bfloat16().requires_grad_()
    targets, upstream = torch.randint(V, (500,)), torch.rand(500)
    fused_cross_entropy(hidden, weight, targets).backward(upstream)
    assert relative(weight.grad, oracle(hidden, weight, targets, upstream)[2]) < 2 ** -8


def test_autocast_bf16_with_float32_weights(chunk_rows):
    hidden, weight, targets, upstream = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        losses = fused_cross_entropy(hidden, weight, targets)
    losses.backward(upstream)
    expected, grad_hidden, grad_weight = oracle(hidden.bfloat16(), weight.bfloat16(), targets, upstream)
    assert losses.dtype == torch.float32 and (losses.double() - expected).abs().max() < 1e-4
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert relative(hidden.grad, grad_hidden) < 2 ** -8 and relative(weight.grad, grad_weight) < 2 ** -8


@pytest.mark.parametrize("n", [0, N])
def test_nothing_to_score_is_a_connected_zero(n):
    hidden, weight, targets, upstream = inputs()
    hidden = hidden.detach()[:n].requires_grad_()
    losses = fused_cross_entropy(hidden, weight, torch.full_like(targets[:n], -100))
    assert losses.shape == (n,) and losses.dtype == torch.float32 and (losses == 0).all()
    losses.backward(upstream[:n])
    assert hidden.grad.shape == hidden.shape and (hidden.grad == 0).all()
    assert weight.grad.shape == weight.shape and (weight.grad == 0).all()


def test_tied_weight(chunk_rows):
    _, weight, targets, upstream = inputs()
    tokens = torch.randint(V, (N,))
    fused_cross_entropy(weight[tokens] * 2, weight, targets).backward(upstream)
    w = weight.detach().double().requires_grad_()
    F.cross_entropy(w[tokens] * 2 @ w.T, targets, reduction="none").backward(upstream.double())
    assert relative(weight.grad, w.grad) < 1e-5


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_one_frozen_input(frozen):
    hidden, weight, targets, upstream = inputs()
    {"weight": weight, "hidden": hidden}[frozen].requires_grad_(False)
    fused_cross_entropy(hidden, weight, targets).backward(upstream)
    _, grad_hidden, grad_weight = oracle(hidden, weight, targets, upstream)
    if frozen == "weight":
        assert weight.grad is None and relative(hidden.grad, grad_hidden) < 1e-5
    else:
        assert hidden.grad is None and relative(weight.grad, grad_weight) < 1e-5


def test_no_grad():
    hidden, weight, targets, upstream = inputs()
    with torch.no_grad():
        losses = fused_cross_entropy(hidden, weight, targets)
    assert not losses.requires_grad
    assert relative(losses, oracle(hidden, weight, targets, upstream)[0]) < 1e-6


def test_never_holds_all_the_logits(monkeypatch):
    n, v, h, rows = 512, 300, 8, 16
    monkeypatch.setitem(model.CHUNK_BYTES, "cpu", 4 * v * rows)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    hidden, weight = torch.randn(n, h, requires_grad=True), torch.randn(v, h, requires_grad=True)
    with Sizes():
        fused_cross_entropy(hidden, weight, torch.randint(v, (n,))).backward(torch.randn(n))
    assert hidden.grad is not None and max(sizes) == rows * v       # one chunk, where all would be 512 * 300


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch >= 2.13")
def test_agrees_with_torch():
    hidden, weight, targets, upstream = inputs()
    losses = fused_cross_entropy(hidden, weight, targets)
    theirs = F.linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert relative(losses, theirs) < 1e-6
    for a, b in zip(torch.autograd.grad(losses, (hidden, weight), upstream),
                    torch.autograd.grad(theirs, (hidden, weight), upstream)):
        assert relative(a, b) < 1e-5
