"""The toy: agent samples whose generator knows every token's true role, and their tokenizer."""
import itertools
import random
import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers


# -----------------------------------------------------------------------------------------------------------------
# The toy: its words. Pools are large, so that a guess without the input is dear: at least 126 words, 4.8 nats.

def _made_up(count: int, length: int, seed: int) -> list[str]:
    """Pronounceable words that mean nothing: `length` syllables and a final consonant."""
    rng, words = random.Random(seed), {}
    while len(words) < count:
        words["".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(length)) + rng.choice("lnrsx")] = None
    return list(words)


VERBS = "find book check send make open read save show sort move share track print".split()
NOUNS = "hotel flight ticket report letter photo recipe order song file event room table bill ride game".split()
ARGUMENTS = [f"{a}_{b}" for a in "first last old new home work main next top base best local final early".split()
             for b in "city date name code price color size team time place level group".split()]
POOLS = {"tool": [f"{verb}_{noun}" for verb in VERBS for noun in NOUNS], "argument": ARGUMENTS,
         "value": _made_up(320, 2, 1), "person": [w.capitalize() for w in _made_up(240, 1, 2)], "topic": _made_up(240, 3, 3)}

REQUESTS = {    # held out or not -> wordings; every one names the person, the topic, the tool and the arguments
    False: ["I am {person}. About the {topic}: please use a {tool} with {arguments}.",
            "{person} here. Can you use the {tool} for the {topic}? Take {arguments}.",
            "Hello, {person} needs you to use one {tool}, {arguments}. It is for the {topic}.",
            "For the {topic} of {person}, use my {tool} with {arguments}, thanks.",
            "We plan the {topic}. {person} wants to use this {tool}. Set {arguments}."],
    True: ["Help {person}! I want to use some {tool} by {arguments}. The {topic} is near.",
           "As for the {topic}, {person} would like to use that {tool}: {arguments}."]}
OPENINGS = ["Based on the request of {person}, I should", "To help {person}, I need to", "Since {person} asks me, I will",
            "It is clear what {person} wants, so I can", "Reading this, {person} expects me to"]
MIDDLES = ["deal with the {topic}", "call a tool for the {topic}", "look into the {topic} now", "use what fits the {topic}"]
CLOSINGS = [".", ".", ". By doing so, we get the answer.", ", which gives the result."]


def _split(pool: list[str], held_out: bool) -> list[str]:
    """Every fourth word is held out (of the tools: every fourth pair of words, in each verb and each noun)."""
    shift = len(NOUNS) if len(pool) == len(VERBS) * len(NOUNS) else len(pool)
    return [word for i, word in enumerate(pool) if ((i + i // shift) % 4 == 3) == held_out]


def toy_records(count: int, seed: int, held_out: bool = False) -> list[dict]:
    """`count` agent samples; `held_out` ones have other tools, arguments, values, people, topics and request wordings."""
    rng, records = random.Random(f"{seed} {held_out}"), []
    pools = {kind: _split(pool, held_out) for kind, pool in POOLS.items()}
    for i in range(count):
        tools = rng.sample(pools["tool"], 3)
        names = iter(rng.sample(pools["argument"], 9))
        arguments = {tool: list(itertools.islice(names, rng.choice((2, 3)))) for tool in tools}
        tool = rng.choice(tools)
        values = rng.sample(pools["value"], len(arguments[tool]))
        pairs = list(zip(arguments[tool], values))
        fields = {"person": rng.choice(pools["person"]), "topic": rng.choice(pools["topic"])}
        request = rng.choice(REQUESTS[held_out]).format(
            tool=tool, arguments=", ".join(f"{name} {value}" for name, value in pairs), **fields)
        thought = f"{rng.choice(OPENINGS)} {rng.choice(MIDDLES)}{rng.choice(CLOSINGS)}"

        parts = [("Thought: ", "format")]
        for piece in re.split(r"(\{\w+\})", thought):
            slot = fields.get(piece.strip("{}"))
            parts.append((slot, "reasoning") if slot else (piece, "connecting"))
        parts += [("\nAction: ", "format"), (tool, "reasoning"), ("\nAction Input: ", "format")]
        for n, (name, value) in enumerate(pairs):
            parts += [('","' if n else '{"', "format"), (name, "reasoning"), ('":"', "format"), (value, "reasoning")]
        parts.append(('"}', "format"))
        system = "Tools:" + "".join(f"\n- {name}({', '.join(arguments[name])})" for name in tools)
        records.append({"id": f"toy-{'out' if held_out else 'in'}-{seed}-{i}", "messages": [
            {"role": "system", "content": system},
            {"role": "user", "content": request},
            {"role": "assistant", "content": "".join(text for text, _ in parts), "parts": parts}]})
    return records


# -----------------------------------------------------------------------------------------------------------------
# The toy's tokenizer: one id a word, a run of punctuation, or a newline

PIECE = r"\w+|[^\w\s]+|\n"


def toy_words() -> list[str]:
    """The words of the wordings (requests, thoughts, the fixed format), sorted: all that no pool holds."""
    texts = [*REQUESTS[False], *REQUESTS[True], *OPENINGS, *MIDDLES, *CLOSINGS, ". , ? ! : - ( ) {\" \":\" \",\" \"}", "\n",
             "Tools Thought Action Input system user assistant tool", *VERBS, *NOUNS]
    return sorted({word for text in texts for word in re.findall(PIECE, re.sub(r"\{\w+\}", " ", text))})


def toy_tokenizer():
    """The word-level tokenizer. decode(encode(text)) gives back an agent's output exactly."""
    words = ["<unk>", "<|im_start|>", "<|im_end|>", *toy_words(), *itertools.chain(*POOLS.values())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words[:3]])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), "removed", invert=True)
    glue = {" \n ": "\n", " :": ":", " ,": ",", " .": ".", '{" ': '{"', ' ":" ': '":"', ' "," ': '","', ' "}': '"}',
            "( ": "(", " )": ")", " (": "("}
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse(),
                                           *(decoders.Replace(old, new) for old, new in glue.items())])
    return tokenizer
