"""What a training step takes on each GPU, estimated: 1B, 8B and 70B on 1, 8 and 64 GPUs.

    python -m tests.bench.memory
    python -m tests.bench.memory --micro-tokens 16384
"""
from dataclasses import dataclass

import torch

from model import CHUNK_BYTES, Config, Transformer
from support.cli import option, parse_options, run_script
from tests.bench import measure

SHAPES = {
    "1B (Llama 3.2)": Config(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
    "8B (Llama 3.1)": Config(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128),
    "70B (Llama 3.1)": Config(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, head_dim=128),
}
SETTINGS = {"1": {}, "1, --shard yes": {"shard": True}, "1, --offload": {"offload": True},
            "8": {}, "64": {}}


@dataclass
class Options:
    micro_tokens: int = option(8192, "tokens of a micro-batch", low=1)


def memory_per_gpu(config: Config, gpus: int, micro_tokens: int, recompute: bool = False,
                   device: str = "cuda", shard: bool = False, offload: bool = False
                   ) -> dict[str, int]:
    """Estimate the bytes that a training step with AdamW takes on each of `gpus`, by part.

    More than one GPU, or `shard`: sharded by rows (FSDP2), float32 masters, bf16 compute; with
    `offload` what is sharded is kept on the host. Else the whole model, in bf16 autocast on "cuda",
    in float32 on "cpu". Attention never holds its scores (SDPA's flash kernel), and every token is
    scored (the others need no last MLP). CUDA's own memory, about 1 GiB, and the allocator's slack
    come on top; before torch 2.10 also a bf16 product of the size of the head.
    """
    sharded = shard or offload or gpus > 1
    kept = 0 if offload else 1 / gpus           # share of the parameters on this GPU
    compute = 2 if device == "cuda" else 4      # bytes per number in matrix products
    stream = compute if sharded else 4          # in the residual stream: autocast keeps it float32

    # Parameters, by where they live. The root holds the embedding, the last norm and the head.
    with torch.device("meta"):
        model = Transformer(config)
    total = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    root = total - config.num_hidden_layers * block
    head = config.vocab_size * config.hidden_size

    # Copies of the weights for computing.
    gathered = 0
    if sharded:
        gathered += block * 2 * compute         # this block and, fetched meanwhile, the next
        gathered += block * (compute + 4)       # this block's gradient, and its float32 reduction
        gathered += root * (2 * compute + 4)    # the root's weights, gradient, and its reduction
    elif device == "cuda":
        gathered += total * compute             # autocast holds a bf16 copy of each matrix
        gathered += head * compute              # and the loss makes its own of the head

    # What a block saves for its backward, bytes per token.
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    saved = 2 * config.hidden_size * stream     # the inputs of its two norms
    saved += 2 * config.hidden_size * compute   # and their outputs
    saved += 2 * q * compute                    # queries, and attention's output of the same size
    saved += 2 * kv * compute                   # keys and values
    if config.model_type == "qwen3":
        saved += (q + kv) * compute             # queries and keys before their own norms
    saved += 4 * config.num_attention_heads     # attention's log-sum-exp, float32
    saved += 2 * config.intermediate_size * compute     # gate and up; their product is recomputed
    if recompute:                               # each block's input, and all of one block at work
        blocks = config.num_hidden_layers * config.hidden_size * stream + saved
    else:
        blocks = config.num_hidden_layers * saved
    last_norm = config.hidden_size * (stream + compute)         # its input and output

    # The head: one chunk of float32 logits, in bf16 also a copy of it to multiply with, and the
    # float32 sum of the gradient of its weight.
    chunk = CHUNK_BYTES[device]
    if compute < 4:
        chunk += chunk * compute // 4
    return {
        "weights": int(kept * 4 * total),       # float32 masters
        "gradients": int(kept * 4 * total),
        "optimizer": int(kept * 8 * total),     # AdamW's two moments
        "gathered": gathered,
        "activations": micro_tokens * (blocks + last_norm),
        "temporaries": micro_tokens * 4 * config.intermediate_size * compute,   # SwiGLU's backward
        "head": chunk + 4 * head,
    }


def cell(without: int, with_recompute: int, digits: int = 1) -> str:
    """GiB, "without / with", or one number where --recompute makes no difference."""
    if without == with_recompute:
        return f"{without / 2**30:.{digits}f}"
    return f"{without / 2**30:.{digits}f} / {with_recompute / 2**30:.{digits}f}"


def main():
    options = parse_options(Options, __doc__)
    rows = []
    for name, config in SHAPES.items():
        for gpus, flags in SETTINGS.items():
            count = int(gpus.split(",")[0])
            off = memory_per_gpu(config, count, options.micro_tokens, **flags)
            on = memory_per_gpu(config, count, options.micro_tokens, recompute=True, **flags)
            parts = [cell(off[part], on[part]) for part in off]
            total = cell(sum(off.values()), sum(on.values()), digits=0)
            rows.append([name, gpus, *parts, total])
    print(f"\nmemory: GiB on each GPU, {options.micro_tokens:,} tokens per micro-batch; "
          "without / with --recompute\n")
    print(measure.table(["model", "GPUs", *off, "total"], rows))


if __name__ == "__main__":
    run_script(main)
