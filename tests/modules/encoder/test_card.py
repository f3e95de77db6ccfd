"""Model cards as the hub's own parser and sentence-transformers read them, and what is refused publication."""

import json
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from src.callbacks.export import Export
from src.callbacks.final_report import FinalReport
from src.callbacks.rationale_table import RationaleTable
from src.evaluation.tasks.offline_tasks import OfflineSize, offline_tasks
from src.modules.encoder.card import TrainingFacts, card, hub_name_of, license_of
from src.modules.encoder.export import export
from src.modules.encoder.push import main, secrets_in
from src.modules.encoder.settings import EncoderSettings
from src.modules.policy.model import Policy
from src.modules.policy.packaged import SMOLLM2
from tests.callbacks.conftest import fit, make_contrastive, make_module
from tests.conftest import ROOT
from tests.hub_server import Repositories, local_hub

SETTINGS = EncoderSettings(instruction="Name the | `terms`.\nThen stop.", max_prompt_tokens=64, max_new_tokens=5)
SCORE = EvalResult("Retrieval", "memory/x", "Docstrings", "ndcg_at_10", 0.4703, dataset_revision="abc")


def test_card_is_read_by_the_hub():
    facts = TrainingFacts(
        data="1,000 records of sentence-transformers/all-nli",
        datasets=["sentence-transformers/all-nli"],
        settings={"K, rationales of a text": "8", "reward": "listwise(temperature=0.05)"},
        scores=[SCORE],
        table={"Base": {"average": 0.25}, "GRACE": {"average": 0.5}},
        example=("a text with ``` in it", "why"),
    )
    text = card(SMOLLM2, 576, SETTINGS, facts)
    data = ModelCard(text).data
    assert (data.base_model, data.license, data.library_name) == (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
        "sentence-transformers",
    )
    assert (data.pipeline_tag, data.datasets) == ("sentence-similarity", ["sentence-transformers/all-nli"])
    assert data.eval_results == [SCORE]
    name, results = model_index_to_eval_results(json.loads(json.dumps(data.to_dict()))["model-index"])
    assert (name, results[0].metric_value) == ("SmolLM2-135M-Instruct-GRACE", 0.4703)
    for line in (
        "| instruction (system message) | `Name the / 'terms'. Then stop.` |",
        "| K, rationales of a text | 8 |",
        "| reward | listwise(temperature=0.05) |",
        "| longest prompt and rationale | 64 and 5 tokens |",
        "| embedding | 576 numbers: mean of the states of layer -1 over text and rationale |",
        "| GRACE | 50.00 |",
        "````text\na text with ``` in it\n````",
    ):
        assert line in text, line
    for way in (
        "SentenceTransformer(path, trust_remote_code=True)",
        "RationaleEncoder.from_pretrained(path)",
        "AutoModelForCausalLM.from_pretrained(path)",
    ):
        assert way in text


def test_card_of_what_is_not_known(tmp_path):
    text = card(str(tmp_path / "secret-client" / "backbone"), 32, EncoderSettings(rationale=False), TrainingFacts("CL"))
    data = ModelCard(text).data
    assert (data.base_model, data.license, data.eval_results) == (None, None, None)
    assert "licence of the base | unknown" in text
    assert "secret-client" not in text
    assert "encode(texts)" in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"---\nlicense: mit\n---\n# x", "mit"),
        (b"# no front matter", None),
        (b"---\nlicense: [a\n---\n", None),
        (b"\xff\xfe", None),
        (b"---\nlicense: [mit, other]\n---\n", None),
    ],
)
def test_licence_of_a_folder(tmp_path, content, expected):
    assert license_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_bytes(content)
    assert license_of(str(tmp_path)) == expected


def test_names_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name_of("Qwen/Qwen2.5-1.5B-Instruct") == "Qwen/Qwen2.5-1.5B-Instruct"
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert [hub_name_of(path) for path in ("models/mine", "/a/b", "./b", "a/b/c")] == [None] * 4
    assert license_of("nobody/nothing") is None


def test_run_writes_its_facts(tiny_policy_folder, tmp_path):
    """Scores, settings and a rationale of a real run, though the export itself comes before the report."""
    module = make_module(Policy.load(str(tiny_policy_folder)))
    small = OfflineSize(documents=40, queries=12, per_module=6, candidates=4, per_label=4)
    callbacks: list[L.Callback] = [
        RationaleTable(str(tmp_path / "r.md"), texts=2, every_n_rollout_batches=0),
        Export(str(tmp_path / "export")),
        FinalReport(
            str(tmp_path), {"docstrings": lambda: offline_tasks(["networkx"], str(tmp_path / "cache"), size=small)[:1]}, examples=0
        ),
    ]
    fit(module, callbacks, tmp_path, batches=1)
    data, text = ModelCard.load(tmp_path / "export" / "README.md").data, (tmp_path / "export" / "README.md").read_text()
    (result,) = data.eval_results
    (task,) = callbacks[2].scores["GRACE"].tasks.items()
    assert (result.dataset_name, result.metric_value) == (task[0], pytest.approx(task[1], abs=1e-4))
    assert callbacks[0].after[0].rationale.strip() in text
    assert "| K, rationales of a text | 3 |" in text
    assert "| reward | document() |" in text
    assert "| Base + reasoning |" in text


def test_baseline_has_a_card(tiny_policy_folder, tmp_path):
    fit(make_contrastive(Policy.load(str(tiny_policy_folder))), [Export(str(tmp_path / "export"))], tmp_path, batches=1)
    text = (tmp_path / "export" / "README.md").read_text()
    assert ModelCard(text).data.eval_results is None
    assert "| method | CL |" in text


# ---- publishing


@pytest.fixture
def exported(tiny_policy, tmp_path) -> Path:
    return export(tiny_policy, SETTINGS, tmp_path / "export")


def test_an_export_has_no_secrets(exported):
    assert secrets_in(exported) == []


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        (".env", "A=1", ".env: a file of keys"),
        ("sub/server.pem", "x", "sub/server.pem: a file of keys"),
        ("notes.md", "hf_" + "a1B2" * 9, "notes.md: a token, a key or a password in its text"),
        ("notes.md", "http://me:letmein@tracking.example", "notes.md: a token, a key or a password in its text"),
        ("extra.json", '{"logger": {"api_key": "abcdefgh"}}', "extra.json: the setting logger.api_key"),
        ("config.md", "password: from-the-environment-1", "config.md: a token, a key or a password in its text"),
        ("config.yaml", "logger:\n  api_key: 'abcdefgh'  # mine", "config.yaml: the setting api_key"),
        ("start.sh", "set -e\nexport HF_TOKEN=abcdefgh", "start.sh: the setting HF_TOKEN"),
        ("my.env", 'DB_PASSWORD="a b"', "my.env: the setting DB_PASSWORD"),
        ("ID.PEM", "x", "ID.PEM: a file of keys"),
        ("notes.md", "github_pat_" + "a1B2_" * 9, "notes.md: a token, a key or a password in its text"),
        ("notes.md", "glpat-" + "a1B2" * 5, "notes.md: a token, a key or a password in its text"),
        ("notes.md", "xoxb-" + "1234567890-" * 2 + "aB1c", "notes.md: a token, a key or a password in its text"),
        ("tokenizer_config.json", '{"hf_token": "abcdefgh"}', "tokenizer_config.json: the setting hf_token"),
    ],
)
def test_secrets_are_refused(exported, name, content, why, monkeypatch):
    monkeypatch.setenv("SOME_PASSWORD", "from-the-environment-1")
    (exported / name).parent.mkdir(exist_ok=True)
    (exported / name).write_text(content)
    with pytest.raises(SystemExit, match=r"^push: .* has secrets in it, and nothing was uploaded: ") as caught:
        main([str(exported), "someone/name"])
    assert str(caught.value).endswith(why)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", '{"boi_token": "<start_of_image>", "extra_special_tokens": {"eoi_token": "<end_of_image>"}}'),
        ("special_tokens_map.json", '{"boi_token": {"content": "<start_of_image>"}}'),
        ("vocab.json", '{"password": 7, "api_key": 8, "://me:word@": 9}'),
        ("config.yaml", "api_key: ${oc.env:KEY}\npassword: null\nsecret: '***'\ntoken:\n  max_tokens: 64\n# token: is asked for"),
        ("start.sh", "export HF_TOKEN=$1\nTOKEN=\n"),
    ],
)
def test_names_of_tokens_and_references_are_no_secrets(exported, name, content):
    (exported / name).write_text(content)
    assert secrets_in(exported) == []


@pytest.mark.parametrize(("endpoint", "repository"), [("foo://bar", "someone/name"), ("http://127.0.0.1:9", "owner/na..me")])
def test_errors_of_the_hub_are_one_line(exported, tmp_path, endpoint, repository):
    command = [sys.executable, "-m", "src.modules.encoder.push", str(exported), repository]
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_TOKEN": "x", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (1, 1), done.stderr
    assert done.stderr.startswith("push: ")


PUBLISH_AND_LOAD = """
import sys
from src.modules.encoder.encoder import RationaleEncoder
from src.modules.encoder.push import main

main([sys.argv[1], "someone/an-encoder"])
published, local = (RationaleEncoder.from_pretrained(where, device="cpu") for where in ("someone/an-encoder", sys.argv[1]))
print(abs(published.encode(["a text", "another"]) - local.encode(["a text", "another"])).max())
"""


def test_published_export_is_loaded_by_its_name(exported, tmp_path):
    repositories: Repositories = {}
    with local_hub(repositories) as hub:
        environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_x", "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-c", PUBLISH_AND_LOAD, str(exported)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.strip().splitlines()[-1]) < 1e-6
    (files,) = repositories.values()
    assert {"README.md", "grace.json", "model.safetensors"} <= files.keys()
    assert all((exported / name).read_bytes() == content for name, content in files.items())


def test_what_cannot_be_published_is_one_line(exported, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"^push: .* is no export: it has no grace\.json$"):
        main([str(tmp_path), "someone/name"])
    with pytest.raises(SystemExit, match=r"^push: [^\n]+$"):  # the tests run with HF_HUB_OFFLINE=1
        main([str(exported), "someone/name"])
