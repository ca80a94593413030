"""The demo model: what is shipped is what the scripts make, and the judge agrees with it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from evaluate import draw
from judge import JUDGE_FILE, load_judge
from PIL import Image
from scenes import all_scenes, caption_of, render, scene_of, split_scenes


DEMO = Path(__file__).parent.parent / "demo"


def test_captions_and_scenes_are_one_to_one():
    captions = {caption_of(scene) for scene in all_scenes()}
    assert len(captions) == len(all_scenes()) == 3240
    assert all(torch.equal(scene_of(caption_of(scene)), scene) for scene in all_scenes()[::97])
    with pytest.raises(ValueError, match="not a scene"):
        scene_of("a red fox in the snow")


def test_held_out_captions_are_never_trained():
    trained, held_out = ({caption_of(scene) for scene in part} for part in split_scenes())
    assert len(held_out) == 256 and not trained & held_out
    prompts = (DEMO / "prompts.txt").read_text().splitlines()
    assert set(prompts) <= held_out


def test_the_demo_image_is_a_rendered_scene_with_its_caption():
    scene = scene_of((DEMO / "glance.txt").read_text())
    drawn = render(scene[None], torch.Generator().manual_seed(1))[0].permute(1, 2, 0)
    assert np.array_equal(np.asarray(Image.open(DEMO / "glance.png")), (drawn * 255).round().byte().numpy())


def test_the_judge_reads_real_renders():
    scenes = split_scenes()[1]
    right = load_judge().right(render(scenes, torch.Generator().manual_seed(3)), scenes)
    assert right.all(1).float().mean() >= 0.97


def test_the_judge_tells_wrong_pictures():
    scenes = split_scenes()[1]
    right = load_judge().right(render(scenes, torch.Generator().manual_seed(3)), scenes.roll(1, 0))
    assert right.all(1).float().mean() <= 0.03


def test_the_demo_model_is_a_complete_small_flux_pipeline():
    size = sum(path.stat().st_size for path in [*DEMO.glob("model/**/*"), JUDGE_FILE] if path.is_file())
    assert size <= 12e6
    pipe = DiffusionPipeline.from_pretrained(DEMO / "model")
    assert type(pipe) is FluxPipeline
    assert pipe.scheduler.config.use_dynamic_shifting


def test_the_demo_model_draws_what_held_out_captions_say():
    pipe = FluxPipeline.from_pretrained(DEMO / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    scenes = split_scenes()[1][:16]
    right = load_judge().right(draw(pipe, scenes, guidance=3.0, num_inference_steps=20), scenes)
    assert right.all(1).sum() >= 12
