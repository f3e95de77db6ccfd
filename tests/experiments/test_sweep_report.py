"""Reports of sweeps, on a store with runs made by hand."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from experiments.sweep_report import Sweep, find_sweep, markdown, read_sweep, write_report
from src.utils.sweeps import ERROR, FOLDER, KEYS, PARENT, REPORT, RESULT, SWEEP, VALUES


class Store:
    """An MLflow store with a sweep over some keys."""

    def __init__(self, uri: str, folder: Path) -> None:
        self.client, self.project = MlflowClient(uri), folder.name
        self.experiment = self.client.create_experiment(folder.name, artifact_location=f"file://{folder}/artifacts")

    def start(self, *keys: str, **report: object) -> None:
        settings = {"metrics": ["mteb/average"], "direction": "maximize", "curves": []} | report
        tags = {SWEEP: "0" * 16, KEYS: json.dumps(keys), REPORT: json.dumps(settings)}
        self.keys, self.parent = keys, self.client.create_run(self.experiment, tags=tags, run_name="sweep by hand").info.run_id

    def point(self, values: str, *scores: float, error: str | None = None) -> None:
        named = dict(zip(self.keys, values.split(), strict=True))
        tags = {PARENT: self.parent, VALUES: json.dumps(named), FOLDER: "somewhere"} | ({ERROR: error} if error else {RESULT: "1.0"})
        run_id = self.client.create_run(self.experiment, tags=tags).info.run_id
        for step, score in enumerate(scores):
            self.client.log_metric(run_id, "mteb/average", score, step=step)

    def sweep(self, metrics: Sequence[str] = ()) -> Sweep:
        return read_sweep(self.client, self.parent, metrics)

    def write(self, folder: Path) -> list[str]:
        files = write_report(self.client, self.sweep(), folder)
        assert all(file.stat().st_size > 50 for file in files)
        assert {file.path for file in self.client.list_artifacts(self.parent)} == {file.name for file in files}
        return [file.name for file in files]


@pytest.fixture
def store(tracking_uri: str, tmp_path: Path) -> Store:
    return Store(tracking_uri, tmp_path)


def test_grid_over_seeds(store, tmp_path):
    store.start("reward.consistency_weight", "seed", "reward.hard_weight", curves=["mteb/average"])
    for a in ("10", "9"):
        for seed, score in (("0", 0.1), ("1", 0.3)):
            for b in ("0", "0.5"):
                store.point(f"{a} {seed} {b}", 0.0, score + (a == "9") + float(b) / 10)
    store.point("11 0 0", error="ValueError: no")
    sweep = store.sweep()
    assert sweep.keys == ["reward.consistency_weight", "reward.hard_weight"]
    assert sweep.best() == ({"reward.consistency_weight": "9", "reward.hard_weight": "0.5"}, pytest.approx(1.25))
    assert [line for line in markdown(sweep).splitlines() if line.startswith("|")] == [
        "| reward.consistency_weight | reward.hard_weight | runs | mteb/average |",
        "| --- | ---: | ---: | ---: |",
        "| 9 | 0 | 2 | 1.2 ± 0.14 |",  # by size, not as text
        "| 9 | 0.5 | 2 | 1.25 ± 0.14 |",
        "| 10 | 0 | 2 | 0.2 ± 0.14 |",
        "| 10 | 0.5 | 2 | 0.25 ± 0.14 |",
    ]
    assert "- failed: consistency_weight=11, seed=0, hard_weight=0: ValueError: no" in markdown(sweep)
    assert store.write(tmp_path / "report") == ["sweep.md", "sweep.png", "curves.png"]
    assert store.client.get_run(store.parent).data.metrics["best/mteb/average"] == pytest.approx(1.25)


def test_last_attempt_counts(store):
    store.start("reward", direction="minimize")
    store.point("paper", error="ValueError: a first time")
    store.point("paper", 0.5)
    for attempt in ("once", "twice"):
        store.point("document", error=f"ValueError: {attempt}")
    store.point("listwise", 0.7)
    assert store.sweep().failures == [("reward=document", "ValueError: twice")]
    assert store.sweep().best() == ({"reward": "paper"}, 0.5)
    assert "| paper | 1 | 0.5 |" in markdown(store.sweep())


def test_seeds_alone(store, tmp_path):
    store.start("seed")
    for seed in range(3):
        store.point(str(seed), float(seed))
    assert "| 3 | 1 ± 1 |" in markdown(store.sweep())
    assert store.write(tmp_path / "report") == ["sweep.md", "sweep.png"]


def test_search_is_drawn_as_points(store, tmp_path):
    store.start("reward.temperature", "reward.hard", "reward.hard_weight")
    for i in range(12):
        store.point(f"0.0{i}123456789 {'max' if i % 2 else 'mean'} {i * i}", float(i))
    assert "| 0.01123 | max | 1 | 1 | 1 |" in markdown(store.sweep())
    store.write(tmp_path / "report")
    assert (tmp_path / "report" / "sweep.png").stat().st_size > 5000


def test_metric_that_no_run_has(store, tmp_path):
    store.start("reward", metrics=["nope", "mteb/average"])
    store.point("paper", 0.5)
    page = markdown(store.sweep())
    assert "| paper | 1 | - | 0.5 |" in page
    assert "Best by nope (maximize): not known" in page
    assert store.write(tmp_path / "report")
    assert store.sweep(metrics=["mteb/average"]).best() == ({"reward": "paper"}, 0.5)


def test_nothing_finished_yet(store, tmp_path):
    store.start("reward")
    assert store.write(tmp_path) == ["sweep.md"]


def test_command_finds_a_sweep_by_name(programs, store, tracking_uri, tmp_path):
    def find(name):
        return find_sweep(store.client, store.project, name)

    store.start("reward")
    store.point("paper", 0.5)
    assert find(None) == find("hand") == store.parent
    newer = store.client.create_run(store.experiment, tags={SWEEP: "1" * 16}, run_name="sweep by hand and more").info.run_id
    assert find("hand") == newer
    assert find("by hand") == find(store.parent) == store.parent
    with pytest.raises(ValueError, match=r"no sweep 'other' .*there are: sweep by hand and more; sweep by hand$"):
        find("other")
    command = ["-m", "experiments.sweep_report", store.parent, "--project", store.project, "--tracking-uri", tracking_uri]
    done = programs.run(*command, "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| paper | 1 | 0.5 |" in done.stdout
    assert (tmp_path / "out" / "sweep.png").exists()
