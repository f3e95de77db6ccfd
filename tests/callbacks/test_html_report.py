"""The HTML report of a real run in a real MLflow store, as a browser shows it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from src.callbacks.heat_strip import legend, scale_of, strip
from src.callbacks.html_report import HTMLReport, main, read_run, render
from src.callbacks.metrics import MetricsMonitor
from src.callbacks.rationale_table import RationaleTable
from src.callbacks.similarities import SimilarityHistograms
from src.modules.policy.model import Policy
from src.utils.run_logger import RUN, RunLogger
from tests.browser import chromium
from tests.callbacks.conftest import fit, make_module
from tests.conftest import SENTENCES

TERMS = ["positive", "negative", "consistency", "hard", "total"]
HOSTILE = (
    "</pre></td></table><script>document.title = 'owned'; alert(1)</script><img src=x onerror=\"document.title='owned'\">"
    '<iframe src="http://localhost:1/"></iframe>\u202e {{ run.params }} &lt; ]]> \x07'
)
Logged = tuple[MlflowClient, str, Path]
"""A store, a run of it, and the run's folder."""


@pytest.fixture(scope="module")
def run(tiny_policy_folder: Path, tracking_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Logged:
    """A run of three rollout batches that wrote its report."""
    folder = tmp_path_factory.mktemp("reported")
    logger = RunLogger(folder.name, tracking_uri=tracking_uri, artifact_location=f"file://{folder}/mlartifacts")
    logger.log_hyperparams({"reward._target_": "src.modules.objectives.rewards.document", "note": "<b>bold</b>"})
    table = RationaleTable(str(folder / "r.md"), texts=3, every_n_rollout_batches=2)
    callbacks = [MetricsMonitor(), table, SimilarityHistograms(records=4), HTMLReport(str(folder / "out"))]
    fit(make_module(Policy.load(str(tiny_policy_folder))), callbacks, folder, batches=3, logger=logger)
    return logger.experiment, str(logger.run_id), folder


def test_run_is_read_back(run):
    data = read_run(*run[:2])
    assert [step for step, _ in data.curves["reward/total/mean"]] == [1, 2, 3]
    assert len(data.rationales) == 3
    for rows in data.rationales.values():
        assert [step for step, _ in rows] == [0, 2, 3]
        assert all(list(row.rewards) == TERMS for _, row in rows)
    assert list(data.similarities) == [0, 3]
    assert data.scores == []


def test_report_is_an_artifact(run):
    client, run_id, folder = run
    client.download_artifacts(run_id, "report.html", str(folder))
    assert (folder / "report.html").read_text() == (folder / "out" / "report.html").read_text()


def test_browser_shows_it_without_scripts(run, tmp_path):
    client, run_id, _ = run
    text = SENTENCES[2]
    hostile = {"step": [9], "text": [text], "rationale": [HOSTILE], "length": [8], "finished": [False], **{term: [0.5] for term in TERMS}}
    client.log_table(run_id, hostile, "rationales/step_9.json")
    client.log_table(run_id, {"policy": ["Base"], "Retrieval": [0.25]}, "report/test_scores.json")
    file = tmp_path / "report.html"
    file.write_text(render(read_run(client, run_id)), encoding="utf-8")
    requests, trouble = [], []
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1100, "height": 800})
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("dialog", lambda dialog: trouble.append(dialog.message))
        page.goto(file.as_uri())
        assert [url for url in requests if not url.startswith("data:")] == [file.as_uri()]
        assert trouble == []
        assert page.title().endswith(": run report")
        assert page.locator("script, iframe, [onerror]").count() == 0
        assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 200)")
        assert page.locator("figure").count() == 3
        section = page.locator("section", has=page.locator("blockquote", has_text=text))
        assert section.locator("th").all_inner_texts() == ["step", "rationale", "tokens", *TERMS]
        assert [row.split()[0] for row in section.locator("tbody tr").all_inner_texts()] == ["0", "2", "3", "9"]
        assert section.locator("tbody tr:last-child pre").text_content() == HOSTILE
        assert section.locator("tbody tr:last-child td").nth(2).inner_text() == "8 (cut)"
        assert page.locator("text=25.00").is_visible()
        assert not page.locator("text=<b>bold</b>").is_visible()
        page.locator("summary").click()
        assert page.locator("text=<b>bold</b>").is_visible()
        page.set_viewport_size({"width": 390, "height": 800})  # on a phone tables scroll, not the page
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_first_and_last_rationale_are_heat_strips(run):
    client, run_id, _ = run
    data = read_run(client, run_id)
    text, rows = next(iter(data.rationales.items()))
    page = render(replace(data, rationales={text: [row for row in rows if row[0] in (0, 2, 3)]}))
    assert page.count('<div class="heat">') == 2
    for step in (0, 1):
        assert page.count('title="') == sum(len(row.pieces) for _, row in (rows[0], rows[2]))
        assert f"Similarity to the query: {[rows[0], rows[2]][step][1].similarities[0]:.3f} after the text" in page
    assert page.count("<pre>") == 1


def test_heat_strip_is_the_gain_of_each_piece():
    similarities = [0.5, 0.6, 0.55, 0.55]
    scale = scale_of([similarities])
    assert scale == pytest.approx(np.quantile([0.1, 0.05, 0.0], 0.95))
    shown = strip(["graph", " and", " <b>"], similarities, 0.1)
    assert [piece.shade for piece in shown.pieces] == ["p4", "n2", ""]
    assert [piece.title for piece in shown.pieces] == ["+0.1000, now 0.600", "-0.0500, now 0.550", "+0.0000, now 0.550"]
    assert shown.summary == "Similarity to the query: 0.500 after the text, 0.550 after the rationale; most by “graph” +0.100."
    assert [label for _, label in legend(0.1)][::7] == ["≤ -0.1000", "≥ +0.1000"]
    assert [piece.shade for piece in strip(["a"], [0.5, 0.5], 0.0).pieces] == [""]


def test_empty_run_has_a_page(tracking_uri, tmp_path):
    client = MlflowClient(tracking_uri)
    experiment = client.create_experiment(tmp_path.name, artifact_location=f"file://{tmp_path}/mlartifacts")
    page = render(read_run(client, client.create_run(experiment).info.run_id))
    assert "no metrics yet" in page
    assert "has logged none" in page


def test_unreachable_store_names_the_command(module, tmp_path, caplog):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / RUN).write_text('{"run_id": "0123456789abcdef0123456789abcdef", "experiment_id": "1"}')
    logger = RunLogger("gone", folder=str(tmp_path / "run"), tracking_uri="http://127.0.0.1:9")  # begun by a server that is away
    fit(module, [MetricsMonitor(), HTMLReport(str(tmp_path / "out"))], tmp_path, batches=1, logger=logger)
    assert "no report.html yet: python -m src.callbacks.html_report 0123456789abcdef0123456789abcdef" in caplog.text
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match=r"^html_report: .*127\.0\.0\.1"):
        main(["0123456789abcdef0123456789abcdef", "--tracking-uri", "http://127.0.0.1:9", "--folder", str(tmp_path)])


def test_command(run, tracking_uri, tmp_path, caplog):
    main([run[1], "--tracking-uri", tracking_uri, "--folder", str(tmp_path)])
    assert f"wrote {tmp_path}/report.html" in caplog.text
    assert "<section>" in (tmp_path / "report.html").read_text()
    with pytest.raises(SystemExit, match=r"^html_report: no run 'nope' in sqlite") as caught:
        main(["nope", "--tracking-uri", tracking_uri])
    assert "\n" not in str(caught.value)
