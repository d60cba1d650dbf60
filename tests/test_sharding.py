"""A sharded model computes what the whole one does: losses, gradients, steps, checkpoints."""
import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from model import Transformer, gather_full, local_shard
from support.distributed import (
    all_reduce_gradients,
    clip_gradients,
    is_sharded,
    mixed_precision,
    rank_and_world,
    shard_model,
    sum_over_ranks,
    use_dtype,
)
from tiny import CAN_SHARD, make_model, relative

V = 97                              # 97 rows: uneven shards
WORLDS = (2, 4)
TIED = {"tied": True, "untied": False}
CASES = [("tied", False), ("tied", True), ("untied", False), ("untied", True)]  # head, recompute
pytestmark = pytest.mark.skipif(not CAN_SHARD, reason="this torch cannot shard on CPUs")


def micro_batches():
    """Two micro-batches of 8 rows, of which each rank takes its share.

    With 4 processes some ranks have nothing to score in the second.
    """
    generator = torch.Generator().manual_seed(1)
    pieces = []
    for scored in (8, 4):
        tokens = torch.randint(V, (8, 21), generator=generator)
        targets = tokens[:, 1:].masked_fill(torch.rand(8, 20, generator=generator) < 0.3, -100)
        targets[scored:] = -100
        pieces.append((tokens[:, :-1], targets))
    return pieces


def step(model, recompute):
    """{name: tensor} of a step of AdamW.

    Losses, summed gradients, their norm before clipping, and the parameters after the step.
    """
    rank, world = rank_and_world()
    model.recompute = recompute
    results = {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, fused=True)
    for i, (tokens, targets) in enumerate(micro_batches()):
        rows = slice(8 // world * rank, 8 // world * (rank + 1))
        losses = model(tokens[rows], targets[rows])
        losses.square().sum().backward()            # another upstream gradient for every token
        results[f"losses {i}"] = torch.zeros(8, 20)
        results[f"losses {i}"][rows] = losses.detach()
        sum_over_ranks(results[f"losses {i}"])
    all_reduce_gradients(model)
    for name, p in model.named_parameters():
        results[f"gradient of {name}"] = gather_full(p.grad).clone()
    results["norm"] = torch.tensor(clip_gradients(model, 1.0))
    optimizer.step()
    for name, p in model.named_parameters():
        results[name] = gather_full(p.detach()).clone()
    return results


def rank_main(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank,
                            world_size=world)
    results = {}
    for head, recompute in CASES:
        shard = partial(shard_model, device="cpu")
        model = Transformer.from_pretrained(f"{folder}/{head}", shard=shard)
        for p in model.parameters():
            assert is_sharded(p)
            assert len(local_shard(p)[0]) <= -(-len(p) // world)
        results[head, recompute, True] = step(model, recompute)
        if not recompute:
            model.save_pretrained(f"{folder}/{head}{world}", max_shard_bytes=20_000)
            model.save_pretrained(f"{folder}/{head}{world}bf16", torch.bfloat16)
            unsharded = Transformer.from_pretrained(f"{folder}/{head}")
            results[head, recompute, False] = step(unsharded, recompute)
    if rank == 0:
        torch.save(results, f"{folder}/{world}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    for head, tied in TIED.items():
        model = make_model(V, tie_word_embeddings=tied, model_type="qwen3")
        model.save_pretrained(f"{folder}/{head}")
    # one import for all processes
    torch.multiprocessing.set_forkserver_preload(["model", "torch.distributed.fsdp"])
    for world in WORLDS:
        mp.start_processes(rank_main, (world, str(folder)), nprocs=world, start_method="forkserver")
    return folder


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("head", TIED)
@pytest.mark.parametrize("sharded, recompute", [(True, False), (True, True), (False, False)],
                         ids=["sharded", "recompute", "copies"])
def test_many_processes_are_one(folder, world, sharded, head, recompute):
    expected = step(Transformer.from_pretrained(f"{folder}/{head}"), False)
    results = torch.load(f"{folder}/{world}")[head, recompute, sharded]
    assert results.keys() == expected.keys()
    for name, tensor in expected.items():
        assert relative(results[name], tensor) < 1e-5, name


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("head", TIED)
def test_a_sharded_model_saves_what_it_is(folder, world, head):
    after = torch.load(f"{folder}/{world}")[head, False, True]
    path = f"{folder}/{head}{world}"
    files = os.listdir(path)
    assert len([name for name in files if name.endswith(".safetensors")]) > 2
    assert not [name for name in files if name.endswith(".tmp")]
    for suffix, dtype in (("", torch.float32), ("bf16", torch.bfloat16)):
        saved = Transformer.from_pretrained(path + suffix, dtype=dtype)
        for name, p in saved.named_parameters():
            assert torch.equal(p, after[name].to(dtype)), name


@pytest.fixture(scope="module")
def one_rank(folder):
    """A process group of one rank for this process, as shard_model makes it, and its end."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
@pytest.mark.parametrize("head", TIED)
def test_one_rank_computes_what_the_whole_model_does(folder, one_rank, head, offload):
    expected = step(Transformer.from_pretrained(f"{folder}/{head}"), False)
    shard = partial(shard_model, device="cpu", offload=offload)
    model = Transformer.from_pretrained(f"{folder}/{head}", shard=shard)
    assert all(is_sharded(p) for p in model.parameters())
    assert model.device == torch.device("cpu")
    results = step(model, False)
    assert results.keys() == expected.keys()
    for name, tensor in expected.items():
        assert relative(results[name], tensor) < 1e-6, name


def test_one_rank_in_bf16_is_close_to_autocast(folder, one_rank):
    tokens, targets = micro_batches()[0]
    losses = {}
    use_dtype("bfloat16", torch.device("cpu"))
    for sharded in (False, True):
        shard = partial(shard_model, device="cpu") if sharded else None
        model = Transformer.from_pretrained(f"{folder}/tied", shard=shard)
        with mixed_precision(torch.device("cpu")):
            losses[sharded] = model(tokens, targets)
    assert losses[True].dtype == torch.float32
    assert 0 < relative(losses[True], losses[False]) < 0.01
