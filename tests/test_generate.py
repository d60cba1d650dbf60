"""Batched decoding: where each prompt ends, what a stream yields, sampling."""
import pytest
import torch

from support.generate import generate, generate_stream
from test_model import V, prompts
from tiny import make_model


def test_stop_ids_and_max_new_tokens():
    model = make_model(V)
    free = generate(model, prompts(), 20, set())
    assert [len(output) for output in free] == [20] * len(free)
    stops = {free[0][5], free[2][2]}                        # rows end at different steps, or never
    expected = []
    for output in free:
        ends = [i for i, token in enumerate(output) if token in stops]
        expected.append(output[:ends[0]] if ends else output)
    assert len({len(output) for output in expected}) > 1
    assert generate(model, prompts(), 20, stops) == expected
    assert generate(model, prompts(), 1, set()) == [output[:1] for output in free]
    assert generate(model, prompts(), 0, set()) == [[]] * len(free)
    assert generate(model, [], 5, set()) == []


@pytest.mark.parametrize("max_new_tokens", [0, 20])
def test_a_stream_yields_every_prompt_once_as_it_finishes(max_new_tokens):
    model = make_model(V)
    outputs = generate(model, prompts(), max_new_tokens, {5})
    stream = list(generate_stream(model, prompts(), max_new_tokens, {5}, cache_tokens=60))
    assert sorted(stream) == list(enumerate(outputs))


@pytest.mark.parametrize("cache_tokens", [1, 90, 200, 10_000])
def test_the_size_of_the_cache_changes_nothing(cache_tokens):
    model = make_model(60)
    sequences = []
    for i, length in enumerate((9, 2, 40, 5, 17, 3, 31, 2, 8)):
        sequences.append([1 + (7 * i * j) % 50 for j in range(1, length)])
    free = [generate(model, [sequence], 20, set())[0] for sequence in sequences]
    # rows end at different steps, some never
    stops = {free[0][5], free[2][3], free[4][9], free[7][1]}
    one_by_one = [generate(model, [sequence], 20, stops)[0] for sequence in sequences]
    assert len({len(output) for output in one_by_one}) > 2
    together = generate(model, sequences, 20, stops, cache_tokens=cache_tokens)
    assert together == one_by_one
    finished = list(generate_stream(model, sequences, 20, stops, cache_tokens=cache_tokens))
    assert len(finished) == len(sequences)
    assert dict(finished) == dict(enumerate(one_by_one))


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="empty prompt"):
        generate(make_model(V), [[1, 2], []], 3, set())


def test_sampling_is_reproducible_and_follows_the_temperature():
    model = make_model(V)

    def sample(seed, temperature):
        torch.manual_seed(seed)
        return generate(model, prompts(), 12, set(), temperature)

    def count_different(temperature):
        return len(set(sum(sample(3, temperature), [])))

    assert sample(1, 1.0) == sample(1, 1.0) != sample(2, 1.0)
    assert sample(1, 1e-4) == generate(model, prompts(), 12, set())     # cold: the greedy choice
    assert count_different(100.0) > count_different(0.1)
