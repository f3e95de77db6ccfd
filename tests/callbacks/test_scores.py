"""Callbacks that score and export: real MTEB tasks on a few docstrings, a real MLflow store."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning as L
import mlflow
import pytest

from src.callbacks.checkpoint import RolloutCheckpoint
from src.callbacks.final_report import FinalReport, columns_of
from src.callbacks.mteb_eval import MTEBEvaluation
from src.callbacks.rationale_table import RationaleTable
from src.evaluation.run_tasks import EvaluationScores
from src.evaluation.tasks.offline_tasks import OfflineSize, offline_tasks
from src.modules.encoder.encoder import RationaleEncoder
from tests.callbacks.conftest import Interrupt, fit, steps

TINY = OfflineSize(documents=40, queries=12, per_module=6, candidates=4, per_label=4)
Tasks = Callable[[], list[Any]]


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> Tasks:
    """Makes one retrieval task on a few docstrings."""
    cache = tmp_path_factory.mktemp("cache")
    return lambda: offline_tasks(["networkx"], cache, TINY)[:1]


def test_mteb_at_start_every_n_and_end(module, retrieval, mlflow_logger, tmp_path):
    checkpoint = RolloutCheckpoint(str(tmp_path / "c"), every_n_rollout_batches=2, monitor="mteb/average")
    trainer = fit(module, [MTEBEvaluation(retrieval, every_n_rollout_batches=2), checkpoint], tmp_path, batches=3, logger=mlflow_logger)
    assert steps(mlflow_logger, "mteb/average") == [0, 2, 3]
    history = mlflow_logger.experiment.get_metric_history(mlflow_logger.run_id, "mteb/average")
    values = [point.value for point in history]
    assert all(0 <= value <= 1 for value in values)
    assert float(trainer.callback_metrics["mteb/average"]) == pytest.approx(values[-1])
    assert checkpoint.best_model_score == pytest.approx(max(values[1:]))
    assert mlflow_logger.experiment.get_metric_history(mlflow_logger.run_id, "mteb/category/Retrieval")[-1].value == values[-1]


def test_mteb_never(module, tmp_path):
    trainer = fit(module, [MTEBEvaluation(lambda: pytest.fail("not needed"), every_n_rollout_batches=None)], tmp_path)
    assert "mteb/average" not in trainer.callback_metrics


def test_starting_policy_is_embedded_once(fresh_module, retrieval, tmp_path, monkeypatch):
    embedded = []
    embed = RationaleEncoder._run
    monkeypatch.setattr(RationaleEncoder, "_run", lambda self, texts, *how: embedded.append(len(texts)) or embed(self, texts, *how))
    kept, scores, calls = tmp_path / "embeddings", [], []
    for run in ("first", "second"):
        report = FinalReport(str(tmp_path / run), {"docstrings": retrieval}, embeddings_dir=str(kept))
        before = len(embedded)
        fit(fresh_module(), [MTEBEvaluation(retrieval, embeddings_dir=str(kept)), report], tmp_path, batches=1)
        scores.append((report.rows["Base"], report.rows["Base + reasoning"]))
        calls.append(len(embedded) - before)
    assert scores[0] == scores[1]
    # queries and documents each: of the starting policy with rationales, which brings it without, and of the trained one for each callback
    assert calls == [6, 4]
    assert len(list(kept.glob("*.sqlite"))) == 2  # of the starting policy without and with rationales, none of the trained one


def test_resumed_mteb_knows_last_score(fresh_module, retrieval, mlflow_logger, tmp_path):
    class Metrics(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            self.found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("mteb/")}

    def callbacks():
        return [MTEBEvaluation(retrieval, every_n_rollout_batches=2), RolloutCheckpoint(str(tmp_path / "c"), every_n_rollout_batches=3)]

    with pytest.raises(RuntimeError, match="interrupted"):
        fit(fresh_module(), [*callbacks(), Interrupt(at=3)], tmp_path, batches=4, logger=mlflow_logger)
    start = Metrics()
    fit(fresh_module(), [*callbacks(), start], tmp_path, batches=4, logger=mlflow_logger, ckpt_path=tmp_path / "c" / "last.ckpt")
    assert steps(mlflow_logger, "mteb/average") == [0, 2, 4]  # the start is not scored again
    logged = mlflow_logger.experiment.get_metric_history(mlflow_logger.run_id, "mteb/average")
    assert start.found == {"mteb/average": pytest.approx(logged[1].value), "mteb/rollout_batches": 2}


def test_failing_task_stops_at_start(module, retrieval, tmp_path):
    def broken():
        tasks = retrieval()
        tasks[0].metadata = tasks[0].metadata.model_copy(update={"main_score": "no_such_score"})
        return tasks

    with pytest.raises(RuntimeError, match="MTEB tasks fail: DocstringRetrieval"):
        fit(module, [MTEBEvaluation(broken)], tmp_path)
    with pytest.raises(RuntimeError, match=r"held-out tasks fail for Base .*: DocstringRetrieval"):
        fit(module, [FinalReport(str(tmp_path), {"docstrings": broken})], tmp_path)


def test_final_report(module, retrieval, mlflow_logger, tmp_path, capsys):
    out = tmp_path / "out"
    callbacks = [RationaleTable(str(out / "rationales.md"), texts=2), FinalReport(str(out), {"docstrings": retrieval})]
    fit(module, callbacks, tmp_path, logger=mlflow_logger)
    shown = capsys.readouterr().out
    for expected in ("Base + reasoning", "GRACE", "Retr", "before", "after", str(out / "report.md"), str(mlflow_logger.run_id)):
        assert expected in shown
    assert "GRACE over Base + reasoning, in points: Retrieval" in shown
    assert (out / "test_scores.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.md").read_text()
    assert f"| Base | {100 * callbacks[1].rows['Base']['Retrieval']:.2f} |" in page
    assert "(test_scores.png)" in page
    assert "(rationales.md)" in page
    assert "reward_terms.png" not in page  # which no callback has drawn
    assert [steps(mlflow_logger, f"test/{row}/average") for row in ("base", "base_reasoning", "grace")] == [[0], [0], [2]]
    mlflow.set_tracking_uri(mlflow_logger._tracking_uri)
    table = json.loads(mlflow.artifacts.load_text(f"runs:/{mlflow_logger.run_id}/report/test_scores.json"))
    assert [row[0] for row in table["data"]] == ["Base", "Base + reasoning", "GRACE without rationales", "GRACE"]


def test_resumed_report_keeps_starting_rows(fresh_module, retrieval, tmp_path, caplog):
    def report(group="docstrings"):
        return FinalReport(str(tmp_path / "a"), {group: retrieval})

    first, module = report(), fresh_module()
    fit(module, [first], tmp_path)
    starting = first.state_dict()["rows"]
    assert list(starting) == ["Base", "Base + reasoning"]
    resumed = report()
    resumed.load_state_dict(first.state_dict())
    fit(module, [resumed], tmp_path)  # its weights are no longer those of the start
    assert {row: resumed.rows[row] for row in starting} == starting
    others, state = report("others"), first.state_dict()  # grouped otherwise, rows have other columns
    others.load_state_dict(state)
    elsewhere = report()
    elsewhere.load_state_dict(state | {"on": {"OtherTask": "1"}})
    for changed in (others, elsewhere):
        caplog.clear()
        fit(module, [changed], tmp_path)
        assert "the held-out tasks are not those of the start" in caplog.text
        assert list(changed.rows) == ["GRACE without rationales", "GRACE"]


def test_columns_of_task_groups():
    tasks = {"DocstringRetrieval": 0.4, "DocstringPairs": 0.6, "WordNetRetrieval": 0.2}
    scores = EvaluationScores(tasks, {"Retrieval": 0.3, "PairClassification": 0.6}, average=0.4)
    one = columns_of(scores, {"all": list(tasks)})
    assert one == {"Retrieval": 0.3, "PairClassification": 0.6, "average": 0.4}
    two = columns_of(scores, {"docstrings": ["DocstringRetrieval", "DocstringPairs"], "everyday": ["WordNetRetrieval"]})
    assert two == pytest.approx(
        {"docstrings nDCG@10": 0.4, "docstrings average": 0.5, "everyday nDCG@10": 0.2, "everyday average": 0.2, "average": 0.4}
    )


def test_scores_with_rationales_on_request(module, retrieval, tmp_path):
    report = FinalReport(str(tmp_path / "a"), {"docstrings": retrieval}, rationales=True)
    module.settings = replace(module.settings, rationale=False)
    fit(module, [report], tmp_path, batches=1)
    assert list(report.rows) == ["Base", "Base + reasoning", "GRACE", "GRACE + reasoning"]
