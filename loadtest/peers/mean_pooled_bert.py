"""transformers' own BERT with one linear layer on the mean of the real tokens: the whole model, no
exits, as a class that any server built on transformers can load (`trust_remote_code`).

transformers' BertForSequenceClassification pools the first token and has no such form. This file is
copied beside the weights; it knows nothing of offramp.
"""

from typing import Any

import torch
from transformers import BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPooledBertForSequenceClassification(BertPreTrainedModel):
    """Logits of the mean-pooled last hidden states."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = torch.nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        states = self.bert(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)[
            0
        ]
        real = attention_mask.unsqueeze(-1).to(states.dtype)
        mean = (states * real).sum(dim=1) / real.sum(dim=1)
        return SequenceClassifierOutput(logits=self.classifier(mean))
