"""What bfloat16 changes, and that float32 stays as it was."""
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import shad
from data import Dataset, Renderer, collate
from model import Transformer, causal_attention
from support import distributed
from support.readers import toy_samples
from tiny import make_model
from toy.reproduce import TOY

CPU = torch.device("cpu")


@pytest.mark.parametrize("T", [1, 5, 128, 300])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_attention_by_plain_products_is_attention(T, heads):
    n_head, n_kv = heads
    q = torch.randn(2, n_head, T, 16, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, n_kv, T, 16, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, n_kv, T, 16, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, n_head, T, 16, dtype=torch.float64)
    results = []
    for attend in (causal_attention, F.scaled_dot_product_attention):
        options = {"is_causal": True, "enable_gqa": True} if attend is not causal_attention else {}
        y = attend(q, k, v, **options)
        results.append([y, *torch.autograd.grad(y, (q, k, v), upstream)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def losses_and_gradient(model, dataset):
    """The losses of the first 16 samples' output tokens (n,), and the gradient of their mean."""
    tokens, targets, _ = collate(dataset, range(16))
    with distributed.mixed_precision(CPU):
        losses = model(tokens, targets)[targets != -100]
    losses.mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return losses.detach(), gradient


def test_bf16_moves_losses_and_gradients_of_the_toy_a_little():
    model = Transformer.from_pretrained(TOY)
    dataset = Dataset(toy_samples(16, seed=5), Renderer(TOY))
    expected, gradient = losses_and_gradient(model, dataset)
    distributed.use_dtype("bfloat16", CPU)
    losses, rounded = losses_and_gradient(model, dataset)
    assert losses.dtype == rounded.dtype == torch.float32
    assert 0 < (losses - expected).abs().mean() < 0.03                  # of 4.1 nats
    assert abs((losses - expected).mean()) < 0.01
    assert 0 < (rounded - gradient).norm() / gradient.norm() < 0.05


def test_bf16_flips_few_labels_of_the_toy():
    dataset = Dataset(toy_samples(80, seed=5), Renderer(TOY))
    options = shad.Options(model=TOY, data=["toy"], out="", lr=1e-3, epochs=3, batch_tokens=1024)
    is_reasoning = []
    for dtype in ("float32", "bfloat16"):
        distributed.use_dtype(dtype, CPU)
        model = Transformer.from_pretrained(TOY)
        base = shad.token_losses(model, dataset, 4096, "base")
        shuffled, drawn = shad.shuffle_outputs(dataset.samples, 0.5, seed=0)
        shad.tune(model, shad.shuffled_datasets(dataset, drawn, shuffled, options), options)
        tuned = shad.token_losses(model, dataset, 4096, "tuned")
        is_reasoning.append(shad.classify(shad.loss_difference(tuned, base)))
    assert is_reasoning[0].any()
    assert 0 < (is_reasoning[0] != is_reasoning[1]).mean() < 0.01


def test_float32_is_float32_on_any_cpu():
    model = Transformer.from_pretrained(TOY)
    dataset = Dataset(toy_samples(16, seed=5), Renderer(TOY))
    expected, gradient = losses_and_gradient(model, dataset)            # nothing chosen
    distributed.use_dtype("float32", CPU)
    losses, same = losses_and_gradient(model, dataset)
    assert torch.equal(losses, expected)
    assert torch.equal(same, gradient)


@pytest.mark.parametrize("native", [True, False])
def test_auto_asks_the_cpu(monkeypatch, native):
    monkeypatch.setattr(distributed, "multiplies_bf16", lambda device: (native, "it says so"))
    text = distributed.use_dtype("auto", CPU)
    assert text == f"matrix products in {'bfloat16' if native else 'float32'} (it says so)"
    with distributed.mixed_precision(CPU):
        assert torch.is_autocast_enabled("cpu") == native


def test_a_cpu_without_flags_is_timed(monkeypatch):
    monkeypatch.setattr(distributed.os.path, "exists", lambda path: False)
    native, reason = distributed.multiplies_bf16(CPU)
    assert isinstance(native, bool)
    assert "x float32's speed" in reason


def test_compiled_blocks_take_any_length_in_bf16(monkeypatch):
    """With the parts of torch.compile that need no C++ compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.utils.counters.clear()
    distributed.use_dtype("bfloat16", CPU)
    model, compiled = make_model(96), make_model(96)
    distributed.compile_blocks(compiled)
    for length in (30, 250, 41, 400):               # below and above a block of queries
        tokens = torch.randint(96, (2, length))
        with distributed.mixed_precision(CPU):
            losses = compiled(tokens, tokens.roll(-1, 1))
            expected = model(tokens, tokens.roll(-1, 1))
        losses.sum().backward()
        assert (losses - expected).abs().max() < 0.1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2      # last block, others
