"""Memory that runs out, in every stage of both scripts: one line that says where, what to try and what is left."""

import re
import resource

import psutil
import pytest
import torch
from accelerate import PartialState
from conftest import flags
from diffusers import DiffusionPipeline

import infer_glance
from glance import command_line as cli
from glance import inference_flags
from glance.ask import latents as ask_latents
from glance.ask import pipeline as ask
from glance.ask import prompts as ask_prompts
from glance.files.recipe import WEIGHT_NAME
from glance.training import flags as training_flags
from glance.training import out_of_memory, prepare
from glance_utils import InputError, denoiser


# As torch words it on a GPU of 16 GB.
FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB of which 1 GiB is free."
)


def full(*args, **kwargs):
    raise torch.OutOfMemoryError(FULL)


def fill_at(transformer, call: int) -> None:
    """Have the transformer's first block run out of memory at this call of it, counted from 1."""
    calls = []

    def hook(module, args):
        calls.append(1)
        if len(calls) == call:
            full()

    transformer.transformer_blocks[0].register_forward_pre_hook(hook)


def one_line(capsys, run, code=1, needed: bool = True) -> str:
    """What the script says as it ends, with this exit code, but for the numbers of the estimate."""
    with pytest.raises(SystemExit) as ended:
        cli.run(run)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert ended.value.code == code and len(lines) == 1
    line = lines[0].split("error: ")[1]
    told = re.search(r"; by the estimate ([\d.e-]+) GB are needed, of ([\d.e-]+)", line)
    assert bool(told) == needed
    if told:
        needed, there = map(float, told.groups())
        assert 1e-4 < needed < 1 < there  # a tiny base's
    return line.replace(told[0], "") if told else line


@pytest.fixture
def full_transformer(monkeypatch):
    """full_transformer(call) has the base's transformer run out of memory at this call of it."""

    load = prepare.load_transformer

    def begin(call: int):
        def loaded(*args, **kwargs):
            transformer = load(*args, **kwargs)
            fill_at(transformer, call)
            return transformer

        monkeypatch.setattr(prepare, "load_transformer", loaded)

    return begin


def test_a_step_says_which_flag_to_try_and_what_is_left(train, full_transformer, capsys, tmp_path):
    full_transformer(3)
    line = one_line(capsys, lambda: train(checkpointing_steps=2))
    assert line == (
        "out of memory while training slow, step 3, 2.00 GiB more were asked for; try --gradient_checkpointing, and "
        f"go on with --resume_from_checkpoint {tmp_path / 'output' / 'checkpoint-2'}"
    )
    full_transformer(100)
    train(gradient_checkpointing=True, checkpointing_steps=2, resume_from_checkpoint="latest")  # as it was told


def test_a_flag_that_changes_the_lora_begins_anew(train, full_transformer, capsys, tmp_path):
    full_transformer(13)
    settings = {"gradient_checkpointing": True, "checkpointing_steps": 1, "checkpoints_total_limit": 1}
    line = one_line(capsys, lambda: train(phase="slow", max_train_steps=7, **settings))
    # a step computes each block twice
    checkpoint = tmp_path / "output" / "checkpoint-6"
    assert line.endswith(f"try --use_8bit_adam, from the start: {checkpoint} goes on with this run's flags alone")
    with pytest.raises(InputError, match="its optimizer is adamw, this run's is adamw8bit"):
        train(phase="slow", use_8bit_adam=True, resume_from_checkpoint="latest", max_train_steps=7, **settings)


def test_a_trajectory_and_the_preview_have_their_own_advice(train, full_transformer, capsys, monkeypatch, tmp_path):
    full_transformer(5)
    settings = {"loss": "trajectory", "num_base_steps": 10, "num_trajectories": 1, "grid": "even", "solver": "euler"}
    line = one_line(capsys, lambda: train(**settings))
    assert "while drawing what is learned from the base, 2.00 GiB" in line and line.endswith(
        "; try --quantization int8"
    )
    assert not (tmp_path / "output").exists()
    full_transformer(10**6)
    monkeypatch.setattr(ask_latents, "decode", full)
    line = one_line(capsys, lambda: train(max_train_steps=1))
    assert line.startswith("out of memory while drawing the preview") and "the LoRAs are written" in line
    assert (tmp_path / "output" / "fast" / WEIGHT_NAME).exists()


def test_an_encoder_that_is_too_large_is_said_to_be(train, capsys, monkeypatch):
    """The pipeline's own refusals are another thing: inside them, too, a lack of memory is one."""
    monkeypatch.setattr(ask_prompts, "remember_prompts", lambda pipe: setattr(pipe, "encode_prompt", full))
    line = one_line(capsys, train, needed=False)  # the estimate asks as the run does
    assert line == (
        "out of memory while encoding the prompts and the image, 2.00 GiB more were asked for; try --mixed_precision "
        "bf16"
    )


def test_inference_keeps_what_it_drew(trained, infer, capsys, monkeypatch, tmp_path):
    lora, load = trained(), infer_glance.load_pipeline

    def loaded(*args):
        pipe = load(*args)
        fill_at(denoiser(pipe), 15)
        return pipe

    monkeypatch.setattr(infer_glance, "load_pipeline", loaded)
    line = one_line(capsys, lambda: infer(lora=lora, num_images=2), needed=False)
    assert line == (
        "out of memory while drawing out-001.png, 2.00 GiB more were asked for; try --quantization int8; what was "
        "drawn before is written"
    )
    assert (tmp_path / "out-000.png").exists() and not (tmp_path / "out-001.png").exists()


def training(**settings):
    return training_flags.parse(flags(pretrained_model_name_or_path="base", **settings))


def test_the_flags_of_training_come_in_the_order_of_what_they_cost(monkeypatch):
    """Each is followed, until none is left; on a CPU no weights can be moved away."""
    PartialState()
    for accelerator, last in ((False, []), (True, ["--enable_group_offload without --quantization nf4"])):
        monkeypatch.setattr(PartialState(), "device", torch.device("cuda" if accelerator else "cpu"))
        settings, told = {}, []
        while flag := out_of_memory.next_in_training(training(**settings), "gradient_checkpointing" in settings):
            told.append(flag)
            if "without" in flag:
                break
            name, _, value = flag.removeprefix("--").partition(" ")
            settings[name] = value or True
        adam = ["--gradient_checkpointing", "--use_8bit_adam"]
        assert told == [*adam, "--quantization int8", "--quantization nf4", *last]
    offloaded = training(enable_group_offload=True, gradient_checkpointing=True, use_8bit_adam=True)
    assert out_of_memory.next_in_training(offloaded, True) is None
    assert out_of_memory.next_in_training(training(), None) == "--quantization int8"  # nothing is trained there


def test_the_flags_of_inference_are_those_that_it_takes():
    """What is told is never what inference_flags refuses."""
    settings, told = {"prompt": "a ring", "fuse_lora": True}, []
    while flag := out_of_memory.next_in_inference(inference_flags.parse(flags(**settings)), True):
        told.append(flag)
        for word in flag.split("without ")[1:]:
            for name in word.split(" and "):
                del settings[name.removeprefix("--").split()[0]]
        name, _, value = flag.split(" without ")[0].removeprefix("--").partition(" ")
        settings |= {} if flag.startswith("without") else {name: value or True}
    assert told == [
        "without --fuse_lora",
        "--quantization int8",
        "--quantization nf4",
        "--enable_model_cpu_offload",
        "--enable_group_offload without --enable_model_cpu_offload and --quantization nf4",
        "--enable_vae_tiling",
    ]


@pytest.mark.parametrize(
    "text", [FULL, "CUDA error: out of memory", "[enforce fail] DefaultCPUAllocator: not enough memory"]
)
def test_the_words_of_torch_are_known(text):
    assert ask.is_out_of_memory(RuntimeError(text)) and not ask.is_out_of_memory(RuntimeError("a shape is wrong"))


def test_a_real_lack_of_memory_is_one_line(train, capsys, tmp_path):
    """The system refuses what a batch of a million pictures would take."""
    used, limits = psutil.Process().memory_info().vms, resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 2**30, limits[1]))
    try:
        line = one_line(capsys, lambda: train(train_batch_size=10**6), needed=False)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert line.startswith("out of memory while encoding the prompts and the image, ")
    assert line.endswith(" bytes more were asked for; try --mixed_precision bf16")
    assert not (tmp_path / "output").exists()


def test_a_vae_that_finds_no_room_computes_on_the_cpu(pipelines, monkeypatch):
    """To encode the image and to decode a picture, with the same result."""
    pipe = DiffusionPipeline.from_pretrained(pipelines["flux"])
    call = {"prompt": "a red ring", "height": 32, "width": 32}
    layout, image = ask_latents.ask_layout(pipe, **call), torch.rand(1, 3, 32, 32) * 2 - 1
    latents = ask_latents.encode_image(pipe, image, layout, **call)
    drawn = ask_latents.decode(pipe.vae, latents, layout)
    for name, wanted in (("encode", latents), ("decode", drawn)):
        answers = [full, getattr(pipe.vae, name)]
        with ask.replaced(pipe.vae, name, lambda *args, answers=answers: answers.pop(0)(*args)):
            if name == "encode":
                found = ask_latents._vae_latents(pipe, image, layout)
                assert torch.equal(layout.latents_from(found), wanted)
            else:
                assert ask_latents.decode_on(torch.device("cpu"), pipe.vae, latents, layout) == wanted
        assert not answers
