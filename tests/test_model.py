"""The model against transformers on tiny checkpoints of every family; checkpoints in and out."""
import json
import os

import pytest
import torch
import torch.nn.functional as F

from model import CheckpointError, Transformer, _RMSNorm
from support.generate import generate
from tiny import make_model

V = 96
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
FAMILIES = {    # name -> (transformers' class prefix, its own settings)
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "llama-gqa-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama3-rope": ("Llama", {"rope_parameters": {"rope_theta": 500000.0, **LLAMA3}}),
    "llama3-rope-old-keys": ("Llama", {"rope_parameters": {"rope_theta": 20000.0, **LLAMA3}}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "mistral": ("Mistral", {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
                            "sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "qwen3-bias": ("Qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
}
SIZES = {"vocab_size": V, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
         "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
         "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": None}


@pytest.fixture(scope="module", params=FAMILIES)
def theirs(request, tmp_path_factory):
    """(directory, transformers' model): every parameter random, biases and norms too."""
    transformers = pytest.importorskip("transformers")
    prefix, settings = FAMILIES[request.param]
    config = getattr(transformers, prefix + "Config")(**SIZES | settings)
    torch.manual_seed(0)
    model = getattr(transformers, prefix + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.15)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    if request.param.endswith("old-keys"):                  # as transformers 4 wrote it
        hf = json.loads((path / "config.json").read_text())
        rope = hf.pop("rope_parameters")
        hf |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
        (path / "config.json").write_text(json.dumps(hf))
    return str(path), model


def some_tokens(batch=2, length=60):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(3))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def load_in_transformers(path):
    """transformers' model of a directory, which must hold exactly the parameters it expects."""
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, dtype=torch.float32)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem], info
    return model.eval()


@torch.no_grad()
def test_logits_are_those_of_transformers(theirs):
    path, model = theirs
    logits = Transformer.from_pretrained(path)(some_tokens())
    assert logits.dtype == torch.float32
    assert logits.std() > 0.3                               # not trivially equal
    close(logits, model(some_tokens()).logits)


@torch.no_grad()
def test_losses_are_those_of_transformers(theirs):
    path, model = theirs
    tokens = some_tokens()
    targets = tokens[:, 1:].clone()
    targets[:, :20] = -100
    losses = Transformer.from_pretrained(path)(tokens[:, :-1], targets)
    logits = model(tokens[:, :-1]).logits
    expected = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    assert losses.dtype == torch.float32
    assert (losses[:, :20] == 0).all()
    close(losses, expected)


@torch.no_grad()
@pytest.mark.parametrize("max_shard_bytes", [5 * 2**30, 50_000], ids=["one file", "shards"])
def test_saved_model_loads_in_transformers_and_here(theirs, tmp_path, max_shard_bytes):
    path, model = theirs
    ours = Transformer.from_pretrained(path)
    ours.save_pretrained(str(tmp_path), max_shard_bytes=max_shard_bytes)
    files = [name for name in os.listdir(tmp_path) if name.endswith(".safetensors")]
    if max_shard_bytes < 2**30:
        assert len(files) > 2
        assert all(os.path.getsize(tmp_path / name) < 60_000 for name in files)
    else:
        assert files == ["model.safetensors"]
    expected = model(some_tokens()).logits
    close(load_in_transformers(tmp_path)(some_tokens()).logits, expected)
    close(Transformer.from_pretrained(str(tmp_path))(some_tokens()), expected)


def test_saved_config_keeps_what_it_does_not_know(tmp_path, theirs):
    path, model = theirs
    Transformer.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(str(tmp_path))
    hf = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert hf["architectures"] == [type(model).__name__]
    assert hf["eos_token_id"] == 1
    assert hf["torch_dtype"] == "bfloat16"
    config = load_in_transformers(tmp_path).config
    for key in ("rope_parameters", "sliding_window", "rms_norm_eps", "max_position_embeddings",
                "tie_word_embeddings"):
        assert getattr(config, key, None) == getattr(model.config, key, None), key


def prompts():
    return [some_tokens(1, n)[0].tolist() for n in (9, 1, 30, 4, 17)]


def test_a_batch_generates_what_each_prompt_does_alone_and_transformers_does(theirs):
    path, hf = theirs
    model = Transformer.from_pretrained(path)
    batch = generate(model, prompts(), 24, {1})
    for prompt, output in zip(prompts(), batch, strict=True):
        assert output == generate(model, [prompt], 24, {1})[0]
        expected = hf.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=24, do_sample=False, eos_token_id=1, pad_token_id=0)
        expected = expected[0, len(prompt):].tolist()
        assert output == (expected[:expected.index(1)] if 1 in expected else expected)
    assert len({tuple(output) for output in batch}) > 1


# --------------------------------------------------------------------------------------------------
# Refusals: a clear error, never a silent wrong model

@pytest.fixture()
def saved(tmp_path):
    make_model(V).save_pretrained(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("change, said", [
    ({"model_type": "gpt_neox"}, "gpt_neox"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "yarn"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"hidden_size": 40}, "shape"),
    ({"num_hidden_layers": 3}, "lacks"),
    ({"num_hidden_layers": 1}, "layers.1"),
    ({"tie_word_embeddings": False}, "lm_head.weight"),
    ({"model_type": "qwen2"}, "bias"),
    ({"vocab_size": None}, "vocab_size"),
], ids=lambda x: str(x)[:50] if isinstance(x, dict) else "")
def test_refuses_what_it_cannot_be(saved, change, said):
    hf = json.loads((saved / "config.json").read_text()) | change
    hf = {key: value for key, value in hf.items() if value is not None}
    (saved / "config.json").write_text(json.dumps(hf))
    with pytest.raises(CheckpointError, match=said) as error:
        Transformer.from_pretrained(str(saved))
    assert str(saved) in str(error.value)


def test_refuses_a_truncated_file(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        Transformer.from_pretrained(str(saved))


def test_refuses_a_missing_shard(tmp_path):
    make_model(V).save_pretrained(str(tmp_path), max_shard_bytes=20_000)
    os.remove(sorted(tmp_path.glob("*.safetensors"))[1])
    with pytest.raises(CheckpointError, match="model-00002-of"):
        Transformer.from_pretrained(str(tmp_path))


def test_refuses_a_broken_config_and_a_missing_directory(saved):
    (saved / "config.json").write_text('{"vocab_size": 3,\n oops')
    with pytest.raises(CheckpointError, match="line 2"):
        Transformer.from_pretrained(str(saved))
    with pytest.raises(CheckpointError, match="nowhere"):
        Transformer.from_pretrained(str(saved / "nowhere"))


def test_refuses_more_than_a_sliding_window():
    model = make_model(V, model_type="mistral", sliding_window=16)
    model(some_tokens(1, 16))
    with pytest.raises(CheckpointError, match="sliding window"):
        model(some_tokens(1, 17))


# --------------------------------------------------------------------------------------------------
# What must not change losses or gradients: padding, leaving rows out, recomputing

def test_padding_does_not_change_losses_or_gradients():
    model = make_model(V)
    tokens = some_tokens(1, 31)
    alone = model(tokens[:, :-1], tokens[:, 1:])
    grad = torch.autograd.grad(alone.sum(), model.head)[0]
    padded = torch.full((2, 50), 7)
    padded[0, :30] = tokens[0, :-1]
    targets = torch.full((2, 50), -100)
    targets[0, :30] = tokens[0, 1:]
    losses = model(padded, targets)
    torch.testing.assert_close(losses[:1, :30], alone, rtol=1e-5, atol=1e-5)
    assert (losses[0, 30:] == 0).all()
    assert (losses[1] == 0).all()
    padded_grad = torch.autograd.grad(losses.sum(), model.head)[0]
    torch.testing.assert_close(padded_grad, grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
def test_hidden_states_of_some_rows(recompute):
    model = make_model(V, seed=1)
    model.recompute = recompute
    tokens = some_tokens()
    rows = torch.tensor([3, 5, 6, 20])
    upstream = torch.randn(4, 32)
    results = []
    for hidden in (model.hidden_states(tokens, rows=rows),
                   model.hidden_states(tokens).flatten(0, 1)[rows]):
        model.zero_grad()
        hidden.backward(upstream)
        results.append([hidden] + [p.grad.clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert model.hidden_states(tokens, rows=rows[:0]).shape == (0, 32)


def test_recomputed_gradients_are_the_same():
    model = make_model(V)
    tokens = some_tokens()
    grads = {}
    for model.recompute in (False, True):
        model.zero_grad()
        model(tokens[:, :-1], tokens[:, 1:]).square().sum().backward()
        grads[model.recompute] = [p.grad.clone() for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*grads.values(), strict=True))


def test_the_norm_is_exact():
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, weight: _RMSNorm.apply(x, weight, 1e-2), (x, weight))
    expected = F.rms_norm(x, (8,), weight, 1e-2)
    torch.testing.assert_close(_RMSNorm.apply(x, weight, 1e-2), expected)
