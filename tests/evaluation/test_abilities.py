"""General abilities: the interval against a bootstrap, lm-eval on the tiny policy, a policy that is broken on purpose."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from src.datamodules.docstrings import collect
from src.evaluation.abilities import AbilityScore, ability_markdown, ability_table, compare, run_abilities
from src.evaluation.tasks.ability_tasks import ability_folder, task_configs
from src.modules.policy.model import Policy
from src.modules.prompt.plain_text import PlainText
from tests.conftest import ROOT

CACHE = ROOT / "data" / "cache"


def score(values: list[float], weights: list[float] | None = None, higher_is_better: bool = True) -> AbilityScore:
    return AbilityScore("m", higher_is_better, tuple(values), tuple(weights or [1.0] * len(values)))


@pytest.mark.parametrize("weighted", [False, True])
def test_interval_is_that_of_a_bootstrap(weighted):
    rng = np.random.default_rng(0)
    n = 400
    weights = rng.integers(50, 400, n).astype(float) if weighted else np.ones(n)
    before = rng.normal(2.0, 0.5, n) * weights
    after = before + rng.normal(0.02, 0.3, n) * weights
    change = compare(score(list(before), list(weights)), score(list(after), list(weights)), 0.0)
    rows = rng.integers(0, n, (4000, n))
    gains = (after - before)[rows].sum(axis=1) / weights[rows].sum(axis=1)
    low, high = np.quantile(gains, [0.025, 0.975])
    assert change.gain == pytest.approx((after.sum() - before.sum()) / weights.sum())
    assert (change.low, change.high) == pytest.approx((low, high), abs=0.1 * (high - low))


@pytest.mark.parametrize(
    ("before", "after", "higher", "verdict"),
    [
        ([1.0, 0.0] * 200, [1.0, 0.0] * 200, True, "kept"),
        ([1.0] * 400, [1.0] * 200 + [0.0] * 200, True, "lost"),
        ([0.0] * 400, [0.0] * 200 + [1.0] * 200, True, "kept"),  # better is kept too
        ([2.0, 3.0] * 200, [2.5, 3.4] * 200, False, "lost"),  # of bits, fewer are better
        ([2.5, 3.4] * 200, [2.0, 3.0] * 200, False, "kept"),
        ([1.0, 0.0] * 4, [0.0, 1.0] * 4, True, "unclear"),
        ([1.0], [1.0], True, "unclear"),  # one question says nothing
    ],
)
def test_verdicts(before, after, higher, verdict):
    change = compare(score(before, higher_is_better=higher), score(after, higher_is_better=higher), 0.02)
    assert change.verdict == verdict
    assert change.low <= change.gain <= change.high


def test_loss_within_the_tolerance_is_none():
    before, after = score([1.0] * 1000), score([1.0] * 990 + [0.0] * 10)
    assert compare(before, after, 0.02).verdict == "kept"
    assert compare(before, after, 0.0).verdict == "lost"


def test_other_questions_do_not_compare():
    for other in (score([1.0, 1.0]), replace(score([1.0]), metric="n")):
        with pytest.raises(ValueError, match="other questions or metrics"):
            compare(score([1.0]), other, 0.1)
    with pytest.raises(ValueError, match=r"abilities\.tolerance=-1"):
        compare(score([1.0]), score([1.0]), -1)


def test_tables_name_every_ability():
    changes = {"choice": compare(score([1.0, 0.0] * 50), score([1.0, 0.0] * 50), 0.02)}
    console = Console(width=200, record=True)
    console.print(ability_table(changes))
    for text in (console.export_text(), ability_markdown(changes)):
        assert all(word in text for word in ("choice", "0.5000", "kept"))


def test_folder_has_lm_evals_form(tmp_path):
    folder = ability_folder(["networkx"], tmp_path, 30)
    assert ability_folder(["networkx"], tmp_path, 30) == folder
    docs = {doc.body: doc for doc in collect(["networkx"], tmp_path)}
    questions = [json.loads(line) for line in (folder / "docstring_choice.jsonl").read_text().splitlines()]
    assert len(questions) == 30
    for question in questions:
        assert question["options"][question["answer"]] == docs[question["body"]].summary
        assert len(set(question["options"])) == 4
    assert {question["answer"] for question in questions} == {0, 1, 2, 3}
    for name, config in task_configs(folder).items():
        assert yaml.safe_load((folder / f"{name}.yaml").read_text()) == config
    with pytest.raises(ValueError, match="name more packages"):
        ability_folder(["networkx"], tmp_path, 10**6)


@pytest.fixture(scope="module")
def shipped() -> Policy:
    return Policy.load(str(ROOT / "experiments" / "tiny_policy" / "weights"))


@pytest.fixture(scope="module")
def before(shipped: Policy) -> dict[str, AbilityScore]:
    pytest.importorskip("lm_eval")
    return run_abilities(shipped, "offline", ["networkx"], CACHE, count=24)


def test_scores_are_those_of_a_plain_pass(shipped, before):
    folder = ability_folder(["networkx"], CACHE, 24)
    texts = [json.loads(line)["text"] for line in (folder / "docstring_text.jsonl").read_text().splitlines()]
    eos = shipped.tokenizer.eos_token_id
    for text, bits, size in list(zip(texts, before["docstring_text"].values, before["docstring_text"].weights, strict=True))[:4]:
        ids = torch.tensor([eos, *PlainText(shipped.tokenizer)([text])[0]])
        with torch.no_grad():
            logprobs = shipped.model(input_ids=ids.unsqueeze(0)).logits[0, :-1].log_softmax(dim=-1)
        expected = -float(logprobs.gather(1, ids[1:].unsqueeze(1)).sum()) / math.log(2)
        assert bits == pytest.approx(expected, rel=1e-4)
        assert size == len(text.encode())
    assert before["docstring_choice"].score > 0.25  # better than chance
    assert set(before["docstring_choice"].values) <= {0.0, 1.0}


def test_broken_policy_loses_abilities(shipped, before):
    random_state, mode = torch.random.get_rng_state(), shipped.training
    again = run_abilities(shipped, "offline", ["networkx"], CACHE, count=24)
    assert {task: asdict(value) for task, value in again.items()} == {task: asdict(value) for task, value in before.items()}
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert shipped.training == mode
    assert {task: compare(value, again[task], 0.02).verdict for task, value in before.items()} == dict.fromkeys(before, "kept")
    broken = Policy.load(str(ROOT / "experiments" / "tiny_policy" / "weights"))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for weight in broken.model.model.layers[0].parameters():
            weight.add_(torch.randn_like(weight))
    after = run_abilities(broken, "offline", ["networkx"], CACHE, count=24)
    change = compare(before["docstring_text"], after["docstring_text"], 0.02)
    assert change.verdict == "lost"
    assert change.high < 0


@pytest.mark.slow  # indexes lm-eval's 10,000 files
def test_missing_task_data_is_one_line(shipped):
    pytest.importorskip("lm_eval")
    with pytest.raises(FileNotFoundError, match="the data of piqa is out of reach") as caught:
        run_abilities(shipped, "piqa", ["networkx"], CACHE, count=4)
    assert "\n" not in str(caught.value)
