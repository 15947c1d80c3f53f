"""Graphs of a steered model in files: what acts when they are made is in them, and nothing is selected there."""

import io

import pytest
import torch
import transformers

import residual_steer as rs

IDS = torch.arange(16).reshape(2, 8)
MIXES = {"sum": {"a": 0.5, "b": -1.0}, "rows": ["b", None]}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 16, "vocab_size": 64}
    made = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    for name in ("a", "b"):
        rs.steer(made, rank=4, name=name)
        with torch.no_grad():
            for parameter in rs.parameters(made):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return made


class Logits(torch.nn.Module):
    """Token ids in, logits out, without a cache: what a graph takes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("mix", MIXES)
def test_torch_export_to_a_file_and_back(mix, model):
    rs.use(model, MIXES[mix])
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        made, file = torch.export.export(Logits(model).eval(), (IDS,)), io.BytesIO()
        torch.export.save(made, file)
        file.seek(0)
        rs.use(model, "b")  # which the graph knows nothing of
        torch.testing.assert_close(torch.export.load(file).module()(IDS), expected)


@pytest.mark.parametrize("mix", MIXES)
def test_onnx(mix, model, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed; constraints.txt leaves it out")
    import onnxruntime

    rs.use(model, MIXES[mix])
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        torch.onnx.export(Logits(model).eval(), (IDS,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: IDS.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
