"""Hugging Face folders beside torch's own answers, and what their files say about how they are to be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from safetensors.numpy import load_file, save
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from bentos.serving import ModelFolder, Problem, StartError, encoders, hugging_face, texts, write_model
from bentos.training import words
from bentos.transformers import example
from bentos.transformers.service import Model

ENCODERS = Path(__file__).parent / "encoders"
MADE_BY_TORCH = sorted(folder.name for folder in ENCODERS.iterdir() if (folder / "answer.json").exists())
WORDS = ["blue", "green", "red", "sky", "tree"]


def folder(tmp_path: Path, files: dict[str, bytes]) -> ModelFolder:
    return write_model(tmp_path / "m", kind="transformers", format=None, files=files)


def encoder(config: dict[str, Any] | None = None, **more: Any) -> dict[str, bytes]:
    """Word vectors 1 to 7 (padding, unknown, WORDS) of width 2, whose mean is the embedding."""
    table = np.arange(1, 15, dtype=np.float32).reshape(7, 2)
    made = words.folder(words.tokenizer([" ".join(WORDS)]), words.network(table), 8, config or {})
    return {**made, **{name: json.dumps(body).encode() for name, body in more.items()}}


def classifier(classes: int, **config: Any) -> dict[str, bytes]:
    """Its logits are the embedding of `encoder` times a weight of ones, tens, hundreds."""
    table = np.arange(1, 15, dtype=np.float32).reshape(7, 2) / 100
    weight = np.ones((2, 1), np.float32) @ (10.0 ** np.arange(classes, dtype=np.float32))[None]
    config = {"architectures": ["WordsForSequenceClassification"], **config}
    return words.folder(words.tokenizer([" ".join(WORDS)]), words.network(table, weight), 8, config)


def hidden_states(left: bool = False) -> dict[str, bytes]:
    """A BERT made by torch, with a tokenizer of single words between [CLS] and [SEP]."""
    known = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "café", "cafe", "Sky"])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    told = {"pad_token": "[PAD]", **({"padding_side": "left"} if left else {})}
    return {
        "config.json": (ENCODERS / "bert" / "config.json").read_bytes(),
        "model.safetensors": (ENCODERS / "bert" / "model.safetensors").read_bytes(),
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(told).encode(),
    }


def sentences(
    pooling: dict[str, Any] | None = None,
    transformer: dict[str, Any] | None = None,
    prompts: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
) -> dict[str, bytes]:
    """The BERT of `hidden_states` as sentence-transformers saves it, with settings of its files."""
    files = hidden_states()
    modules = [
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    told = {**json.loads(files["tokenizer_config.json"]), **(tokenizer or {})}
    bodies = {
        "modules.json": modules,
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True, **(pooling or {})},
        "sentence_bert_config.json": {"max_seq_length": 16, "do_lower_case": False, **(transformer or {})},
        "config_sentence_transformers.json": prompts or {},
        "tokenizer_config.json": told,
    }
    return {**files, **{name: json.dumps(body).encode() for name, body in bodies.items()}}


def tokens(row: list[int], segments: list[int] | None = None, padding: int = 0) -> Any:
    """What the BERT of `hidden_states` gives for token numbers, by the graph that is compared with torch below."""
    config = json.loads((ENCODERS / "bert" / "config.json").read_text())
    graph = encoders.graph(config, load_file(ENCODERS / "bert" / "model.safetensors"), False)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    left = [0] * padding
    feed = {
        "input_ids": [[*left, *row]],
        "attention_mask": [[*left, *([1] * len(row))]],
        "token_type_ids": [[*left, *(segments or [0] * len(row))]],
    }
    return session.run(None, {name: np.array(values) for name, values in feed.items()})[0][0, padding:]


@pytest.mark.parametrize("name", MADE_BY_TORCH)
def test_an_encoder_in_safetensors_gives_what_torch_gives(name: str) -> None:
    told = json.loads((ENCODERS / name / "answer.json").read_text())
    config = json.loads((ENCODERS / name / "config.json").read_text())
    weights = encoders.tensors([ENCODERS / name / "model.safetensors"])
    graph = encoders.graph(config, weights, classify=name.endswith("classifier"))
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    answer = session.run(None, {each.name: np.array(told[each.name]) for each in session.get_inputs()})[0]
    expected = np.array(told["output"])
    if expected.ndim == 3:  # what stands at padding is nobody's business
        expected, answer = (array * np.array(told["attention_mask"])[:, :, None] for array in (expected, answer))
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-5)


def test_every_family_is_compared_with_torch() -> None:
    assert {json.loads((ENCODERS / name / "config.json").read_text())["model_type"] for name in MADE_BY_TORCH} == set(
        encoders.FAMILIES
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights_are_read(tmp_path: Path, dtype: str) -> None:
    weights = load_file(ENCODERS / "bert" / "model.safetensors")
    path = tmp_path / "half.safetensors"
    if dtype == "float16":
        path.write_bytes(save({name: array.astype(np.float16) for name, array in weights.items()}))
    else:
        import ml_dtypes

        path.write_bytes(save({name: array.astype(ml_dtypes.bfloat16) for name, array in weights.items()}))
    read = encoders.tensors([path])
    assert set(read) == set(weights)
    for name, array in read.items():
        np.testing.assert_allclose(array, weights[name], rtol=1e-2, atol=1e-2)
        assert array.dtype == np.float32


def test_shards_are_one_model(tmp_path: Path) -> None:
    weights = load_file(ENCODERS / "bert" / "model.safetensors")
    names = sorted(weights)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    whole = texts.TextModel.load(folder(tmp_path / "one", hidden_states()))
    sharded = {name: data for name, data in hidden_states().items() if name != "model.safetensors"}
    sharded |= {file: save({name: weights[name] for name in part}) for file, part in halves.items()}
    sharded["model.safetensors.index.json"] = json.dumps(index).encode()
    parted = texts.TextModel.load(folder(tmp_path / "two", sharded))
    assert parted(["blue sky"]).values.tolist() == whole(["blue sky"]).values.tolist()
    del sharded["model-00002-of-00002.safetensors"]
    with pytest.raises(StartError, match="not those of a bert encoder"):
        texts.TextModel.load(folder(tmp_path / "three", sharded))


def test_an_architecture_that_needs_torch_says_so_with_the_way_out(tmp_path: Path) -> None:
    files = hidden_states()
    files["config.json"] = json.dumps({"model_type": "deberta-v2", "architectures": ["DebertaV2Model"]}).encode()
    with pytest.raises(StartError) as raised:
        texts.TextModel.load(folder(tmp_path, files))
    assert raised.value.code == "model_load_failed"
    assert "deberta-v2 model in safetensors needs torch" in raised.value.message
    assert "export it to ONNX" in (raised.value.hint or "")


def test_the_mean_of_the_tokens_that_count_is_the_embedding_and_length_does_not_matter_to_others(
    tmp_path: Path,
) -> None:
    model = texts.TextModel.load(folder(tmp_path, encoder()))
    assert model.labels is None
    alone = [model([text]).values[0].tolist() for text in ("blue", "red tree", "nothing known")]
    assert alone == [[5.0, 6.0], [(9 + 13) / 2, (10 + 14) / 2], [3.0, 4.0]]
    together = model(["blue", "red tree", "nothing known"])
    assert together.values.tolist() == alone
    assert together.cut == ()


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken"])
def test_pooling_and_normalisation_are_as_sentence_transformers_saved_them(
    tmp_path: Path, pooling: str, left: bool
) -> None:
    files = hidden_states(left)
    keys = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens", "lasttoken": "lasttoken"}
    modules = [
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    chosen = {f"pooling_mode_{name}": key == pooling for key, name in keys.items()}
    files |= {"modules.json": json.dumps(modules).encode(), "1_Pooling/config.json": json.dumps(chosen).encode()}
    hidden = tokens([2, 4, 7, 3])
    truth = {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.max(0), "lasttoken": hidden[-1]}[pooling]
    model = texts.TextModel.load(folder(tmp_path, files))
    # padding at the left moves the positions of this network, so that a longer text would change the answer to another
    assert model.verdict.holds is not left
    values = model(["blue sky", "red tree green blue"]).values[0]
    np.testing.assert_allclose(values, truth / np.linalg.norm(truth), rtol=1e-4, atol=1e-5)


def test_a_module_that_is_not_known_is_not_left_out_in_silence(tmp_path: Path) -> None:
    modules = [{"idx": 0, "path": "2_Dense", "type": "sentence_transformers.models.Dense"}]
    with pytest.raises(StartError, match="module Dense"):
        texts.TextModel.load(folder(tmp_path, {**hidden_states(), "modules.json": json.dumps(modules).encode()}))


def test_the_default_prompt_is_put_before_a_text(tmp_path: Path) -> None:
    prompts = {"prompts": {"query": "red "}, "default_prompt_name": "query"}
    plain = texts.TextModel.load(folder(tmp_path / "a", encoder()))
    prompted = texts.TextModel.load(folder(tmp_path / "b", encoder(**{"config_sentence_transformers.json": prompts})))
    assert prompted(["blue"]).values.tolist() == plain(["red blue"]).values.tolist()


def test_a_prompt_that_is_not_pooled_is_read_and_left_out(tmp_path: Path) -> None:
    prompts = {"prompts": {"query": "red tree "}, "default_prompt_name": "query"}
    files = sentences({"include_prompt": False}, prompts=prompts)
    model = texts.TextModel.load(folder(tmp_path, files))
    red, tree, blue, sky = 6, 8, 4, 7
    hidden = tokens([2, red, tree, blue, sky, 3])  # [CLS] belongs to the prompt, [SEP] to the text
    values = model(["blue sky", "blue sky green green"]).values
    np.testing.assert_allclose(values[0], hidden[3:].mean(0), rtol=1e-4, atol=1e-5)
    whole = texts.TextModel.load(folder(tmp_path / "whole", sentences(prompts=prompts)))
    np.testing.assert_allclose(whole(["blue sky"]).values[0], hidden.mean(0), rtol=1e-4, atol=1e-5)


def test_a_prompt_that_is_not_pooled_is_refused_where_the_network_pools(tmp_path: Path) -> None:
    modules = json.loads(sentences()["modules.json"])
    files = encoder(
        **{
            "modules.json": modules,
            "1_Pooling/config.json": {"pooling_mode_mean_tokens": True, "include_prompt": False},
            "config_sentence_transformers.json": {"prompts": {"q": "red "}, "default_prompt_name": "q"},
        }
    )
    with pytest.raises(StartError, match="include_prompt"):
        texts.TextModel.load(folder(tmp_path, files))


def test_lower_case_of_sentence_transformers_is_honoured(tmp_path: Path) -> None:
    model = texts.TextModel.load(folder(tmp_path, sentences(transformer={"do_lower_case": True})))
    assert [e.tokens for e in model.tokenizer(["Sky café"])] == [["[CLS]", "sky", "café", "[SEP]"]]
    kept = texts.TextModel.load(folder(tmp_path / "kept", sentences()))
    assert [e.tokens for e in kept.tokenizer(["Sky café"])] == [["[CLS]", "Sky", "café", "[SEP]"]]


def test_special_tokens_in_a_text_are_split_where_the_tokenizer_says_so(tmp_path: Path) -> None:
    kept = texts.TextModel.load(folder(tmp_path, sentences()))
    split = texts.TextModel.load(folder(tmp_path / "split", sentences(tokenizer={"split_special_tokens": True})))
    assert kept.tokenizer(["sky"])[0].ids == split.tokenizer(["sky"])[0].ids
    assert split.tokenizer._library.encode_special_tokens is True


@pytest.mark.parametrize(("wanted", "first"), [(True, "Ġblue"), (False, "blue")])
def test_a_space_before_the_text_is_that_of_tokenizer_config(wanted: bool, first: str) -> None:
    library = Tokenizer(models.WordLevel({"blue": 0, "Ġblue": 1}, unk_token="blue"))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=not wanted)
    told = {"tokenizer_class": "RobertaTokenizerFast", "add_prefix_space": wanted}
    made = Tokenizer.from_str(hugging_face.tokenizer_json(library.to_str(), told, lowercase=False))
    assert made.encode("blue").tokens == [first]


def test_a_masked_language_model_of_sentence_transformers_embeds(tmp_path: Path) -> None:
    files = sentences()
    config = {**json.loads(files["config.json"]), "architectures": ["BertForMaskedLM"]}
    model = texts.TextModel.load(folder(tmp_path, {**files, "config.json": json.dumps(config).encode()}))
    assert model.labels is None


@pytest.mark.parametrize(
    ("config", "score"),
    [
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, 0.11),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"}, 1 / (1 + np.exp(-0.11))),
    ],
    ids=["identity", "sigmoid"],
)
def test_the_activation_of_a_cross_encoder_is_honoured(tmp_path: Path, config: dict[str, Any], score: float) -> None:
    one = Model(folder(tmp_path, classifier(1, **config))).answer(["blue"])["outputs"][0]
    assert one["score"] == pytest.approx(score, rel=1e-5)


def test_case_and_accents_are_those_of_tokenizer_config(tmp_path: Path) -> None:
    files = hidden_states()
    told = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "strip_accents": True, "pad_token": "[PAD]"}
    lower = {**files, "tokenizer_config.json": json.dumps(told).encode()}
    kept = texts.TextModel.load(folder(tmp_path / "a", files))
    lowered = texts.TextModel.load(folder(tmp_path / "b", lower))
    assert [e.tokens for e in kept.tokenizer(["Sky café"])] == [["[CLS]", "Sky", "café", "[SEP]"]]
    assert [e.tokens for e in lowered.tokenizer(["Sky café"])] == [["[CLS]", "sky", "cafe", "[SEP]"]]


@pytest.mark.parametrize(
    ("where", "longest"),
    [
        ({}, 16),  # max_position_embeddings of the network
        ({"tokenizer_config.json": {"model_max_length": 6}}, 6),
        ({"tokenizer_config.json": {"model_max_length": 1000000000000000019884624838656}}, 16),
        ({"modules.json": [], "sentence_bert_config.json": {"max_seq_length": 5}}, 5),
    ],
)
def test_the_longest_input_is_the_least_that_a_file_names(tmp_path: Path, where: dict[str, Any], longest: int) -> None:
    files = {**hidden_states(), **{name: json.dumps(body).encode() for name, body in where.items()}}
    model = texts.TextModel.load(folder(tmp_path, files))
    assert model.details()["longest_input_tokens"] == longest
    whole = " ".join(["sky"] * (longest - 2))
    answer = model([whole, f"{whole} sky"])
    assert answer.cut == (1,)
    np.testing.assert_allclose(answer.values[0], answer.values[1], atol=1e-6)


def test_positions_of_roberta_begin_after_the_padding(tmp_path: Path) -> None:
    files = hidden_states()
    for name in ("config.json", "model.safetensors"):
        files[name] = (ENCODERS / "roberta-classifier" / name).read_bytes()
    model = texts.TextModel.load(folder(tmp_path, files))
    assert model.details()["longest_input_tokens"] == 14  # of 16, as [PAD] has number 1 there
    assert model(["sky " * 20]).cut == (0,)


def test_a_pair_of_texts_has_two_segments(tmp_path: Path) -> None:
    model = Model(folder(tmp_path, hidden_states()))
    answer = model.answer([{"text": "blue", "text_pair": "sky"}, {"text": "blue"}, "blue"])
    hidden = tokens([2, 4, 3, 7, 3], [0, 0, 0, 1, 1])
    np.testing.assert_allclose(answer["outputs"][0], hidden.mean(0), rtol=1e-4, atol=1e-5)
    assert answer["outputs"][1] == answer["outputs"][2]


def test_scores_are_what_the_pipeline_of_transformers_makes_of_logits(tmp_path: Path) -> None:
    # "blue" is (0.05, 0.06), so the logits are 0.11, 1.1 and 11
    named = {"0": "low", "1": "mid", "2": "high"}
    soft = Model(folder(tmp_path / "a", classifier(3, id2label=named))).answer(["blue"])["outputs"][0]
    odds = np.exp([0.11, 1.1, 11])
    assert (soft["label"], list(soft["scores"])) == ("high", ["low", "mid", "high"])
    assert list(soft["scores"].values()) == pytest.approx((odds / odds.sum()).tolist(), rel=1e-5)
    many = Model(folder(tmp_path / "b", classifier(3, problem_type="multi_label_classification")))
    assert list(many.answer(["blue"])["outputs"][0]["scores"]) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    odds = 1 / (1 + np.exp([-0.11, -1.1, -11]))
    assert list(many.answer(["blue"])["outputs"][0]["scores"].values()) == pytest.approx(odds.tolist(), rel=1e-5)
    one = Model(folder(tmp_path / "c", classifier(1))).answer(["blue"])["outputs"][0]
    assert one["score"] == pytest.approx(1 / (1 + np.exp(-0.11)), rel=1e-5)
    plain = Model(folder(tmp_path / "d", classifier(1, problem_type="regression"))).answer(["blue"])["outputs"][0]
    assert plain["score"] == pytest.approx(0.11, rel=1e-5)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (lambda: classifier(3, id2label={"0": "a", "1": "b"}), "names 2 labels, the network has 3 classes"),
        (lambda: classifier(2, id2label={"0": "a", "1": "a"}), "names 1 labels"),
        (lambda: classifier(2, id2label={"a": 0, "b": 1}), "must be 0 to 1, and are a, b"),
        (lambda: classifier(3, id2label={"-1": "a", "0": "b", "1": "c"}), "must be 0 to 2, and are -1, 0, 1"),
        (lambda: classifier(3, id2label={"1": "a", "2": "b", "3": "c"}), "must be 0 to 2, and are 1, 2, 3"),
        (lambda: classifier(2, id2label={"00": "a", "1": "b"}), "must be 0 to 1"),
        (lambda: classifier(2, architectures=[]), "gives logits"),
        (lambda: classifier(2, sentence_transformers={"activation_fn": "torch.nn.Tanh"}), "activation function"),
        (lambda: encoder({"architectures": ["BertForMaskedLM"]}), "predicts masked words"),
        (lambda: sentences({"include_layers": 3}), "sets include_layers"),
        (lambda: sentences({"pooling_mode_weightedmean_tokens": True}), "pooling must be one of"),
        (lambda: sentences({"pooling_mode": ["mean", "cls"], "pooling_mode_mean_tokens": False}), "must be one of"),
        (lambda: sentences(transformer={"query_expansion": {"length": 3}}), "sets query_expansion"),
        (lambda: sentences(transformer={"transformer_task": "fill-mask"}), "sets transformer_task"),
        (lambda: sentences(transformer={"modality_config": {"image": {}}}), "modality text"),
        (lambda: sentences(prompts={"truncate_dim": 2}), "truncate_dim"),
        (lambda: sentences(prompts={"model_type": "SparseEncoder"}), "SparseEncoder"),
        (lambda: sentences(prompts={"default_prompt_name": "x", "prompts": {"y": "z"}}), "default prompt 'x'"),
        (lambda: {**sentences(), "modules.json": b"[3]"}, "a list of modules"),
        (lambda: {**sentences(), "sentence_bert_config.json": b"[]"}, "must hold a JSON object"),
        (lambda: sentences(tokenizer={"add_eos_token": False, "eos_token": "[SEP]"}), "add_eos_token False"),
        (lambda: sentences(tokenizer={"add_bos_token": True, "bos_token": "sky"}), "add_bos_token True"),
        (lambda: {**encoder(), "tokenizer.json": b"{}"}, "tokenizer.json cannot be read"),
        (lambda: {**encoder(), "model.onnx": b"\x08\x01"}, "cannot be loaded by ONNX Runtime"),
        (lambda: encoder({"architectures": ["BertForTokenClassification"]}), "neither classifies nor embeds"),
        (lambda: {k: v for k, v in encoder().items() if k != "model.onnx"}, "neither an .onnx file nor"),
        (lambda: {k: v for k, v in encoder().items() if k != "config.json"}, "no config.json"),
    ],
)
def test_a_folder_that_cannot_be_served_is_told_at_the_start(tmp_path: Path, files: Any, said: str) -> None:
    with pytest.raises(StartError, match=said) as raised:
        Model(folder(tmp_path, files()))
    assert raised.value.code == "model_load_failed"
    assert raised.value.hint


@pytest.mark.parametrize(
    ("rows", "code", "field"),
    [
        ([""], "empty_text", "inputs[0]"),
        (["blue", " \n\t"], "empty_text", "inputs[1]"),
        ([3], "wrong_type", "inputs[0]"),
        ([None], "wrong_type", "inputs[0]"),
        ([["blue"]], "wrong_type", "inputs[0]"),
        ("blue", "wrong_type", "inputs"),
        ([], "no_rows", "inputs"),
        (["blue"] * 257, "too_many_rows", "inputs"),
        (["x" * 1_000_000], "text_too_long", "inputs[0]"),
        (["x" * 50_000] * 21, "text_too_long", "inputs"),
        (["half \ud83d of a pair"], "not_unicode", "inputs[0]"),
        ([{"text": "blue", "more": 1}], "unknown_column", "inputs[0].more"),
        ([{"text_pair": "blue"}], "missing_column", "inputs[0].text"),
        ([{"text": "blue", "text_pair": ""}], "empty_text", "inputs[0].text_pair"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path: Path, rows: Any, code: str, field: str) -> None:
    model = Model(folder(tmp_path, encoder()))
    with pytest.raises(Problem) as raised:
        model.answer(rows)
    assert (raised.value.code, raised.value.field, raised.value.status) == (code, field, 422)


def test_emoji_right_to_left_text_and_control_characters_are_texts(tmp_path: Path) -> None:
    model = Model(folder(tmp_path, hidden_states()))
    rows = ["👩‍👩‍👧‍👦 🏳️‍🌈", "\u202bمرحبا بالعالم\u202c", "שלום blue", "blue\x00sky", "‎", "東京タワー", "e\u0301" * 40]
    outputs = model.answer(rows)["outputs"]
    assert len(outputs) == len(rows)
    assert all(np.isfinite(output).all() for output in outputs)


def test_a_text_of_a_hundred_thousand_characters_is_cut_and_the_answer_says_so(tmp_path: Path) -> None:
    model = Model(example.write(tmp_path / "m"))
    answer = model.answer(["thank you", "where is it " * 8000])
    assert answer["truncated"] == [1]
    assert "truncated" not in model.answer(["thank you"])


def test_the_example_knows_what_it_was_trained_on(tmp_path: Path) -> None:
    made = example.write(tmp_path / "m")
    model = Model(made)
    assert model.answer(made.sample()["inputs"]) == made.expected()
    given, labels = example.sentences(99, 100)
    answers = model.answer(given)["outputs"]
    assert sum(a["label"] == example.LABELS[b] for a, b in zip(answers, labels, strict=True)) >= 97
