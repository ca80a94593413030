"""Write the tables of recommended settings: for each card and base the fastest that fit, by the estimate, from the
large pipelines of tests/full_size.py. docs/memory-and-speed.md has all of it, the two READMEs a short form.

    python tests/recommended.py

It takes half a minute for each base on one core. The files in configs/ are held against it by test_recommended.py.
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image


ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from full_size import SIZES, make  # noqa: E402

import train_glance_lora  # noqa: E402
from glance.training import fit  # noqa: E402
from glance.training.dry_run import SHARE_OF_RATE, ask_needs, flops_of, parts  # noqa: E402


# By memory in GB, whose rate of dense bf16 products with float32 sums the minutes are for: NVIDIA's whitepapers of the
# Ada and the Hopper architecture say 165.2 TFLOP/s of the RTX 4090 and 989.4 of the H100 (SXM).
RATES = dict.fromkeys((8, 12, 16, 24), 165.2e12) | dict.fromkeys((48, 80), 989.4e12)
NAMES = {"flux": "FLUX.1-dev", "flux2": "FLUX.2-dev", "sd3": "SD3.5 Large", "qwen_image": "Qwen-Image"}
NAMES |= {"z_image": "Z-Image", "wan": "Wan 2.1 14B"}  # by the file in configs/
SHORT = dict(zip(fit.LADDER, ("none", "ckpt", "adam8", "int8", "nf4", "offload")))
CAPTION = "a red fox in the snow, seen from afar, at dusk, under tall pines"  # a token for each letter
PAGE = ROOT / "docs" / "memory-and-speed.md"
READMES = {ROOT / "README.md": "base", ROOT / "README.ja.md": "ベース"}  # what their table calls a base
START, END = "<!-- recommended: python tests/recommended.py -->\n", "<!-- end of recommended -->"


def choose(name: str) -> dict[int, tuple[fit.Choice | None, str, str]]:
    """What this base needs on each card, by its memory in GB: the settings, peak in GB, minutes of a pair as the file
    in configs/ has it, from an image."""
    with tempfile.TemporaryDirectory() as folder:
        base = f"--pretrained_model_name_or_path={make(name, Path(folder) / 'base')}"
        config = f"--config={ROOT / 'configs' / name}.yaml"
        data = [f"--instance_image={Path(folder) / 'image.png'}", f"--instance_prompt={CAPTION}"]
        Image.new("RGB", (1280, 1280)).save(Path(folder) / "image.png")
        settings, needed, captions = ask_needs(train_glance_lora.parse_args([config, base, *data]))
    chosen = {}
    for memory, rate in RATES.items():
        choice = fit.first_fit(needed, list(fit.LADDER), memory * 10**9)
        chosen[memory] = None, "", ""
        if choice is not None:
            minutes = flops_of(parts(settings, needed, choice, captions)) / (SHARE_OF_RATE * rate) / 60
            chosen[memory] = choice, f"{needed.peak(choice) / 1e9:.1f}", f"{minutes:.1f}"
    return chosen


def long_rows(name: str, chosen: dict) -> list[str]:
    """A row for each card."""
    rows = []
    for memory, (choice, peak, minutes) in chosen.items():
        flags = "nothing fits" if choice is None else fit.as_flags(choice)
        flags = f"`{flags}`" if flags.startswith("--") else flags
        rows.append(f"| {NAMES[name]} | {memory} GB | {flags} | {peak and peak + ' GB'} | {minutes} |")
    return rows


def short_row(name: str, chosen: dict) -> str:
    """A row for all cards."""
    cells = ["-" if choice is None else f"{SHORT[choice]} {peak}" for choice, peak, _ in chosen.values()]
    return f"| [{NAMES[name]}](configs/{name}.yaml) | {' | '.join(cells)} |"


def between_marks(page: Path) -> list[str]:
    """The lines of the table that the page has."""
    return page.read_text().split(START)[1].split(END)[0].splitlines()


def write(page: Path, lines: list[str]) -> None:
    before, rest = page.read_text().split(START)
    page.write_text(before + START + "\n".join(lines) + "\n" + END + rest.split(END)[1])
    print(f"{page}: written")


if __name__ == "__main__":
    chosen = {name: choose(name) for name in SIZES}
    rows = [row for name in chosen for row in long_rows(name, chosen[name])]
    write(PAGE, ["| base | card | flags | peak | minutes |", "|---|---|---|---|---|", *rows])
    head = " | ".join(f"{memory} GB" for memory in RATES)
    for page, base in READMES.items():
        rows = [short_row(name, chosen[name]) for name in chosen]
        write(page, [f"| {base} | {head} |", "|---" * (len(RATES) + 1) + "|", *rows])
