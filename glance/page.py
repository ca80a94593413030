"""A page that draws with the base and with Glance side by side, and the same page as a Space for the hub.

    python -m glance.page --lora output/glance --dtype bfloat16
    python -m glance.page --lora output/glance --sampler output/ten --sampler output/six
    python -m glance.page --lora output/glance --export_space output/space

It takes infer_glance.py's flags for the model, sampling and memory. pip install -r requirements-page.txt brings
Gradio. The page listens on 127.0.0.1, or where GRADIO_SERVER_NAME says; one picture is drawn at a time.
"""

from glance import start
from glance.web import flags


if __name__ == "__main__":
    settings = start.as_script("pictures that were not saved are lost", flags.parse)

import functools
import importlib.util
import os

from glance import command_line as cli
from glance.ask.pipeline import first_line
from glance.web import space, studio
from glance_utils import InputError


def main(argv: list[str] | None = None, settings: cli.Settings | None = None):
    """Show the page, or export it, as the command line says; `settings` are what flags.parse made of it before."""
    settings = settings or flags.parse(argv)
    cli.set_up_logging()
    choices = studio.read_choices(settings)
    if settings.export_space:
        print(space.export(settings, choices))
        return
    page, style = make(settings, choices)
    how = {"server_port": settings.port, "share": settings.share, "ssr_mode": False, "quiet": True}
    try:
        _, local, world = page.launch(prevent_thread_lock=True, **how, **style)
    except (OSError, ValueError) as error:  # the port is taken, or Gradio cannot reach its own page in time
        raise InputError(
            f"the page cannot be served ({first_line(error)}); give another --port, or try again"
        ) from error
    print(f"{world or local}: open it in a browser; Ctrl-C ends it", flush=True)
    page.block_thread()


def make(settings: cli.Settings, choices: list):
    """Return the page of an open studio, and launch()'s arguments for how it looks; raise InputError without
    Gradio."""
    if importlib.util.find_spec("gradio") is None:
        raise InputError("the page needs Gradio, which is not installed; pip install -r requirements-page.txt")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    from glance.web import layout

    page = layout.make_page(studio.open_studio(choices), settings)
    return page, {"theme": layout.theme(), "css": layout.CSS}


if __name__ == "__main__":
    cli.run(functools.partial(main, settings=settings))
