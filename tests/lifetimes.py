"""Which of a base's models are in memory at three moments of a run."""

import weakref

from glance.ask import latents as ask_latents
from glance.ask import pipeline as ask
from glance.ask.velocity import PipelineVelocity
from glance.training import distribution


# When weights are about to be read, at each training step, and when the preview is decoded. The VAE waits on the CPU.
EXPECTED = {"reading": {"vae"}, "training": {"vae", "base"}, "decoding": {"vae"}}


def watch(set_attribute) -> dict[str, set[str]]:
    """Patch by `set_attribute`; return what will hold, by moment, the names of all models that were then alive.

    The one that denoises is "base"; others of its class have their own names. No garbage is collected that a run does
    not collect by itself.
    """
    models, moments = {}, {}
    load_pipeline, load_transformer = ask.load_pipeline, distribution.load_transformer
    forward, decode = PipelineVelocity.forward, ask_latents.decode_pixels

    def note(moment: str) -> None:
        moments.setdefault(moment, set()).update(name for name, model in models.items() if model() is not None)

    def watched_pipeline(*args, **kwargs):
        pipe = load_pipeline(*args, **kwargs)
        models.clear()
        models.update((name, weakref.ref(part)) for name, part in ask.freeable_components(pipe).items())
        return pipe

    def watched_transformer(*args, **kwargs):
        note("reading")
        transformer = load_transformer(*args, **kwargs)
        models[kwargs.get("part") or "base"] = weakref.ref(transformer)
        return transformer

    def watched_step(*args, **kwargs):
        if "reading" in moments:  # before, it is a step without weights that is estimated
            note("training")
        return forward(*args, **kwargs)

    def watched_decode(*args, **kwargs):
        if "training" in moments:  # before, it is the picture that the base draws to train on
            note("decoding")
        return decode(*args, **kwargs)

    set_attribute(ask, "load_pipeline", watched_pipeline)
    set_attribute(distribution, "load_transformer", watched_transformer)
    set_attribute(PipelineVelocity, "forward", watched_step)
    set_attribute(ask_latents, "decode_pixels", watched_decode)
    return moments
