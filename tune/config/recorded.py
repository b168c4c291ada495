"""Lenient reading of recorded run files: the models and benchmarks of a run, and what it asks of a machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from macdrop.errors import ConfigError
from tune.config.endpoints.address import endpoint_address
from tune.config.judge_spec import JudgeSpec
from tune.config.parse import SECTIONS, read_override
from tune.config.resume import shell_command

TRUST = "--trust-remote-code"
COPY = "sync_to"
#: Values of `ray.address` that name no machine: those that the environment of the command chooses.
OWN_CLUSTERS = (None, "auto", "local")


def models_of(config: Mapping[str, Any]) -> list[str]:
    """List the names of a run's models, in the order of its spec."""
    entries = block_of(config, "sweep").get("models") or [config.get("model_name_or_path")]
    names = [entry.get("model_name_or_path") if isinstance(entry, Mapping) else entry for entry in entries]
    return [name for name in names if isinstance(name, str) and name]


def asked_for(config: Mapping[str, Any]) -> dict[str, str | None]:
    """Map the run's benchmarks, and the lm-eval tasks behind them, to the metric that tables show."""
    names: dict[str, str | None] = {}
    for block in ("validation", "eval"):
        for section in SECTIONS:
            for name, entry in block_of(block_of(config, block), section).items():
                entry = entry if isinstance(entry, Mapping) else {}
                names |= dict.fromkeys((name, entry.get("task") or name), entry.get("metric") or _first_own(entry))
    return names


def _first_own(entry: Mapping[str, Any]) -> str | None:
    """Return the name of the scores of an own metric that an entry lists first."""
    metrics = entry.get("metrics")
    first = metrics[0] if isinstance(metrics, list) and metrics else None
    return first.partition(":")[2] or None if isinstance(first, str) else None


def block_of(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a block of a run file; empty if it is missing or is not a block."""
    found = config.get(key)
    return found if isinstance(found, Mapping) else {}


def code_of(config: Mapping[str, Any]) -> list[str]:
    """List the folders of the user's own metrics and tasks, whose code the benchmarks of a run import."""
    blocks = [block_of(config, name) for name in ("validation", "eval")]
    found = [block[key] for block in blocks for key in ("code_path", "task_path") if block.get(key)]
    return list(dict.fromkeys(map(str, found)))


def _endpoints(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """Yield the endpoints of a run: the block of each, its keys, and what is sent there."""
    yield "eval.judge", block_of(block_of(config, "eval"), "judge"), "answers"
    for block in ("eval", "validation"):
        name = f"{block}.generation_server"
        yield name, block_of(block_of(config, block), "generation_server"), "prompts and the paths of adapters"


def orders_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Map words of a command line to what a recorded run file asks for that only such words may allow.

    That is code of models, endpoints, keys of other variables than the default, machines, and stores that the run is
    copied to; `config` may be the file of a run or of one trial.
    """
    judge, found = block_of(block_of(config, "eval"), "judge"), {}
    entries = block_of(config, "sweep").get("models")
    models = [config, *(entry for entry in entries or () if isinstance(entry, Mapping))]
    trusted = [each.get("model_name_or_path") for each in models if each.get("trust_remote_code")]
    trusted += [judge.get("model")] if judge.get("trust_remote_code") else []
    runs = [f"runs the code that comes with {' and '.join(str(name or 'its models') for name in trusted)}"]
    runs = (runs if trusted else []) + [f"runs the code in {place}" for place in code_of(config)]
    if runs:
        found[TRUST] = ", ".join(runs)
    for name, endpoint, what in _endpoints(config):
        if url := endpoint.get("base_url"):
            found[f"{name}.base_url={url}"] = f"sends {what} to {url}"
        key = endpoint.get("api_key_env")
        if key not in (None, JudgeSpec.model_fields["api_key_env"].default):
            found[f"{name}.api_key_env={key}"] = f"sends the key in ${key}"
    address = block_of(config, "ray").get("address")
    if address not in OWN_CLUSTERS:
        found[f"ray.address={address}"] = f"joins the Ray cluster at {address}"
    if copied := config.get(COPY):
        found[f"{COPY}={copied}"] = f"copies the run to {copied}"
    return found


def check_orders(folder: Path, config: Mapping[str, Any], overrides: Iterable[str], *, trust: bool | None) -> None:
    """Refuse to do what a run folder asks for and this command line does not: the folder may come from elsewhere.

    trust: `--trust-remote-code` was given, which `trust_remote_code=true` stands for as well; None: there is no such
        option.

    Raises:
        ConfigError: names what it asks for, and the words that allow it.
    """
    pairs = [read_override(override) for override in overrides]
    if COPY in dict(pairs):  # the command says itself where to, if anywhere
        config = {key: value for key, value in config.items() if key != COPY}
    given = {f"{key}={endpoint_address(str(value)) if key.endswith('.base_url') else value}" for key, value in pairs}
    given |= {TRUST} if trust or "trust_remote_code=True" in given else set()
    missing = {word: what for word, what in orders_of(config).items() if word not in given}
    if missing:
        raise ConfigError(
            f"The settings in {folder} ask for more than this command allows. The command then:\n"
            + "".join(f"  {what}\n" for what in missing.values())
            + "A run folder may come from elsewhere, so these are up to you. To allow them, add:\n  "
            + shell_command(*("trust_remote_code=true" if (word, trust) == (TRUST, None) else word for word in missing))
        )
