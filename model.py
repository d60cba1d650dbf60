"""A decoder-only transformer of the Llama family and its fused cross-entropy. One file to copy.

    model = Transformer.from_pretrained("path/or/hub-id")   # Llama 2/3, SmolLM2, Mistral, Qwen2/3
    logits = model(tokens)                                  # (B, T, V)
    losses = model(tokens, targets)                         # (B, T) float32, one loss per token
    model.save_pretrained("out")                            # a HF directory, loads anywhere

Parameters carry Hugging Face's names and rotate-half RoPE layout, so a checkpoint loads with no
renaming and no permuting. Batches are right-padded and attention is causal, so no attention mask
exists while training: a real token never sees padding, and SDPA stays on its fast path.
"""
import json
import math
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded as it is; the message names the file and the remedy."""


# ---- Configuration: the keys of config.json that matter here, under Hugging Face's names -------
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
                 "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# keys that change what a model computes, and the only values that this file implements
SUPPORTED_VALUES = {"hidden_act": ("silu",), "attention_dropout": (0, None),
                    "pretraining_tp": (1, None), "partial_rotary_factor": (1, None),
                    "quantization_config": (None,),
                    "torch_dtype": ("float32", "bfloat16", "float16", "float64", None)}
SUPPORTED_VALUES["dtype"] = SUPPORTED_VALUES["torch_dtype"]
# (lowest, highest) value of each number, which must be of their type; a trailing None allows null
LIMITS = {"vocab_size": (1, 2**24), "hidden_size": (1, 2**18), "intermediate_size": (1, 2**20),
          "num_hidden_layers": (1, 2**10), "num_attention_heads": (1, 2**12),
          "num_key_value_heads": (1, 2**12, None), "head_dim": (2, 2**12, None),
          "max_position_embeddings": (1, 2**31), "sliding_window": (1, 2**31, None),
          "rms_norm_eps": (0.0, 1.0), "rope_theta": (1.0, 1e15), "initializer_range": (0.0, 1e3),
          "tie_word_embeddings": (False, True), "attention_bias": (False, True),
          "mlp_bias": (False, True)}
ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
REQUIRED_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                 "num_attention_heads", "model_type")


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
    rope_scaling: dict | None = None            # None, or Llama 3.1's {"rope_type": "llama3", ...}
    tie_word_embeddings: bool = False           # the head is the embedding matrix
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None           # trained with attention limited to this many tokens
    initializer_range: float = 0.02
    extra: dict = field(default_factory=dict)   # the rest of config.json, carried through unchanged

    def __post_init__(self):
        if self.model_type not in list(ARCHITECTURES):      # it may be unhashable
            raise CheckpointError(f"model_type {self.model_type!r} is not supported; "
                                  f"this file implements {', '.join(ARCHITECTURES)}.")
        numbers = [(key, getattr(self, key), *LIMITS[key]) for key in LIMITS]
        if self.rope_scaling:
            numbers += [(key, self.rope_scaling.get(key), 1e-3, 2.0**31) for key in ROPE_KEYS]
        for key, value, low, high, *null in numbers:
            typed = type(value) is type(low) or (type(low) is float and type(value) is int)
            if value not in null and not (typed and low <= value <= high):
                raise CheckpointError(f"{key}={value!r} in config.json: it must be "
                                      f"{type(low).__name__}, from {low} to {high}.")
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.head_dim < 2 or self.head_dim % 2:
            raise CheckpointError(f"a head_dim of {self.head_dim} has no two halves to rotate.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}.")

    @classmethod
    def from_hf(cls, hf: dict) -> "Config":
        """From a parsed config.json. Raises CheckpointError for what this file does not support."""
        hf = dict(hf)
        for key, kind in (("rope_parameters", dict), ("rope_scaling", dict), ("layer_types", list)):
            if not isinstance(hf.get(key) or kind(), kind):
                raise CheckpointError(f"{key}={hf[key]!r} in config.json: it must be a "
                                      f"{kind.__name__}.")
        # transformers 5 writes rope_parameters, 4 rope_theta and rope_scaling
        rope = dict(hf.pop("rope_parameters", None) or hf.pop("rope_scaling", None) or {})
        rope_type = rope.get("rope_type", rope.pop("type", "default"))
        if rope_type not in ("default", "llama3"):
            raise CheckpointError(f"rope scaling {rope_type!r} is not supported; "
                                  "only the default and 'llama3' are.")
        hf["rope_theta"] = rope.pop("rope_theta", hf.get("rope_theta", 10000.0))
        hf["rope_scaling"] = rope if rope_type == "llama3" else None
        for key, supported in SUPPORTED_VALUES.items():
            if hf.get(key, supported[0]) not in supported:
                raise CheckpointError(f"{key}={hf[key]!r} in config.json is not supported; "
                                      f"{' or '.join(map(repr, supported))} is.")
        missing = [key for key in REQUIRED_KEYS if key not in hf]
        if missing:
            raise CheckpointError(f"config.json lacks {', '.join(missing)}.")
        # Qwen's configs name a window and switch it off; transformers 5 lists it per layer
        layer_types = hf.get("layer_types") or ["sliding_attention"]
        if hf.get("use_sliding_window") is False or "sliding_attention" not in layer_types:
            hf["sliding_window"] = None
        known = {f.name for f in fields(cls)} - {"extra"}
        extra = {key: value for key, value in hf.items() if key not in known}
        return cls(**{key: value for key, value in hf.items() if key in known}, extra=extra)

    def to_hf(self, dtype: torch.dtype) -> dict:
        """The config.json that transformers, vLLM and llama.cpp's converter read."""
        hf = {"architectures": [ARCHITECTURES[self.model_type]], "hidden_act": "silu"}
        hf |= asdict(self) | self.extra
        del hf["extra"]
        if hf["sliding_window"] is None and self.model_type != "mistral":
            del hf["sliding_window"]    # mistral's own default is a window of 4,096: keep its null
        hf.pop("dtype", None)
        return hf | {"torch_dtype": str(dtype).removeprefix("torch.")}


# ---- The transformer ---------------------------------------------------------------------------
def rope_frequencies(config: Config, device=None) -> torch.Tensor:
    """RoPE (Su et al. 2021): radians per position of each pair of dimensions, (head_dim/2,)."""
    d = config.head_dim
    exponent = torch.arange(0, d, 2, dtype=torch.float32, device=device) / d
    freq = 1.0 / config.rope_theta ** exponent
    if config.rope_scaling:     # Llama 3.1: slow the long waves, keep the short, blend between
        s = config.rope_scaling
        low = s["low_freq_factor"]
        high = s["high_freq_factor"]
        wavelength = 2 * math.pi / freq
        waves = s["original_max_position_embeddings"] / wavelength      # in the original context
        blend = ((waves - low) / (high - low)).clamp(0, 1)              # 0: long wave, 1: short one
        freq = (1 - blend) * freq / s["factor"] + blend * freq
    return freq


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x (B, T, n_head, head_dim); cos, sin: (B or 1, T, 1, head_dim/2) float32."""
    x1, x2 = x.float().chunk(2, dim=-1)     # the two halves of a head, not its odd and even entries
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).type_as(x)


def checkpointed(f, *inputs):
    """f(*inputs) with activation checkpointing: backward recomputes it from the inputs."""
    if not torch.is_grad_enabled():
        return f(*inputs)
    return checkpoint(f, *inputs, use_reentrant=False, preserve_rng_state=False)


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        if not x.is_cuda:
            return _RMSNorm.apply(x, self.weight, self.eps)
        # torch's own is one kernel there; cast once, not in each of the layers that follow
        y = F.rms_norm(x, self.weight.shape, self.weight.type_as(x), self.eps)
        return y.to(_product_dtype(x))


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.head_dim = c.head_dim
        q_size = c.num_attention_heads * c.head_dim
        kv_size = c.num_key_value_heads * c.head_dim
        qkv_bias = c.attention_bias or c.model_type == "qwen2"
        qk_norm = c.model_type == "qwen3"
        self.q_proj = nn.Linear(c.hidden_size, q_size, bias=qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, kv_size, bias=qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, kv_size, bias=qkv_bias)
        self.o_proj = nn.Linear(q_size, c.hidden_size, bias=c.attention_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if qk_norm else nn.Identity()

    def forward(self, x, cos, sin, cache=None):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim))   # (B, T, n_head, head_dim)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim))   # (B, T, n_kv, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q = rotate(q, cos, sin).transpose(1, 2)                         # (B, n_head, T, head_dim)
        k = rotate(k, cos, sin).transpose(1, 2)                         # (B, n_kv, T, head_dim)
        mask = None
        if cache is not None:
            k, v, mask = cache.append(self, k, v)
        if mask is not None:
            # decoding, T = 1: query heads that share a key fill the T axis, so it is read once
            q = q.reshape(B, k.shape[1], -1, self.head_dim)             # (B, n_kv, group, head_dim)
        bf16_on_cpu = q.dtype == torch.bfloat16 and not q.is_cuda
        if mask is None and bf16_on_cpu and not torch.compiler.is_compiling():
            y = causal_attention(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None,
                                               enable_gqa=q.shape[1] != k.shape[1])
        y = y.reshape(B, -1, T, self.head_dim).transpose(1, 2)          # (B, T, n_head, head_dim)
        return self.o_proj(y.reshape(B, T, -1))                         # (B, T, H)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int = 192):
    """Causal attention by plain matrix products, in bf16 faster on CPUs than SDPA's kernel.

    q: (B, n_head, T, head_dim). k, v: (B, n_kv, T, head_dim). Returns the shape of q. Only a block
    of queries is scored at a time, with the keys up to it, and scored again in backward.
    """
    def attend(q, k, v):
        queries, keys = q.shape[2], k.shape[1]
        later = torch.full((queries, keys), -math.inf, dtype=q.dtype).triu(keys - queries + 1)
        later = later.repeat(q.shape[1], 1)                             # (group*queries, keys)
        scores = torch.baddbmm(later, q.flatten(1, 2), k.mT, alpha=q.shape[3] ** -0.5)
        return (scores.softmax(-1) @ v).view(q.shape)

    B, n_kv, T, head_dim = k.shape
    k = k.reshape(B * n_kv, T, head_dim)
    v = v.reshape(B * n_kv, T, head_dim)
    outputs = []
    for queries in q.reshape(B * n_kv, -1, T, head_dim).split(block, dim=2):
        end = len(outputs) * block + queries.shape[2]
        outputs.append(checkpointed(attend, queries, k[:, :end], v[:, :end]))
    return torch.cat(outputs, dim=2).view(q.shape)                      # (B, n_head, T, head_dim)


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        # backward does not need the output of down_proj: recomputing stops before its product
        return checkpointed(lambda gate, up: self.down_proj(F.silu(gate) * up),
                            self.gate_proj(x), self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, rows=None, cache=None, recompute=False):
        if cache is not None:   # not self.attend_and_mlp, which may be compiled: the cache grows
            return Block.attend_and_mlp(self, x, cos, sin, rows, cache)
        if recompute:
            return checkpointed(self.attend_and_mlp, x, cos, sin, rows)
        return self.attend_and_mlp(x, cos, sin, rows)

    def attend_and_mlp(self, x, cos, sin, rows=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        if rows is not None:        # after the last attention tokens no longer mix: keep these only
            x = x.flatten(0, 1)[rows]                                   # (n, H)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.recompute = False      # True: save only the input of each block, recompute in backward
        self.compute_device = None  # set where parameters are kept on another device (offload)
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

    @property
    def device(self) -> torch.device:
        """Where the model computes and expects its inputs."""
        return self.compute_device or self.head.device

    def hidden_states(self, tokens, positions=None, rows=None, cache=None):
        """Final hidden states (B, T, H) of tokens (B, T) int64; positions default to 0, 1, 2, ...

        rows: (n,) int64, indices into the B*T tokens; if given, only theirs are returned, (n, H).
        cache: keys and values of earlier tokens, for generation: support.generate.KVCache.
        """
        if positions is None:
            T = tokens.shape[1]
            window = self.config.sliding_window or T
            if window < T:
                raise CheckpointError(f"a sequence of {T} tokens is longer than this checkpoint's "
                                      f"sliding window of {window}, which is not implemented; "
                                      "lower --max-length.")
            positions = torch.arange(T, device=tokens.device)[None]     # (1, T)
        angle = positions[:, :, None, None] * rope_frequencies(self.config, tokens.device)
        cos = angle.cos()                                               # (B or 1, T, 1, head_dim/2)
        sin = angle.sin()
        x = self.model.embed_tokens(tokens)                             # (B, T, H)
        for block in self.model.layers[:-1]:
            x = block(x, cos, sin, None, cache, self.recompute)
        x = self.model.layers[-1](x, cos, sin, rows, cache, self.recompute)
        return self.model.norm(x)

    def forward(self, tokens, targets=None):
        """Logits, or the loss of every token.

        tokens: (B, T) int64, right-padded with any id. targets: (B, T) int64 already shifted
        (targets[b, t] follows tokens[b, t]), -100 where nothing is scored. Returns logits (B, T, V)
        in the model's dtype, or, with targets, losses (B, T) float32 in nats, 0 where the target
        is -100. Prompt and padding cost no logits and no last MLP.
        """
        if targets is None:
            return F.linear(self.hidden_states(tokens), self.head)
        scored = targets != -100
        rows = scored.flatten().nonzero().squeeze(1)                    # (n,)
        hidden = self.hidden_states(tokens, rows=rows)                  # (n, H)
        losses = fused_cross_entropy(hidden, self.head, targets.flatten()[rows])
        return losses.new_zeros(targets.shape).masked_scatter(scored, losses)

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str, dtype=torch.float32, device="cpu", shard=None):
        """Load a HF directory or a hub id. Raises CheckpointError, naming the file.

        shard: called with the model while it is on the meta device, to split it over ranks (with
        FSDP2's fully_shard, say), so that no rank ever holds more than its share and one tensor. It
        may return another device for the parameters.
        """
        path = resolve(path_or_hub_id)
        hf = read_json(os.path.join(path, "config.json"))
        try:
            config = Config.from_hf(hf)
        except (ValueError, TypeError, AttributeError) as e:
            raise CheckpointError(f"{path}: {e}") from None
        with torch.device("meta"):                  # shapes without storage
            model = cls(config).to(dtype)
        if shard is not None:
            device = shard(model) or device
        try:
            model.to_empty(device=device)
        except RuntimeError as e:
            raise CheckpointError(f"{path}: no room for its parameters ({e}).") from None
        model.load_weights(path)
        return model

    def load_weights(self, path: str) -> None:
        """Fill the parameters from a HF directory, in place. Raises CheckpointError."""
        absent = [name for name, _ in self.named_parameters()]
        for file in checkpoint_files(path):
            try:
                loaded = load_file(self, file)
            except CheckpointError:
                raise
            except Exception as e:                  # OSError, safetensors' own type, and others
                raise unreadable(file, e) from None
            absent = [name for name in absent if name not in loaded]
        if absent:
            raise CheckpointError(f"{path} lacks {len(absent)} parameters, the first {absent[0]}.")

    @torch.no_grad()
    def save_pretrained(self, path: str, dtype=None, max_shard_bytes: int = 5 * 2**30) -> None:
        """Write config.json and model.safetensors (or shards + index) to the directory `path`.

        dtype: of the files, by default the parameters' own. Only rank 0 writes, one file's tensors
        at a time; if the model is sharded, all ranks must call this to gather its parameters.
        Raises CheckpointError or OSError, on rank 0, where it cannot write.
        """
        dtype = dtype or next(self.parameters()).dtype
        writes = not dist.is_initialized() or dist.get_rank() == 0
        if writes:
            os.makedirs(path, exist_ok=True)
        files = plan_files(self, dtype, max_shard_bytes)
        weight_map = {}
        failure = None
        for file, parameters in files.items():
            tensors = {}
            for name, p in parameters.items():
                weight_map[name] = file
                full = gather_full(p)               # by all ranks; all but rank 0 drop it at once
                if writes:
                    tensors[name] = full.detach().to("cpu", dtype).contiguous()
            temporary = os.path.join(path, file + ".tmp")
            try:
                if writes and not failure:
                    save_file(tensors, temporary, metadata={"format": "pt"})
                    os.chmod(temporary, 0o644)      # safetensors lets only its owner read it
                    os.replace(temporary, os.path.join(path, file))
            except Exception as e:                  # a full disk; go on gathering for the others
                failure = f"{path}/{file} could not be written ({e})."
        if failure:
            raise CheckpointError(failure)
        if writes and len(files) > 1:
            size = sum(p.numel() for p in self.parameters()) * dtype.itemsize
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            write_json(os.path.join(path, "model.safetensors.index.json"), index)
        if writes:
            write_json(os.path.join(path, "config.json"), self.config.to_hf(dtype))


# ---- Checkpoints in and out: Hugging Face directories ------------------------------------------
def resolve(name: str) -> str:
    """The local directory of a checkpoint; a hub id is downloaded. Raises CheckpointError."""
    if os.path.isfile(os.path.join(name, "config.json")):
        return name
    if os.path.exists(name) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name} is not a model: no config.json there. Give a Hugging Face "
                              "directory or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct.")
    try:
        from huggingface_hub import snapshot_download
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"])
    except Exception as e:
        cause = str(e).strip().split("\n")[0] or type(e).__name__
        raise CheckpointError(f"{name} is neither a local directory nor could it be downloaded "
                              f"({cause}).") from None


def checkpoint_files(path: str) -> list[str]:
    """The safetensors files of a HF directory, in order."""
    if os.path.isfile(os.path.join(path, "model.safetensors")):
        return [os.path.join(path, "model.safetensors")]
    index = os.path.join(path, "model.safetensors.index.json")
    if not os.path.isfile(index):
        raise CheckpointError(f"{path} holds no model.safetensors (nor its index); "
                              "convert older .bin weights first.")
    weight_map = read_json(index).get("weight_map")
    names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    if not names or any(os.path.basename(name) != name for name in names):
        raise CheckpointError(f"{index}: weight_map names no files of this folder; copy it again.")
    return [os.path.join(path, name) for name in sorted(names)]


def read_json(path: str) -> dict:
    """The JSON object in a file. Raises CheckpointError."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            return dict(json.load(f))
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise unreadable(path, e) from None


def unreadable(path: str, error) -> CheckpointError:
    """The error for a file that cannot be read."""
    with suppress(OSError), open(path, "rb") as f:
        if f.read(30).startswith(b"version https://git-lfs"):
            error = "it is a git-lfs pointer: run git lfs pull"
    return CheckpointError(f"{path} cannot be read ({error}); it may be cut short: copy it again.")


def load_file(model: Transformer, file: str) -> set[str]:
    """Copy the tensors of a safetensors file into the model, one by one; returns their names."""
    parameters = dict(model.named_parameters())
    loaded = set()
    with safe_open(file, framework="pt") as f:
        for name in f.keys():  # noqa: SIM118 (not a dict)
            tied_copy = name == "lm_head.weight" and model.config.tie_word_embeddings
            if tied_copy or name.endswith("rotary_emb.inv_freq"):
                continue                            # written by some exporters, never used
            if name not in parameters:
                raise CheckpointError(f"{file} holds {name}, which a {model.config.model_type} "
                                      "model does not have.")
            stored = f.get_slice(name)
            shape = tuple(stored.get_shape())
            if shape != parameters[name].shape:
                raise CheckpointError(f"{file}: {name} has shape {shape}, "
                                      f"config.json asks for {tuple(parameters[name].shape)}.")
            if stored.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                raise CheckpointError(f"{file}: {name} is quantized to {stored.get_dtype()}, "
                                      "which is not supported.")
            local, start = local_shard(parameters[name])
            if len(local):
                local.copy_(stored[start:start + len(local)])
                if not torch.stack(local.aminmax()).isfinite().all():
                    raise CheckpointError(f"{file}: {name} holds numbers that are not finite.")
            loaded.add(name)
    return loaded


def plan_files(model: Transformer, dtype: torch.dtype, max_bytes: int) -> dict[str, dict]:
    """Which parameters go into which file of a checkpoint: {file name: {name: parameter}}."""
    groups = [{}]
    size = 0
    for name, p in model.named_parameters():
        if size and size + p.numel() * dtype.itemsize > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = p
        size += p.numel() * dtype.itemsize
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    end = f"-of-{len(groups):05}.safetensors"
    return {f"model-{i:05}{end}": group for i, group in enumerate(groups, start=1)}


def write_json(path: str, content) -> None:
    content = json.loads(json.dumps(content), parse_constant=lambda _: None)    # JSON has no NaN
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.write(json.dumps(content, indent=2) + "\n")
    os.replace(path + ".tmp", path)


def gather_full(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor. If it is sharded (a DTensor), every rank must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_shard(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's rows of a tensor that may be sharded (a DTensor), and the index of the first."""
    if not hasattr(tensor, "to_local"):
        return tensor.detach(), 0
    # cut as torch.chunk does: the last ranks may have fewer rows, or none
    start = dist.get_rank() * math.ceil(len(tensor) / dist.get_world_size())
    return tensor.to_local().detach(), min(start, len(tensor))


# ---- Hand-written backward passes. To copy one, take it with `import math` and `import torch`. --
class _RMSNorm(torch.autograd.Function):
    """y = n * weight, n = x / sqrt(mean(x^2) + eps), in float32 or wider. Saves x and 1 / sqrt."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1]
        scale = (mean_square + eps).rsqrt()                             # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(_product_dtype(x))

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        n = x * scale
        grad = grad.to(scale.dtype)
        along = grad * n
        grad_weight = along.flatten(0, -2).sum(0).type_as(weight)
        along = along.mul_(weight).mean(-1, keepdim=True)
        # remove the component along n, which only rescales the row
        grad_x = (grad * weight).addcmul_(n, along, value=-1).mul_(scale)
        return grad_x.type_as(x), grad_weight, None


def fused_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                        ignore_index: int = -100) -> torch.Tensor:
    """Cross-entropy of `hidden @ weight.T` per token, without ever holding all the logits.

    hidden: (N, H). weight: (V, H). targets: (N,) int64, `ignore_index` where nothing is scored.
    Returns losses (N,) float32, in nats, 0 where ignored. Any gradient per token is accepted.

    Two passes of the head instead of one: RFT weighs tokens by their losses, so the gradients
    cannot be made during forward (Liger's trick); backward recomputes each chunk's logits. Cost:
    8 N V H floating-point operations, where N counts only the scored tokens, against 6 N V H for
    naive logits of all tokens, and the memory of one chunk of logits instead of ~13 N V bytes.

    Losses are float32 whatever the inputs, since SHAD subtracts two of them: rounding logits to
    bf16 costs 0.02 nats. torch >= 2.13 has `F.linear_cross_entropy`; with reduction="none" it
    returns losses in the input's dtype (0.06 nats of error in bf16) and its chunked path sums
    grad_weight in that dtype, which is why it is not called here.
    """
    return _FusedCrossEntropy.apply(hidden, weight, targets, ignore_index)


CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}  # of a chunk's float32 logits


def _chunk_rows(weight: torch.Tensor) -> int:
    """Rows of a chunk: what fits the budget, rounded down to a power of two."""
    budget = CHUNK_BYTES.get(weight.device.type, CHUNK_BYTES["cuda"])
    return 2 ** int(math.log2(max(1, budget // (4 * weight.shape[0]))))


def _product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which x enters matrix products: autocast's, if enabled."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _logits_factor(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x as a factor of float32 logits: CUDA multiplies bf16 into float32, CPUs need float32."""
    if x.is_cuda and torch.__version__ >= "2.8":    # a TorchVersion: compares as numbers
        return x.to(dtype)
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = a @ b, in the dtype of out."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_mm(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b: a product in bf16 may be rounded, but the sum is not."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and torch.__version__ >= "2.10":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, ignore_index):
        ctx.dtype = _product_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            scored = (targets != ignore_index).nonzero().squeeze(1)     # (n,) rows that are scored
            w = _logits_factor(weight, ctx.dtype)                       # (V, H)
            lse = w.new_empty(len(scored), dtype=torch.promote_types(w.dtype, torch.float32))
            buffer = lse.new_empty(_chunk_rows(w), len(w))
            losses = hidden.new_zeros(len(hidden), dtype=torch.float32)
            for i in range(0, len(scored), len(buffer)):
                chunk = slice(i, i + len(buffer))
                rows = scored[chunk]
                h = _logits_factor(hidden[rows], ctx.dtype)
                logits = _mm(h, w.T, out=buffer[:len(rows)])            # (chunk, V) float32
                target_logit = logits.gather(1, targets[rows, None]).squeeze(1)
                peak = logits.amax(1)
                total = logits.sub_(peak[:, None]).exp_().sum(1)    # in place: no second (chunk, V)
                lse[chunk] = peak + total.log()
                losses[rows] = (lse[chunk] - target_logit).float()      # loss = lse - logit[target]
        ctx.save_for_backward(hidden, weight, targets, scored, lse)
        return losses

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, scored, lse = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=lse.dtype) if need_weight else None    # fp32
        with torch.autocast(hidden.device.type, enabled=False):
            w = _logits_factor(weight, ctx.dtype)
            narrow_w = w.to(ctx.dtype)
            buffer = lse.new_empty(_chunk_rows(w), len(w))
            for i in range(0, len(scored), len(buffer)):
                chunk = slice(i, i + len(buffer))
                rows = scored[chunk]
                h = _logits_factor(hidden[rows], ctx.dtype)
                d = _mm(h, w.T, out=buffer[:len(rows)]).sub_(lse[chunk, None]).exp_()   # softmax
                d[torch.arange(len(rows), device=d.device), targets[rows]] -= 1         # - onehot
                d = d.to(ctx.dtype)                                     # (chunk, V), cast once
                g = grad[rows, None]
                if need_hidden:
                    grad_hidden[rows] = (d @ narrow_w * g).to(hidden.dtype)
                if need_weight:
                    _add_mm(grad_weight, d.T, (h * g).to(ctx.dtype))
        grad_weight = grad_weight.to(weight.dtype) if need_weight else None
        return grad_hidden, grad_weight, None, None
