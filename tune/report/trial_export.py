"""A finished trial as a folder for others: a PEFT adapter or merged weights, with a model card.

The folder is written next to its place and renamed when it is complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from macdrop.errors import ConfigError
from tune.analysis.verdict import verdicts
from tune.config.messages import build
from tune.config.resume import shell_command
from tune.config.run_spec import TrainSpec
from tune.config.sections import Arm
from tune.errors import ResourceError
from tune.evaluation.merging import LogitCheck, write_merged
from tune.report.model_card import Exported, model_card
from tune.storage.atomic import atomic_write_json, atomic_write_text, read_mapping, writing
from tune.storage.run_folder import BASE, RunFolder
from tune.storage.sealed_folder import verify
from tune.storage.states import TaskState
from tune.storage.trial_folder import TrialFolder
from tune.training.trial_setup import SETUP, read_setup

FINISHED = (TaskState.DONE, TaskState.STOPPED)


def read_trial(folder: Path) -> Exported:
    """Read a trial of a run, or the folder of `macdrop train`, with its scores and the verdict of its run.

    Raises:
        ConfigError: it is neither, or did not finish. CheckpointError: its adapter is damaged.
    """
    for name in ("config.yaml", "trial.json"):
        if not (folder / name).is_file():
            hint = " Give one of the folders under its trials/." if (folder / "run.json").is_file() else ""
            ended = " It may not have ended yet." if name == "trial.json" and (folder / "config.yaml").is_file() else ""
            raise ConfigError(f"{folder} is not a finished trial: it has no {name}.{ended}{hint}")
    try:
        info = json.loads((folder / "trial.json").read_text(encoding="utf-8"))
        spec = build(TrainSpec, read_mapping(folder / "config.yaml"))
    except ValueError as error:
        raise ConfigError(f"{folder} is damaged: {error}") from error
    if info.get("status") not in FINISHED:
        reason = f" ({info['reason']})" if info.get("reason") else ""
        raise ConfigError(
            f"{folder} is not finished: its status is {info.get('status')!r}{reason}. "
            f"What can be exported is {' or '.join(FINISHED)}."
        )
    verify(TrialFolder(folder).adapter_dir)
    setup = read_setup(folder) if (folder / SETUP).is_file() else {}
    workers, data = setup.get("workers_at_start", setup.get("workers")), setup.get("data") or {}
    run_dir = folder.resolve().parents[1]
    if not (run_dir / "run.json").is_file():
        return Exported(folder, info.get("trial") or spec.trial_id(), spec, info, workers, data=data)
    run_folder = RunFolder.open(run_dir)
    rows = [row for row in run_folder.score_rows() if row["model"] == info["model"]]
    return Exported(
        folder,
        info["trial"],
        spec,
        info,
        workers,
        data=data,
        scores=[row for row in rows if row["trial"] == info["trial"]],
        base=[row for row in rows if row["trial"] == BASE],
        verdict=_verdicts(run_folder, info["model"]),
    )


def _verdicts(run_folder: RunFolder, model: str) -> list[str]:
    return [verdict.sentence for verdict in verdicts(run_folder, model) if verdict.arm == Arm.MACDROP]


# --- the folder ---


def write_export(content: Exported, output: Path, *, merged: bool, place: str) -> LogitCheck | None:
    """Write a trial's adapter, or merged weights, with a model card that loads them from `place`.

    Returns:
        Of merged weights the check that they answer as base and adapter did.

    Raises:
        BenchmarkError: they do not; no folder is left. ResourceError: the folder cannot be written.
    """
    check = None
    with _appearing(output) as folder:
        if merged:
            check = write_merged(content.spec, TrialFolder(content.folder).adapter_dir, folder)
        else:
            _write_adapter(content, folder)
        atomic_write_text(folder / "README.md", model_card(content, merged=check, place=place))
    return check


def check_output_folder(output: Path) -> None:
    """Raise a ConfigError for an output that exists and is not an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output} exists and is not empty. Choose another folder.")


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """Yield a folder next to `output` that takes its place if the block succeeds, and is removed otherwise."""
    staging = output.absolute().with_name(f".tmp-{output.name}-{os.getpid()}")
    with writing(output):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            yield staging
            if output.exists():
                output.rmdir()  # it is empty
            os.replace(staging, output)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def _write_adapter(content: Exported, folder: Path) -> None:
    """Write the adapter's own files; its configuration names the base as the run did, not by a path of this machine."""
    adapter = TrialFolder(content.folder).adapter_dir
    shutil.copy(adapter / "adapter_model.safetensors", folder)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": content.spec.model_name_or_path, "revision": content.spec.model_revision}
    atomic_write_json(folder / "adapter_config.json", config)


# --- the hub ---


def check_hub(repository: str) -> None:
    """Refuse a push that the hub would refuse, before anything is written.

    Raises:
        ConfigError: the name is not USER/NAME, the hub is switched off, or nobody is logged in.
    """
    import huggingface_hub

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ConfigError(f"--push {repository!r} is not a repository of the hub. Write USER/NAME.")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ConfigError("--push needs the hub, and HF_HUB_OFFLINE switches it off. Unset it, or leave --push out.")
    if huggingface_hub.get_token() is None:
        raise ConfigError("--push needs an account on the hub. Run `hf auth login`, or set HF_TOKEN.")


def push_folder(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a folder to the hub and return the URL of the commit.

    Raises:
        ResourceError: the hub does not accept it.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="macdrop export")
    except (OSError, ValueError, RuntimeError) as error:  # its own errors are HTTP errors, which are OSErrors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise ResourceError(
            f"The hub did not accept {repository}: {reason}\n"
            f"{folder} is whole; try again with: {shell_command('hf', 'upload', repository, folder)}"
        ) from error
    return str(done.commit_url)
