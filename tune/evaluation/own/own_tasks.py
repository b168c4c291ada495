"""Tasks of the user's own, as lm-eval's YAML files in a folder. Loads no lm-eval."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from macdrop.errors import ConfigError, nearest
from tune.config.eval_spec import EvalSpec
from tune.evaluation import catalogue
from tune.evaluation.own.code_files import CodeFiles, code_of, folder_of

#: Values of `dataset_path` by which `datasets` reads files, and no data set of the Hub.
BUILDERS = ("arrow", "csv", "json", "parquet", "text")


def names_in(folder: str | None) -> dict[str, Path | None]:
    """Return the names of the tasks, groups and tags of a folder; the path is given for single tasks only.

    Raises:
        ConfigError: two files define the same task.
    """
    names: dict[str, Path | None] = {}
    for file in sorted(Path(folder).rglob("*.yaml")) if folder else []:
        for name, single in catalogue.names_of(file):
            if single and names.get(name) is not None:
                raise ConfigError(f"task_path: {names[name]} and {file} both define the task {name!r}. Rename one.")
            if single or name not in names:
                names[name] = file if single else None
    return names


def find_task(name: str, folder: str | None, *, by_path: bool = False) -> Path | None:
    """Return the YAML file of a single task: one of `folder`, else lm-eval's own (see `catalogue.find_task`)."""
    return names_in(folder).get(name) or catalogue.find_task(name, by_path=by_path)


def is_own(name: str, folder: str | None) -> bool:
    """Return whether the folder defines a task, group or tag of this name."""
    return name in names_in(folder)


def check_tasks(spec: EvalSpec) -> None:
    """Check the folder of tasks of a block: what it defines, and that the block uses it.

    Raises:
        ConfigError: none of its tasks is listed, one of them has the name of lm-eval's own, or a file cannot be read.
    """
    if not spec.task_path:
        return
    folder_of(Path(spec.task_path))
    names = names_in(spec.task_path)
    listed = [entry.task or name for name, entry in spec.zero_shot.items()]
    used = [name for name in listed if name in names]
    if not used:
        hint = "".join(dict.fromkeys(nearest(name, names) for name in listed))
        raise ConfigError(
            f"task_path: {spec.task_path} defines none of the tasks under zero_shot ({', '.join(listed)}).{hint} It "
            f"has {', '.join(names) or 'no task at all'}."
        )
    for name in used:
        if catalogue.find_task(name, by_path=True):
            raise ConfigError(
                f"task_path: {spec.task_path} defines a task {name!r}, and so does lm-eval. Give yours another name, "
                "so that scores of the two are not taken for the same."
            )
        if (file := names[name]) is not None:
            task_version(file, spec.task_path)
        elif outside := [file for file in names.values() if file and _local_data(_read(file))]:
            raise ConfigError(
                f"zero_shot.{name}: {name!r} is a group, and {outside[0]} names its data by a path in the folder. List "
                "the tasks themselves."
            )


def task_version(file: Path | None, folder: str) -> str:
    """Return the fingerprint of a task: its YAML with what it includes, its functions and data in the folder.

    file: None for a group, whose fingerprint is that of the whole folder.

    Raises:
        ConfigError: a file cannot be read.
    """
    if file is None:
        return folder_of(Path(folder)).version
    contents = dict(_contents(file, Path(folder)))
    for data in _local_data(_read(file)):
        place = file.parent / data
        if not place.exists():
            raise ConfigError(f"task_path: {file} names the data {data!r}, which are not beside it.")
        for part in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if part.is_file():
                contents[_below(part, Path(folder))] = part.read_bytes()
    return CodeFiles(contents).version


def _contents(file: Path, folder: Path) -> Iterator[tuple[str, bytes]]:
    yield _below(file, folder), file.read_bytes()
    definition = _read(file, merged=False)
    includes = definition.get("include", [])
    for include in [includes] if isinstance(includes, str) else includes:
        if not (file.parent / include).is_file():
            raise ConfigError(f"task_path: {file} includes {include!r}, which is not beside it.")
        yield from _contents((file.parent / include).resolve(), folder)
    for function in _functions(definition):
        module = function.rpartition(".")[0]
        if module and (file.parent / f"{module.replace('.', '/')}.py").is_file():
            code = code_of(file.parent, [module])
            yield from ((_below(file.parent / name, folder), content) for name, content in code.files.items())


def _below(file: Path, folder: Path) -> str:
    inside = file.resolve().is_relative_to(folder.resolve())
    return file.resolve().relative_to(folder.resolve()).as_posix() if inside else file.name


def _read(file: Path, *, merged: bool = True) -> dict[str, Any]:
    try:
        definition = catalogue.read_definition(file) if merged else catalogue.read_plain(file)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"task_path: {file} cannot be read as YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(definition, dict):
        raise ConfigError(f"task_path: {file} does not hold keys and values, as a task of lm-eval does.")
    return definition


def _functions(value: Any) -> Iterator[str]:
    if isinstance(value, catalogue.Function):
        yield str(value)
    elif isinstance(value, (list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _functions(each)


def _local_data(definition: Mapping[str, Any]) -> list[str]:
    """List the files that a definition names by relative paths; those of a Hub data set are the Hub's."""
    if definition.get("dataset_path") not in BUILDERS:
        return []
    given = (definition.get("dataset_kwargs") or {}).get("data_files")
    listed = list(given.values()) if isinstance(given, dict) else [given]
    flat = [each for part in listed for each in (part if isinstance(part, list) else [part])]
    return [each for each in flat if isinstance(each, str) and _is_relative(each)]


def _is_relative(path: str) -> bool:
    return not (Path(path).is_absolute() or "://" in path)


def beside(definition: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return a task's definition with its relative data files looked for beside its YAML, wherever the process is."""
    if not _local_data(definition):
        return definition

    def absolute(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: absolute(each) for key, each in value.items()}
        if isinstance(value, list):
            return [absolute(each) for each in value]
        return str(file.parent / value) if isinstance(value, str) and _is_relative(value) else value

    kwargs = definition["dataset_kwargs"]
    return definition | {"dataset_kwargs": kwargs | {"data_files": absolute(kwargs["data_files"])}}


def reads_local_data(file: Path) -> bool:
    """Return whether a task reads data files of its folder, and none of the Hub."""
    return bool(_local_data(_read(file)))
