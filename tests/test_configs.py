"""Every config under configs/ is understood by the training script."""

import pytest
from conftest import ROOT

import train_glance_lora


CONFIGS = [*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/simpletuner/glance-*.json")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_understood(path):
    args = train_glance_lora.parse_args([f"--config={path}", "--seed=7"])
    assert args.pretrained_model_name_or_path and args.seed == 7
    assert len(CONFIGS) >= 40
