"""Secrets of every kind that a run meets, and all places that a run writes to."""

import json
import logging
import os
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from hydra.types import RunMode
from omegaconf import OmegaConf

from src.utils.secrets import RedactedStream, RedactingFormatter, RedactSavedConfigs, keep_secrets, redact, without_secrets
from tests.conftest import ROOT
from tests.programs import Programs

PASSWORD, TOKEN, KEY = "hunter2-s3cr3t", "hf_abcdefTOKENabcdef", "k3y-0f-the-house"


@pytest.fixture(autouse=True)
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restores the streams that `keep_secrets` replaces."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://me:pw@host:5000/x", "http://me:***@host:5000/x"),
        ("at http://me:p@ss@host, and http://a:b@c", "at http://me:***@host, and http://a:***@c"),
        ("postgresql+psycopg2://u:p%40ss@db/mlflow", "postgresql+psycopg2://u:***@db/mlflow"),
        ("https://ghp_key@github.com/x", "https://***@github.com/x"),
        ("https://host/x?token=abc&page=2", "https://host/x?token=***&page=2"),
        ("https://host/x?sv=1&sig=abc", "https://host/x?sv=1&sig=***"),
        ("s3://b/k?X-Amz-Signature=abc&aws_secret_access_key=d", "s3://b/k?X-Amz-Signature=***&aws_secret_access_key=***"),
        ("{'Authorization': 'Bearer abc.def'}", "{'Authorization': 'Bearer ***'}"),
        ("https://ghp_abc123:x-oauth-basic@github.com/x", "https://***@github.com/x"),
        ("https://0123abcd:x-oauth-basic@github.com/x", "https://***@github.com/x"),
        ("http://apikey:@host/x", "http://***@host/x"),
        ("postgresql://u:p/w@db/x", "postgresql://u:***@db/x"),
        ("postgresql://u:p w@db/x and more", "postgresql://u:***@db/x and more"),
        ("postgresql://u:it's@db/x", "postgresql://u:***@db/x"),
        ("AccountName=me;AccountKey=abc+/==;Suffix=x", "AccountName=me;AccountKey=***;Suffix=x"),
        *(
            (plain, plain)
            for plain in (
                "http://host:5000 says no to user@host",
                "['http://host:5000/x', 'user@host']",
                "see https://host/a:b and me@host",
                "sqlite:////data/mlflow.db",
                "http://host:5000/a@b",
                "file:///a/b@c",
                "Bearer bonds, basic authentication: user@host",
            )
        ),
    ],
)
def test_redact(text, expected):
    assert redact(text) == expected
    assert redact(expected) == expected


def test_environment_secrets_are_hidden(monkeypatch):
    services = ("PGPASSWORD", "MYSQL_PWD", "DB_PASS", "OPENAI_KEY", "AZURE_STORAGE_KEY", "AZURE_STORAGE_CONNECTION_STRING", "SLURM_JWT")
    secrets = {name: f"{name}-v4lue" for name in (*services, "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")}
    plain = {
        "TOKENIZERS_PARALLELISM": "parallel-and-plain",
        "GOOGLE_CREDENTIALS": "/home/me/key.json",  # the path of a secret
        "MY_TOKEN": "short",  # would match any text
        **{"SORT_KEY": "document", "MAX_TOKENS": "1234567", "PWD": "/home/me/work", "COMPASS": "northwest"},
    }
    for name, value in {**secrets, **plain}.items():
        monkeypatch.setenv(name, value)
    assert redact(" ".join(f"x{value}x" for value in secrets.values())) == " ".join(["x***x"] * len(secrets))
    assert redact(" ".join(plain.values())) == " ".join(plain.values())


def test_quoted_secrets_are_hidden(monkeypatch):
    secret = "o\"ne\\t'wo é"
    monkeypatch.setenv("DB_PASSWORD", secret)
    for text in (secret, json.dumps({"a": secret}), repr({"a": secret}), yaml.safe_dump({"a": secret}, allow_unicode=True), quote(secret)):
        left = redact(text)
        assert "***" in left
        assert "ne" not in left


def test_secret_keys_are_hidden():
    plain = {"max_new_tokens": 8, "tokens": 10, "tokenizer": "x", "pad_token": "<pad>", "forward_pass": True, "key_value_heads": 2}
    plain |= {"special_tokens": ["<a>"], "token": None}
    names = ("pgpassword", "db_pass", "pwd", "passphrase", "connection_string", "hf_token", "aws_secret_access_key")
    config = {
        "store": dict.fromkeys(names, "p") | {"api_key": ["a", "b"], "tokens": ["p", "q"]},
        "credentials": {"user": "u", "more": {"id": 7}},
        "uri": ["http://a:b@c"],
        **plain,
    }
    assert without_secrets(config) == {
        "store": dict.fromkeys(names, "***") | {"api_key": ["***", "***"], "tokens": ["***", "***"]},
        "credentials": {"user": "***", "more": {"id": "***"}},
        "uri": ["http://a:***@c"],
        **plain,
    }


def test_secrets_leave_the_command_line():
    plain = ["-m", "seed=1,2", "paths.tracking_uri=sqlite:///x.db", "~logger", "+a.b=[1,2]", "x.token=${oc.env:HF_TOKEN}", "x.api_key="]
    plain += ["rollout.max_new_tokens=8", "x.tokens=9"]
    given = [f"paths.tracking_uri=http://me:{PASSWORD}@host:5000", f"+store.password='a, {KEY}'"]
    mappings = [f"+store={{user: me, password: {PASSWORD}}}", f"x.tokens=[{TOKEN},b]"]
    argv, environment = ["train.py", *given, *mappings, *plain], dict[str, str]()
    keep_secrets(argv, environment)
    assert argv[1:] == [
        "paths.tracking_uri=${oc.env:GRACE_SETTING_1}",
        "+store.password=${oc.env:GRACE_SECRET_2}",
        "+store=${oc.decode:${oc.env:GRACE_SETTING_3}}",
        "x.tokens=${oc.decode:${oc.env:GRACE_SECRET_4}}",
        *plain,
    ]
    values = [f"http://me:{PASSWORD}@host:5000", f"a, {KEY}", *(mapping.partition("=")[2] for mapping in mappings)]
    assert environment == dict(zip(("GRACE_SETTING_1", "GRACE_SECRET_2", "GRACE_SETTING_3", "GRACE_SECRET_4"), values, strict=True))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (f"db.password={PASSWORD},other", "train.py: db.password holds a secret, and a sweep"),
        (f"paths.tracking_uri=http://me:{PASSWORD}@host/[", "train.py: paths.tracking_uri=http://me:***@host/[ cannot be read"),
    ],
)
def test_secrets_that_cannot_be_moved_are_refused(argument, message):
    with pytest.raises(SystemExit) as caught:
        keep_secrets(["/somewhere/train.py", argument], {})
    assert str(caught.value).startswith(message)
    assert PASSWORD not in str(caught.value)


def test_streams_and_log_lines_hide_secrets():
    into, uri = StringIO(), f"http://me:{PASSWORD}@host"
    stream = RedactedStream(into)
    print(uri, file=stream)
    stream.writelines([uri])
    assert into.getvalue() == "http://me:***@host\nhttp://me:***@host"
    assert stream.isatty() is False
    record = logging.LogRecord("x", logging.ERROR, "", 0, "no %s", (uri,), None)
    assert RedactingFormatter("%(message)s").format(record) == "no http://me:***@host"


def test_saved_configs_of_a_sweep_are_redacted(tmp_path):
    saved = [tmp_path / file for file in ("multirun.yaml", "0/.hydra/config.yaml")]
    for file in saved:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump({"store": {"uri": f"http://me:{PASSWORD}@host", "api_key": KEY}, "seed": 1}))
    hydra = {"output_subdir": ".hydra", "runtime": {"output_dir": str(tmp_path / "0")}, "sweep": {"dir": str(tmp_path)}}
    RedactSavedConfigs().on_job_start(OmegaConf.create({"hydra": {**hydra, "mode": RunMode.MULTIRUN}}))
    for file in saved:
        assert yaml.safe_load(file.read_text()) == {"store": {"uri": "http://me:***@host", "api_key": "***"}, "seed": 1}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0", "multirun.yaml"]


# ---- runs

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(programs: Programs, tiny_policy_folder: Path, tmp_path: Path) -> Run:
    """(*overrides) -> exit code of a small run, and all that it printed and wrote, byte for byte."""
    small = [
        *("trainer.accelerator=cpu", "callbacks=minimal", "trainer.limit_train_batches=1", "rollout.max_new_tokens=2"),
        *(f"policy.path={tiny_policy_folder}", f"paths.cache_dir={ROOT}/data/cache", "packages.train=[urllib3]"),
        *("packages.test=[networkx]", f"paths.output_root={tmp_path}/outputs", f"paths.artifact_location=file://{tmp_path}/artifacts"),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PROJECT_ROOT"}
    environment |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "HF_TOKEN": TOKEN, "MLFLOW_TRACKING_PASSWORD": KEY}

    def call(*overrides: str, experiment: str = "tiny_sup") -> tuple[int, str]:
        done = programs.run("train.py", *overrides, *small, f"experiment={experiment}", cwd=tmp_path, env=environment)
        files = [file.read_bytes().decode("latin-1") for file in tmp_path.rglob("*") if file.is_file() and "given" not in file.parts]
        return done.returncode, "\n".join([done.stdout, done.stderr, *files, *(str(file) for file in tmp_path.rglob("*"))])

    return call


def test_run_writes_no_secret(run, tmp_path):
    given = tmp_path / "given" / "experiment"  # a user's config with a password
    given.mkdir(parents=True)
    store = f"store:\n  uri: http://me:{PASSWORD}@host\n  api_key: {KEY}\n"
    (given / "mine.yaml").write_text(f"# @package _global_\ndefaults:\n  - tiny_sup\n{store}")
    settings = [f"paths.tracking_uri=sqlite:///{tmp_path}/mlflow.db", "+note=${oc.env:HF_TOKEN}", f"+db=mysql://u:{PASSWORD}@h/x"]
    code, everything = run(f"--config-dir={tmp_path}/given", *settings, experiment="mine")
    assert code == 0, everything[:3000]
    for secret in (PASSWORD, TOKEN, KEY):
        assert secret not in everything
    assert "mysql://u:***@h/x" in everything
    assert "http://me:***@host" in everything
    (saved,) = (tmp_path / "outputs").rglob(".hydra/config.yaml")
    assert yaml.safe_load(saved.read_text())["store"] == {"uri": "http://me:***@host", "api_key": "***"}


@pytest.mark.slow
@pytest.mark.parametrize("uri", ["ftp://me:{}@nowhere", "http://me:{}@127.0.0.1:9"], ids=["no such store", "closed port"])
def test_failing_store_is_named_without_password(run, uri):
    code, everything = run(f"paths.tracking_uri={uri.format(PASSWORD)}")
    assert code != 0
    assert "127.0.0.1" in everything or "ftp://me:***@nowhere" in everything
    assert PASSWORD not in everything


@pytest.mark.slow
def test_sweep_writes_no_secret(run, tmp_path):
    code, everything = run("-m", "logger=none", f"+db=mysql://u:{PASSWORD}@h/x", "seed=1,2", f"hydra.sweep.dir={tmp_path}/sweep")
    assert code == 0, everything[:3000]
    assert (tmp_path / "sweep" / "multirun.yaml").exists()
    assert PASSWORD not in everything
