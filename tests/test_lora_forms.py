"""LoRA files as they are found: every trainer's form is read at its strength, or refused with its name."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from glance.files.lora import load_lora
from glance_utils import InputError, adapted_layers


RANK = 4
LAYERS = {
    "flux": [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.ff.net.2",
        "single_transformer_blocks.0.proj_out",
    ],
    "sd3": ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_out.0", "proj_out"],
    "qwen": [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.1.attn.add_k_proj",
        "transformer_blocks.0.img_mod.1",
    ],
}


@pytest.fixture(scope="module")
def pipes(pipelines):
    return {base: DiffusionPipeline.from_pretrained(folder) for base, folder in pipelines.items()}


@pytest.fixture
def pipe(request, pipes):
    """A pipeline, by default FLUX's, without adapters before and after."""
    pipe = pipes[getattr(request, "param", "flux")]
    yield pipe
    pipe.transformer.unload_lora()


def lora_of(model, layers) -> dict[str, torch.Tensor]:
    """Random tensors in the form of our own files, without diffusers' prefix."""
    generator, lora = torch.Generator().manual_seed(0), {}
    for layer in layers:
        module = model.get_submodule(layer)
        lora[f"{layer}.lora_A.weight"] = torch.randn(RANK, module.in_features, generator=generator)
        lora[f"{layer}.lora_B.weight"] = torch.randn(module.out_features, RANK, generator=generator)
    return lora


def renamed(lora: dict, change) -> dict:
    return {change(name): value for name, value in lora.items()}


def kohya(lora: dict, prefix: str) -> dict:
    def change(name):
        layer, _, part = name.partition(".lora_")
        return f"{prefix}{layer.replace('.', '_')}.lora_{'down' if part[0] == 'A' else 'up'}.weight"

    return renamed(lora, change)


def half(lora: dict) -> dict:
    return {
        name if index % 4 > 1 else f"transformer.{name}": value for index, (name, value) in enumerate(lora.items())
    }


def default(lora: dict) -> dict:
    return renamed(lora, lambda name: name.replace(".weight", ".default.weight"))


NAMES = {
    "diffusers": lambda lora: renamed(lora, lambda name: f"transformer.{name}"),
    "no prefix": dict,
    "half prefixed": half,
    "peft": lambda lora: renamed(lora, lambda name: f"base_model.model.{name}"),
    "peft within a pipeline": lambda lora: renamed(lora, lambda name: f"base_model.model.transformer.{name}"),
    "ComfyUI": lambda lora: renamed(lora, lambda name: f"diffusion_model.{name}"),
    "DiffSynth": default,
    "kohya": lambda lora: kohya(lora, "lora_unet_"),
    "kohya, transformer": lambda lora: kohya(lora, "lora_transformer_"),
    "LyCORIS": lambda lora: kohya(lora, "lycoris_"),
    "dots": lambda lora: renamed(
        lora, lambda name: f"transformer.{name}".replace("lora_A", "lora.down").replace("lora_B", "lora.up")
    ),
}


def settings(prefix="transformer.", **values) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"{prefix}{key}": value for key, value in values.items()})}


def stems(tensors: dict) -> list[str]:
    return list({name.split(".lora")[0]: None for name in tensors})


def write(path, tensors, header=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path, metadata=header)
    return path


def read(pipe, path) -> dict[str, torch.Tensor]:
    """What each layer adds to its base's weight after loading: lora_B @ lora_A * scaling."""
    load_lora(pipe, path, "slow")
    found = {}
    for name, layer in pipe.transformer.named_modules():
        if "slow" in getattr(layer, "lora_A", {}):
            found[name] = layer.lora_B["slow"].weight @ layer.lora_A["slow"].weight * layer.scaling["slow"]
    return found


def deltas(lora: dict, scale=lambda layer: 1.0) -> dict[str, torch.Tensor]:
    layers = stems(lora)
    return {name: lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"] * scale(name) for name in layers}


def assert_same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


# --------------------------------------------------------------------------------------------------------------------
# Names and strengths


FORMS = [("flux", form) for form in NAMES]
FORMS += [(base, form) for base in ("sd3", "qwen") for form in ("no prefix", "half prefixed", "kohya", "ComfyUI")]


@pytest.mark.parametrize("pipe, form", FORMS, indirect=["pipe"])
def test_names_of_every_kind_are_read(form, pipe, tmp_path, request):
    lora = lora_of(pipe.transformer, LAYERS[request.node.callspec.params["pipe"]])
    tensors = NAMES[form](lora)
    plain = read(pipe, write(tmp_path / "a.safetensors", tensors))
    assert_same(plain, deltas(lora))
    pipe.transformer.unload_lora()
    alphas = {f"{stem}.alpha": torch.tensor(2.0 + number) for number, stem in enumerate(stems(tensors))}
    folded = read(pipe, write(tmp_path / "b.safetensors", tensors | alphas))
    assert_same(folded, deltas(lora, lambda layer: (2.0 + stems(lora).index(layer)) / RANK))


def test_settings_tell_the_strength(pipe, tmp_path):
    """In the header as diffusers writes it, with the prefix or without, or beside the file as peft does."""
    lora = lora_of(pipe.transformer, LAYERS["flux"])
    first, second, third = LAYERS["flux"]
    small = {f"{second}.lora_A.weight": lora[f"{second}.lora_A.weight"][:2]}
    small |= {f"{second}.lora_B.weight": lora[f"{second}.lora_B.weight"][:, :2]}
    mixed = lora | small
    patterns = {"rank_pattern": {"ff.net.2": 2}, "alpha_pattern": {f"^{third}": 1.0, "ff\\.net\\.2": 6}}
    for number, (values, wanted) in enumerate(
        [
            ({"r": RANK, "lora_alpha": 16}, deltas(lora, lambda layer: 4.0)),
            ({"r": RANK, "lora_alpha": 16, "use_rslora": True}, deltas(lora, lambda layer: 8.0)),
            ({"r": RANK, "lora_alpha": 2} | patterns, deltas(mixed, {first: 0.5, second: 3.0, third: 0.25}.get)),
        ]
    ):
        tensors = mixed if "rank_pattern" in values else lora
        for prefix in ("transformer.", ""):
            path = tmp_path / f"{number}{prefix}" / "a.safetensors"
            write(path, NAMES["diffusers"](tensors), settings(prefix, **values))
            assert_same(read(pipe, path), wanted)
            pipe.transformer.unload_lora()
        path = write(tmp_path / f"peft {number}" / "adapter_model.safetensors", NAMES["peft"](tensors))
        config = {"peft_type": "LORA", "auto_mapping": {"base_model_class": "A"}, "target_modules": ["to_q"], **values}
        path.with_name("adapter_config.json").write_text(json.dumps(config))
        assert_same(read(pipe, path), wanted)
        pipe.transformer.unload_lora()


def test_other_architectures_names_are_converted_by_diffusers(pipe, tmp_path):
    """Black Forest Labs' own layers, of which one is three of diffusers', as kohya's scripts name them."""
    attention = pipe.transformer.transformer_blocks[0].attn
    width, rank = attention.to_q.in_features, 6  # which three divides: diffusers then looks for three LoRAs in one
    generator = torch.Generator().manual_seed(0)
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {
        f"{stem}.lora_down.weight": torch.randn(rank, width, generator=generator),
        f"{stem}.lora_up.weight": torch.randn(3 * width, rank, generator=generator),
        f"{stem}.alpha": torch.tensor(3.0),
    }
    delta = tensors[f"{stem}.lora_up.weight"] @ tensors[f"{stem}.lora_down.weight"] / 2
    names = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    wanted = dict(zip(names, delta.chunk(3)))
    assert_same(read(pipe, write(tmp_path / "a.safetensors", tensors)), wanted)
    pipe.transformer.unload_lora()
    # one that the converter leaves out, with no more than a warning
    tensors |= {name.replace("img_attn_qkv", "new_attn"): value for name, value in tensors.items()}
    with pytest.raises(InputError, match="lora_unet_double_blocks_0_.*kohya's"):
        read(pipe, write(tmp_path / "b.safetensors", tensors))


@pytest.mark.parametrize("kind", ["use_dora", "lora_bias"])
def test_magnitudes_and_biases_are_read(kind, pipe, tmp_path):
    pipe.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "proj_out"], **{kind: True}), "a"
    )
    for name, value in pipe.transformer.named_parameters():
        if ".lora_" in name:
            value.data.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
    tensors = {
        name: value.clone() for name, value in get_peft_model_state_dict(pipe.transformer, adapter_name="a").items()
    }
    call = {"prompt": "a", "height": 32, "width": 32, "num_inference_steps": 1, "output_type": "latent"}
    wanted = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    for index, ending in enumerate(("", ".weight")):  # two ways to end the magnitudes' names
        pipe.transformer.unload_lora()
        named = renamed(tensors, lambda name, ending=ending: name + ending * name.endswith("magnitude_vector"))
        header = settings(r=2, lora_alpha=6, **{kind: True})
        load_lora(pipe, write(tmp_path / f"{index}.safetensors", NAMES["diffusers"](named), header), "a")
        found = pipe(**call, generator=torch.Generator().manual_seed(0)).images
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


# --------------------------------------------------------------------------------------------------------------------
# What is refused, each in one line that names it


def test_what_is_no_lora_of_this_model_is_named(pipe, tmp_path):
    lora = NAMES["diffusers"](lora_of(pipe.transformer, LAYERS["flux"]))
    layer = "transformer.transformer_blocks.0.attn.to_q"
    down, up = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
    one, four = torch.tensor(1.0), {f"{layer}.alpha": torch.tensor(4.0)}
    settings_of_8 = settings(r=RANK, lora_alpha=8)
    cases = [
        ({f"{layer}.lokr_w1": torch.ones(2, 2)}, None, "LyCORIS' LoKr"),
        ({f"{layer}.hada_w1_a": torch.ones(2, 2)}, None, "LyCORIS' LoHa"),
        ({f"{layer}.dora_scale": torch.ones(2, 1)}, None, "kohya's and LyCORIS' DoRA"),
        ({f"{layer}.diff": torch.ones(2, 2)}, None, "differences of whole weights"),
        ({"text_encoder.layers.0.q.lora_A.weight": torch.ones(4, 4)}, None, "adapts a text encoder too"),
        ({"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 4)}, None, "text encoder"),
        ({"diffusion_model.nothing.lora_A.weight": torch.ones(4, 4)}, None, "does not have.*ComfyUI's"),
        ({down.removeprefix("transformer."): lora[down]}, None, "twice"),
        ({"transformer.transformer_blocks.0.lora_A.weight": torch.ones(4, 32)}, None, "a FluxTransformerBlock; only"),
        ({f"{layer}.lora_B.bias": torch.ones(32)}, None, "has no lora_B.bias, as others have"),
        ({f"{layer}.lora_magnitude_vector.weight": torch.ones(7)}, None, "width 7"),
        ({f"{layer}.lora_magnitude_vector": torch.ones(32)}, None, "has no lora_magnitude_vector"),
        ({f"{layer}.alpha": torch.tensor(-1.0)}, None, "no number above 0"),
        ({"transformer.proj_out.alpha": one}, None, "without a LoRA of this layer"),
        (four, settings_of_8, "strength 1 by its .alpha and 2 by its settings"),
        ({}, settings(r=4, lora_alpha=4, use_dora=True), "use_dora, but it holds no lora_magnitude_vector"),
        ({}, settings(r=8, lora_alpha=8), "has rank 4, but its settings say 8"),
        ({}, settings(r=4, lora_alpha=4, rank_pattern={"to_q": 3}), "has rank 4, but its settings say 3"),
        ({}, settings(r=4, lora_alpha=4, rank_pattern={"(a+)+$": 3}), "rank_pattern"),
        ({}, settings(r=4, lora_alpha=4, alpha_pattern={"to_q": -3}), "alpha_pattern"),
        ({}, settings(r=4, lora_alpha=4, alpha_pattern=[1]), "alpha_pattern"),
        ({up: lora[up] * torch.tensor([1.0, 1.0, float("nan"), 1.0])}, None, "finite"),
    ]
    for number, (changes, header, message) in enumerate(cases):
        with pytest.raises(InputError, match=message) as error:
            read(pipe, write(tmp_path / f"{number}.safetensors", lora | changes, header))
        assert "\n" not in str(error.value) and not adapted_layers(pipe.transformer)
    path = write(tmp_path / "good.safetensors", lora)
    read(pipe, path)
    with pytest.raises(InputError, match="'slow' is loaded already"):
        read(pipe, path)


def without_one(tensors):
    return dict(list(tensors.items())[2:])


def weaker(tensors):
    return {name: value * (0.5 if "lora_B" in name else 1.0) for name, value in tensors.items()}


@pytest.mark.parametrize(
    "change, message", [(without_one, "was left out"), (weaker, "not become what the file holds")]
)
def test_a_loader_that_loads_something_else_is_found_out(change, message, pipe, tmp_path, monkeypatch):
    """As diffusers' loaders of other versions do: keys that they do not know, or alphas, are dropped silently."""
    load = PeftAdapterMixin.load_lora_adapter
    monkeypatch.setattr(
        PeftAdapterMixin, "load_lora_adapter", lambda self, tensors, **rest: load(self, change(tensors), **rest)
    )
    path = write(tmp_path / "a.safetensors", lora_of(pipe.transformer, LAYERS["flux"]))
    with pytest.raises(InputError, match=message):
        load_lora(pipe, path, "slow")
    assert not any("slow" in layer.lora_A for layer in adapted_layers(pipe.transformer))
