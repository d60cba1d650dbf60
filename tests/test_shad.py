"""SHAD's steps: per-token losses, the threshold, and what a run returns and writes."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import shad
from data import Dataset
from model import Transformer
from support.cli import DataError
from support.label_report import output_pieces
from support.readers import toy_samples
from support.templates import Renderer
from tiny import apigen, talk, write
from toy.reproduce import TOY


def test_tokens_that_became_harder_to_predict_are_reasoning():
    tuned = np.array([1.0, 2.0, 3.0], np.float32)
    base = np.array([2.0, 2.0, 2.5], np.float32)
    difference = shad.loss_difference(tuned, base)
    assert difference.tolist() == [-1.0, 0.0, 0.5]
    assert shad.classify(difference).tolist() == [False, False, True]       # LD <= 0: boilerplate
    assert shad.classify(difference, 0.5).tolist() == [False, False, False]
    assert shad.classify(torch.from_numpy(difference), -1.0).tolist() == [False, True, True]


@pytest.mark.parametrize("micro_tokens", [1, 500, 10**6])
def test_token_losses_are_those_of_each_sample_alone(chatml, tmp_path, micro_tokens):
    model = Transformer.from_pretrained(chatml)
    file = write(tmp_path / "a.json", apigen(12))
    dataset = Dataset.load([file], chatml, "auto", max_length=200)
    assert dataset.dropped
    assert len(dataset.kept) > 4
    losses = shad.token_losses(model, dataset, micro_tokens, "")
    expected = []
    for i in dataset.kept:
        ids = torch.tensor(dataset.ids[i]).long()[None]                             # (1, T + 1)
        is_output = torch.from_numpy(dataset.is_output[i][1:])                      # (T,)
        with torch.no_grad():
            logits = model(ids[:, :-1])[0].double()                                 # (T, V)
        expected.append(F.cross_entropy(logits, ids[0, 1:], reduction="none")[is_output])
    expected = torch.cat(expected).float().numpy()
    assert losses.dtype == np.float32
    assert losses.std() > 0.1
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)


def test_run_tunes_the_model_and_returns_its_losses_minus_those_of_the_base(chatml, tmp_path):
    dataset = Dataset.load([write(tmp_path / "a.json", apigen(20))], chatml, "auto", 2048)
    model = Transformer.from_pretrained(chatml)
    base = Transformer.from_pretrained(chatml)
    options = shad.Options(model=chatml, data=[""], out=str(tmp_path / "out"), shuffle=10,
                           epochs=2, lr=1e-3, batch_tokens=1024)
    difference, _ = shad.run(options, dataset, model)
    tuned_losses = shad.token_losses(model, dataset, 2048, "")
    base_losses = shad.token_losses(base, dataset, 2048, "")
    np.testing.assert_allclose(difference, tuned_losses - base_losses, rtol=0, atol=1e-4)
    assert difference.mean() < -0.05                            # it did learn something


def test_samples_of_the_same_name_are_told_apart(chatml, tmp_path):
    """Two files may use the same ids: what was shuffled goes by its place in the data."""
    files = [write(tmp_path / f"{name}.json", apigen(20)) for name in "ab"]
    dataset = Dataset.load(files, chatml, "auto", 2048)
    options = shad.Options(model=chatml, data=[""], out=str(tmp_path / "out"), shuffle=10)
    shad.run(options, dataset, Transformer.from_pretrained(chatml))
    _, drawn = shad.shuffle_outputs(dataset.samples, 10 / 40, seed=0)
    truth = json.loads((tmp_path / "out" / "summary.json").read_text())["truth"]
    assert truth["tokens"] == np.delete(dataset.output_counts, drawn).sum()
    assert not truth["shuffled_too"]


def reshuffled(dataset, options):
    samples = dataset.samples.select(dataset.kept)
    shuffled, drawn = shad.shuffle_outputs(samples, 0.5, options.seed)
    return list(shad.shuffled_datasets(dataset, dataset.kept[drawn], shuffled, options)), drawn


def test_outputs_are_reshuffled_in_every_epoch(chatml, tmp_path):
    dataset = Dataset.load([write(tmp_path / "a.json", apigen(40))], chatml, "auto", 2048)
    options = shad.Options(model="", data=[], out="", epochs=4)
    epochs, drawn = reshuffled(dataset, options)
    orders = set()
    for epoch in epochs:
        own = {dataset.samples[i].id: dataset.samples[i].messages for i in drawn}
        assert {sample.id for sample in epoch.samples} == set(own)
        outputs = {}
        for sample in epoch.samples:
            *given, output = sample.messages
            assert given == own[sample.id][:-1]                     # inputs stay
            assert output.text != own[sample.id][-1].text           # no output comes home
            outputs[sample.id] = output.text
        assert sorted(outputs.values()) == sorted(own[id][-1].text for id in own)
        orders.add(tuple(outputs[id] for id in sorted(outputs)))
    assert len(orders) == 4

    options.reshuffle = "no"
    epochs, _ = reshuffled(dataset, options)
    assert [epoch is epochs[0] for epoch in epochs] == [True] * 4


def tune_on_the_toy(tmp_path, **tuning):
    """The summary of a run on 120 samples of the toy."""
    dataset = Dataset(toy_samples(120, 0), Renderer(TOY))
    options = shad.Options(model=TOY, data=["toy"], out=str(tmp_path), **tuning)
    _, summary = shad.run(options, dataset, Transformer.from_pretrained(TOY))
    return summary


def test_a_model_that_was_not_tuned_still_uses_its_input(tmp_path, capsys):
    summary = tune_on_the_toy(tmp_path, shuffle=20, lr=0.0)
    check = summary["check"]
    assert check["samples"] == 32
    assert summary["top_tenth_rise"] == 0
    assert check["loss_wrong_input"] > 1.2 * check["loss_right_input"]
    assert check["uses_input"]
    assert "raise --lr or --shuffle" in capsys.readouterr().out


def test_a_model_that_was_tuned_to_pieces_is_refused(tmp_path):
    with pytest.raises(DataError, match="nats, twice that of a blind guess; lower --lr"):
        tune_on_the_toy(tmp_path, shuffle=20, lr=10.0, epochs=1)
    assert not (tmp_path / "labels.safetensors").exists()


def test_a_model_that_was_tuned_hard_no_longer_does(tmp_path, capsys):
    summary = tune_on_the_toy(
        tmp_path, shuffle=120, lr=2e-3, epochs=4, batch_tokens=512)
    check = summary["check"]
    assert summary["shuffled"] == 108                   # a tenth is left out in any case
    assert check["samples"] == 12
    assert not check["uses_input"]
    assert check["loss_wrong_input"] < 1.2 * check["loss_right_input"]
    assert summary["top_tenth_rise"] > 1
    assert "has unlearned to use its input" in capsys.readouterr().out


def test_without_samples_left_out_nothing_is_checked(chatml, tmp_path):
    dataset = Dataset.load([write(tmp_path / "a.json", apigen(9))], chatml, "auto", 2048)
    options = shad.Options(model=chatml, data=[""], out=str(tmp_path / "out"))
    _, summary = shad.run(options, dataset, Transformer.from_pretrained(chatml))
    assert summary["shuffled"] == 9
    assert "check" not in summary


def test_by_word_every_token_has_the_largest_ld_of_its_word(chatml, tmp_path):
    texts = ["find_books, now\n", "x 東京", ""]
    dataset = Dataset([talk(("user", "q"), ("assistant", text)) for text in texts],
                      Renderer(chatml))
    difference = np.random.default_rng(0).normal(size=dataset.output_starts[-1])
    by_word = shad.largest_per_word(difference.astype(np.float32), dataset)
    found = []
    k = 0
    for i in range(len(texts)):
        for text, _ in output_pieces(dataset, i):
            found.append((text, difference[k].astype(np.float32), by_word[k]))
            k += 1
    assert k == len(difference)
    words = []                                          # by hand: [(token, LD, LD by word), ...]
    for token in found:
        letters = token[0].replace("_", "a")
        if not (words and letters[:1].isalnum() and words[-1][-1][0][-1:].isalnum()):
            words.append([])
        words[-1].append((letters, *token[1:]))
    assert any(len(word) > 2 for word in words)
    for word in words:
        assert {new for _, _, new in word} == {max(own for _, own, _ in word)}


def test_the_unit_decides_which_labels_are_saved(chatml, tmp_path):
    dataset = Dataset.load([write(tmp_path / "a.json", apigen(30))], chatml, "auto", 2048)
    labels = {}
    for unit in ("token", "word"):
        options = shad.Options(model=chatml, data=[""], out=str(tmp_path / unit), shuffle=10,
                               unit=unit)
        labels[unit], _ = shad.run(options, dataset, Transformer.from_pretrained(chatml))
    expected = shad.largest_per_word(labels["token"], dataset)
    assert np.array_equal(labels["word"], expected)
    assert not np.array_equal(labels["word"], labels["token"])
