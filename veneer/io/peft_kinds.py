"""PEFT's kinds of adapters: the layers each knows, the fields it has, and how its tensors lie at a layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from veneer.core.registry import PeftMap
from veneer.core.site import Site, stored, type_named


@dataclass(frozen=True)
class Kind:
    """One ``peft_type`` that adapts layers one by one.

    ``layers`` are the classes it wraps, ``patterns`` says whether ranks and alphas may differ by module, ``fan``
    whether it has ``fan_in_fan_out``.
    """

    layers: tuple[str, ...]
    patterns: bool = False
    fan: bool = False


KINDS = {
    "LORA": Kind(("Linear", "Conv1D", "Conv1d", "Conv2d", "Embedding"), patterns=True, fan=True),
    "VERA": Kind(("Linear", "Conv1D"), fan=True),
    "RANDLORA": Kind(("Linear", "Conv1D"), fan=True),
    "LOHA": Kind(("Linear", "Conv1d", "Conv2d"), patterns=True),
    "LOKR": Kind(("Linear", "Conv1d", "Conv2d"), patterns=True),
    "IA3": Kind(("Linear", "Conv1D", "Conv2d"), fan=True),
    "OFT": Kind(("Linear",)),  # its convolutions run in another way than they merge
    "BOFT": Kind(("Linear", "Conv2d")),
    "MISS": Kind(("Linear",)),
}
PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING")  # no layers: one tensor ahead of the input or of keys and values
WHOLE = ("LN_TUNING", "TRAINABLE_TOKENS")  # base tensors themselves
ENTRIES = ("BEFT", "SHIRA", "SUPERTUNING")  # single entries of a layer, see ``peft_entries``

# What PEFT reads under other names, or older files hold → the kind whose reader takes them, see ``peft_translate``.
TRANSLATED = {
    "ADALORA": "LORA",
    "P_TUNING": "PROMPT_TUNING",
    "CPT": "PROMPT_TUNING",
    "CARTRIDGE": "PREFIX_TUNING",
    "BONE": "MISS",
}


@dataclass(frozen=True)
class Lie:
    """How one tensor of a layer follows the layer's outputs in our form.

    ``rows`` is its dimension over them, None when it has none, so that the parts of a fused projection share it;
    ``rest`` stands in it for rows that no part changes, None where nothing can. ``whole`` tensors cannot be cut at all.
    """

    rows: int | None = None
    rest: float | None = None
    whole: bool = False


LIES = {
    "lora_A": Lie(),
    "lora_B": Lie(0, 0.0),
    "lora_B.bias": Lie(0, 0.0),
    "lora_magnitude_vector": Lie(0),
    "lora_diag": Lie(),
    "vera_lambda_b": Lie(0, 0.0),
    "vera_lambda_d": Lie(),
    "hada_w1_a": Lie(0, 0.0),
    "hada_w1_b": Lie(),
    "hada_w2_a": Lie(0, 0.0),
    "hada_w2_b": Lie(),
    "ia3_l": Lie(0, 1.0),
    "boft_R": Lie(),
    "boft_s": Lie(0),
    "oft_R.weight": Lie(),
    "miss_block": Lie(1, 0.0),
}

# Forms whose tensors repeat over rows or take them in blocks, which a part of a fused projection may cut.
BLOCKS = ("bat", "miss-mini")

# What a file may hold beside the tensors that a map names: it follows from the config, and is checked against that.
DERIVED = {"VERA": ("vera_A", "vera_B"), "RANDLORA": ("randlora_A", "randlora_B")}

# Of LoKr's two factors each is one tensor or a product of two.
ALTERNATIVES = {"lokr_w1": ("lokr_w1_a", "lokr_w1_b"), "lokr_w2": ("lokr_w2_a", "lokr_w2_b")}

# Forms that PEFT has as a variant which no constant of the config tells; they are read so, and written as plain LoRA.
VARIANTS = {
    "kasa": PeftMap(
        "LORA",
        fields={"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
        keys={"A": "lora_A", "B": "lora_B", "g": "lora_diag"},
    )
}
VARIANT_FIELDS = {"kasa_config": "kasa"}


def lie(name: str, form: str) -> Lie:
    """How what the map of ``form`` calls ``name`` lies; what nothing is known of stays whole."""
    return Lie(whole=True) if form in BLOCKS else LIES.get(name, Lie(whole=True))


def layer_class(site: Site) -> str:
    """The class under which PEFT knows the layer."""
    m = site.module
    if type_named(m, "Conv1D"):
        return "Conv1D"
    if site.kind == "linear" and (isinstance(m, nn.Linear) or stored(m)):
        return "Linear"
    known = {nn.Conv1d: "Conv1d", nn.Conv2d: "Conv2d", nn.Embedding: "Embedding"}
    return next((name for cls, name in known.items() if isinstance(m, cls)), type(m).__name__)
