"""A field that was trained on one library's model runs on another library's model of the same weights."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import residual_steer as rs
from mamba_ssm_on_cpu import compiled, import_mamba_ssm
from residual_steer.training import next_token_loss

WIDTH, BLOCKS, CLASSES, VOCABULARY, LENGTH = 16, 2, 3, 50, 16
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def mamba_pair(family):
    """Return transformers' and `mamba_ssm`'s model, with the same weights."""
    transformers = pytest.importorskip("transformers")
    if compiled():
        pytest.skip("the kernels that are installed here take CUDA tensors alone, and round differently")
    import_mamba_ssm()
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    shape = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "state_size": 16}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    mixer = {"layer": f"{family}1" if family == "Mamba" else family, "d_state": 16}
    if family == "Mamba2":
        shape |= {"num_heads": 2, "head_dim": 16, "n_groups": 1, "chunk_size": 16}
        mixer |= {"headdim": 16, "chunk_size": 16, "use_mem_eff_path": False}
    one = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**shape, **special))
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # so that no norm or bias is where it began
    other = MambaLMHeadModel(
        MambaConfig(
            d_model=WIDTH,
            n_layer=BLOCKS,
            vocab_size=VOCABULARY,
            ssm_cfg=mixer,
            rms_norm=True,
            fused_add_norm=False,
            residual_in_fp32=True,
            pad_vocab_size_multiple=1,
            tie_embeddings=one.config.tie_word_embeddings,
        )
    )
    other.load_state_dict({key.replace("embeddings", "embedding"): value for key, value in one.state_dict().items()})
    return one.eval(), other.eval()


def tokens(rows):
    ids = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.stack([row["input_ids"] for row in tokens(3)])).logits


VIT = {  # from timm's names to those of transformers
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "blocks": "layers",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "norm": "layernorm",
}


def convert_vit(state):
    """Rename timm's tensors as transformers does, and take the joint projection of attention apart."""
    found = {}
    for key, value in state.items():
        parts = key.split(".")
        name, kind = ".".join(parts[:-1]), parts[-1]
        if name.endswith("attn.qkv"):
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                found[f"layers.{parts[1]}.attention.{part}_proj.{kind}"] = piece
        elif parts[0] == "blocks":
            inner = ".".join(parts[2:-1])
            found[f"layers.{parts[1]}.{VIT.get(inner, inner)}.{kind}"] = value
        else:
            found[VIT.get(key) or f"{VIT.get(name, name)}.{kind}"] = value
    return found


def vit_pair(head):
    """Return timm's and transformers' model, with the same weights; with a head for classes, or without."""
    transformers = pytest.importorskip("transformers")
    timm = pytest.importorskip("timm.models.vision_transformer")
    one = timm.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=WIDTH, depth=BLOCKS, num_heads=2, num_classes=CLASSES if head else 0
    )
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        intermediate_size=4 * WIDTH,
        image_size=16,
        patch_size=8,
        layer_norm_eps=1e-6,
        num_labels=CLASSES,
    )
    state = convert_vit(one.state_dict())
    if head:
        other = transformers.ViTForImageClassification(config)
        classifier = {key.replace("head", "classifier"): state.pop(key) for key in ("head.weight", "head.bias")}
        state = {f"vit.{key}": value for key, value in state.items()} | classifier
    else:
        other = transformers.ViTModel(config, add_pooling_layer=False)
    other.load_state_dict(state)
    return one.eval(), other.eval()


def images(rows):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(3, 16, 16, generator=generator), index % CLASSES) for index in range(rows)]


def seen(model):
    """Return the logits of both libraries' models, or, without a head, all that leaves the last block."""
    batch = torch.stack([image for image, _ in images(3)])
    with torch.no_grad():
        if hasattr(model, "forward_features"):
            return model(batch) if model.num_classes else model.forward_features(batch)
        output = model(pixel_values=batch)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def vision_loss(model, batch):
    pixels, labels = batch
    output = model(pixels)
    if not isinstance(output, torch.Tensor):
        output = output.logits if hasattr(output, "logits") else output.last_hidden_state[:, 0]
    return nn.functional.cross_entropy(output, labels)


PAIRS = {
    "Mamba": (lambda: mamba_pair("Mamba"), tokens, next_token_loss, logits, ("backbone.norm_f",)),
    "Mamba2": (lambda: mamba_pair("Mamba2"), tokens, next_token_loss, logits, ("backbone.norm_f",)),
    "ViT": (lambda: vit_pair(head=False), images, vision_loss, seen, ()),
    "ViT with a head": (lambda: vit_pair(head=True), images, vision_loss, seen, ()),
}


@pytest.mark.parametrize("site", ["block", "input"])
@pytest.mark.parametrize("back", [False, True], ids=["there", "back"])
@pytest.mark.parametrize("pair", PAIRS)
def test_a_field_of_one_library_runs_on_the_other(tmp_path, pair, back, site):
    make, data, loss, run, train = PAIRS[pair]
    one, other = reversed(make()) if back else make()
    frozen = run(one)
    torch.testing.assert_close(run(other), frozen, **CLOSE)  # or what follows would say nothing

    rs.steer(one, rank=4, site=site, train=train)
    rs.fit(one, DataLoader(data(8), 4), steps=6, lr=3e-2, loss=loss, progress=False)
    steered = run(one.eval())
    assert (steered - frozen).abs().max() > 0.1
    rs.save(one, tmp_path)

    with pytest.warns(UserWarning, match=f"class {type_of(one)} against {type_of(other)}"):
        rs.load(other, tmp_path)
    torch.testing.assert_close(run(other.eval()), steered, **CLOSE)
    rs.use(other, None)
    torch.testing.assert_close(run(other), frozen, **CLOSE)


def type_of(model):
    return f"{type(model).__module__.partition('.')[0]}.*"
