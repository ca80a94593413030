"""Write the tables in docs/families.md: from what tests/test_families.py left in output/families, and of
tests/test_pictures_beside.py from output/families/pictures."""

import json
from pathlib import Path

from tiny_with_pictures import GROUPS, KINDS, call_of


ROOT = Path(__file__).parent.parent
NOTES = {"wan22": "2.2 5B: a timestep for each token"}  # a second form of a pipeline, by its name in the tests
START, END = "<!-- families: python tests/family_table.py -->\n", "<!-- end of families -->"


def table() -> str:
    paths = sorted((ROOT / "output" / "families").glob("*.json"))
    results = [json.loads(path.read_text()) | {"note": NOTES.get(path.stem)} for path in paths]
    rows = ["| pipeline | scheduler | guidance | VAE | `--pipeline_kwargs` |", "|---|---|---|---|---|"]
    for result in sorted(results, key=lambda result: result["pipeline"]):
        extra = f"`{json.dumps(result['pipeline_kwargs'])}`" if result["pipeline_kwargs"] else ""
        pipeline = f"{result['pipeline']} ({result['note']})" if result["note"] else result["pipeline"]
        cells = (pipeline, result["scheduler"], result["guidance"], result["vae"], extra)
        rows.append(f"| {' | '.join(cells)} |")
    worst = {key: max(result[key] for result in results) for key in ("round_trip", "velocity_error")}
    count = len({result["pipeline"] for result in results})
    versions = ", ".join(sorted({result["diffusers"] for result in results}))
    rows.append(
        f"\n{count} pipelines, diffusers {versions}. Largest error of the latents' round trip "
        f"{worst['round_trip']:.1e}, of the velocity against the stock pipeline {worst['velocity_error']:.1e}.\n"
    )
    return "\n".join(rows)


def picture_table() -> str:
    paths = (ROOT / "output" / "families" / "pictures").glob("*.json")
    results = {result["name"]: result for result in (json.loads(path.read_text()) for path in paths)}
    rows = ["| kind | pipeline | `--pipeline_images` | losses | `--pipeline_kwargs` |", "|---|---|---|---|---|"]
    for group, kinds in GROUPS.items():
        for name, kind in kinds.items():
            losses = "trajectory, flow" if results[name]["flow"] else "trajectory"
            extra = f"`{json.dumps(call_of(name)[1])}`" if call_of(name)[1] else ""
            rows.append(f"| {group} | {name} | {', '.join(kind.pictures)} | {losses} | {extra} |")
    worst = max(result["velocity_error"] for result in results.values())
    versions = ", ".join(sorted({result["diffusers"] for result in results.values()}))
    rows.append(
        f"\n{len({name.split()[0] for name in KINDS})} pipelines, diffusers {versions}. Largest error of the velocity "
        f"against the stock pipeline, before and after its encoders are freed, {worst:.1e}.\n"
    )
    return "\n".join(rows)


def write(page: Path, start: str, table: str, end: str) -> None:
    before, rest = page.read_text().split(start)
    page.write_text(before + start + table + end + rest.split(end)[1])


if __name__ == "__main__":
    page = ROOT / "docs" / "families.md"
    write(page, START, table(), END)
    write(page, "<!-- pictures -->\n", picture_table(), "<!-- end of pictures -->")
    print(f"{page}: tables of families written")
