"""Read what the JSON files of a Hugging Face folder say about how its network is used.

Every setting of sentence-transformers and of the tokenizer that changes an answer is honoured or refused.
Source: sentence_transformers 6.2 (base/modules/transformer.py, sentence_transformer/modules/pooling.py), transformers 5
(constructors of the fast tokenizers).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bentos.serving.model import ModelFolder
from bentos.serving.problems import StartError

NO_LIMIT = 100_000
"""Tokens; transformers writes 1e30 for "no limit"."""

POOLING_KEYS = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}

_LARGEST_JSON_BYTES = 64 << 20
_MODULES = (
    ("Transformer",),
    ("Transformer", "Pooling"),
    ("Transformer", "Normalize"),
    ("Transformer", "Pooling", "Normalize"),
)
_POOLING_SETTINGS = {
    "embedding_dimension",
    "include_prompt",
    "pooling_mode",
    "word_embedding_dimension",
    "pooling_mode_mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens",
    *POOLING_KEYS.values(),
}
# settings whose other values would change the answers → the values that do not
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "transformer_task": ("feature-extraction",),
    "module_output_name": ("token_embeddings",),
}
# settings that never change an answer, or that are read below
_READ = {"max_seq_length", "do_lower_case", "modality_config", "unpad_inputs"}

# names of tokenizer_config.json → names of the library's BertNormalizer
_BERT_NORMALIZER = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
_BERT_CLASSES = ("Bert", "DistilBert", "Electra", "MPNet")
_BYTE_LEVEL_CLASSES = (
    "Bart",
    "Blenderbot",
    "Bloom",
    "CodeGen",
    "Deberta",
    "GPT2",
    "LED",
    "Longformer",
    "MVP",
    "Roberta",
)


def failed(message: str, hint: str) -> StartError:
    """Return the error of a folder that cannot be served."""
    return StartError("model_load_failed", message, hint)


def read_json(folder: ModelFolder, path: str) -> Any:
    """Return what a JSON file of the folder holds; None where there is no such file.

    Raises StartError `model_load_failed` for a file that is not JSON or is larger than 64 MiB.
    """
    if path not in folder.files:
        return None
    file = folder.path(path)
    try:
        if file.stat().st_size > _LARGEST_JSON_BYTES:
            raise failed(f"{path} is larger than {_LARGEST_JSON_BYTES >> 20} MiB", "save the model again")
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise failed(f"{path} cannot be read: {error}", "save the model again") from error


def read_object(folder: ModelFolder, path: str) -> dict[str, Any]:
    """Return a JSON object of the folder; an empty one where there is no such file. Raises StartError otherwise."""
    body = read_json(folder, path)
    if body is None:
        return {}
    if not isinstance(body, dict):
        raise failed(f"{path} must hold a JSON object", "save the model again")
    return body


def limit(value: Any, without: int = NO_LIMIT) -> int:
    """Return a bound in tokens, or `without` where the value does not bound anything."""
    return int(value) if isinstance(value, int | float) and 0 < value < NO_LIMIT else without


@dataclass(frozen=True)
class Sentences:
    """What sentence-transformers would do with a text. Without its files: the mean of the tokens, as they are."""

    pooling: str = "mean"
    normalised: bool = False
    prompt: str = ""
    """Put before each text."""
    prompt_is_pooled: bool = True
    """False: the tokens of the prompt are read by the network and left out of the pooling."""
    lowercase: bool = False
    longest: int = NO_LIMIT
    """Tokens."""
    declared: bool = False
    """Whether the folder has a modules.json, so that it is meant to embed texts."""

    @classmethod
    def read(cls, folder: ModelFolder, root: str) -> Sentences:
        """Read modules.json and the files that belong to it.

        Raises StartError `model_load_failed` for a module or a setting that would change the answers and is not known
        here.
        """
        settings = read_object(folder, f"{root}sentence_bert_config.json")
        _check_settings(settings)
        modules = read_json(folder, f"{root}modules.json")
        kinds = _kinds(modules) if modules is not None else ()
        pooling = next((place for kind, place in kinds if kind == "Pooling"), None)
        mode, pooled = _pooling(folder, f"{root}{pooling}/config.json") if pooling is not None else ("mean", True)
        return cls(
            pooling=mode,
            normalised=any(kind == "Normalize" for kind, _ in kinds),
            prompt=_prompt(read_object(folder, f"{root}config_sentence_transformers.json")),
            prompt_is_pooled=pooled,
            lowercase=settings.get("do_lower_case") is True,
            longest=limit(settings.get("max_seq_length")),
            declared=modules is not None,
        )


def tokenizer_json(text: str, told: Mapping[str, Any], lowercase: bool) -> str:
    """Return tokenizer.json with what tokenizer_config.json says otherwise, which transformers gives precedence.

    `lowercase` is the setting of sentence-transformers: the text is made lower case before anything else is done to it.
    """
    body = json.loads(text)
    if not isinstance(body, dict):
        return text
    named = str(told.get("tokenizer_class", ""))
    normalizer = body.get("normalizer")
    if named.startswith(_BERT_CLASSES) and isinstance(normalizer, dict) and normalizer.get("type") == "BertNormalizer":
        normalizer.update({ours: told[theirs] for theirs, ours in _BERT_NORMALIZER.items() if theirs in told})
    if named.startswith(_BYTE_LEVEL_CLASSES) and "add_prefix_space" in told:
        for each in _steps(body.get("pre_tokenizer"), "pretokenizers"):
            if each.get("type") == "ByteLevel":
                each["add_prefix_space"] = bool(told["add_prefix_space"])
    if lowercase and not any(each.get("type") == "Lowercase" for each in _steps(normalizer, "normalizers")):
        steps = [{"type": "Lowercase"}, *_steps(normalizer, "normalizers")]
        body["normalizer"] = {"type": "Sequence", "normalizers": steps}
    return json.dumps(body)


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer: those of a sequence, or the one that there is."""
    if not isinstance(part, dict):
        return []
    inner = part.get(name) if part.get("type") == "Sequence" else [part]
    return [each for each in inner if isinstance(each, dict)] if isinstance(inner, list) else []


def labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the classes in their order, as far as config.json says.

    Raises StartError `model_load_failed` where id2label does not number them from 0 on: which class has which name
    would be a guess.
    """
    named = config.get("id2label")
    if not isinstance(named, dict):
        return ()
    if set(named) != {str(number) for number in range(len(named))}:
        found = ", ".join(sorted(map(str, named))[:5])
        raise failed(
            f"the keys of id2label in config.json must be 0 to {len(named) - 1}, and are {found[:100]}",
            "number the classes in the order of the network's outputs, from 0 on",
        )
    return tuple(str(named[str(number)]) for number in range(len(named)))


def _kinds(modules: Any) -> tuple[tuple[str, str], ...]:
    """Return the modules in their order as (class, folder)."""
    try:
        kinds = tuple((str(module["type"]).rsplit(".", 1)[-1], str(module["path"]).strip("/")) for module in modules)
    except (KeyError, TypeError) as error:
        raise failed(
            f"modules.json must hold a list of modules with type and path: {error}", "save it again"
        ) from error
    known = {kind for order in _MODULES for kind in order}
    hint = "export the whole of it to ONNX with sentence_embedding as output"
    if odd := [kind for kind, _ in kinds if kind not in known]:
        raise failed(f"modules.json has a module {odd[0]}, which is not known here", hint)
    if kinds and tuple(kind for kind, _ in kinds) not in _MODULES:
        raise failed(f"modules.json has its modules in the order {', '.join(kind for kind, _ in kinds)}", hint)
    return kinds


def _check_settings(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if name in _READ or not value or value in _HARMLESS.get(name, ()):
            continue
        raise failed(
            f"sentence_bert_config.json sets {name} to {str(value)[:100]!r}, which is not known here",
            "save the model without it, or export all of it to ONNX with sentence_embedding as output",
        )
    modalities = settings.get("modality_config") or {"text": {}}
    text = modalities.get("text") if isinstance(modalities, dict) else None
    if (
        not isinstance(text, dict)
        or text.get("method", "forward") != "forward"
        or text.get("method_output_name", "last_hidden_state") not in ("last_hidden_state", "token_embeddings")
    ):
        raise failed(
            "the modality text of sentence_bert_config.json must be the last hidden state of forward",
            "serve it from a project: ekiben init",
        )


def _pooling(folder: ModelFolder, path: str) -> tuple[str, bool]:
    """Return the mode, and whether the tokens of the prompt are pooled too."""
    told = read_object(folder, path)
    hint = "export it with its pooling, with sentence_embedding as output"
    if odd := sorted(name for name in told if name not in _POOLING_SETTINGS and told[name]):
        raise failed(f"{path} sets {odd[0]}, which is not known here", hint)
    chosen = [name for name, key in POOLING_KEYS.items() if told.get(key)]
    chosen += [
        key for key in ("pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens") if told.get(key)
    ]
    if "pooling_mode" in told:
        mode = told["pooling_mode"]
        chosen = [str(each) for each in mode] if isinstance(mode, list) else [str(mode)]
    if len(chosen) != 1 or chosen[0] not in POOLING_KEYS:
        raise failed(
            f"its pooling must be one of {', '.join(POOLING_KEYS)}, and is {', '.join(chosen) or 'none'}", hint
        )
    return chosen[0], told.get("include_prompt", True) is not False


def _prompt(settings: Mapping[str, Any]) -> str:
    """Return the default prompt of config_sentence_transformers.json."""
    kind = settings.get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise failed(f"it is a {str(kind)[:100]} of sentence-transformers", "serve it from a project: ekiben init")
    if settings.get("truncate_dim"):
        raise failed(
            "config_sentence_transformers.json sets truncate_dim, which is not known here",
            "save the model without it, and cut the embeddings where they are used",
        )
    name, prompts = settings.get("default_prompt_name"), settings.get("prompts") or {}
    if name is None:
        return ""
    if not isinstance(prompts, dict) or not isinstance(prompts.get(name), str):
        raise failed(f"the default prompt {str(name)[:100]!r} is not among the prompts", "save the model again")
    return str(prompts[name])
