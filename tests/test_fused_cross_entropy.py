"""fused_cross_entropy against F.cross_entropy in float64, with any upstream gradient per token."""
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
from model import fused_cross_entropy
from tiny import relative

N = 37
V = 101
H = 24


@pytest.fixture(params=[1, 8, 64], ids=lambda rows: f"{rows}-row chunks")
def chunk_rows(request, monkeypatch):
    """37 rows: 37 chunks, 5 chunks of which the last is short, or one chunk."""
    monkeypatch.setitem(model.CHUNK_BYTES, "cpu", 4 * V * request.param)
    return request.param


def inputs(dtype=torch.float32, ignored=True):
    torch.manual_seed(1)
    hidden = (2 * torch.randn(N, H)).to(dtype)
    weight = torch.randn(V, H).to(dtype)
    targets = torch.randint(V, (N,))
    upstream = torch.randn(N)
    if ignored:
        targets[[0, 3, 4, 20, N - 1]] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets, upstream


def oracle(hidden, weight, targets, upstream):
    """(losses, grad_hidden, grad_weight) in float64."""
    h = hidden.detach().double().requires_grad_()
    w = weight.detach().double().requires_grad_()
    losses = F.cross_entropy(h @ w.T, targets, reduction="none")
    return losses.detach(), *torch.autograd.grad(losses, (h, w), upstream.double())


@pytest.mark.parametrize("ignored", [False, True])
def test_losses_and_gradients_fp32(chunk_rows, ignored):
    hidden, weight, targets, upstream = inputs(ignored=ignored)
    losses = fused_cross_entropy(hidden, weight, targets)
    losses.backward(upstream)
    expected, grad_hidden, grad_weight = oracle(hidden, weight, targets, upstream)
    assert losses.dtype == torch.float32
    assert losses.shape == (N,)
    assert relative(losses, expected) < 1e-6
    assert relative(hidden.grad, grad_hidden) < 1e-5
    assert relative(weight.grad, grad_weight) < 1e-5
    assert (losses[targets == -100] == 0).all()
    assert (hidden.grad[targets == -100] == 0).all()


def test_another_ignore_index():
    hidden, weight, targets, _ = inputs()
    targets = targets.masked_fill(targets == -100, 7)
    losses = fused_cross_entropy(hidden, weight, targets, ignore_index=7)
    assert ((losses == 0) == (targets == 7)).all()


def test_large_logits_do_not_overflow():
    hidden, weight, targets, upstream = inputs(ignored=False)
    hidden = (hidden.detach() * 1000).requires_grad_()
    losses = fused_cross_entropy(hidden, weight, targets)
    losses.backward(upstream)
    expected, grad_hidden, _ = oracle(hidden, weight, targets, upstream)
    assert losses.max() > 1e4
    assert relative(losses, expected) < 1e-6
    assert torch.isfinite(hidden.grad).all()
    assert relative(hidden.grad, grad_hidden) < 1e-5


def test_bf16_losses_are_float32(chunk_rows):
    hidden, weight, targets, upstream = inputs(torch.bfloat16)
    losses = fused_cross_entropy(hidden, weight, targets)
    losses.backward(upstream)
    expected, grad_hidden, grad_weight = oracle(hidden, weight, targets, upstream)
    assert losses.dtype == torch.float32
    assert (losses.double() - expected).abs().max() < 1e-4      # logits rounded to bf16: 0.02
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    # the gradients are rounded to bf16 (2^-9 per element) once or twice, but not summed in it
    assert relative(hidden.grad, grad_hidden) < 2 ** -8
    assert relative(weight.grad, grad_weight) < 2 ** -8


def test_bf16_weight_gradient_is_summed_in_float32(monkeypatch):
    """500 chunks whose gradients point one way: a sum in bf16 would round the last ones away."""
    monkeypatch.setitem(model.CHUNK_BYTES, "cpu", 4 * V)
    hidden = torch.rand(500, H).bfloat16()
    weight = torch.randn(V, H).bfloat16().requires_grad_()
    targets = torch.randint(V, (500,))
    upstream = torch.rand(500)
    fused_cross_entropy(hidden, weight, targets).backward(upstream)
    _, _, grad_weight = oracle(hidden, weight, targets, upstream)
    assert relative(weight.grad, grad_weight) < 2 ** -8


def test_autocast_bf16_with_float32_weights(chunk_rows):
    hidden, weight, targets, upstream = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        losses = fused_cross_entropy(hidden, weight, targets)
    losses.backward(upstream)
    expected, grad_hidden, grad_weight = oracle(hidden, weight, targets, upstream)
    assert losses.dtype == torch.float32
    assert (losses.double() - expected).abs().max() < 1e-4
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert relative(hidden.grad, grad_hidden) < 2 ** -8
    assert relative(weight.grad, grad_weight) < 2 ** -8


@pytest.mark.parametrize("n", [0, N])
def test_nothing_to_score_is_a_connected_zero(n):
    hidden, weight, targets, upstream = inputs()
    hidden = hidden.detach()[:n].requires_grad_()
    losses = fused_cross_entropy(hidden, weight, torch.full_like(targets[:n], -100))
    assert losses.shape == (n,)
    assert losses.dtype == torch.float32
    assert (losses == 0).all()
    losses.backward(upstream[:n])
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


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
        assert weight.grad is None
        assert relative(hidden.grad, grad_hidden) < 1e-5
    else:
        assert hidden.grad is None
        assert relative(weight.grad, grad_weight) < 1e-5


def test_no_grad():
    hidden, weight, targets, upstream = inputs()
    with torch.no_grad():
        losses = fused_cross_entropy(hidden, weight, targets)
    assert not losses.requires_grad
    assert relative(losses, oracle(hidden, weight, targets, upstream)[0]) < 1e-6


def test_never_holds_all_the_logits(monkeypatch):
    rows = 16
    monkeypatch.setitem(model.CHUNK_BYTES, "cpu", 4 * 300 * rows)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    hidden = torch.randn(512, 8, requires_grad=True)
    weight = torch.randn(300, 8, requires_grad=True)
    with Sizes():
        losses = fused_cross_entropy(hidden, weight, torch.randint(300, (512,)))
        losses.backward(torch.randn(512))
    assert hidden.grad is not None
    assert max(sizes) == rows * 300                 # one chunk, where all would be 512 * 300


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch >= 2.13")
def test_agrees_with_torch():
    hidden, weight, targets, upstream = inputs()
    losses = fused_cross_entropy(hidden, weight, targets)
    theirs = F.linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert relative(losses, theirs) < 1e-6
    ours_grads = torch.autograd.grad(losses, (hidden, weight), upstream)
    their_grads = torch.autograd.grad(theirs, (hidden, weight), upstream)
    for a, b in zip(ours_grads, their_grads, strict=True):
        assert relative(a, b) < 1e-5
