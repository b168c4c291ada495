"""Benchmarks with local rows: as entries of ours, and as task files for lm-eval."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS = ("acc", "acc_norm")


@dataclass(frozen=True)
class Benchmark:
    """Rows to score: of an lm-eval task, or of our own format where `task` is None."""

    task: str | None
    data: str

    @classmethod
    def parse(cls, text: str) -> Benchmark:
        task, mark, data = text.partition("=")
        return cls(task, data) if mark else cls(None, text)

    @property
    def name(self) -> str:
        """The task's name in lm-eval and of the entry here: no name that lm-eval has itself."""
        return f"macdrop_{self.task or Path(self.data.partition(':')[2] or self.data).stem}"

    @property
    def entry(self) -> dict[str, str]:
        """The entry of `eval.zero_shot` with this name."""
        return {"data": self.data} | ({"task": self.task} if self.task else {"target_delimiter": " "})


def write_task(benchmark: Benchmark, folder: Path) -> None:
    """Write the task file for lm-eval's --include_path: local rows as the test split, all else as the task has it."""
    import yaml

    from tune.data.locations import locate
    from tune.evaluation.catalogue import find_task

    rows = str(locate(benchmark.data)[0].resolve())
    kind = {".parquet": "parquet", ".csv": "csv"}.get(Path(rows).suffix, "json")
    config: dict[str, Any] = {
        "task": benchmark.name,
        "dataset_path": kind,
        "dataset_kwargs": {"data_files": {"test": rows}},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "num_fewshot": 0,
    }
    if benchmark.task:
        config |= {"include": str(find_task(benchmark.task)), "dataset_name": None, "tag": None}
    else:
        metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS]
        config |= {
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "label",
            "target_delimiter": " ",
            "metric_list": metrics,
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{benchmark.name}.yaml").write_text(yaml.safe_dump(config))
