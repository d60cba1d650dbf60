"""What the tests run on: tiny tokenizers, tiny random checkpoints, records in APIGen's schema."""
import json
import os
import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from model import Config, Transformer
from support.readers import Message, Sample

CAN_SHARD = hasattr(torch.cpu.Stream, "record_event")       # FSDP2 on CPUs: not in torch 2.6
METRICS = {"step", "loss", "loss_reasoning", "loss_boilerplate", "weight_reasoning",
           "weight_boilerplate", "lr", "grad_norm", "tokens_per_s"}
CITIES = ["Oslo", "Bern", "Quito", "Lima", "Accra", "Hanoi", "Turin", "Cork"]
CORPUS = [
    f"user assistant system tool What is the weather in {city}? "
    f'[{{"name": "get_weather", "arguments": {{"city": "{city}"}}}}] '
    "Thought: I should call the tool.\nAction: find_city\nAction Input: {}\n" for city in CITIES]


def make_tokenizer(directory, chatml=True):
    """Write tokenizer.json: a byte-level BPE trained on CORPUS; <|endoftext|> is id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = ["<|endoftext|>"]
    if chatml:
        special_tokens += ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=360, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=special_tokens)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(os.path.join(directory, "tokenizer.json"))
    return tokenizer


def make_model(vocab_size, seed=0, **config):
    """A random model; its weights are large enough for losses to differ from token to token."""
    torch.manual_seed(seed)
    settings = {"vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                "initializer_range": 0.15, "tie_word_embeddings": True,
                "extra": {"eos_token_id": 0}}
    return Transformer(Config(**(settings | config)))


def make_checkpoint(directory, chatml=True, **config):
    """Make a Hugging Face directory with a tiny model and its tokenizer; returns its path."""
    os.makedirs(directory, exist_ok=True)
    vocab_size = make_tokenizer(directory, chatml).get_vocab_size()
    make_model(vocab_size, **config).save_pretrained(str(directory))
    return str(directory)


def apigen(count):
    """Records in APIGen's schema, with outputs of uneven lengths."""
    rng = random.Random(0)
    tools = [{"name": "get_weather", "parameters": {"city": {"type": "str"}}}]
    records = []
    for i in range(count):
        calls = []
        for _ in range(1 + i % 4):
            arguments = {"city": rng.choice(CITIES), "days": rng.randint(1, 99)}
            calls.append({"name": "get_weather", "arguments": arguments})
        cities = ", ".join(call["arguments"]["city"] for call in calls)
        records.append({"id": i, "query": f"What is the weather in {cities}?",
                        "tools": json.dumps(tools), "answers": json.dumps(calls)})
    return records


def talk(*turns, id="0"):
    """A sample of (role, text) turns."""
    return Sample(id, [Message(role, text) for role, text in turns])


def write(path, content):
    """Write text as it is, or anything else as JSON; returns the path as a string."""
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return str(path)


def read_lines(path):
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def relative(a, b):
    """The relative error of a against b, by their norms and in float64."""
    a = a.detach().double()
    b = b.detach().double()
    return float((a - b).norm() / b.norm())
