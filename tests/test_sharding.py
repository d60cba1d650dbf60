"""A sharded model computes what the whole one does: losses, gradients, steps, checkpoints, on 2 and 4 processes."""
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from model import (Transformer, clip_gradients, is_sharded, own_rows, rank_and_world, sum_gradients, sum_over_ranks, whole)
from tiny import CAN_SHARD, make_model, relative

V, WORLDS = 97, (2, 4)              # 97 rows: uneven shards
TIED = {"tied": True, "untied": False}
pytestmark = pytest.mark.skipif(not CAN_SHARD, reason="this torch cannot shard on CPUs")
CASES = [(head, recompute) for head in TIED for recompute in (False, True)]


def micro_batches():
    """Two micro-batches of 8 rows, of which each rank takes its share; 4 processes leave ranks with nothing to score."""
    generator, pieces = torch.Generator().manual_seed(1), []
    for scored in (8, 4):
        tokens = torch.randint(V, (8, 21), generator=generator)
        targets = tokens[:, 1:].masked_fill(torch.rand(8, 20, generator=generator) < 0.3, -100)
        targets[scored:] = -100
        pieces.append((tokens[:, :-1], targets))
    return pieces


def step(model, recompute):
    """Losses, summed gradients, their norm before clipping, and the parameters after a step of AdamW: {name: tensor}."""
    rank, world = rank_and_world()
    model.recompute, results = recompute, {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, fused=True)
    for i, (tokens, targets) in enumerate(micro_batches()):
        rows = slice(8 // world * rank, 8 // world * (rank + 1))
        losses = model(tokens[rows], targets[rows])
        losses.square().sum().backward()            # another upstream gradient for every token
        results[f"losses {i}"] = torch.zeros(8, 20)
        results[f"losses {i}"][rows] = losses.detach()
        sum_over_ranks(results[f"losses {i}"])
    sum_gradients(model)
    results |= {f"gradient of {name}": whole(p.grad).clone() for name, p in model.named_parameters()}
    results["norm"] = torch.tensor(clip_gradients(model, 1.0))
    optimizer.step()
    return results | {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


def rank_main(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    results = {}
    for head, recompute in CASES:
        model = Transformer.from_pretrained(f"{folder}/{head}", sharded=True)
        assert all(is_sharded(p) and len(own_rows(p)[0]) <= -(-len(p) // world) for p in model.parameters())
        results[head, recompute, True] = step(model, recompute)
        if not recompute:
            model.save_pretrained(f"{folder}/{head}{world}", max_shard_bytes=20_000)
            model.save_pretrained(f"{folder}/{head}{world}bf16", torch.bfloat16)
            results[head, recompute, False] = step(Transformer.from_pretrained(f"{folder}/{head}"), recompute)
    if rank == 0:
        torch.save(results, f"{folder}/{world}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    for head, tied in TIED.items():
        make_model(V, tie_word_embeddings=tied, model_type="qwen3").save_pretrained(f"{folder}/{head}")
    torch.multiprocessing.set_forkserver_preload(["model", "torch.distributed.fsdp"])       # one import for all
    for world in WORLDS:
        mp.start_processes(rank_main, (world, str(folder)), nprocs=world, start_method="forkserver")
    return folder


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("head", TIED)
@pytest.mark.parametrize("sharded, recompute", [(True, False), (True, True), (False, False)], ids=["sharded", "recompute", "copies"])
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
    assert len([name for name in os.listdir(path) if name.endswith(".safetensors")]) > 2
    assert not [name for name in os.listdir(path) if name.endswith(".tmp")]
    for suffix, dtype in (("", torch.float32), ("bf16", torch.bfloat16)):
        for name, p in Transformer.from_pretrained(path + suffix, dtype=dtype).named_parameters():
            assert torch.equal(p, after[name].to(dtype)), name
