"""Checkpoints on disk: round trips, damage, full disks, killed processes."""

import json
import os
import pickle
import resource
import signal
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from src.utils.checkpoint_io import CheckpointError, FolderCheckpoints, intact_checkpoints, read_checkpoint, tidy
from tests.modules.policy.test_loading import Touch

IO = FolderCheckpoints()


def checkpoint(seed: int = 0, size: int = 50) -> dict[str, Any]:
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    views = {"view": matrix[:, :3], "transposed": matrix.T, "empty": torch.empty(0)}
    state = {"a": matrix, "tied": matrix, "half": matrix.to(torch.bfloat16), **views}
    optimizer = {"state": {0: {"exp_avg": matrix * 2}}}
    return {"state_dict": state, "optimizer_states": [optimizer], "seed": seed, "about": {"rollout_batches": 7}}


def test_saved_checkpoint_comes_back(tmp_path):
    saved, folder = checkpoint(), tmp_path / "new" / "batch_7.ckpt"
    IO.save_checkpoint(saved, folder)
    loaded = IO.load_checkpoint(folder)
    assert loaded["state_dict"].keys() == saved["state_dict"].keys()
    assert all(loaded["state_dict"][name].equal(tensor) for name, tensor in saved["state_dict"].items())
    assert loaded["optimizer_states"][0]["state"][0]["exp_avg"].equal(saved["optimizer_states"][0]["state"][0]["exp_avg"])
    assert loaded["seed"] == 0
    assert set(load_file(folder / "weights.safetensors")) == {"a", "half", "view", "transposed", "empty"}
    assert [path.name for path in folder.parent.iterdir()] == ["batch_7.ckpt"]


def test_replacing_single_files_and_removing(tmp_path):
    for seed in (0, 1):
        IO.save_checkpoint(checkpoint(seed), tmp_path / "batch_7.ckpt")
    assert IO.load_checkpoint(tmp_path / "batch_7.ckpt")["seed"] == 1
    torch.save(checkpoint(2), tmp_path / "single.ckpt")
    assert read_checkpoint(tmp_path / "single.ckpt")["seed"] == 2
    IO.remove_checkpoint(tmp_path / "batch_7.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["single.ckpt"]


def read_so_far() -> int:
    """Bytes that this process has read from files, by calls and not through mapped memory."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_alone_reads_all(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    IO.save_checkpoint(checkpoint(size=1000), tmp_path / "batch_7.ckpt")  # 4 MB of weights and as much of the optimiser's
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_rank", lambda: rank)
    before = read_so_far()
    loaded = IO.load_checkpoint(tmp_path / "batch_7.ckpt")
    assert (read_so_far() - before > 2**23) == (rank == 0)
    assert read_so_far() - before > 2**23 or read_so_far() - before < 2**20
    assert loaded["optimizer_states"][0]["state"][0]["exp_avg"].equal(checkpoint(size=1000)["state_dict"]["a"] * 2)


# ---- damage


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 10)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)


TOLD = {truncate: r"has \d+ bytes of|broken", flip: "checksum differs", Path.unlink: "is missing"}
DAMAGES = [(name, damage) for name in ("weights.safetensors", "state.pt", "checkpoint.json") for damage in TOLD]
DAMAGES.remove(("checkpoint.json", flip))  # a changed number there agrees with no file, or does not matter


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_damage_is_named_with_the_checkpoint_before(tmp_path, name, damage):
    for batches in (10, 20, 30):
        IO.save_checkpoint(checkpoint(batches), tmp_path / f"batch_{batches}.ckpt")
        os.utime(tmp_path / f"batch_{batches}.ckpt", (batches, batches))
    damage(tmp_path / "batch_30.ckpt" / name)
    with pytest.raises(CheckpointError, match=rf"batch_30.ckpt cannot be read as a checkpoint: {name}.*({TOLD[damage]})") as caught:
        IO.load_checkpoint(tmp_path / "batch_30.ckpt")
    assert str(caught.value).endswith(f"ckpt_path={tmp_path}/batch_20.ckpt")
    assert "\n" not in str(caught.value)
    assert IO.load_checkpoint(tmp_path / "batch_20.ckpt")["seed"] == 20


@pytest.mark.parametrize(
    "entries",
    [{"weights.safetensors": None}, {"weights.safetensors": 7, "state.pt": []}, {"weights.safetensors": {}, "state.pt": {}}, [], {}],
    ids=str,
)
def test_odd_list_of_files_is_damage(tmp_path, entries):
    IO.save_checkpoint(checkpoint(), tmp_path / "batch_7.ckpt")
    (tmp_path / "batch_7.ckpt" / "checkpoint.json").write_text(json.dumps({"files": entries}))
    with pytest.raises(CheckpointError, match=r"batch_7.ckpt cannot be read as a checkpoint: checkpoint.json"):
        IO.load_checkpoint(tmp_path / "batch_7.ckpt")
    assert list(intact_checkpoints(tmp_path)) == []


@pytest.mark.parametrize("twins", ["{", "[1]", '{"tied": "nowhere"}', '{"tied": ["a"]}', '"a"'])
def test_odd_tied_weights_are_damage(tmp_path, twins):
    folder = tmp_path / "batch_7.ckpt"
    IO.save_checkpoint(checkpoint(), folder)
    save_file(load_file(folder / "weights.safetensors"), folder / "weights.safetensors", metadata={"twins": twins})
    about = json.loads((folder / "checkpoint.json").read_text())
    content = (folder / "weights.safetensors").read_bytes()
    about["files"]["weights.safetensors"] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    (folder / "checkpoint.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=r"batch_7.ckpt cannot be read as a checkpoint: its list of tied weights"):
        IO.load_checkpoint(folder)


def test_no_damaged_checkpoint_is_offered(tmp_path):
    for batches in (10, 20):
        IO.save_checkpoint(checkpoint(batches), tmp_path / f"batch_{batches}.ckpt")
        truncate(tmp_path / f"batch_{batches}.ckpt" / "state.pt")
    with pytest.raises(CheckpointError, match="no other intact checkpoint"):
        IO.load_checkpoint(tmp_path / "batch_20.ckpt")
    (tmp_path / "old.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match=r"old.ckpt cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "old.ckpt")


def test_checkpoint_cannot_run_code(tmp_path):
    torch.save({"state_dict": {}, "code": Touch(tmp_path / "ran")}, tmp_path / "single.ckpt", pickle_module=pickle)
    IO.save_checkpoint({**checkpoint(), "code": Touch(tmp_path / "ran")}, tmp_path / "folder.ckpt")
    for name in ("single.ckpt", "folder.ckpt"):
        with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()


# ---- full disks, killed processes


def test_quota_leaves_other_checkpoints_intact(tmp_path):
    """No file of this process may grow beyond 100 kB, as if the disk were full."""
    IO.save_checkpoint(checkpoint(1), tmp_path / "batch_1.ckpt")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"no room to write .*batch_2.ckpt .*ckpt_path=last"):
            IO.save_checkpoint(checkpoint(2, size=300), tmp_path / "batch_2.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["batch_1.ckpt"]
    assert IO.load_checkpoint(tmp_path / "batch_1.ckpt")["seed"] == 1


def test_process_killed_while_saving_leaves_intact_checkpoints(tmp_path):
    big = checkpoint(size=400)
    for attempt in range(4):
        child = os.fork()
        if child == 0:
            for count in range(1000):
                IO.save_checkpoint(big, tmp_path / f"batch_{attempt}_{count}.ckpt")
                IO.remove_checkpoint(tmp_path / f"batch_{attempt}_{count - 1}.ckpt")
            os._exit(0)
        time.sleep(0.15 + 0.13 * attempt)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    found = list(tmp_path.glob("*.ckpt"))
    assert len(found) >= 1
    assert set(intact_checkpoints(tmp_path)) == set(found)


def test_tidy_removes_leftovers_and_restores(tmp_path):
    IO.save_checkpoint(checkpoint(1), tmp_path / "batch_1.ckpt")
    (tmp_path / "batch_1.ckpt").rename(tmp_path / ".batch_1.ckpt.77.replaced")  # killed between the two renames
    (tmp_path / ".batch_1.ckpt.77.partial").mkdir()
    (tmp_path / ".batch_0.ckpt.77.removed").mkdir()
    (tmp_path / ".last.ckpt.77.link").symlink_to("batch_1.ckpt")
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["batch_1.ckpt"]
    assert IO.load_checkpoint(tmp_path / "batch_1.ckpt")["seed"] == 1
