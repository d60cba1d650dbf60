"""What is meant to be copied works alone: in an empty folder, where nothing else of the project can
be imported."""
import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shad
from data import Dataset
from model import Transformer
from tiny import apigen, make_checkpoint, make_model, write

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# -I leaves out the script's own folder and PYTHONPATH; what is copied comes first on the path
START = """
import os, sys
sys.path.insert(0, os.getcwd())
import torch
torch.set_num_threads(1)
"""

MODEL = """
from model import Config, Transformer, fused_cross_entropy
model = Transformer.from_pretrained("checkpoint")
tokens = torch.randint(96, (4, 21), generator=torch.Generator().manual_seed(0))
inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
targets[:, :5] = -100
logits = model(inputs)
assert logits.shape == (4, 20, 96)
expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
losses = model(inputs, targets)
torch.testing.assert_close(losses, expected)

optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for step in range(20):
    loss = model(inputs, targets).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
assert loss < 0.5 * losses.mean()
model.save_pretrained("trained")
again = Transformer.from_pretrained("trained")
assert torch.equal(again(inputs), model(inputs))
"""

RFT = """
from rft import rft_loss
losses = torch.rand(4, 20, requires_grad=True)
loss = rft_loss(losses, torch.rand(4, 20) < 0.3, tau=3.0).mean()
loss.backward()
assert loss.isfinite() and losses.grad.norm() > 0
"""

FUSED = """
import torch.nn.functional as F
from transformers.models.llama import modeling_llama as llama
torch.manual_seed(0)
config = llama.LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
model = llama.LlamaForCausalLM(config)
tokens = torch.randint(96, (4, 21))
inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
targets[:, :5] = -100
weights = torch.rand(targets.shape)

def gradients(losses):
    model.zero_grad()
    (losses * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}

# what transformers computes
logits = model(inputs).logits.transpose(1, 2)
expected = F.cross_entropy(logits, targets, reduction="none")
expected_gradients = gradients(expected)

# the same with the pieces in their places, in several chunks
def forward(norm, x):
    return _RMSNorm.apply(x, norm.weight, norm.variance_epsilon)

llama.LlamaRMSNorm.forward = forward
CHUNK_BYTES["cpu"] = 8 * 4 * 96
hidden = model.model(inputs).last_hidden_state
losses = fused_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, targets.flatten())
losses = losses.view_as(targets)
torch.testing.assert_close(losses, expected)
torch.testing.assert_close(gradients(losses), expected_gradients, rtol=1e-4, atol=1e-5)
"""

LOOP = """
import copy
import torch.nn.functional as F
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Embedding(50, 16), torch.nn.Linear(16, 50))
tuned = copy.deepcopy(model)
tuned[1].weight.data += 0.1 * torch.randn(50, 16)
tokens = torch.randint(50, (4, 21))
is_output = torch.arange(20).expand(4, 20) >= 5

def token_losses(model):                # of anything that makes logits of ids
    return F.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")

with torch.no_grad():
    difference = loss_difference(token_losses(tuned), token_losses(model))
is_reasoning = classify(difference)
shares = torch.where(is_output, is_reasoning, 0.0).sum(1) / is_output.sum(1)
assert (0 < shares).all() and (shares < 1).all()

optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for step in range(20):
    losses = token_losses(model)
    loss = rft_loss(losses, is_reasoning, is_output=is_output)      # (B,)
    for b in range(4):
        L_b = losses[b][is_output[b] & ~is_reasoning[b]].mean()
        L_r = losses[b][is_output[b] & is_reasoning[b]].mean()
        w_b = torch.exp(L_b / 3) / (torch.exp(L_b / 3) + torch.exp(L_r / 3))
        torch.testing.assert_close(loss[b], w_b * L_b + (1 - w_b) * L_r)
    first = loss.mean().item() if step == 0 else first
    loss.mean().backward()
    optimizer.step()
    optimizer.zero_grad()
assert loss.mean() < 0.8 * first
"""

END = """
own = [m for m in sys.modules.values() if (getattr(m, "__file__", None) or "").startswith(ROOT)]
assert not own, own
"""


def run_alone(code, folder):
    """Run code as a file of its own, in a new interpreter and with nothing but this folder."""
    path = write(folder / "pasted.py", START + code + END.replace("ROOT", repr(ROOT + os.sep)))
    command = [sys.executable, "-I", path]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def cut(file, *names):
    """{name: source} of definitions at the top of a file, and of all that they use of it."""
    source = Path(ROOT, file).read_text(encoding="utf-8")
    definitions = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign):
            definitions[ast.unparse(node.targets[0])] = node
    needed = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name in definitions and name not in needed:
            needed.add(name)
            todo += [n.id for n in ast.walk(definitions[name]) if isinstance(n, ast.Name)]
    return {name: ast.get_source_segment(source, node) for name, node in definitions.items()
            if name in needed}


def test_model_works_alone(tmp_path):
    make_model(96).save_pretrained(str(tmp_path / "checkpoint"))
    shutil.copy(os.path.join(ROOT, "model.py"), tmp_path)
    run_alone(MODEL, tmp_path)


def test_rft_works_alone(tmp_path):
    shutil.copy(os.path.join(ROOT, "rft.py"), tmp_path)
    run_alone(RFT, tmp_path)


def test_the_fused_loss_in_a_model_of_transformers(tmp_path):
    pytest.importorskip("transformers")
    pieces = cut("model.py", "fused_cross_entropy", "_RMSNorm")
    source = Path(ROOT, "model.py").read_text(encoding="utf-8")
    section = source[source.index("# ---- Hand-written backward passes."):]
    imports = re.findall("`(import .*?)`", section.split("\n")[0])
    assert all(piece in section for piece in pieces.values())
    run_alone("\n\n".join([*imports, *pieces.values(), FUSED]), tmp_path)


def test_the_three_functions_of_rft_in_a_plain_loop(tmp_path):
    pieces = cut("rft.py", "rft_loss")
    assert pieces.keys() == {"group_losses", "group_weights", "rft_loss"}
    pieces |= cut("shad.py", "loss_difference", "classify")
    assert len(pieces) == 5
    run_alone("\n\n".join(["import torch", *pieces.values(), LOOP]), tmp_path)


def test_shad_over_a_model_of_transformers(tmp_path):
    """The example of baselines/README.md, which imports the project."""
    pytest.importorskip("transformers")
    readme = Path(ROOT, "baselines", "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("\n## Labels by another model"):]
    code, = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    directory = make_checkpoint(tmp_path / "MODEL")
    data = write(tmp_path / "train.json", apigen(24))
    path = write(tmp_path / "pasted.py", f"import sys\nsys.path.insert(0, {ROOT!r})\n" + code)
    result = subprocess.run([sys.executable, "-I", path], cwd=tmp_path, capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr

    # the same of our own model
    dataset = Dataset.load([data], directory, "auto", 2048)
    labels = shad.load_labels(str(tmp_path / "labels.safetensors"), dataset)
    model = Transformer.from_pretrained(directory)
    options = shad.Options(model=directory, data=[data], out="")
    base_losses = shad.token_losses(model, dataset, 4096, "base")
    shuffled, drawn = shad.shuffle_outputs(dataset.samples, 0.01, options.seed)
    shad.tune(model, shad.shuffled_datasets(dataset, drawn, shuffled, options), options)
    expected = shad.token_losses(model, dataset, 4096, "tuned") - base_losses
    assert abs(expected).max() > 0.01
    torch.testing.assert_close(labels.difference[:], expected, rtol=0, atol=1e-3)
