"""SHAD's parts: the area under the curve, the threshold, per-token losses, the coloured pieces."""
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, processors

import shad
from data import Dataset, Renderer, draw, toy_samples, toy_tokenizer
from model import Transformer
from tiny import apigen, talk, write


def test_auc_is_the_chance_that_a_positive_scores_above_a_negative():
    rng = np.random.default_rng(0)
    for n, levels in [(2, 2), (30, 3), (80, 7), (200, 10**6)] * 3:
        scores, positive = rng.integers(levels, size=n).astype(np.float32), rng.random(n) < 0.4
        positive[:2] = True, False
        above = [1.0 if p > q else 0.5 if p == q else 0.0 for p in scores[positive] for q in scores[~positive]]
        assert shad.auc(scores, positive) == pytest.approx(sum(above) / len(above), abs=1e-12)
    assert np.isnan(shad.auc(scores, np.ones(n, bool)))


def test_classify_and_loss_difference():
    tuned, base = np.array([1.0, 2.0, 3.0], np.float32), np.array([2.0, 2.0, 2.5], np.float32)
    difference = shad.loss_difference(tuned, base)
    assert difference.tolist() == [-1.0, 0.0, 0.5]
    assert shad.classify(difference).tolist() == [False, False, True]          # LD <= 0 is boilerplate
    assert shad.classify(difference, 0.5).tolist() == [False, False, False]
    assert shad.classify(torch.from_numpy(difference), -1.0).tolist() == [False, True, True]


@pytest.mark.parametrize("micro_tokens", [1, 500, 10**6])
def test_token_losses_are_those_of_each_sample_alone(chatml, tmp_path, micro_tokens):
    model = Transformer.from_pretrained(chatml)
    dataset = Dataset.load([write(tmp_path / "a.json", apigen(12))], chatml, "auto", 200)
    assert dataset.dropped and len(dataset.kept) > 4
    losses = shad.token_losses(model, dataset, micro_tokens, "")
    expected = []
    for ids, is_output in zip(dataset.ids, dataset.is_output):
        if len(ids):
            ids = torch.tensor(ids).long()[None]
            with torch.no_grad():
                each = F.cross_entropy(model(ids[:, :-1])[0].double(), ids[0, 1:], reduction="none")
            expected.append(each[torch.from_numpy(is_output[1:])])
    expected = torch.cat(expected).float().numpy()
    assert losses.dtype == np.float32 and losses.std() > 0.1
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)


def check_pieces(dataset):
    for i, sample in enumerate(dataset.samples):
        pieces = shad.output_pieces(dataset, i)
        assert len(pieces) == dataset.is_output[i].sum()            # one a token, so that each has its loss difference
        assert "".join(text for text, _ in pieces) == "".join(m.text + "⏎\n" for m in sample.messages if m.is_output)


@pytest.mark.parametrize("trim_offsets", [None, True, False], ids=["no post-processor", "trimmed", "not trimmed"])
def test_output_pieces_tile_the_outputs(chatml, tmp_path, trim_offsets):
    tokenizer = Tokenizer.from_file(chatml + "/tokenizer.json")
    if trim_offsets is not None:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    outputs = ["Thought: I see.\nAction: find\nAction Input: {\"a\": [1, 2]}", "  spaces  ", "Köln 東京 🎈🎈", "a\n\n", "", "\t", "<|im_end|> & <b>"]
    samples = [talk(("user", "q"), ("assistant", text), ("user", "more"), ("assistant", outputs[k - 1])) for k, text in enumerate(outputs)]
    check_pieces(Dataset(samples, Renderer(str(tmp_path))))


def test_output_pieces_of_the_toy(tmp_path):
    toy_tokenizer().save(str(tmp_path / "tokenizer.json"))
    dataset = Dataset(toy_samples(40, 0), Renderer(str(tmp_path)))
    check_pieces(dataset)
    formats = {text.strip() for i in range(40) for text, is_format in shad.output_pieces(dataset, i) if is_format}
    assert {"Thought", "Action", "Input", ":", '{"', '":"', '"}'} <= formats


def test_true_roles_are_scored_on_samples_that_were_not_shuffled():
    difference, roles = np.array([1.0, -1.0, 1.0, -1.0], np.float32), {"reasoning": np.array([True, False, False, True])}
    losses = np.zeros(4, np.float32)
    truth = shad.summarize(difference, losses, losses, np.array([True, True, False, False]), roles, 0.0)["truth"]
    assert truth["tokens"] == 2 and truth["error"] == 0 and truth["auc"] == 1
    truth = shad.summarize(difference, losses, losses, np.ones(4, bool), roles, 0.0)["truth"]
    assert truth["error"] == 0.5 and truth["missed_reasoning"] == 0.5 and truth["boilerplate_called_reasoning"] == 0.5


def test_a_model_tuned_on_shuffled_outputs_loses_what_the_inputs_told(chatml, tmp_path):
    """`run` leaves in `model` the discriminator and returns its losses minus the base's."""
    dataset = Dataset.load([write(tmp_path / "a.json", apigen(20))], chatml, "auto", 2048)
    model, before = Transformer.from_pretrained(chatml), Transformer.from_pretrained(chatml)
    difference = shad.run(shad.Options(model=chatml, data=[""], out=str(tmp_path / "out"), shuffle=10, epochs=2, lr=1e-3,
                                       batch_tokens=1024), dataset, model)
    expected = shad.token_losses(model, dataset, 2048, "") - shad.token_losses(before, dataset, 2048, "")
    np.testing.assert_allclose(difference, expected, rtol=0, atol=1e-4)
    assert difference.mean() < -0.05                                # it did learn something


def test_the_picture_and_the_summary_say_what_is_so():
    zeros = shad.histogram_svg(np.zeros(9, np.float32), 0.0)               # LD = 0 is boilerplate
    assert "boilerplate, LD" in zeros and "reasoning, LD" not in zeros
    roles, losses = {"reasoning": np.array([True, False])}, np.zeros(2, np.float32)
    for others, said in ((np.array([False, False]), "shuffled ones too"), (np.array([True, True]), "samples not shuffled")):
        summary = shad.summarize(np.array([1.0, -1.0], np.float32), losses, losses, others, roles, 0.0)
        assert said in shad.describe(summary | {"samples": 2, "shuffled": 2})


def test_samples_of_the_same_name_are_told_apart(chatml, tmp_path):
    """Two files may use the same ids: what was shuffled goes by the place in the data."""
    dataset = Dataset.load([write(tmp_path / f"{name}.json", apigen(20)) for name in "ab"], chatml, "auto", 2048)
    shad.run(shad.Options(model=chatml, data=[""], out=str(tmp_path / "out"), shuffle=10), dataset, Transformer.from_pretrained(chatml))
    drawn = {int(i) for i in draw(40, 10 / 40, random.Random(0))}
    truth = json.loads((tmp_path / "out" / "summary.json").read_text())["truth"]
    assert truth["tokens"] == sum(int(n) for i, n in enumerate(dataset.outputs) if i not in drawn) and not truth["shuffled_too"]
