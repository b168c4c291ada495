"""What `macdrop export` does: a finished trial as a folder for others, an adapter or merged weights, with a model card.

The folder is written beside its place and renamed when it is whole. Merged weights are read back from the disk and must
answer as base and adapter did.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from macdrop.errors import ConfigError
from tune.cli.console import console, line
from tune.config.run_spec import TrainSpec
from tune.errors import BenchmarkError, ResourceError
from tune.report.model_card import Exported, LogitCheck, model_card
from tune.storage.atomic import atomic_write_json, atomic_write_text, writing
from tune.storage.run_folder import BASE, RunFolder
from tune.storage.states import TaskState
from tune.training.quiet import quiet_libraries

if TYPE_CHECKING:
    import torch

#: Positions of real text that a logit check looks at, at most.
CHECKED = 512
FINISHED = (TaskState.DONE, TaskState.STOPPED)


def export(trial: Path, output: Path, *, merged: bool, push: str | None, private: bool) -> None:
    """Write `output`; see the module's docstring. With `push` it goes to that repository of the hub, too.

    Raises:
        ConfigError: the trial is none, or not finished; output is not empty; nobody may push from here.
        BenchmarkError: the merged weights answer otherwise; they are left for inspection.
        ResourceError: the disk, or the hub, does not take them.
    """
    content = read_trial(trial)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output} exists and is not empty. Choose another folder.")
    if push is None and private:
        raise ConfigError("--private is for a pushed repository. Add --push USER/NAME, or leave it out.")
    if push is not None:
        check_hub(push)
    quiet_libraries()
    check = None
    with _appearing(output) as folder:
        if merged:
            check = _write_merged(content, folder)
        else:
            _write_adapter(content, folder)
        atomic_write_text(folder / "README.md", model_card(content, merged=check, place=push or output.name))
    line("written", str(output))
    if check is not None:
        line("logit check", check.text)
        if not check.ok:
            raise BenchmarkError(
                f"The merged weights in {output} do not answer as base and adapter do: {check.text}.\n"
                "They were left there for inspection and were not pushed. Export the adapter instead (no --merged)."
            )
    if push is not None:
        _push(output, push, private)


# --- the trial ---


def read_trial(folder: Path) -> Exported:
    """A trial of a run, or the folder of `macdrop train`, with its scores and the verdict of its run.

    Raises:
        ConfigError: it is neither, it has not ended well, or its adapter is damaged.
    """
    from tune.config.messages import build
    from tune.storage.sealed_folder import verify

    for name in ("config.yaml", "trial.json"):
        if not (folder / name).is_file():
            hint = " Give one of the folders under its trials/." if (folder / "run.json").is_file() else ""
            ended = " It may not have ended yet." if name == "trial.json" and (folder / "config.yaml").is_file() else ""
            raise ConfigError(f"{folder} is no finished trial: it has no {name}.{ended}{hint}")
    try:
        info = json.loads((folder / "trial.json").read_text(encoding="utf-8"))
        spec = build(TrainSpec, yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{folder} is damaged: {error}") from error
    if info.get("status") not in FINISHED:
        reason = f" ({info['reason']})" if info.get("reason") else ""
        raise ConfigError(
            f"{folder} is not finished: its status is {info.get('status')!r}{reason}. "
            f"What can be exported is {' or '.join(FINISHED)}."
        )
    verify(folder / "adapter")
    frozen = folder / "reproduce.json"
    workers = json.loads(frozen.read_text(encoding="utf-8"))["workers"] if frozen.is_file() else None
    run_dir = folder.resolve().parents[1]
    if not (run_dir / "run.json").is_file():
        return Exported(folder, info.get("trial") or spec.trial_id(), spec, info, workers)
    run_folder = RunFolder.open(run_dir)
    rows = [row for row in run_folder.score_rows() if row["model"] == info["model"]]
    return Exported(
        folder,
        info["trial"],
        spec,
        info,
        workers,
        scores=[row for row in rows if row["trial"] == info["trial"]],
        base=[row for row in rows if row["trial"] == BASE],
        verdict=_verdicts(run_folder, info["model"]),
    )


def _verdicts(run_folder: RunFolder, model: str) -> list[str]:
    from tune.analysis.verdict import verdicts

    return [verdict.sentence for verdict in verdicts(run_folder, model) if verdict.arm == "macdrop"]


# --- what is written ---


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place when the block has ended well, and is gone otherwise."""
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
    """The adapter's own files; its configuration names the base as the run did, not as a path on this machine."""
    adapter = content.folder / "adapter"
    shutil.copy(adapter / "adapter_model.safetensors", folder)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": content.spec.model_name_or_path, "revision": content.spec.model_revision}
    atomic_write_json(folder / "adapter_config.json", config)


def _write_merged(content: Exported, folder: Path) -> LogitCheck:
    """Weights, tokenizer and configuration of the merged model into `folder`."""
    from peft import PeftModel

    from macdrop import load_model, load_tokenizer
    from tune.zoo.catalog import resolve

    spec = content.spec
    source, dtype = resolve(spec.model_name_or_path), "bfloat16" if spec.bf16 else "float32"
    loading = {"revision": spec.model_revision, "trust_remote_code": spec.trust_remote_code}
    with console.status("Merging"):
        tokenizer = load_tokenizer(source, **loading)
        base = load_model(source, dtype=dtype, attn_implementation=spec.attn_implementation, **loading)
        blocks = _blocks(base, tokenizer, spec.model_name_or_path)
        model = PeftModel.from_pretrained(base, content.folder / "adapter").eval()
        before = _logits(model, blocks)
        whole = model.merge_and_unload(safe_merge=True)
        whole.config.use_cache = True
        whole.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model, base, whole  # two of them may not fit
    with console.status("Checking what was written"):
        again = load_model(
            str(folder),
            dtype=dtype,
            attn_implementation=spec.attn_implementation,
            trust_remote_code=spec.trust_remote_code,
        )
        after = _logits(again.eval(), blocks)
    return LogitCheck(
        difference=float((after - before).abs().max()),
        largest=float(before.abs().max()),
        agreement=float((after.argmax(-1) == before.argmax(-1)).float().mean()),
        positions=before.shape[0] * before.shape[1],
        dtype=dtype,
    )


def _blocks(model: Any, tokenizer: Any, source: str) -> torch.Tensor:
    """Token ids (n, T) of real text, bos first: our story, or the zoo's text for its own models."""
    from macdrop.scan import choose_bos
    from tune.training.massive_weights import proof_blocks

    bos, _ = choose_bos(tokenizer, model.config)
    blocks = proof_blocks(model, tokenizer, bos, text=None, source=source)
    return blocks[: max(1, CHECKED // blocks.shape[1])]


def _logits(model: Any, blocks: torch.Tensor) -> torch.Tensor:
    """(n, T, vocabulary), fp32 on the CPU."""
    import torch

    with torch.no_grad():
        rows = [model(input_ids=block[None].to(model.device), use_cache=False).logits for block in blocks]
    return torch.cat(rows).float().cpu()


# --- the hub ---


def check_hub(repository: str) -> None:
    """Refuse before anything is written what the hub would refuse afterwards.

    Raises:
        ConfigError: the name is no USER/NAME, the hub is switched off, or nobody is logged in.
    """
    import huggingface_hub

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ConfigError(f"--push {repository!r} is no repository of the hub. Write USER/NAME.")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ConfigError("--push needs the hub, and HF_HUB_OFFLINE switches it off. Unset it, or leave --push out.")
    if huggingface_hub.get_token() is None:
        raise ConfigError("--push needs an account on the hub. Run `hf auth login`, or set HF_TOKEN.")


def _push(folder: Path, repository: str, private: bool) -> None:
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        with console.status(f"Pushing to {repository}"):
            api.create_repo(repository, private=private, exist_ok=True)
            done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="macdrop export")
    except (OSError, ValueError, RuntimeError) as error:  # its own errors are HTTP errors, which are OSErrors
        told = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise ResourceError(
            f"The hub did not take {repository}: {told}\n"
            f"{folder} is whole; try again with: hf upload {repository} {folder}"
        ) from error
    line("pushed", str(done.commit_url))
