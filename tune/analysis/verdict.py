"""Verdicts on MacDrop: one for each finalist and placebo of a run, with the numbers behind it.

Arms are compared within a cell (one type of adapter) on the final stage's seeds, paired by seed and item (see
`stats.Paired`). A verdict rests on one comparison fixed in advance, its headline: without attack, the mean over the
zero-shot tasks (on the metric that most of them have), or else judge scores, then scores against references, then
perplexity, each averaged over its tasks. A second statement makes the same comparison under attack: zeroing as many
rows as the cell's best MacDrop setting drops, if the run has that attack, else its first attack. Single tasks are
Holm-corrected over the tasks, separately without attack and under each attack; means are not corrected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

from macdrop.errors import DataError
from tune.analysis import sentences
from tune.analysis.comparison import CANNOT_TELL, Comparison, Sample, compare, corrected, unknown
from tune.analysis.display_names import setting_label
from tune.analysis.paired_samples import Samples
from tune.config.eval_spec import NO_ATTACK
from tune.config.parse import flatten
from tune.config.run_spec import slug
from tune.config.sections import Arm
from tune.evaluation.score_names import Column, mean_columns
from tune.storage.records import TrialRecord
from tune.storage.run_folder import RunFolder

__all__ = ["Comparison", "Verdict", "verdicts"]
HEADLINES = ("zero_shot", "judge_score", "generation", "perplexity")
"""Candidates for the headline, a benchmark or a metric each; the first one present in a run counts."""


@dataclass(frozen=True)
class Verdict:
    """The verdict on one setting against the plain adapter of its cell."""

    model: str
    cell: dict[str, Any]
    setting: str
    label: str
    arm: str
    headline: Comparison | None
    attacked: Comparison | None
    rows: list[Comparison]
    sentence: str
    more: list[str]
    seeds: tuple[int, ...]
    tried: int
    status: str


@dataclass
class Setting:
    """The trials of one setting by their seeds; `config` is its effective spec with dotted keys."""

    arm: str
    id: str
    config: dict[str, Any]
    trials: dict[int, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return setting_label(self.arm, self.config)


def verdicts(run_folder: RunFolder, model: str, recorded: Iterable[TrialRecord] | None = None) -> list[Verdict]:
    """Verdicts on the MacDrop finalists of each cell, best first, then its placebos; partial for a running sweep.

    Empty before settings are selected for the final stage, or if no plain adapter shares a seed and a benchmark with a
    finalist.

    recorded: the trials of the model, or of all models, where they have been read.
    """
    content = run_folder.finding(run_folder.finalists_file(model)) or {}
    seeds = content.get("seeds", [])
    recorded, own = run_folder.trials() if recorded is None else recorded, slug(model)
    trials = [t for t in recorded if t.seed in seeds and slug(t.model) == own]
    settings = _by_setting(trials)
    samples = Samples(run_folder, model)
    name = next((t.model for t in trials), model)
    run = _Run(name, content.get("tried", 0), len(seeds), fresh=seeds != [run_folder.config().get("seed", 0)])
    found = []
    for row in content.get("cells", []):
        chosen = [*row["macdrop"], *row["placebos"].values()]
        plain, others = settings.get(row["plain"]), [settings[setting] for setting in chosen if setting in settings]
        if plain is not None:
            rows = next((other.config.get("macdrop.k") for other in others if other.arm == Arm.MACDROP), None)
            made = [one for other in others if (one := against(samples, plain, other, rows)) is not None]
            found += [_verdict(one, made, row["cell"], run) for one in made]
    return found


def _by_setting(trials: Iterable[TrialRecord]) -> dict[str, Setting]:
    found: dict[str, Setting] = {}
    for t in trials:
        if t.setting is None or t.seed is None:
            continue  # no finalist: those of a selection have both
        setting = found.setdefault(t.setting, Setting(t.arm, t.setting, flatten(t.config)))
        setting.trials[t.seed] = t.trial
    return found


@dataclass
class Against:
    """All comparisons of one setting with plain."""

    setting: Setting
    plain: Setting
    headline: Comparison | None
    attacked: Comparison | None
    rows: list[Comparison]


@dataclass(frozen=True)
class _Run:
    """Facts shared by a model's verdicts. `seeds`: number in the final stage; `fresh`: the search did not use them."""

    model: str
    tried: int
    seeds: int
    fresh: bool


def _verdict(found: Against, of_cell: Sequence[Against], cell: dict[str, Any], run: _Run) -> Verdict:
    setting, main = found.setting, found.headline or found.attacked
    more = sentences.of_seeds(main)
    more += [sentences.statement(found.attacked)] if found.attacked is not None and found.attacked is not main else []
    more += sentences.of_perplexity(found.rows, main)
    if setting.arm == Arm.MACDROP:
        for other in (other for other in of_cell if other.setting.arm != Arm.MACDROP):
            more += sentences.of_placebo(other.setting.label, found.headline, other.headline)
            more += sentences.of_placebo(other.setting.label, found.attacked, other.attacked)
        more += sentences.provenance(main, run.tried, run.seeds, run.fresh)
    return Verdict(
        model=run.model,
        cell=cell,
        setting=setting.id,
        label=setting.label,
        arm=setting.arm,
        headline=found.headline,
        attacked=found.attacked,
        rows=found.rows,
        sentence=sentences.sentence(run.model, setting.label, found.plain.label, main),
        more=more,
        seeds=main.seeds if main else (),
        tried=run.tried,
        status=main.verdict if main else CANNOT_TELL,
    )


def against(samples: Samples, plain: Setting, other: Setting, rows: int | None) -> Against | None:
    """Compare on all columns that both have on a shared seed; None where there are none.

    rows: the number of rows dropped in training; zeroing as many is the attack of the headline.
    """
    columns = samples.columns(plain.trials, other.trials)
    if not columns:
        return None
    about = {"arm": other.arm, "label": other.label, "against": plain.label}
    found = {column: _read(samples, column, plain, other) for column in columns}
    made: dict[Column, Comparison] = {}
    for family in _by(columns, lambda column: (column.attack, column.attack_on)):
        compared = [_mean([column], column, found, about, len(family)) for column in family]
        made |= dict(zip(family, corrected(compared), strict=True))
    means = [_mean(members, mean, found, about) for mean, members in mean_columns(columns).items()]
    attack = _main_attack(columns, rows)
    headlines: list[Comparison | None] = []
    for chosen in (("none", None), attack):
        main = _headline([column for column in columns if (column.attack, column.attack_on) == chosen])
        headlines.append(main and _mean(main[1], main[0], found, about))
    return Against(other, plain, headlines[0], headlines[1], [*means, *made.values()])


def _read(samples: Samples, column: Column, plain: Setting, other: Setting) -> Sample | DataError:
    try:
        return samples.read(column, plain.trials, other.trials)
    except DataError as error:
        return error


def _mean(
    members: Sequence[Column],
    column: Column,
    found: Mapping[Column, Sample | DataError],
    about: Mapping[str, str],
    family: int = 1,
) -> Comparison:
    """Compare on the mean over `members`, named `column`."""
    samples: list[Sample] = []
    for sample in (found[member] for member in members):
        if isinstance(sample, DataError):
            return unknown(column, str(sample), arm=about["arm"], label=about["label"], against=about["against"])
        samples.append(sample)
    return compare(samples, column, arm=about["arm"], label=about["label"], against=about["against"], family=family)


def _headline(columns: Sequence[Column]) -> tuple[Column, list[Column]] | None:
    """The headline and its columns: the first kind of `HEADLINES` present, the largest of several means."""
    means = mean_columns(columns)
    for members in _by([c for c in columns if c.benchmark == "generation"], lambda column: column.metric):
        first = members[0]
        name = Column(first.benchmark, f"mean of {len(members)}", *astuple(first)[2:])
        means |= {name: members} if len(members) > 1 else {}
    single = {column: [column] for column in columns if not any(column in members for members in means.values())}
    order = sorted((means | single).items(), key=lambda item: (_rank(item[0]), -len(item[1])))
    return order[0] if order else None


def _main_attack(columns: Iterable[Column], rows: int | None) -> tuple[str, str | None] | None:
    """Zeroing of `rows` rows, else the first zeroing, else the first attack; base rows before merged rows."""
    attacks = list(dict.fromkeys((c.attack, c.attack_on) for c in columns if c.attack != NO_ATTACK))
    order = {
        attack: (attack[0] != f"zeroing@{rows}", not attack[0].startswith("zeroing"), attack[1] != "base")
        for attack in attacks
    }
    return min(attacks, key=lambda attack: (order[attack], attacks.index(attack))) if attacks else None


def _rank(column: Column) -> int:
    ranks = (i for i, name in enumerate(HEADLINES) if name in (column.benchmark, column.metric))
    return min(ranks, default=len(HEADLINES))


def _by(columns: Iterable[Column], key: Callable[[Column], Any]) -> list[list[Column]]:
    """Group columns by `key`, in order of appearance."""
    groups: dict[Any, list[Column]] = {}
    for column in columns:
        groups.setdefault(key(column), []).append(column)
    return list(groups.values())
