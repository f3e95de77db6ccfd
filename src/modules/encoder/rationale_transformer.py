"""The encoder as a module of sentence-transformers: `SentenceTransformer(folder, trust_remote_code=True)`.

An export copies this file, and those that it imports relatively, beside the weights; it needs nothing else of the project.
It adds the exact prompt to the library's modules: a chat whose frame is tokenised apart from the text, and whose beginning the
library's Pooling leaves out. Texts are embedded without rationales, or with greedy ones: `encode(texts, rationale=True)`. An export
whose settings have rationale=query (or document) has `encode_query` (or `encode_document`) write them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modules import InputModule
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..prompt.renderer import PromptRenderer, end_ids

_ENCODER = "encoder"


class RationaleTransformer(InputModule):
    """Computes the states of prompt and rationale, which Pooling (with `include_prompt=False`) makes embeddings of.

    Args:
        model: writes the rationales; without `encoder` it embeds as well.
        tokenizer: its tokenizer, with a chat template.
        settings: of grace.json.
        encoder: the model that embeds, if it is another.
        rationale: whether rationales are written by default; None: for the side that the settings name, if they name one.
    """

    config_file_name = "grace.json"
    save_in_root = True
    tokenizer: PreTrainedTokenizerBase
    forward_kwargs = {"rationale", "task"}  # noqa: RUF012  # as the base class has it

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Mapping[str, Any],
        encoder: PreTrainedModel | None = None,
        rationale: bool | None = None,
    ) -> None:
        super().__init__()
        self.model, self.encoder, self.tokenizer = model, encoder, tokenizer
        self.settings, self.rationale = dict(settings), rationale
        self._renderers: dict[str, PromptRenderer] = {}

    @property
    def max_seq_length(self) -> int:
        """Longest prompt in tokens, the chat's frame included."""
        return int(self.settings["max_prompt_tokens"])

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.settings["max_prompt_tokens"] = value
        self._renderers.clear()

    def get_embedding_dimension(self) -> int:
        """Returns the size of a state."""
        return int(self.model.config.get_text_config().hidden_size)

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Returns the token ids of the chats, right-padded; `prompt` replaces the instruction (the system message).

        Raises TypeError if an input is no text.
        """
        for text in inputs:
            if not isinstance(text, str):
                raise TypeError(f"this model embeds texts, not {type(text).__name__}")
        instruction = (self.settings["instruction"] or "") if prompt is None else prompt
        if instruction not in self._renderers:
            s = self.settings
            self._renderers[instruction] = PromptRenderer(self.tokenizer, instruction, s["max_prompt_tokens"], s["template_kwargs"])
        prompts = self._renderers[instruction](inputs)
        ids, mask = self._padded(list(prompts.ids))
        return {"input_ids": ids, "attention_mask": mask, "prompt_length": int(prompts.text_starts[0])}

    def forward(self, features: dict[str, Any], rationale: bool | None = None, task: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Adds `token_embeddings`, [N, T, D]; with rationales, ids and attention mask are those of prompt and rationale.

        `task` is the library's name for the side: `query`, `document` or None.
        """
        asked = self.rationale if rationale is None else rationale
        if task is not None and task == self.settings.get("rationale") if asked is None else asked:
            features["input_ids"], features["attention_mask"] = self._with_rationales(features["input_ids"], features["attention_mask"])
        backbone = (self.model if self.encoder is None else self.encoder).base_model
        layer = self.settings.get("layer", -1)
        # no attention mask: rows are right-padded, and causality keeps padding out of every real position
        states = backbone(input_ids=features["input_ids"], use_cache=False, output_hidden_states=layer != -1)
        features["token_embeddings"] = states.last_hidden_state if layer == -1 else states.hidden_states[layer]
        return features

    def _with_rationales(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns right-padded [N, T] ids and mask of the prompts with their greedy rationales, end tokens included."""
        prompts = [row[: int(length)] for row, length in zip(ids, mask.sum(dim=1), strict=True)]
        flipped, seen = self._padded([row.flip(0) for row in prompts])  # `generate` wants the padding on the left
        ends = end_ids(self.tokenizer, getattr(self.model, "generation_config", None))
        rows, last = self.model.get_output_embeddings().weight.shape[0], max(self.tokenizer.get_vocab().values())
        plain = GenerationConfig(
            max_new_tokens=self.settings["max_new_tokens"],
            do_sample=False,
            repetition_penalty=1.0,  # whatever the model's own generation config says
            no_repeat_ngram_size=0,
            eos_token_id=ends,
            suppress_tokens=list(range(last + 1, rows)) or None,  # rows that pad the vocabulary: no token has them
            pad_token_id=self._pad_id(),
        )
        written = self.model.generate(  # type: ignore[operator]
            input_ids=flipped.flip(1).to(ids.device), attention_mask=seen.flip(1).to(ids.device), generation_config=plain
        )[:, flipped.shape[1] :]
        ended = torch.isin(written, torch.tensor(ends, device=written.device))
        lengths = torch.where(ended.any(dim=1), ended.int().argmax(dim=1) + 1, written.shape[1])
        rows = [torch.cat([row, new[: int(n)]]) for row, new, n in zip(prompts, written, lengths, strict=True)]
        return self._padded(rows)

    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    def _padded(self, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._pad_id())
        lengths = torch.tensor([len(row) for row in rows], device=ids.device)
        return ids, (torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)).long()

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Saves model, tokenizer, settings and, if there is one, the encoder."""
        self.model.save_pretrained(output_path)
        self.tokenizer.save_pretrained(output_path)
        if self.encoder is not None:
            self.encoder.save_pretrained(Path(output_path, _ENCODER))
        text = json.dumps(self.settings, indent=2, ensure_ascii=False)
        Path(output_path, self.config_file_name).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(  # type: ignore[override]
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> "RationaleTransformer":
        """Loads an exported folder or a model of the hub, in float32 unless `model_kwargs` has a dtype.

        `config_kwargs={"rationale": True}` writes rationales by default.
        """
        where: dict[str, Any] = {"token": token, "revision": revision, "local_files_only": local_files_only}
        settings = cls.load_config(model_name_or_path, subfolder=subfolder, cache_folder=cache_folder, **where)
        inside = f"{subfolder}/{_ENCODER}".strip("/")
        frozen = cls.load_file_path(model_name_or_path, "config.json", inside, cache_folder=cache_folder, **where)
        where["cache_dir"] = cache_folder
        given = {{"torch_dtype": "dtype"}.get(name, name): value for name, value in (model_kwargs or {}).items()}  # its older name
        own = {"dtype": torch.float32, "use_safetensors": True, **where, **given}
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, subfolder=subfolder, **where, **(processor_kwargs or {}))
        model = AutoModelForCausalLM.from_pretrained(model_name_or_path, subfolder=subfolder, **own)
        encoder = AutoModelForCausalLM.from_pretrained(model_name_or_path, subfolder=inside, **own) if frozen is not None else None
        return cls(model, tokenizer, settings, encoder, **(config_kwargs or {}))
