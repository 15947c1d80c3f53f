"""Fields in the place of vLLM's LoRA adapters: one server, one frozen model, a field or none for every request.

    vllm serve BASE --enable-lora --max-loras 8 --max-lora-rank 32 --lora-modules law=fields/law squad=fields/squad \
        --additional-config '{"residual_steer": true}'

>>> from vllm import LLM
>>> import residual_steer as rs
>>> llm = LLM(base, enable_lora=True, max_loras=8, additional_config={"residual_steer": True})
>>> llm.generate(prompts, lora_request=[rs.vllm.request("fields/law"), None])

Names, scheduling, slots, prefix caching and loading at run time are vLLM's. Nothing here imports vLLM before it is
used, and without `residual_steer` in the additional config vLLM is as it was.
"""

from __future__ import annotations

from ._requests import request
from ._vllm_internals import register

__all__ = ["register", "request"]
