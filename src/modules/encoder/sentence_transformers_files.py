"""What makes an exported folder one of sentence-transformers."""

import json
import shutil
from pathlib import Path

from src.modules.encoder.settings import EncoderSettings

_MODULE = "rationale_transformer"
_MODES = {"mean": "mean", "max": "max", "eos": "lasttoken"}  # the library's names for the poolings


def write_sentence_transformers_files(folder: Path, settings: EncoderSettings, dimension: int) -> None:
    """modules.json and what it names, beside weights, tokenizer and grace.json.

    The first module is this project's own, a copy of its source and of what that imports: none of the library's can leave the
    chat's beginning out of the pooling and still end the chat behind the text. So the library wants `trust_remote_code=True`.
    The second is the library's Pooling. The vectors are those of `RationaleEncoder`: pooled, not normalised.

    Args:
        dimension: of the embeddings.
    """
    here = Path(__file__).parent
    for name in ("renderer.py", "plain_text.py"):
        shutil.copyfile(here.parent / "prompt" / name, folder / name)
    source = (here / f"{_MODULE}.py").read_text(encoding="utf-8")
    # transformers finds a file that is imported relatively beside the one that imports it, and nowhere else
    (folder / f"{_MODULE}.py").write_text(source.replace("from ..prompt.renderer", "from .renderer"), encoding="utf-8")
    pooling = "1_Pooling"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{_MODULE}.RationaleTransformer"},
        {"idx": 1, "name": "1", "path": pooling, "type": "sentence_transformers.sentence_transformer.modules.Pooling"},
    ]
    _write(folder / "modules.json", modules)
    prompts = {side: settings.instruction_for(side) for side in ("query", "document")}
    config = {
        "model_type": "SentenceTransformer",
        "requirements": {"sentence-transformers": ">=6"},
        "prompts": prompts,  # system messages; any other text is read with the document's
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    _write(folder / "config_sentence_transformers.json", config)
    (folder / pooling).mkdir()
    how = {"embedding_dimension": dimension, "pooling_mode": _MODES[settings.pooling], "include_prompt": False}
    _write(folder / pooling / "config.json", how)


def _write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
