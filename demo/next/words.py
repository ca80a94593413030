"""Procedural words: the data of the demo model.

A picture is one word in capitals on a light ground, for example: the word "SEA" in red on blue stripes. The caption
says the word, the ink, the ground's colour and its pattern. What people leave open it leaves open: place, size, font,
tilt, exact shades, and the pattern's width, angle and phase. Everything is known, so a picture can be judged exactly,
and anybody can draw the data set again.

    python demo/next/words.py --caption 'the word "SEA" in red on blue stripes' --output sea.png --seed 1
    python demo/next/words.py --sheet sheet.png          # forty random pictures

Fonts: Pillow's built-in Aileron (CC0) upright, slanted and heavy, and a stroke font that this file draws.
"""

import argparse
import math
import random
import re

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


RESOLUTION = 128  # pixels; 64 image tokens behind an 8x VAE and FLUX's 2x2 packing
MAX_LETTERS = 3
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# Of twelve letters alone: a small model learns few shapes sooner than many.
WORDS = """
ACE ACT AIM AIR ALE ANT APE ARC ARM ART CAP CAR CAT COT EAR EAT ELM ICE ION LAP LIP MAP MAT MEN MET MOP NAP NET NIP NOT
OAR OAT OIL ONE PAL PAN PEA PEN PET PIE PIN PIT POT RAM RAT RIM RIP SAP SEA SET SIP SIT SON TAN TAP TAR TEA TEN TIE TIN
TIP TOE TON TOP
""".split()

INKS = {
    "red": (0.86, 0.12, 0.12),
    "orange": (0.95, 0.42, 0.02),
    "green": (0.05, 0.50, 0.18),
    "blue": (0.12, 0.25, 0.85),
    "purple": (0.50, 0.15, 0.65),
    "black": (0.06, 0.06, 0.07),
}
GROUNDS = {
    "white": (0.97, 0.97, 0.97),
    "yellow": (0.98, 0.92, 0.45),
    "pink": (1.00, 0.75, 0.85),
    "gray": (0.70, 0.70, 0.70),
    "cyan": (0.62, 0.90, 0.93),
}
PATTERNS = ("paper", "stripes", "dots")
FONTS = ("upright", "slanted", "heavy", "marker")


def _arc(cx, cy, rx, ry, start, end):
    """Marks an arc; degrees, clockwise from the right, since y points down."""
    return ("arc", cx, cy, rx, ry, start, end)


# Strokes of the marker's letters: polylines in a box of height 1 and the given width; y points down.
STROKES = {
    "A": (0.8, [[(0, 1), (0.4, 0), (0.8, 1)], [(0.14, 0.65), (0.66, 0.65)]]),
    "B": (
        0.65,
        [
            [(0, 0), (0, 1)],
            [(0, 0), (0.35, 0), _arc(0.35, 0.24, 0.24, 0.24, -90, 90), (0, 0.48)],
            [(0, 0.48), (0.37, 0.48), _arc(0.37, 0.74, 0.28, 0.26, -90, 90), (0, 1)],
        ],
    ),
    "C": (0.75, [[_arc(0.42, 0.5, 0.42, 0.5, -45, -315)]]),
    "D": (0.72, [[(0, 0), (0, 1), (0.27, 1), _arc(0.27, 0.5, 0.45, 0.5, 90, -90), (0, 0)]]),
    "E": (0.6, [[(0.6, 0), (0, 0), (0, 1), (0.6, 1)], [(0, 0.49), (0.5, 0.49)]]),
    "F": (0.58, [[(0.58, 0), (0, 0), (0, 1)], [(0, 0.49), (0.48, 0.49)]]),
    "G": (0.8, [[_arc(0.42, 0.5, 0.42, 0.5, -45, -360), (0.84, 0.55), (0.5, 0.55)]]),
    "H": (0.7, [[(0, 0), (0, 1)], [(0.7, 0), (0.7, 1)], [(0, 0.49), (0.7, 0.49)]]),
    "I": (0.0, [[(0, 0), (0, 1)]]),
    "J": (0.5, [[(0.5, 0), (0.5, 0.72), _arc(0.25, 0.72, 0.25, 0.28, 0, 180)]]),
    "K": (0.66, [[(0, 0), (0, 1)], [(0.62, 0), (0, 0.58)], [(0.22, 0.4), (0.66, 1)]]),
    "L": (0.55, [[(0, 0), (0, 1), (0.55, 1)]]),
    "M": (0.84, [[(0, 1), (0, 0), (0.42, 0.62), (0.84, 0), (0.84, 1)]]),
    "N": (0.7, [[(0, 1), (0, 0), (0.7, 1), (0.7, 0)]]),
    "O": (0.9, [[_arc(0.45, 0.5, 0.45, 0.5, 0, 360)]]),
    "P": (0.62, [[(0, 1), (0, 0), (0.35, 0), _arc(0.35, 0.27, 0.27, 0.27, -90, 90), (0, 0.54)]]),
    "Q": (0.9, [[_arc(0.45, 0.5, 0.45, 0.5, 0, 360)], [(0.52, 0.68), (0.86, 1.04)]]),
    "R": (
        0.65,
        [[(0, 1), (0, 0), (0.35, 0), _arc(0.35, 0.27, 0.27, 0.27, -90, 90), (0, 0.54)], [(0.3, 0.54), (0.65, 1)]],
    ),
    "S": (0.66, [[_arc(0.33, 0.25, 0.3, 0.25, -20, -270), _arc(0.33, 0.75, 0.33, 0.25, -90, 160)]]),
    "T": (0.7, [[(0, 0), (0.7, 0)], [(0.35, 0), (0.35, 1)]]),
    "U": (0.7, [[(0, 0), (0, 0.65), _arc(0.35, 0.65, 0.35, 0.35, 180, 0), (0.7, 0)]]),
    "V": (0.76, [[(0, 0), (0.38, 1), (0.76, 0)]]),
    "W": (1.08, [[(0, 0), (0.27, 1), (0.54, 0.15), (0.81, 1), (1.08, 0)]]),
    "X": (0.72, [[(0, 0), (0.72, 1)], [(0.72, 0), (0, 1)]]),
    "Y": (0.76, [[(0, 0), (0.38, 0.5), (0.76, 0)], [(0.38, 0.5), (0.38, 1)]]),
    "Z": (0.68, [[(0, 0), (0.68, 0), (0, 1), (0.68, 1)]]),
}

_CAPTION = re.compile(
    rf'the word "([A-Z]{{1,{MAX_LETTERS}}})" in ({"|".join(INKS)}) on ({"|".join(GROUNDS)}) ({"|".join(PATTERNS)})'
)


def caption_of(scene) -> str:
    """A scene is (word, ink, ground, pattern), all strings."""
    word, ink, ground, pattern = scene
    return f'the word "{word}" in {ink} on {ground} {pattern}'


def scene_of(caption: str) -> tuple[str, str, str, str]:
    """The scene of a caption; raises ValueError where the words are none."""
    match = _CAPTION.fullmatch(caption.strip())
    if match is None:
        example = caption_of(("SEA", "red", "cyan", "stripes"))
        raise ValueError(f"{caption!r} is not a scene; write it like {example!r}")
    return match.groups()


def split_scenes(held_out: int = 256) -> tuple[list[tuple], ...]:
    """The scenes to train on and the ones that training never sees; always the same split."""
    scenes = [(w, i, g, p) for w in WORDS for i in INKS for g in GROUNDS for p in PATTERNS]
    random.Random(2512).shuffle(scenes)
    return scenes[held_out:], scenes[:held_out]


def _points(stroke):
    points = []
    for part in stroke:
        if part[0] != "arc":
            points.append(part)
            continue
        _, cx, cy, rx, ry, start, end = part
        steps = max(2, round(40 * abs(end - start) / 360))
        angles = [math.radians(start + (end - start) * i / steps) for i in range(steps + 1)]
        points += [(cx + rx * math.cos(angle), cy + ry * math.sin(angle)) for angle in angles]
    return points


def _word_mask(word: str, rng: random.Random) -> np.ndarray:
    """Where the ink is, float32 (H, W) in 0..1: font, size, tilt and place are drawn from `rng`.

    Letters are set at a fixed pitch, as a typewriter's are.
    """
    font, scale = rng.choice(FONTS), 3  # drawn three times as large, so that edges are smooth
    height = round(rng.uniform(32, 40) * scale)
    pitch, pad = 0.98 * height, height // 4
    mask = Image.new("L", (round(len(word) * pitch) + 2 * pad, height + 2 * pad))
    draw = ImageDraw.Draw(mask)
    face = ImageFont.load_default(round(height / 0.71))  # Aileron's capitals are .71 em tall
    weight = round(height * (rng.uniform(0.05, 0.08) if font == "heavy" else rng.uniform(0.015, 0.035)))
    radius = height * rng.uniform(0.15, 0.2) / 2
    for place, letter in enumerate(word):
        middle = pad + (place + 0.5) * pitch
        if font != "marker":
            draw.text((middle, pad + height), letter, fill=255, font=face, stroke_width=weight, anchor="ms")
            continue
        width, strokes = STROKES[letter]
        for stroke in strokes:
            points = [(middle + (x - width / 2) * height, pad + y * height) for x, y in _points(stroke)]
            draw.line(points, fill=255, width=round(2 * radius))
            for x, y in points:
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    if font == "slanted":
        shear = rng.uniform(0.2, 0.32)
        mask = mask.transform(mask.size, Image.AFFINE, (1, shear, -shear * mask.height / 2, 0, 1, 0), Image.BICUBIC)
    mask = mask.rotate(rng.uniform(-9, 9), resample=Image.BICUBIC, expand=True)
    mask = mask.crop(mask.getbbox())
    mask = mask.resize((max(1, round(mask.width / scale)), max(1, round(mask.height / scale))), Image.LANCZOS)
    # Near the middle: where a word may stand anywhere, a small model learns late which letter belongs where.
    room = RESOLUTION - mask.width, RESOLUTION - mask.height
    shift = [min(12, max(0, free // 2 - 4)) for free in room]
    canvas = Image.new("L", (RESOLUTION, RESOLUTION))
    canvas.paste(mask, tuple(free // 2 + rng.randint(-most, most) for free, most in zip(room, shift)))
    return np.asarray(canvas, dtype=np.float32) / 255


def _pattern_mask(pattern: str, rng: random.Random) -> np.ndarray:
    """How dark the ground is, float32 (H, W) in 0..1."""
    if pattern == "paper":
        return np.zeros((RESOLUTION, RESOLUTION), np.float32)
    angle, period = rng.uniform(0, math.pi), rng.uniform(18, 30)
    x, y = np.meshgrid(np.arange(RESOLUTION, dtype=np.float32), np.arange(RESOLUTION, dtype=np.float32))
    u = (x * math.cos(angle) + y * math.sin(angle)) / period + rng.random()
    if pattern == "stripes":
        distance = 0.25 - np.abs(u - np.round(u))
    else:
        v = (y * math.cos(angle) - x * math.sin(angle)) / period + rng.random()
        distance = 0.27 - np.hypot(u - np.round(u), v - np.round(v))
    return np.clip(distance * period + 0.5, 0, 1)


def render(scene, rng: random.Random) -> np.ndarray:
    """Draw one scene: float32 (H, W, 3) in 0..1; what the caption leaves open is drawn from `rng`."""
    word, ink, ground, pattern = scene
    light = np.float32([min(1, max(0, value + rng.uniform(-0.03, 0.03))) for value in GROUNDS[ground]])
    color = np.float32([min(1, max(0, value + rng.uniform(-0.05, 0.05))) for value in INKS[ink]])
    dark = light * np.float32(rng.uniform(0.82, 0.88))
    shade = _pattern_mask(pattern, rng)[..., None]
    cover = _word_mask(word, rng)[..., None]
    image = light * (1 - shade) + dark * shade
    return image * (1 - cover) + color * cover


def draw(scenes: list[tuple], count: int, rng: random.Random) -> tuple[list[tuple], torch.Tensor]:
    """`count` pictures of scenes drawn with replacement: (scenes, images (count, 3, H, W) in 0..1)."""
    chosen = [rng.choice(scenes) for _ in range(count)]
    return chosen, torch.from_numpy(np.stack([render(scene, rng) for scene in chosen])).permute(0, 3, 1, 2)


def sheet(images: torch.Tensor, columns: int) -> Image.Image:
    """Pictures (N, 3, H, W) in 0..1 side by side."""
    count, _, height, width = images.shape
    rows = math.ceil(count / columns)
    page = Image.new("RGB", (columns * (width + 2), rows * (height + 2)), "white")
    for i, image in enumerate(images):
        pixels = (image.clamp(0, 1).permute(1, 2, 0) * 255).round().byte().numpy()
        page.paste(Image.fromarray(pixels), (i % columns * (width + 2), i // columns * (height + 2)))
    return page


def main():
    parser = argparse.ArgumentParser(description="Draw one scene and write its caption beside it, or a sheet of many.")
    parser.add_argument("--caption")
    parser.add_argument("--output", help="a .png; the caption goes to the .txt beside it")
    parser.add_argument("--sheet", help="a .png of forty random scenes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    if args.sheet:
        sheet(draw(split_scenes()[0], 40, rng)[1], 8).save(args.sheet)
    if args.caption:
        image = render(scene_of(args.caption), rng)
        Image.fromarray((image * 255).round().astype(np.uint8)).save(args.output)
        with open(args.output.rsplit(".", 1)[0] + ".txt", "w") as file:
            file.write(args.caption.strip() + "\n")


if __name__ == "__main__":
    main()
