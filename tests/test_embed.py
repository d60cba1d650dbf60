"""Sentence embeddings, against the library's own BERT and MPNet on random weights."""
import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, MPNetConfig, MPNetModel

from support.cli import DataError
from support.embed import sentence_encoder
from tiny import write

WORDS = "find a film send the mail to Ann and Bob today please".split()
TEXTS = ["find a film", "send the mail to Ann", "", "find a film", "unknown", "\ud800",
         " ".join(WORDS * 20)]
SIZES = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
         "intermediate_size": 48, "initializer_range": 0.3}


def make_model(directory, kind):
    """A random sentence model with a word-level tokenizer; returns the library's model."""
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate(specials + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tokenizer.enable_padding()                          # as in the files of released models
    tokenizer.enable_truncation(16)
    tokenizer.save(str(directory / "tokenizer.json"))
    if kind == "bert":
        model = BertModel(BertConfig(max_position_embeddings=300, pad_token_id=1, **SIZES))
    else:
        model = MPNetModel(MPNetConfig(max_position_embeddings=302, **SIZES))
    model.eval().save_pretrained(directory)
    return model


def expected(model, directory, text, max_tokens, pool_first=False):
    """The library's pooled embedding of one text."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(max_tokens)
    ids = tokenizer.encode(text.replace("\ud800", "?")).ids
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return (hidden[0] if pool_first else hidden.mean(0)).numpy()


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_embeddings_are_the_librarys(tmp_path, kind):
    model = make_model(tmp_path, kind)
    embed = sentence_encoder(str(tmp_path))
    vectors = embed(TEXTS)
    assert vectors.shape == (len(TEXTS), 32)
    assert vectors.dtype == np.float32
    assert embed.__name__ == tmp_path.name
    for text, vector in zip(TEXTS, vectors, strict=True):
        np.testing.assert_allclose(vector, expected(model, tmp_path, text, 300), atol=1e-5)
    assert (vectors[0] == vectors[3]).all()
    assert np.abs(vectors[0] - vectors[1]).max() > 0.1


def test_a_batch_is_its_texts_one_by_one(tmp_path):
    make_model(tmp_path, "mpnet")
    embed = sentence_encoder(str(tmp_path))
    texts = [" ".join(WORDS[i % 12:i % 12 + 2]) for i in range(100)]
    one_by_one = np.concatenate([embed([text]) for text in texts])
    np.testing.assert_allclose(embed(texts), one_by_one, atol=1e-5)


def test_pooling_and_length_are_those_of_the_files(tmp_path):
    model = make_model(tmp_path, "bert")
    (tmp_path / "1_Pooling").mkdir()
    pooling = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    write(tmp_path / "1_Pooling" / "config.json", pooling)
    write(tmp_path / "sentence_bert_config.json", {"max_seq_length": 12})
    vectors = sentence_encoder(str(tmp_path))(TEXTS)
    for text, vector in zip(TEXTS, vectors, strict=True):
        first = expected(model, tmp_path, text, 12, pool_first=True)
        np.testing.assert_allclose(vector, first, atol=1e-5)


@pytest.mark.parametrize("file, content, message", [
    ("config.json", {"model_type": "t5"}, "model_type 't5' is not supported"),
    ("config.json", {"model_type": "bert", "hidden_act": "relu"}, "activation 'relu'"),
    ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pooling")])
def test_what_is_not_supported_is_named(tmp_path, file, content, message):
    make_model(tmp_path, "bert")
    (tmp_path / "1_Pooling").mkdir()
    write(tmp_path / file, content)
    with pytest.raises(DataError, match=message):
        sentence_encoder(str(tmp_path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"holds no config\.json"):
        sentence_encoder(str(tmp_path))
    write(tmp_path / "config.json", json.dumps({"model_type": "bert"}))
    with pytest.raises(DataError, match=r"holds no model\.safetensors"):
        sentence_encoder(str(tmp_path))
