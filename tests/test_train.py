"""Exactness: loss and gradient of a global batch match the formula, however the batch is cut."""
import functools
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import load_file

from data import Dataset, epoch_batches, micro_batches
from model import Transformer, gather_full
from processes import fork
from shad import Labels
from support.distributed import all_reduce_gradients, shard_model, sum_over_ranks
from support.readers import read_record
from support.templates import Renderer
from test_methods import batch_loss
from tiny import CAN_SHARD, METRICS, apigen, read_lines, relative
from train import Options, backward, learning_rate, train

needs_sharding = pytest.mark.skipif(not CAN_SHARD, reason="this torch cannot shard on CPUs")
SHARDED = [False, True] if CAN_SHARD else [False]
CASES = {
    "sft": {"method": "sft"},
    "rho1": {"method": "rho1", "keep_share": 0.3},
    "rewardft": {"method": "rewardft"},
    "alpha sample mean": {"method": "alpha", "scope": "sample", "alpha": 0.7},
    "alpha batch mean": {"method": "alpha", "scope": "batch", "alpha": 0.7},
    "regex batch sum": {"method": "regex", "scope": "batch", "reduce": "sum"},
    "regex+rft batch mean": {"method": "regex+rft", "scope": "batch"},
    "rft sample mean": {"method": "rft", "scope": "sample", "reduce": "mean"},
    "rft sample sum": {"method": "rft", "scope": "sample", "reduce": "sum"},
    "rft batch mean": {"method": "rft", "scope": "batch", "reduce": "mean"},
    "rft batch sum": {"method": "rft", "scope": "batch", "reduce": "sum"},
    "rft sample, not detached": {"method": "rft", "scope": "sample", "detach": "no"},
    "rft batch, not detached": {"method": "rft", "scope": "batch", "detach": "no"},
    "rft batch sum, not detached": {
        "method": "rft", "scope": "batch", "reduce": "sum", "detach": "no"}}
WITHOUT_GROUPS = ("rho1", "rewardft")
BATCHES = {"many": list(range(11)), "single": [2]}
WHOLE = 10**6                   # micro_tokens for one micro-batch
CUT = 500                       # micro_tokens for several
TAU = 2.0


def problem(directory, sharded=False):
    """(model, dataset, labels); sample 4 is all reasoning and sample 5 all boilerplate."""
    shard = functools.partial(shard_model, device="cpu") if sharded else None
    model = Transformer.from_pretrained(directory, shard=shard)
    samples = [read_record(record, i) for i, record in enumerate(apigen(12))]
    dataset = Dataset(samples, Renderer(directory))
    is_reasoning = np.random.default_rng(0).random(dataset.output_starts[-1]) < 0.4
    is_reasoning[dataset.output_starts[4]:dataset.output_starts[5]] = True
    is_reasoning[dataset.output_starts[5]:dataset.output_starts[6]] = False
    return model, dataset, Labels(np.where(is_reasoning, np.float32(1), np.float32(-1)))


def labels_of(case, dataset, labels):
    """What the method of a case needs; labels: SHAD's, or those of regular expressions."""
    if CASES[case]["method"] in WITHOUT_GROUPS:         # losses of a reference, or rewards
        return np.random.default_rng(1).normal(size=dataset.output_starts[-1]).astype(np.float32)
    return labels


def one_batch(model, dataset, labels, case, batch, micro_tokens):
    """Everything that `train` takes from one global batch: {name: tensor}."""
    model.zero_grad()
    options = Options(model="", data=[""], out="", tau=TAU, micro_tokens=micro_tokens,
                      **CASES[case])
    labels = labels_of(case, dataset, labels)
    results = backward(model, dataset, labels, BATCHES[batch], options)
    all_reduce_gradients(model)
    sum_over_ranks(*results.values())
    for name, p in model.named_parameters():
        results[name] = gather_full(p.grad).clone()
    return results


def all_batches(directory, sharded=False):
    """{(case, batch, micro_tokens): the results of one_batch}"""
    model, dataset, labels = problem(directory, sharded)
    results = {}
    for case in CASES:
        for batch in BATCHES:
            for size in (WHOLE, CUT):
                results[case, batch, size] = one_batch(model, dataset, labels, case, batch, size)
    return results


def rank_main(rank, world, directory, out):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{out}.store", rank=rank, world_size=world)
    for sharded in SHARDED:
        results = all_batches(directory, sharded)
        if rank in (0, world - 1):
            torch.save(results, f"{out}.{sharded}.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one_process(chatml):
    return all_batches(chatml)


@pytest.fixture(scope="module", params=[2, 4])
def many_processes(request, chatml, tmp_path_factory):
    """{sharded: the results of the first rank and of the last}"""
    out = str(tmp_path_factory.mktemp("ranks") / "results")
    world = request.param
    mp.start_processes(
        rank_main, (world, chatml, out), nprocs=world, start_method=fork.get_start_method())
    results = {}
    for sharded in SHARDED:
        results[sharded] = [torch.load(f"{out}.{sharded}.{rank}") for rank in (0, world - 1)]
    return results


def assert_same(results, expected):
    assert results.keys() == expected.keys()
    for name, tensor in expected.items():
        if not tensor.any() and name in ("L", "n", "w"):        # a method without groups
            assert not results[name].any()
            continue
        assert tensor.norm() > 0, name
        assert relative(results[name], tensor) < 1e-5, name


def test_batches_are_cut_as_these_tests_assume(chatml):
    _, dataset, _ = problem(chatml)

    def pieces(batch, size, rank=0, world=1):
        cut = micro_batches(BATCHES[batch], dataset.lengths, size, rank, world)
        return sum(len(piece) > 0 for piece in cut)

    assert pieces("many", WHOLE) == 1
    assert pieces("many", CUT) >= 4
    for world in (2, 4):
        for rank in range(world):
            assert pieces("many", WHOLE, rank, world) == 1
            assert pieces("many", CUT, rank, world) >= 4 // world
            # of a single sample every rank but the first has nothing to score
            assert pieces("single", WHOLE, rank, world) == (1 if rank == 0 else 0)
    assert dataset.output_counts.max() > 3 * dataset.output_counts.min()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("case", CASES)
def test_several_micro_batches_give_what_one_gives(one_process, case, batch):
    assert_same(one_process[case, batch, CUT], one_process[case, batch, WHOLE])


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=needs_sharding)],
                         ids=["whole", "sharded"])
@pytest.mark.parametrize("case", CASES)
def test_many_processes_give_what_one_gives(one_process, many_processes, case, sharded):
    for results in many_processes[sharded]:
        for batch in BATCHES:
            for size in (WHOLE, CUT):
                assert_same(results[case, batch, size], one_process[case, batch, WHOLE])


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_match_the_formula(chatml, one_process, case, batch):
    """Sample by sample with plain F.cross_entropy, in float64."""
    model, dataset, labels = problem(chatml)
    labels = labels_of(case, dataset, labels)
    model.double()
    samples = []                            # per sample: (losses, labels) of its output
    for i in BATCHES[batch]:
        ids = torch.tensor(dataset.ids[i]).long()[None]                             # (1, T + 1)
        is_output = torch.from_numpy(dataset.is_output[i][1:])                      # (T,)
        losses = F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="none")
        output = slice(dataset.output_starts[i], dataset.output_starts[i + 1])
        samples.append((losses[is_output], torch.from_numpy(labels[output])))
    loss = batch_loss(samples, tau=TAU, **CASES[case])
    loss.backward()

    result = one_process[case, batch, WHOLE]
    assert relative(result["loss"], loss) < 1e-5
    for name, p in model.named_parameters():
        assert relative(result[name], p.grad) < 1e-5, name
    if CASES[case]["method"] in WITHOUT_GROUPS:
        for name in ("L", "n", "w"):
            assert not result[name].any()
        return
    losses = torch.cat([losses for losses, _ in samples])
    is_reasoning = torch.cat([is_reasoning for _, is_reasoning in samples])
    assert result["n"].tolist() == [int((~is_reasoning).sum()), int(is_reasoning.sum())]
    L = torch.stack([losses[~is_reasoning].sum(), losses[is_reasoning].sum()])
    assert relative(result["L"], L) < 1e-5
    assert result["w"].sum().item() == pytest.approx(1.0, abs=1e-5)


# --------------------------------------------------------------------------------------------------
# The loop

def make_options(directory, out, **changes):
    options = Options(model=directory, data=[""], out=str(out), batch_tokens=1000,
                      micro_tokens=500, lr=5e-3, steps=12)
    return replace(options, **changes)


@pytest.mark.parametrize("case", ["sft", "rft sample mean", "rft batch mean"])
def test_training_lowers_the_loss_and_writes_its_metrics(chatml, tmp_path, case):
    model, dataset, labels = problem(chatml)
    metrics = train(model, dataset, labels, make_options(chatml, tmp_path, **CASES[case]))
    assert read_lines(tmp_path / "metrics.jsonl") == metrics
    assert [m["step"] for m in metrics] == list(range(1, 13))
    for m in metrics:
        assert set(m) == METRICS
        assert m["weight_reasoning"] + m["weight_boilerplate"] == pytest.approx(1.0, abs=1e-5)
        assert all(m[key] > 0 for key in METRICS)
    for key in ("loss", "loss_reasoning", "loss_boilerplate"):
        first = np.mean([m[key] for m in metrics[:3]])
        last = np.mean([m[key] for m in metrics[-3:]])
        assert last < first - 0.3
    saved = Transformer.from_pretrained(str(tmp_path / "model"))
    for ours, expected in zip(saved.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, expected)
    assert os.path.isfile(tmp_path / "model" / "tokenizer.json")


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_model_is_saved_in_the_dtype_of_its_base(chatml, tmp_path, key):
    model, dataset, _ = problem(chatml)
    model.config.extra = {key: "bfloat16"}
    train(model, dataset, None, make_options(chatml, tmp_path, method="sft", steps=1))
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"


def test_sft_without_labels_knows_no_groups(chatml, tmp_path):
    model, dataset, _ = problem(chatml)
    options = make_options(chatml, tmp_path, method="sft", steps=0, epochs=2)
    metrics = train(model, dataset, None, options)
    steps = 0
    for epoch in (0, 1):
        steps += len(epoch_batches(dataset.lengths, dataset.kept, 1000, 0, epoch))
    assert len(metrics) == steps
    for m in metrics:
        assert set(m) == METRICS
        assert m["loss_reasoning"] is None
        assert m["weight_boilerplate"] is None


def test_sft_with_labels_trains_the_same(chatml, tmp_path):
    """Labels are only reported by sft; they change no weight."""
    finals = []
    for known in (True, False):
        model, dataset, labels = problem(chatml)
        options = make_options(chatml, tmp_path / str(known), method="sft", steps=3)
        train(model, dataset, labels if known else None, options)
        finals.append(model.state_dict())
    for name, tensor in finals[0].items():
        assert torch.equal(tensor, finals[1][name]), name


def test_a_loss_that_is_not_finite_stops_training_before_a_model_is_written(chatml, tmp_path):
    model, dataset, _ = problem(chatml)
    with torch.no_grad():
        model.head[5] = float("nan")
    with pytest.raises(ValueError, match="step 1.*not finite"):
        train(model, dataset, None, make_options(chatml, tmp_path, method="sft"))
    assert not os.path.exists(tmp_path / "model")


def test_the_learning_rate_warms_up_and_then_falls_to_a_tenth():
    options = make_options("", "", lr=1.0, warmup=0.1)
    rates = [learning_rate(step, 100, options) for step in range(100)]
    assert rates[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert all(rates[k] > rates[k + 1] for k in range(10, 99))
    assert 0.1 <= rates[-1] < 0.102
