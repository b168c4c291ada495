"""`macdrop zoo list`: the built-in models and data."""

from __future__ import annotations

from tune.cli.console import lines


def zoo_list() -> None:
    from tune.zoo.catalog import PREFIX, ZOO, ZOO_DATA

    told = {True: "sensitive", False: "not sensitive", None: "judge"}
    models = [(PREFIX + model.name, f"{model.description} ({told[model.sensitive]})") for model in ZOO.values()]
    lines([*models, *((PREFIX + data.name, f"{data.kind}: {data.description}") for data in ZOO_DATA.values())])
