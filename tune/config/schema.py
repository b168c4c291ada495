"""The JSON Schema of a run file, made from the fields; editors complete and check run files with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from macdrop.attack import ATTACKS, NONE
from macdrop.config import SCOPES
from macdrop.schedules import SCHEDULES
from tune.config.eval_entries import ENTRIES, OWN_METRIC, TEXT_METRICS
from tune.config.parse import ALIASES
from tune.config.run_spec import RunSpec, searchable
from tune.config.sections import ARMS, Arm, MacDropSpec
from tune.config.train.data_keys import ASKING_TEMPLATES, TEMPLATE_FILES, TEMPLATES, WEIGHT_KEY
from tune.config.train_spec import TrainSpec

Schema = dict[str, Any]

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_TEXT: Schema = {"type": "string", "minLength": 1}
_NULL: Schema = {"type": "null"}
_SPACE: Schema = {"anyOf": [{"type": "array", "minItems": 1}, {"$ref": "#/$defs/Space"}]}


def _entry_models() -> dict[str, str]:
    """The name of the model behind each section of an eval block."""
    return {section: entry.__name__ for section, entry in ENTRIES.items()}


def json_schema() -> Schema:
    """Return the JSON Schema (draft 2020-12) of a run file, with every accepted shorthand, alias and dotted key."""
    raw = RunSpec.model_json_schema()
    defs = raw["$defs"]
    for part in (raw, *defs.values()):
        _tidy(part)
    _name_choices(raw, defs)
    _accept_shorthands(raw, defs)
    defs["TrainKeys"] = _train_keys(raw["properties"])
    return {
        "$schema": DRAFT,
        "title": "A run of macdrop",
        "type": "object",
        "properties": raw["properties"],
        "patternProperties": _aliases(raw["properties"]) | _dotted(defs),
        "additionalProperties": False,
        "$defs": defs,
    }


def _tidy(part: Schema) -> None:
    """Drop the titles that pydantic makes from names, and the docstrings of models, which are for developers."""
    for name in ("title", "description"):
        part.pop(name, None)
    for field in part["properties"].values():
        field.pop("title", None)


def _name_choices(run: Schema, defs: dict[str, Schema]) -> None:
    """List the values of fields that hold a registered name, which are plain texts to pydantic."""
    endings = "|".join(ending.removeprefix(".") for ending in TEMPLATE_FILES)
    file = {"type": "string", "pattern": f"\\.({endings})$"}
    _replace(run["properties"]["template"], [{"enum": list(TEMPLATES)}, file])
    _replace(defs["Generation"]["properties"]["template"], [{"enum": list(ASKING_TEMPLATES)}, file])
    defs["MacDropSpec"]["properties"]["schedule"]["enum"] = list(SCHEDULES)
    defs["MacDropSpec"]["properties"]["scope"]["enum"] = list(SCOPES)
    defs["SweepSpec"]["properties"]["arms"]["items"] = {"enum": [Arm.BASE, Arm.PLAIN, *ARMS]}
    metrics = next(form for form in defs["Generation"]["properties"]["metrics"]["anyOf"] if form["type"] == "array")
    metrics["items"] = {"anyOf": [{"enum": list(TEXT_METRICS)}, {"type": "string", "pattern": OWN_METRIC}]}
    attack = {"type": "string", "pattern": f"^({NONE}|({'|'.join(ATTACKS)})@[0-9]+)$"}
    for name in ("EvalSpec", *_entry_models().values()):
        field = defs[name]["properties"]["attacks"]
        _replace(field, [*_one_or_several(attack), *([_NULL] if name != "EvalSpec" else [])])


def _accept_shorthands(run: Schema, defs: dict[str, Schema]) -> None:
    """Add the forms that validators of the models rewrite before pydantic sees them."""
    trackers = run["properties"]["report_to"]
    names = trackers["items"]["enum"]
    _replace(trackers, [{"enum": [*names, "none"]}, {"type": "array", "items": {"enum": names}}])
    _accept_suites(defs["EvalSpec"]["properties"])
    _accept_single_values(defs)
    sweep = defs["SweepSpec"]["properties"]
    one = [_TEXT, {"$ref": "#/$defs/TrainKeys"}]
    _replace(sweep["models"], [*one, {"type": "array", "items": {"anyOf": one}}])
    _replace(sweep["metric"], _one_or_several({"$ref": "#/$defs/Metric"}))
    sweep["parameters"] = _parameters(sweep["parameters"])


def _accept_suites(evaluation: dict[str, Schema]) -> None:
    """Let sections be names, lists of names or mappings, and leave entries of suites out by `off`."""
    _replace(evaluation["suite"], [*_one_or_several(_TEXT), _NULL])
    _replace(evaluation["local"], [_TEXT, _NULL])
    _replace(evaluation["judge"], [{"$ref": "#/$defs/JudgeSpec"}, _TEXT, _NULL])
    for section, model in _entry_models().items():
        # false is `off`. A text is the entry's data.
        entry = {"anyOf": [{"$ref": f"#/$defs/{model}"}, _TEXT, _NULL, {"const": False}]}
        named = {"type": "object", "additionalProperties": entry}
        _replace(evaluation[section], [named, {"type": "array", "items": {"anyOf": [_TEXT, named]}}, _TEXT, _NULL])


def _accept_single_values(defs: dict[str, Schema]) -> None:
    """Let one file or text stand for a list of them, and entries leave out the data that a suite has."""
    listed = {"ZeroShot": ("data", "fewshot_data"), "Perplexity": ("data",), "Generation": ("data", "stop")}
    for model, keys in listed.items():
        required = defs[model].pop("required", ())
        for key in keys:
            field = defs[model]["properties"][key]
            optional = [_NULL] if key not in required and field.get("default", "") is None else []
            _replace(field, [*_one_or_several(_TEXT, empty=key == "stop"), *optional])
    limit = defs["Generation"]["properties"]["limit"]
    _replace(limit, [*limit["anyOf"], {"type": "string", "pattern": "^\\s*[0-9]+ per category\\s*$"}])


def _parameters(field: Schema) -> Schema:
    """Return the schema of `sweep.parameters`: dotted keys, aliases, and a block for those of `macdrop`."""
    names = searchable()
    inner = [name.removeprefix("macdrop.") for name in names if name.startswith("macdrop.")]
    block = {"type": "object", "properties": dict.fromkeys(inner, _SPACE), "additionalProperties": False}
    return {key: field[key] for key in ("type", "description", "default") if key in field} | {
        "properties": dict.fromkeys(names, _SPACE) | {"macdrop": block},
        "patternProperties": {_exactly(alias): _SPACE for alias, name in ALIASES.items() if name in names}
        | {f"^{WEIGHT_KEY}$": _SPACE},
        "additionalProperties": False,
    }


def _train_keys(properties: dict[str, Schema]) -> Schema:
    """Return the schema of a model under `sweep.models`."""
    own = {name: properties[name] for name in TrainSpec.model_fields}
    dotted = {_exactly(f"macdrop.{name}"): _at("MacDropSpec", name) for name in MacDropSpec.model_fields}
    return {
        "type": "object",
        "properties": own,
        "patternProperties": _aliases(own) | dotted,
        "additionalProperties": False,
    }


def _aliases(properties: dict[str, Schema]) -> dict[str, Schema]:
    """Return other tools' names, as patterns: editors accept them but do not offer them."""
    found = {_exactly(alias): properties[name] for alias, name in ALIASES.items() if name in properties}
    if "ray" in properties:
        nested = {alias: name.split(".") for alias, name in ALIASES.items() if name.startswith("ray.")}
        found |= {_exactly(alias): _at("RaySpec", name) for alias, (_, name) in nested.items()}
    return found


def _dotted(defs: dict[str, Schema]) -> dict[str, Schema]:
    """Return the dotted keys at the top of a file."""
    found: dict[str, Schema] = {}
    for block, model in (("macdrop", "MacDropSpec"), ("sweep", "SweepSpec"), ("ray", "RaySpec")):
        found |= {_exactly(f"{block}.{key}"): _at(model, key) for key in defs[model]["properties"]}
    found[f"^sweep\\.parameters\\.({_any_of(searchable())}|{WEIGHT_KEY})$"] = _SPACE
    found |= {_exactly(f"sweep.metric.{key}"): _at("Metric", key) for key in defs["Metric"]["properties"]}
    block = "^(eval|validation)\\."
    found |= {f"{block}{key}$": _at("EvalSpec", key) for key in defs["EvalSpec"]["properties"]}
    found |= {f"{block}judge\\.{key}$": _at("JudgeSpec", key) for key in defs["JudgeSpec"]["properties"]}
    server = defs["GenerationServer"]["properties"]
    found |= {f"{block}generation_server\\.{key}$": _at("GenerationServer", key) for key in server}
    for section, model in _entry_models().items():
        found[f"{block}{section}\\.[^.]+$"] = {
            "$ref": f"#/$defs/EvalSpec/properties/{section}/anyOf/0/additionalProperties"
        }
        found |= {f"{block}{section}\\.[^.]+\\.{key}$": _at(model, key) for key in defs[model]["properties"]}
    return found


def _at(model: str, key: str) -> Schema:
    return {"$ref": f"#/$defs/{model}/properties/{key}"}


def _exactly(name: str) -> str:
    return f"^{_any_of([name])}$"


def _any_of(names: Iterable[str]) -> str:
    return "|".join(name.replace(".", "\\.") for name in names)


def _one_or_several(item: Schema, *, empty: bool = False) -> list[Schema]:
    return [item, {"type": "array", "items": item} | ({} if empty else {"minItems": 1})]


def _replace(field: Schema, options: list[Schema]) -> None:
    """Replace the allowed forms of a field; its description and default are kept."""
    kept = {key: field[key] for key in ("description", "default") if key in field}
    field.clear()
    field.update(kept | {"anyOf": options})
