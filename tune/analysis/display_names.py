"""Display names of arms, adapters and settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tune.config.sections import BASE, Arm


def arm_name(arm: str) -> str:
    """The display name of an arm: "MacDrop", "random rows"."""
    return "MacDrop" if arm == Arm.MACDROP else arm.replace("_", " ")


def setting_label(arm: str, settings: Mapping[str, Any]) -> str:
    """Name a setting: "base", "plain DoRA", "MacDrop k 3 p0 0.87 exp 0.05"; `settings` have dotted keys."""
    if arm == BASE:
        return BASE
    adapter = adapter_name(settings)
    if arm == Arm.PLAIN:
        return f"plain {adapter}"
    k, p0, alpha = (settings.get(f"macdrop.{key}") for key in ("k", "p0", "alpha"))
    parts = [arm_name(arm), "" if adapter == "LoRA" else adapter, f"k {k}" if k else ""]
    parts += ["" if p0 is None else f"p0 {p0:.2g}", settings.get("macdrop.schedule") or ""]
    parts += ["" if alpha is None else f"{alpha:g}"]
    return " ".join(filter(None, parts))


def adapter_name(settings: Mapping[str, Any]) -> str:
    """LoRA, DoRA, rsLoRA or rsDoRA."""
    return ("rs" if settings.get("use_rslora") else "") + ("DoRA" if settings.get("use_dora") else "LoRA")
