"""Make the toy's base model: `python -m toy.make_base`, from the repository's root.

It takes 10 to 20 minutes on one core. The base must be able to use its input, since SHAD compares
against it, but must never have seen the agent's format. So it is pretrained on made-up documents in
which some words are given by what came before: lists that are repeated, key-value pairs that are
recalled, and catalogue -> request -> call documents that ask for what an agent does (the tool of
the request, its arguments, their values), each in a format of its own: markers, order and filler
words are drawn for every document. Writes config.json, model.safetensors and tokenizer.json beside
this file.
"""
import itertools
import os
import random
import sys

import torch
from tqdm import tqdm

from model import Config, Transformer
from toy.task import NOUNS, POOLS, VERBS, toy_tokenizer, toy_words

STEPS = 3000
ROWS = 16               # documents' rows per batch
LENGTH = 144            # tokens per row
LR = 3e-3
INIT = 0.06
SEED = 0
FIRST = 400             # steps in which copying comes first
GUESS = 0.2             # loss weight of the words that a call's format makes up: guesses at best
PLAIN = [w for w in toy_words() if w[0].isalpha() and w not in VERBS + NOUNS]
SIGNS = [w for w in toy_words() if not w[0].isalpha()]
EVERY = [*itertools.chain(*POOLS.values()), *VERBS, *NOUNS]


# --------------------------------------------------------------------------------------------------
# A document is a list of (word, weight of its loss): 0 for what nobody can know, 1 for what the
# document has already said.

def some(rng, pool, low, high):
    return rng.choices(pool, k=rng.randint(low, high))


def marker(rng, low=1, high=2):
    """What announces a slot: mostly punctuation."""
    words = []
    for _ in range(rng.randint(low, high)):
        words.append(rng.choice(SIGNS if rng.random() < 0.7 else PLAIN))
    return words


def weigh(words, weight=0.0):
    return [(word, weight) for word in words]


def repeat(rng):
    """A random list, repeated once or twice."""
    items = some(rng, rng.choice([EVERY, EVERY, PLAIN + SIGNS, *POOLS.values()]), 3, 12)
    repeated = weigh(some(rng, SIGNS + PLAIN, 1, 2) + items[:1]) + weigh(items[1:], 1)
    return weigh(items) + repeated * rng.randint(1, 2)


def recall(rng):
    """Key-value pairs, then the same keys in another order and between other delimiters."""
    keys = rng.sample(POOLS[rng.choice(list(POOLS))], rng.randint(2, 5))
    values = rng.sample(POOLS[rng.choice(list(POOLS))], len(keys))
    pairs = list(zip(keys, values, strict=True))
    doc = []
    for weight in (0, 1, 1):
        between = some(rng, SIGNS + PLAIN, 0, 2)
        after = some(rng, SIGNS + PLAIN, 0, 2)
        for key, value in pairs:
            doc += weigh([key, *between]) + [(value, weight)] + weigh(after)
        rng.shuffle(pairs)
    return doc


class CallFormat:
    """The format of one document's calls, drawn at random: markers, order, filler words."""

    def __init__(self, rng):
        filler = PLAIN + [",", "."]
        # the catalogue
        self.before_tool = marker(rng)
        self.opening = marker(rng)
        self.comma = marker(rng, 0, 1)
        self.closing = marker(rng)
        # turns
        self.is_chat = rng.random() < 0.5
        self.heads = {role: marker(rng, 2, 3) for role in ("system", "user", "assistant")}
        # what a request says, in which order; and what is said again before the call
        requested = rng.sample(["person", "topic", "tool", "pairs"], 4)
        repeated = rng.sample(["person", "topic"], rng.randint(0, 2))
        self.request_slots = [(some(rng, filler, 0, 4), kind) for kind in requested]
        self.prefix_slots = [(some(rng, filler, 1, 9), kind) for kind in repeated]
        self.verb_to_noun = some(rng, PLAIN, 0, 2)
        self.equals = marker(rng, 0, 1) if rng.random() < 0.6 else []
        self.between_pairs = marker(rng, 0, 1)
        # the call
        self.to_tool = some(rng, filler, 0, 10) + marker(rng, 1, 3)
        self.to_arguments = marker(rng, 1, 6)
        self.to_value = marker(rng)
        self.to_next = marker(rng)
        self.end = marker(rng, 0, 2)

    def turn(self, role, body):
        if not self.is_chat:
            return weigh(self.heads[role]) + body
        return weigh(["<|im_start|>", role, "\n"]) + body + weigh(["<|im_end|>", "\n"])


def join(lists, separator):
    """One list of words, with a separator between the lists."""
    words = []
    for i, more in enumerate(lists):
        words += more if i == 0 else [*separator, *more]
    return words


def call(rng):
    """A catalogue of tools, then one or two requests and their calls, in a format of its own."""
    form = CallFormat(rng)

    # the catalogue
    tools = rng.sample(POOLS["tool"], rng.randint(2, 4))
    names = iter(rng.sample(POOLS["argument"], 12))
    arguments = {tool: list(itertools.islice(names, rng.randint(1, 3))) for tool in tools}
    catalogue = []
    for tool in tools:
        named = join([[name] for name in arguments[tool]], form.comma)
        catalogue += [*form.before_tool, tool, *form.opening, *named, *form.closing]
    doc = form.turn("system", weigh(catalogue))

    for _ in range(rng.choice((1, 1, 2))):
        # the request
        tool = rng.choice(tools)
        verb, noun = tool.split("_")
        values = rng.sample(POOLS["value"], 3)
        pairs = list(zip(arguments[tool], values, strict=False))
        said = {"person": [rng.choice(POOLS["person"])],
                "topic": [rng.choice(POOLS["topic"])],
                "tool": [verb, *form.verb_to_noun, noun],
                "pairs": join([[n, *form.equals, v] for n, v in pairs], form.between_pairs)}
        request = []
        for words, kind in form.request_slots:
            request += words + said[kind]
        doc += form.turn("user", weigh(request))

        # the call
        output = []
        for words, kind in form.prefix_slots:
            output += weigh(words, GUESS) + weigh(said[kind], 1)
        output += weigh(form.to_tool, GUESS) + [(tool, 1)] + weigh(form.to_arguments, GUESS)
        for i, (name, value) in enumerate(pairs):
            if i > 0:
                output += weigh(form.to_next, GUESS)
            output += [(name, 1)] + weigh(form.to_value, GUESS) + [(value, 1)]
        doc += form.turn("assistant", output + weigh(form.end, GUESS))
    return doc


def batch(rng, vocab, mix):
    """tokens, targets (ROWS, LENGTH) int64 and loss weights (ROWS, LENGTH).

    A row holds whole documents one after another, the last one cut.
    """
    ids = torch.zeros(ROWS, LENGTH + 1, dtype=torch.int64)
    weights = torch.zeros(ROWS, LENGTH + 1)
    for row in range(ROWS):
        doc = []
        while len(doc) <= LENGTH:
            kind = rng.choices((call, recall, repeat), mix)[0]
            doc += kind(rng)
        ids[row] = torch.tensor([vocab[word] for word, _ in doc[:LENGTH + 1]])
        weights[row] = torch.tensor([weight for _, weight in doc[:LENGTH + 1]])
    return ids[:, :-1], ids[:, 1:], weights[:, 1:]


# --------------------------------------------------------------------------------------------------
# The model

@torch.no_grad()
def look_back(model, amplitude=7.0, mute=0.3):
    """Let the heads of layer 0 start by looking 1, 2, 1 and 3 tokens back, whatever those are.

    Copying ("what followed this word before?") needs a head that knows each token's predecessor,
    and a random start is slow to find one (Olsson et al. 2022). Constant queries and keys, turned
    apart by RoPE's angle for `back` positions, attend there; they are only the start of training.
    """
    attention = model.model.layers[0].self_attn
    d = model.config.head_dim
    angle = model.config.rope_theta ** (-torch.arange(0, d, 2) / d)             # radians per token
    attention.q_proj.weight.mul_(mute)
    attention.k_proj.weight.mul_(mute)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.mul_(mute**2)        # else the MLPs drown the tokens at first
    for head in range(model.config.num_attention_heads):
        back = (1, 2, 1, 3)[head % 4]
        rows = slice(head * d, head * d + 5)
        turned = slice(rows.start + d // 2, rows.stop + d // 2)
        attention.q_proj.bias[rows] = amplitude
        attention.k_proj.bias[rows] = amplitude * (angle[:5] * back).cos()
        attention.k_proj.bias[turned] = amplitude * (angle[:5] * back).sin()


def learning_rate(step: int) -> float:
    """As a share of LR: warm up over 50 steps, stay, then fall over the second half."""
    return min((step + 1) / 50, 1.0, 2 * (1 - step / STEPS) + 0.02)


def main():
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    out = os.path.dirname(os.path.abspath(__file__))
    tokenizer = toy_tokenizer()
    tokenizer.save(os.path.join(out, "tokenizer.json"))
    vocab = tokenizer.get_vocab()
    model = Transformer(Config(
        vocab_size=len(vocab), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, tie_word_embeddings=True, max_position_embeddings=512,
        attention_bias=True, initializer_range=INIT,
        extra={"bos_token_id": None, "eos_token_id": vocab["<|im_end|>"]}))
    look_back(model)
    optimizer = torch.optim.AdamW(model.parameters(), LR, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)
    mean = 0.0
    progress = tqdm(range(STEPS), desc="pretraining", mininterval=5)
    for step in progress:
        mix = (0.3, 1, 2) if step < FIRST else (3, 1, 0.5)      # copying first, then formats
        tokens, targets, weights = batch(rng, vocab, mix)
        loss = (weights * model(tokens, targets)).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        mean += (loss.item() - mean) / min(step + 1, 100)
        progress.set_postfix(loss=f"{mean:.2f}", refresh=False)
        if (step + 1) % 300 == 0 or step + 1 == STEPS:
            model.save_pretrained(out)
            tqdm.write(f"step {step + 1}: loss {mean:.3f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    main()
