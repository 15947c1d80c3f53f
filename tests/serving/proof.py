"""Tiny models in folders, fields for them, and what transformers answers with one field alone."""

import contextlib
import dataclasses
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
}

import requests
import torch
import transformers
from vllm import LLM, SamplingParams

import residual_steer as rs

torch.set_num_threads(1)

VOCABULARY, NEW, LAYERS, WIDTH = 97, 24, 4, 64
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
SIZE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
HEADS = {"head_dim": 32}
FALCON = {"mamba_d_ssm": 96, "mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
GPT2 = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 256}
MAMBA2 = {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "conv_kernel": 4, "expand": 2}
MAMBA2 |= {"hidden_size": WIDTH, "num_hidden_layers": LAYERS}
CONFIGS = {
    "llama": (transformers.LlamaConfig, SIZE | HEADS),
    "qwen3": (transformers.Qwen3Config, SIZE | HEADS),
    "gpt2": (transformers.GPT2Config, GPT2),
    "falcon-h1": (transformers.FalconH1Config, SIZE | HEADS | FALCON),
    "mamba2": (transformers.Mamba2Config, MAMBA2),
}

# Of different ranks, layers, λ, activations and biases; None: the frozen model.
FIELDS = {
    "law": {"rank": 4},
    "squad": {"rank": 8, "scale": 0.5, "activation": "silu"},
    "code": {"rank": {0: 2, 3: 6}, "bias": False, "activation": "relu"},
    "wide": {"rank": 8, "layers": [1, 2], "activation": "tanh", "site": ["block", "after"]},
    "small": {"rank": 1, "scale": -1.5, "activation": "gelu_tanh"},
    "flat": {"rank": 3, "activation": "identity", "scale": 0.3, "site": "after"},
    "last": {"rank": 5, "layers": [3], "bias": False},
}
ASKED = [*FIELDS, None, "law", None, "squad", None]  # twelve requests


def prompts(count=12, seed=0, low=5, high=40):
    made = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (count,), generator=made).tolist()
    return [torch.randint(1, VOCABULARY, (length,), generator=made).tolist() for length in lengths]


def make_base(folder, kind, **changes):
    """Save a model with random weights that are large enough to matter."""
    torch.manual_seed(0)
    config, options = CONFIGS[kind]
    model = transformers.AutoModelForCausalLM.from_config(config(**{**options, **TOKENS, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "conv" not in name:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    return folder


def make_fields(base, folder, options=None):
    """Save a field of every kind with random weights; return the folders by name."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for seed, (name, given) in enumerate((options or FIELDS).items()):
        torch.manual_seed(seed)
        rs.steer(model, name=name, **given)
        with torch.no_grad():
            for parameter in rs.parameters(model, name):
                parameter.normal_(std=0.25)
        rs.save(model, Path(folder, name), name)
    return {name: str(Path(folder, name)) for name in options or FIELDS}


@dataclasses.dataclass
class Answer:
    tokens: list
    logprobs: list


class Reference:
    """transformers with residual_steer, one request at a time."""

    def __init__(self, base, folders, dtype=torch.float32):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
        for folder in folders.values():
            rs.load(self.model, folder)
        self.model.generation_config.eos_token_id = None

    @torch.no_grad()
    def __call__(self, prompt, asked, new=NEW):
        with rs.use(self.model, asked):
            out = self.model.generate(
                torch.tensor([prompt]),
                max_new_tokens=new,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        tokens = out.sequences[0, len(prompt) :].tolist()
        rows = [logits[0].float().log_softmax(-1) for logits in out.logits]
        return Answer(tokens, [float(row[token]) for row, token in zip(rows, tokens, strict=True)])


def engine(base, *, fields=True, **options):
    """Start vLLM in this process."""
    given = {"enable_lora": True, "max_loras": 8, "max_lora_rank": 8, "additional_config": {"residual_steer": True}}
    return LLM(
        model=str(base),
        dtype=options.pop("dtype", "float32"),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=options.pop("max_model_len", 256),
        disable_log_stats=False,
        seed=0,
        **({**given, **options} if fields else options),
    )


def stop(llm):
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


def ask(llm, texts, requests=None, new=NEW, **options):
    """Return vLLM's greedy answers with the log-probability of every token."""
    how = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, logprobs=0, detokenize=False, **options)
    given = [{"prompt_token_ids": text} for text in texts]
    done = llm.generate(given, how, lora_request=requests, use_tqdm=False)
    return [
        Answer(
            list(out.outputs[0].token_ids),
            [
                step[token].logprob
                for step, token in zip(out.outputs[0].logprobs, out.outputs[0].token_ids, strict=True)
            ],
        )
        for out in done
    ]


def differ(found, wanted):
    """Return how many answers have the same tokens, and the largest difference of a log-probability among those."""
    same = [(one, other) for one, other in zip(found, wanted, strict=True) if one.tokens == other.tokens]
    gaps = [abs(x - y) for one, other in same for x, y in zip(one.logprobs, other.logprobs, strict=True)]
    return len(same), max(gaps, default=float("nan"))


def metric(llm, name):
    return sum(one.value for one in llm.get_metrics() if one.name == name)


def load_json(path):
    return json.loads(Path(path).read_text())


def answers(reference, texts, asked):
    return [reference(text, name) for text, name in zip(texts, asked, strict=True)]


@contextlib.contextmanager
def serve(options, folder):
    """Run `vllm serve` in a folder, and give its address when it answers."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        *options,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(2400):
            time.sleep(0.5)
            assert process.poll() is None, (folder / "log").read_text()[-6000:]
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"{address}/health", timeout=5).status_code == 200:
                    break
        else:
            raise TimeoutError((folder / "log").read_text()[-6000:])
        yield address
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its workers, too
