"""A package of models that registers itself by its entry point, and is steered like any other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parent / "plugins" / "whole"
FIRST = ("", "import whole_plugin.steering", "import residual_steer as rs; rs.list_backbones()")
APART = """
import os, sys, torch  # once, since it takes most of the time
sys.path.insert(0, {plugin!r})
for script in {scripts!r}:
    if not (child := os.fork()):
        exec(script, {{"__name__": "__main__"}})
        sys.exit()
    if os.waitpid(child, 0)[1]:
        sys.exit(script)
"""
STEER = """
{first}
import torch
import residual_steer as rs
from whole_plugin import Stack

torch.manual_seed(0)
model = torch.nn.Sequential(Stack(), torch.nn.Linear(8, 3)).requires_grad_(False)
x = torch.randn(2, 5, 8)
before = model(x)
for site in ("block", "mixer", "mlp", "input"):
    rs.steer(model, rank=2, site=site)
    assert torch.equal(model(x), before), site
    for parameter in rs.parameters(model):
        torch.nn.init.normal_(parameter)
    moved = model(x)
    assert not torch.allclose(moved, before), site
    field = next(m for m in model.modules() if isinstance(m, rs.HRes))
    assert field.width == 8
    rs.unsteer(model)
    assert torch.equal(model(x), before), site
print(rs.find_backbone(model))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_an_installed_package_is_steered_whoever_is_imported_first():
    script = APART.format(plugin=str(PLUGIN), scripts=[STEER.format(first=first) for first in FIRST])
    command = [sys.executable, "-W", "error::UserWarning", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == 3 * [
        *("whole at 0", "├─ blocks: 2 × Layer", "├─ width:  8"),
        "└─ sites:  block, mixer, mlp, input, after  (mixer: .mix; mlp: .mlp)",
    ]
