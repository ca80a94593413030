"""A ComfyUI node that draws a Glance pair as infer_glance.py does. Copy this file into ComfyUI/custom_nodes/.

Stock nodes step by Euler (comfyui.json beside the LoRAs); this one walks the fitted solver and mixed branches too, and
rescales Qwen-Image's guidance as diffusers does, by the files' headers or a sampler.json. Give it an empty latent.
"""

import json

import comfy.sample
import comfy.samplers
import comfy.utils
import folder_paths
import latent_preview
import nodes
import torch
from safetensors import safe_open


CALLED = {"prompt": ["positive"], "negative": ["negative"], "both": ["positive", "negative"]}


def read_recipe(phase: str, name: str, sampler: str) -> dict:
    """Return timesteps, coefficients, branches and pipeline of a phase; raise ValueError where its file has none."""
    if sampler:
        with open(sampler, encoding="utf-8") as file:
            whole = json.load(file)
        first = len(whole["phases"]["slow"])
        part = slice(first) if phase == "slow" else slice(first, None)
        lists = {key: whole.get(key) and whole[key][part] for key in ("coefficients", "branches")}
        return {"timesteps": whole["phases"][phase], "pipeline": whole["pipeline"], **lists}
    with safe_open(folder_paths.get_full_path_or_raise("loras", name), "pt") as file:
        recipe = json.loads((file.metadata() or {}).get("glance", "{}"))
    if recipe.get("phase") == phase:
        return recipe
    raise ValueError(f"{name} is no {phase} LoRA with a recipe; choose what train_glance_lora.py wrote")


def rescaled_guidance(args: dict) -> torch.Tensor:
    """Return guidance with the norm of the prompt's own velocity in each packed token, 2x2 latents of all channels."""
    cond, guided = args["cond"], args["uncond"] + args["cond_scale"] * (args["cond"] - args["uncond"])
    squares = [torch.nn.functional.avg_pool2d(x.square().sum(dim=1), 2) for x in (cond, guided)]
    return guided * (squares[0] / squares[1]).sqrt().repeat_interleave(2, -1).repeat_interleave(2, -2).unsqueeze(1)


class BranchGuider(comfy.samplers.CFGGuider):
    branch = "guided"  # or "positive", "negative": the only one that is called

    def predict_noise(self, x, timestep, model_options={}, seed=None):
        if self.branch == "guided":
            return super().predict_noise(x, timestep, model_options, seed)
        branch = (self.inner_model, x, timestep, None, self.conds[self.branch], 1.0)
        return comfy.samplers.sampling_function(*branch, model_options=model_options, seed=seed)


class Walk:
    """A picture on its way through both phases: latents and earlier velocities are kept over the hand-off."""

    def __init__(self):
        self.x, self.kept = None, {branch: [None] * 3 for branch in ("guided", "positive", "negative")}

    def sampler(self, guider, recipe):
        kept, branches = self.kept, recipe.get("branches")
        weights = recipe.get("coefficients") or [[1.0]] * len(recipe["timesteps"])

        def steps(model, x, sigmas, extra_args, callback, disable):
            if self.x is None:
                self.x = self.start = x / sigmas[0]  # by which ComfyUI has scaled the noise
            for i, sigma in enumerate(sigmas[:-1]):
                for guider.branch in CALLED[branches[i]] if branches else ["guided"]:
                    denoised = model(self.x, sigma * x.new_ones([x.shape[0]]), **extra_args)
                    kept[guider.branch] = [(self.x - denoised) / sigma, *kept[guider.branch][:2]]
                both = [*kept["positive"], *kept["negative"], None if self.x is self.start else self.x, self.start]
                terms = zip(weights[i], both if branches else kept["guided"])
                slope = sum(weight * term for weight, term in terms if term is not None)
                callback({"x": self.x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
                self.x = self.x + (sigmas[i + 1] - sigma) * slope
            return self.x

        return comfy.samplers.KSAMPLER(steps)


class GlanceSampler:
    @classmethod
    def INPUT_TYPES(cls):
        loras = (["none", *folder_paths.get_filename_list("loras")],)
        numbers = {"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.01}
        links = {"model": ("MODEL",), "positive": ("CONDITIONING",), "noise": ("NOISE",), "latent_image": ("LATENT",)}
        values = {"slow_lora": loras, "fast_lora": loras, "strength": ("FLOAT", numbers), "cfg": ("FLOAT", numbers)}
        return {
            "required": links | values,
            "optional": {"negative": links["positive"], "sampler_json": ("STRING", {})},
        }

    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "sample", "sampling/custom_sampling"

    def sample(self, model, positive, noise, latent_image, strength, cfg, negative=None, sampler_json="", **loras):
        names = {phase: loras[f"{phase}_lora"] for phase in ("slow", "fast")}
        recipes = {phase: read_recipe(phase, name, sampler_json) for phase, name in names.items()}
        if negative is None and any({*(part.get("branches") or ())} - {"prompt"} for part in recipes.values()):
            raise ValueError("this sampler calls the negative prompt's branch; connect `negative`")
        x = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
        latent = {**latent_image, "samples": x}
        start, walk, ends = noise.generate_noise(latent), Walk(), (recipes["fast"]["timesteps"][0], 0)
        for (phase, recipe), end in zip(recipes.items(), ends):
            load = nodes.LoraLoaderModelOnly().load_lora_model_only
            patched = model.clone() if names[phase] == "none" else load(model, names[phase], strength)[0]
            if recipe["pipeline"].startswith("QwenImage"):
                patched.set_model_sampler_cfg_function(rescaled_guidance)
            guider = BranchGuider(patched)
            guider.set_conds(positive, positive if negative is None else negative)
            guider.set_cfg(1.0 if negative is None else cfg)
            sigmas = torch.FloatTensor([timestep / 1000 for timestep in [*recipe["timesteps"], end]])
            callback = latent_preview.prepare_callback(patched, len(recipe["timesteps"]))
            x = guider.sample(start, x, walk.sampler(guider, recipe), sigmas, callback=callback, seed=noise.seed)
            start = torch.zeros_like(x)
        return ({**latent, "samples": x},)


NODE_CLASS_MAPPINGS = {"GlanceSampler": GlanceSampler}
