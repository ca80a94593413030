"""What a run will need, said before: held against what it then allocates, and the settings that are chosen by it."""

import functools
import json
import re
import shutil

import pytest
import torch
from accelerate import Accelerator, init_empty_weights
from conftest import REFUSED, flags, long
from peak_memory import allocated, small_flux
from safetensors.torch import load_file
from test_families import FAMILIES
from tiny_pipelines import make_flux, make_qwen, make_sd3

import train_glance_lora
from glance import base as load_base
from glance import command_line as cli
from glance.adapters import lora_layers
from glance.ask import pipeline as ask
from glance.ask.velocity import PipelineVelocity
from glance.files.recipe import WEIGHT_NAME
from glance.shared_flags import QUANTIZATIONS
from glance.training import distribution, estimate, fit, prepare
from glance.training.estimate import readable
from glance_utils import PHASES, InputError


pytestmark = pytest.mark.slow


CPU = torch.device("cpu")
# Wide enough that neither weights nor activations are all of a step: 7 M parameters, 65 MB of activations or more.
WIDER = {
    "flux": (make_flux, {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 16}, 96),
    "sd3": (make_sd3, {"num_attention_heads": 16, "caption_projection_dim": 256, "pos_embed_max_size": 48}, 96),
    "qwen": (make_qwen, {"num_attention_heads": 16}, 192),
}
TWO_CALLS = {"pipeline_kwargs": json.dumps({"true_cfg_scale": 4.0, "negative_prompt": " "})}
SHORT = {"num_base_steps": 4, "num_inference_steps": 2, "grid": "even", "solver": "euler", "num_trajectories": 1}
TRAJECTORY = {"loss": "trajectory", **SHORT}
ON, OFF = {"gradient_checkpointing": True}, {"no-gradient_checkpointing": True}


@pytest.fixture(scope="module")
def wider(tmp_path_factory):
    root = tmp_path_factory.mktemp("wider")
    return {name: make(root / name, **config) for name, (make, config, _) in WIDER.items()}


def size_of(module: torch.nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


# --------------------------------------------------------------------------------------------------------------------
# Memory


def test_estimated_sizes_are_the_loaded_ones(pipelines):
    for base, path in pipelines.items():
        pipe = ask.load_pipeline(str(path), torch.bfloat16)
        for quantization in QUANTIZATIONS:
            loaded = load_base.load_transformer(str(path), torch.bfloat16, CPU, quantization)
            size = size_of(loaded)
            found = estimate.base_bytes(pipe.transformer, quantization)
            # bitsandbytes' state also holds its table of 16 values and a few words for every layer
            layers = sum(isinstance(layer, torch.nn.Linear) for layer in loaded.modules())
            slack = 256 * layers if quantization in ("nf4", "int8") else 0
            assert size - slack <= found <= size, (base, quantization)


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ("flux", OFF),  # guidance embedded
        ("flux", ON),
        long("flux", {"quantization": "nf4", **OFF}),
        ("flux", {"quantization": "nf4", "use_8bit_adam": True, **ON}),
        long("flux", {"quantization": "int8", **OFF}),
        long("flux", {"quantization": "int8", **ON}),
        ("flux", {"quantization": "fp8", **ON}),
        long("flux", {"flow_weight": 0.5, **TRAJECTORY, **OFF}),  # a call for each loss
        ("sd3", {"timesteps_per_step": 5, **OFF}),  # guidance switched off
        long("sd3", {**TRAJECTORY, **OFF}),  # a batch of two
        long("sd3", {**TRAJECTORY, **ON}),
        long("qwen", {**TRAJECTORY, **TWO_CALLS, **OFF}),
        ("qwen", {**TRAJECTORY, **TWO_CALLS, **ON}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_the_estimated_peak_of_training_is_the_measured_one(base, settings, wider, train, monkeypatch):
    """By the allocator's own count, in the second step, when the optimizer has its state."""
    found, train_phase = {}, train_glance_lora.train_phase

    def measured(args, accelerator, prepared, phase, *more):
        weights = size_of(prepared.models.pipe.transformer)
        with allocated() as memory:
            train_phase(args, accelerator, prepared, phase, *more)
        found.update(measured=weights + memory["peak"], args=args, captions=prepared.captions)

    monkeypatch.setattr(train_glance_lora, "train_phase", measured)
    side = WIDER[base][2]
    train(wider[base], resolution=side, rank=8, max_train_steps=2, phase="slow", **settings)
    args = found["args"]
    needed = fit.estimate_settings(args, found["captions"], (side, side), False, [args.gradient_checkpointing], print)
    assert needed.stages(args)["training"] == pytest.approx(found["measured"], rel=0.15)


def test_drawing_and_preview_take_what_was_said(wider, train, monkeypatch):
    """The base alone, with its guidance, and then with both LoRAs."""
    found = {}

    def measured(owner, name: str, stage: str):
        original = getattr(owner, name)

        def call(*arguments, **more):
            pipe = next(part for part in arguments if isinstance(part, prepare.Prepared)).models.pipe
            weights = size_of(pipe.transformer)
            with allocated() as memory:
                answer = original(*arguments, **more)
            found[stage] = weights + memory["peak"]
            return answer

        monkeypatch.setattr(owner, name, call)

    measured(prepare, "learn_from_base", "drawing")
    measured(train_glance_lora, "draw_preview", "preview")
    chosen = []
    monkeypatch.setattr(train_glance_lora, "train_phases", chosen_settings(chosen, train_glance_lora.train_phases))
    train(wider["sd3"], resolution=96, rank=8, max_train_steps=1, **TRAJECTORY, **OFF)
    needed = fit.estimate_settings(chosen[0], ["a red ring"], (96, 96), True, [False], print)
    stages = needed.stages(chosen[0])
    assert list(stages) == ["encoding", "drawing", "training", "preview", "decoding"]
    assert {stage: stages[stage] for stage in found} == pytest.approx(found, rel=0.15)


def chosen_settings(found: list, original):
    """`original`, which gets a run's settings first; they are added to `found`."""

    def call(args, *more):
        found.append(args)
        return original(args, *more)

    return call


# --------------------------------------------------------------------------------------------------------------------
# What fits


@pytest.fixture(scope="module")
def needed(wider):
    """The estimate of a run of the wider FLUX at 96x96."""
    args = train_glance_lora.parse_args(
        flags(pretrained_model_name_or_path=wider["flux"], instance_prompt="a red ring", rank=8, resolution=96)
    )
    return fit.estimate_settings(args, ["a red ring"], (96, 96), True, [False, True], print)


def test_the_fastest_that_fits_is_taken(needed):
    """Each setting saves more than the one before it, and is taken as soon as that no longer fits. A base of four
    blocks is smaller in four bits than two of its layers are."""
    choices = list(fit.LADDER[:-1])
    sizes = [needed.peak(choice) for choice in choices]
    assert sizes == sorted(sizes, reverse=True)
    for choice, size in zip(choices, sizes):
        assert fit.first_fit(needed, choices, int(size / 0.9) + 2) == choice
    assert fit.first_fit(needed, choices, int(sizes[-1] / 0.9) - 2) is None


def given(**flags) -> fit.Choice:
    return fit.Choice(**dict.fromkeys(("quantization", "gradient_checkpointing", "optimizer"), None) | flags)


def test_what_is_given_is_kept():
    assert fit.candidates(given(enable_group_offload=None), True) == list(fit.LADDER)
    assert fit.LADDER[-1] not in fit.candidates(given(enable_group_offload=None), True, processes=2)
    for choice in fit.candidates(given(quantization="int8", optimizer="prodigy", enable_group_offload=None), True):
        assert (choice.quantization, choice.optimizer, choice.enable_group_offload) == ("int8", "prodigy", False)
    # Weights that come and go would all stay without checkpointing; where a model has none, it is not asked for.
    assert fit.candidates(given(quantization="fp8", optimizer="adamw"), True) == [fit.Choice("fp8", True)]
    assert not any(choice.gradient_checkpointing for choice in fit.candidates(given(), False))
    without_fit = fit.Choice("nf4", None, "adamw", False)
    assert fit.candidates(without_fit, True) == [fit.Choice("nf4"), fit.Choice("nf4", True)]


def memory_for(needed, place: int) -> str:
    """What --memory must say for this step of the ladder."""
    return f"{int(needed.peak(fit.LADDER[place]) / 0.9 / 1e4 + 1) / 100}MB"


def test_a_run_takes_the_advice_and_a_resumed_one_keeps_it(needed, wider, train, monkeypatch, caplog, tmp_path):
    caplog.set_level("INFO")
    chosen = []
    monkeypatch.setattr(train_glance_lora, "train_phases", chosen_settings(chosen, train_glance_lora.train_phases))
    settings = {"resolution": 96, "rank": 8, "max_train_steps": 2, "phase": "slow", "fit": "auto"}
    settings |= {"output_dir": tmp_path / "output", **ON}
    run = functools.partial(train, wider["flux"], **settings)
    run(memory=memory_for(needed, 4), checkpointing_steps=1)
    assert fit.as_choice(chosen[0]) == fit.LADDER[4]
    taken = r"--quantization nf4 --gradient_checkpointing --use_8bit_adam: [\d.]+ MB; next to it, .*, too much"
    assert re.search(taken, caplog.text)
    before = load_file(tmp_path / "output" / WEIGHT_NAME)
    (tmp_path / "output" / WEIGHT_NAME).unlink()
    shutil.rmtree(tmp_path / "output" / "checkpoint-2")
    run(memory="80GB", resume_from_checkpoint="latest")  # where all would fit
    assert fit.as_choice(chosen[1]) == fit.LADDER[4]
    after = load_file(tmp_path / "output" / WEIGHT_NAME)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("phase", PHASES)
def test_halves_of_other_memory_choose_alike(phase, needed, wider, tmp_path):
    """The scarcer memory counts, and what the checkpoint of either half was made with."""
    args = train_glance_lora.parse_args(
        flags(pretrained_model_name_or_path=wider["flux"], instance_prompt="a red ring", rank=8, fit="auto", **ON)
    )
    mine, other = {"slow": (4, 3), "fast": (3, 4)}[phase]
    other_phase = next(name for name in PHASES if name != phase)
    memory = cli.memory(memory_for(needed, other))
    made_with = {"quantization": "int8", "optimizer": "adamw"}
    for saved, wanted in (({}, fit.LADDER[4]), (made_with, fit.Choice("int8", True, "adamw"))):
        store = torch.distributed.HashStore()
        store.set(f"fit {other_phase}", json.dumps([[memory, saved]]))
        here = args.replace(memory=cli.memory(memory_for(needed, mine)))
        halves = distribution.Halves(phase, tmp_path, store)
        found = fit.resolve(here, Accelerator(cpu=True), None, ["a red ring"], (96, 96), halves)
        assert fit.as_choice(found) == wanted
        assert json.loads(store.get(f"fit {phase}")) == [[here.memory, {}]]


def test_what_cannot_be_fitted_is_said(train, tmp_path):
    with pytest.raises(InputError, match="--fit auto: nothing fits 0.001 GB, of which a tenth is left; the least is "):
        train(fit="auto", memory="1MB", **{"no-gradient_checkpointing": None})
    make, size, _ = FAMILIES["hidream"]
    with pytest.raises(InputError, match="--fit auto: HiDream.* decides by numbers, .*; give --quantization"):
        train(make(tmp_path / "hidream"), resolution=size, fit="auto", **{"no-gradient_checkpointing": None})
    for text in ("16", "16 apples", "0GB"):
        with pytest.raises(REFUSED, match="is no memory such as 16GB"):
            train(dry_run=True, memory=text)
    with pytest.raises(REFUSED, match="--memory is for --fit auto or --dry_run; give one of them"):
        train(memory="16GB")


def test_fit_on_the_command_line_overrules_a_config(tmp_path):
    path, saving = tmp_path / "config.json", {"quantization": "int8", "use_8bit_adam": True}
    settings = {"pretrained_model_name_or_path": "x", "gradient_checkpointing": True} | saving

    def chosen(*flags: str, **further) -> fit.Choice:
        path.write_text(json.dumps(settings | further))
        return fit.as_choice(train_glance_lora.parse_args([f"--config={path}", *flags]))

    assert chosen() == fit.LADDER[3]
    assert chosen("--fit=auto") == fit.Choice(None, None, None, None)
    kept = chosen("--fit=auto", "--quantization=none", "--use_8bit_adam=false")
    assert kept == fit.Choice("none", None, "adamw", None)
    assert chosen(fit="auto") == fit.Choice("int8", True, "adamw8bit", None)


def test_memory_is_in_units():
    assert [cli.memory(text) for text in ("16GB", "15.5 GiB", "24g", "500MB")] == [
        16_000_000_000,
        int(15.5 * 2**30),
        24_000_000_000,
        500_000_000,
    ]


# --------------------------------------------------------------------------------------------------------------------
# What --dry_run prints


@pytest.mark.parametrize("base", ["flux", "sd3", "qwen"])
def test_a_dry_run_reads_configs_alone(base, pipelines, pair, train, tmp_path, capsys):
    """No weights lie there, and what is said of the LoRA is what training writes."""
    for path in pipelines[base].rglob("*"):
        if path.is_file() and path.suffix not in (".safetensors", ".bin"):
            copy = tmp_path / "configs" / path.relative_to(pipelines[base])
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    settings = {"pretrained_model_name_or_path": tmp_path / "configs", "resolution": 32, "rank": 4, "dry_run": True}
    train_glance_lora.main(flags(**settings, output_dir=tmp_path / "nothing"))
    printed = capsys.readouterr().out
    assert not (tmp_path / "nothing").exists()
    count = sum(value.numel() for value in load_file(train(base, phase="slow") / WEIGHT_NAME).values())
    assert f"{readable(count, '')} parameters, {readable(4 * count, 'B')} a file" in printed
    stages = ["stage", "encoding", "training", "preview", "decoding", "all"]
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")]
    assert rows[:6] == stages and len(rows) == len(stages) + 1 + 4 * 2 - 1


def test_a_transformer_that_the_class_may_lack_is_not_read(tmp_path):
    """Wan's may: diffusers' general class then reads it even where another is given."""
    make, _, _ = FAMILIES["wan"]
    path = make(tmp_path / "wan")
    [weights] = (path / "transformer").glob("*.safetensors")
    weights.unlink()
    assert ask.load_pipeline(str(path)).transformer.device.type == "meta"


def test_flops_are_those_of_the_products(pipelines):
    """By hand for a FLUX of 90 M parameters, 576 image and 512 text tokens: forward, and backward to what the LoRA
    needs alone, since the base is frozen."""
    pipe = ask.load_pipeline(str(pipelines["flux"]))
    with init_empty_weights():
        pipe.transformer = small_flux()
    call = ask.call_arguments(pipe, "a red ring", 96, 96, None, {})
    layers = lora_layers(pipe.transformer, "proj_out")  # the last layer of each single block
    model = PipelineVelocity(pipe, **call)
    work = estimate.Work(lambda: model(torch.zeros(1, 576, 16), 1.0).square().mean())
    found = estimate.estimate(pipe, layers, 1, work, checkpointing=[False])
    width, image, text = 768, 576, 512
    block = 12 * width * width * 2 * (image + text)
    attention = 4 * (image + text) ** 2 * width
    forward = 6 * (block + attention) + 2 * width * (2 * 16 * image + 32 * text)
    # To the first single block's output and no further: three blocks, whose attention costs 2.5 times as much.
    backward = 3 * (block + 2.5 * attention) + 2 * width * 16 * image
    assert found.training[False].flops == pytest.approx(forward + backward, rel=0.02)


def test_checkpointing_is_switched_on_where_the_step_would_not_fit(train, tmp_path, monkeypatch):
    switched, train_phase = [], train_glance_lora.train_phase

    def watched(args, accelerator, prepared, phase, *others):
        switched.append(prepared.models.pipe.transformer.is_gradient_checkpointing)
        train_phase(args, accelerator, prepared, phase, *others)

    monkeypatch.setattr(train_glance_lora, "train_phase", watched)
    settings = {"phase": "slow", "max_train_steps": 1}
    asked = settings | {"no-gradient_checkpointing": None}
    train(output_dir=tmp_path / "fits", **asked)
    monkeypatch.setattr(fit, "free_memory", lambda device: 1_000_000)
    train(output_dir=tmp_path / "does not", **asked)
    train(output_dir=tmp_path / "but no", **settings, **{"no-gradient_checkpointing": True})
    assert switched == [False, True, False]


def test_a_model_that_decides_by_numbers_is_said_to(tmp_path):
    make, size, _ = FAMILIES["hidream"]
    with pytest.raises(InputError, match="HiDreamImagePipeline decides by numbers, so without weights its needs"):
        train_glance_lora.main(
            flags(pretrained_model_name_or_path=make(tmp_path), resolution=size, rank=4, dry_run=True)
        )


def test_readable():
    assert [readable(value, "B") for value in (5, 1234, 23.8e9, 2e15)] == [
        "5 B",
        "1.23 kB",
        "23.8 GB",
        "2 PB",
    ]
