"""Exactness: the loss and the gradient of a global batch do not depend on how it is cut, and they are the formula's."""
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors import safe_open

from data import Dataset, Renderer, epoch_batches, micro_batches, read_record
from model import Transformer, sum_gradients, sum_over_ranks, whole
from processes import fork
from tiny import CAN_SHARD, apigen, relative
from train import Options, backward, learning_rate, train

needs_sharding = pytest.mark.skipif(not CAN_SHARD, reason="this torch cannot shard on CPUs")
CASES = {"sft": dict(method="sft")} | {f"rft {scope} {reduce}": dict(method="rft", scope=scope, reduce=reduce)
                                       for scope in ("sample", "batch") for reduce in ("mean", "sum")}
BATCHES = {"many": list(range(11)), "single": [2]}
WHOLE, CUT = 10**6, 500         # micro_tokens: one micro-batch, or several


def problem(directory, sharded=False):
    """(model, dataset, labels): uneven outputs; sample 4 is all reasoning and sample 5 all boilerplate."""
    model = Transformer.from_pretrained(directory, sharded=sharded)
    dataset = Dataset([read_record(record, i) for i, record in enumerate(apigen(12))], Renderer(directory))
    reasoning = np.random.default_rng(0).random(dataset.offsets[-1]) < 0.4
    for i, value in ((4, True), (5, False)):
        reasoning[dataset.offsets[i]:dataset.offsets[i + 1]] = value
    return model, dataset, reasoning


def one_batch(model, dataset, reasoning, case, batch, micro_tokens):
    """Everything that `train` takes from one global batch: {name: tensor}."""
    model.zero_grad()
    o = Options(model="", data=[""], out="", tau=2.0, micro_tokens=micro_tokens, **CASES[case])
    sums = backward(model, dataset, (reasoning, 0.0), BATCHES[batch], o)
    sum_gradients(model)
    sum_over_ranks(*sums)
    return dict(zip(("loss", "L", "n", "w"), sums)) | {name: whole(p.grad).clone() for name, p in model.named_parameters()}


def everything(directory, sharded=False):
    model, dataset, reasoning = problem(directory, sharded)
    return {(case, batch, size): one_batch(model, dataset, reasoning, case, batch, size)
            for case in CASES for batch in BATCHES for size in (WHOLE, CUT)}


def rank_main(rank, world, directory, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=world)
    for sharded in (False, True)[:1 + CAN_SHARD]:
        results = everything(directory, sharded)
        if rank in (0, world - 1):
            torch.save(results, f"{out}.{sharded}.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one_process(chatml):
    return everything(chatml)


@pytest.fixture(scope="module", params=[2, 4])
def many_processes(request, chatml, tmp_path_factory):
    """{sharded: the results of the first rank and of the last}"""
    out, world = str(tmp_path_factory.mktemp("ranks") / "results"), request.param
    mp.start_processes(rank_main, (world, chatml, out), nprocs=world, start_method=fork.get_start_method())
    return {sharded: [torch.load(f"{out}.{sharded}.{rank}") for rank in (0, world - 1)] for sharded in (False, True)[:1 + CAN_SHARD]}


def assert_same(results, expected):
    assert results.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.norm() > 0, name
        assert relative(results[name], tensor) < 1e-5, name


def test_the_batch_is_cut_as_meant(chatml):
    _, dataset, _ = problem(chatml)
    pieces = lambda batch, size, *ranks: sum(map(bool, map(len, micro_batches(BATCHES[batch], dataset.lengths, size, *ranks))))
    assert pieces("many", WHOLE) == 1 and pieces("many", CUT) >= 4
    for world in (2, 4):
        assert all(pieces("many", WHOLE, rank, world) == 1 and pieces("many", CUT, rank, world) >= 4 // world for rank in range(world))
        assert [pieces("single", WHOLE, rank, world) for rank in range(world)] == [1] + [0] * (world - 1)      # nothing to score
    outputs = np.diff(dataset.offsets)
    assert outputs.max() > 3 * outputs.min()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("case", CASES)
def test_several_micro_batches_are_one(one_process, case, batch):
    assert_same(one_process[case, batch, CUT], one_process[case, batch, WHOLE])


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=needs_sharding)], ids=["whole", "sharded"])
@pytest.mark.parametrize("case", CASES)
def test_many_processes_are_one(one_process, many_processes, case, sharded):
    for results in many_processes[sharded]:
        for batch in BATCHES:
            for size in (WHOLE, CUT):
                assert_same(results[case, batch, size], one_process[case, batch, WHOLE])


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("case", CASES)
def test_the_loss_and_gradient_are_the_formula_s(chatml, one_process, case, batch):
    """Sample by sample with plain F.cross_entropy, in float64."""
    model, dataset, reasoning = problem(chatml)
    model.double()
    settings, tau = CASES[case], 2.0
    samples = []                                        # (losses, is_reasoning) of each sample's output tokens
    for i in BATCHES[batch]:
        ids = torch.tensor(dataset.ids[i]).long()[None]
        out = torch.from_numpy(dataset.is_output[i][1:])
        losses = F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="none")[out]
        samples.append((losses, torch.from_numpy(reasoning[dataset.offsets[i]:dataset.offsets[i + 1]])))

    def rft(losses, is_reasoning):
        groups = [g for g in (losses[~is_reasoning], losses[is_reasoning]) if len(g)]
        L = torch.stack([g.mean() if settings["reduce"] == "mean" else g.sum() for g in groups])
        return (torch.softmax(L.detach() / tau, 0) * L).sum()

    everything = [torch.cat(x) for x in zip(*samples)]
    if settings["method"] == "sft":
        loss = everything[0].mean()
    elif settings["scope"] == "batch":
        loss = rft(*everything)
    else:
        loss = torch.stack([rft(*s) for s in samples]).mean()
    loss.backward()
    result = one_process[case, batch, WHOLE]
    assert relative(result["loss"], loss) < 1e-5
    for name, p in model.named_parameters():
        assert relative(result[name], p.grad) < 1e-5, name
    n = torch.stack([(~everything[1]).sum(), everything[1].sum()])
    assert result["n"].tolist() == n.tolist()
    L = torch.stack([everything[0][~everything[1]].sum(), everything[0][everything[1]].sum()])
    assert relative(result["L"], L) < 1e-5
    assert result["w"].sum().item() == pytest.approx(1.0, abs=1e-5)


# -----------------------------------------------------------------------------------------------------------------
# The loop

FIELDS = {"step", "loss", "loss_reasoning", "loss_boilerplate", "weight_reasoning", "weight_boilerplate", "lr", "grad_norm", "tokens_per_s"}


def options(directory, out, **changes):
    return replace(Options(model=directory, data=[""], out=str(out), batch_tokens=1000, micro_tokens=500, lr=5e-3, steps=12), **changes)


@pytest.mark.parametrize("case", ["sft", "rft sample mean", "rft batch mean"])
def test_training_lowers_the_loss_and_writes_its_metrics(chatml, tmp_path, case):
    model, dataset, reasoning = problem(chatml)
    o = options(chatml, tmp_path, **CASES[case])
    metrics = train(model, dataset, (reasoning, 0.0), o)
    with open(tmp_path / "metrics.jsonl", encoding="utf-8") as f:
        assert [json.loads(line) for line in f] == metrics
    assert [m["step"] for m in metrics] == list(range(1, 13)) and all(set(m) == FIELDS for m in metrics)
    for m in metrics:
        assert m["weight_reasoning"] + m["weight_boilerplate"] == pytest.approx(1.0, abs=1e-5)
        assert all(m[key] > 0 for key in FIELDS)
    for key in ("loss", "loss_reasoning", "loss_boilerplate"):
        assert np.mean([m[key] for m in metrics[-3:]]) < np.mean([m[key] for m in metrics[:3]]) - 0.3
    saved = Transformer.from_pretrained(str(tmp_path / "model"))
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), model.parameters()))
    assert os.path.isfile(tmp_path / "model" / "tokenizer.json")


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_model_is_saved_in_the_base_s_own_dtype(chatml, tmp_path, key):
    model, dataset, _ = problem(chatml)
    model.config.other = {key: "bfloat16"}
    train(model, dataset, None, options(chatml, tmp_path, method="sft", steps=1))
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as f:
        assert {f.get_tensor(name).dtype for name in f.keys()} == {torch.bfloat16}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_sft_without_labels_knows_no_groups(chatml, tmp_path):
    model, dataset, _ = problem(chatml)
    metrics = train(model, dataset, None, options(chatml, tmp_path, method="sft", steps=0, epochs=2))
    assert len(metrics) == sum(len(epoch_batches(dataset.lengths, dataset.kept, 1000, 0, epoch)) for epoch in (0, 1))
    assert all(m["loss_reasoning"] is m["weight_boilerplate"] is None for m in metrics) and all(set(m) == FIELDS for m in metrics)


def test_sft_with_labels_trains_the_same(chatml, tmp_path):
    """Labels are only reported by sft; they change no weight."""
    finals = []
    for known in (True, False):
        model, dataset, reasoning = problem(chatml)
        train(model, dataset, (reasoning, 0.0) if known else None, options(chatml, tmp_path / str(known), method="sft", steps=3))
        finals.append(model.state_dict())
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])


def test_a_loss_that_is_not_finite_stops_and_names_the_samples(chatml, tmp_path):
    model, dataset, _ = problem(chatml)
    with torch.no_grad():
        model.head[5] = float("nan")
    with pytest.raises(ValueError, match="step 1.*not finite"):
        train(model, dataset, None, options(chatml, tmp_path, method="sft"))
    assert not os.path.exists(tmp_path / "model")


def test_learning_rate():
    o = options("", "", lr=1.0, warmup=0.1)
    rates = [learning_rate(step, 100, o) for step in range(100)]
    assert rates[:10] == pytest.approx([(k + 1) / 10 for k in range(10)]) and rates[10] == pytest.approx(1.0)
    assert all(a > b for a, b in zip(rates[10:], rates[11:])) and 0.1 <= rates[-1] < 0.102
