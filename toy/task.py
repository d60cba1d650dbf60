"""The toy: agent samples whose generator knows every token's true role, and their tokenizer.

A sample lists three tools, a request names one of them with its arguments, and the answer is a
Thought / Action / Action Input turn. Records are plain: messages, the assistant's with "parts", a
list of [text, role] that concatenates to its content.

    python -m toy.task --pairs 500 > pairs.jsonl        # chosen and rejected answers, for DPO
"""
import argparse
import itertools
import json
import random
import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

# --------------------------------------------------------------------------------------------------
# Words. Pools are large, so that guessing without the input costs at least log(126) = 4.8 nats.

def made_up_words(count: int, syllables: int, seed: int) -> list[str]:
    """Pronounceable words that mean nothing: syllables and a final consonant."""
    rng = random.Random(seed)
    words = {}                                              # a set that keeps its order
    while len(words) < count:
        word = ""
        for _ in range(syllables):
            word += rng.choice("bdfgklmnprstvz") + rng.choice("aeiou")
        words[word + rng.choice("lnrsx")] = None
    return list(words)


VERBS = "find book check send make open read save show sort move share track print".split()
NOUNS = ("hotel flight ticket report letter photo recipe order song file event room table bill "
         "ride game").split()
FIRST_PARTS = "first last old new home work main next top base best local final early".split()
SECOND_PARTS = "city date name code price color size team time place level group".split()
POOLS = {
    "tool": [f"{verb}_{noun}" for verb, noun in itertools.product(VERBS, NOUNS)],
    "argument": [f"{a}_{b}" for a, b in itertools.product(FIRST_PARTS, SECOND_PARTS)],
    "value": made_up_words(320, 2, seed=1),
    "person": [word.capitalize() for word in made_up_words(240, 1, seed=2)],
    "topic": made_up_words(240, 3, seed=3)}

# {held out: wordings}; every one names the person, the topic, the tool and the arguments
REQUESTS = {
    False: ["I am {person}. About the {topic}: please use a {tool} with {arguments}.",
            "{person} here. Can you use the {tool} for the {topic}? Take {arguments}.",
            "Hello, {person} needs you to use one {tool}, {arguments}. It is for the {topic}.",
            "For the {topic} of {person}, use my {tool} with {arguments}, thanks.",
            "We plan the {topic}. {person} wants to use this {tool}. Set {arguments}."],
    True: ["Help {person}! I want to use some {tool} by {arguments}. The {topic} is near.",
           "As for the {topic}, {person} would like to use that {tool}: {arguments}."]}
OPENINGS = ["Based on the request of {person}, I should", "To help {person}, I need to",
            "Since {person} asks me, I will", "It is clear what {person} wants, so I can",
            "Reading this, {person} expects me to"]
MIDDLES = ["deal with the {topic}", "call a tool for the {topic}", "look into the {topic} now",
           "use what fits the {topic}"]
CLOSINGS = [".", ".", ". By doing so, we get the answer.", ", which gives the result."]


# --------------------------------------------------------------------------------------------------
# Records

def toy_records(count: int, seed: int, held_out: bool = False) -> list[dict]:
    """`count` agent samples.

    Those held out have other tools, arguments, values, people, topics and wordings of the request.
    """
    rng = random.Random(f"{seed} {held_out}")
    pools = {kind: split_pool(pool, held_out) for kind, pool in POOLS.items()}
    return [toy_record(i, seed, held_out, pools, rng) for i in range(count)]


def split_pool(pool: list[str], held_out: bool) -> list[str]:
    """Every fourth word is held out; of the tools, every fourth pair in each verb and each noun."""
    is_tools = len(pool) == len(VERBS) * len(NOUNS)
    shift = len(NOUNS) if is_tools else len(pool)
    return [word for i, word in enumerate(pool) if ((i + i // shift) % 4 == 3) == held_out]


def toy_record(i: int, seed: int, held_out: bool, pools: dict, rng: random.Random) -> dict:
    # three tools with two or three arguments each; one of them is asked for
    tools = rng.sample(pools["tool"], 3)
    names = iter(rng.sample(pools["argument"], 9))
    arguments = {}
    for tool in tools:
        arguments[tool] = list(itertools.islice(names, rng.choice((2, 3))))
    tool = rng.choice(tools)
    values = rng.sample(pools["value"], len(arguments[tool]))
    pairs = list(zip(arguments[tool], values, strict=True))
    fields = {"person": rng.choice(pools["person"]), "topic": rng.choice(pools["topic"])}

    # the input: a list of the tools, and the request
    system = "Tools:"
    for name in tools:
        system += f"\n- {name}({', '.join(arguments[name])})"
    spelled = ", ".join(f"{name} {value}" for name, value in pairs)
    request = rng.choice(REQUESTS[held_out]).format(tool=tool, arguments=spelled, **fields)

    # the output, with the true role of each piece
    thought = f"{rng.choice(OPENINGS)} {rng.choice(MIDDLES)}{rng.choice(CLOSINGS)}"
    parts = [("Thought: ", "format")]
    for piece in re.split(r"(\{\w+\})", thought):
        slot = fields.get(piece.strip("{}"))
        parts.append((slot, "reasoning") if slot else (piece, "connecting"))
    parts += [("\nAction: ", "format"), (tool, "reasoning"), ("\nAction Input: ", "format")]
    for n, (name, value) in enumerate(pairs):
        parts.append(('","', "boundary") if n else ('{"', "format"))
        parts += [(name, "reasoning"), ('":"', "format"), (value, "reasoning")]
    parts.append(('"}', "boundary"))            # which of the two follows a value is the input's

    kind = "out" if held_out else "in"
    answer = "".join(text for text, _ in parts)
    return {"id": f"toy-{kind}-{seed}-{i}", "messages": [
        {"role": "system", "content": system},
        {"role": "user", "content": request},
        {"role": "assistant", "content": answer, "parts": parts}]}


def toy_pairs(count: int, seed: int) -> list[dict]:
    """`count` records {"id", "messages", "chosen", "rejected"} of held-in samples.

    The rejected answer has a wrong tool or argument, another one that the prompt offers, or a wrong
    value; all else is as chosen.
    """
    rng = random.Random(f"pairs {seed}")
    values = split_pool(POOLS["value"], held_out=False)
    pairs = []
    for record in toy_records(count, seed):
        *prompt, answer = record["messages"]
        parts = answer["parts"]
        call = parts.index(("\nAction: ", "format"))
        places = [i for i, (_, role) in enumerate(parts) if i > call and role == "reasoning"]
        tool = places[0]
        arguments = places[1::2]

        kind = rng.choice(("tool", "argument", "value"))
        if kind == "tool":
            place = tool
            choices = re.findall(r"- (\w+)\(", prompt[0]["content"])
        elif kind == "argument":
            place = rng.choice(arguments)
            choices = re.findall(r"\w+(?=[,)])", prompt[0]["content"])
        else:
            place = rng.choice(arguments) + 2           # after the argument and its '":"'
            choices = values
        said = {text for text, _ in parts}
        wrong = [text for text, _ in parts]
        wrong[place] = rng.choice([word for word in choices if word not in said])
        pairs.append({"id": record["id"], "messages": prompt, "chosen": answer["content"],
                      "rejected": "".join(wrong)})
    return pairs


# --------------------------------------------------------------------------------------------------
# The tokenizer: one id per word, run of punctuation, or newline

PIECE = r"\w+|[^\w\s]+|\n"


def toy_words() -> list[str]:
    """The words of the wordings (requests, thoughts, the fixed format), sorted.

    They are all the words that no pool holds.
    """
    signs = '. , ? ! : - ( ) {" ":" "," "}'
    markers = "Tools Thought Action Input system user assistant tool"
    words = set()
    for text in [*REQUESTS[False], *REQUESTS[True], *OPENINGS, *MIDDLES, *CLOSINGS, signs, "\n",
                 markers, *VERBS, *NOUNS]:
        words |= set(re.findall(PIECE, re.sub(r"\{\w+\}", " ", text)))
    return sorted(words)


def toy_tokenizer() -> Tokenizer:
    """The word-level tokenizer. decode(encode(text)) gives back an agent's output exactly."""
    words = ["<unk>", "<|im_start|>", "<|im_end|>", *toy_words(), *itertools.chain(*POOLS.values())]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words[:3]])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), "removed", invert=True)
    # words are joined by spaces, which do not belong next to these
    glue = {" \n ": "\n", " :": ":", " ,": ",", " .": ".", '{" ': '{"', ' ":" ': '":"',
            ' "," ': '","', ' "}': '"}', "( ": "(", " )": ")", " (": "("}
    tokenizer.decoder = decoders.Sequence([
        decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse(),
        *(decoders.Replace(spaced, joined) for spaced, joined in glue.items())])
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, required=True, help="how many pairs to print")
    parser.add_argument("--seed", type=int, default=0, help="seed of the pairs (default: 0)")
    options = parser.parse_args()
    for pair in toy_pairs(options.pairs, options.seed):
        print(json.dumps(pair))


if __name__ == "__main__":
    main()
