"""Import the real `mamba_ssm`, on a machine without CUDA too.

`mamba_ssm` imports its compiled scan at once. Where that is missing, an empty module stands in for it, and the blocks
compute with the reference functions which the package ships beside its kernels. Nothing else of it is replaced.
"""

import importlib
import importlib.util
import sys
import types
from importlib.machinery import PathFinder

import pytest
import torch
from torch.nn import functional as F

# transformers asks for mamba_ssm when these are imported; it must not be given functions that need a GPU.
TRANSFORMERS = (
    *("mamba", "mamba2", "falcon_mamba"),
    *("bamba", "falcon_h1", "granitemoehybrid", "jamba", "nemotron_h", "zamba", "zamba2"),
)


def compiled() -> bool:
    """Say whether the CUDA kernels are there, and a device to run them on."""
    return torch.cuda.is_available() and PathFinder.find_spec("selective_scan_cuda") is not None


def import_mamba_ssm() -> types.ModuleType:
    """Return `mamba_ssm`, with its kernels where they can run and its reference functions elsewhere."""
    if importlib.util.find_spec("mamba_ssm") is None:
        pytest.skip("mamba_ssm is not installed")
    if compiled():
        return importlib.import_module("mamba_ssm")
    if "selective_scan_cuda" not in sys.modules:
        if importlib.util.find_spec("transformers") is not None:
            for name in TRANSFORMERS:
                importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")
    try:
        package = importlib.import_module("mamba_ssm")
    except ImportError as error:
        pytest.skip(f"mamba_ssm cannot be imported without its kernels: {error}")
    _use_references()
    return package


def _use_references() -> None:
    from mamba_ssm.modules import mamba2, mamba_simple
    from mamba_ssm.ops import selective_scan_interface
    from mamba_ssm.ops.triton import layer_norm, layernorm_gated

    opaque = torch.compiler.allow_in_graph  # as a kernel is: a graph holds one call of it
    mamba_simple.selective_scan_fn = opaque(selective_scan_interface.selective_scan_ref)
    mamba_simple.selective_state_update = None
    mamba2.mamba_chunk_scan_combined = opaque(_chunk_scan)
    mamba2.selective_state_update = None
    layernorm_gated.rmsnorm_fn = layernorm_gated.rms_norm_ref
    layer_norm.rms_norm_fn = _rms_norm


def _rms_norm(x, weight, bias, residual=None, residual_in_fp32=False, **options):
    """Normalise as `rms_norm_fn` does, with the package's reference function; a residual is added before, unfused."""
    from mamba_ssm.ops.triton.layer_norm import rms_norm_ref

    assert residual is None, "the reference keeps no residual in fp32"
    return rms_norm_ref(x, weight, bias, **options)


def _chunk_scan(x, dt, A, B, C, chunk_size, D, z, dt_bias, dt_softplus, return_final_states, **absent):
    """Scan a sequence as `mamba_chunk_scan_combined` does, with the package's reference functions."""
    from mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete
    from mamba_ssm.ops.triton.ssd_combined import ssd_chunk_scan_combined_ref

    assert not any(absent.values()), "the reference has no packed sequences"
    length = x.shape[1]
    chunk_size = chunk_size if length % chunk_size == 0 else length  # the reference wants whole chunks
    y = ssd_chunk_scan_combined_ref(x, dt, A, B, C, chunk_size, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus)
    y = y.to(x.dtype)
    if not return_final_states:
        return y
    heads = x.shape[2] // B.shape[2]
    step = F.softplus(dt + dt_bias)
    inputs = (x * step.unsqueeze(-1), A * step, B.repeat_interleave(heads, 2), C.repeat_interleave(heads, 2))
    return y, ssd_minimal_discrete(*(tensor.float() for tensor in inputs), block_len=length)[1]
