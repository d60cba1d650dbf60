"""A decoder-only transformer of the Llama family, its fused cross-entropy, and batched generation.

    model = Transformer.from_pretrained("path/or/hub-id")   # Llama 2/3, SmolLM2, Mistral, Qwen2/2.5, Qwen3
    losses = model(tokens, targets)                         # (B, T) float32, one loss a token
    outputs = generate(model, [prompt_ids], max_new_tokens=64, stop_ids={eos})
    model.save_pretrained("out")                            # a HF directory, loads anywhere

Parameters carry Hugging Face's names and rotate-half RoPE layout, so a checkpoint loads with no renaming and
no permuting. Batches are right-padded and attention is causal, so no attention mask exists while training: a
real token never sees padding, and SDPA stays on its fast path.
"""
import atexit


import json
import math
import os
from dataclasses import asdict, dataclass, field, fields

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded as it is; the message names the file and the remedy."""


# -----------------------------------------------------------------------------------------------------------------
# Configuration: the keys of Hugging Face's config.json that matter to us, under their own names

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
                 "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# keys that change what a model computes, and the only values under which ours computes the same
REQUIRED = {"hidden_act": ("silu",), "attention_dropout": (0, None), "pretraining_tp": (1, None),
            "partial_rotary_factor": (1, None), "quantization_config": (None,)}


@dataclass
class Config:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None      # fewer than heads: grouped-query attention (GQA)
    head_dim: int | None = None                 # default: hidden_size // num_attention_heads
    model_type: str = "llama"                   # which family: a key of ARCHITECTURES
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None            # None, or Llama 3.1's {"rope_type": "llama3", "factor": ...}
    tie_word_embeddings: bool = False           # the head is the embedding matrix
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None           # longest sequence for which full attention is what it was trained with
    initializer_range: float = 0.02
    other: dict = field(default_factory=dict)   # the rest of config.json (token ids, ...), carried through unchanged

    def __post_init__(self):
        if self.model_type not in ARCHITECTURES:
            raise CheckpointError(f"model_type {self.model_type!r} is not supported; "
                                  f"this file implements {', '.join(ARCHITECTURES)}.")
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                                  f"num_key_value_heads={self.num_key_value_heads}.")

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias or self.model_type == "qwen2"

    @classmethod
    def from_hf(cls, hf: dict) -> "Config":
        """The Config of a parsed config.json, written by transformers 4 or 5. Raises CheckpointError for what ours cannot be."""
        hf = dict(hf)
        rope = hf.pop("rope_parameters", None) or hf.pop("rope_scaling", None) or {}    # transformers 5, or 4
        rope = dict(rope)
        kind = rope.get("rope_type", rope.pop("type", "default"))
        if kind not in ("default", "llama3"):
            raise CheckpointError(f"rope scaling {kind!r} is not supported; only the default and 'llama3' are.")
        hf["rope_theta"] = rope.pop("rope_theta", hf.get("rope_theta", 10000.0))
        hf["rope_scaling"] = rope if kind == "llama3" else None
        for key, allowed in REQUIRED.items():
            if hf.get(key, allowed[0]) not in allowed:
                raise CheckpointError(f"{key}={hf[key]!r} in config.json is not supported; only {allowed[0]!r} is.")
        # Qwen's configs name a window and switch it off; transformers 5 lists it per layer
        layer_types = hf.get("layer_types") or []
        if hf.get("use_sliding_window") is False or (layer_types and "sliding_attention" not in layer_types):
            hf["sliding_window"] = None
        own = {f.name for f in fields(cls)} - {"other"}
        missing = [k for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                               "num_attention_heads", "model_type") if k not in hf]
        if missing:
            raise CheckpointError(f"config.json lacks {', '.join(missing)}.")
        return cls(**{k: v for k, v in hf.items() if k in own}, other={k: v for k, v in hf.items() if k not in own})

    def to_hf(self, dtype: torch.dtype) -> dict:
        """The config.json that transformers, vLLM and llama.cpp's converter read."""
        hf = {"architectures": [ARCHITECTURES[self.model_type]], "hidden_act": "silu", **asdict(self), **self.other}
        del hf["other"]
        if hf["sliding_window"] is None and self.model_type != "mistral":
            del hf["sliding_window"]                # mistral's own default is a window of 4,096: keep its null
        hf.pop("dtype", None)
        return hf | {"torch_dtype": str(dtype).removeprefix("torch.")}


# -----------------------------------------------------------------------------------------------------------------
# Rotary position embedding (Su et al. 2021), rotate-half layout

def rope_frequencies(config: Config, device=None) -> torch.Tensor:
    """Angular frequency of each pair of dimensions, radians a position: (head_dim/2,) float32."""
    d = config.head_dim
    freq = 1.0 / config.rope_theta ** (torch.arange(0, d, 2, dtype=torch.float32, device=device) / d)
    if config.rope_scaling:                         # Llama 3.1: slow the long waves down, keep the short, blend between
        s = config.rope_scaling
        wavelength = 2 * math.pi / freq
        low, high, old_length = s["low_freq_factor"], s["high_freq_factor"], s["original_max_position_embeddings"]
        blend = ((old_length / wavelength - low) / (high - low)).clamp(0, 1)    # 0: long wave, 1: short wave
        freq = (1 - blend) * freq / s["factor"] + blend * freq
    return freq


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate (B, T, n_head, head_dim) by its positions' angles; cos, sin: (B or 1, T, 1, head_dim/2) float32."""
    x1, x2 = x.float().chunk(2, dim=-1)             # the two halves of a head, not its odd and even entries
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).type_as(x)


# -----------------------------------------------------------------------------------------------------------------
# The transformer

def remake(f, *inputs):
    """f(*inputs), of which backward remembers the inputs alone and computes the rest again. Recomputing ends at the last tensor
    that backward asks for, so a matrix product in the last place is not repeated."""
    return checkpoint(f, *inputs, use_reentrant=False, preserve_rng_state=False) if torch.is_grad_enabled() else f(*inputs)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        if x.is_cuda:                               # torch's own is one kernel there; on CPUs it remembers 3 tensors
            return F.rms_norm(x, self.weight.shape, self.weight.type_as(x), self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """y = n * weight with n = x / sqrt(mean(x^2) + eps), in float32 or wider; backward remembers x and a number a row."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).type_as(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        n, grad = x * scale, grad.to(scale.dtype)
        along = grad * n
        grad_weight = along.flatten(0, -2).sum(0).type_as(weight)
        along = along.mul_(weight).mean(-1, keepdim=True)           # what changes the row's length only is projected out
        return (grad * weight).addcmul_(n, along, value=-1).mul_(scale).type_as(x), grad_weight, None


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.attention_bias)
        qk_norm = c.model_type == "qwen3"
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if qk_norm else nn.Identity()

    def forward(self, x, cos, sin, cache=None):
        B, T, _ = x.shape
        q = rotate(self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)), cos, sin)    # (B, T, n_head, head_dim)
        k = rotate(self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)), cos, sin)    # (B, T, n_kv_head, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)                                   # (B, T, n_kv_head, head_dim)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))                                   # (B, n, T, head_dim)
        mask = None
        if cache is not None:
            k, v, mask = cache.extend(self, k, v)
        if mask is not None:        # decoding, T = 1: the heads that share a key take the place of T, so that it is read once
            q = q.reshape(B, k.shape[1], -1, self.head_dim)                                # (B, n_kv_head, group, head_dim)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(y.reshape(B, -1, T, self.head_dim).transpose(1, 2).reshape(B, T, -1))        # (B, T, hidden)


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        return remake(lambda gate, up: self.down_proj(F.silu(gate) * up), self.gate_proj(x), self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, rows=None, cache=None, recompute=False):
        if cache is not None:
            return Block.compute(self, x, cos, sin, rows, cache)        # generation is not compiled: its cache grows
        return remake(self.compute, x, cos, sin, rows) if recompute else self.compute(x, cos, sin, rows)

    def compute(self, x, cos, sin, rows=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        if rows is not None:                        # after the last attention no token needs another: go on with some alone
            x = x.flatten(0, 1)[rows]                                                       # (n, H)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.recompute = False                      # True: keep a block's input only, and compute the block again in backward
        self.model = nn.ModuleDict({                # "model." is the prefix of HF's parameter names
            "embed_tokens": nn.Embedding(c.vocab_size, c.hidden_size),
            "layers": nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers)),
            "norm": RMSNorm(c.hidden_size, c.rms_norm_eps)})
        if not c.tie_word_embeddings:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=c.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def head(self) -> torch.Tensor:
        """The output matrix, (V, H)."""
        return (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    def hidden(self, tokens, positions=None, rows=None, cache=None):
        """Final hidden states (B, T, H) of tokens (B, T) int64; positions (B, T) default to 0, 1, 2, ...

        rows: (n,) int64, indices into the B*T tokens; where given, only theirs are returned, (n, H).
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
            if self.config.sliding_window and tokens.shape[1] > self.config.sliding_window:
                raise CheckpointError(f"a sequence of {tokens.shape[1]} tokens is longer than this checkpoint's sliding window "
                                      f"of {self.config.sliding_window}, which is not implemented; lower --max-length.")
        angle = positions[:, :, None, None] * rope_frequencies(self.config, tokens.device)  # (B or 1, T, 1, head_dim/2)
        cos, sin = angle.cos(), angle.sin()
        x = self.model.embed_tokens(tokens)                                                 # (B, T, H)
        for block in self.model.layers[:-1]:
            x = block(x, cos, sin, None, cache, self.recompute)
        x = self.model.layers[-1](x, cos, sin, rows, cache, self.recompute)
        return self.model.norm(x)

    def forward(self, tokens, targets=None):
        """Logits, or the loss of every token.

        tokens: (B, T) int64, right-padded with any id. targets: (B, T) int64 already shifted (targets[b, t] follows
        tokens[b, t]), -100 where nothing is scored. Returns logits (B, T, V) in the model's dtype, or, with targets,
        losses (B, T) float32 in nats, 0 where the target is -100. Prompt and padding cost no logits and no last MLP.
        """
        if targets is None:
            return F.linear(self.hidden(tokens), self.head)
        scored = targets != -100
        rows = scored.flatten().nonzero().squeeze(1)                                        # (n,)
        losses = fused_cross_entropy(self.hidden(tokens, rows=rows), self.head, targets.flatten()[rows])
        return losses.new_zeros(targets.shape).masked_scatter(scored, losses)

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str, dtype=torch.float32, device="cpu", sharded=False) -> "Transformer":
        """Load a HF directory (single file, or shards + index) or a hub id. Raises CheckpointError, naming the file.

        Each parameter is read and converted by itself, and of a sharded model only this rank's rows of it: no rank ever
        holds more than its share of the model and one tensor.
        """
        path = resolve(path_or_hub_id)
        try:
            with open(os.path.join(path, "config.json"), encoding="utf-8") as f:
                config = Config.from_hf(json.load(f))
        except json.JSONDecodeError as e:
            raise CheckpointError(f"{path}/config.json, line {e.lineno}, is not JSON ({e.msg}); copy it again.") from None
        except CheckpointError as e:
            raise CheckpointError(f"{path}: {e}") from None
        with torch.device("meta"):                  # shapes without storage
            model = cls(config).to(dtype)
        if sharded:
            shard(model, device)
        model.to_empty(device=device)
        model.load_weights(path)
        return model

    def load_weights(self, path: str) -> None:
        """Fill the parameters from the safetensors files of a HF directory, in place. Raises CheckpointError, naming the file."""
        config = self.config
        parameters, missing = dict(self.named_parameters()), {name: None for name, _ in self.named_parameters()}
        for file in checkpoint_files(path):
            try:
                with safe_open(file, framework="pt") as f:
                    for name in f.keys():
                        if name == "lm_head.weight" and config.tie_word_embeddings or name.endswith("rotary_emb.inv_freq"):
                            continue                # some exporters write these copies; they are never read
                        if name not in parameters:
                            raise CheckpointError(f"{file} holds {name}, which a {config.model_type} model does not have.")
                        p, stored = parameters[name], f.get_slice(name)
                        if tuple(stored.get_shape()) != p.shape:
                            raise CheckpointError(f"{file}: {name} has shape {tuple(stored.get_shape())}, "
                                                  f"config.json asks for {tuple(p.shape)}.")
                        local, start = own_rows(p)
                        if len(local):
                            local.copy_(stored[start:start + len(local)])
                        missing.pop(name, None)
            except CheckpointError:
                raise
            except Exception as e:                  # safetensors raises its own type, OSError and others
                raise CheckpointError(f"{file} cannot be read ({e}); it may be cut short: copy it again.") from None
        if missing:
            raise CheckpointError(f"{path} lacks {len(missing)} parameters, the first {next(iter(missing))}.")

    @torch.no_grad()
    def save_pretrained(self, path: str, dtype=None, max_shard_bytes: int = 5 * 2**30) -> None:
        """Write config.json and model.safetensors (or shards + index) to the directory `path`, each file by rename.

        dtype: of the files, by default the parameters' own. Rank 0 alone writes and holds one file's tensors at a time; where
        the model is sharded all ranks must call this, and gather one parameter after another.
        """
        rank, _ = rank_and_world()
        dtype = dtype or next(self.parameters()).dtype
        files, size = [[]], 0                       # the parameters of each file
        for name, p in self.named_parameters():
            if size and size + p.numel() * dtype.itemsize > max_shard_bytes:
                files.append([])
                size = 0
            files[-1].append((name, p))
            size += p.numel() * dtype.itemsize
        if rank == 0:
            os.makedirs(path, exist_ok=True)
        weight_map = {}
        for i, parameters in enumerate(files):
            file = "model.safetensors" if len(files) == 1 else f"model-{i + 1:05}-of-{len(files):05}.safetensors"
            tensors = {}
            for name, p in parameters:
                full = whole(p)                     # every rank takes part, and all but rank 0 let go of it at once
                if rank == 0:
                    tensors[name] = full.detach().to("cpu", dtype).contiguous()
                    weight_map[name] = file
            if rank == 0:
                file = os.path.join(path, file)
                save_file(tensors, file + ".tmp", metadata={"format": "pt"})
                os.chmod(file + ".tmp", 0o644)      # safetensors makes it readable by its owner alone
                os.replace(file + ".tmp", file)
        if rank == 0:
            if len(files) > 1:
                size = sum(p.numel() for p in self.parameters()) * dtype.itemsize
                write_json(os.path.join(path, "model.safetensors.index.json"),
                           {"metadata": {"total_size": size}, "weight_map": weight_map})
            write_json(os.path.join(path, "config.json"), self.config.to_hf(dtype))


def resolve(path_or_hub_id: str) -> str:
    """The local directory of a checkpoint; a hub id is downloaded (huggingface_hub comes with tokenizers)."""
    if os.path.isfile(os.path.join(path_or_hub_id, "config.json")):
        return path_or_hub_id
    if os.path.exists(path_or_hub_id) or path_or_hub_id.count("/") != 1 or path_or_hub_id[0] in "./~":
        raise CheckpointError(f"{path_or_hub_id} is not a model: no config.json there. "
                              "Give a Hugging Face directory or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct.")
    from huggingface_hub import snapshot_download
    try:
        return snapshot_download(path_or_hub_id, allow_patterns=["*.json", "*.safetensors", "*.jinja"])
    except Exception as e:
        reason = str(e).strip().split("\n")[0] or type(e).__name__
        raise CheckpointError(f"{path_or_hub_id} is neither a local directory nor could it be downloaded ({reason}).") from None


def checkpoint_files(path: str) -> list[str]:
    """The safetensors files of a HF directory, in order."""
    index = os.path.join(path, "model.safetensors.index.json")
    if os.path.isfile(os.path.join(path, "model.safetensors")):
        return [os.path.join(path, "model.safetensors")]
    if not os.path.isfile(index):
        raise CheckpointError(f"{path} holds no model.safetensors (nor its index); convert older .bin weights first.")
    with open(index, encoding="utf-8") as f:
        return [os.path.join(path, name) for name in sorted(set(json.load(f)["weight_map"].values()))]


def write_json(path: str, content) -> None:
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(content, f, indent=2, ensure_ascii=False)
        f.write("\n")
    os.replace(path + ".tmp", path)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded; then every rank must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def own_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's rows of a tensor that may be sharded, and the number of the first: torch.chunk's cut, the last ones shorter."""
    if not is_sharded(tensor):
        return tensor.detach(), 0
    rank, world = rank_and_world()
    start = min(rank * math.ceil(len(tensor) / world), len(tensor))
    return tensor.to_local().detach(), start


# -----------------------------------------------------------------------------------------------------------------
# Fused linear cross-entropy. Lifts out of this file with `import torch` alone.

def fused_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                        ignore_index: int = -100) -> torch.Tensor:
    """Cross-entropy of `hidden @ weight.T` per token, without ever holding all the logits.

    hidden: (N, H). weight: (V, H). targets: (N,) int64, `ignore_index` where nothing is scored.
    Returns losses (N,) float32, in nats, 0 where ignored. Any gradient per token may come back.

    Two passes of the head instead of one: RFT weighs tokens by their losses, so the gradients cannot be made during
    forward (Liger's trick); backward recomputes each chunk's logits. Cost: 8 N V H floating-point operations, N the
    scored tokens alone, against 6 N V H for the plain way over all tokens, and one chunk of logits instead of ~13 N V bytes.

    Losses are float32 whatever the inputs, since SHAD subtracts two of them: rounding logits to bf16 costs 0.02 nats.
    torch >= 2.13 has `F.linear_cross_entropy`; with reduction="none" it returns losses in the input's dtype (0.06 nats of
    error in bf16) and its chunked path sums grad_weight in that dtype, which is why it is not called here.
    """
    return _FusedCrossEntropy.apply(hidden, weight, targets, ignore_index)


CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}      # of float32 logits; on CPUs a chunk should fit the cache


def _chunk_rows(weight: torch.Tensor) -> int:
    """Rows of a chunk: what fits the budget, rounded down to a power of two."""
    budget = CHUNK_BYTES.get(weight.device.type, CHUNK_BYTES["cuda"])
    return 2 ** int(math.log2(max(1, budget // (4 * weight.shape[0]))))


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b accumulated and returned in float32 (float64 stays), without rounding to bf16 on the way."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda and torch.__version__ >= "2.8":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, ignore_index):
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.autocast(device, enabled=False):
            kept = (targets != ignore_index).nonzero().squeeze(1)               # (n,) rows that are scored
            w = weight.to(ctx.dtype)                                            # (V, H)
            lse = torch.empty(len(kept), dtype=torch.float64 if w.dtype == torch.float64 else torch.float32,
                              device=hidden.device)
            losses = hidden.new_zeros(len(hidden), dtype=torch.float32)
            for i in range(0, len(kept), _chunk_rows(w)):
                rows = kept[i:i + _chunk_rows(w)]
                logits = _mm(hidden[rows].to(ctx.dtype), w.T)                   # (chunk, V) float32
                target_logit = logits.gather(1, targets[rows, None]).squeeze(1)
                peak = logits.amax(1)
                total = logits.sub_(peak[:, None]).exp_().sum(1)                # in place: no second (chunk, V)
                lse[i:i + len(rows)] = peak + total.log()
                losses[rows] = (lse[i:i + len(rows)] - target_logit).float()    # loss = lse - logit[target]
        ctx.save_for_backward(hidden, weight, targets, kept, lse)
        return losses

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, kept, lse = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight.to(ctx.dtype)
            grad_hidden = torch.zeros_like(hidden) if need_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=lse.dtype) if need_weight else None    # float32 sum over chunks
            for i in range(0, len(kept), _chunk_rows(w)):
                rows = kept[i:i + _chunk_rows(w)]
                h = hidden[rows].to(ctx.dtype)
                d = _mm(h, w.T).sub_(lse[i:i + len(rows), None]).exp_()         # softmax
                d[torch.arange(len(rows), device=d.device), targets[rows]] -= 1                 # - onehot
                d = d.mul_(grad[rows, None]).to(ctx.dtype)                      # (chunk, V), cast once
                if need_hidden:
                    grad_hidden[rows] = (d @ w).to(hidden.dtype)
                if need_weight:
                    if d.dtype == grad_weight.dtype:
                        grad_weight.addmm_(d.T, h)
                    else:
                        grad_weight += _mm(d.T, h)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None
