"""The user's own code and tasks on their way: recorded with a run, and laid out where its actors are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from macdrop.errors import ConfigError
from tune.config.eval_spec import EvalSpec
from tune.config.run_spec import RunSpec
from tune.evaluation.own.code_files import CodeFiles, code_of, folder_of


@dataclass(frozen=True)
class OwnFiles:
    """Files behind the own metrics of a block, and its folder of lm-eval tasks."""

    metrics: CodeFiles | None
    tasks: CodeFiles | None

    @property
    def version(self) -> str:
        """The fingerprint of all files."""
        parts = {"metrics": self.metrics, "tasks": self.tasks}
        found = {f"{key}/{name}": part.files[name] for key, part in parts.items() if part for name in part.files}
        return CodeFiles(found).version


def own_files(block: EvalSpec) -> OwnFiles | None:
    """Read the files behind the own measures of a block; None without any.

    Raises:
        ConfigError: a module or the folder is missing, or the files are not those that the block was recorded with.
    """
    if not (block.own_metrics or block.task_path):
        return None
    modules = dict.fromkeys(name.partition(":")[0] for name in block.own_metrics)
    found = OwnFiles(
        code_of(Path(block.code_path or Path.cwd()), modules) if modules else None,
        folder_of(Path(block.task_path)) if block.task_path else None,
    )
    if block.code_version not in (None, found.version):
        raise ConfigError(
            f"The files behind your own measures in {block.code_path or block.task_path} have changed: their "
            f"fingerprint is {found.version}, and code_version, recorded with the run, is {block.code_version}.\n"
            "Scores of the two cannot be compared. Restore the files, or start another run (without code_version)."
        )
    return found


def recorded(spec: RunSpec) -> RunSpec:
    """Return a run with the fingerprint of the own files in each block, so that a resumed run has the same."""
    named = {}
    for name in ("eval", "validation"):
        block: EvalSpec = getattr(spec, name)
        if files := own_files(block):
            named[name] = block.model_copy(update={"code_version": files.version})
    return spec.model_copy(update=named) if named else spec


def at_home(block: EvalSpec, files: OwnFiles | None) -> EvalSpec:
    """Return a block that reads the files which have travelled here."""
    parts = {"code_path": files and files.metrics, "task_path": files and files.tasks}
    places = {key: str(part.lay_out()) for key, part in parts.items() if part}
    return block.model_copy(update=places) if places else block
