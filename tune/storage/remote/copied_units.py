"""The units of a run folder that are copied, each whole or not at all, and the manifests that seal them. Pure.

    trials/NAME    a finished trial without its checkpoints
    models/NAME    findings on a model, and answers of the base model
    run            run.json, config.yaml, environment.json, scores.jsonl, times.jsonl
    report         the report in all formats, and its figures

Objects have the names of the files, so that a copy can be read as it is. The manifest of a unit is the object
`sync/UNIT.json`, written last. Before objects of a sealed unit are overwritten, its manifest lists both contents.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict

from tune.storage.atomic import Stamp, read_mapping
from tune.storage.environment import ENVIRONMENT_FILE
from tune.storage.json_lines import GrowingFile
from tune.storage.records import SCORES_FILE, TIMES_FILE, Inside
from tune.storage.states import TaskState
from tune.storage.trial_folder import TrialFiles

MANIFESTS = "sync"
OWNER = f"{MANIFESTS}/owner.json"
RUN, REPORT = "run", "report"
_TRIALS = "trials/"
RUN_FILES = ("config.yaml", ENVIRONMENT_FILE, TIMES_FILE, SCORES_FILE, "run.json")
REPORTS = ("report.*", "figures/**/*", "pages/*.html")
#: Folders of a trial or model that serve this machine alone.
_LOCAL = frozenset({"checkpoints", "stacks", "reproduced"})
#: Trials that are settled and are looked through again in a pass, in turn.
LOOKS = 200
UnitStamp = tuple[tuple[str, int, int], ...]


class Content(BaseModel):
    """One file of a unit; `size` is in bytes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    sha256: str
    size: int


class Manifest(BaseModel):
    """The files of a unit by their path in the run folder. `before`: what they were, while they are overwritten."""

    model_config = ConfigDict(extra="forbid", strict=True)

    files: dict[Inside, Content]
    before: dict[Inside, Content] | None = None

    def encoded(self) -> bytes:
        return (self.model_dump_json(indent=1, exclude_none=True) + "\n").encode()

    @classmethod
    def decoded(cls, unit: str, content: bytes) -> Manifest:
        """Read a manifest. Raises ValueError: it is damaged, or lists a file that is not of the unit."""
        found = cls.model_validate_json(content)
        for path in (*found.files, *(found.before or ())):
            if not belongs(path, unit):
                raise ValueError(f"{path!r:.80} is not a file of {unit}")
        return found


@dataclass(frozen=True)
class Unit:
    """Files that are copied together.

    `record`: the stamp of trial.json from before the files were listed, None of what is not an ended trial. The files
    of an ended trial do not change while they are copied, unless all start again.
    """

    name: str
    files: Mapping[str, Path]
    record: Stamp | None = None

    @property
    def ended(self) -> bool:
        """True for an ended trial."""
        return self.record is not None

    def stamp(self) -> UnitStamp:
        """Return path, size and time of each file: what changes with them. Raises FileNotFoundError."""
        states = ((path, os.stat(file)) for path, file in self.files.items())
        return tuple((path, state.st_size, state.st_mtime_ns) for path, state in states)


def manifest_key(unit: str) -> str:
    return f"{MANIFESTS}/{unit}.json"


def unit_of(key: str) -> str:
    """Return the unit of a manifest's key."""
    return key.removeprefix(f"{MANIFESTS}/").removesuffix(".json")


def belongs(path: str, unit: str) -> bool:
    """Return whether a path in the run folder is one of a unit's."""
    if unit == RUN:
        return path in RUN_FILES
    if unit == REPORT:
        return PurePosixPath(path).parts[0] in ("figures", "pages") or ("/" not in path and path.startswith("report."))
    return unit.partition("/")[0] in ("trials", "models") and path.startswith(f"{unit}/") and unit.count("/") == 1


def is_final(file: Path) -> bool:
    """Return whether a trial.json says that its trial has ended; False for a damaged one."""
    content = read_mapping(file, [])
    try:
        return content is not None and TaskState(str(content.get("status"))).is_final
    except ValueError:
        return False


class Units:
    """The units of a run folder as they are; what is settled need not be looked through in each pass.

    An ended trial is settled once it is copied. It no longer is when its trial.json changes (it is trained again, or
    is promoted and has ended again), when scores of it come (its answers and judgements came before), or when its turn
    comes: judgements, and the progress of trackers, are written with neither.
    """

    def __init__(self, run_dir: Path, only: frozenset[str] | None = None) -> None:
        """Look at nothing yet. only: the names of the units that are yielded; None: all."""
        self._run_dir, self._only = run_dir, only
        self._trials = TrialFiles(run_dir, is_final)
        self._scores = GrowingFile(run_dir / SCORES_FILE, [], needs=("trial",))
        #: Settled trials, by the stamps of their trial.json; those looked through last come last.
        self._settled: dict[str, Stamp] = {}
        self.unfinished: list[str] = []

    def __iter__(self) -> Iterator[Unit]:
        """Yield trials first: scores without a trial are dropped on a resume, a trial without scores is scored."""
        return self._but({})

    def unsettled(self) -> Iterator[Unit]:
        """Yield all but the trials that are settled; of these `LOOKS`, the others in later calls."""
        if self._only is None:
            for row in self._scores.read()[1]:
                self._settled.pop(str(row["trial"]), None)
        for name in list(itertools.islice(self._settled, LOOKS)):
            del self._settled[name]
        return self._but(self._settled)

    def settle(self, unit: Unit) -> None:
        """Note that a unit is copied as it was when it was yielded."""
        if unit.record is not None:
            self._settled[unit.name.removeprefix(_TRIALS)] = unit.record

    def _but(self, settled: Mapping[str, Stamp]) -> Iterator[Unit]:
        self.unfinished = []
        for name, record, ended in self._trials:
            if not ended:
                self.unfinished.append(name)
            elif settled.get(name) != record and self._wants(unit := f"{_TRIALS}{name}"):
                yield Unit(unit, self._below(self._run_dir / unit), record)
        for folder in sorted(self._run_dir.glob("models/*/")):
            if self._wants(unit := f"models/{folder.name}"):
                yield Unit(unit, self._below(folder))
        if self._wants(RUN):
            run = {name: self._run_dir / name for name in RUN_FILES}
            yield Unit(RUN, {name: file for name, file in run.items() if file.is_file()})
        if self._wants(REPORT):
            found = {file for pattern in REPORTS for file in self._run_dir.glob(pattern) if file.is_file()}
            yield Unit(REPORT, {self._path(file): file for file in sorted(found)})

    def _wants(self, unit: str) -> bool:
        return self._only is None or unit in self._only

    def _below(self, folder: Path) -> dict[str, Path]:
        found = {}
        for place, folders, names in os.walk(folder):
            folders[:] = [name for name in folders if name not in _LOCAL and not name.startswith(".")]
            for name in names:
                if not name.startswith(".") and ".damaged" not in name:
                    file = Path(place) / name
                    found[self._path(file)] = file
        return dict(sorted(found.items()))

    def _path(self, file: Path) -> str:
        return file.relative_to(self._run_dir).as_posix()


class Owner(BaseModel):
    """`sync/owner.json`: the run that is copied here, and the process that copies it."""

    model_config = ConfigDict(extra="allow", strict=True)

    run: str
    session: str

    @classmethod
    def decoded(cls, content: bytes) -> Owner:
        """Read it. Raises ValueError: it is damaged."""
        return cls.model_validate_json(content)
