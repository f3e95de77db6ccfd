"""What a user sees before a run starts: the records and the prompt of a dry run, and what is out of reach."""

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import open_dict

from src.datamodules.preview import preview
from src.datamodules.sources import require_sources
from tests.datamodules.builders import write
from train import train

ALL_NLI = "hf://datasets/sentence-transformers/all-nli/triplet"


def hub_names(cfg, model="Qwen/Qwen2.5-1.5B-Instruct"):
    cfg.policy.path = model
    return cfg


@pytest.mark.parametrize(
    ("experiment", "download"),
    [
        ("qwen1.5b_sup", "hf download sentence-transformers/all-nli --repo-type dataset --include 'triplet*' --local-dir all-nli"),
        ("baseline_simcse_unsup", "hf download princeton-nlp/datasets-for-simcse --repo-type dataset --include 'wiki1m_for_simcse.txt*'"),
    ],
)
def test_model_and_data_out_of_reach_are_two_lines(compose, experiment, download):
    with pytest.raises(SystemExit) as caught:
        train(hub_names(compose(f"experiment={experiment}")))
    model, data = str(caught.value).splitlines()
    assert model.startswith("train.py: no policy at 'Qwen/Qwen2.5-1.5B-Instruct'")
    assert (
        "`hf download Qwen/Qwen2.5-1.5B-Instruct --local-dir Qwen2.5-1.5B-Instruct`, copy that folder here, and give its path (policy.path="
        in model
    )
    assert data.startswith("no data at 'hf://datasets/")
    assert download in data
    assert "datamodule.path=<local file or folder>" in data


def test_missing_values_are_lines(compose):
    cfg = compose("experiment=triplets_sup")
    cfg.policy.path = "???"
    cfg.datamodule.path = "???"
    with pytest.raises(FileNotFoundError, match=r"^policy\.path has no value: .*\ndatamodule\.path has no value: "):
        require_sources(cfg)


def test_default_data_is_announced(compose, tmp_path, monkeypatch, caplog):
    """As it works where the hub is in reach: a folder that is laid out like the hub's data set."""
    for split in ("train", "dev", "test"):
        (tmp_path / "hub" / "triplet").mkdir(parents=True, exist_ok=True)
        rows = [{"anchor": f"{split} {i}", "positive": f"positive {i}", "negative": f"negative {i}"} for i in range(80)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hub" / "triplet" / f"{split}-00000-of-00001.parquet")
    monkeypatch.setattr("src.datamodules.files.snapshot_download", lambda *_, **__: str(tmp_path / "hub"))
    small = ["rollout.max_new_tokens=4", "module.num_generations=2", "trainer.limit_train_batches=1", "trainer.accelerator=cpu"]
    with caplog.at_level("INFO"):
        train(compose("experiment=qwen1.5b_sup", "callbacks=minimal", "logger=none", *small, f"datamodule.cache_dir={tmp_path}/cache"))
    assert "the triplets of sentence-transformers/all-nli, from the hub; the paper trains on the Echo-embeddings" in caplog.text
    assert "read as query=anchor, positive=positive, negative=negative (names of sentence-transformers)" in caplog.text
    assert f"{ALL_NLI}: 80 records" in caplog.text


def test_dry_run_shows_records_and_a_prompt(compose, tmp_path, capsys):
    file = write(tmp_path / "data.jsonl", *({"sent0": f"q{i}", "sent1": f"p{i}", "hard_neg": "n" * 900} for i in range(5)))
    assert train(compose("experiment=triplets_sup", "dry_run=true", f"datamodule.path={file}", f"paths.cache_dir={tmp_path}/none")) is None
    shown = capsys.readouterr().out
    assert "the first 3; query=sent0, positive=sent1, negative=hard_neg (names of SimCSE)" in shown
    for line in (
        "  data.jsonl:3 (source data)",
        "    query     'q2'",
        "    positive  'p2'",
        f"'{'n' * 400}...'",
        "prompt       the first positive",
    ):
        assert line in shown, line
    assert "  | p0<|im_end|>" in shown
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["experiment=triplets_sup"], "records      not shown: no data at"),
        (["experiment=tiny_sup", "packages.train=[urllib3]"], "  urllib3"),
        (["experiment=tiny_unsup", "packages.train=[urllib3]"], "    text      '"),
        (["experiment=triplets_sup", "datamodule.path={folder}/bad.csv"], "records      not shown: bad.csv has no column query"),
        (["experiment=triplets_sup", "datamodule.path={folder}/bad.jsonl"], "  bad.jsonl:1: malformed: not JSON"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_previews(compose, tmp_path, overrides, expected):
    write(tmp_path / "bad.csv", b"a,b", b"c,d")
    write(tmp_path / "bad.jsonl", b"{")
    lines = preview(compose(*(override.format(folder=tmp_path) for override in overrides)))
    assert any(line.startswith(expected) for line in lines), lines


def test_preview_without_a_tokenizer(compose, tmp_path):
    cfg = hub_names(compose("experiment=tiny_sup", "packages.train=[urllib3]"))
    assert preview(cfg)[-1].startswith("prompt       not shown: no policy at 'Qwen/")
    shutil.rmtree(tmp_path / "none", ignore_errors=True)
    with open_dict(cfg):
        cfg.datamodule = {"_target_": "lightning.LightningDataModule"}
    assert preview(cfg) == ["records      not shown: LightningDataModule has no method preview(count)"]
