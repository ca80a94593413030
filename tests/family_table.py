"""Write the table of families in docs/families.md from what tests/test_families.py left in output/families."""

import json
from pathlib import Path


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


if __name__ == "__main__":
    page = ROOT / "docs" / "families.md"
    before, rest = page.read_text().split(START)
    page.write_text(before + START + table() + END + rest.split(END)[1])
    print(f"{page}: table of families written")
