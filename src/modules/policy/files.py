"""A policy's small files (tokenizer, configs) as tensors, for a checkpoint."""

from pathlib import Path
from tempfile import TemporaryDirectory
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from src.modules.policy.model import Policy

_files: "WeakKeyDictionary[Policy, dict[str, Tensor]]" = WeakKeyDictionary()


def policy_files(policy: Policy) -> dict[str, Tensor]:
    """Returns a policy's config, generation config and tokenizer as files by name, for a checkpoint.

    Each is [bytes] uint8, which weights-only loading reads. They are made once a policy, as they never change.
    """
    if policy not in _files:
        with TemporaryDirectory() as folder:
            for part in (policy.tokenizer, policy.model.config, policy.model.generation_config):
                if part is not None:
                    part.save_pretrained(folder)
            files = [file for file in sorted(Path(folder).rglob("*")) if file.is_file()]
            contents = [torch.from_numpy(np.fromfile(file, dtype=np.uint8)) for file in files]
            _files[policy] = {str(file.relative_to(folder)): content for file, content in zip(files, contents, strict=True)}
    return _files[policy]
