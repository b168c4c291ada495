"""Rules of the optimizers: a setting that one of them would ignore, or cannot work with, is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Optimizer = Literal["adamw", "slimadam", "adamw_8bit", "lion", "muon", "schedule_free_adamw"]
#: Dimensions that SlimAdam's second moments are means over, in a tensor [out, in].
SlimRule = Literal["none", "fan_in", "fan_out", "both"]
#: In place of rules: they are measured in a short plain fine-tuning (`tune.training.single`).
Measured = Literal["auto"]
AUTO: Measured = "auto"
#: Learning-rate schedules that leave the rate alone after the warm-up.
STEADY = ("constant", "constant_with_warmup")


@dataclass(frozen=True)
class Rules:
    """Limits of an optimizer.

    whole: the reason why it needs whole tensors, which ZeRO stages 1 to 3 flatten and partition; else None.
    unused: keys that it does not read.
    """

    whole: str | None = None
    unused: tuple[str, ...] = ()
    steady: bool = False


RULES: dict[str, Rules] = {
    "adamw": Rules(),
    "slimadam": Rules(whole="it takes means over dimensions of a tensor"),
    "adamw_8bit": Rules(whole="it quantises blocks of a tensor"),
    "lion": Rules(unused=("adam_epsilon",)),
    "muon": Rules(whole="it makes matrices orthogonal"),
    "schedule_free_adamw": Rules(steady=True),
}
#: Keys that Muon reads for the tensors alone that it leaves to AdamW.
OF_ADAMW = ("adam_beta1", "adam_beta2", "adam_epsilon")


def check_optimizer(spec: Any) -> None:
    """Refuse settings of a fine-tuning (a `TrainSpec`) that do not go with its optimizer.

    Raises:
        ValueError: they do not.
    """
    name, rules = spec.optimizer, RULES[spec.optimizer]
    if name == "slimadam" and spec.slimadam_rules is None:
        raise ValueError(
            "optimizer: slimadam needs slimadam_rules: auto, which measures them, or rules such as {A: fan_in, B: "
            "fan_out}; {} is AdamW to the bit."
        )
    if name != "slimadam" and spec.slimadam_rules is not None:
        raise ValueError(
            f"slimadam_rules has no effect with optimizer: {name}. Leave it out, or set optimizer to slimadam."
        )
    if rules.whole and spec.zero_stage > 0:
        able = ", ".join(other for other, its in RULES.items() if not its.whole)
        raise ValueError(
            f"optimizer: {name} cannot be used with zero_stage: {spec.zero_stage}, which partitions flat tensors, as "
            f"{rules.whole}. Set zero_stage to 0, or optimizer to one of {able}."
        )
    if rules.steady and spec.lr_scheduler_type not in STEADY:
        raise ValueError(
            f"optimizer: {name} averages its steps in place of a schedule, and lr_scheduler_type is "
            f"{spec.lr_scheduler_type}. Set lr_scheduler_type to {' or '.join(STEADY)}."
        )
    if rules.steady and spec.adam_beta1 == 0:
        raise ValueError(f"optimizer: {name} interpolates by adam_beta1, which must be above 0.")
    unused = rules.unused
    if name == "muon" and not spec.use_dora and spec.lora_target == "all":
        unused = OF_ADAMW
    for key in unused:
        value, default = getattr(spec, key), type(spec).model_fields[key].default
        if value != default:
            raise ValueError(
                f"{key}: {value} has no effect with optimizer: {name}. Leave it out (its default is {default}), or "
                "choose another optimizer."
            )
