"""`make doctor`: what is found on this machine, and what it means."""

import pytest

from src import doctor
from tests.programs import free_port


def test_doctor_looks_at_everything(capsys, monkeypatch, tmp_path, tracking_uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    doctor.main([])
    shown = capsys.readouterr().out
    for what in ("Python", "packages", "vLLM", "device", "memory", "disk", "hub", "MLflow", "qwen1.5b_sup", "smollm2_sup"):
        assert f"\n{what} " in shown, what


@pytest.mark.parametrize("offline", [True, False])
def test_services_that_are_away(compose, monkeypatch, tmp_path, offline):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    cfg = compose()
    cfg.paths.tracking_uri = f"http://me:secret@127.0.0.1:{free_port()}"
    hub, store = doctor.services(cfg)
    assert ("not asked" if offline else "does not answer (ConnectionError)") in hub.found
    assert store.meaning.startswith("cannot be used (")
    assert "secret" not in str(store)
    (tmp_path / "damaged.db").write_text("no database, " * 9)
    for uri in (f"sqlite:///{tmp_path}/damaged.db", "postgresql://me:secret@localhost/runs"):
        cfg.paths.tracking_uri = uri
        assert "cannot be used (" in doctor.services(cfg)[1].meaning
    cfg.paths.tracking_uri = f"sqlite:///{tmp_path}/none.db"
    assert doctor.services(cfg)[1].meaning == "not there yet: the first run makes it"
    assert not (tmp_path / "none.db").exists()


def test_other_versions_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    (tmp_path / "constraints.txt").write_text("rich==1.0\n")
    assert "rich " in doctor.packages()[1].meaning
    assert ", not 1.0" in doctor.packages()[1].meaning
