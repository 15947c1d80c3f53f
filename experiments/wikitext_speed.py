"""What adaptation costs in speed, and buys in perplexity: figure 2 of the paper, with counts behind it.

    python -m experiments.wikitext_speed --random-weights
    python -m experiments.wikitext_speed --model gpt2 --data Salesforce/wikitext --steps 500

The first times reading (prefill) and writing (cached decoding) on the shapes of GPT-2-small and Mamba-130m with random
weights: frozen, under H-Res, LoRA as it trains and folded into the weights, behind prompts of 10 and 100 tokens, all
in the same rounds. It also counts FLOPs and the bytes kept for a backward pass against the length of the text and of
the prompt. The second adapts a pre-trained model to WikiText first and draws perplexity against tokens per second; it
downloads both, or reads local copies.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

import residual_steer as rs
from benchmarks.counters import count, flops
from benchmarks.rounds import Rounds, Spread, Variant, play
from residual_steer._caches import cache_of, cache_parameter
from residual_steer.data import TokenBlocks, wikitext
from residual_steer.training import evaluate

from .harness import Experiment, Found, judged, parser_of, positive, run
from .hub import language_model
from .ledger import Ledger
from .problem import Arm, Problem, digest, rates_around
from .results import Axis, Column, Plot, Series, Table, Verdict
from .sweep import every_run, sweep
from .tables import comparison, measured, records

EXPERIMENT = Experiment(
    name="wikitext-speed",
    title="Speed of adapted language models, and what it is made of",
    about="Prefill and cached decoding of the frozen model, under H-Res and LoRA on all blocks, and behind prompts, "
    "timed in interleaved rounds; ratios are taken within each round. FLOPs and bytes are counted, not timed.",
)
RANK = 32
PHASES = ("prefill", "decode")
ARMS = {
    "frozen": None,
    "H-Res": ("hres", {"rank": RANK}),
    "LoRA": ("lora", {"rank": RANK}),
    "LoRA, merged": ("lora", {"rank": RANK}),
    "prompt of 10": ("prompt", {"length": 10}),
    "prompt of 100": ("prompt", {"length": 100}),
}
RIVALS = [name for name in ARMS if name not in ("frozen", "H-Res")]
Times = Mapping[str, Mapping[str, Mapping[str, list[float]]]]  # seconds by backbone, phase and method
LENGTHS, PROMPTS = (64, 128, 256, 512, 1024), (10, 100)


def gpt2_shape(tiny: bool, positions: int = 1024, **more: Any) -> nn.Module:
    """Return GPT-2-small's shape with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    small = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    dropout = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**{**(small if tiny else {}), **dropout, "n_positions": positions, **more}))


def mamba_shape(tiny: bool) -> nn.Module:
    """Return Mamba-130m's shape with random weights."""
    from transformers import MambaConfig, MambaForCausalLM

    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    shape = {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50280}
    small = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4}
    return MambaForCausalLM(MambaConfig(**(small if tiny else shape), **special))


SHAPES: dict[str, Callable[[bool], nn.Module]] = {"GPT-2-small": gpt2_shape, "Mamba-130m": mamba_shape}


def adapted(build: Callable[[], nn.Module], name: str) -> nn.Module:
    """Return a model under the method of that name, its new weights random, since zeros could be multiplied faster."""
    torch.manual_seed(0)
    model = build().eval()
    if ARMS[name] is None:
        return model.requires_grad_(False)
    method, options = ARMS[name]
    before = {id(p) for p in model.parameters()}
    model = rs.baselines.apply(model, method, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in before:
                parameter.normal_(std=0.02)
    return rs.baselines.merge(model) if name.endswith("merged") else model


def measure_speed(name: str, options: argparse.Namespace, ledger: Ledger) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of all methods on one shape, from the ledger if they are there."""
    key = {
        "shape": name,
        "quick": options.quick,
        "rows": options.rows,
        "length": options.length,
        "rounds": options.rounds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }

    def make() -> dict[str, dict[str, list[float]]]:
        build = partial(SHAPES[name], options.quick)
        models = {arm: adapted(build, arm) for arm in ARMS}
        generator = torch.Generator().manual_seed(1)
        vocabulary = models["frozen"].config.vocab_size
        ids = torch.randint(vocabulary, (options.rows, options.length), generator=generator)
        print(f"{name}: timing {', '.join(models)}; {options.rounds} rounds", flush=True)
        return time_phases(models, ids, rounds=options.rounds)

    return ledger.get_or(key, make)


def time_phases(
    models: Mapping[str, nn.Module], ids: Tensor, *, rounds: int, tokens: int = 8
) -> dict[str, dict[str, list[float]]]:
    """Time all models in interleaved rounds.

    Args:
        models: causal language models of one kind, by name, in evaluation mode.
        ids: the text they read, `(batch, length)`.
        rounds: how often each is measured.
        tokens: how many more are then decoded, one after the other, from a copy of the same cache.

    Returns:
        Seconds of every round: of reading the text and giving the logits of the next token (`prefill`), and of one
        decoded token of each row (`decode`), by phase and name.
    """
    with torch.no_grad():
        caches = {name: read(model, ids) for name, model in models.items()}
        nexts = ids[:, -1:]

        def decode(model: nn.Module, cache: Any) -> None:
            for _ in range(tokens):
                cache = write(model, nexts, cache)

        prefill = [Variant(name, lambda _, m=model: read(m, ids)) for name, model in models.items()]
        steps = [
            Variant(name, lambda cache, m=model: decode(m, cache), lambda n=name: copy.deepcopy(caches[n]))
            for name, model in models.items()
        ]
        read_rounds, written_rounds = play(prefill, rounds), play(steps, rounds)
    return {
        "prefill": {name: list(times) for name, times in read_rounds.seconds.items()},
        "decode": {name: [t / tokens for t in times] for name, times in written_rounds.seconds.items()},
    }


def read(model: nn.Module, ids: Tensor) -> Any:
    """Read a text; return the cache that this leaves."""
    return cache_of(model(input_ids=ids, use_cache=True, logits_to_keep=1))


def write(model: nn.Module, token: Tensor, cache: Any) -> Any:
    """Go on by one token of every row; return the cache."""
    return cache_of(model(input_ids=token, use_cache=True, **{cache_parameter(model): cache}))


def relative(times: Mapping[str, list[float]], name: str, reference: str) -> Spread:
    """Return how many times as fast as `reference` a model is: median and quartiles of the rounds' ratios."""
    return Rounds(times).ratio(reference, name)


def per_second(times: list[float], tokens: int) -> float:
    """Return tokens per second, the median over rounds."""
    return tokens / statistics.median(times)


def speed_table(name: str, times: Mapping[str, Mapping[str, list[float]]], options: argparse.Namespace) -> Table:
    """Return tokens per second and how they compare with the frozen model's."""
    columns = [Column("method", "method")]
    for phase in PHASES:
        columns += [
            Column(phase, f"{phase}", "tokens/s", "up", 0),
            Column(f"{phase}_ratio", f"{phase}, of frozen"),
        ]
    rows = []
    for arm in ARMS:
        row: dict[str, Any] = {"method": arm}
        for phase in PHASES:
            tokens = options.rows * (options.length if phase == "prefill" else 1)
            row[phase] = per_second(times[phase][arm], tokens)
            row[f"{phase}_ratio"] = f"{relative(times[phase], arm, 'frozen'):.3f}"
        rows.append(row)
    note = (
        f"{options.rows} rows of {options.length} tokens, {options.rounds} interleaved rounds, fp32, "
        f"{torch.get_num_threads()} threads. Tokens of a prompt do not count as read. Medians, and quartiles, over the "
        "rounds; ratios are taken within each round."
    )
    return Table(name, tuple(columns), tuple(rows), (note,))


def counted() -> list[tuple[str, str, dict[str, Any]]]:
    """Return what is counted: a name, a method and its options."""
    prompts = [(f"prompt of {length}", "prompt", {"length": length}) for length in PROMPTS]
    return [("frozen", "", {}), ("H-Res", "hres", {"rank": RANK}), ("LoRA", "lora", {"rank": RANK}), *prompts]


def count_flops(blocks: int, lengths: Iterable[int], method: str, options: dict[str, Any]) -> dict[int, int]:
    """Count a pass over so many of GPT-2-small's blocks against the length of the text."""
    shape = {"n_layer": blocks, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}  # the words do not count
    model = gpt2_shape(False, positions=2048, attn_implementation="eager", **shape).eval()  # eager: products are seen
    model = rs.baselines.apply(model, method, **options) if method else model.requires_grad_(False)
    body, found = model.transformer, {}
    for length in lengths:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):  # shapes alone: counted, not computed
            ids = torch.zeros(1, length, dtype=torch.long)
            found[length] = flops(lambda ids=ids: body(input_ids=ids, use_cache=False))
    return found


def kept(ledger: Ledger, blocks: int, what: tuple[str, str, dict[str, Any]], lengths: Iterable[int]) -> dict[int, int]:
    """Return what `count_flops` counts, from the ledger if it is there."""
    name, method, options = what
    key = {"flops": name, "blocks": blocks, "lengths": list(lengths), "rank": RANK, "torch": torch.__version__}
    found = ledger.get_or(key, lambda: {str(n): v for n, v in count_flops(blocks, lengths, method, options).items()})
    return {int(n): value for n, value in found.items()}


def count_saved(method: str, options: dict[str, Any], length: int) -> int:
    """Count the bytes that a training step of GPT-2-small's shape keeps for its backward pass, at one row of text."""
    torch.manual_seed(0)
    model = gpt2_shape(False)
    model = rs.baselines.apply(model, method, **options)
    ids = torch.zeros(1, length, dtype=torch.long)
    return count(model, lambda: model(input_ids=ids, labels=ids).loss, ids).saved


def count_all(quick: bool, ledger: Ledger) -> tuple[list[Table], Plot, Verdict, dict[str, Any]]:
    """Count FLOPs and saved bytes against N and p, and judge claim 7 by them."""
    lengths = LENGTHS[:2] if quick else LENGTHS
    blocks = 1 if quick else 12
    found = {what[0]: kept(ledger, blocks, what, lengths) for what in counted()}
    longer = {p: kept(ledger, blocks, ("frozen", "", {}), [n + p for n in lengths]) for p in PROMPTS}
    exact = all(found[f"prompt of {p}"][n] == longer[p][n + p] for p in PROMPTS for n in lengths)
    extra = {n: found["H-Res"][n] - found["frozen"][n] for n in lengths}
    linear = all(extra[n] * lengths[0] == extra[lengths[0]] * n for n in lengths)
    quadratic = {n: 1 - linear_part(found["frozen"], lengths) * n / found["frozen"][n] for n in lengths}
    same = "exactly" if exact else "not exactly"
    note = (
        f"A prompt of p tokens costs {same} what p more tokens of text cost. H-Res adds "
        f"{extra[lengths[0]] / lengths[0] / 1e6:.2f} MFLOP a token, {'' if linear else 'not '}the same at any length. "
        f"Attention's N² part is {quadratic[lengths[0]]:.1%} of the frozen model's at N = {lengths[0]} and "
        f"{quadratic[lengths[-1]]:.1%} at N = {lengths[-1]}. The head is not counted."
    )
    columns = (Column("length", "tokens N"), *(Column(name, name, "GFLOP", digits=2) for name in found))
    rows = tuple({"length": n, **{name: values[n] / 1e9 for name, values in found.items()}} for n in lengths)
    tables = [Table("FLOPs of a pass over GPT-2-small's blocks", columns, rows, (note,))]
    series = [
        Series(name, tuple(map(float, lengths)), tuple(values[n] / found["frozen"][n] for n in lengths))
        for name, values in found.items()
        if name != "frozen"
    ]
    axes = Axis("tokens of text", "N", log=True), Axis("FLOPs, multiples of the frozen model's")
    plot = Plot("FLOPs against the length of the text", "lines", *axes, tuple(series))
    saved = {} if quick else saved_bytes(ledger)
    if saved:
        tables.append(saved_table(saved))
    verdict = Verdict(
        7,
        "holds" if exact and linear else "does not hold",
        "O(N²) for H-Res against O((N + p)²) for prompts",
        note,
        "python -m experiments.wikitext_speed --random-weights",
    )
    record = {name: {str(n): value for n, value in values.items()} for name, values in found.items()}
    return tables, plot, verdict, {"flops": record, "saved": saved}


def linear_part(flops_of: Mapping[int, int], lengths: Iterable[int]) -> float:
    """Return a of a·N + b·N², which the first two lengths determine."""
    one, two = list(lengths)[:2]
    return (flops_of[one] * two / one - flops_of[two] * one / two) / (two - one)


def saved_bytes(ledger: Ledger) -> dict[str, dict[str, int]]:
    """Return the bytes kept for a backward pass, by method and length."""
    found: dict[str, dict[str, int]] = {}
    for name, method, options in counted():
        if method:
            for length in LENGTHS[:3]:
                key = {"saved": name, "length": length, "rank": RANK, "torch": torch.__version__}
                value = ledger.get_or(key, lambda m=method, o=options, n=length: {"bytes": count_saved(m, o, n)})
                found.setdefault(name, {})[str(length)] = value["bytes"]
    return found


def saved_table(saved: Mapping[str, Mapping[str, int]]) -> Table:
    """Return the bytes kept for a backward pass as a table."""
    columns = (Column("length", "tokens N"), *(Column(name, name, "MB", digits=1) for name in saved))
    lengths = next(iter(saved.values()))
    rows = tuple({"length": int(n), **{name: values[n] / 1e6 for name, values in saved.items()}} for n in lengths)
    return Table("Bytes kept for the backward pass of a training step, GPT-2-small's shape, one row", columns, rows)


def held_against(times: Times) -> Table:
    """Return how many times as fast as each rival H-Res is."""
    columns = (Column("backbone", "backbone"), Column("phase", "phase"), *(Column(name, name) for name in RIVALS))
    rows = []
    for shape, phases in times.items():
        for phase in PHASES:
            texts = {name: f"{relative(phases[phase], 'H-Res', name):.3f}" for name in RIVALS}
            rows.append({"backbone": shape, "phase": phase, **texts})
    note = "Tokens per second of H-Res over those of the others: medians, and quartiles, of the rounds' ratios."
    return Table("H-Res against the others", columns, tuple(rows), (note,))


def judge_speed(times: Times) -> Verdict:
    """Judge claim 2, as fast as LoRA and faster than prompts: told apart where the quartiles of the ratio exclude 1."""
    said, held = [], []
    for name in RIVALS:
        ratios = [relative(phases[phase], "H-Res", name) for phases in times.values() for phase in PHASES]
        faster, slower = sum(one.low > 1 for one in ratios), sum(one.high < 1 for one in ratios)
        said.append(f"{name}: faster {faster}, slower {slower}, neither {len(ratios) - faster - slower} times")
        held.append(slower == 0 if name.startswith("LoRA") else faster == len(ratios))
    cases = f"of {len(PHASES) * len(times)}, prefill and decoding on {' and '.join(times)}"
    return Verdict(
        2,
        judged(held),
        "figure 2, no numbers",
        f"H-Res against {'; '.join(said)} ({cases}).",
        "python -m experiments.wikitext_speed --random-weights",
    )


def adapt_and_time(options: argparse.Namespace, ledger: Ledger) -> Found:
    """Adapt a pre-trained model to a text by every method; set perplexity against speed."""
    base, tokenizer = language_model(options.model)
    problem = problem_of(options, base, tokenizer)
    rates = {"hres": 3e-3, "lora": 1e-3, "prompt": 1e-2}
    arms = [
        Arm(name, arm[0], rates_around(rates[arm[0]], options.rates), arm[1])
        for name, arm in ARMS.items()
        if arm is not None and not name.endswith("merged")
    ]
    entries = sweep(problem, arms, range(options.seeds), ledger)
    table = comparison(options.model, problem, entries, Column("perplexity", "perplexity", "", "down", 2), merged=True)
    before = problem.score(base, "test", 0)["perplexity"]
    ids = next(iter(problem.train(0)))["input_ids"][: options.rows]
    models = {name: adapted(lambda: copy.deepcopy(base), name) for name in ARMS}
    times = time_phases(models, ids, rounds=options.rounds)
    found = {entry.arm.name: measured(entry, "perplexity") for entry in entries}
    merged = [measured(entry, "perplexity", merged=True) for entry in entries if entry.arm.method == "lora"]
    quality = {"frozen": before, **found, "LoRA, merged": merged[0]}
    points = tuple(
        Series(name, (per_second(times["decode"][name], len(ids)),), (quality[name],))
        for name in ARMS
        if name in quality
    )
    axes = Axis("decoding", "tokens/s"), Axis("perplexity of the test split")
    return Found(
        tables=[table, speed_table(options.model, times, options)],
        plots=[Plot("Quality against speed (the paper's figure 2)", "scatter", *axes, points)],
        verdicts=[judge_speed({options.model: times})],
        settings={"model": options.model, "data": options.data, "steps": problem.steps, "perplexity before": before},
        records={"runs": records(problem, entries), "seconds": times},
        seconds=sum(one.seconds for one in every_run(entries)),
    )


def problem_of(options: argparse.Namespace, base: nn.Module, tokenizer: Callable[..., Any]) -> Problem:
    """Return the problem of adapting a model to a text."""

    def windows(split: str) -> TokenBlocks:
        limit = 100 if options.quick else None
        return wikitext(options.data, split, tokenizer=tokenizer, length=options.length, limit=limit)

    parts = {"train": windows("train"), "valid": windows("validation"), "test": windows("test")}

    def score(model: nn.Module, split: str, seed: int) -> dict[str, float]:
        loss = evaluate(model, DataLoader(parts[split], batch_size=8))["loss"]
        return {"loss": loss, "perplexity": math.exp(loss)}

    return Problem(
        name=options.model,
        fresh=lambda seed: copy.deepcopy(base),
        train=lambda seed: DataLoader(parts["train"], batch_size=8, shuffle=True),
        score=score,
        metric="perplexity",
        better="down",
        steps=4 if options.quick else options.steps,
        identity={"backbone": digest(base), "data": options.data, "length": options.length, "quick": options.quick},
    )


def study(options: argparse.Namespace, ledger: Ledger) -> Found:
    """Time the shapes and count; with a model, adapt it first."""
    started = time.perf_counter()
    if not options.random_weights:
        return adapt_and_time(options, ledger)
    times = {name: measure_speed(name, options, ledger) for name in SHAPES}
    tables, plot, verdict, counts = count_all(options.quick, ledger)
    return Found(
        tables=[*(speed_table(name, times[name], options) for name in SHAPES), held_against(times), *tables],
        plots=[plot],
        verdicts=[judge_speed(times), verdict],
        settings={"rank": RANK, "rows": options.rows, "length": options.length, "rounds": options.rounds},
        records={"seconds": times, **counts},
        seconds=time.perf_counter() - started,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    parser = parser_of(EXPERIMENT)
    parser.add_argument("--random-weights", action="store_true", help="the shapes of GPT-2-small and Mamba-130m")
    parser.add_argument("--model", help="Hub name or local folder of a causal language model to adapt")
    parser.add_argument("--data", default="Salesforce/wikitext", help="Hub name or local path of the text")
    parser.add_argument("--steps", type=positive, default=500, help="optimizer steps of each method")
    parser.add_argument("--rows", type=positive, default=4, help="rows of the batch that is timed")
    parser.add_argument("--length", type=positive, default=64, help="tokens of a row, and of a training window")
    parser.add_argument("--rounds", type=positive, default=5, help="of each measurement")
    options = parser.parse_args(arguments)
    if options.random_weights == bool(options.model):
        parser.error("give --random-weights, or a --model to adapt")
    return run(EXPERIMENT, options, study)


if __name__ == "__main__":
    sys.exit(main())
