"""Places compared and real weights adapted, on tiny sizes; the packages of real weights are not needed."""

import pytest
import torch
from torch.utils.data import TensorDataset

import residual_steer as rs
from experiments.ledger import Ledger
from experiments.problem import Arm, adapted, match_budget
from experiments.results import Result
from experiments.sweep import widened
from residual_steer import HRes
from studies import LINEAR, distance, problem_of

pytest.importorskip("transformers")
pytest.importorskip("timm")
pytest.importorskip("peft")

from experiments import ahead, placement, real_models, real_weights


def test_places_are_compared_at_one_budget_and_nothing_is_trained_twice(tmp_path, backbones, monkeypatch):
    arguments = ["--quick", "--seeds", "1", "--rates", "1", "--task", "recall-Mamba", "small-ViT"]
    arguments += ["--out", str(tmp_path), "--cache", backbones]
    assert placement.main(arguments) == 0
    result = Result.load(tmp_path / "placement.json")
    mamba, _, vit, _ = ({row["method"]: row for row in table.rows} for table in result.tables[:-1])
    usual = result.tables[-1].rows
    assert [row["task"].partition(", ")[0] for row in usual] == ["recall", "digits"]
    assert all(row["default"].count == 1 for row in usual)
    budget = mamba["H-Res, block"]["trainable"]
    for name, row in mamba.items():
        assert name == "head alone" or row["trainable"] == pytest.approx(budget, rel=0.25), name
    assert {"H-Res, input", "H-Res, input, Houlsby's start", "LoRA", "DoRA"} < mamba.keys()
    assert "H-Res, qkv" in vit
    assert not {"H-Res, mlp", "H-Res, qkv"} & mamba.keys()
    assert result.verdicts == ()
    monkeypatch.setattr("experiments.sweep.fit", lambda *_, **__: pytest.fail("a finished run was done again"))
    assert placement.main(arguments) == 0


def test_what_was_run_ahead_in_processes_is_not_run_again(tmp_path, backbones, monkeypatch):
    monkeypatch.setattr(placement, "CANDIDATES", ("block",))
    arguments = ["--quick", "--seeds", "2", "--task", "small-ViT", "--out", str(tmp_path)]
    arguments += ["--cache", backbones]
    threads = torch.get_num_threads()
    try:
        assert ahead.main([*arguments, "--processes", "2"]) == 0
    finally:
        torch.set_num_threads(threads)
    alone = Ledger(tmp_path / "placement.ledger.jsonl")
    assert len(alone) == 6 * 2 * 3  # rates, seeds; block, LoRA and the head
    monkeypatch.setattr("experiments.sweep.fit", lambda *_, **__: pytest.fail("a finished run was done again"))
    assert placement.main([*arguments, "--seeds", "1", "--rates", "1"]) == 0


def test_a_sweep_goes_on_until_its_best_rate_has_a_worse_one_on_both_sides():
    problem = problem_of(score=distance, metric="far", better="up")  # the larger the rate, the farther
    arms = [LINEAR, Arm("wide", "linear", (1e-3, 1e-2, 1e-1)), Arm("other", "linear", (1e-3, 1e-2, 1e-1))]
    one, wide, other = widened(problem, arms, [0, 1], Ledger(), finalists=lambda _: ["wide"], times=2)
    assert one.arm.rates == LINEAR.rates  # a single rate has no edge
    assert wide.arm.rates == (1e-3, 1e-2, 1e-1, 0.3, 0.9)
    assert wide.at_edge
    assert (len(wide.runs), len(other.runs)) == (2, 1)


def test_a_rate_that_only_the_first_seed_likes_gives_way_to_the_next():
    def worth(model, split, seed):
        steps = float((model.head.weight - problem.fresh(seed).head.weight).abs().max().detach())
        return {"far": -1.0 if seed and steps > 0.02 else steps}  # too far for the second seed

    problem = problem_of(score=worth, metric="far", better="up")
    arm = Arm("x", "linear", (1e-4, 1e-3, 1e-1))
    (one,) = widened(problem, [arm], [0, 1], Ledger(), finalists=lambda _: ["x"], times=0)
    assert (one.rate, [run.rate for run in one.runs]) == (1e-3, [1e-3, 1e-3])
    assert len(one.trials) == 3


def test_the_best_place_is_among_those_that_ran_with_all_seeds():
    problem = problem_of()
    arms = [Arm(f"H-Res, {name}", "hres", (rate,), {"rank": 2}) for name, rate in (("a", 1e-6), ("block", 1e-2))]
    entries = widened(problem, arms, [0, 1], Ledger(), finalists=lambda _: ["H-Res, a"])
    assert placement.best_places(problem, entries) == ["H-Res, a"]


def test_other_starts_are_what_they_are_called():
    problem, options = problem_of(), {"rank": 2}
    start = adapted(problem, Arm("x", "hres", (1.0,), options), 0)
    near = adapted(problem, Arm("x", "hres", (1.0,), options, placement.houlsby), 0)
    scaled = adapted(problem, Arm("x", "hres", (1.0,), options, placement.channel_scale), 0)
    for plain, small, own in zip(
        *([m for m in x.modules() if isinstance(m, HRes)] for x in (start, near, scaled)), strict=True
    ):
        assert not plain.up.weight.any()
        assert small.up.weight.any()
        assert 0 < small.down.weight.abs().max() <= 0.02
        factors = own.up.parametrizations.weight[0].factors
        assert factors.shape == (own.width, 1)
        assert factors.requires_grad
        with torch.no_grad():
            own.up.parametrizations.weight.original.fill_(1.0)
            factors.fill_(3.0)
        assert torch.equal(own.up.weight, torch.full_like(own.up.weight, 3.0))
        z = torch.randn(2, 3, own.width)
        assert torch.allclose(own.add_to(z, z), z + own(z))  # the scale acts where the field does
    counts = [sum(p.numel() for p in x.parameters() if p.requires_grad) for x in (start, scaled)]
    assert counts[1] - counts[0] == sum(m.width for m in start.modules() if isinstance(m, HRes))


def test_a_size_may_be_a_function_of_several_options():
    def both(size):
        return {"rank": {0: size, 1: 2 * size}}

    options = match_budget(problem_of(), "hres", both, 500)
    assert options["rank"][1] == 2 * options["rank"][0] > 2


def test_dora_trains_magnitudes_beside_lora():
    lora, dora = (adapted(problem_of(), Arm("x", "lora", (1.0,), {"rank": 2, "dora": on}), 0) for on in (False, True))
    names = [{n for n, p in model.named_parameters() if p.requires_grad} for model in (lora, dora)]
    assert any("magnitude" in name for name in names[1] - names[0])


@pytest.fixture
def setting(monkeypatch):
    """A tiny model of typeseg's class in the place of the trained one, on random bytes that tell their kind."""
    torch.manual_seed(0)
    model = real_models.TypeSegmenter(3)
    model.layers = model.layers[:2]
    x = torch.randint(32, 64, (24, 6)) + 32 * (torch.arange(24) % 3)[:, None]
    data = {split: TensorDataset(x, torch.arange(24) % 3) for split in ("train", "valid", "test")}
    tiny = real_weights.Setting(model.eval(), data, "bytes", 1, 2, 8, "head", precision="no", rank=1, full=1e-3)
    monkeypatch.setitem(real_weights.SETTINGS, "MiniLM, spam", lambda options: tiny)


def test_real_weights_adapt_the_upper_blocks_and_go_on_where_they_stopped(setting, tmp_path, monkeypatch):
    arguments = ["--quick", "--seeds", "2", "--rates", "1", "--task", "MiniLM, spam", "--packages", str(tmp_path)]
    arguments += ["--out", str(tmp_path)]
    assert real_weights.main(arguments) == 0
    result = Result.load(tmp_path / "real-weights.json")
    rows = {row["method"]: row for row in result.tables[0].rows}
    assert {"H-Res, block", "H-Res, input", "LoRA", "head alone", "full fine-tuning"} < rows.keys()
    assert rows["H-Res, block"]["trainable"] == 2 * 256 + 1 + 256 + 3 * 257  # one block of two, and the head
    assert (tmp_path / "streams").is_dir()
    with torch.no_grad():  # a new process draws another new head, which no run begins with
        real_weights.SETTINGS["MiniLM, spam"](None).model.head.weight.normal_()
    monkeypatch.setattr("experiments.sweep.fit", lambda *_, **__: pytest.fail("a finished run was done again"))
    assert real_weights.main(arguments) == 0


def test_scores_are_the_same_with_lower_blocks_computed_once(setting, tmp_path):
    tiny = real_weights.SETTINGS["MiniLM, spam"](None)
    model = rs.steer(real_weights.fresh(tiny, 0), rank=1, layers=[1], train="head")
    with torch.no_grad():
        for parameter in rs.parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    plain = real_weights.score(tiny, {}, model, "test", 0)
    for _ in range(2):  # filled, then read
        assert real_weights.score(tiny, {"cache_prefix": str(tmp_path)}, model, "test", 0) == plain


def test_packages_that_are_not_there_are_a_line(tmp_path, capsys):
    assert real_weights.main(["--packages", str(tmp_path / "none"), "--out", str(tmp_path)]) == 1
    assert "`make real` fetches them" in capsys.readouterr().err


def test_both_directions_of_the_mamba_read_the_whole_row():
    torch.manual_seed(0)
    mixer = real_models.BidirectionalMixer(8, 4, 2)
    x = torch.randn(1, 5, 8, requires_grad=True)
    mixer(x)[0, 2].sum().backward()
    assert bool((x.grad[0].abs().sum(-1) > 0).all())
    u, step, b, c = torch.randn(2, 7, 8), torch.rand(2, 7, 8), torch.randn(2, 7, 4), torch.randn(2, 7, 4)
    state, expected = torch.zeros(2, 8, 4), []
    for t in range(7):
        state = torch.exp(step[:, t, :, None] * -mixer.A_log.exp()) * state + (step * u)[:, t, :, None] * b[:, t, None]
        expected.append((state * c[:, t, None]).sum(-1) + mixer.D * u[:, t])
    assert torch.allclose(mixer.scan(u, step, b, c), torch.stack(expected, 1), atol=1e-6)
