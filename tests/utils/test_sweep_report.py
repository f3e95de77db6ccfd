"""What a sweep in MLflow comes to, on a store with runs made by hand."""

import json
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from experiments.sweep_report import find_sweep, markdown, read_sweep, write_report
from src.utils.sweeps import ERROR, FOLDER, KEYS, PARENT, REPORT, RESULT, SWEEP, VALUES
from tests.programs import Programs


class Store:
    """An MLflow store with a sweep in it."""

    def __init__(self, uri: str, folder: Path) -> None:
        self.client, self.project = MlflowClient(uri), folder.name
        self.experiment = self.client.create_experiment(folder.name, artifact_location=f"file://{folder}/artifacts")

    def parent(self, *keys: str, **report: object) -> str:
        settings = {"metrics": ["mteb/average"], "direction": "maximize", "curves": []} | report
        tags = {SWEEP: "0" * 16, KEYS: json.dumps(keys), REPORT: json.dumps(settings)}
        return self.client.create_run(self.experiment, tags=tags, run_name="sweep by hand").info.run_id

    def point(self, parent: str, values: dict[str, str], *scores: float, error: str | None = None) -> None:
        tags = {PARENT: parent, VALUES: json.dumps(values), FOLDER: "somewhere"} | ({ERROR: error} if error else {RESULT: "1.0"})
        run_id = self.client.create_run(self.experiment, tags=tags).info.run_id
        for step, score in enumerate(scores):
            self.client.log_metric(run_id, "mteb/average", score, step=step)


@pytest.fixture
def store(tracking_uri: str, tmp_path: Path) -> Store:
    return Store(tracking_uri, tmp_path)


def test_a_grid_over_seeds(store: Store, tmp_path: Path) -> None:
    parent = store.parent("reward.consistency_weight", "seed", "reward.hard_weight", curves=["mteb/average"])
    for a in ("10", "9"):
        for seed, score in (("0", 0.1), ("1", 0.3)):
            for b in ("0", "0.5"):
                values = {"reward.consistency_weight": a, "seed": seed, "reward.hard_weight": b}
                store.point(parent, values, 0.0, score + (a == "9") + float(b) / 10)
    store.point(parent, {"reward.consistency_weight": "11", "seed": "0", "reward.hard_weight": "0"}, error="ValueError: no")
    sweep = read_sweep(store.client, parent)
    assert sweep.keys == ["reward.consistency_weight", "reward.hard_weight"]
    assert sweep.best() == ({"reward.consistency_weight": "9", "reward.hard_weight": "0.5"}, pytest.approx(1.25))
    rows = [line for line in markdown(sweep).splitlines() if line.startswith("|")]
    assert rows == [
        "| reward.consistency_weight | reward.hard_weight | runs | mteb/average |",
        "| --- | ---: | ---: | ---: |",
        "| 9 | 0 | 2 | 1.2 ± 0.14 |",  # by size, not as text
        "| 9 | 0.5 | 2 | 1.25 ± 0.14 |",
        "| 10 | 0 | 2 | 0.2 ± 0.14 |",
        "| 10 | 0.5 | 2 | 0.25 ± 0.14 |",
    ]
    assert "- failed: consistency_weight=11, seed=0, hard_weight=0: ValueError: no" in markdown(sweep)
    files = write_report(store.client, sweep, tmp_path / "report")
    assert [file.name for file in files] == ["sweep.md", "sweep.png", "curves.png"]
    assert all(file.stat().st_size > 100 for file in files)
    assert {file.path for file in store.client.list_artifacts(parent)} == {file.name for file in files}
    run = store.client.get_run(parent)
    assert run.data.metrics["best/mteb/average"] == pytest.approx(1.25)


def test_the_last_attempt_at_a_point_counts(store: Store) -> None:
    parent = store.parent("reward", direction="minimize")
    store.point(parent, {"reward": "paper"}, error="ValueError: a first time")
    store.point(parent, {"reward": "paper"}, 0.5)
    store.point(parent, {"reward": "document"}, error="ValueError: once")
    store.point(parent, {"reward": "document"}, error="ValueError: twice")
    store.point(parent, {"reward": "listwise"}, 0.7)
    sweep = read_sweep(store.client, parent)
    assert sweep.failures == [("reward=document", "ValueError: twice")]
    assert sweep.best() == ({"reward": "paper"}, 0.5)
    assert "| paper | 1 | 0.5 |" in markdown(sweep)


def test_a_sweep_over_seeds_alone(store: Store, tmp_path: Path) -> None:
    parent = store.parent("seed")
    for seed in range(3):
        store.point(parent, {"seed": str(seed)}, float(seed))
    sweep = read_sweep(store.client, parent)
    assert "| 3 | 1 ± 1 |" in markdown(sweep)
    assert len(write_report(store.client, sweep, tmp_path / "report")) == 2


def test_a_search_is_drawn_as_points(store: Store, tmp_path: Path) -> None:
    parent = store.parent("reward.temperature", "reward.hard", "reward.hard_weight")
    for i in range(12):
        values = {"reward.temperature": f"0.0{i}123456789", "reward.hard": "max" if i % 2 else "mean", "reward.hard_weight": f"{i * i}"}
        store.point(parent, values, float(i))
    sweep = read_sweep(store.client, parent)
    assert "| 0.01123 | max | 1 | 1 | 1 |" in markdown(sweep)
    assert (write_report(store.client, sweep, tmp_path / "report")[1]).stat().st_size > 5000


def test_a_metric_that_no_run_has(store: Store, tmp_path: Path) -> None:
    parent = store.parent("reward", metrics=["nope", "mteb/average"])
    store.point(parent, {"reward": "paper"}, 0.5)
    sweep = read_sweep(store.client, parent)
    page = markdown(sweep)
    assert "| paper | 1 | - | 0.5 |" in page
    assert "Best by nope (maximize): not known: no finished point has logged it." in page
    assert write_report(store.client, sweep, tmp_path / "report")
    assert read_sweep(store.client, parent, metrics=["mteb/average"]).best() == ({"reward": "paper"}, 0.5)


def test_a_sweep_of_which_nothing_is_done_yet(store: Store, tmp_path: Path) -> None:
    sweep = read_sweep(store.client, store.parent("reward"))
    assert [file.name for file in write_report(store.client, sweep, tmp_path)] == ["sweep.md"]


def test_the_command_finds_a_sweep_by_its_name(programs: Programs, store: Store, tracking_uri: str, tmp_path: Path) -> None:
    parent = store.parent("reward")
    store.point(parent, {"reward": "paper"}, 0.5)
    assert find_sweep(store.client, store.project, None) == find_sweep(store.client, store.project, "hand") == parent
    newer = store.client.create_run(store.experiment, tags={SWEEP: "1" * 16}, run_name="sweep by hand and more").info.run_id
    assert find_sweep(store.client, store.project, "hand") == newer
    assert find_sweep(store.client, store.project, "by hand") == find_sweep(store.client, store.project, parent) == parent
    with pytest.raises(ValueError, match=r"^no sweep 'other' in project .*; there are: sweep by hand and more; sweep by hand$"):
        find_sweep(store.client, store.project, "other")
    command = ["-m", "experiments.sweep_report", parent, "--project", store.project, "--tracking-uri", tracking_uri]
    done = programs.run(*command, "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| paper | 1 | 0.5 |" in done.stdout
    assert (tmp_path / "out" / "sweep.png").exists()
