"""Make the toy's base model: `python -m toy.make_base`, from the repository's root (10 to 20 minutes on one core).

The base must be able to use its input, since SHAD compares against it, but must never have seen the agent's format.
So it is pretrained on made-up documents in which some words are given by what came before: lists that are
repeated, key-value pairs that are recalled, and catalogue -> request -> call documents that ask for what an
agent does (the tool of the request, its arguments, their values), each in a format of its own: markers, order and
filler words are drawn anew for every document. Writes config.json, model.safetensors and tokenizer.json beside this file.
"""
import os
import random
import sys

import torch
from tqdm import tqdm

from data import NOUNS, POOLS, VERBS, toy_tokenizer, toy_words
from model import Config, Transformer

STEPS, ROWS, LENGTH, LR, INIT, SEED = 3000, 16, 144, 3e-3, 0.06, 0
FIRST = 400         # steps in which copying comes first
GUESS = 0.2         # weight of the words that a call's format makes up, which can only be guessed
PLAIN = [w for w in toy_words() if w[0].isalpha() and w not in VERBS + NOUNS]
SIGNS = [w for w in toy_words() if not w[0].isalpha()]
EVERY = [w for pool in POOLS.values() for w in pool] + VERBS + NOUNS


# A document is a list of (word, weight of its loss): 0 what nobody can know, 1 what the document has already said.

def some(rng, pool, low, high):
    return rng.choices(pool, k=rng.randint(low, high))


def marker(rng, low=1, high=2):
    """What announces a slot: punctuation mostly."""
    return [rng.choice(SIGNS if rng.random() < 0.7 else PLAIN) for _ in range(rng.randint(low, high))]


def weigh(words, weight=0.0):
    return [(word, weight) for word in words]


def repeat(rng):
    """A random list, said again."""
    items = some(rng, rng.choice([EVERY, EVERY, PLAIN + SIGNS, *POOLS.values()]), 3, 12)
    again = weigh(some(rng, SIGNS + PLAIN, 1, 2) + items[:1]) + weigh(items[1:], 1)
    return weigh(items) + again * rng.randint(1, 2)


def recall(rng):
    """Key-value pairs, then the same keys in another order and between other delimiters."""
    keys = rng.sample(POOLS[rng.choice(list(POOLS))], rng.randint(2, 5))
    pairs = list(zip(keys, rng.sample(POOLS[rng.choice(list(POOLS))], len(keys))))
    doc = []
    for weight in (0, 1, 1):
        between, after = some(rng, SIGNS + PLAIN, 0, 2), some(rng, SIGNS + PLAIN, 0, 2)
        for key, value in pairs:
            doc += weigh([key, *between]) + [(value, weight)] + weigh(after)
        rng.shuffle(pairs)
    return doc


def call(rng):
    """A catalogue of tools, then one or two requests, each with its call; the format is drawn for this document."""
    filler = PLAIN + [",", "."]
    before, opening, comma, closing = marker(rng), marker(rng), marker(rng, 0, 1), marker(rng)
    is_chat, heads = rng.random() < 0.5, {role: marker(rng, 2, 3) for role in ("system", "user", "assistant")}

    def turn(role, body):
        if not is_chat:
            return weigh(heads[role]) + body
        return weigh(["<|im_start|>", role, "\n"]) + body + weigh(["<|im_end|>", "\n"])

    asked = rng.sample(["person", "topic", "tool", "pairs"], 4)             # what a request says, in which order
    told = rng.sample(["person", "topic"], rng.randint(0, 2))               # what is said again before the call
    asked, told = ([(some(rng, filler, *size), kind) for kind in kinds] for kinds, size in ((asked, (0, 4)), (told, (1, 9))))
    middle, equals, between = some(rng, PLAIN, 0, 2), marker(rng, 0, 1) if rng.random() < 0.6 else [], marker(rng, 0, 1)
    to_tool, to_arguments = some(rng, filler, 0, 10) + marker(rng, 1, 3), marker(rng, 1, 6)
    to_value, to_next, end = marker(rng), marker(rng), marker(rng, 0, 2)

    tools, names = rng.sample(POOLS["tool"], rng.randint(2, 4)), iter(rng.sample(POOLS["argument"], 12))
    arguments = {tool: [next(names) for _ in range(rng.randint(1, 3))] for tool in tools}
    doc = turn("system", weigh(word for tool in tools for word in (
        *before, tool, *opening, *(w for i, name in enumerate(arguments[tool]) for w in (*comma * (i > 0), name)), *closing)))
    for _ in range(rng.choice((1, 1, 2))):
        tool = rng.choice(tools)
        verb, noun = tool.split("_")
        pairs = list(zip(arguments[tool], rng.sample(POOLS["value"], 3)))
        said = {"person": [rng.choice(POOLS["person"])], "topic": [rng.choice(POOLS["topic"])], "tool": [verb, *middle, noun],
                "pairs": [w for i, (name, value) in enumerate(pairs) for w in (*between * (i > 0), name, *equals, value)]}
        doc += turn("user", weigh(word for words, kind in asked for word in words + said[kind]))
        output = [slot for words, kind in told for slot in weigh(words, GUESS) + weigh(said[kind], 1)]
        output += weigh(to_tool, GUESS) + [(tool, 1)] + weigh(to_arguments, GUESS)
        for i, (name, value) in enumerate(pairs):
            output += weigh(to_next * (i > 0), GUESS) + [(name, 1)] + weigh(to_value, GUESS) + [(value, 1)]
        doc += turn("assistant", output + weigh(end, GUESS))
    return doc


def batch(rng, vocab, mix):
    """tokens, targets (ROWS, LENGTH) int64 and weights (ROWS, LENGTH): whole documents one after another, the last one cut."""
    ids, weights = torch.zeros(ROWS, LENGTH + 1, dtype=torch.int64), torch.zeros(ROWS, LENGTH + 1)
    for row in range(ROWS):
        doc = []
        while len(doc) <= LENGTH:
            doc += rng.choices((call, recall, repeat), mix)[0](rng)
        ids[row] = torch.tensor([vocab[word] for word, _ in doc[:LENGTH + 1]])
        weights[row] = torch.tensor([weight for _, weight in doc[:LENGTH + 1]])
    return ids[:, :-1], ids[:, 1:], weights[:, 1:]


@torch.no_grad()
def look_back(model, amplitude=7.0, mute=0.3):
    """Let the heads of layer 0 start by looking 1, 2, 1 and 3 tokens back, whatever those tokens are.

    Copying ("what followed this word before?") needs a head that knows each token's predecessor, and a random start
    is slow to find one (Olsson et al. 2022). Constant queries and keys, turned apart by RoPE's angle for `back` positions,
    attend there; they are only the start of training.
    """
    attention, d = model.model.layers[0].self_attn, model.config.head_dim
    angle = model.config.rope_theta ** (-torch.arange(0, d, 2) / d)
    attention.q_proj.weight.mul_(mute), attention.k_proj.weight.mul_(mute)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.mul_(mute**2)        # else the MLPs drown the tokens at first
    for head in range(model.config.num_attention_heads):
        back, rows = (1, 2, 1, 3)[head % 4], slice(head * d, head * d + 5)
        turned = slice(rows.start + d // 2, rows.stop + d // 2)
        attention.q_proj.bias[rows] = amplitude
        attention.k_proj.bias[rows] = amplitude * (angle[:5] * back).cos()
        attention.k_proj.bias[turned] = amplitude * (angle[:5] * back).sin()


def main():
    torch.manual_seed(SEED)
    rng, tokenizer = random.Random(SEED), toy_tokenizer()
    vocab, out = tokenizer.get_vocab(), os.path.dirname(os.path.abspath(__file__))
    model = Transformer(Config(
        vocab_size=len(vocab), hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        tie_word_embeddings=True, max_position_embeddings=512, attention_bias=True, initializer_range=INIT,
        other={"bos_token_id": None, "eos_token_id": vocab["<|im_end|>"]}))
    look_back(model)
    optimizer = torch.optim.AdamW(model.parameters(), LR, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min((k + 1) / 50, 1.0, 2 * (1 - k / STEPS) + 0.02))
    tokenizer.save(os.path.join(out, "tokenizer.json"))
    mean = 0.0
    progress = tqdm(range(STEPS), desc="pretraining", mininterval=5)
    for step in progress:
        tokens, targets, weights = batch(rng, vocab, (0.3, 1, 2) if step < FIRST else (3, 1, 0.5))      # copying first, then formats
        loss = (weights * model(tokens, targets)).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad(), schedule.step()
        mean += (loss.item() - mean) / min(step + 1, 100)
        progress.set_postfix(loss=f"{mean:.2f}", refresh=False)
        if (step + 1) % 300 == 0 or step + 1 == STEPS:
            model.save_pretrained(out)
            tqdm.write(f"step {step + 1}: loss {mean:.3f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    main()
