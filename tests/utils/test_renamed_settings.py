import pytest
from omegaconf import OmegaConf

from src.utils.renamed_settings import RENAMED, check_arguments, check_config


@pytest.mark.parametrize("prefix", ["", "+", "++", "~"])
@pytest.mark.parametrize("name", RENAMED)
def test_old_names_on_the_command_line(name, prefix):
    value = "" if "=" in name else "=3"
    with pytest.raises(SystemExit, match=rf"^train\.py: {name} is called {RENAMED[name]} now$"):
        check_arguments(["/here/train.py", "seed=1", f"{prefix}{name}{value}"])


def test_old_options_in_a_sweep():
    with pytest.raises(SystemExit, match="callbacks=contrastive_minimal is called callbacks=minimal now"):
        check_arguments(["train.py", "-m", "callbacks=study,contrastive_minimal"])


def test_current_names_pass():
    check_arguments(["train.py", "-m", "--cfg", "job", "seed=1", "~debug", "reward.hard_weight=0.1", *RENAMED.values()])


@pytest.mark.parametrize("name", [name for name in RENAMED if "=" not in name])
def test_old_names_in_a_composed_config(name):
    cfg = OmegaConf.create({"module": {"pathwise_reward": None}, "path": "???", "reward": None})
    check_config(cfg, "train.py")
    OmegaConf.update(cfg, name, None, force_add=True)
    with pytest.raises(SystemExit, match=rf"^evaluate\.py: {name} is called {RENAMED[name]} now$"):
        check_config(cfg, "evaluate.py")


def test_new_names_are_settings(compose):
    options = ["datamodule=docstrings", "reward=document", "reward@module.pathwise_reward=listwise"]
    cfgs = [compose(*options), compose("reward=listwise", "reward@module.pathwise_reward=document"), compose("datamodule=wiki1m")]
    for old, new in RENAMED.items():
        if "." in old:  # the others are options, or settings of evaluate.py
            assert any(new.rpartition(".")[2] in (OmegaConf.select(cfg, new.rpartition(".")[0]) or {}) for cfg in cfgs), new
            assert all(OmegaConf.select(cfg, old) is None for cfg in cfgs), old


@pytest.mark.parametrize("program", ["train.py", "evaluate.py"])
def test_programs_end_in_one_line(program, programs):
    done = programs.run(program, "module.num_rollouts=4")
    assert (done.returncode, done.stderr) == (1, f"{program}: module.num_rollouts is called module.num_generations now\n")


def test_old_names_in_an_experiment_file(tmp_path, programs):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nname: mine\nmodule: {num_rollouts: 4}\n")
    arguments = [f"hydra.searchpath=[{tmp_path}]", "experiment=mine", f"paths.output_root={tmp_path}/runs"]
    done = programs.run("train.py", *arguments)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "train.py: module.num_rollouts is called module.num_generations now"
