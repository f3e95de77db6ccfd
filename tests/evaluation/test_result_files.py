import datetime
import json
import signal
import time

import mteb
from mteb.models.model_meta import ModelMeta
from mteb.results import TaskResult

from src.evaluation.result_files import AtomicResults

META = ModelMeta.create_empty(overwrites={"name": "grace/tiny", "revision": "r1", "experiment_kwargs": {"rationale": "greedy"}})


def result_of(name: str, score: float | None) -> TaskResult:
    scores = {"test": {"default": {"main_score": score, "cosine_spearman": score}}}
    now = datetime.datetime.now(tz=datetime.UTC)
    return TaskResult.from_task_results(mteb.get_task(name), scores, evaluation_time=1.0, kg_co2_emissions=None, date=now)


def test_mteb_reads_the_files(tmp_path):
    cache = AtomicResults(tmp_path)
    for name, score in (("BIOSSES", 0.5), ("SICK-R", 0.25)):
        cache.save_to_cache(result_of(name, score), META, encode_kwargs={"batch_size": 512})
    plain = mteb.ResultCache(tmp_path)
    assert [plain.load_task_result(name, META).get_score() for name in ("BIOSSES", "SICK-R")] == [0.5, 0.25]
    folder = tmp_path / "results/grace__tiny/r1/experiments/rationale_greedy"
    assert {file.name for file in folder.iterdir()} == {"BIOSSES.json", "SICK-R.json", "model_meta.json", "run_settings.jsonl"}
    assert [json.loads(line)["task"] for line in (folder / "run_settings.jsonl").read_text().splitlines()] == ["BIOSSES", "SICK-R"]
    assert [file.name for file in tmp_path.iterdir()] == ["results"]


def test_result_without_score_is_not_kept(tmp_path):
    AtomicResults(tmp_path).save_to_cache(result_of("BIOSSES", None), META)
    assert not list(tmp_path.rglob("*.json"))


WRITER = """
import sys
from tests.evaluation.test_result_files import META, result_of
from src.evaluation.result_files import AtomicResults
cache, result = AtomicResults(sys.argv[1]), result_of("BIOSSES", 0.5)
result.scores["test"] *= 2000  # some 200 kB
cache.save_to_cache(result, META)
print("ready", flush=True)
while True:
    cache.save_to_cache(result, META)
"""


def test_kill_leaves_a_complete_file(programs, tmp_path):
    writer = programs.start("-c", WRITER, str(tmp_path))
    writer.wait_for("ready")
    time.sleep(0.2)
    writer.send_signal(signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL
    found = AtomicResults(tmp_path).load_task_result("BIOSSES", META)
    assert len(found.scores["test"]) == 2000
