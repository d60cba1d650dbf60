"""Greedy or sampled decoding with a KV cache: many prompts at once, continuous batching."""
import torch
import torch.nn.functional as F


class KVCache:
    """Keys and values of up to `rows` sequences of unequal lengths, `capacity` tokens at most."""

    def __init__(self, rows: int, capacity: int):
        self.rows = rows
        self.capacity = capacity
        self.store = {}         # layer -> (2, rows, n_kv_head, capacity, head_dim): keys and values

    def set_positions(self, first: int, last: int, positions=None):
        """Say where the next tokens go.

        Without positions: whole prompts into the rows first to last, from position 0 on.
        With positions (last,) int64: one token into each of the rows 0 to last (decoding).
        """
        self.first = first
        self.last = last
        self.positions = positions
        self.mask = None
        if positions is not None:
            self.index = torch.arange(last, device=positions.device)
            self.used = int(positions.max()) + 1
            used = torch.arange(self.used, device=positions.device)
            self.mask = (used <= positions[:, None])[:, None, None]     # (B, 1, 1, used)

    def append(self, layer, k, v):
        """Store k, v (B, n_kv_head, T, head_dim) of an attention layer.

        Returns the keys, the values and the mask that it attends with (None: causal).
        """
        if layer not in self.store:     # zeros, since what is masked must still be finite
            shape = (2, self.rows, k.shape[1], self.capacity, k.shape[3])
            self.store[layer] = k.new_zeros(shape)
        keys, values = self.store[layer]
        if self.mask is None:           # prefill: right-padded prompts, causal, no mask needed
            keys[self.first:self.last, :, :k.shape[2]] = k
            values[self.first:self.last, :, :k.shape[2]] = v
            return k, v, None
        keys[self.index, :, self.positions] = k[:, :, 0]
        values[self.index, :, self.positions] = v[:, :, 0]
        return keys[:self.last, :, :self.used], values[:self.last, :, :self.used], self.mask

    def copy_row(self, source: int, target: int):
        """Copy one row over another, whose sequence has ended."""
        for keys_and_values in self.store.values():
            keys_and_values[:, target] = keys_and_values[:, source]


# of one forward over new prompts, padding included: enough to fill a device, and few activations
PREFILL_TOKENS = 2048


def generate(model, prompts: list[list[int]], max_new_tokens: int, stop_ids,
             temperature: float = 0.0, cache_tokens: int = 16384) -> list[list[int]]:
    """The new ids of each prompt, in the order of the prompts; see generate_stream."""
    outputs = [[] for _ in prompts]
    options = (max_new_tokens, stop_ids, temperature, cache_tokens)
    for i, ids in generate_stream(model, prompts, *options):
        outputs[i] = ids
    return outputs


@torch.no_grad()
def generate_stream(model, prompts: list[list[int]], max_new_tokens: int, stop_ids,
                    temperature: float = 0.0, cache_tokens: int = 16384):
    """Continue each prompt (token ids); yields (i, new ids of prompt i) as soon as it is finished.

    The ids come without the prompt and without the stop id that ended them. Greedy at temperature
    0, else sampled from softmax(logits / temperature) with torch's global generator. As many
    prompts run at once as `cache_tokens` tokens of KV cache hold; the longest go first, and the
    next takes the place of one that is finished (continuous batching). Raises ValueError on an
    empty prompt.
    """
    if not all(prompts):
        raise ValueError("an empty prompt cannot be continued; give it at least one token "
                         "(the bos token, say).")
    stop_ids = set(stop_ids)
    outputs = [[] for _ in prompts]
    if max_new_tokens == 0:
        yield from enumerate(outputs)
        return
    room = [len(prompt) + max_new_tokens for prompt in prompts]     # in the cache
    waiting = sorted(range(len(prompts)), key=room.__getitem__)     # the longest last
    alive = []                                                      # the prompt of each cache row
    while waiting or alive:
        # once all rows have finished, the next cache is cut to the longest prompt still waiting
        if not alive:
            capacity = room[waiting[-1]]
            cache = KVCache(min(len(waiting), max(1, cache_tokens // capacity)), capacity)

        # running rows advance by one token
        hidden = []                                                 # (rows, H) of last tokens
        if alive:
            last_ids = [outputs[i][-1] for i in alive]
            positions = [len(prompts[i]) + len(outputs[i]) - 1 for i in alive]
            hidden.append(decode(model, cache, last_ids, positions))

        # free rows take new prompts; much shorter ones wait for a cache of more and shorter rows
        while waiting and len(alive) < cache.rows and 2 * room[waiting[-1]] > cache.capacity:
            fits = max(1, PREFILL_TOKENS // len(prompts[waiting[-1]]))
            count = min(len(waiting), cache.rows - len(alive), fits)
            new = [waiting.pop() for _ in range(count)]
            hidden.append(prefill(model, cache, [prompts[i] for i in new], first=len(alive)))
            alive += new

        logits = F.linear(torch.cat(hidden), model.head).float()    # (rows, V)
        next_ids = choose(logits, temperature)

        # from the last row to the first: the row moved into a gap has been handled already
        for row in reversed(range(len(alive))):
            i = alive[row]
            stopped = next_ids[row] in stop_ids
            if not stopped:
                outputs[i].append(next_ids[row])
            if stopped or len(outputs[i]) == max_new_tokens:
                yield i, outputs[i]
                alive[row] = alive[-1]
                alive.pop()
                if row < len(alive):
                    cache.copy_row(len(alive), row)


def prefill(model, cache: KVCache, prompts: list[list[int]], first: int) -> torch.Tensor:
    """Run new prompts, the longest first, into the cache rows from `first` on.

    Returns the final hidden state of each one's last token, (prompts, H).
    """
    device = model.device
    width = len(prompts[0])
    padded = [prompt + [0] * (width - len(prompt)) for prompt in prompts]
    ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    cache.set_positions(first, first + len(prompts))
    tokens = torch.tensor(padded, device=device)
    x = model.hidden_states(tokens, cache=cache)                    # (prompts, width, H)
    return x[torch.arange(len(prompts), device=device), ends]


def decode(model, cache: KVCache, last_ids: list[int], positions: list[int]) -> torch.Tensor:
    """Run one more token per cache row; returns its final hidden state, (rows, H)."""
    device = model.device
    positions = torch.tensor(positions, device=device)
    cache.set_positions(0, len(last_ids), positions)
    tokens = torch.tensor(last_ids, device=device)
    return model.hidden_states(tokens[:, None], positions[:, None], cache=cache)[:, 0]


def choose(logits: torch.Tensor, temperature: float) -> list[int]:
    """The next id of each row of logits (rows, V)."""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    probabilities = (logits / temperature).softmax(-1)
    return torch.multinomial(probabilities, 1).squeeze(1).tolist()
