"""Hugging Face folders of text models: config.json and tokenizer.json beside the network, as ONNX or as safetensors.

A folder is known by the content of its config.json. Code of its own (`auto_map`) and pickles are refused; all shards of
the weights must be there, whole, and hold the tensors that the index says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from registry.archive_zip import Entry, ZipFault, entries, is_zip
from registry.errors import UserError
from registry.formats import bounded_json, onnx, pickles, safetensors
from registry.formats.upload import Recognised, Upload, read_up_to, shown, truncated

ONNX = "transformers-onnx"
SAFETENSORS = "transformers-safetensors"
_SAVE = "model.save_pretrained(folder) and tokenizer.save_pretrained(folder)"
_EXPORT = "export it to ONNX: ekiben.push(pipeline, …) where torch is, or `optimum-cli export onnx`"
WITHOUT_TORCH = ("bert", "camembert", "distilbert", "roberta", "xlm-roberta")
"""`model_type` of what is run from safetensors without torch; bentos/serving/encoders.py has the same."""

_LARGEST_CONFIG = 4 << 20
_LARGEST_TOKENIZER = 64 << 20
_LARGEST_INDEX = 32 << 20
_MOST_CONFIGS = 20
_INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_MASKED = ("ForMaskedLM", "ForPreTraining")
_OTHERS = ("ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice", "ForImageClassification")


def recognise(upload: Upload) -> Recognised | None:
    """The text model in an upload, None if there is no config.json of one. UserError where it cannot be served:
    `transformers_code`, `transformers_task`, `transformers_no_tokenizer`, `transformers_adapter`,
    `transformers_labels`, `pickle_refused`, `several_models`, `truncated_model`, `invalid_model`; `check_needs` has
    one more.
    """
    found = _config(upload)
    if found is None:
        return None
    root, config = found
    networks = sorted(path for path in upload.sizes if path.endswith(".onnx"))
    tensors = sorted(path for path in upload.sizes if path.endswith(".safetensors"))
    tokenizer = f"{root}tokenizer.json" in upload.sizes
    if not tokenizer and not tensors:
        return None  # a network with some configuration beside it: the other recognisers look at the network
    _refuse_code(upload, root, config)
    _refuse_pickles(upload)
    _refuse_task(config, declared=f"{root}modules.json" in upload.sizes)
    _check_labels(root, config)
    if f"{root}adapter_config.json" in upload.sizes and not networks:
        raise UserError(
            "transformers_adapter",
            "The folder holds an adapter (LoRA) without the model that it belongs to.",
            field="file",
            hint="Merge them first: model.merge_and_unload().save_pretrained(folder).",
        )
    if not tokenizer:
        raise UserError(
            "transformers_no_tokenizer",
            f"There is no tokenizer.json beside {shown(root)}config.json.",
            field="file",
            hint="Write it with AutoTokenizer.from_pretrained(…).save_pretrained(folder). A model that reads no text "
            "is sent as ONNX alone, without its config.json.",
        )
    _check_tokenizer(upload, f"{root}tokenizer.json")
    what = f"{shown(str(config.get('model_type') or 'unknown'))[:40]}"
    if networks:
        return _onnx(upload, root, networks, what, tensors)
    if tensors or f"{root}{_INDEX}" in upload.sizes:
        count = _weights(upload, root, tensors)
        needs = () if config.get("model_type") in WITHOUT_TORCH else ("torch", "transformers")
        note = f"A {what} model of {count} tensors, with its tokenizer."
        parts = frozenset(tensors) | _unused(upload)
        return Recognised(SAFETENSORS, f"{root}config.json", notes=(note,), needs=needs, parts=parts)
    raise UserError(
        "transformers_no_weights",
        f"There is a config.json and a tokenizer.json, and neither an .onnx nor a .safetensors file: {shown(root)}",
        field="file",
        hint=f"Save the model with {_SAVE}, or {_EXPORT}.",
    )


def check_needs(found: Recognised, requirements: str | None) -> None:
    """UserError `transformers_needs_torch` where the version's requirements do not bring what its weights need."""
    missing = [name for name in found.needs if not re.search(rf"(?im)(?:^|[\"'])[ \t]*+{name}\b", requirements or "")]
    if missing:
        raise UserError(
            "transformers_needs_torch",
            f"These weights are read by {' and '.join(found.needs)}, which the kind does not bring"
            + (f"; the requirements do not name {' and '.join(missing)}." if requirements else "."),
            field="requirements" if requirements else "file",
            hint=f"{_EXPORT[0].upper()}{_EXPORT[1:]}. Or send requirements.txt with torch and transformers along "
            "(from the common index, torch brings gigabytes of CUDA on Linux).",
        )


def _config(upload: Upload) -> tuple[str, dict[str, Any]] | None:
    """(folder with a slash at its end, or empty; its config.json) of the outermost model."""
    candidates = [path for path in upload.sizes if path.rpartition("/")[2] == "config.json"]
    for path in sorted(candidates, key=lambda name: (name.count("/"), name))[:_MOST_CONFIGS]:
        body = _json(upload, path, _LARGEST_CONFIG)
        if isinstance(body, dict) and (
            isinstance(body.get("model_type"), str) or isinstance(body.get("architectures"), list)
        ):
            return path.removesuffix("config.json"), body
    return None


def _refuse_code(upload: Upload, root: str, config: Mapping[str, Any]) -> None:
    told = _json(upload, f"{root}tokenizer_config.json", _LARGEST_CONFIG)
    for name, body in (("config.json", config), ("tokenizer_config.json", told)):
        if isinstance(body, dict) and body.get("auto_map"):
            raise UserError(
                "transformers_code",
                f"{shown(root)}{name} has an auto_map: the model brings code of its own (trust_remote_code).",
                field="file",
                hint=f"{_EXPORT[0].upper()}{_EXPORT[1:]}, and leave auto_map out; or serve it from a project with "
                "that code: ekiben init.",
            )


def _refuse_pickles(upload: Upload) -> None:
    for path in sorted(upload.sizes):
        name = path.rpartition("/")[2]
        if upload.sizes[path] == 0 or name.endswith((".json", ".txt", ".md", ".onnx", ".safetensors")):
            continue
        head = upload.head(path, 8)
        if name.endswith(_PICKLED) or (is_zip(head) and _holds_pickle(_members(upload, path))):
            _refuse_pickle(path)
        try:
            pickles.refuse_pickle(upload, path)
        except UserError:
            _refuse_pickle(path)


def _members(upload: Upload, path: str) -> list[Entry]:
    with upload.open(path) as stream:
        try:
            return entries(stream, 100_000)
        except ZipFault:
            return []


def _holds_pickle(members: list[Entry]) -> bool:
    return any(entry.name.endswith((".pkl", ".pickle")) for entry in members)


def _refuse_pickle(path: str) -> NoReturn:
    raise UserError(
        "pickle_refused",
        f"{shown(path)} is a Python pickle, as torch.save writes it: loading it would run whatever code the file "
        "chooses, so it is not accepted as data.",
        field="file",
        hint="Save the weights as safetensors with model.save_pretrained(folder, safe_serialization=True), or "
        f"{_EXPORT}; and leave {shown(path)} out.",
    )


def _check_labels(root: str, config: Mapping[str, Any]) -> None:
    """UserError `transformers_labels` where id2label does not number the classes from 0 on."""
    named = config.get("id2label")
    if not isinstance(named, dict) or set(named) == {str(number) for number in range(len(named))}:
        return
    raise UserError(
        "transformers_labels",
        f"The keys of id2label in {shown(root)}config.json must be 0 to {len(named) - 1}, and are "
        f"{shown(', '.join(sorted(named)[:5]))}: which output of the network has which name would be a guess.",
        field="file",
        hint="Number the classes in the order of the network's outputs, from 0 on, in id2label and label2id.",
    )


def _refuse_task(config: Mapping[str, Any], *, declared: bool) -> None:
    """UserError `transformers_task` for what neither classifies nor embeds texts; `declared`: modules.json is there."""
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else ""
    if architecture.endswith(_GENERATES):
        raise UserError(
            "transformers_task",
            f"{shown(architecture)} generates text.",
            field="file",
            hint="For a chat with a language model, use an LLM server. Served here are models that classify or embed "
            "texts.",
        )
    if architecture.endswith(_MASKED) and not declared:
        raise UserError(
            "transformers_task",
            f"{shown(architecture)} predicts masked words; the folder does not say that it embeds texts.",
            field="file",
            hint="To embed, save the encoder alone (AutoModel.from_pretrained(…).save_pretrained(folder)), or save it "
            "with sentence-transformers, whose modules.json says how it pools.",
        )
    if architecture.endswith(_OTHERS):
        raise UserError(
            "transformers_task",
            f"{shown(architecture)} neither classifies nor embeds texts.",
            field="file",
            hint="Send the network alone as ONNX, or serve it from a project with your own code: ekiben init.",
        )


def _check_tokenizer(upload: Upload, path: str) -> None:
    body = _json(upload, path, _LARGEST_TOKENIZER)
    model = body.get("model") if isinstance(body, dict) else None
    if not isinstance(model, dict) or not ("vocab" in model or "type" in model):
        raise UserError(
            "invalid_model",
            f"{shown(path)} is no tokenizer of the tokenizers library.",
            field="file",
            hint="Write it with AutoTokenizer.from_pretrained(…).save_pretrained(folder).",
        )


def _onnx(upload: Upload, root: str, networks: list[str], what: str, weights: list[str]) -> Recognised:
    if len(networks) > 1:
        raise UserError(
            "several_models",
            f"The folder holds several networks: {', '.join(shown(path) for path in networks[:5])}.",
            field="file",
            hint="Send one of them: model.onnx, or the quantised one in its place.",
        )
    if (found := onnx.recognise(upload, networks[0])) is None:
        truncated(networks[0], "it does not begin as an ONNX model", "`optimum-cli export onnx`")
    note = f"A {what} model as ONNX, with its tokenizer."
    left = ("Its safetensors are not used, and can be left out.",) if weights else ()
    # the network's signature is of token numbers; what callers send are texts
    parts = {found.path, *found.parts, *weights} | _unused(upload)
    return Recognised(ONNX, f"{root}config.json", notes=(note, *left), parts=frozenset(parts))


def _unused(upload: Upload) -> frozenset[str]:
    """Weights for TensorFlow that many folders of the Hugging Face Hub have too; nothing opens them."""
    return frozenset(path for path in upload.sizes if path.rpartition("/")[2] == "tf_model.h5")


def _weights(upload: Upload, root: str, files: list[str]) -> int:
    """The number of tensors, in one file or in all shards that the index names."""
    index = f"{root}{_INDEX}"
    if index not in upload.sizes:
        if len(files) != 1:
            truncated(index, f"there are {len(files)} files of weights and no index", _SAVE)
        return len(_tensors(upload, files[0]))
    body = _json(upload, index, _LARGEST_INDEX)
    places = body.get("weight_map") if isinstance(body, dict) else None
    if (
        not isinstance(places, dict)
        or not places
        or not all(isinstance(name, str) and "/" not in name for name in places.values())
    ):
        truncated(index, "it has no weight_map of plain file names", _SAVE)
    shards = {name: f"{root}{name}" for name in sorted(set(places.values()))}
    missing = [name for name, path in shards.items() if path not in upload.sizes]
    if missing:
        truncated(index, f"{len(missing)} of {len(shards)} shards are missing, such as {shown(missing[0])}", _SAVE)
    extra = [path for path in files if path not in shards.values()]
    if extra:
        truncated(index, f"it does not name {shown(extra[0])}, which is there", _SAVE)
    held = {name: _tensors(upload, path) for name, path in shards.items()}
    for tensor, name in places.items():
        if tensor not in held[name]:
            truncated(shards[name], f"the tensor {shown(str(tensor))} is not in it, as the index says", _SAVE)
    return len(places)


def _tensors(upload: Upload, path: str) -> frozenset[str]:
    """Names of the tensors of a file that is whole."""
    if upload.sizes[path] == 0 or safetensors.recognise(upload, path) is None:
        truncated(path, "it does not begin as safetensors", _SAVE)
    with upload.open(path) as stream:
        length = int.from_bytes(read_up_to(stream, 8), "little")
        header = json.loads(read_up_to(stream, length))
    return frozenset(name for name in header if name != "__metadata__")


def _json(upload: Upload, path: str, largest: int) -> Any:
    """What a JSON file of the folder holds; None where it is not there, not JSON, or larger than it may be."""
    if not 0 < upload.sizes.get(path, 0) <= largest:
        return None
    try:
        return bounded_json.loads(upload.head(path, largest), shown(path))
    except (ValueError, RecursionError):
        return None
