"""Linear heads on the language model's last state: answers that need no words."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init


class AnswerHeads(nn.Module):
    """One linear head per target on the state that would write the answer's first token.

    Numbers are predicted in units of the training people's standard deviation around their mean,
    and lie within the target's range; classes have a logit each.

    Parameters
    ----------
    targets : list of dict
        As in `AVQLMConfig.targets`.
    width : int
        Of the language model's states.
    """

    def __init__(self, targets, width: int):
        super().__init__()
        self.targets = {target["name"]: target for target in targets}
        sizes = [len(t["classes"]) if t["kind"] == "class" else 1 for t in targets]
        starts = [sum(sizes[:k]) for k in range(len(sizes))]
        spans = zip(starts, sizes, strict=True)
        self.places = {
            name: slice(first, first + size)
            for name, (first, size) in zip(self.targets, spans, strict=True)
        }
        self.out = nn.Linear(width, sum(sizes))
        self.register_buffer("mean", torch.zeros(len(targets)))
        self.register_buffer("scale", torch.ones(len(targets)))

    def reset(self):
        """Heads that answer the training mean, and every class alike."""
        init.zeros_(self.out.weight)
        init.zeros_(self.out.bias)
        init.zeros_(self.mean)
        init.ones_(self.scale)

    @torch.no_grad()
    def start(self, values: dict[str, torch.Tensor]) -> None:
        """Take the mean and standard deviation of each number, float (subjects,), of training."""
        for index, name in enumerate(self.targets):
            if name in values:
                self.mean[index] = values[name].mean()
                self.scale[index] = values[name].std().clamp(min=1e-6)

    def _raw(self, states, name):
        return self.out(states.to(self.out.weight))[..., self.places[name]].float()

    def loss(self, states, name: str, truth) -> torch.Tensor:
        """Of states (answers, width): half the squared error in SD, or cross entropy; (answers,).

        `truth` holds numbers, float (answers,), or probabilities of classes, float (answers,
        classes).
        """
        raw = self._raw(states, name)
        if self.targets[name]["kind"] == "class":
            return F.cross_entropy(raw, truth.float(), reduction="none")
        index = list(self.targets).index(name)
        wanted = (truth.float() - self.mean[index]) / self.scale[index]
        return 0.5 * (raw[..., 0] - wanted).square()

    def read(self, states, name: str) -> torch.Tensor:
        """Numbers (answers,), or probabilities of classes (answers, classes), float32."""
        raw, target = self._raw(states, name), self.targets[name]
        if target["kind"] == "class":
            return torch.softmax(raw, -1)
        index = list(self.targets).index(name)
        values = self.mean[index] + self.scale[index] * raw[..., 0]
        return values.clamp(target["minimum"], target["maximum"])
