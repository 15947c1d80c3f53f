"""What is changed within vLLM: five methods, each of which is as it was where fields are not switched on.

Tried on vLLM 0.32 on a CPU. Another release is refused; other hardware too, unless the switch reads "untested".
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from residual_steer.errors import SteerError

from ._layers import FAMILIES
from ._manager import FieldManager, check_number_of, open_mix

_TRIED = "0.32."
_SWITCH = "residual_steer"  # in `--additional-config`, which vLLM takes into the keys of what it compiles
_registered = False


def register() -> None:
    """Teach vLLM fields: its entry point, which it calls in each of its processes."""
    global _registered
    if _registered:
        return
    _registered = True
    import vllm
    from vllm.config import VllmConfig

    _wrap(VllmConfig, "__post_init__", _checked)
    if vllm.__version__.startswith(_TRIED):
        from vllm.entrypoints.openai.models.serving import OpenAIServingModels
        from vllm.model_executor.model_loader.base_loader import BaseModelLoader
        from vllm.v1.engine.input_processor import InputProcessor
        from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

        _wrap(BaseModelLoader, "load_model", _without_lora)
        _wrap(LoRAModelRunnerMixin, "load_lora_model", _with_fields)
        _wrap(OpenAIServingModels, "load_lora_adapter", _pinned)
        _wrap(InputProcessor, "process_inputs", _admitted)


def _wrap(owner: Any, name: str, wrapper: Any) -> None:
    original = getattr(owner, name)
    setattr(owner, name, wraps(original)(wrapper(original)))


def _is_on(config: Any) -> bool:
    return isinstance(config.additional_config, dict) and bool(config.additional_config.get(_SWITCH))


def _checked(original: Any) -> Any:
    def post_init(self: Any, *args: Any) -> None:
        original(self, *args)
        if _is_on(self) and self.model_config is not None:
            check_config(self)

    return post_init


def check_config(config: Any) -> None:
    """Check that fields were tried with a configuration of vLLM; raise if they were not."""
    import vllm
    from vllm.platforms import current_platform

    switch, base, parallel = config.additional_config[_SWITCH], config.model_config, config.parallel_config
    if not vllm.__version__.startswith(_TRIED):
        raise SteerError(f"fields were tried with vLLM {_TRIED}*; this is {vllm.__version__}. Install vllm=={_TRIED}*.")
    if switch not in (True, "untested"):
        raise SteerError(f'`{_SWITCH}` in the additional config is true, or "untested"; received {switch!r}.')
    if config.lora_config is None:
        raise SteerError("fields take the place of LoRA adapters. Give vLLM --enable-lora, or `enable_lora=True`, too.")
    if base.architecture not in FAMILIES:
        raise SteerError(f"fields are served on {', '.join(FAMILIES)}; this model is {base.architecture}.")
    if config.compilation_config.cudagraph_mode.name != "NONE":
        raise SteerError("a CUDA graph repeats the fields of the step it was captured in. Give vLLM --enforce-eager.")
    untried = {
        f"platform {current_platform.device_name}": not current_platform.is_cpu(),
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism": parallel.data_parallel_size > 1,
        "speculative decoding": config.speculative_config is not None,
        "a quantised model": base.quantization is not None,
        "a connector of KV caches": config.kv_transfer_config is not None,
        "pooling": base.runner_type != "generate",
    }
    found = [name for name, there in untried.items() if there]
    if found and switch != "untested":
        raise SteerError(
            f"fields were tried on a CPU, and not with {', '.join(found)}. To go on at your own risk, give "
            f'{{"{_SWITCH}": "untested"}}, and compare the answers with those of transformers.'
        )


def _without_lora(original: Any) -> Any:
    """Build the model as if no adapters were asked for: Mamba2 refuses them, experts would take slower kernels."""

    def load_model(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_on(vllm_config):
            return original(self, vllm_config, *args, **kwargs)
        lora, vllm_config.lora_config = vllm_config.lora_config, None
        try:
            return original(self, vllm_config, *args, **kwargs)
        finally:
            vllm_config.lora_config = lora

    return load_model


def _with_fields(original: Any) -> Any:
    def load_lora_model(self: Any, model: Any, vllm_config: Any, device: Any) -> Any:
        if not _is_on(vllm_config):
            return original(self, model, vllm_config, device)
        self.lora_manager = FieldManager(model, vllm_config, device)
        return model

    return load_lora_model


def _paths(processor: Any) -> dict[int, str]:
    """Return what this process has admitted."""
    found: dict[int, str] = processor.__dict__.setdefault("steering_paths", {})
    return found


def _admitted(original: Any) -> Any:
    """Refuse a request here whose field cannot be served: what fails in a worker ends the engine."""

    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = kwargs.get("lora_request", args[5] if len(args) > 5 else None)
        if asked is not None and _is_on(self.vllm_config):
            check_number_of(asked, _paths(self))
            if asked.lora_int_id not in _paths(self):
                open_mix(asked.lora_path, self.vllm_config, pinned=True)
                _paths(self)[asked.lora_int_id] = asked.lora_path
        return original(self, *args, **kwargs)

    return process_inputs


def _pinned(original: Any) -> Any:
    """Let the path that the server keeps of a field name its contents, and refuse here what cannot be served."""

    async def load_lora_adapter(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        config = self.engine_client.vllm_config
        if not _is_on(config):
            return await original(self, request, base_model_name)
        from vllm.entrypoints.serve import create_error_response

        try:
            if request.load_inplace:
                raise SteerError(
                    "a field is not reloaded in place, under requests on their way: unload its name first."
                )
            path = open_mix(request.lora_path, config).path
        except SteerError as error:
            return create_error_response(str(error))
        response = await original(self, request.model_copy(update={"lora_path": path}), base_model_name)
        loaded = self.lora_requests.get(request.lora_name)
        if loaded is not None and loaded.lora_path == path:
            _paths(self.input_processor)[loaded.lora_int_id] = path
        return response

    return load_lora_adapter
