import pytest

from src.callbacks.export import Export
from src.modules.encoder.encoder import RationaleEncoder
from tests.callbacks.conftest import fit


def test_export_says_where_to_reason(module, tmp_path):
    fit(module, [Export(str(tmp_path / "own")), Export(str(tmp_path / "queries"), rationale="query")], tmp_path, batches=1)
    assert RationaleEncoder.from_pretrained(tmp_path / "own", "cpu").rationale == module.settings.rationale == "both"
    assert RationaleEncoder.from_pretrained(tmp_path / "queries", "cpu").rationale == "query"


def test_unknown_side():
    with pytest.raises(ValueError, match="rationale='queries': it is both, query, document or none"):
        Export("folder", rationale="queries")
