"""`python -m bentos.transformers.example DIR`: a small text classifier with its sample and answers, in seconds."""

from __future__ import annotations

import sys
from pathlib import Path

from bentos.serving import ModelFolder, write_model
from bentos.training import words

LABELS = ("complaint", "question", "thanks")
LONGEST = 64
_PARTS = {
    "complaint": (
        ("the parcel", "my order", "the invoice", "this phone", "the app"),
        ("is broken", "never arrived", "was late again", "is wrong", "does not work"),
        ("please fix it", "I am angry", "I want my money back", "this is too bad"),
    ),
    "question": (
        ("where", "when", "how", "why", "who"),
        ("can I find the parcel", "does the app start", "will my order arrive", "is the invoice", "can I return it"),
        ("could you tell me", "do you know", "I wonder", "any idea"),
    ),
    "thanks": (
        ("thank you", "many thanks", "great work", "wonderful", "well done"),
        ("the parcel is here", "my order came early", "the app works", "you helped me", "it is a good phone"),
        ("I am happy", "you are kind", "I will come back", "have a nice day"),
    ),
}


def sentences(seed: int, count: int) -> tuple[list[str], list[int]]:
    """Short messages to a shop, put together from parts, with the number of their label."""
    import numpy as np

    rng = np.random.default_rng(seed)
    texts, labels = [], []
    for _ in range(count):
        label = int(rng.integers(len(LABELS)))
        chosen = [part[rng.integers(len(part))] for part in _PARTS[LABELS[label]]]
        rng.shuffle(chosen)
        texts.append(" ".join(chosen))
        labels.append(label)
    return texts, labels


def files(seed: int = 0) -> dict[str, bytes]:
    """A Hugging Face folder: a word-level tokenizer and a network of word vectors, their mean and one linear layer."""
    import numpy as np

    texts, labels = sentences(seed, 600)
    tokenizer = words.tokenizer(texts)
    counts = words.counts(tokenizer, texts)
    rng = np.random.default_rng(seed)
    table = rng.normal(0, 0.1, (counts.shape[1], 16)).astype(np.float32)
    weight, target = np.zeros((16, len(LABELS)), np.float32), np.eye(len(LABELS), dtype=np.float32)[labels]
    for _ in range(300):
        hidden = counts @ table
        scores = hidden @ weight
        odds = np.exp(scores - scores.max(axis=1, keepdims=True))
        slope = (odds / odds.sum(axis=1, keepdims=True) - target) / len(texts)
        table, weight = table - 20 * counts.T @ (slope @ weight.T), weight - 20 * hidden.T @ slope
    config = {
        "architectures": ["WordsForSequenceClassification"],
        "id2label": {str(i): label for i, label in enumerate(LABELS)},
    }
    return words.folder(tokenizer, words.network(table, weight), LONGEST, config)


def write(root: Path, seed: int = 0) -> ModelFolder:
    """Expected answers come from ONNX Runtime and the tokenizer themselves, not from the kind's code."""
    import numpy as np
    import onnxruntime
    from tokenizers import Tokenizer

    made = files(seed)
    sample = sentences(seed + 1, 5)[0]
    tokenizer = Tokenizer.from_str(made["tokenizer.json"].decode())
    session = onnxruntime.InferenceSession(made["model.onnx"], providers=["CPUExecutionProvider"])
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    encodings = tokenizer.encode_batch(sample)
    feed = {
        "input_ids": np.array([encoding.ids for encoding in encodings]),
        "attention_mask": np.array([encoding.attention_mask for encoding in encodings]),
    }
    outputs = []
    for logits in session.run(None, feed)[0].astype(np.float64):
        odds = np.exp(logits - logits.max())
        scores = (odds / odds.sum()).tolist()
        best = int(np.argmax(scores))
        by_label = dict(zip(LABELS, scores, strict=True))
        outputs.append({"label": LABELS[best], "score": scores[best], "scores": by_label})
    return write_model(
        root,
        kind="transformers",
        format="transformers-onnx",
        files=made,
        model="config.json",
        sample={"inputs": sample},
        expected={"outputs": outputs},
    )


if __name__ == "__main__":
    print(write(Path(sys.argv[1] if len(sys.argv) > 1 else "model")).root)
