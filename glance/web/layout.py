"""What stands on the page, and what does each control do? Drawing is studio.py's, the charts are charts.py's."""

import random
from html import escape
from pathlib import Path

import gradio as gr

from glance.command_line import Settings
from glance.drawing import Drawn, errors_of
from glance.web import charts
from glance.web.studio import BESIDE, Choice, Request, Studio, base_of, draw
from glance_utils import InputError


LONGEST = 10_000  # characters of a prompt
CSS = """
.gradio-container {max-width: 1240px !important; margin: 0 auto !important}
.glance-title h1 {font-size: 1.9rem; font-weight: 650; margin: 0}
.glance-title p {margin: 0.1rem 0 0; opacity: 0.75}
.glance-cost {min-height: 3.2rem; font-size: 0.95rem; line-height: 1.5; padding: 0 0.2rem}
.glance-cost b {font-weight: 650}
.glance-picture img {object-fit: contain; width: 100% !important; height: 100% !important}
.glance-chart {width: 100%; font-size: 13px; font-family: inherit}
footer {display: none !important}
"""
SYSTEM = ("system-ui", "sans-serif")  # nothing is asked of another server


def theme() -> gr.themes.Base:
    """Return the page's colours and letters."""
    look = {"primary_hue": "orange", "neutral_hue": "slate", "radius_size": "lg"}
    return gr.themes.Default(**look, font=SYSTEM, font_mono=("monospace",))


def make_page(studio: Studio, settings: Settings) -> gr.Blocks:
    """Return the page; one picture is drawn at a time, whoever asks."""
    choices = studio.choices
    first = choices[0]
    base = "/".join(Path(base_of(first)).parts[-2:])
    with gr.Blocks(title=f"Glance: {base}", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(f"<h1>Glance</h1><p>{escape(base)} as it is, and in few model calls</p>", elem_classes="glance-title")
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(
                settings.prompts[0] if settings.prompts else "",
                label="Prompt",
                placeholder="what to draw",
                max_length=LONGEST,
                lines=2,
                scale=5,
            )
            button = gr.Button("Draw", variant="primary", scale=0, min_width=150)
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                controls, strengths = make_controls(studio, settings)
            with gr.Column(scale=3):
                pictures = make_pictures()
                with gr.Row():
                    steps = gr.HTML(steps_of(first, first.swap))
                    errors = gr.HTML(errors_over_calls(studio, first))
        if settings.prompts[1:]:
            gr.Examples([[text] for text in settings.prompts], prompt, label="Prompts")
        dial, swap = controls[0], strengths[-1]
        every = [dial, prompt, *controls[1:], *strengths]

        def on_draw(*values):
            yield from answers(studio, *values)

        def on_dial(index):
            choice = choices[index]
            known = [gr.update(interactive=bool(choice.paths))] * 2
            moved = gr.update(interactive=bool(choice.paths), maximum=max(choice.steps - 1, 1), value=choice.swap)
            return [*known, moved, steps_of(choice, choice.swap), errors_over_calls(studio, choice)]

        def on_swap(index, after):
            return steps_of(choices[index], after)

        waiting = {"show_progress_on": [pictures[0], pictures[2]], "concurrency_limit": 1}
        gr.on([button.click, prompt.submit], on_draw, every, [*pictures, errors], **waiting)
        dial.change(on_dial, dial, [*strengths, steps, errors], queue=False, show_progress="hidden")
        swap.change(on_swap, [dial, swap], steps, queue=False, show_progress="hidden")
    return page.queue(default_concurrency_limit=1, max_size=32)


def make_controls(studio: Studio, settings: Settings) -> tuple[list, list]:
    """Return the dial, seed, height, width and what is beside; and the strengths of both LoRAs and their swap."""
    choices = studio.choices
    first = choices[0]
    dial = gr.Radio(
        [(f"{choice.calls} calls, {choice.name}", index) for index, choice in enumerate(choices)],
        value=0,
        label="Model calls a picture",
        visible=len(choices) > 1,
    )
    beside = gr.Radio(BESIDE, value=BESIDE[0], label="Beside it")
    with gr.Row():
        whole = {"precision": 0, "min_width": 70}
        seed = gr.Number(settings.choices[0].seed, label="Seed", **whole)
        width = gr.Number(first.size[1], label="Width", **whole)
        height = gr.Number(first.size[0], label="Height", **whole)
    dice = gr.Button("New seed", size="sm")
    dice.click(lambda: random.randrange(2**31), None, seed, queue=False)
    shown = any(choice.paths for choice in choices)
    acts = bool(first.paths)
    scale = first.args.lora_scale
    with gr.Group(visible=shown):
        slow, fast = (
            gr.Slider(0, 2, scale[phase], step=0.05, label=f"{phase.title()} LoRA", interactive=acts)
            for phase in ("slow", "fast")
        )
        swap = gr.Slider(1, max(first.steps - 1, 1), first.swap, step=1, label="Swap after step", interactive=acts)
    return [dial, seed, height, width, beside], [slow, fast, swap]


def make_pictures() -> list:
    """Return the two pictures, each with its cost, and the slider over both."""
    sides = []
    with gr.Row():
        for label in ("Base", "Glance"):
            with gr.Column(min_width=220):
                image = gr.Image(
                    label=label,
                    format="png",
                    interactive=False,
                    height=300,
                    buttons=["download", "fullscreen"],
                    elem_classes="glance-picture",
                )
                sides += [image, gr.HTML(elem_classes="glance-cost")]
        with gr.Column(min_width=220):
            slider = gr.ImageSlider(
                label="Base | Glance", format="png", interactive=False, height=300, buttons=["fullscreen"]
            )
    return [*sides, slider]


def answers(studio, index, prompt, seed, height, width, beside, slow, fast, swap):
    """Yield what the page shows once Glance's picture is there, and once the one beside it is; raise gr.Error, with
    one line, for what the user can mend."""
    choice = studio.choices[index]
    request = Request(
        prompt, seed or 0, height, width, {"slow": slow, "fast": fast}, swap if choice.paths else None, beside
    )
    drawn = []
    try:
        for one in draw(studio, choice, request, gr.Warning):
            drawn.append(one)
            yield shown(studio, choice, drawn, beside)
    except (InputError, FloatingPointError, MemoryError) as error:
        raise gr.Error(escape(str(error)), duration=None, print_exception=False) from None


def shown(studio: Studio, choice: Choice, drawn: list[Drawn], beside: str) -> list:
    """Return the values of make_pictures' components and of the errors' chart."""
    if len(drawn) == 1:
        waiting = f"drawing {escape(beside)} ..."
        return [None, waiting, drawn[0].image, cost_of(drawn[0]), None, gr.skip()]
    glance, base = drawn
    error = next(iter(errors_of([base, glance]).values())) if beside == BESIDE[0] else None
    more = "" if error is None else f"<br>error {error:.4f} to the full run"
    chart = errors_over_calls(studio, choice, error)
    return [base.image, cost_of(base), glance.image, cost_of(glance) + more, (base.image, glance.image), chart]


def cost_of(drawn: Drawn) -> str:
    """Return what a picture cost."""
    return f"<b>{escape(drawn.label)}</b><br>{drawn.seconds:.2f} s, {drawn.calls} model calls"


def steps_of(choice: Choice, swap: int | None) -> str:
    """Return the chart of a choice's steps, swapped after that many where it has LoRAs."""
    return charts.steps_chart(choice.schedule.timesteps, swap if choice.paths else None)


def errors_over_calls(studio: Studio, choice: Choice, measured: float | None = None) -> str:
    """Return the chart of errors over the dial: the choice's own curve or, where it has none, another's; and what was
    found for each position."""
    curve = choice.curve() or next((curve for other in studio.choices if (curve := other.curve())), [])
    found = [(other.calls, other.error()) for other in studio.choices]
    return charts.error_chart(curve, found, choice.calls, measured)
