"""Made the folders beside it: small encoders with random weights, as transformers writes them, and what torch answers.

python tests/bentos/encoders/make.py        # where torch and transformers are installed; here they are not
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch  # type: ignore[import-not-found,unused-ignore]
import transformers as hf

SIZES = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
KIN = {**SIZES, "max_position_embeddings": 16, "type_vocab_size": 1, "pad_token_id": 1}
DISTIL = {"vocab_size": 30, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12, "max_position_embeddings": 16}
BERT = {**SIZES, "max_position_embeddings": 16}


def models() -> dict[str, Any]:
    return {
        "bert": hf.BertModel(hf.BertConfig(**BERT)),
        "bert-classifier": hf.BertForSequenceClassification(hf.BertConfig(**BERT, num_labels=3, hidden_act="gelu_new")),
        "roberta-classifier": hf.RobertaForSequenceClassification(hf.RobertaConfig(**KIN, num_labels=4)),
        "xlm-roberta": hf.XLMRobertaModel(hf.XLMRobertaConfig(**KIN)),
        "camembert-classifier": hf.CamembertForSequenceClassification(hf.CamembertConfig(**KIN, hidden_act="relu")),
        "distilbert": hf.DistilBertModel(hf.DistilBertConfig(**DISTIL)),
        "distilbert-classifier": hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**DISTIL, num_labels=3)),
    }


def main() -> None:
    torch.manual_seed(7)
    for name, model in models().items():
        model.eval()
        with torch.no_grad():
            for weights in model.parameters():  # those of a new model are so small that mistakes would not show
                weights.add_(torch.randn_like(weights) * 0.3)
        folder = Path(__file__).parent / name
        model.save_pretrained(folder, safe_serialization=True)
        ids = torch.randint(5, 30, (3, 9))
        mask = torch.ones_like(ids)
        mask[1, 6:], mask[2, 3:] = 0, 0
        ids[mask == 0] = model.config.pad_token_id
        segments = torch.zeros_like(ids)
        given = {"input_ids": ids, "attention_mask": mask}
        if model.config.model_type == "bert":
            segments[0, 4:] = 1
            given["token_type_ids"] = segments
        with torch.no_grad():
            answer = model(**given)
        values = answer.logits if "logits" in answer else answer.last_hidden_state
        told = {
            "input_ids": ids.tolist(),
            "attention_mask": mask.tolist(),
            "token_type_ids": segments.tolist(),
            "output": values.tolist(),
        }
        (folder / "answer.json").write_text(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
