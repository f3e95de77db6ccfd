"""The baselines as a user runs them: trained and resumed by train.py, and read by evaluate.py."""

from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient

import evaluate
from experiments.tiny_policy.policy import TINY_INSTRUCTION
from src.modules.encoder.export import export, load_policy
from src.modules.encoder.settings import EncoderSettings
from src.utils.checkpoint_io import read_checkpoint
from tests.runs import mlflow_runs, steps
from train import train

NAMES = {"tiny_baseline_cl_sup": "CL", "tiny_baseline_simcse_unsup": "SimCSE"}
FEW = {"tiny_baseline_cl_sup": [], "tiny_baseline_simcse_unsup": ["datamodule.batch_size=3"]}
"""Most docstrings are too long for the fixtures' tokenizer."""


@pytest.mark.parametrize("experiment", NAMES)
def test_tiny_baseline_trains_and_resumes(experiment, run_train, places, tracking_uri, tmp_path, compose):
    title, small = NAMES[experiment], [f"experiment={experiment}", "debug=fast_baseline", "module.micro_batch_tokens=600"]
    small += [*FEW[experiment], *places[1:]]
    done = run_train(*small, "callbacks.mteb=null", "callbacks.checkpoint.monitor=null")
    assert done.returncode == 0, done.stderr[-3000:]
    for expected in ("Base", title, f"{tmp_path}/out/report.md", "batch 2/2  loss "):
        assert expected in done.stdout, done.stdout[-3000:]
    for unexpected in ("reasoning", "Rationales", "rollout batch", "reward"):
        assert unexpected not in done.stdout
    client = MlflowClient(tracking_uri)
    (run,) = mlflow_runs(client, tmp_path.name)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "after 2 batches" in report
    assert not [name for name in ("reward_terms.png", "rationales.md", "similarities.png") if name in report]
    assert not {file.path for file in client.list_artifacts(run.info.run_id)} & {"rationales", "similarities"}
    assert run.info.status == "FINISHED"
    own = [f"contrastive/{name}" for name in ("accuracy", "unrelated_similarity")]
    for metric in ("update/loss", "kl/from_start", "throughput/update_tokens_per_second", *own):
        assert steps(client, run, metric) == [1, 2], metric
    assert {"test/base/average", f"test/{title.lower()}/average"} <= set(run.data.metrics)
    assert "test/base_reasoning/average" not in run.data.metrics

    exported, settings = load_policy(tmp_path / "out" / "export")
    last = tmp_path / "out" / "checkpoints" / "last.ckpt"
    stored = load_policy(last)[0].state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in exported.state_dict().items())
    assert settings.rationale == "none"

    same = [setting for setting in small if not setting.startswith(("debug=", "hydra."))]
    more = ["callbacks=minimal", "logger=none", "trainer.limit_train_batches=2", "trainer.max_epochs=2"]
    cfg = compose(*same, *more, f"ckpt_path={last}", "trainer.accelerator=cpu")
    train(cfg)
    checkpoint = read_checkpoint(Path(cfg.paths.output_dir) / "checkpoints" / "last.ckpt")
    assert checkpoint["grace"]["rollout_batches"] == 4


def test_export_is_read_without_rationales(compose, tiny_policy, tmp_path):
    export(tiny_policy, EncoderSettings(TINY_INSTRUCTION, 96, 8, rationale=False), tmp_path / "runs" / "cl" / "now" / "export")
    small = ["size=small", "packages.test=[networkx]", "~logger", "max_new_tokens=1"]
    base = [f"base={tiny_policy.path}", f"paths.output_root={tmp_path}/runs"]
    beside = evaluate.evaluate(compose(*base, *small, config_name="evaluate"))
    assert list(beside) == ["Base", "Base + reasoning", "Trained, without rationales"]
    assert beside["Trained, without rationales"].tasks == beside["Base"].tasks  # the same weights
