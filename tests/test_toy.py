"""The toy: its samples, its words held in and held out, and its tokenizer."""
import json
import re

import pytest

from support.readers import toy_samples
from support.templates import TOKEN_ROLES, Renderer
from toy import task

KINDS = pytest.mark.parametrize("held_out", [False, True], ids=["held-in", "held-out"])


@KINDS
def test_toy_is_deterministic_and_its_parts_are_its_text(held_out):
    samples = toy_samples(300, 3, held_out)
    assert samples == toy_samples(300, 3, held_out) != toy_samples(300, 4, held_out)
    assert len({s.id for s in samples}) == len({s.messages[2].text for s in samples}) == 300
    for sample in samples:
        system, user, assistant = sample.messages
        assert "".join(text for text, _ in assistant.role_spans) == assistant.text
        roles = {role for _, role in assistant.role_spans}
        assert roles == {"reasoning", "format", "connecting", "boundary"}
        answer = re.fullmatch(
            r"Thought: .+\nAction: (\S+)\nAction Input: (\{.+\})", assistant.text)
        tool, arguments = answer.groups()
        boundaries = [text for text, role in assistant.role_spans if role == "boundary"]
        assert boundaries == ['","'] * (len(json.loads(arguments)) - 1) + ['"}']
        arguments = json.loads(arguments)
        assert f"- {tool}({', '.join(arguments)})" in system.text.split("\n")   # a tool on offer
        assert all(f"{name} {value}" in user.text for name, value in arguments.items())


def test_held_out_words_are_never_held_in():
    for pool in task.POOLS.values():
        inside = task.split_pool(pool, held_out=False)
        outside = task.split_pool(pool, held_out=True)
        assert not set(inside) & set(outside)
        assert set(inside) | set(outside) == set(pool)
        assert len(pool) == len(set(pool))
        assert len(outside) >= len(pool) // 5
    assert not set(task.REQUESTS[False]) & set(task.REQUESTS[True])

    words = []
    offered = []
    for held_out in (False, True):
        words.append(set())
        offered.append(set())
        for sample in toy_samples(1000, 0, held_out):
            system, _, assistant = sample.messages
            words[-1] |= {text for text, role in assistant.role_spans if role == "reasoning"}
            offered[-1] |= set(re.findall(r"- (\w+)\(", system.text))
    assert not words[0] & words[1]
    assert not offered[0] & offered[1]


@KINDS
def test_toy_tokenizer_round_trip(held_out, tmp_path):
    task.toy_tokenizer().save(str(tmp_path / "tokenizer.json"))
    renderer = Renderer(str(tmp_path))
    tokenizer = renderer.tokenizer
    unknown = tokenizer.token_to_id("<unk>")
    for sample in toy_samples(300, 5, held_out):
        ids, roles = renderer.render(sample.messages)
        assert unknown not in ids
        output = [i for i, role in zip(ids, roles, strict=True) if role]
        assert output[-1] == renderer.end
        answer = sample.messages[2]
        assert tokenizer.decode(output[:-1], skip_special_tokens=False) == answer.text

        reasoning = []
        for i, role in zip(ids, roles, strict=True):
            if TOKEN_ROLES[role] == "reasoning":
                reasoning.append(tokenizer.id_to_token(i))
        assert reasoning == [text for text, role in answer.role_spans if role == "reasoning"]
