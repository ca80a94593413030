"""The judge: a small classifier that reads a scene back from a picture.

It answers the five attributes of a scene; a picture is right when all five are. `demo/train_demo_model.py` trains it
and measures it on fresh renders; anything that can make pictures from captions can then be scored exactly.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scenes import ATTRIBUTES, RESOLUTION
from torch import nn


JUDGE_FILE = Path(__file__).parent / "judge.safetensors"


class Judge(nn.Module):
    """A classifier: images (B, 3, 96, 96) in 0..1 -> one logits tensor (B, values) for each attribute."""

    def __init__(self, width: int = 32):
        super().__init__()
        channels = [3, width, width, 2 * width, 2 * width]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 5, stride=2, padding=2) for a, b in zip(channels, channels[1:])
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, b) for b in channels[1:])
        self.hidden = nn.Linear(channels[-1] * (RESOLUTION // 16) ** 2, 128)
        self.heads = nn.ModuleList(nn.Linear(128, len(values)) for values in ATTRIBUTES.values())

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features (B, 128) on which a Frechet distance between two sets of pictures is computed."""
        x = images * 2 - 1
        for convolution, norm in zip(self.convolutions, self.norms):
            x = F.silu(norm(convolution(x)))
        return F.silu(self.hidden(x.flatten(1)))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        features = self.features(images)
        return [head(features) for head in self.heads]

    @torch.no_grad()
    def right(self, images: torch.Tensor, scenes: torch.Tensor) -> torch.Tensor:
        """Return which attributes are right, bool (B, 5); images (B, 3, 96, 96) in 0..1, scenes (B, 5)."""
        return torch.stack([logits.argmax(1) for logits in self(images)], dim=1) == scenes


def load_judge(path: Path = JUDGE_FILE) -> Judge:
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return judge.eval()
