"""SHAD, step 1: outputs change places among the drawn samples, and none keeps its input."""
import random
from collections import Counter
from dataclasses import replace

import pytest

from shad import shuffle_outputs
from support.cli import DataError
from support.readers import Message, Sample
from tiny import talk


def conversations(counts):
    """Samples with counts[s] output turns, each output text telling where it comes from."""
    samples = []
    for s, count in enumerate(counts):
        turns = [("system", f"system {s}")]
        for m in range(count):
            turns += [("user", f"ask {s}.{m}"), ("assistant", f"{s}.{m}")]
        samples.append(talk(*turns, id=str(s)))
    return samples


def counts_to_try():
    yield from ([1, 1], [1] * 3, [1] * 50, [2, 2], [3, 1], [1, 3], [40, 1, 1, 2], [5, 5, 5],
                [4, 3, 1], [9, 8], [30, 10, 10, 10], [1, 1, 30])
    rng = random.Random(0)
    for _ in range(40):
        yield [rng.choice((1, 1, 2, 3, 12)) for _ in range(rng.randint(2, 12))]


def outputs(sample):
    return [m.text for m in sample.messages if m.is_output]


def inputs(sample):
    return [m for m in sample.messages if not m.is_output]


@pytest.mark.parametrize("counts", list(counts_to_try()))
def test_no_output_stays_with_its_input(counts):
    samples = conversations(counts)
    untouched = [replace(s, messages=[replace(m) for m in s.messages]) for s in samples]
    for seed in range(15):
        shuffled, drawn = shuffle_outputs(samples, 1.0, seed)
        assert sorted(drawn) == list(range(len(samples)))
        assert [s.id for s in shuffled] == [samples[i].id for i in drawn]
        after = Counter()
        for new in shuffled:
            old = samples[int(new.id)]
            assert [m.role for m in new.messages] == [m.role for m in old.messages]
            assert inputs(new) == inputs(old)
            assert not any(text.split(".")[0] == new.id for text in outputs(new)), seed
            after.update(outputs(new))
        if 2 * max(counts) <= sum(counts):      # then every output finds a place
            before = Counter()
            for sample in samples:
                before.update(outputs(sample))
            assert after == before, seed
    assert samples == untouched


def test_the_fraction_is_drawn_with_the_seed():
    samples = conversations([1] * 200)

    def shuffle(fraction, seed):
        shuffled, drawn = shuffle_outputs(samples, fraction, seed)
        assert [s.id for s in shuffled] == [samples[i].id for i in drawn]
        return [(s.id, s.messages[-1].text) for s in shuffled]

    tenth = shuffle(0.1, 0)
    assert len(tenth) == len(set(tenth)) == 20
    assert len(shuffle(0.001, 0)) == 2
    assert shuffle(0.1, 0) == tenth != shuffle(0.1, 1)
    assert {text.split(".")[0] for _, text in tenth} == {i for i, _ in tenth}   # among the drawn
    with pytest.raises(DataError, match="at least 2"):
        shuffle_outputs(samples[:1], 1.0, 0)


def test_role_spans_travel_and_context_stays():
    context = [Message("user", "q"), Message("assistant", "old", scored=False)]
    first = Sample("a", [*context, Message("assistant", "A", [("A", "reasoning")])])
    second = Sample("b", [Message("user", "r"), Message("assistant", "B", [("B", "format")])])
    shuffled, _ = shuffle_outputs([first, second], 1.0, 0)
    messages = {sample.id: sample.messages for sample in shuffled}
    assert messages["a"] == [*context, Message("assistant", "B", [("B", "format")])]
    assert messages["b"] == [Message("user", "r"), Message("assistant", "A", [("A", "reasoning")])]
