"""The recommended settings: the tables are what the estimate says, and the configs are the tables' for 24 GB."""

import pytest
from conftest import ROOT
from recommended import NAMES, PAGE, READMES, between_marks, choose, long_rows, short_row

import train_glance_lora
from glance.training import fit


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_for_24_gb(name):
    args = train_glance_lora.parse_args([f"--config={ROOT / 'configs' / name}.yaml"])
    [row] = [line for line in between_marks(PAGE) if line.startswith(f"| {NAMES[name]} | 24 GB |")]
    assert row.split(" | ")[2].strip("`") == fit.as_flags(fit.as_choice(args))
    assert args.mixed_precision == "bf16"


@pytest.mark.long
def test_the_tables_are_what_the_estimate_says():
    """One base of all: Z-Image, whose step is the smallest."""
    chosen = choose("z_image")
    assert [line for line in between_marks(PAGE) if NAMES["z_image"] in line] == long_rows("z_image", chosen)
    for page in READMES:
        assert [line for line in between_marks(page) if NAMES["z_image"] in line] == [short_row("z_image", chosen)]
    assert all(len(between_marks(page)) == 2 + len(NAMES) for page in READMES)
