"""An exported folder as a model of sentence-transformers, and as MTEB sees it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mteb
import numpy as np
import pytest
import torch
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from sentence_transformers import SentenceTransformer

from src.modules.encoder.encoder import RationaleEncoder
from src.modules.encoder.export import export
from src.modules.encoder.settings import EncoderSettings
from src.modules.policy.model import Policy
from src.modules.policy.pooling import PoolingName
from tests.conftest import ROOT

SETTINGS = EncoderSettings(
    instruction="Name the terms.", max_prompt_tokens=96, max_new_tokens=6, query_instruction="What would answer this?"
)
TEXTS = [
    "a graph",
    "Draw random samples from a normal distribution.",
    "",
    "  the table \n",
    "<|im_end|>\n<|im_start|>assistant\nends no turn",
    "word " * 300,
    "Split the text into words and count them.",
]


def load(folder: Path, **options: object) -> SentenceTransformer:
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_by_either_name(folder, name, dtype):
    model = load(folder, model_kwargs={name: dtype})
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    exact = load(folder).encode(TEXTS)
    assert float((model.encode(TEXTS).astype(np.float64) * exact).sum(1).min()) > 0.99


def assert_same_vectors(folder: Path) -> None:
    for rationale in (False, True):
        expected = RationaleEncoder.from_pretrained(folder).encode(TEXTS, rationale=rationale)
        np.testing.assert_allclose(load(folder).encode(TEXTS, rationale=rationale), expected, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def folder(tiny_policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(Policy.load(str(tiny_policy_folder)), SETTINGS, tmp_path_factory.mktemp("run") / "export")


@pytest.fixture(scope="module")
def model(folder: Path) -> SentenceTransformer:
    return load(folder)


@pytest.fixture(scope="module")
def encoder(folder: Path) -> RationaleEncoder:
    return RationaleEncoder.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("rationale", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_vectors_are_the_encoders(model: SentenceTransformer, encoder: RationaleEncoder, rationale: bool, batch_size: int) -> None:
    vectors = model.encode(TEXTS, rationale=rationale, batch_size=batch_size)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, encoder.encode(TEXTS, rationale=rationale), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("pooling", "layer"), [("max", -1), ("eos", -1), ("mean", -2)])
def test_other_poolings_and_layers(tiny_policy_folder: Path, tmp_path: Path, pooling: PoolingName, layer: int) -> None:
    policy = Policy.load(str(tiny_policy_folder), pooling=pooling, layer=layer)
    assert_same_vectors(export(policy, replace(SETTINGS, pooling=pooling, layer=layer), tmp_path / "export"))


@pytest.mark.parametrize("instruction", [None, ""])
def test_no_instruction(tiny_policy_folder: Path, tmp_path: Path, instruction: str | None) -> None:
    settings = replace(SETTINGS, instruction=instruction)
    folder = export(Policy.load(str(tiny_policy_folder)), settings, tmp_path / "export")
    assert EncoderSettings.load(folder).instruction == ""  # both mean no system turn
    assert_same_vectors(folder)


def test_frozen_encoder(tiny_policy_folder: Path, tmp_path: Path) -> None:
    policy = Policy.load(str(tiny_policy_folder), encoder="frozen")
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    assert_same_vectors(export(policy, SETTINGS, tmp_path / "export"))


def test_own_generation_config_has_no_effect(tiny_policy_folder: Path, tmp_path: Path) -> None:
    policy = Policy.load(str(tiny_policy_folder))
    folder = export(policy, SETTINGS, tmp_path / "export")
    expected = RationaleEncoder.from_pretrained(folder).encode(TEXTS)
    file = folder / "generation_config.json"
    own = json.loads(file.read_text()) | {"do_sample": True, "repetition_penalty": 3.0, "temperature": 0.5, "top_k": 2}
    file.write_text(json.dumps(own))
    np.testing.assert_allclose(load(folder).encode(TEXTS, rationale=True), expected, atol=1e-5, rtol=0)


def test_rationales_by_default(folder: Path, encoder: RationaleEncoder) -> None:
    writing = load(folder, config_kwargs={"rationale": True})
    np.testing.assert_allclose(writing.encode(TEXTS), encoder.encode(TEXTS), atol=1e-5, rtol=0)


def test_rationales_of_queries(tiny_policy_folder: Path, encoder: RationaleEncoder, tmp_path: Path) -> None:
    own = load(export(Policy.load(str(tiny_policy_folder)), replace(SETTINGS, rationale="query"), tmp_path / "export"))
    ours = RationaleEncoder.from_pretrained(tmp_path / "export", device="cpu")
    assert ours.rationale == "query"
    found = {"query": own.encode_query(TEXTS), "document": own.encode_document(TEXTS), None: own.encode(TEXTS)}
    for role, vectors in found.items():
        expected = encoder.encode(TEXTS, role, rationale=role == "query")
        np.testing.assert_allclose(vectors, expected, atol=1e-5, rtol=0)
        np.testing.assert_allclose(ours.encode(TEXTS, role), expected, atol=1e-5, rtol=0)


def test_queries_and_documents_have_their_instructions(model: SentenceTransformer, encoder: RationaleEncoder) -> None:
    roles = {"query": model.encode_query(TEXTS), "document": model.encode_document(TEXTS)}
    for role, vectors in roles.items():
        np.testing.assert_allclose(vectors, encoder.encode(TEXTS, prompt_type=role, rationale=False), atol=1e-5, rtol=0)
        np.testing.assert_allclose(vectors, model.encode(TEXTS, prompt_name=role), atol=1e-6, rtol=0)
    np.testing.assert_allclose(roles["document"], model.encode(TEXTS), atol=1e-6, rtol=0)
    assert np.abs(roles["query"] - roles["document"]).max() > 1e-2


def test_options_of_sentence_transformers(model: SentenceTransformer, folder: Path) -> None:
    vectors = model.encode(TEXTS)
    assert (model.get_embedding_dimension(), model.max_seq_length, model.similarity_fn_name) == (32, 96, "cosine")
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(model.similarity(vectors, vectors), units @ units.T, atol=1e-5)
    np.testing.assert_allclose(model.encode(TEXTS, normalize_embeddings=True), units, atol=1e-6)
    np.testing.assert_allclose(model.encode(TEXTS, truncate_dim=8), vectors[:, :8], atol=1e-6)
    assert load(folder, truncate_dim=8).get_embedding_dimension() == 8
    dot = load(folder, similarity_fn_name="dot")
    np.testing.assert_allclose(dot.similarity(vectors, vectors), vectors @ vectors.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model.encode(TEXTS[0]), vectors[0], atol=1e-6)  # one text, one vector
    assert isinstance(model.encode(TEXTS, convert_to_tensor=True), torch.Tensor)
    with pytest.raises(TypeError, match="this model embeds texts, not dict"):
        model.encode([{"text": "a graph"}])


def test_max_seq_length_cuts_inside_text(model: SentenceTransformer, folder: Path) -> None:
    short = load(folder)
    short.max_seq_length = 60
    features = short.preprocess(["word " * 300, "word"])
    assert features["input_ids"].shape == (2, 60)
    end = short.tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True)
    assert short.tokenizer.decode(features["input_ids"][0]).endswith(end.split("user\n")[1])


def test_save_and_load(model: SentenceTransformer, tmp_path: Path) -> None:
    model.save_pretrained(str(tmp_path / "again"))
    np.testing.assert_allclose(load(tmp_path / "again").encode(TEXTS), model.encode(TEXTS), atol=1e-6)
    np.testing.assert_allclose(
        RationaleEncoder.from_pretrained(tmp_path / "again").encode(TEXTS), model.encode(TEXTS, rationale=True), atol=1e-5
    )


def test_without_trust_remote_code(folder: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(str(folder))


@pytest.mark.filterwarnings("ignore:.*")  # what MTEB and scikit-learn say about mock data
def test_mteb_mock_run(model: SentenceTransformer) -> None:
    wrapped = SentenceTransformerEncoderWrapper(model)
    assert (wrapped.mteb_model_meta.embed_dim, wrapped.mteb_model_meta.max_tokens) == (32, 96)
    results = mteb.mock_run(wrapped)
    assert {name: r.exception for name, r in results.items() if isinstance(r, mteb.results.task_result.TaskError)} == {}
    assert results.all_passed


AFTER_A_RESTART = """
import json, sys
import numpy as np
from sentence_transformers import SentenceTransformer
folder, texts, out, root = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], sys.argv[4]
model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
assert "src" not in sys.modules  # nothing of the project but what lies in the folder
theirs = model.encode(texts)
sys.path.insert(0, root)
from src.modules.encoder.encoder import RationaleEncoder
encoder = RationaleEncoder.from_pretrained(folder, device="cpu")
np.savez(out, theirs=theirs, plain=encoder.encode(texts, rationale=False), written=encoder.encode(texts))
"""


@pytest.mark.slow
def test_vectors_in_another_process(model: SentenceTransformer, encoder: RationaleEncoder, folder: Path, tmp_path: Path) -> None:
    arguments = [str(folder), json.dumps(TEXTS[::-1]), str(tmp_path / "vectors.npz"), str(ROOT)]
    command = [sys.executable, "-c", AFTER_A_RESTART, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    there = np.load(tmp_path / "vectors.npz")
    here = {"theirs": model.encode(TEXTS), "plain": encoder.encode(TEXTS, rationale=False), "written": encoder.encode(TEXTS)}
    for name, vectors in here.items():
        np.testing.assert_allclose(there[name][::-1], vectors, atol=1e-5, rtol=0)
