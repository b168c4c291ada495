"""The script in every trial's folder that trains its adapter again without Ray, and what that script does.

`write_script` runs when a trial starts. What is frozen then is config.yaml (the effective settings, written by whoever
starts the trial) and reproduce.json: workers, threads, what the data and the base were, versions. Paths inside the run
folder are kept relative to the trial's, so the run can be moved.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from macdrop.errors import ConfigError, MacDropError, NoMassiveWeights
from tune.storage.atomic import atomic_write_json, atomic_write_text
from tune.training.observer import Word

if TYPE_CHECKING:
    from macdrop import MassiveWeights
    from tune.config.run_spec import TrainSpec
    from tune.data.dataset import Prepared

SCRIPT, FROZEN, ADAPTER = "reproduce.py", "reproduce.json", "adapter_model.safetensors"
#: What the bits of an adapter depend on beside settings, data, threads and machine.
PACKAGES = ("macdrop", "torch", "transformers", "peft", "deepspeed", "numpy")
_TEXT = '''"""Trains the adapter of this folder again, without Ray, and says whether it is the same to the bit.

    {command}

Settings are in config.yaml, the rest in {frozen}. The new adapter goes to reproduced/. If data or model have moved
since, say where they are: dataset=PATH model_name_or_path=PATH.
"""

import sys
from pathlib import Path

from tune.reproduce import reproduce

if __name__ == "__main__":
    sys.exit(reproduce(Path(__file__).parent, sys.argv[1:]))
'''


def write_script(folder: Path, data: Prepared, weights: MassiveWeights | None, scan: Path, workers: int) -> None:
    """Write reproduce.py and reproduce.json into a trial's folder.

    weights: the massive weights that the trial uses, if it does, and `scan` the file that they are in.
    """
    import torch

    command = f"python {SCRIPT}" if workers == 1 else f"torchrun --nproc_per_node {workers} {SCRIPT}"
    frozen = {
        "command": command,
        "workers": workers,
        "threads": torch.get_num_threads(),
        "directory": os.getcwd(),
        "data": {key: data.info[key] for key in ("key", "examples", "tokens", "label_tokens")},
        "weights": os.path.relpath(scan, folder) if weights else None,
        "fingerprint": weights.fingerprint if weights else None,
        **surroundings(),
    }
    atomic_write_json(folder / FROZEN, frozen)
    atomic_write_text(folder / SCRIPT, _TEXT.format(command=command, frozen=FROZEN))


def surroundings() -> dict[str, Any]:
    """Versions and device of this process: where any differs, bits may."""
    import torch

    from tune.storage.environment import version

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"cpu {platform.machine()}"
    return {"device": device, "versions": {name: version(name) for name in PACKAGES}}


def reproduce(folder: Path, overrides: Iterable[str] = ()) -> int:
    """Train the trial of `folder` again into its reproduced/; on every rank alike.

    Returns:
        0 if the adapter equals the recorded one to the bit, or there is none to compare with; 1 if it differs.

    A refusal (files missing, another number of workers, other data) is printed; the exit code is then 2.
    """
    try:
        return _reproduce(folder.absolute(), list(overrides))
    except MacDropError as error:
        print(f"{SCRIPT}: {error}", file=sys.stderr)
        return 2


def _reproduce(folder: Path, overrides: list[str]) -> int:
    from tune.config.run_spec import TrainSpec, load
    from tune.training.quiet import quiet_libraries

    frozen = _frozen(folder)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != frozen["workers"]:
        raise ConfigError(
            f"The adapter was trained on {frozen['workers']} worker(s), and this is a run on {world}: other batches. "
            f"Run: {frozen['command']}"
        )
    spec = load(folder / "config.yaml", overrides, kind=TrainSpec)
    stop_at = _recorded_step(folder)
    if not overrides and os.path.isdir(frozen["directory"]):
        os.chdir(frozen["directory"])  # local data and models may be named relative to it
    quiet_libraries()
    first = int(os.environ.get("RANK", "0")) == 0
    for text in _differences(frozen) if first else ():
        print(f"differs      {text}")
    outcome = _train(folder, spec, frozen, stop_at)
    if not first:
        return 0
    print(f"trained      {outcome.step} of {outcome.total_steps} steps in {outcome.seconds:.1f} s")
    return _compare(folder / "adapter", folder / "reproduced" / "adapter")


def _train(folder: Path, spec: TrainSpec, frozen: dict[str, Any], stop_at: int | None) -> Any:
    import torch.distributed as dist

    from tune.data import dataset as data
    from tune.storage.cache import cache_dir
    from tune.training.engine import Engine
    from tune.training.finetune import finetune
    from tune.training.process_group import prepare_process

    alone = not dist.is_initialized()
    prepare_process(frozen["threads"])
    weights = _weights(folder, spec, frozen) if frozen["fingerprint"] else None
    engine = Engine(spec)
    prepared = data.load(data.prepare(spec, engine.tokenizer, cache_dir() / "data"))
    if prepared.info["key"] != frozen["data"]["key"]:
        there, here = frozen["data"], prepared.info
        raise ConfigError(
            f"The data are not those of the trial: it had {there['examples']} examples with {there['tokens']} tokens, "
            f"here are {here['examples']} with {here['tokens']}.\nFind the files as they were, or say: dataset=PATH."
        )
    target = folder / "reproduced"
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
    dist.barrier()

    def watch(metrics: dict[str, Any]) -> Word:
        if metrics["step"]:
            print(f"step {metrics['step']}  loss {metrics['loss']:.4f}", flush=True)
        # A wish to stop is heard at the next step: a trial that was stopped at step n was told so at n - 1 at latest.
        return Word.GO_ON if stop_at is None or metrics["step"] + 1 < stop_at else Word.STOP

    spec = spec.model_copy(update={"save_steps": 0})
    outcome = finetune(engine, spec, prepared, target, weights=weights, observe=watch, resume=False)
    if alone:
        dist.destroy_process_group()
    return outcome


def _weights(folder: Path, spec: TrainSpec, frozen: dict[str, Any]) -> MassiveWeights:
    """The scan that the trial used, else the same found anew in the same checkpoint."""
    from macdrop import MassiveWeights
    from tune.training.massive_weights import scanned

    try:
        weights = MassiveWeights.load(folder / frozen["weights"])
    except NoMassiveWeights:
        weights = scanned(spec)
    weights.check(frozen["fingerprint"])
    return weights


def _frozen(folder: Path) -> dict[str, Any]:
    missing = [name for name in (FROZEN, "config.yaml") if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{folder} lacks {' and '.join(missing)}. Run the script inside of the trial's own folder.")
    return json.loads((folder / FROZEN).read_text(encoding="utf-8"))


def _recorded_step(folder: Path) -> int | None:
    """The step after which the trial was stopped early; None if it ran to its end."""
    file = folder / "trial.json"
    info = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    step, total = info.get("step"), info.get("total_steps")
    return step if step is not None and total is not None and step < total else None


def _differences(frozen: dict[str, Any]) -> list[str]:
    here = surroundings()
    told = [f"device: {frozen['device']} then, {here['device']} now"] if frozen["device"] != here["device"] else []
    for name, now in here["versions"].items():
        then = frozen["versions"].get(name)
        told += [f"{name}: {then} then, {now} now"] if then != now else []
    return told


def _compare(recorded: Path, made: Path) -> int:
    """Say whether two adapters are the same bytes; otherwise by how much their numbers differ."""
    from tune.storage.sealed_folder import sha256

    digest = sha256(made / ADAPTER)
    print(f"adapter      {made}")
    print(f"sha256       {digest}")
    if not (recorded / ADAPTER).is_file():
        print(f"recorded     none in {recorded}: nothing to compare with")
        return 0
    if sha256(recorded / ADAPTER) == digest:
        print("equal        the recorded adapter has the same bytes")
        return 0
    print(f"different    the recorded adapter has sha256 {sha256(recorded / ADAPTER)}{_distance(recorded, made)}")
    return 1


def _distance(recorded: Path, made: Path) -> str:
    from safetensors.torch import load_file

    then, now = (load_file(folder / ADAPTER) for folder in (recorded, made))
    if {name: tensor.shape for name, tensor in then.items()} != {name: tensor.shape for name, tensor in now.items()}:
        return "; it has other tensors"
    largest = max(float((then[name].float() - now[name].float()).abs().max()) for name in then)
    return f"; the largest difference of an entry is {largest:.3g}"
