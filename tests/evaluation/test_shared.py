"""An evaluation of two processes: rank 0 runs MTEB, both embed."""

from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from src.evaluation.run_tasks import EvaluationStoppedError, run_tasks
from src.evaluation.tasks.offline_tasks import OfflineSize, offline_tasks
from src.modules.distributed.ranks import Ranks
from src.modules.policy.model import Policy
from tests.evaluation.builders import Recording, encoder
from tests.programs import free_port

SIZE = OfflineSize(documents=61, queries=24, per_module=5, candidates=6, per_label=8)


class Broken(Recording):
    """Cannot embed on the second rank."""

    def encode(self, texts, *arguments, **options):
        if distributed.get_rank() == 1:
            raise ValueError("no such luck")
        return super().encode(texts, *arguments, **options)


def one_of_two(rank: int, port: int, policy_folder: str, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    ranks, policy = Ranks(rank, 2), Policy.load(policy_folder)
    tasks = offline_tasks(["networkx", "rich"], Path(folder, f"cache_{rank}"), SIZE)[:2] if rank == 0 else []
    own, options = encoder(policy), {"embeddings_dir": Path(folder, "kept"), "ranks": ranks}
    scores = run_tasks(own, tasks, None, "tiny", **options)
    broken = run_tasks(Broken(policy, own.settings, own.engine), tasks[:1], None, "broken", ranks=ranks)
    with pytest.raises(EvaluationStoppedError):
        run_tasks(own, tasks, None, "tiny", **options, stop=lambda: True)
    Path(folder, "bad").mkdir(exist_ok=True)
    for file in Path(folder, "kept").glob("*.sqlite") if rank == 0 else ():
        Path(folder, "bad", file.name).write_text("no database, but long enough to be looked at")
    with pytest.raises(ValueError if rank == 0 else RuntimeError, match="no cache of embeddings" if rank == 0 else "rank 0"):
        run_tasks(own, tasks, None, "tiny", **{**options, "embeddings_dir": Path(folder, "bad")})
    found = {"scores": scores.tasks, "seen": own.seen, "broken": broken.failures}
    if rank == 0:
        alone = encoder(policy)
        found |= {"expected": run_tasks(alone, tasks, None, "tiny").tasks, "texts": set(alone.seen)}
    torch.save(found, Path(folder, f"{rank}.pt"))
    distributed.destroy_process_group()


@pytest.mark.timeout(900)
def test_two_processes_score_as_one(tmp_path: Path, tiny_policy_folder: Path) -> None:
    multiprocessing.spawn(one_of_two, (free_port(), str(tiny_policy_folder), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert first["scores"] == second["scores"] == pytest.approx(first["expected"], abs=1e-6)
    assert set(first["seen"]) | set(second["seen"]) == first["texts"]
    assert len(first["seen"]) == len(second["seen"]) <= len(first["texts"]) / 2 + 2  # a text may make the shares even
    assert first["broken"] == second["broken"] == {"DocstringRetrieval": "no such luck"}
