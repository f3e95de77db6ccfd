"""Copies of MTEB's data sets: made by mteb_data.py from a local hub, and read without one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import mteb
import pytest

from src.evaluation.benchmarks import named_tasks
from src.evaluation.run_tasks import run_tasks
from src.evaluation.tasks.mteb_mirror import copy_folder, download, localised
from tests.conftest import ROOT
from tests.evaluation.builders import encoder
from tests.hub_server import Hub, Repositories, local_hub
from tests.own_files import LABELS, SCORED, TEXTS, write_own_tasks

BIOSSES = mteb.get_task("BIOSSES").metadata.dataset
NFCORPUS = mteb.get_task("NFCorpus").metadata.dataset


def rows_of(*rows: dict[str, object]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def card(**configs: tuple[str, str]) -> bytes:
    """The README.md of a data set, from the split and file of each config."""
    lines = [f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {file}\n" for name, (split, file) in configs.items()]
    return f"---\nconfigs:\n{''.join(lines)}---\n".encode()


def retrieval_files() -> dict[str, bytes]:
    """The retrieval set of tests/own_files.py in the form that MTEB's have on the hub, with a query that has no answer."""
    with TemporaryDirectory() as folder:
        own = write_own_tasks(Path(folder))
        queries, documents = (own / "queries.jsonl").read_bytes(), (own / "corpus.jsonl").read_bytes()
        answers = [line.split("\t") for line in (own / "qrels.tsv").read_text().splitlines()[1:]]
    return {
        "README.md": card(default=("test", "qrels/test.jsonl"), corpus=("corpus", "corpus.jsonl"), queries=("queries", "queries.jsonl")),
        "corpus.jsonl": documents,
        "queries.jsonl": queries + rows_of({"_id": "q9", "text": "unanswered"}),
        "qrels/test.jsonl": rows_of(
            *({"query-id": query, "corpus-id": document, "score": int(score)} for query, document, score in answers)
        ),
    }


REPOSITORIES: Repositories = {
    (BIOSSES["path"], BIOSSES["revision"]): {
        "README.md": card(default=("test", "test.jsonl")),
        "test.jsonl": rows_of(*({"sentence1": TEXTS[a], "sentence2": TEXTS[b], "score": score} for score, a, b in SCORED)),
    },
    (NFCORPUS["path"], NFCORPUS["revision"]): retrieval_files(),
}


def command(hub: Hub, benchmark: str, folder: Path) -> subprocess.Popen[str]:
    """`mteb_data.py` in its own process."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "home")}
    settings = [f"benchmark={benchmark}", f"data_dir={folder}/data", f"paths.output_root={folder}/outputs"]
    return subprocess.Popen(
        [sys.executable, "mteb_data.py", *settings], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.timeout(1800)
def test_downloaded_data_is_evaluated_offline(tiny_policy, tmp_path):
    """The first download is killed within a file; the second one resumes it."""
    folder = copy_folder(tmp_path / "data", BIOSSES["path"], BIOSSES["revision"])
    with local_hub(REPOSITORIES, held={"test.jsonl"}) as hub:
        with command(hub, "[BIOSSES]", tmp_path) as killed:
            until = time.monotonic() + 600
            while "test.jsonl" not in hub.asked and time.monotonic() < until:
                assert killed.poll() is None, killed.communicate()[1]
                time.sleep(0.05)
            killed.send_signal(signal.SIGKILL)
        assert not folder.exists()
        hub.release.set()
        with command(hub, "[BIOSSES,NFCorpus,STS12]", tmp_path) as again:
            _, errors = again.communicate(timeout=600)
        assert again.returncode == 1
        assert "mteb_data.py: 1 data sets cannot be downloaded" in errors
        assert "\n  mteb/sts12-sts: " in errors
    assert {file.name for file in folder.iterdir() if file.is_file()} == {"README.md", "test.jsonl"}
    assert not list(folder.parent.glob("*.partial"))
    own_encoder = encoder(tiny_policy, rationale=False)
    own = write_own_tasks(tmp_path / "own") / "MyRetrieval.yaml"  # the same texts and answers
    tasks = named_tasks(["BIOSSES", "NFCorpus", str(own)], tmp_path / "data")
    scores = run_tasks(own_encoder, tasks, tmp_path / "results", "tiny")  # HF_HUB_OFFLINE=1
    assert scores.failures == {}
    stored = json.loads(next((tmp_path / "results").rglob("BIOSSES.json")).read_text())
    assert stored["dataset_revision"] == BIOSSES["revision"]
    assert stored["scores"]["test"][0]["cosine_spearman"] == pytest.approx(scores.tasks["BIOSSES"], abs=1e-5)
    assert scores.tasks["NFCorpus"] == pytest.approx(scores.tasks["MyRetrieval"], abs=1e-5)


def test_present_data_is_not_downloaded(tmp_path):
    copy_folder(tmp_path, BIOSSES["path"], BIOSSES["revision"]).mkdir(parents=True)
    assert download([mteb.get_task("BIOSSES")], tmp_path) == {}  # HF_HUB_OFFLINE=1: a request would fail
    assert list(download([mteb.get_task("STS12")], tmp_path)) == ["mteb/sts12-sts"]


def test_copy_is_read_again_after_unloading(tmp_path):
    folder = copy_folder(tmp_path, NFCORPUS["path"], NFCORPUS["revision"])
    for name, content in REPOSITORIES[NFCORPUS["path"], NFCORPUS["revision"]].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    task = localised(mteb.get_task("NFCorpus"), tmp_path)
    for _ in range(2):  # as for the second of several encoders
        task.load_data()
        split = task.dataset["default"]["test"]
        assert [f"{row['title']} {row['text']}" for row in split["corpus"]] == [f"{a} {b}" for a, b in zip(LABELS, TEXTS, strict=True)]
        assert list(split["queries"]["id"]) == ["q0", "q1", "q2"]
        assert split["relevant_docs"]["q1"] == dict.fromkeys("4567", 1)
        task.unload_data()


def test_parts_of_an_aggregate(tmp_path):
    task = mteb.get_task("CQADupstackRetrieval")
    part = task.metadata.tasks[3]
    dataset = dict(part.metadata.dataset)
    copied = copy_folder(tmp_path, dataset["path"], dataset["revision"])
    copied.mkdir(parents=True)
    own = localised(task, tmp_path)
    assert own.metadata.tasks[3].metadata.dataset == {**dataset, "path": str(copied)}
    assert own.taskname_to_task[part.metadata.name] is own.metadata.tasks[3] is own.tasks[3]
    assert own.metadata.tasks[2].metadata.dataset == task.metadata.tasks[2].metadata.dataset
    assert part.metadata.dataset == dataset  # MTEB's own task stays
