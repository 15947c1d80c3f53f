"""A package of models that registers itself by its entry point, and is steered like any other."""

from pathlib import Path

import pytest

from apart import printed

OURS = "import residual_steer as rs; rs.list_backbones()"
PLUGIN = Path(__file__).parent / "plugins" / "whole"
STEER = """
import warnings
warnings.simplefilter("error", UserWarning)
FIRST
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


@pytest.mark.parametrize(
    "first", ["", "import whole_plugin.steering", "import residual_steer as rs; rs.list_backbones()"]
)
def test_an_installed_package_is_steered_whoever_is_imported_first(first):
    found, _ = printed(STEER.replace("FIRST", first), paths=[PLUGIN])
    assert found.splitlines() == [
        *("whole at 0", "├─ blocks: 2 × Layer", "├─ width:  8"),
        "└─ sites:  block, mixer, mlp, input, after  (mixer: .mix; mlp: .mlp)",
    ]
