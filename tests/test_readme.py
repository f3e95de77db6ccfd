"""The commands of README.md, each run as far as a small machine without a network goes."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest

import evaluate
from src.evaluation.benchmarks import named_tasks
from src.modules.encoder.export import export
from src.modules.encoder.settings import EncoderSettings
from src.modules.policy.model import Policy
from tests.conftest import ROOT, Compose
from train import train

README = (ROOT / "README.md").read_text(encoding="utf-8")

SMALL = [
    *("logger=none", "callbacks=minimal", "trainer.accelerator=cpu", "trainer.limit_train_batches=1", "datamodule.seed=0"),
    *("rollout.max_new_tokens=4", "module.num_generations=2"),
    "callbacks.metrics.figure_path=null",  # drawing takes longer than the rest; tests/test_train.py draws
]


BASELINE = {
    "module.num_generations=2": None,
    "datamodule.seed=0": "datamodule.batch_size=8",
}
"""What stands in for the settings above where nothing is rolled out."""


def commands(program: str) -> list[str]:
    """The command lines of the README's shell blocks that begin with `program`, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.startswith(program)]


def points(overrides: list[str]) -> list[list[str]]:
    """The first and the last point of a sweep, or the one run."""
    if overrides[0] != "-m":
        return [overrides]
    split = [override.split("=") for override in overrides[1:]]
    return [[f"{name}={values.split(',')[end]}" for name, values in split] for end in (0, -1)]


@pytest.fixture
def triplets(tmp_path: Path) -> Path:
    file = tmp_path / "triplets.jsonl"
    count = 80  # for a batch of 64, and some held out
    records = [{"query": f"query {i}", "positive": f"a document about {i}", "negative": f"another {i}"} for i in range(count)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.mark.parametrize("command", commands("python train.py"))
def test_train_commands(command: str, compose: Compose, triplets: Path) -> None:
    for overrides in points(shlex.split(command)[2:] or ["seed=0"]):
        own = [re.sub(r"^datamodule\.path=.*", f"datamodule.path={triplets}", override) for override in overrides]
        if not any(override.startswith(("experiment=", "hparams_search=")) for override in own):
            own.append("experiment=smollm2_sup")  # the default, with the tiny policy in its place
        small = [override for override in SMALL if override.split("=")[0] not in {o.split("=")[0] for o in own}]
        if any(override.startswith("debug=") for override in own):  # brings settings for callbacks that `minimal` leaves out
            assert compose(*own).trainer.limit_train_batches == 2  # and is run by tests/test_train.py
            continue
        metric = "reward/total/mean"
        if "baseline" in own[0]:
            small, metric = [other for override in small if (other := BASELINE.get(override, override))], "update/loss"
        if "tiny_baseline" in own[0] or "smollm2_baseline" in own[0]:
            small.remove("datamodule.batch_size=8")  # of docstrings a batch is groups of them
        cfg = compose(*own, *small)
        cfg.packages.train = ["urllib3"]
        cfg.optimized_metric = metric
        if cfg.ckpt_path == "last":  # and there is a run: tests/test_train.py
            with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
                train(cfg)
            continue
        assert (train(cfg) is None) == cfg.dry_run


def test_the_default_evaluation_and_one_of_a_checkpoint_are_the_documented_ones(compose: Compose) -> None:
    assert "python evaluate.py" in commands("python evaluate.py")  # run by tests/test_evaluate.py on small tasks
    for command in commands("python evaluate.py"):
        overrides = shlex.split(command)[2:]
        cfg = compose(*overrides, config_name="evaluate")
        if cfg.model is not None:  # neither a checkpoint of yours nor the hub is here: one line says so
            with pytest.raises(SystemExit, match=r"^evaluate.py: no "):
                evaluate.evaluate(cfg)


def test_the_documented_task_of_ones_own_is_one(tmp_path: Path) -> None:
    (description,) = re.findall(r"```yaml\n(name: .*?)```", README, flags=re.DOTALL)
    (tmp_path / "Tickets.yaml").write_text(description)
    (tmp_path / "tickets.tsv").write_text("4.5\tit crashes\tit stops at once\n0.5\tit crashes\tthe colour is wrong\n")
    (task,) = named_tasks(["Tickets"], tmp_path)
    task.load_data()
    assert task.dataset["test"]["score"] == [4.5, 0.5]  # type: ignore[index]


def test_python_examples(tiny_policy_folder: Path, tmp_path: Path) -> None:
    folder = export(Policy.load(str(tiny_policy_folder)), EncoderSettings.load(tiny_policy_folder), tmp_path / "export")
    names: dict[str, dict[str, object]] = {}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)):
        exec(block.replace("outputs/smollm2_sup/.../export", str(folder)), names.setdefault(str(number), {}))
    ours, theirs = names["0"], names["1"]
    assert len(names) == 2
    for name in ("plain", "vectors"):
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5)  # type: ignore[arg-type]
    assert len(ours["rationales"]) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("command", commands("make"))
def test_make_targets_exist(command: str) -> None:
    done = subprocess.run(["make", "--dry-run", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_links_and_pictures_are_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
