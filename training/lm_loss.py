"""One step's loss of `train lm`, in one module: what several processes average is its gradient."""

import torch
from torch import nn

from cortexicon.modeling import AVQLMForConditionalGeneration

from .lm_readouts import head_loss
from .lm_stages import SideLosses
from .prompts import answer_loss


class StepLoss(nn.Module):
    """Answers, heads and side losses of a batch, weighted and summed.

    NOTE: one forward pass of one module, whatever a stage is made of. Run one after the other
    around `DistributedDataParallel`, heads and side losses are gradients that it was not told of.

    Parameters
    ----------
    model : AVQLMForConditionalGeneration
    side : SideLosses
    answer_weight, head_weight : float
    """

    def __init__(
        self,
        model: AVQLMForConditionalGeneration,
        side: SideLosses,
        answer_weight: float,
        head_weight: float,
    ):
        super().__init__()
        self.model, self.side = model, side
        self.answer_weight, self.head_weight = answer_weight, head_weight

    def forward(self, batch, seed: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss, and the logits of the answers (prompts, places, vocabulary).

        Parameters
        ----------
        batch : dict
            Of `RowBuilder.batch`, with `scan` (indices), `asked` (Answers) and `latents` (further
            inputs of the model).
        seed : list of int
            Of what the side losses draw.
        """
        model = self.model
        device = model.get_input_embeddings().weight.device
        kept, column = batch["places"][:, 1].unique(return_inverse=True)
        out = model(
            input_ids=batch["input_ids"].to(device),
            position_ids=batch["position_ids"].to(device),
            attention_mask=batch["attention_mask"].to(device),
            logits_to_keep=kept.to(device),
            use_cache=False,
            output_hidden_states=model.heads is not None,
            **{name: part.to(device) for name, part in batch["latents"].items()},
        )
        loss = answer_loss(out.logits[batch["places"][:, 0], column], batch["labels"])
        loss = self.answer_weight * loss
        if model.heads is not None:
            where = batch["places"][batch["first"]]
            states = out.hidden_states[-1][where[:, 0], where[:, 1]]
            loss = loss + self.head_weight * head_loss(model.heads, states, batch["asked"])
        if self.side.weights:
            loss = loss + self.side.loss(model, batch["scan"], seed)
        return loss, out.logits
