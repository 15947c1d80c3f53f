"""The Hugging Face Hub: fetch files of one commit, upload some in one commit, and the card that goes with them.

`huggingface_hub` is imported when the Hub is first needed, so that nobody waits for it who does not use it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .errors import SteerError

__all__ = ["fetch", "is_repo", "model_card", "upload"]

_LOG_IN = "log in with `hf auth login` (or set HF_TOKEN)"


def is_repo(name: object) -> bool:
    """Return whether `name` looks like a repository's: "owner/name", with no leading `./`, `~` or `/`."""
    part = r"[A-Za-z0-9_][\w.-]*"
    return isinstance(name, str) and bool(re.fullmatch(f"{part}/{part}", name, re.ASCII))


def fetch(repo: str, revision: str | None, files: tuple[str, ...], others: tuple[str, ...]) -> Path:
    """Fetch files of a repository, or others, of one commit into the Hub's cache; return their folder, or raise."""
    from huggingface_hub import snapshot_download

    at = f" at revision {revision!r}" if revision is not None else ""
    looked = f"found no field: there is no local folder {repo!r}, and on the Hub, {repo}{at}"
    with _explained(looked):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[*files, *others]))
    absent = [name for name in files if not (folder / name).is_file()]
    if absent and not all((folder / name).is_file() for name in others):
        raise SteerError(f"{looked}: it holds no {' and no '.join(absent)}. `residual_steer.push` uploads both.")
    return folder


def upload(repo: str, files: Mapping[str, bytes], message: str, *, private: bool) -> str:
    """Upload files, contents by name, in one commit, to a repository made if need be; return its address, or raise."""
    from huggingface_hub import CommitOperationAdd, HfApi

    failed = f"could not push to {repo}"
    with _explained(failed):
        hub = HfApi()
        url = str(hub.create_repo(repo, private=private, exist_ok=True))
        hidden = not private or hub.model_info(repo).private
        if hidden:  # not `upload_folder`, which may spread a folder over several commits
            added = [CommitOperationAdd(name, content) for name, content in files.items()]
            hub.create_commit(repo, added, commit_message=message)
    if not hidden:
        raise SteerError(
            f"{failed}: it is there already, and public. Nothing was uploaded; make it private in its settings, or "
            "leave `private` out."
        )
    return url


@contextlib.contextmanager
def _explained(failed: str) -> Iterator[None]:
    """Turn whatever the client raises, which passes on what several libraries raise, into an error that helps."""
    try:
        yield
    except Exception as error:
        raise SteerError(f"{failed}: {_explain(error)}") from error


def _explain(error: Exception) -> str:
    """Return what went wrong, and what to do."""
    from huggingface_hub import errors

    chain: list[BaseException] = [error]  # down to the first cause
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    codes = [getattr(getattr(one, "response", None), "status_code", None) for one in chain]
    status = next((code for code in codes if isinstance(code, int)), None)
    brief, first = (" ".join(str(one).split())[:200] for one in (error, chain[-1]))
    if any(isinstance(one, errors.OfflineModeIsEnabled) for one in chain):
        return "the Hub was not asked, since HF_HUB_OFFLINE is set. Unset it to use the Hub."
    if isinstance(error, errors.HFValidationError):
        return f"that is no name ({brief}). Name a repository 'owner/name', as on the Hub."
    if isinstance(error, errors.GatedRepoError):
        return f"access to it is gated. Ask for access on its page, then {_LOG_IN}."
    if isinstance(error, errors.RevisionNotFoundError):
        return "there is no such revision. Name a branch, tag or commit that is there, or leave `revision` out."
    if status == 401 or isinstance(error, errors.RepositoryNotFoundError):
        return f"there is none that you may use. Check the name; if it is right, {_LOG_IN}."
    if status == 403:
        return f"your token does not allow that. Check the owner's name, and {_LOG_IN} with a token that may write."
    if status is not None:
        return f"the Hub answered {status} ({brief}). Try again later."
    return (
        f"the Hub could not be asked ({type(chain[-1]).__name__}: {first}). Check the connection, and that the cache "
        "of huggingface_hub can be written."
    )


def model_card(
    repo: str,
    model: nn.Module,
    inner: nn.Module,
    described: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    size: int,
) -> str:
    """Return the card of a field that is described and stored so: a README.md with the front matter that the Hub reads.

    `inner` is the part of the model that is the backbone, and `size` the bytes of the file with the tensors.
    """
    from huggingface_hub import ModelCardData

    field, backbone = described["field"], described["backbone"]
    base = _base_model(model) or _base_model(inner)
    data = ModelCardData(
        library_name="residual-steer",
        tags=["residual-steer", backbone["name"]],
        base_model=base,
        base_model_relation="adapter" if base else None,
    )
    trained = [f"`{key}` {tuple(tensors[f'train.{key}'].shape)}" for key in field["train"]]
    blocks = f"{backbone['blocks']} blocks of width {', '.join(map(str, sorted(set(backbone['widths']))))}"
    rows = {
        "backbone": f"{backbone['name']}: `{backbone['class']}`, {blocks}",
        "base model": f"[{base}](https://huggingface.co/{base})" if base else "not recorded",
        "site": f"`{field['site']}`",
        "steered blocks": ", ".join(field["ranks"]),
        "rank": _ranks(field["ranks"])
        if "sites" not in field
        else "; ".join(f"{site}: {_ranks(ranks)}" for site, ranks in field["sites"].items()),
        "scale": f"{field['scale']:g}",
        "activation": field["activation"],
        "trained base tensors": ", ".join(trained) or "none",
        "parameters": f"{sum(tensor.numel() for tensor in tensors.values()):,}",
        "size": f"{size:,} bytes",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    kind = type(model)
    if base and kind.__module__.startswith("transformers."):
        first, made = f"from transformers import {kind.__name__}\n", f'{kind.__name__}.from_pretrained("{base}")'
    else:
        first, made = "", f"...  # {backbone['class']} with {blocks}, and the weights that the field was trained on"
    if trained:
        made += "\n# the model needs the trained base tensors above, in these shapes, before the field is loaded"
    return f"""---
{data.to_yaml()}
---

# {repo.partition("/")[2]}

A steering field for a frozen backbone: a small vector field beside its residual stream (H-Res, \
[arXiv 2606.24396](https://arxiv.org/abs/2606.24396)), stored by `residual_steer`.

| | |
| --- | --- |
{table}

```python
{first}import residual_steer as rs

model = {made}
rs.load(model, "{repo}")
```
"""


def _ranks(by_block: Mapping[str, int]) -> str:
    return ", ".join(map(str, sorted(set(by_block.values()))))


def _base_model(model: nn.Module) -> str | None:
    """Return the name on the Hub that a model's config has, if it has one, and it is no folder here."""
    name: Any = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and is_repo(name) and not os.path.exists(name) else None
