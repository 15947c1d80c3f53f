"""The paper's claims (arXiv 2606.24396), and CLAIMS.md: what the results in a folder say about each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .facts import hardware, seeds_of, verdicts_of, versions_of
from .markdown import code, escaped, table_lines
from .result import Result, Verdict

__all__ = ["CLAIMS", "NOT_RUN", "Claim", "claims_page"]

NOT_RUN = "not run here"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        number: as in `Verdict.claim`.
        text: what the paper says.
        paper: its numbers.
        test: what a fair test of it is.
        command: that runs a test in this repository.
        missing: what it takes to run it here.
    """

    number: int
    text: str
    paper: str
    test: str
    command: str
    missing: str


CLAIMS = (
    Claim(
        1,
        "H-Res beats LoRA and prompts on associative retrieval (SQuAD validation loss)",
        "3.78 against 5.17 (LoRA) and 5.61 (VPT); “26 %” (§3.1, figure 2)",
        "SQuAD with GPT-2, equal steps, a learning-rate sweep of the same size for each method; and multi-query "
        "associative recall (MQAR, arXiv 2312.04927), which needs no download",
        "python examples/squad.py --model gpt2 --model state-spaces/mamba-130m-hf",
        "SQuAD and the weights, which have to be downloaded; a GPU",
    ),
    Claim(
        2,
        "Generation is as fast as with LoRA and faster than with prompts",
        "figure 2, no numbers",
        "tokens per second on the same backbone, prefill and decoding apart, ratios within one run; LoRA merged and "
        "unmerged are two rows",
        "python examples/wikitext_speed.py --random-weights",
        "a run of it",
    ),
    Claim(
        3,
        "H-Res is on a par with VPT, or better, on VTAB-1k",
        "CIFAR-100 59.37 against 58.90 (VPT); SVHN 46.50 against 46.83 (table 1)",
        "800 + 200 training images, full test split, ViT-B/16 of ImageNet-21k. Both of the paper's CIFAR-100 numbers "
        "are below the published linear probe, so its protocol is another one, or weak",
        "python examples/vtab.py --data cifar100 --data svhn",
        "the images and the weights of ViT-B/16, which have to be downloaded; a GPU",
    ),
    Claim(
        4,
        "Accuracy rises with the rank, and falls with the length of prompts",
        "prompts p = 1 76.54, p = 10 70.48; H-Res r = 8 79.37, r = 32 82.14 (table 2)",
        "“latent adaptation tasks” are not defined, but for d = 64 and two classes: define one, say so, run many seeds",
        "python examples/latent_ablation.py",
        "a run of it",
    ),
    Claim(
        5,
        "Prompts raise the entropy of attention (lemma 1); H-Res leaves it untouched (lemma 2)",
        "no numbers",
        "the entropy of the class token's attention, layer by layer. H-Res at layer l changes what enters layer l + 1, "
        "so lemma 2 can be exact for the first steered layer only",
        "python examples/inspect_steering.py",
        "a run of it",
    ),
    Claim(
        6,
        "H-Res brings neural collapse",
        "no numbers",
        "NC1 to NC4 (Papyan et al. 2020) before and after training, for every method",
        "python examples/inspect_steering.py",
        "a run of it",
    ),
    Claim(
        7,
        "The cost is O(N²), against O((N + p)²) for prompts",
        "complexity only (table 1)",
        "FLOPs and bytes saved for the backward pass, counted against N and p",
        "python examples/wikitext_speed.py --random-weights",
        "a run of it",
    ),
    Claim(
        8,
        "Projection onto the null space keeps task A intact (eq. 6)",
        "no numbers",
        "accuracy on A after training on B, with the projection and without",
        "python examples/continual.py",
        "a run of it",
    ),
    Claim(
        9,
        "It works unchanged on state-space models (§4.2)",
        "none",
        "the same training loop on GPT-2, ViT and Mamba, with LoRA and prompts beside it",
        "python examples/compare_transformer_mamba.py --baselines",
        "a run of it",
    ),
    Claim(
        10,
        "LoRA's field is “chaotic”, that of H-Res “convergent”",
        "a picture (figure 1)",
        "the displacements of the stream under both, in its first two principal directions, on the same data",
        "python examples/inspect_steering.py",
        "a run of it",
    ),
)


def claims_page(results: Sequence[Result]) -> str:
    """Return CLAIMS.md: a section for each claim, with every verdict that a result has on it.

    What is called ours comes from results alone. A claim on which none has a verdict is `not run here`.
    """
    found: dict[int, list[tuple[Verdict, Result]]] = {claim.number: [] for claim in CLAIMS}
    for verdict, result in verdicts_of(results):
        found[verdict.claim].append((verdict, result))
    heads = ["claim", "what the paper says", "verdict"]
    rows = [
        [f"[{claim.number}](#claim-{claim.number})", escaped(claim.text), escaped(_in_short(found[claim.number]))]
        for claim in CLAIMS
    ]
    parts = [
        "# The paper's claims, tested here",
        "H-Res, “Parallel Manifold Steering” (arXiv 2606.24396). Written by `python -m residual_steer.report` from "
        "the results of experiments; every number called ours is in one of them. ± is a sample standard deviation over "
        "the seeds.",
        "\n".join(table_lines(heads, rows, [False, False, False])),
    ]
    for claim in CLAIMS:
        parts += _section(claim, found[claim.number])
    return "\n\n".join(parts) + "\n"


def _in_short(found: Sequence[tuple[Verdict, Result]]) -> str:
    """Return the verdicts on a claim, each once."""
    return "; ".join(dict.fromkeys(verdict.verdict for verdict, _ in found)) or NOT_RUN


def _section(claim: Claim, found: Sequence[tuple[Verdict, Result]]) -> list[str]:
    parts = [
        f'<a id="claim-{claim.number}"></a>\n\n## {claim.number}. {escaped(claim.text)}',
        f"- The paper: {escaped(claim.paper)}.\n- A fair test: {escaped(claim.test)}.",
    ]
    if not found:
        return [*parts, f"**{NOT_RUN}**\n\n- Command: {code(claim.command)}\n- Missing: {escaped(claim.missing)}."]
    return parts + [_verdict(verdict, result) for verdict, result in found]


def _verdict(verdict: Verdict, result: Result) -> str:
    lines = [
        f"**{escaped(verdict.verdict)}**, by {escaped(result.title)} ({code(result.name)})\n",
        f"- Ours: {escaped(verdict.ours)}",
        f"- Held against, of the paper: {escaped(verdict.paper)}",
        f"- Seeds: {escaped(seeds_of(result))}",
        f"- Command: {code(verdict.command)}",
        f"- Hardware: {escaped(hardware(result.machine))}",
        f"- Versions: {escaped(versions_of(result))}",
    ]
    return "\n".join([*lines, f"- Missing: {escaped(verdict.missing)}"] if verdict.missing else lines)
