"""Procedural scenes: the data of the demo model.

A scene is one object on a plain background, for example "a large red ring at the top left on a white background".
Everything about it is known, so a picture can be judged exactly, and anybody can draw the data set again.

    python demo/scenes.py --caption "a large red ring at the left on a white background" --output demo/glance.png
"""

import argparse
import itertools
import re

import torch


RESOLUTION = 96  # pixels; 36 image tokens behind the demo's 8x VAE and FLUX's 2x2 packing

COLORS = {
    "red": (0.90, 0.15, 0.15),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.98, 0.90, 0.15),
    "green": (0.10, 0.65, 0.25),
    "blue": (0.15, 0.30, 0.90),
    "purple": (0.55, 0.20, 0.70),
}
BACKGROUNDS = {
    "white": (1.00, 1.00, 1.00),
    "black": (0.05, 0.05, 0.05),
    "gray": (0.55, 0.55, 0.55),
    "pink": (1.00, 0.75, 0.85),
    "brown": (0.45, 0.30, 0.20),
}
SIZES = {"small": 0.24, "large": 0.42}  # radius; the picture spans -1..1
SHAPES = ("circle", "square", "triangle", "ring", "cross", "diamond")
POSITIONS = {
    "top left": (-0.5, -0.5),
    "top": (0.0, -0.5),
    "top right": (0.5, -0.5),
    "left": (-0.5, 0.0),
    "center": (0.0, 0.0),
    "right": (0.5, 0.0),
    "bottom left": (-0.5, 0.5),
    "bottom": (0.0, 0.5),
    "bottom right": (0.5, 0.5),
}
# A scene is a tuple of indices in this order.
ATTRIBUTES = {
    "size": tuple(SIZES),
    "color": tuple(COLORS),
    "shape": SHAPES,
    "position": tuple(POSITIONS),
    "background": tuple(BACKGROUNDS),
}

_CAPTION = re.compile(
    rf"a ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) "
    rf"at the ({'|'.join(POSITIONS)}) on a ({'|'.join(BACKGROUNDS)}) background"
)


def all_scenes() -> torch.Tensor:
    """Return every scene there is, as attribute indices, int64 (3240, 5)."""
    return torch.tensor(list(itertools.product(*(range(len(values)) for values in ATTRIBUTES.values()))))


def split_scenes(held_out: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scenes (N, 5) to train on and those that training never sees; always the same split."""
    scenes = all_scenes()
    scenes = scenes[torch.randperm(len(scenes), generator=torch.Generator().manual_seed(2512))]
    return scenes[held_out:], scenes[:held_out]


def caption_of(scene) -> str:
    size, color, shape, position, background = (
        values[int(index)] for values, index in zip(ATTRIBUTES.values(), scene)
    )
    return f"a {size} {color} {shape} at the {position} on a {background} background"


def scene_of(caption: str) -> torch.Tensor:
    """Return the attribute indices (5,) of a caption; raise ValueError where the words are not a scene."""
    match = _CAPTION.fullmatch(caption.strip())
    if match is None:
        raise ValueError(f"{caption!r} is not a scene; write it like {caption_of((1, 0, 3, 3, 0))!r}")
    return torch.tensor([values.index(word) for values, word in zip(ATTRIBUTES.values(), match.groups())])


def _distance(shape: str, x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Return the signed distance to the outline, negative inside; y points down."""
    ax, ay = x.abs(), y.abs()
    if shape == "circle":
        return torch.hypot(x, y) - r
    if shape == "square":
        return torch.maximum(ax, ay) - 0.85 * r
    if shape == "triangle":
        return torch.maximum(0.894 * ax - 0.447 * y - 0.5 * r, y - 0.8 * r)
    if shape == "ring":
        return (torch.hypot(x, y) - 0.75 * r).abs() - 0.25 * r
    if shape == "cross":
        return torch.minimum(torch.maximum(ax - r, ay - 0.33 * r), torch.maximum(ay - r, ax - 0.33 * r))
    return (ax + ay - 1.15 * r) / 2**0.5  # diamond


def render(scenes: torch.Tensor, generator: torch.Generator, resolution: int = RESOLUTION) -> torch.Tensor:
    """Draw scenes (B, 5) with slightly random place, size and colours: float32 (B, 3, H, W) in 0..1."""
    count = len(scenes)

    def jitter(scale, *shape):
        return scale * (2 * torch.rand(count, *shape, generator=generator) - 1)

    size, color, shape, position, background = scenes.T
    radius = torch.tensor(list(SIZES.values()))[size] + jitter(0.02)
    center = torch.tensor(list(POSITIONS.values()))[position] + jitter(0.06, 2)
    ink = torch.tensor(list(COLORS.values()))[color] + jitter(0.03, 3)
    paper = torch.tensor(list(BACKGROUNDS.values()))[background] + jitter(0.03, 3)

    grid = (torch.arange(resolution) + 0.5) * 2 / resolution - 1
    x = grid.view(1, 1, -1) - center[:, 0].view(-1, 1, 1)
    y = grid.view(1, -1, 1) - center[:, 1].view(-1, 1, 1)
    distance = torch.empty(count, resolution, resolution)
    for index, name in enumerate(SHAPES):
        chosen = shape == index
        distance[chosen] = _distance(
            name, *torch.broadcast_tensors(x[chosen], y[chosen]), radius[chosen].view(-1, 1, 1)
        )
    cover = (0.5 - distance * resolution / 2).clamp(0, 1).unsqueeze(1)  # one pixel of antialiasing
    image = paper.view(-1, 3, 1, 1) * (1 - cover) + ink.view(-1, 3, 1, 1) * cover
    return image.clamp(0, 1)


def main():
    from PIL import Image

    parser = argparse.ArgumentParser(description="Draw one scene and write its caption beside it.")
    parser.add_argument("--caption", required=True)
    parser.add_argument("--output", required=True, help="a .png; the caption goes to the .txt beside it")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    image = render(scene_of(args.caption)[None], torch.Generator().manual_seed(args.seed))[0]
    Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(args.output)
    with open(args.output.rsplit(".", 1)[0] + ".txt", "w") as file:
        file.write(args.caption.strip() + "\n")


if __name__ == "__main__":
    main()
