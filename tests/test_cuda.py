"""On a GPU: exactness, the fused loss, sharding, generation, resuming and SHAD's losses.

    python -m pytest -q -m cuda tests
"""
import os
import shutil
from functools import partial

import numpy as np
import pytest
import torch

import model as model_file
import shad
from model import Transformer, fused_cross_entropy, gather_full
from support import distributed
from support.generate import generate
from test_fused_cross_entropy import inputs, oracle
from test_train import BATCHES, CUT, WHOLE, assert_same, one_batch, problem
from tiny import make_model, relative
from train import Options, train

DEVICE = torch.device("cuda")
pytestmark = [pytest.mark.cuda,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
              pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


@pytest.fixture(scope="module", autouse=True)
def _no_process_group_is_left():
    yield
    distributed.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# The fused loss

def on_device(dtype):
    hidden, weight, targets, upstream = inputs(dtype)
    hidden = hidden.detach().to(DEVICE).requires_grad_()
    weight = weight.detach().to(DEVICE).requires_grad_()
    return hidden, weight, targets.to(DEVICE), upstream.to(DEVICE)


@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_loss_is_that_of_float64(monkeypatch, dtype, rows):
    hidden, weight, targets, upstream = on_device(dtype)
    monkeypatch.setitem(model_file.CHUNK_BYTES, DEVICE.type, 4 * len(weight) * rows)
    losses = fused_cross_entropy(hidden, weight, targets)
    losses.backward(upstream)
    expected, grad_hidden, grad_weight = oracle(hidden, weight, targets, upstream)
    tolerance = 1e-5 if dtype == torch.float32 else 2 ** -8
    assert losses.dtype == torch.float32
    assert (losses.double() - expected).abs().max() < 1e-4
    assert relative(hidden.grad, grad_hidden) < tolerance
    assert relative(weight.grad, grad_weight) < tolerance


def test_fused_loss_under_autocast():
    hidden, weight, targets, upstream = on_device(torch.float32)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        losses = fused_cross_entropy(hidden, weight, targets)
    losses.backward(upstream)
    factors = [x.bfloat16() if DEVICE.type == "cuda" else x for x in (hidden, weight)]
    expected, grad_hidden, grad_weight = oracle(*factors, targets, upstream)
    assert (losses.double() - expected).abs().max() < 1e-4
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert relative(hidden.grad, grad_hidden) < 2 ** -8
    assert relative(weight.grad, grad_weight) < 2 ** -8


@pytest.mark.skipif(torch.__version__ < "2.10", reason="needs addmm from bf16 into float32")
def test_the_weight_gradient_is_summed_in_place(monkeypatch):
    """Its float32 sum (V, H) exists once; a product beside it would be another."""
    V, H, N = 32768, 1024, 512
    monkeypatch.setitem(model_file.CHUNK_BYTES, "cuda", 4 * V * 64)         # 8 MiB of logits
    hidden = torch.randn(N, H, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(V, H, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(V, (N,), device=DEVICE)
    for n in (64, N):                                   # the first makes cuBLAS's workspace
        weight.grad = None
        losses = fused_cross_entropy(hidden[:n], weight, targets[:n])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        losses.sum().backward()
        extra = torch.cuda.max_memory_allocated() - before
    assert extra < 7.5 * V * H          # bytes: 4 V H for the sum, 2 V H for its cast to bf16


# --------------------------------------------------------------------------------------------------
# Training

@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("case", ["sft", "rft sample mean", "rft batch mean"])
def test_losses_and_gradients_do_not_depend_on_the_cut_and_are_the_cpus(chatml, case, batch):
    distributed.use_dtype("float32", DEVICE)
    model, dataset, labels = problem(chatml)
    expected = one_batch(model, dataset, labels, case, batch, WHOLE)
    model.to(DEVICE)
    whole = one_batch(model, dataset, labels, case, batch, WHOLE)
    assert_same(one_batch(model, dataset, labels, case, batch, CUT), whole)
    for name, tensor in expected.items():
        assert relative(whole[name].cpu(), tensor) < 1e-4 or not tensor.any(), name


@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
def test_one_rank_sharded_computes_what_the_whole_model_does(tmp_path, offload):
    distributed.use_dtype("float32", DEVICE)
    make_model(97).save_pretrained(str(tmp_path))
    tokens = torch.randint(97, (4, 30), device=DEVICE)
    results = []
    for choice in ("no", "yes"):
        shard = partial(distributed.shard_model, device=DEVICE, choice=choice,
                        offload=offload and choice == "yes")
        model = Transformer.from_pretrained(str(tmp_path), device=DEVICE, shard=shard)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        losses = model(tokens.to(model.device), tokens.roll(-1, 1))
        losses.mean().backward()
        distributed.all_reduce_gradients(model)
        norm = distributed.clip_gradients(model, 1.0)
        optimizer.step()
        updated = [gather_full(p.detach()).cpu() for p in model.parameters()]
        results.append([losses.detach().cpu(), torch.tensor(norm), *updated])
    for sharded, whole in zip(*reversed(results), strict=True):
        assert relative(sharded, whole) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(chatml, tmp_path, dtype):
    distributed.use_dtype(dtype, DEVICE)
    _, dataset, _ = problem(chatml)
    options = Options(model=chatml, data=[""], out=str(tmp_path / "out"), method="sft", steps=6,
                      lr=1e-3, batch_tokens=500, checkpoint_every=2, keep=9)
    runs = []
    for options.resume in (False, True):
        model = Transformer.from_pretrained(chatml, device=DEVICE)
        train(model, dataset, None, options)
        runs.append([p.detach().cpu() for p in model.parameters()])
        for name in ("model", "checkpoints/step-00000004", "checkpoints/step-00000006"):
            shutil.rmtree(os.path.join(options.out, name))
    for resumed, straight in zip(*reversed(runs), strict=True):
        assert relative(resumed, straight) < 1e-5


# --------------------------------------------------------------------------------------------------
# Without gradients: SHAD's losses, generation

@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 0.1)])
def test_labels_do_not_depend_on_micro_batches(chatml, dtype, tolerance):
    distributed.use_dtype(dtype, DEVICE)
    base, dataset, _ = problem(chatml)
    tuned = make_model(base.config.vocab_size, seed=1).to(DEVICE)
    base.to(DEVICE)
    differences = []
    for micro_tokens in (1, WHOLE):
        losses = [shad.token_losses(model, dataset, micro_tokens, "") for model in (tuned, base)]
        differences.append(shad.loss_difference(*losses))
    one_by_one, together = differences
    np.testing.assert_allclose(together, one_by_one, rtol=0, atol=tolerance)
    clear = np.abs(one_by_one) > tolerance
    assert clear.mean() > 0.5
    assert (shad.classify(together) == shad.classify(one_by_one))[clear].all()


def test_generation_is_that_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    make_model(96, num_attention_heads=4, num_key_value_heads=2).save_pretrained(str(tmp_path))
    ours = Transformer.from_pretrained(str(tmp_path), device=DEVICE)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    theirs.to(DEVICE).eval()
    prompts = [torch.randint(96, (n,)).tolist() for n in (9, 1, 30, 4, 17)]
    outputs = generate(ours, prompts, 24, set(), cache_tokens=120)
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([prompt], device=DEVICE)
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24,
                                   do_sample=False, eos_token_id=None, pad_token_id=0)
        assert output == expected[0, len(prompt):].tolist()
