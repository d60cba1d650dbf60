"""Greedy or sampled decoding with a KV cache: many prompts at once, continuous batching."""
import torch
import torch.nn.functional as F


class KVCache:
    """Keys and values of up to `rows` sequences of unequal lengths, at most `capacity` tokens each."""

    def __init__(self, rows: int, capacity: int):
        self.rows, self.capacity, self.store = rows, capacity, {}

    def place(self, first: int, last: int, positions=None):
        """Say where the next tokens go: whole prompts into rows first to last, or (decoding) a token a row at its position (B,)."""
        self.first, self.last, self.positions, self.mask = first, last, positions, None
        if positions is not None:
            self.index, self.used = torch.arange(last, device=positions.device), int(positions.max()) + 1
            self.mask = (torch.arange(self.used, device=positions.device) <= positions[:, None])[:, None, None]   # (B, 1, 1, used)

    def extend(self, layer, k, v):
        """Store k, v (B, n_kv_head, T, head_dim); return what this layer attends to, and the mask (None: causal)."""
        if layer not in self.store:                     # zeros, since what is masked must still be finite
            self.store[layer] = k.new_zeros(2, self.rows, k.shape[1], self.capacity, k.shape[3])
        keys, values = self.store[layer]
        if self.mask is None:                           # prefill: right-padded prompts, causal, no mask needed
            keys[self.first:self.last, :, :k.shape[2]], values[self.first:self.last, :, :k.shape[2]] = k, v
            return k, v, None
        keys[self.index, :, self.positions], values[self.index, :, self.positions] = k[:, :, 0], v[:, :, 0]
        return keys[:self.last, :, :self.used], values[:self.last, :, :self.used], self.mask

    def move(self, source: int, target: int):
        """Copy one row over another, which has finished."""
        for both in self.store.values():
            both[:, target] = both[:, source]


PREFILL_TOKENS = 2048       # of one forward over new prompts, padding included: enough to fill a device, and no large activations


@torch.no_grad()
def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int, stop_ids, temperature: float = 0.0,
             cache_tokens: int = 16384, finished=None) -> list[list[int]]:
    """Continue each prompt (token ids; the lengths may differ), as many at once as `cache_tokens` of KV cache hold.

    Greedy at temperature 0, else sampled from softmax(logits / temperature) with torch's global generator. Returns the new
    ids of each prompt, without the prompt and without the stop id that ended it; `finished(i, ids)` is called when prompt i is
    done. The longest go first, and the place of one that is done is taken by the next (continuous batching). Raises ValueError
    on an empty prompt.
    """
    if not all(prompts):
        raise ValueError("an empty prompt cannot be continued; give it at least one token (the bos token, say).")
    device, stop_ids, outputs = model.head.device, set(stop_ids), [[] for _ in prompts]
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i])) if max_new_tokens > 0 else []      # the longest last
    room = lambda i: len(prompts[i]) + max_new_tokens
    alive = []                                          # the prompt that each row of the cache continues
    while waiting or alive:
        if not alive:
            cache = KVCache(min(len(waiting), max(1, cache_tokens // room(waiting[-1]))), room(waiting[-1]))
        x = []                                          # (rows, H) of each row's last token
        if alive:
            positions = torch.tensor([len(prompts[i]) + len(outputs[i]) - 1 for i in alive], device=device)
            new = torch.tensor([[outputs[i][-1]] for i in alive], device=device)
            cache.place(0, len(alive), positions)
            x.append(model.hidden(new, positions[:, None], cache=cache)[:, 0])
        # much shorter prompts wait until the cache is empty, for one of more and shorter rows
        while waiting and len(alive) < cache.rows and 2 * room(waiting[-1]) > cache.capacity:
            width, first = len(prompts[waiting[-1]]), len(alive)
            alive += (waiting.pop() for _ in range(min(len(waiting), cache.rows - first, max(1, PREFILL_TOKENS // width))))
            ends = torch.tensor([len(prompts[i]) - 1 for i in alive[first:]], device=device)
            tokens = torch.tensor([prompts[i] + [0] * (width - len(prompts[i])) for i in alive[first:]], device=device)
            cache.place(first, len(alive))
            x.append(model.hidden(tokens, cache=cache)[torch.arange(len(ends), device=device), ends])
        logits = F.linear(torch.cat(x), model.head).float()                             # (rows, V)
        new = logits.argmax(-1) if temperature == 0 else torch.multinomial((logits / temperature).softmax(-1), 1).squeeze(1)
        new = new.tolist()
        for row in reversed(range(len(alive))):         # from the last, so that the row that fills a gap has been seen
            i = alive[row]
            if new[row] not in stop_ids:
                outputs[i].append(new[row])
            if new[row] in stop_ids or len(outputs[i]) == max_new_tokens:
                if finished:
                    finished(i, outputs[i])
                alive[row] = alive[-1]
                alive.pop()
                if row < len(alive):
                    cache.move(len(alive), row)
    return outputs
