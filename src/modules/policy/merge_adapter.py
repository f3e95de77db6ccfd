"""Writes a model with a LoRA adapter merged into it: `python -m src.modules.policy.merge_adapter <adapter> <new folder>`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel

from src.modules.policy.loading import load_model, load_tokenizer


def merge_adapter(adapter: str, folder: Path, base: str | None = None) -> None:
    """Merges an adapter of peft into its base, in float32, and saves model and tokenizer.

    The tokenizer is the adapter's where it has one, else the base's.

    Args:
        base: of the adapter; None: the one that its adapter_config.json names.

    Raises:
        OSError: no such adapter, or no such base in reach.
        ValueError, RuntimeError: an adapter or a base that cannot be read, or that do not fit together.
    """
    base = base or str(PeftConfig.from_pretrained(adapter).base_model_name_or_path)
    own = (Path(adapter) / "tokenizer_config.json").is_file()
    try:
        tokenizer, model = load_tokenizer(adapter if own else base), load_model(base)
    except OSError as error:
        raise FileNotFoundError(f"no base {base!r}: {str(error).splitlines()[0]}") from error
    with torch.no_grad():
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser("merge_adapter", description="Merges a LoRA adapter into its base, for policy.path.")
    parser.add_argument("adapter", help="the folder with adapter_config.json")
    parser.add_argument("folder", type=Path, help="where the merged model goes")
    parser.add_argument("--base", help="the model that the adapter belongs to, if it is not where the adapter says")
    options = parser.parse_args(arguments)
    try:
        merge_adapter(options.adapter, options.folder, options.base)
    except (OSError, ValueError, RuntimeError) as error:
        raise SystemExit(f"merge_adapter: {str(error).splitlines()[0]}; --base= names another base") from error


if __name__ == "__main__":
    main()
