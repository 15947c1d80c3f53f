"""Make a method known to PEFT, whose list of methods is a closed enum.

What an enum keeps of its members was read in Python 3.10 to 3.14, and run in 3.10 to 3.13.
"""

from __future__ import annotations

from typing import Any

from peft.utils.peft_types import PeftType, register_peft_method

NAME = "HRES"


def register(config: type, model: type) -> None:
    """Register the method, unless it is there already: a module may be imported again."""
    member = extend(PeftType, NAME)
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        mapping.pop(member, None)
    register_peft_method(name=NAME.lower(), config_cls=config, model_cls=model)


def extend(kind: Any, name: str) -> Any:
    """Add a member to an enum of strings, which has no call for it, and return it.

    An enum keeps three tables of its members, and from Python 3.12 on each as an attribute of the class, which `type`
    sets where the enum's own `__setattr__` would refuse; from 3.13 on also a list of the values.
    """
    if name in kind.__members__:
        return kind[name]
    member = str.__new__(kind, name)
    member._name_, member._value_, member.__objclass__ = name, name, kind
    member._sort_order_ = len(kind._member_names_)
    kind._member_names_.append(name)
    kind._member_map_[name] = kind._value2member_map_[name] = member
    getattr(kind, "_hashable_values_", []).append(name)
    type.__setattr__(kind, name, member)
    return member
