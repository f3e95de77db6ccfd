"""Secrets of every kind that a run meets, and all places that a run writes to."""

import json
import logging
import os
import sys
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
    """`keep_secrets` replaces them."""
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
        ("http://host:5000 says no to user@host", "http://host:5000 says no to user@host"),
        ("['http://host:5000/x', 'user@host']", "['http://host:5000/x', 'user@host']"),
        ("see https://host/a:b and me@host", "see https://host/a:b and me@host"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("file:///a/b@c", "file:///a/b@c"),
        ("Bearer bonds, basic authentication: user@host", "Bearer bonds, basic authentication: user@host"),
    ],
)
def test_redact(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(expected) == expected


def test_secrets_of_the_environment_are_hidden_wherever_they_turn_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        "HF_TOKEN": TOKEN,
        "AWS_SECRET_ACCESS_KEY": KEY,
        "TOKENIZERS_PARALLELISM": "parallel-and-plain",  # a token of another kind
        "GOOGLE_CREDENTIALS": "/home/me/key.json",  # a path is where one lies, and is none
        "MY_TOKEN": "short",  # would be found in any text
    }.items():
        monkeypatch.setenv(name, value)
    said = f"{PASSWORD}, x{TOKEN}x, {KEY}, parallel-and-plain, /home/me/key.json, short"
    assert redact(said) == "***, x***x, ***, parallel-and-plain, /home/me/key.json, short"


@pytest.mark.parametrize(
    "name",
    ["PGPASSWORD", "MYSQL_PWD", "DB_PASS", "OPENAI_KEY", "AZURE_STORAGE_KEY", "AZURE_STORAGE_CONNECTION_STRING", "HF_TOKEN", "SLURM_JWT"],
)
def test_secrets_of_other_services_are_known_by_their_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, KEY)
    assert redact(f"x{KEY}x") == "x***x"


def test_a_plain_word_or_a_number_is_no_secret_whatever_key_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SORT_KEY": "document", "MAX_TOKENS": "1234567", "PWD": "/home/me/work", "COMPASS": "northwest"}.items():
        monkeypatch.setenv(name, value)
    assert redact("document 1234567 /home/me/work northwest") == "document 1234567 /home/me/work northwest"


def test_a_secret_is_hidden_however_it_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "o\"ne\\t'wo é"
    monkeypatch.setenv("DB_PASSWORD", secret)
    for text in (secret, json.dumps({"a": secret}), repr({"a": secret}), yaml.safe_dump({"a": secret}, allow_unicode=True), quote(secret)):
        left = redact(text)
        assert "***" in left
        assert "ne" not in left


def test_secret_keys_are_hidden_and_token_counts_are_not() -> None:
    config = {
        "db": {"password": "pw", "api_key": ["a", "b"], "aws_secret_access_key": "c"},
        "hf_token": "t",
        "max_prompt_tokens": 96,
        "key_value_heads": 2,
        "uri": ["http://a:b@c"],
        "token": None,
        "pg": {"pgpassword": "p", "db_pass": "p", "pwd": "p", "passphrase": "p", "connection_string": "p", "tokens": ["p", "q"]},
        "credentials": {"user": "u", "more": {"id": 7}},
        "counts": {
            "max_new_tokens": 8,
            "micro_batch_tokens": 9,
            "tokens": 10,
            "tokenizer": "x",
            "pad_token": "<pad>",
            "forward_pass": True,
        },
        "special_tokens": ["<a>"],
    }
    assert without_secrets(config) == {
        "db": {"password": "***", "api_key": ["***", "***"], "aws_secret_access_key": "***"},
        "hf_token": "***",
        "max_prompt_tokens": 96,
        "key_value_heads": 2,
        "uri": ["http://a:***@c"],
        "token": None,
        "pg": {
            **dict.fromkeys(("pgpassword", "db_pass", "pwd", "passphrase", "connection_string"), "***"),
            "tokens": ["***", "***"],
        },
        "credentials": {"user": "***", "more": {"id": "***"}},
        "counts": config["counts"],
        "special_tokens": ["<a>"],
    }


def test_settings_with_secrets_leave_the_command_line() -> None:
    plain = ["train.py", "-m", "seed=1,2", "paths.tracking_uri=sqlite:///x.db", "~logger", "+a.b=[1,2]", "x.token=${oc.env:HF_TOKEN}"]
    argv = [*plain, f"paths.tracking_uri=http://me:{PASSWORD}@host:5000", f"+store.password='a, {KEY}'", "x.api_key="]
    environment: dict[str, str] = {}
    keep_secrets(argv, environment)
    assert argv[: len(plain)] == plain
    assert argv[len(plain) :] == ["paths.tracking_uri=${oc.env:GRACE_SETTING_7}", "+store.password=${oc.env:GRACE_SECRET_8}", "x.api_key="]
    given = [f"+store={{user: me, password: {PASSWORD}}}", f"x.tokens=[{TOKEN},b]", "rollout.max_new_tokens=8", "x.tokens=9"]
    more: dict[str, str] = {}
    argv = ["train.py", *given]
    keep_secrets(argv, more)
    assert more == {"GRACE_SETTING_1": given[0].partition("=")[2], "GRACE_SECRET_2": given[1].partition("=")[2]}
    assert argv[1:] == [
        "+store=${oc.decode:${oc.env:GRACE_SETTING_1}}",
        "x.tokens=${oc.decode:${oc.env:GRACE_SECRET_2}}",
        *given[2:],
    ]
    assert environment == {"GRACE_SETTING_7": f"http://me:{PASSWORD}@host:5000", "GRACE_SECRET_8": f"a, {KEY}"}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            f"db.password={PASSWORD},other",
            "train.py: db.password holds a secret, and a sweep over it would write it down; give it one value",
        ),
        (
            f"paths.tracking_uri=http://me:{PASSWORD}@host/[",
            "train.py: paths.tracking_uri=http://me:***@host/[ cannot be read: put its value",
        ),
    ],
)
def test_what_cannot_leave_the_command_line_is_refused(argument: str, message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        keep_secrets(["/somewhere/train.py", argument], {})
    assert str(caught.value).startswith(message)
    assert PASSWORD not in str(caught.value)


def test_streams_and_log_lines_hide_secrets() -> None:
    into = StringIO()
    stream = RedactedStream(into)
    print(f"http://me:{PASSWORD}@host", file=stream)  # type: ignore[arg-type]
    stream.writelines([f"http://me:{PASSWORD}@host"])
    assert into.getvalue() == "http://me:***@host\nhttp://me:***@host"
    assert stream.isatty() is False
    record = logging.LogRecord("x", logging.ERROR, "", 0, "no %s", (f"http://me:{PASSWORD}@host",), None)
    assert RedactingFormatter("%(message)s").format(record) == "no http://me:***@host"


def test_copies_of_a_sweep_s_config_are_cleared_when_its_first_job_starts(tmp_path: Path) -> None:
    saved = {file: tmp_path / file for file in ("multirun.yaml", "0/.hydra/config.yaml")}
    for file in saved.values():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump({"store": {"uri": f"http://me:{PASSWORD}@host", "api_key": KEY}, "seed": 1}))
    runtime = {
        "mode": "MULTIRUN",
        "output_subdir": ".hydra",
        "runtime": {"output_dir": str(tmp_path / "0")},
        "sweep": {"dir": str(tmp_path)},
    }
    config = OmegaConf.create({"hydra": runtime})
    config.hydra.mode = RunMode.MULTIRUN
    RedactSavedConfigs().on_job_start(config)
    for file in saved.values():
        assert yaml.safe_load(file.read_text()) == {"store": {"uri": "http://me:***@host", "api_key": "***"}, "seed": 1}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0", "multirun.yaml"]


# ---- whole runs


def run(programs: Programs, folder: Path, program: str, *overrides: str) -> tuple[int, str]:
    """Exit code, and all that a run said and wrote below `folder`, byte for byte."""
    environment = {name: value for name, value in os.environ.items() if name != "PROJECT_ROOT"}
    environment |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "HF_TOKEN": TOKEN, "MLFLOW_TRACKING_PASSWORD": KEY}
    done = programs.run(program, *overrides, cwd=folder, env=environment)
    files = [file.read_bytes().decode("latin-1") for file in folder.rglob("*") if file.is_file() and "given" not in file.parts]
    return done.returncode, "\n".join([done.stdout, done.stderr, *files, *(str(file) for file in folder.rglob("*"))])


def small(tiny_policy_folder: Path, tmp_path: Path) -> list[str]:
    return [
        "experiment=tiny_sup",
        *("trainer.accelerator=cpu", "callbacks=minimal", "trainer.limit_train_batches=1", "rollout.max_new_tokens=2"),
        *(
            f"policy.path={tiny_policy_folder}",
            f"paths.cache_dir={ROOT}/data/cache",
            "packages.train=[urllib3]",
            "packages.test=[networkx]",
        ),
        *(f"paths.output_root={tmp_path}/outputs", f"paths.artifact_location=file://{tmp_path}/artifacts"),
    ]


def test_a_run_writes_no_secret_anywhere(programs: Programs, tiny_policy_folder: Path, tmp_path: Path) -> None:
    given = tmp_path / "given" / "experiment"  # a user's own config, with a password in it
    given.mkdir(parents=True)
    (given / "mine.yaml").write_text(
        f"# @package _global_\ndefaults:\n  - tiny_sup\nstore:\n  uri: http://me:{PASSWORD}@host\n  api_key: {KEY}\n"
    )
    settings = [f"paths.tracking_uri=sqlite:///{tmp_path}/mlflow.db", "+note=${oc.env:HF_TOKEN}", f"+db=mysql://u:{PASSWORD}@h/x"]
    code, everything = run(
        programs,
        tmp_path,
        "train.py",
        f"--config-dir={tmp_path}/given",
        *settings,
        *small(tiny_policy_folder, tmp_path)[1:],
        "experiment=mine",
    )
    assert code == 0, everything[:3000]
    for secret in (PASSWORD, TOKEN, KEY):
        assert secret not in everything
    assert "mysql://u:***@h/x" in everything  # what is no secret is there
    assert "http://me:***@host" in everything
    (saved,) = (tmp_path / "outputs").rglob(".hydra/config.yaml")
    assert yaml.safe_load(saved.read_text())["store"] == {"uri": "http://me:***@host", "api_key": "***"}


@pytest.mark.slow
@pytest.mark.parametrize("uri", ["ftp://me:{}@nowhere", "http://me:{}@127.0.0.1:9"], ids=["no such store", "closed port"])
def test_a_store_that_fails_is_named_without_its_password(programs: Programs, uri: str, tiny_policy_folder: Path, tmp_path: Path) -> None:
    code, everything = run(
        programs, tmp_path, "train.py", f"paths.tracking_uri={uri.format(PASSWORD)}", *small(tiny_policy_folder, tmp_path)
    )
    assert code != 0
    assert "127.0.0.1" in everything or "ftp://me:***@nowhere" in everything
    assert PASSWORD not in everything


@pytest.mark.slow
def test_a_sweep_writes_no_secret_anywhere(programs: Programs, tiny_policy_folder: Path, tmp_path: Path) -> None:
    settings = ["logger=none", f"+db=mysql://u:{PASSWORD}@h/x", "seed=1,2", f"hydra.sweep.dir={tmp_path}/sweep"]
    code, everything = run(programs, tmp_path, "train.py", "-m", *settings, *small(tiny_policy_folder, tmp_path))
    assert code == 0, everything[:3000]
    assert (tmp_path / "sweep" / "multirun.yaml").exists()
    assert PASSWORD not in everything
