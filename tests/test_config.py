"""Sites and ranks of a field as they are asked for, and as its file has them."""

import dataclasses
import json

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import residual_steer as rs
from cases import TABLE
from fields import refused, shake
from residual_steer.config import check_sites


@settings(max_examples=50, deadline=None)
@given(rank=st.integers(1, 40), number=st.integers(1, 5))
def test_a_rank_is_split_into_what_sums_to_it(rank, number):
    backbone = rs.Backbone(
        blocks=[nn.ModuleDict({"m": nn.Linear(4, 4), "f": nn.Linear(4, 4)})], width=4, mixer="m", mlp="f"
    )
    sites = list(reversed(backbone.sites))[:number]
    if rank < number:
        with pytest.raises(rs.SteerError, match=rf"`rank` is an integer of at least {number}, 1 or more for each of"):
            check_sites(sites, rank, None, backbone)
        return
    found = check_sites(sites, rank, None, backbone)
    assert sum(ranks[0] for ranks in found.values()) == rank
    assert max(r[0] for r in found.values()) - min(r[0] for r in found.values()) <= 1
    assert [found[site][0] for site in sites] == sorted((ranks[0] for ranks in found.values()), reverse=True)


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (5, {"input": {0: 3, 1: 3}, "after": {0: 2, 1: 2}}),
        ({-1: 4}, {"input": {1: 2}, "after": {1: 2}}),
        ({"input": 4, "after": 1}, {"input": {0: 4, 1: 4}, "after": {0: 1, 1: 1}}),
        ({"input": 5, "after": {-1: 5}}, {"input": {0: 5, 1: 5}, "after": {1: 5}}),
    ],
)
def test_ranks_are_given_together_by_block_or_by_site(rank, expected, tmp_path):
    model = shake(rs.steer(TABLE["gpt2"].build(), rank=rank, site=["input", "after"]))
    (info,) = rs.fields(model)
    assert (info.sites, info.site) == (expected, ("input", "after"))
    assert info.ranks == {
        i: sum(r.get(i, 0) for r in expected.values()) for i in sorted({*expected["input"], *expected["after"]})
    }
    rs.save(model, tmp_path / "one")
    again = rs.load(TABLE["gpt2"].build(), tmp_path / "one")
    assert rs.fields(again)[0] == info
    assert all(map(torch.equal, rs.parameters(again), rs.parameters(model)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"site": []}, "`site` is one of .*, or a list of several; received"),
        ({"site": ["input", "input"]}, "a site is named once"),
        ({"site": ["input", "nowhere"]}, "`site` is one of .*received 'nowhere'"),
        ({"site": 3}, "`site` is one of .*, or a list of several; received 3"),
        ({"site": ["input", "after"], "rank": 1}, "at least 2, 1 or more for each of 2 sites; received 1"),
        ({"site": ["input", "after"], "rank": {"input": 2}}, "`rank` by site names every site, input, after; received"),
        ({"site": ["input", "after"], "rank": {"input": 2, "after": {7: 2}}}, "a layer is an integer from -2 to 1"),
        ({"site": ["input", "after"], "rank": {"input": 2, "after": 99}}, "`rank` is an integer from 1 to 16"),
        ({"site": "mlp.c_attn"}, "are mlp.c_fc, mlp.c_proj; received 'mlp.c_attn'"),
        ({"site": "block.attn"}, "are mixer.c_attn, mixer.c_proj, mlp.c_fc, mlp.c_proj; received 'block.attn'"),
    ],
)
def test_a_site_or_rank_that_is_none_is_refused_and_nothing_changes(arguments, message):
    model = TABLE["gpt2"].build()
    with refused(model, message):
        rs.steer(model, **arguments)


@torch.no_grad()
def test_a_model_says_where_its_family_is_best_steered():
    case = TABLE["gpt2"]
    model = case.build()
    backbone = dataclasses.replace(rs.find_backbone(model), site=("input", "after"))
    rs.steer(model, backbone, rank=6)
    assert rs.fields(model)[0].sites == {"input": {0: 3, 1: 3}, "after": {0: 3, 1: 3}}
    rs.steer(model, rank=6, name="law", site="mlp")
    assert rs.fields(model)["law"].site == "mlp"


def test_an_older_release_reads_which_format_a_field_at_new_sites_has(tmp_path):
    for site, version in (("block", 1), ("input", 1), ("after", 2), ("mlp.c_fc", 2), (["mixer", "mlp"], 2)):
        rs.save(shake(rs.steer(TABLE["gpt2"].build(), rank=4, site=site)), tmp_path / "field")
        described = json.loads((tmp_path / "field" / "steering.json").read_text("utf-8"))
        assert described["format_version"] == version
        assert ("sites" in described["field"]) == (version == 2)
        # what release 0.1 looked at before the version, so that it says which version it reads
        assert isinstance(described["field"]["site"], str)
        assert all(type(rank) is int for rank in described["field"]["ranks"].values())
