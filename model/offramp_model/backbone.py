"""A backbone's `config.json`: what it says of sizes and forms, and whether the encoder can run it.

Found out without its weights. It knows nothing about tensors or exits' heads.
"""

from typing import Any

from offramp_model.config import MultiExitConfig
from offramp_model.families import Family, family_of

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")
"""Between the two linear maps of a layer, by their names there."""


def check_backbone(backbone: dict[str, Any], config: MultiExitConfig) -> None:
    """Check a backbone's `config.json` without its weights: can this encoder run it?

    Raises:
        ValueError: the architecture or a setting of it is not supported, a size is missing, or
            depth or width are not those that the exits were made for.
    """
    family = family_of(backbone)
    for what, key, expected in (
        ("layers", family.layers_key, config.num_layers),
        ("hidden size", family.width_key, config.hidden_size),
    ):
        if size_of(backbone, key) != expected:
            raise ValueError(
                f"the backbone's config.json says {key} = {backbone[key]}, "
                f"but the exits were made for {what} = {expected}"
            )
    heads = size_of(backbone, family.heads_key)
    if config.hidden_size % heads:
        raise ValueError(
            f"{family.heads_key} = {heads} does not divide {family.width_key} = "
            f"{config.hidden_size}"
        )
    size_of(backbone, family.ffn_key)
    activation_of(backbone, family)
    norm_eps_of(backbone, family)


def size_of(backbone: dict[str, Any], key: str) -> int:
    """A positive whole number."""
    value = backbone.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json: {key} is {value!r}, allowed is a positive whole number")
    return value


def norm_eps_of(backbone: dict[str, Any], family: Family) -> float:
    """What a layer norm adds to the variance."""
    if family.norm_eps_key is None:
        return 1e-12
    value = backbone.get(family.norm_eps_key)
    if not isinstance(value, float | int) or not 0 < value < 1:
        raise ValueError(
            f"config.json: {family.norm_eps_key} is {value!r}, allowed is a number above 0"
        )
    return float(value)


def activation_of(backbone: dict[str, Any], family: Family) -> str:
    """The activation's name, one of `ACTIVATIONS`."""
    name = backbone.get(family.activation_key)
    if name not in ACTIVATIONS:
        raise ValueError(
            f"config.json: {family.activation_key} is {name!r}, supported: {sorted(ACTIVATIONS)}"
        )
    return str(name)
