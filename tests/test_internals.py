"""The private attributes of torch that `_internals` touches, each by name: a release that drops one fails here."""

import copy
import inspect
import io

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from residual_steer._internals import (
    ATTENTION,
    backward_pass,
    cast_dtypes,
    compile_with_hooks,
    compute_in,
    has_hook,
    is_compiled,
    is_plainly_called,
    keeps_batching,
    offload_hooks,
    owned_tensors,
    parts,
    renew_children,
    run_after,
    saves_adapters_alone,
    twin,
    version,
)


def test_current_graph_task_id_counts_backward_passes():
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = checkpoint(lambda z: (seen.append(backward_pass()), z.exp())[1], x, use_reentrant=False)
    y.sum().backward()
    assert seen[0] == -1 == backward_pass()
    assert seen[1] >= 0


def test_a_config_of_transformers_names_its_attention():
    from transformers import GPT2Config

    config = GPT2Config(attn_implementation="eager")
    assert getattr(config, ATTENTION) == "eager"


def test_version_counts_changes_in_place():
    x = torch.zeros(2)
    before = version(x)
    x.add_(1)
    assert version(x) == before + 1


def test_a_forward_hook_runs_right_after_another():
    module, seen = nn.Linear(1, 1), []
    handles = [module.register_forward_hook(lambda *_, n=n: seen.append(n)) for n in range(4)]
    run_after(module, handles[0], handles[2])
    module(torch.zeros(1))
    assert seen == [1, 2, 0, 3]
    assert list(module._forward_hooks) == [handles[n].id for n in seen]
    handles[0].remove()
    assert len(module._forward_hooks) == 3


def test_compiled_call_impl_and_optimized_modules_are_compiled():
    module = nn.Linear(2, 2)
    assert not is_compiled(module)
    assert is_compiled(torch.compile(module))
    module.compile()
    assert is_compiled(module)


def test_skip_nnmodule_hook_guards_is_a_setting_of_dynamo():
    from torch._dynamo import config

    with config.patch(skip_nnmodule_hook_guards=True):
        compile_with_hooks()
        assert config.skip_nnmodule_hook_guards is False


def test_forward_hooks_and_a_forward_of_its_own_make_a_call_more_than_plain():
    module = nn.Linear(2, 2)
    assert is_plainly_called(module)
    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        handle = register(lambda *_: None)
        assert not is_plainly_called(module)
        handle.remove()
    module.forward = lambda x: x
    assert not is_plainly_called(module)


def test_what_accelerate_hangs_on_an_offloaded_module_is_found():
    from accelerate import cpu_offload

    module = nn.Sequential(nn.Linear(2, 2))
    assert offload_hooks(module[0]) == ()
    cpu_offload(module, execution_device="cpu")
    assert any(str(hook.execution_device) == "cpu" for hook in offload_hooks(module[0]))


def test_backward_hooks_of_a_tensor_are_found_by_kind():
    class Hook:
        def __call__(self, gradient):
            return None

    x = torch.zeros(2, requires_grad=True)
    assert not has_hook(x, Hook)
    x.register_hook(Hook())
    assert has_hook(x, Hook)
    assert not has_hook(x, int)


def test_owned_tensors_are_parameters_and_stored_buffers():
    module = nn.BatchNorm1d(2)
    module.register_buffer("aside", torch.zeros(1), persistent=False)
    module.child = nn.Linear(2, 2)
    assert [name for name, _ in owned_tensors(module)] == [
        *dict(module.named_parameters(recurse=False)),
        *(name for name, _ in nn.BatchNorm1d(2).named_buffers()),
    ]
    shared = nn.Linear(1, 1)
    assert [name for name, _ in parts(nn.ModuleList([shared, shared]))] == ["0", "1"]


def test_a_twin_shares_what_it_is_not_given_and_copies_buffers():
    host = nn.BatchNorm1d(2)
    host.register_forward_hook(lambda *_: 1 / 0)
    other = twin(host, {"weight": torch.full((2,), 3.0)}, {})
    assert other.bias is host.bias
    assert not torch.equal(other(torch.randn(4, 2)), torch.zeros(4, 2))
    assert host.num_batches_tracked == 0
    assert torch.equal(host.weight, torch.ones(2))


def test_a_module_computes_in_another_type_than_its_parameters_are_kept_in():
    module = nn.Sequential(nn.Linear(4, 3)).to(torch.bfloat16)
    x, head = torch.randn(2, 4, dtype=torch.bfloat16), module[0]
    expected, kind = module(x), type(head)
    head.weight = nn.Parameter(head.weight.detach().float())
    compute_in(head, {"weight": torch.bfloat16})
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for each in (module, copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert torch.equal(each(x), expected)
        assert each[0].weight.dtype == torch.float32
        assert isinstance(each[0], nn.Linear)
        each(x).float().sum().backward()
        assert each[0].weight.grad.dtype == torch.float32
        assert [*each.state_dict()] == ["0.weight", "0.bias"]
    twinned = twin(head, {"weight": nn.Parameter(torch.zeros(3, 4))}, {"weight": torch.bfloat16})
    assert torch.equal(twinned(x), head.bias.expand(2, 3))
    module.double()
    assert cast_dtypes(head) == {"weight": torch.float64}
    assert module(x.double()).dtype == torch.float64
    compute_in(head, {})
    assert type(head) is kind


def test_a_model_that_transformers_loaded_an_adapter_into_saves_it_alone():
    model = transformers.GPT2Model(transformers.GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    assert not saves_adapters_alone(model)
    model._hf_peft_config_loaded = True
    assert saves_adapters_alone(model)


@torch.no_grad()
def test_a_manager_of_continuous_batching_that_is_kept_is_seen():
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, eos_token_id=1
    )
    model = transformers.LlamaForCausalLM(config).eval()
    known = inspect.signature(transformers.ContinuousBatchingConfig).parameters
    small = {"page_size": 16, "block_size": 16, "auto_switch_to_flash": False}  # releases differ in these
    more = transformers.ContinuousBatchingConfig(
        **{key: value for key, value in small.items() if key in known}, num_blocks=4, max_batch_tokens=8
    )
    for kept in (False, True):
        model.generate_batch(
            [[3, 4]],
            transformers.GenerationConfig(max_new_tokens=1, eos_token_id=-1),
            more,
            persistent_manager=kept,
            warmup=False,
        )
        assert keeps_batching(model) is kept
    model.destroy_cached_continuous_batching_manager()


def test_renewed_modules_may_be_changed_by_whoever_goes_through_them():
    model = nn.Sequential(nn.ReLU(), nn.ReLU())
    seen = []
    for name, _ in model._modules.items():
        seen.append(name)
        renew_children(model)
        delattr(model, name)
    assert seen == ["0", "1"]
    assert len(model) == 0
