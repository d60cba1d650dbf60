"""What the tests are run on: tiny tokenizers, tiny random checkpoints, a few records of our own in each schema."""
import json
import os
import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data import Message, Sample
from model import Config, Transformer

CAN_SHARD = hasattr(torch.cpu.Stream, "record_event")       # FSDP2 on CPUs: not in torch 2.6
CITIES = ["Oslo", "Bern", "Quito", "Lima", "Accra", "Hanoi", "Turin", "Cork"]
CORPUS = [f'user assistant system tool What is the weather in {city}? [{{"name": "get_weather", "arguments": {{"city": "{city}"}}}}] '
          "Thought: I should call the tool.\nAction: find_city\nAction Input: {}\n" for city in CITIES]


def make_tokenizer(directory, chatml=True):
    """Write tokenizer.json: a byte-level BPE trained on CORPUS; <|endoftext|> is id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=360, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"] + ["<|im_start|>", "<|im_end|>"] * chatml))
    tokenizer.save(os.path.join(directory, "tokenizer.json"))
    return tokenizer


def make_model(vocab_size, seed=0, **config):
    """A random model; its weights are large enough for its losses to differ from token to token."""
    torch.manual_seed(seed)
    return Transformer(Config(**{"vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                                 "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15,
                                 "tie_word_embeddings": True, "extra": {"eos_token_id": 0}} | config))


def make_checkpoint(directory, chatml=True):
    """A HF directory with a tiny model and its tokenizer; returns its path."""
    tokenizer = make_tokenizer(directory, chatml)
    make_model(tokenizer.get_vocab_size()).save_pretrained(str(directory))
    return str(directory)


def apigen(count):
    """Records in APIGen's schema, with outputs of uneven lengths."""
    rng, records = random.Random(0), []
    for i in range(count):
        calls = [{"name": "get_weather", "arguments": {"city": rng.choice(CITIES), "days": rng.randint(1, 99)}}
                 for _ in range(1 + i % 4)]
        records.append({"id": i, "query": f"What is the weather in {', '.join(c['arguments']['city'] for c in calls)}?",
                        "tools": json.dumps([{"name": "get_weather", "parameters": {"city": {"type": "str"}}}]),
                        "answers": json.dumps(calls)})
    return records


def talk(*turns, id="0"):
    """A sample of (role, text) turns."""
    return Sample(id, [Message(role, text) for role, text in turns])


def write(path, content):
    """Write text as it is, or anything else as JSON; returns the path as a string."""
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def relative(a, b):
    """The norm-wise relative error of a against b, in float64."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())
