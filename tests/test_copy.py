"""The files that are meant to be copied work alone: in an empty folder, where nothing else of the
project can be imported."""
import os
import shutil
import subprocess
import sys

from tiny import make_model

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

END = """
own = [m for m in sys.modules.values() if (getattr(m, "__file__", None) or "").startswith(ROOT)]
assert not own, own
"""


def run_alone(name, code, folder):
    """Run code in a new interpreter, in a folder with one of the project's files."""
    shutil.copy(os.path.join(ROOT, name), folder)
    end = END.replace("ROOT", repr(ROOT + os.sep))
    command = [sys.executable, "-I", "-c", START + code + end]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_model_works_alone(tmp_path):
    make_model(96).save_pretrained(str(tmp_path / "checkpoint"))
    run_alone("model.py", MODEL, tmp_path)


def test_rft_works_alone(tmp_path):
    run_alone("rft.py", RFT, tmp_path)
