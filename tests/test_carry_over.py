"""benchmarks/carry_over.py measures on the demo model, trains what it needs, and goes on where it was cut."""

import json
import sys

import pytest
from conftest import ROOT, flags


sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "demo")]

import carry_over  # noqa: E402

from glance_utils import InputError  # noqa: E402


pytestmark = pytest.mark.slow
LITTLE = {"captions": 2, "num_prompts": 1, "num_plans": 1, "steps": 2}


@pytest.mark.long
def test_a_cut_run_goes_on_and_a_changed_base_is_another(tmp_path, capsys):
    def run(rows: str) -> dict:
        carry_over.main(flags(**LITTLE, rows=rows, output_dir=tmp_path))
        return json.loads((tmp_path / "results.json").read_text())

    first = run("nothing")
    [control] = first["changes"].values()
    assert control["changed by"] == 0
    for errors in control["errors"].values():
        assert errors["carried"] == errors["weights anew"] < errors["shipped"]

    both = run("^style LoRA")
    assert both["changes"][carry_over.UNCHANGED] == control and both["samplers"] == first["samplers"]
    styled = both["changes"]["style LoRA"]
    assert styled["changed by"] > 0 and styled["errors"] != control["errors"]
    assert (tmp_path / "style LoRA").is_dir() and "2 of 15 changes" in capsys.readouterr().out
    row = (tmp_path / "table.md").read_text().splitlines()[-1]
    assert row.startswith("| style LoRA | ") and f"{styled['errors']['mixed, 4 calls']['carried']:.3f}" in row

    with pytest.raises(InputError, match="its rows were measured otherwise; give another folder"):
        carry_over.main(flags(**LITTLE | {"captions": 3}, output_dir=tmp_path))
