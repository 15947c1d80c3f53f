"""Vision: models with two towers, masked patches, windows, and widths that change from stage to stage."""

import pytest
import torch

import residual_steer as rs
from cases import CASES, RANK, randomise

TABLE = {case.name: case for case in CASES}


def two_towers(kind):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**shape, "vocab_size": 50, "max_position_embeddings": 16, "projection_size": 16}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**shape, "image_size": 16, "patch_size": 8}
    more = {"projection_dim": 8} if kind == "CLIP" else {}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **more)
    return getattr(transformers, f"{kind}Model")(config).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
@torch.no_grad()
def test_of_two_towers_one_is_steered_by_its_name(kind):
    model = two_towers(kind)
    with pytest.raises(rs.SteerError, match=r"model.text_model \(vit\), model.vision_model \(vit\).*steer\(model.text"):
        rs.steer(model, rank=RANK)
    inputs = {"input_ids": torch.randint(3, 50, (2, 7)), "pixel_values": torch.randn(2, 3, 16, 16)}
    before = model(**inputs)
    rs.steer(model.vision_model, rank=RANK)
    fresh = model(**inputs)
    assert torch.equal(fresh.logits_per_image, before.logits_per_image)
    randomise(model)
    after = model(**inputs)
    assert torch.equal(after.text_embeds, before.text_embeds)
    assert not torch.equal(after.image_embeds, before.image_embeds)
    rs.unsteer(model.vision_model)
    assert torch.equal(model(**inputs).logits_per_image, before.logits_per_image)


@torch.no_grad()
def test_a_swin_has_fields_as_wide_as_each_stage():
    for name in ("timm-swin", "timm-swin-v2", "hf-swin"):
        model = rs.steer(TABLE[name].build(), rank={0: 2, 1: 3, 2: 4})
        fields = [module for module in model.modules() if isinstance(module, rs.HRes)]
        assert [(field.width, field.rank) for field in fields] == [(8, 2), (16, 3), (16, 4)]


@pytest.mark.parametrize("name", ["timm-swin", "timm-swin-v2", "hf-swin"])
@torch.no_grad()
def test_a_swins_mixer_sees_the_windows_of_an_image_next_to_one_another(name):
    """So that a list of fields, one per row, reaches the right windows."""
    case = TABLE[name]
    model = rs.steer(case.build(), rank=RANK, site="mixer")
    rs.steer(model, rank=2, site="mixer", name="other")
    randomise(model)
    seen = []
    case.modules(model, "mixer")[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    rs.use(model, ["default", "other"])
    mixed = case.run(model)
    assert len(seen[0]) == 32, "two images of sixteen windows"
    for row, field in enumerate(("default", "other")):
        with rs.use(model, field):
            torch.testing.assert_close(mixed[row], case.run(model)[row], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_masked_autoencoder_keeps_its_patches():
    case = TABLE["hf-mae"]
    model = case.build()
    before = model(**case.inputs(model))
    randomise(rs.steer(model, rank=RANK))
    after = model(**case.inputs(model))
    assert torch.equal(before.ids_restore, after.ids_restore)
    assert after.last_hidden_state.shape[1] == 3, "half of four patches, and the class token"


def test_a_rank_wider_than_the_narrowest_stage_is_refused():
    with pytest.raises(rs.SteerError, match="from 1 to 8, the width; received 12"):
        rs.steer(TABLE["timm-swin"].build(), rank=12)
