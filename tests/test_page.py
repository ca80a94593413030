"""The page: what it draws is what infer_glance.py draws; in a Space that runs by itself; and in a real browser."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import yaml
from conftest import REFUSED, flags
from PIL import Image

from glance import page
from glance.files.recipe import WEIGHT_NAME
from glance.files.sampler import read_sampler
from glance.web import charts
from glance.web import flags as page_flags
from glance.web import studio as studios
from glance.web.studio import BESIDE, Request


PROMPT = "a red ring"
LONG = "ring " * 600
BOTH = {"slow": 1.0, "fast": 1.0}
ASKED = Request(PROMPT, 3, 32, 32, BOTH, None, BESIDE[0])


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """The trained pair with a calls.csv beside it."""
    copy = tmp_path_factory.mktemp("page") / "pair"
    shutil.copytree(trained(), copy)
    (copy / "calls.csv").write_text("calls,shipped,calibrated,with_loras\n4,0.4,0.14,\n10,0.11,0.045,0.04\n")
    return copy


@pytest.fixture(scope="module")
def studio(folder):
    """A dial of two positions: the pair, and its sampler without LoRAs."""
    settings = page_flags.parse(flags(lora=folder, sampler=folder))
    return studios.open_studio(studios.read_choices(settings))


def choice_of(studio, with_loras: bool):
    return next(choice for choice in studio.choices if bool(choice.paths) == with_loras)


def draw(studio, with_loras=True, **changes) -> tuple:
    """(Glance's Drawn, the one beside it, what was said)."""
    said = []
    return *studios.draw(studio, choice_of(studio, with_loras), ASKED._replace(**changes), said.append), said


def assert_same(drawn, path) -> None:
    assert np.array_equal(np.asarray(drawn.image), np.asarray(Image.open(path)))


# --------------------------------------------------------------------------------------------------------------------
# What is drawn


def test_it_draws_what_inference_draws(studio, folder, infer, tmp_path):
    others = {"prompt": PROMPT, "seed": 3, "height": 32, "width": 32, "output": tmp_path / "ours.png"}
    glance, base, _ = draw(studio, scales={"slow": 0.5, "fast": 1.5})
    assert_same(glance, infer(**others, lora=folder, lora_scale="0.5,1.5"))
    assert (glance.calls, base.calls) == (10, 50) and base.label == "base, 50 steps"
    assert_same(draw(studio, with_loras=False)[0], infer(**others, sampler=folder))


def test_the_loras_swap_where_it_says(studio, folder, infer, tmp_path):
    steps = choice_of(studio, True).schedule.timesteps
    lists = ";".join(",".join(map(repr, part)) for part in (steps[:2], steps[2:]))
    glance, *_ = draw(studio, swap=2)
    others = {"flow_custom_timesteps": lists, "height": 32, "width": 32, "output": tmp_path / "swapped.png"}
    assert_same(glance, infer(prompt=PROMPT, seed=3, lora=folder, **others))
    assert not np.array_equal(np.asarray(glance.image), np.asarray(draw(studio)[0].image))


def test_what_is_beside_it(studio):
    assert draw(studio, beside=BESIDE[1])[1].label == "base, 10 steps"
    alone = draw(studio, beside=BESIDE[2])[1]
    assert np.array_equal(np.asarray(alone.image), np.asarray(draw(studio, with_loras=False)[0].image))


def test_the_base_is_drawn_once_for_all_positions_of_the_dial(studio):
    before = {name for name, value in vars(studio.pipe).items() if callable(value)}
    base = draw(studio)[1]
    assert draw(studio, with_loras=False)[1] is base
    assert draw(studio, seed=4)[1] is not base
    assert {name for name, value in vars(studio.pipe).items() if callable(value)} == before  # no prompt is kept


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"height": 0}, "the height is 0"),
        ({"width": 10**6}, "the width is 1000000; give 1 to 16384"),
        ({"swap": 10}, "swap after step 10; give 1 to 9 of 10"),
        ({"swap": 0}, "swap after step 0"),
        ({"with_loras": False, "beside": BESIDE[2]}, "a sampler draws without LoRAs"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(changes, word, studio):
    with pytest.raises(REFUSED, match=word) as error:
        draw(studio, **changes)
    assert "\n" not in str(error.value)


def test_what_is_to_be_known_is_said_each_time(studio):
    for seed in range(2):
        said = draw(studio, prompt=LONG, height=41, seed=seed, beside=BESIDE[2])[2]
        assert any("A prompt is cut" in line for line in said)
        assert any(line.startswith("32x41 was asked, 32x32 was trained") for line in said)
        assert "32x41 was asked, FluxPipeline draws 32x40" in said
    assert draw(studio)[2] == []


# --------------------------------------------------------------------------------------------------------------------
# Flags and charts


def test_flags_that_make_no_page_are_refused(folder, pipelines, trained):
    for words, given in {
        "nothing to draw with": {},
        "--lora_scale is for LoRAs": {"sampler": folder, "lora_scale": 2},
        "unknown flag --compare": {"lora": folder, "compare": True},
        "exclude each other": {"lora": folder, "enable_group_offload": True, "enable_model_cpu_offload": True},
        "a page has one base": {"lora": [folder, trained("sd3")]},
    }.items():
        with pytest.raises(REFUSED, match=words):
            studios.read_choices(page_flags.parse(flags(**given)))
    settings = page_flags.parse(flags(lora=folder, sampler=folder, lora_scale="0.5,2"))
    assert [choice.lora_scale["slow"] for choice in settings.choices] == [0.5, 1.0]


def test_the_charts_show_the_swap_and_the_curve(studio):
    choice = choice_of(studio, True)
    plain, swapped = (charts.steps_chart(choice.schedule.timesteps, swap) for swap in (None, 2))
    assert (swapped.count(f'stroke="{charts.SLOW}"'), swapped.count(f'stroke="{charts.FAST}"')) == (2, 8)
    assert charts.SLOW not in plain
    curve = choice.curve()
    assert charts.series(curve, "calibrated") == [(4, 0.14), (10, 0.045)]
    assert charts.series(curve, "with_loras") == [(10, 0.04)]
    chart = charts.error_chart(curve, [(10, None)], 10, 0.05)
    assert "this picture" in chart and "as shipped" in chart
    assert charts.error_chart([{"calls": "x", "shipped": "nan"}], [(10, None)], 10) == ""


# --------------------------------------------------------------------------------------------------------------------
# A Space, which runs by itself


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    """A Space of the pair and its sampler."""
    target = tmp_path_factory.mktemp("space") / "space"
    given = {"sampler": folder, "prompt": [PROMPT, "a blue disc"], "lora_scale": "1,0.5", "seed": 3}
    page.main(flags(lora=folder, export_space=target, **given))
    return target


@pytest.mark.page
def test_a_space_holds_all_that_it_needs(exported, folder, pipelines):
    pytest.importorskip("gradio")
    names = {path.name for path in exported.iterdir()}
    assert names == {
        *("app.py", "page.json", "README.md", "requirements.txt", "dial", "base"),
        *("glance", "glance_utils.py", "infer_glance.py", "LICENSE"),
    }
    assert (exported / "dial/0/pair/slow" / WEIGHT_NAME).read_bytes() == (folder / "slow" / WEIGHT_NAME).read_bytes()
    assert read_sampler(exported / "dial/1/pair") == read_sampler(folder)
    settings = json.loads((exported / "page.json").read_text())
    assert settings["lora_scale"] == "1.0,0.5" and settings["prompt"] == [PROMPT, "a blue disc"]
    head = yaml.safe_load((exported / "README.md").read_text().split("---")[1])
    assert head["sdk"] == "gradio" and head["app_file"] == "app.py" and len(head["short_description"]) <= 60
    pinned = (exported / "requirements.txt").read_text().splitlines()
    assert f"gradio=={head['sdk_version']}" in pinned and not [line for line in pinned if line.startswith("-")]
    assert not [path for path in exported.rglob("*") if path.name == "__pycache__"]


def test_a_folder_that_is_there_is_left_as_it_is(exported, folder, tmp_path, monkeypatch):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(REFUSED, match="it is there already"):
        page.main(flags(lora=folder, export_space=tmp_path))
    monkeypatch.setattr(shutil, "copytree", lambda *others, **more: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        page.main(flags(lora=folder, export_space=tmp_path / "space"))
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


@pytest.fixture(scope="module")
def address(exported):
    """Where the exported app.py listens, started as its README says."""
    pytest.importorskip("gradio")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(exported / "app.py"), "--dtype", "float32"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/", env=environment)
    try:
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), line
        yield line.split(": ")[0]
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 128 + signal.SIGINT


@pytest.mark.page
def test_a_space_draws(address, folder, infer):
    client = pytest.importorskip("gradio_client").Client(address, verbose=False)
    *_, glance, cost, _, _ = client.predict(0, PROMPT, 3, 32, 32, BESIDE[0], 1, 0.5, 5, api_name="/on_draw")
    ours = infer(prompt=PROMPT, seed=3, height=32, width=32, lora=folder, lora_scale="1,0.5")
    assert np.array_equal(np.asarray(Image.open(glance)), np.asarray(Image.open(ours)))
    assert re.search(r"\d+\.\d\d s, 10 model calls", cost) and "to the full run" in cost


# --------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright brings it")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium: apt-get install chromium brings it")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.page
def test_in_a_browser(browser, address):
    """Load, type, draw, compare, look at the swap, and an error."""
    tab, elsewhere = browser.new_page(viewport={"width": 1280, "height": 1000}), []
    tab.on(
        "request", lambda request: request.url.startswith((address, "data:", "blob:")) or elsewhere.append(request.url)
    )
    tab.goto(address)
    tab.set_default_timeout(60_000)
    tab.get_by_label("Prompt").fill("a green square")
    tab.get_by_role("button", name="Draw", exact=True).click()
    tab.get_by_text("to the full run").first.wait_for()
    tab.get_by_text("base, 50 steps").wait_for()
    pictures = tab.locator(".glance-picture img")
    assert pictures.count() == 2
    assert all(pictures.nth(number).evaluate("image => image.naturalWidth") == 32 for number in range(2))
    slider = tab.locator("[data-testid=imageslider], .slider-wrap, .image-container").last
    assert slider.is_visible()
    before = tab.get_by_label("noise left over steps").inner_html()
    swap = tab.get_by_label("number input for Swap after step")
    swap.fill("2")
    swap.press("Enter")
    tab.wait_for_function(
        "old => document.querySelector('[aria-label=\"noise left over steps\"]').innerHTML != old", arg=before
    )
    tab.get_by_label("Height").fill("0")
    tab.get_by_role("button", name="Draw", exact=True).click()
    tab.get_by_text("the height is 0; give 1 to 16384 pixels").wait_for()
    assert "Traceback" not in tab.content() and not elsewhere
    tab.close()
