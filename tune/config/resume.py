"""The keys of a run file that may change when a run is resumed, and the commands that users type."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from macdrop.errors import ConfigError
from tune.config.parse import flatten
from tune.config.sections import RaySpec

#: Keys of the block `ray:` that results depend on: the order in which a CPU adds numbers.
RESULTS = frozenset({"ray.threads_per_worker"})
#: Keys of `eval:` and `validation:` that say where something is, and how it is asked.
PLACES = (
    "code_path",
    "task_path",
    *(
        f"generation_server.{key}"
        for key in ("base_url", "api_key_env", "request_retries", "timeout_s", "max_concurrent", "compared")
    ),
)
#: Keys without an effect on results: the rest of `ray:`, the run folder, its copy, trackers, trials at once, and
#: where own code and servers are; of the code, `code_version` says what it is. Which numbers of
#: workers a run may have is said in `tune.storage.segments`, and how many a trial had in its record.
MACHINERY = frozenset({f"ray.{key}" for key in RaySpec.model_fields}) - RESULTS | {
    *(f"{block}.{key}" for block in ("eval", "validation") for key in PLACES),
    "output_dir",
    "report_to",
    "sync_to",
    "sweep.max_concurrent_trials",
    "sweep.max_concurrent_models",
}


def shell_command(*words: object) -> str:
    """Return a command of these words that can be pasted into a shell, whatever characters are in them."""
    return " ".join(map(_quoted, map(str, words)))


def own_command() -> str:
    """Return the command of this process; an entry point of ours by its name, wherever it is installed."""
    program, *words = sys.argv
    return shell_command("macdrop" if Path(program).name in ("macdrop", "__main__.py") else program, *words)


def _quoted(word: str) -> str:
    """Quote a word; control characters, which a terminal would obey, are written as bash's `$'...'` escapes."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = "".join(sign if sign.isprintable() and sign not in "\\'" else _escape(sign) for sign in word)
    return f"$'{escaped}'"


def _escape(sign: str) -> str:
    if sign.isprintable():
        return f"\\{sign}"
    # Bytes of a path that are not UTF-8 are themselves; other halves of pairs are no bytes of any path.
    kind = "surrogateescape" if "\udc80" <= sign <= "\udcff" else "surrogatepass"
    return "".join(f"\\x{byte:02x}" for byte in sign.encode("utf-8", kind))


def resume_command(folder: str | Path, overrides: Iterable[str] = (), allowed: Iterable[str] = ()) -> str:
    """Return the command that resumes the run in a folder, with those of `overrides` that have no effect on results.

    allowed: words that let the run do what it needs (`tune.config.recorded.orders_of`).
    """
    words = ["macdrop", "sweep", "--resume", f"output_dir={folder}"]
    for text in overrides:
        key = text.partition("=")[0].strip()
        if key in MACHINERY - {"output_dir"}:
            words.append(text)
    return shell_command(*dict.fromkeys((*words, *allowed)))


def check_same(folder: Path, started: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to resume a run with other settings that its results depend on.

    started, wanted: dumped run files.

    Raises:
        ConfigError: names each changed key, its value then and now, and the remedy.
    """
    lines = changes(_without_machinery(started), _without_machinery(wanted), MACHINERY)
    if not lines:
        return
    changed = "\n".join(lines.values())
    raise ConfigError(
        f"The run in {folder} was started with other settings:\n{changed}\nResume it with its own settings:\n"
        f"  {resume_command(folder)}\nor choose another output_dir for these."
    )


def _without_machinery(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run file without what may change in the `ray` of its models."""
    sweep = dict(config.get("sweep") or {})
    sweep["models"] = [_bare(entry) for entry in sweep.get("models") or ()]
    return {**config, "sweep": sweep}


def _bare(entry: Any) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    kept = {key: value for key, value in flatten(entry).items() if not key.startswith("ray.") or key in RESULTS}
    return kept["model_name_or_path"] if kept.keys() == {"model_name_or_path"} else kept


def changes(started: Mapping[str, Any], wanted: Mapping[str, Any], without: Iterable[str]) -> dict[str, str]:
    """Return a line for each dotted key, but those of `without`, that has another value in `wanted`."""
    then, now, without = flatten(started), flatten(wanted), frozenset(without)
    keys = [key for key in dict.fromkeys((*then, *now)) if key not in without and then.get(key) != now.get(key)]
    return {key: f"  {key}: {_shown(then, key)} when it was started, {_shown(now, key)} now" for key in keys}


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "nothing"
