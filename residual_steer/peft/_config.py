"""HResConfig: a field as PEFT's configs describe an adapter, and what is written beside its tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft.config import PeftConfig
from peft.utils.peft_types import PeftType

from residual_steer.backbone import Backbone
from residual_steer.errors import SteerError

from ._registry import NAME, extend

WRAPPER = "base_model.model."  # what PEFT's wrappers put in front of a name, once for each wrapper
_LINE = "import residual_steer.peft"
_CARD = f"""
## How to load this adapter

It is a steering field (H-Res, [arXiv 2606.24396](https://arxiv.org/abs/2606.24396)). PEFT knows the method once
`residual_steer.peft` was imported; without that line it ends in `KeyError: '{NAME}'`.

```python
{_LINE}  # pip install 'residual-steer[peft]'
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder")
```
"""

_EMPTY = "---\n{{ card_data }}\n---\n"


@dataclass
class HResConfig(PeftConfig):
    """A steering field beside the residual stream of a frozen model, as an adapter of PEFT (arXiv 2606.24396).

    The options are those of `residual_steer.steer`. PEFT's `bias` means something else, so it is `field_bias` here.

    Args:
        rank: r, or `{block index: rank}`, which then says which blocks are steered; by site, `{site: either}`.
        scale: λ.
        layers: indices of the blocks to steer, negative ones from the end; None is all of them.
        site: a site of `residual_steer.steer`, or a list of several; None is what is best for the family, and is filled
            in when the adapter is made.
        activation: σ: gelu, gelu_tanh, relu, silu, tanh or identity.
        field_bias: whether both projections have biases.
        dropout: of the field's hidden units, in training mode.
        arch: a registered backbone's name, or "auto"; None looks for one.
        modules_to_save: ends of the names of base modules that train with the field, such as `["classifier"]`.
        backbone: filled in when the adapter is saved: what it was trained on, to be compared when it is loaded.
        requires: what a process that loads the adapter has to do first, for whoever reads the file.

    Raises:
        SteerError: an option that a file could not hold.
    """

    rank: int | dict[Any, Any] = 32
    scale: float = 1.0
    layers: list[int] | None = None
    site: str | list[str] | None = None
    activation: str = "gelu"
    field_bias: bool = True
    dropout: float = 0.0
    arch: str | None = None
    modules_to_save: list[str] | None = None
    backbone: dict[str, Any] | None = field(default=None, repr=False)
    requires: str = field(default=_LINE, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.here: dict[str, Any] | None = None  # of the model that the config was last used with; no option
        self.peft_type = extend(PeftType, NAME)
        if isinstance(self.rank, dict):
            self.rank = _numbered(self.rank)
        if self.site is not None and not isinstance(self.site, str):
            self.site = list(self.site)
        if self.layers is not None:
            self.layers = list(self.layers)
        if self.arch is not None and not isinstance(self.arch, str):
            raise SteerError(
                f"`arch` is the name of a registered backbone, which the adapter's file can hold, or None; received a "
                f"{type(self.arch).__name__}. Register it: `residual_steer.register_backbone`."
            )
        if isinstance(self.modules_to_save, str):
            raise SteerError(f"`modules_to_save` is a list of names; received {self.modules_to_save!r}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the options, and which backbone the adapter was trained on."""
        return {**super().to_dict(), "backbone": self.here or self.backbone}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and say in the folder's card how the adapter is loaded."""
        super().save_pretrained(save_directory, **kwargs)
        text = card(Path(save_directory))
        if text is not None:
            (Path(save_directory) / "README.md").write_text(text, "utf-8")


def _numbered(ranks: dict[Any, Any]) -> dict[Any, Any]:
    """Return ranks by block or by site with the numbers of blocks, of which JSON made words."""
    return {
        int(key) if str(key).lstrip("-").isdecimal() else key: _numbered(rank) if isinstance(rank, dict) else rank
        for key, rank in ranks.items()
    }


def card(folder: Path) -> str | None:
    """Return the card of a folder with how to load the adapter; None if the card has that."""
    path = folder / "README.md"
    found = ModelCard.load(path) if path.is_file() else ModelCard.from_template(ModelCardData(), template_str=_EMPTY)
    if _LINE in found.text:
        return None
    found.data["library_name"] = "peft"
    found.data["tags"] = sorted({*(found.data.get("tags") or []), "residual-steer"})
    found.text = f"{found.text.rstrip()}\n{_CARD}"
    return str(found)


def place(backbone: Backbone) -> dict[str, Any]:
    """Describe a backbone as an adapter's file has it."""
    return {"name": backbone.name, "widths": list(backbone.widths)}


def check_backbone(config: HResConfig, backbone: Backbone) -> None:
    """Compare a model's backbone with the one that an adapter was trained on, if the config came with it."""
    if config.backbone not in (None, place(backbone)):
        raise SteerError(f"the adapter was trained on {config.backbone}; this model is {place(backbone)}.")
    config.here = place(backbone)
