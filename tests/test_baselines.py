"""Where the labels of the baselines come from: regular expressions, other models, DPO."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from baselines.dpo import Options, backward, read_pairs, train_dpo
from baselines.regex_labels import format_spans, regex_labels
from data import Dataset
from model import Transformer
from processes import call
from shad import load_labels, token_losses
from support.cli import DataError
from support.readers import read_record, toy_samples
from support.templates import Renderer
from test_chat_template import TEMPLATES, make_chat_checkpoint
from tiny import CAN_SHARD, apigen, make_checkpoint, read_lines, relative, talk, write
from toy.task import POOLS, toy_pairs

# --------------------------------------------------------------------------------------------------
# Regular expressions

CALL = '{"name": "find", "arguments": {"city": "Oslo, {N}", "days": [3, true]}}'


IN_CALL = ["find", "city", "Oslo, {N}", "days", "3", "true"]


@pytest.mark.parametrize("text, reasoning", [
    (f"[{CALL}]", IN_CALL),
    (CALL, IN_CALL),
    (f"I look.[{CALL}, {CALL}]", ["I look.", *IN_CALL, *IN_CALL]),
    ("Thought: I, too: look.\nAction: find\nAction Input: {\"city\":\"Oslo\",\"days\":3}",
     ["I, too: look.", "find", "city", "Oslo", "days", "3"]),
    ("Thought: \nAction: Finish\nAction Input: {}", ["Finish"]),
    ("See:\n- **one**, [two]\n1. three\n```python\nx\n```",
     ["See:\n", "one", ", [two]\n", "three\n", "\nx\n"]),
    (f"I look.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL}\n</tool_call>",
     ["I look.", *IN_CALL, *IN_CALL]),
    ("No format at all: none.", ["No format at all: none."]),
    ("", []),
])
def test_regular_expressions_find_the_format_of_each_data_format(text, reasoning):
    spans = format_spans(text)
    assert "".join(piece for piece, _ in spans) == text
    assert [piece for piece, role in spans if role == "reasoning"] == reasoning


def test_regex_labels_agree_with_the_structure_of_apigen_and_find_the_format_of_the_toy(chatml):
    samples = [read_record(record, i) for i, record in enumerate(apigen(12))]
    dataset = Dataset(samples, Renderer(chatml), max_length=200)
    assert dataset.dropped
    assert np.array_equal(regex_labels(dataset), dataset.true_roles()["reasoning"])

    dataset = Dataset(toy_samples(20, 0), Renderer("toy"))
    labels = regex_labels(dataset)
    truth = dataset.true_roles()
    assert not labels[truth["format"]].any()
    assert labels[truth["reasoning"]].all()
    assert labels[truth["connecting"]].all()            # what only SHAD finds


def test_regex_labels_of_context_turns_and_of_both_templates(chatml, plain):
    sample = talk(("user", "hi"), ("assistant", f"[{CALL}]"), ("tool", "[]"), ("assistant", "ok"))
    sample.messages[1].scored = False
    for directory in (chatml, plain):
        dataset = Dataset([sample], Renderer(directory))
        labels = regex_labels(dataset)
        assert len(labels) == dataset.output_starts[-1]
        assert labels[:-1].all()
        assert not labels[-1]                           # the end of the turn


def test_regex_labels_of_calls_that_a_chat_template_writes(tmp_path):
    directory = make_chat_checkpoint(tmp_path, TEMPLATES["drops earlier reasoning"])
    record, = apigen(1)
    sample = read_record(record, 0, native_calls=True)
    dataset = Dataset([sample], Renderer(directory, native_calls=True))
    pieces, = dataset.renderer.output_pieces(sample)
    labels = regex_labels(dataset)
    reasoning = "".join(piece for piece, label in zip(pieces, labels, strict=True) if label)
    call, = json.loads(record["answers"])
    values = [str(value) for value in call["arguments"].values()]
    expected = [call["name"]]
    for name, value in zip(call["arguments"], values, strict=True):
        expected += [name, value]
    assert "".join(reasoning.split()) == "".join(expected)


# --------------------------------------------------------------------------------------------------
# DPO

def test_rejected_answers_of_the_toy_are_wrong_in_one_tool_argument_or_value():
    kinds = set()
    for pair in toy_pairs(100, 3):
        chosen = json.loads(pair["chosen"].split("Action Input: ")[1])
        rejected = json.loads(pair["rejected"].split("Action Input: ")[1])
        changed = []
        words = zip(pair["chosen"].replace('"', " ").split(),
                    pair["rejected"].replace('"', " ").split(), strict=True)
        for a, b in words:
            if a != b:
                changed.append(b)
        [wrong] = changed
        prompt = pair["messages"][0]["content"]
        if chosen == rejected:
            kinds.add("tool")
            assert f"- {wrong}(" in prompt
        elif chosen.keys() != rejected.keys():
            kinds.add("argument")
            assert wrong in prompt
        else:
            kinds.add("value")
            assert wrong in POOLS["value"]
    assert kinds == {"tool", "argument", "value"}
    assert toy_pairs(5, 1) == toy_pairs(5, 1) != toy_pairs(5, 2)


@pytest.fixture
def pairs(tmp_path):
    """A file of six pairs, in both ways to write a prompt."""
    answers = ["ok", "Oslo it is, at once", "Bern", "I should call the tool", "no", "Lima or Cork"]
    records = []
    for i, answer in enumerate(answers):
        prompt = f"Which city, {i}?"
        if i % 2:
            record = {"messages": [{"role": "system", "content": "Be brief."},
                                   {"role": "user", "content": prompt},
                                   {"role": "assistant", "content": "Which?"},
                                   {"role": "user", "content": "Any."}]}
        else:
            record = {"prompt": prompt}
        records.append(record | {"chosen": answer, "rejected": answers[i - 1]})
    return write(tmp_path / "pairs.json", records)


def random_reference(pair_count):
    generator = torch.Generator().manual_seed(1)
    return -20 * torch.rand(pair_count, 2, generator=generator)


@pytest.mark.parametrize("micro_tokens", [1, 200, 10**6])
def test_the_loss_and_gradient_of_dpo_match_equation_7(chatml, pairs, micro_tokens):
    model = Transformer.from_pretrained(chatml)
    dataset = Dataset(read_pairs(pairs), Renderer(chatml))
    reference = random_reference(6)
    options = Options("", "", "", beta=0.5, micro_tokens=micro_tokens)
    lengths = 2 * dataset.lengths.reshape(-1, 2).max(1)
    batch = np.array([0, 1, 3, 4, 5])
    sums = backward(model, dataset, batch, lengths, reference, options)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    model.double()
    losses = []
    ahead = 0
    for pair in batch.tolist():
        ratios = []
        for k in (0, 1):
            ids = torch.tensor(dataset.ids[2 * pair + k]).long()
            is_output = torch.from_numpy(dataset.is_output[2 * pair + k][1:])
            log_probs = F.log_softmax(model(ids[None, :-1])[0], -1)                 # (T, V)
            log_probs = log_probs.gather(1, ids[1:, None])[is_output]
            ratios.append(log_probs.sum() - reference[pair, k].double())
        h = ratios[0] - ratios[1]
        losses.append(torch.log(1 + torch.exp(-0.5 * h)))
        ahead += int(h > 0)
    (sum(losses) / len(batch)).backward()
    assert sums[0].item() == pytest.approx(sum(losses).item(), rel=1e-5)
    assert sums[1].item() == ahead
    for name, p in model.named_parameters():
        assert relative(gradients[name], p.grad) < 1e-5, name


def test_dpo_starts_at_log_2_and_learns_which_answers_are_chosen(chatml, pairs):
    model = Transformer.from_pretrained(chatml)
    dataset = Dataset(read_pairs(pairs), Renderer(chatml))
    before = token_losses(model, dataset, 1000, "")
    means = train_dpo(model, dataset, Options("", "", "", lr=3e-3, epochs=12))
    assert means[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert means[-1][0] < 0.5
    assert means[-1][1] == 1.0
    rewards = before - token_losses(model, dataset, 1000, "")
    sums = np.add.reduceat(rewards, dataset.output_starts[:-1])
    assert (sums[0::2] > sums[1::2]).all()


def test_only_the_last_answer_of_a_pair_is_scored(chatml, pairs):
    samples = list(read_pairs(pairs))
    assert len(samples) == 12
    for sample in samples:
        assert sum(message.is_output for message in sample.messages) == 1
    assert len(list(read_pairs(pairs + "[1:3]"))) == 4


@pytest.mark.parametrize("record", [
    {"prompt": "a", "chosen": "b"}, {"chosen": "a", "rejected": "b"}, ["a"],
    {"prompt": 3, "chosen": "a", "rejected": "b"}, {"prompt": "a", "chosen": 5, "rejected": "b"},
    {"prompt": "\ud83d", "chosen": "a", "rejected": "b"}])
def test_a_record_that_is_no_pair_is_named(tmp_path, record):
    file = write(tmp_path / "pairs.json", [{"prompt": "a", "chosen": "b", "rejected": "c"}, record])
    with pytest.raises(DataError, match="pairs.json, record 2( .*; a pair is|: )"):
        list(read_pairs(file))


# --------------------------------------------------------------------------------------------------
# The commands

@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """model/, data.json, dpo/model tuned on pairs.jsonl, and labels of both kinds."""
    work = tmp_path_factory.mktemp("work")
    make_checkpoint(work / "model")
    write(work / "data.json", apigen(12))
    write(work / "other.json", apigen(9))
    lines = [json.dumps({"prompt": f"{i}?", "chosen": "Oslo", "rejected": "no"}) for i in range(5)]
    write(work / "pairs.jsonl", "\n".join(lines))
    run(work, "baselines.dpo", "--model", work / "model", "--data", work / "pairs.jsonl",
        "--out", work / "dpo", "--lr", "1e-3")
    run(work, "baselines.reference", *inputs(work), "--out", work / "reference")
    run(work, "baselines.reference", *inputs(work), "--minus", work / "dpo" / "model",
        "--out", work / "rewards")
    return work


def inputs(work, data="data.json"):
    return ["--model", work / "model", "--data", work / data]


def run(folder, script, *arguments, **settings):
    code, text = call(folder, script, *arguments, **settings)
    assert code == 0, text
    return text


def read(work, folder, kind):
    dataset = Dataset.load([str(work / "data.json")], str(work / "model"), "auto", 2048)
    return load_labels(str(work / folder), dataset, kind)[:], dataset


def test_reference_losses_and_rewards_are_the_models_own(work):
    values, dataset = read(work, "reference", "reference")
    base = token_losses(Transformer.from_pretrained(str(work / "model")), dataset, 4096, "")
    assert np.array_equal(values, base)
    rewards, _ = read(work, "rewards", "reward")
    tuned = Transformer.from_pretrained(str(work / "dpo" / "model"))
    expected = base - token_losses(tuned, dataset, 4096, "")    # log pi_dpo - log pi_ref
    assert np.array_equal(rewards, expected)
    assert np.abs(rewards).max() > 1e-3


def test_two_processes_make_the_labels_of_one(work, tmp_path):
    run(tmp_path, "baselines.reference", *inputs(work), "--out", tmp_path / "two", processes=2)
    expected, dataset = read(work, "reference", "reference")
    two = load_labels(str(tmp_path / "two"), dataset, "reference")[:]
    assert np.array_equal(two, expected)


@pytest.mark.parametrize("more", [
    [], ["--micro-tokens", 1],          # the second rank has one pair fewer
    pytest.param(["--micro-tokens", 1, "--shard", "yes"], marks=pytest.mark.skipif(
        not CAN_SHARD, reason="this torch cannot shard on CPUs"))])
def test_two_processes_tune_by_dpo_what_one_tunes(work, tmp_path, more):
    run(tmp_path, "baselines.dpo", "--model", work / "model", "--data", work / "pairs.jsonl",
        "--out", tmp_path / "two", "--lr", "1e-3", *more, processes=2)
    one = Transformer.from_pretrained(str(work / "dpo" / "model")).state_dict()
    two = Transformer.from_pretrained(str(tmp_path / "two" / "model")).state_dict()
    base = Transformer.from_pretrained(str(work / "model")).state_dict()
    for name, tensor in one.items():
        assert (two[name] - tensor).abs().max() < 1e-4, name
        assert (base[name] - tensor).abs().max() > 1e-4, name


@pytest.mark.parametrize("method, labels", [
    ("regex", None), ("regex+rft", None), ("rho1", "reference"), ("rewardft", "rewards")])
def test_a_baseline_trains_from_the_command_line(work, tmp_path, method, labels):
    more = ["--labels", work / labels] if labels else []
    text = run(tmp_path, "train", *inputs(work), "--method", method, *more, "--steps", 3,
               "--lr", "1e-3", "--batch-tokens", 1500, "--out", tmp_path / "out")
    assert f"{method}: 3 steps" in text
    rows = read_lines(tmp_path / "out" / "metrics.jsonl")
    assert rows[-1]["loss"] > 0
    for row in rows:
        grouped = [row[key] is not None for key in row if "reasoning" in key or "boiler" in key]
        assert grouped == 4 * [method.startswith("regex")]


REFUSED = [
    ("rho1", "data.json", [], "python -m baselines.reference --model TUNED_MODEL --data"),
    ("rewardft", "data.json", [], "--minus DPO_MODEL"),
    ("rho1", "data.json", ["rewards"], "holds reward per token where loss is needed"),
    ("rewardft", "data.json", ["reference"], "holds loss per token where reward is needed"),
    ("rft", "data.json", ["reference"], "where loss_difference is needed; make it with shad.py"),
    ("sft", "data.json", ["reference"], "where loss_difference is needed"),
    ("rho1", "other.json", ["reference"], "data differs"),
    ("regex", "data.json", ["reference"], "makes its labels itself"),
]


@pytest.mark.parametrize("method, data, labels, named", REFUSED)
def test_labels_that_are_missing_or_do_not_fit_are_refused(work, tmp_path, method, data, labels,
                                                           named):
    more = ["--labels", work / labels[0]] if labels else []
    code, text = call(tmp_path, "train", *inputs(work, data), "--method", method, *more,
                      "--out", tmp_path / "out")
    assert code == 2, text
    assert "Traceback" not in text
    assert named in text.strip().split("\n")[-1]
    assert not (tmp_path / "out").exists()


def test_resuming_with_other_rewards_is_refused(work, tmp_path):
    write(tmp_path / "pairs.jsonl", json.dumps({"prompt": "?", "chosen": "no", "rejected": "Oslo"}))
    arguments = [*inputs(work), "--method", "rewardft", "--steps", 4, "--batch-tokens", 1500,
                 "--checkpoint-every", 2, "--out", tmp_path / "out"]
    run(tmp_path, "train", *arguments, "--labels", work / "rewards")
    (tmp_path / "out" / "model" / "config.json").unlink()       # as if it had been killed
    run(tmp_path, "baselines.reference", "--model", work / "dpo" / "model", "--minus",
        work / "model", "--data", work / "data.json", "--out", tmp_path / "other")
    code, text = call(tmp_path, "train", *arguments, "--labels", tmp_path / "other", "--resume")
    assert code == 2, text
    assert "another labels" in text
    text = run(tmp_path, "train", *arguments, "--labels", work / "rewards", "--resume")
    assert "resumed from" in text
