"""The semantic search example, on one small package."""

import random
import re
import shlex

import numpy as np
import pytest

from experiments.semantic_search.search import build, main, search, units
from src.datamodules.docstrings import collect
from src.modules.encoder.encoder import RationaleEncoder
from tests.conftest import ROOT

FOLDER = ROOT / "experiments" / "semantic_search"
POLICY = ROOT / "experiments" / "tiny_policy" / "weights"


def test_summaries_find_their_docstrings(tmp_path):
    encoder = RationaleEncoder.from_pretrained(POLICY)
    documents = random.Random(0).sample(collect(["joblib"], tmp_path), 30)
    index = build(encoder, documents)
    np.testing.assert_allclose(np.linalg.norm(index.vectors, axis=1), 1.0, atol=1e-5)
    queries = [doc.summary for doc in documents[:10]]
    found = search(encoder, index, queries, hits=3)
    first = [hits[0].document.summary for _, hits in found]
    assert sum(query == best for query, best in zip(queries, first, strict=True)) >= 7
    for query, (_, hits) in zip(queries, found, strict=True):
        cosines = units(encoder.encode([query])) @ index.vectors.T
        assert [hit.cosine for hit in hits] == pytest.approx(sorted(cosines[0], reverse=True)[:3], abs=1e-5)
        assert all(hit.rationale == index.rationales[documents.index(hit.document)] for hit in hits)


def test_command_shows_hits_and_rationales(tmp_path, capsys):
    main(["read and write a cache", "--packages", "joblib", "--cache", str(tmp_path), "--hits", "2"])
    shown = capsys.readouterr().out
    assert "128 docstrings of joblib read in" in shown
    assert len(re.findall(r"^ 0\.\d{3}  joblib\S+$", shown, flags=re.MULTILINE)) == 2
    assert shown.count("rationale <think>") == 3  # the query's and two hits'


def test_readme_commands_parse(capsys):
    lines = re.findall(r"^python -m experiments\.semantic_search\.search.*", (FOLDER / "README.md").read_text(), flags=re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        with pytest.raises(SystemExit) as ended:
            main([*shlex.split(line.split("#")[0])[3:], "--help"])
        assert ended.value.code == 0
    assert "--packages" in capsys.readouterr().out
