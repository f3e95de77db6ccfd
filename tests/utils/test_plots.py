import pytest

from src.utils.plots import TermHistory, curves_figure, reward_terms_figure, running_mean, scores_figure, similarities_figure


def test_running_mean():
    assert running_mean([1.0, 2.0, 3.0, 4.0], window=2) == [1.0, 1.5, 2.5, 3.5]
    assert running_mean([], window=3) == []


def test_reward_terms_figure(tmp_path):
    steps = list(range(1, 31))
    flat, moving = TermHistory(steps, [0.5] * 30, [0.0] * 30), TermHistory(steps, [0.01 * s for s in steps], [0.1] * 30)
    figure = reward_terms_figure({"total": moving, "negative": flat, "positive": moving}, {"negative": 1.0, "positive": 0.0})
    axes = figure.get_axes()
    assert len(axes) == 6
    assert [axis.get_title() for axis in axes[:3]] == ["negative (weight 1)", "positive (weight 0: only watched)", "total"]
    assert axes[0].get_ylabel() == "mean"
    assert axes[3].get_xlabel() == "rollout batch"
    assert axes[3].get_ylim()[0] == 0.0
    assert axes[2].get_legend() is not None
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_single_batch_can_be_drawn():
    assert len(reward_terms_figure({"total": TermHistory([1], [0.1], [0.0])}).get_axes()) == 2


def test_scores_figure_allows_for_missing_categories():
    figure = scores_figure({"Base": {"Retrieval": 0.2, "average": 0.2}, "GRACE": {"Retrieval": 0.3}}, "scores")
    assert [label.get_text() for label in figure.get_axes()[0].get_xticklabels()] == ["Retrieval", "average"]


def test_similarities_figure():
    before, after = {"positive": [0.5, 0.7, 0.6], "unrelated": [0.1, 0.2]}, {"positive": [0.9, 0.9, 0.9], "unrelated": [0.1, 0.0]}
    left, right = similarities_figure({"before": before, "after": after}).get_axes()
    assert left.get_xlim() == right.get_xlim()
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert labels == ["positive (3 pairs, mean 0.60)", "unrelated (2 pairs, mean 0.15)"]
    assert len(similarities_figure({"all alike": {"positive": [1.0, 1.0]}}).get_axes()) == 1


def test_curves_figure():
    many = [(step, float(step)) for step in range(1, 31)]
    figure = curves_figure({"rises": many, "one": [(3, 0.5)], "none": [], "few": many[:4], "fifth": many})
    titles = [axis.get_title() for axis in figure.get_axes() if axis.axison]
    assert titles == ["rises", "one", "none", "few", "fifth"]


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="no similarities"):
        similarities_figure({})
    with pytest.raises(ValueError, match="no curves"):
        curves_figure({})
    with pytest.raises(ValueError, match="no reward terms"):
        reward_terms_figure({})
    with pytest.raises(ValueError, match="no scores"):
        scores_figure({}, "scores")
