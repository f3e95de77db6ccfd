import pytest

from experiments.where_to_reason import study


@pytest.mark.timeout(900)
def test_four_rows(tiny_policy_folder, tmp_path):
    study.main([str(tiny_policy_folder), "--limit", "60", "--timed", "3", "--output", str(tmp_path / "results.md")])
    lines = (tmp_path / "results.md").read_text().splitlines()
    rows = {row[0]: row[1:] for row in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|"))}
    both, query, document, none = (rows[value] for value in ("both", "query", "document", "none"))
    assert len({tuple(row[:2]) for row in (both, query, document, none)}) == 4
    assert (query[3], query[4], document[3], document[4]) == (both[3], none[4], none[3], both[4])  # speeds of the sides
