"""Sentence embeddings by BERT and MPNet checkpoints, to compare texts by their meaning."""
import json
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

from support.cli import DataError

BATCH_SIZE = 32

# How the two families name the parts of an attention layer: query, key, value, output, norm.
ATTENTION = {
    "bert": ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm"),
    "mpnet": ("attn.q", "attn.k", "attn.v", "attn.o", "LayerNorm")}
FIRST_POSITION = {"bert": 0, "mpnet": 2}                # MPNet's first two are for padding


def sentence_encoder(directory: str, device="cpu"):
    """The function embed(texts) -> (n, d) float32 array of a sentence model in Hugging Face layout.

    directory: config.json (model_type bert or mpnet), model.safetensors and tokenizer.json, as in
    all-mpnet-base-v2. A sentence is the mean of its tokens' last hidden states, or the first of
    them where 1_Pooling/config.json says so, as gte-large-zh's does. Longer texts are cut at
    sentence_bert_config.json's max_seq_length. embed.__name__ is the directory's name. A text that
    was seen before costs nothing.

    Raises DataError, naming what is missing or not supported.
    """
    config = read_config(directory)
    weights = load_file(os.path.join(directory, "model.safetensors"), device=str(device))
    weights = {name.removeprefix("bert."): tensor.float() for name, tensor in weights.items()}
    tokenizer = Tokenizer.from_file(os.path.join(directory, "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(config["max_tokens"])

    vectors = {}                                        # {text: (d,)} of every text so far

    def embed(texts: list[str]) -> np.ndarray:
        # Texts of one length form a batch, so that there is no padding and no attention mask.
        by_length = {}
        for text in dict.fromkeys(texts):
            if text not in vectors:
                # a model can write lone surrogates, which the tokenizer refuses
                ids = tokenizer.encode(text.encode("utf-8", "replace").decode()).ids
                by_length.setdefault(len(ids), []).append((text, ids))
        for group in by_length.values():
            for start in range(0, len(group), BATCH_SIZE):
                batch = group[start:start + BATCH_SIZE]
                ids = torch.tensor([ids for _, ids in batch], device=device)        # (B, T)
                hidden = last_hidden_states(weights, config, ids)                   # (B, T, d)
                pooled = hidden[:, 0] if config["pool_first"] else hidden.mean(1)   # (B, d)
                for (text, _), vector in zip(batch, pooled.cpu().numpy(), strict=True):
                    vectors[text] = vector
        return np.stack([vectors[text] for text in texts])

    embed.__name__ = os.path.basename(os.path.abspath(directory))
    return embed


def read_config(directory: str) -> dict:
    """config.json, with "max_tokens" and "pool_first" from the files next to it."""
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not os.path.isfile(os.path.join(directory, name)):
            raise DataError(f"{directory} holds no {name}; give a sentence model in Hugging Face "
                            "layout, such as all-mpnet-base-v2.")
    config = read_json(directory, "config.json")
    if config.get("model_type") not in ATTENTION:
        raise DataError(f"{directory}: the model_type {config.get('model_type')!r} is not "
                        f"supported; known are {', '.join(ATTENTION)}.")
    if config.get("hidden_act", "gelu") != "gelu":
        raise DataError(f"{directory}: the activation {config['hidden_act']!r} is not supported; "
                        "only gelu is.")
    pooling = read_json(directory, "1_Pooling/config.json")
    config["pool_first"] = bool(pooling.get("pooling_mode_cls_token"))
    if pooling and not config["pool_first"] and not pooling.get("pooling_mode_mean_tokens"):
        raise DataError(f"{directory}/1_Pooling/config.json asks for a pooling that is not "
                        "supported; only the mean of all tokens and the first token are.")
    positions = config["max_position_embeddings"] - FIRST_POSITION[config["model_type"]]
    limit = read_json(directory, "sentence_bert_config.json").get("max_seq_length")
    config["max_tokens"] = min(limit or positions, positions)
    return config


def read_json(directory: str, name: str) -> dict:
    """A file's JSON object, empty if there is no such file."""
    path = os.path.join(directory, name)
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as f:
        return json.load(f)


@torch.no_grad()
def last_hidden_states(weights: dict, config: dict, ids: torch.Tensor) -> torch.Tensor:
    """(B, T, d) hidden states of a post-norm transformer encoder for ids (B, T) without padding."""
    kind = config["model_type"]
    heads = config["num_attention_heads"]
    length = ids.shape[1]

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x, name):
        weight = weights[f"{name}.weight"]
        eps = config.get("layer_norm_eps", 1e-12)
        return F.layer_norm(x, weight.shape, weight, weights[f"{name}.bias"], eps)

    def split_heads(x):
        return x.unflatten(2, (heads, -1)).transpose(1, 2)  # (B, heads, T, d / heads)

    # the sum of the embeddings; MPNet adds each key's distance to the attention scores as well
    first = FIRST_POSITION[kind]
    x = weights["embeddings.word_embeddings.weight"][ids]
    x = x + weights["embeddings.position_embeddings.weight"][first:first + length]
    bias = None
    if kind == "bert":
        x = x + weights["embeddings.token_type_embeddings.weight"][0]
    else:
        buckets = relative_buckets(length).to(ids.device)
        bias = weights["encoder.relative_attention_bias.weight"][buckets]           # (T, T, heads)
        bias = bias.permute(2, 0, 1)                                                # (heads, T, T)
    x = norm(x, "embeddings.LayerNorm")                                             # (B, T, d)

    # attention, then the MLP, each with a norm behind its residual sum
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        query, key, value, output, after = [f"{layer}.attention.{name}" for name in ATTENTION[kind]]
        q = split_heads(linear(x, query))
        k = split_heads(linear(x, key))
        v = split_heads(linear(x, value))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        attended = attended.transpose(1, 2).flatten(2)                              # (B, T, d)
        x = norm(x + linear(attended, output), after)
        expanded = F.gelu(linear(x, f"{layer}.intermediate.dense"))                 # (B, T, 4 d)
        x = norm(x + linear(expanded, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return x


def relative_buckets(length: int) -> torch.Tensor:
    """(T, T) MPNet's bucket of each key's distance from each query: 16 before it and 16 after it.

    Of these the nearest 8 hold one distance each, the others grow by a constant factor up to 128.
    """
    positions = torch.arange(length)
    offset = positions[None, :] - positions[:, None]                                # key - query
    distance = offset.abs()
    far = 8 + (torch.log(distance.clamp(min=1) / 8) / math.log(128 / 8) * 8).long()
    return torch.where(distance < 8, distance, far.clamp(max=15)) + 16 * (offset > 0)
