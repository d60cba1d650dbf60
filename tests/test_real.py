"""Real data from $SHAD_RFT_DATA and a real model from $SHAD_RFT_MODEL; skipped without them."""
import os

import numpy as np
import pytest
import torch

from data import Dataset, epoch_batches, micro_batches, read_samples
from model import Transformer
from support.generate import generate
from support.templates import Renderer
from tiny import make_checkpoint

DATA = os.environ.get("SHAD_RFT_DATA")
MODEL = os.environ.get("SHAD_RFT_MODEL")
needs_data = pytest.mark.skipif(
    not DATA, reason="set SHAD_RFT_DATA to a folder with apigen/, toolbench/ and sharegpt/")
needs_model = pytest.mark.skipif(
    not MODEL, reason="set SHAD_RFT_MODEL to a Hugging Face directory")


def data_files():
    files = ["apigen/train.json", "sharegpt/dummy_conversation.json",
             "sharegpt/glaive_toolcall_en.json"]
    for name in sorted(os.listdir(os.path.join(DATA, "toolbench"))):
        if name.endswith(".json"):
            files.append(f"toolbench/{name}")
    return files


@needs_data
def test_every_real_file_is_read_and_its_outputs_are_what_is_scored(tmp_path):
    renderer = Renderer(make_checkpoint(tmp_path))
    for name in data_files():
        samples = read_samples(os.path.join(DATA, name))
        assert len(samples) > 1, name
        for sample in samples:
            outputs = [m for m in sample.messages if m.is_output]
            assert outputs, (name, sample.id)
            assert all(m.text for m in sample.messages if m.role == "user"), (name, sample.id)
            if name.startswith("apigen"):
                roles = {role for _, role in outputs[0].role_spans}
                assert roles == {"reasoning", "format"}, sample.id
        for sample in samples[:20]:
            ids, roles = renderer.render(sample.messages)
            scored = [i for i, role in zip(ids, roles, strict=True) if role]
            text = renderer.tokenizer.decode(scored, skip_special_tokens=False)
            outputs = [m.text + "<|im_end|>" for m in sample.messages if m.is_output]
            assert text == "".join(outputs), (name, sample.id)


@needs_data
def test_padding_is_under_5_percent(tmp_path):
    file = os.path.join(DATA, "apigen", "train.json")
    dataset = Dataset.load([file], MODEL or make_checkpoint(tmp_path), "auto", 2048)
    real = padded = 0
    for batch in epoch_batches(dataset.lengths, dataset.kept, 8192, seed=0):
        for piece in micro_batches(batch, dataset.lengths, 4096):
            real += int(dataset.lengths[piece].sum())
            padded += len(piece) * int(np.max(dataset.lengths[piece]))
    assert real == dataset.lengths.sum()
    assert 1 - real / padded < 0.05


@needs_model
def test_logits_and_greedy_text_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ours = Transformer.from_pretrained(MODEL)
    tokenizer = Renderer(MODEL).tokenizer
    texts = ["The capital of France is", "def fibonacci(n):\n    ",
             "Licensed under the Apache License, Version 2.0; you may not use this"]
    prompts = [tokenizer.encode(text).ids for text in texts]
    with torch.no_grad():
        for prompt in prompts:
            tokens = torch.tensor([prompt])
            torch.testing.assert_close(
                ours(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-4)
    theirs.generation_config.eos_token_id = None            # 50 tokens, whatever they are
    outputs = generate(ours, prompts, 50, set())
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=50, do_sample=False, pad_token_id=0)
        assert len(output) == 50
        assert output == expected[0, len(prompt):].tolist()
