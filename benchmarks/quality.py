"""How near do few steps come to the model's own 50? Captions that no training saw, the same noise in every row.

    python benchmarks/quality.py                        # the demo model; a run that was cut goes on where it was
    python benchmarks/quality.py --rows "base|UniPC"    # measure only these rows
    python benchmarks/quality.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev --dtype bfloat16 \\
        --prompts_file held_out.txt --lora mine=output/glance --scorer scorer.py:score --clip models/clip

Writes table.md, results.json and quality.png into --output_dir. The rows, by the `settings` that results.json keeps:

- steps, grid: the base on the published grid, on every n-th of its own steps and on the grid of its own trajectory;
  solver: with the fitted solver's coefficients
- scheduler, cache: what diffusers ships and needs no training (UniPC, DPM++; first-block cache, TaylorSeer);
  cache_dit: DBCache of that package, which wants an environment of its own and is left out where it is not installed
- lora: a pair given with --lora
- train: pairs, or samplers without LoRAs, that are made here with train_glance_lora.py, by --train_config and these
  flags. Of `rates` the one is kept whose error is least on validation captions, which are never reported; then --seeds
  runs are reported. `scales` switches a phase's LoRA off. Rows whose flags the script does not take are left out, and
  said so.

The teacher is the base with all its steps and guidance. README.md beside this file says what the columns are.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))

from glance import start


if __name__ == "__main__":
    start.as_script("what was not written yet is lost")

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import json
import logging
import re
import shutil
import statistics
import time

import diffusers
import torch
from accelerate.state import AcceleratorState
from diffusers.image_processor import VaeImageProcessor


ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from judge import load_judge  # noqa: E402
from quality_draw import (  # noqa: E402
    Bench,
    Counter,
    counted_forwards,
    draw,
    loaded,
    lora_file,
    needs_trajectory,
    pictures,
    teacher,
)
from quality_numbers import by_name, diversity, fine_detail, frechet, make_table, plot, psnr  # noqa: E402
from quality_rows import BASE_STEPS, CAPTIONS, Row, all_rows  # noqa: E402
from scenes import RESOLUTION, caption_of, scene_of, split_scenes  # noqa: E402

import infer_glance  # noqa: E402
import train_glance_lora  # noqa: E402
from glance import command_line as cli  # noqa: E402
from glance.ask import latents as ask_latents  # noqa: E402
from glance.ask import pipeline as ask  # noqa: E402
from glance.ask.guidance import ask_single_branch  # noqa: E402
from glance.ask.pipeline import first_line  # noqa: E402
from glance.ask.sampler import relative_error  # noqa: E402
from glance.ask.schedule import ask_timestep_table, ask_timesteps  # noqa: E402
from glance.files import faults  # noqa: E402
from glance.files.atomic import replace_file  # noqa: E402
from glance.files.instance_data import load_pair  # noqa: E402
from glance.files.recipe import read_recipe  # noqa: E402
from glance.shared_flags import MAX_SIDE  # noqa: E402
from glance.training.own_defaults import own_size  # noqa: E402
from glance_utils import InputError, denoiser  # noqa: E402


logger = logging.getLogger(__name__)
BACKWARD = 3  # model calls that one with gradients costs: backward is two more
VALIDATION = 64  # of the demo's 256 held-out captions; the 96 after them are reported


# --------------------------------------------------------------------------------------------------------------------
# Measuring a row


@torch.no_grad()
def measure(bench: Bench, settings: dict) -> dict:
    """Return all numbers of a row, by the names of quality_numbers.COLUMNS and of the scorers."""
    work_per_call = bench.work_per_call
    with loaded(bench, settings.get("lora")):
        finals = {name: draw(bench, settings, name) for name in bench.sets if name != "validation"}
        seconds = []
        clock = time.process_time if bench.args.device == "cpu" else time.perf_counter  # a CPU may be shared
        for _ in range(3):
            bench.counter.calls = bench.counter.products = 0
            start = clock()
            draw(bench, settings, "reported", count=1)
            seconds.append(clock() - start)
    numbers = {"calls": bench.counter.calls, "work": bench.counter.products / work_per_call}
    numbers["seconds"] = min(seconds)
    numbers["error"] = relative_error(finals["reported"], teacher(bench, "reported"))
    numbers["training_error"] = relative_error(finals["training"], teacher(bench, "training"))
    spread = [diversity(x, bench.args.diversity_seeds) for x in (finals["diversity"], teacher(bench, "diversity"))]
    numbers["diversity"] = spread[0] / spread[1]
    images, captions = pictures(bench, finals["reported"]), bench.sets["reported"]
    numbers["psnr"] = psnr(images, bench.teacher_pictures)
    numbers["detail"] = fine_detail(images, bench.teacher_pictures)
    if bench.judge:
        right = bench.judge.right(images, torch.stack([scene_of(caption) for caption in captions]))
        numbers["judge"] = right.all(1).float().mean().item()
        numbers["frechet"] = frechet(*(bench.judge.features(x) for x in (images, bench.teacher_pictures)))
    drawn = VaeImageProcessor.numpy_to_pil(images.permute(0, 2, 3, 1).numpy()) if bench.scorers else []
    numbers |= {name: statistics.fmean(scorer(drawn, captions)) for name, scorer in bench.scorers.items()}
    if "lora" not in settings:
        numbers["spent"] = bench.trajectory[1] if needs_trajectory(settings) else 0
    return numbers


def with_captions(args, flags: list[str]) -> list[str]:
    """Return a row's flags with the files of captions that captions_of wrote."""
    return [flag.replace("CAPTIONS", f"{args.output_dir}/captions") for flag in flags]


def train(bench: Bench, settings: dict, rate: float | None, seed: int) -> tuple[str, dict]:
    """Train a pair, or find a sampler where nothing has a rate, unless it is there; return its folder and the model
    calls spent.

    Runs that differ in their rate alone share the trajectories that the base drew for the first; with `sampler`, the
    flags of a sampler that is found before, those and the sampler.
    """
    args = bench.args
    key = [settings["train"], settings.get("phases"), seed]
    runs = Path(args.output_dir, "loras", hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16])
    folder = runs / ("untrained" if rate is None else f"{rate:g}")
    if (folder / "spent.json").exists():
        return str(folder), json.loads((folder / "spent.json").read_text())
    drawn = [json.loads(file.read_text())["drawn"] for file in runs.glob("*/spent.json")]
    others = list(runs.glob("*"))
    if "sampler" in settings:
        found, earlier = train(bench, {"train": settings["sampler"]}, None, seed)
        drawn, others = [*drawn, earlier["drawn"]], [Path(found)]
    flags = ["--config", args.train_config, f"--seed={seed}"] + ([] if rate is None else [f"--learning_rate={rate}"])
    flags += with_captions(args, settings["train"])
    with counted_forwards(type(denoiser(bench.pipe))) as spent:
        for phase, more in settings.get("phases", {"both": []}).items():
            output = folder if phase == "both" else folder / phase
            output.mkdir(parents=True, exist_ok=True)
            files = [other / output.relative_to(folder) / faults.TRAJECTORIES for other in others]
            files = [file for file in files if file.exists()]
            if files and not (output / faults.TRAJECTORIES).exists():
                shutil.copy(files[0], output)
            AcceleratorState._reset_state(reset_partial_state=True)
            train_glance_lora.main([*flags, f"--output_dir={output}", f"--phase={phase}", *more])
    spent["drawn"] = max([spent["drawn"], *drawn])
    (folder / "spent.json").write_text(json.dumps(spent))
    return str(folder), spent


def measure_trained(bench: Bench, results: dict, row: Row) -> None:
    """Choose the rate on validation captions, then report --seeds runs with it."""
    settings = {key: row.settings[key] for key in ("train", "phases", "sampler") if key in row.settings}
    rates, tuning = {}, 0

    def validate(rate: float) -> dict:
        folder, spent = train(bench, settings, rate, 0)
        with torch.no_grad(), loaded(bench, folder):
            final = draw(bench, {"lora": folder}, "validation")
        return {"error": relative_error(final, teacher(bench, "validation"))} | spent

    for rate in row.settings["rates"] if len(row.settings["rates"]) > 1 else ():
        entry = finished(bench, results, settings | {"validated": rate}, functools.partial(validate, rate))
        rates[rate] = entry["error"]
        tuning += BACKWARD * entry["trained"] + (0 if tuning else entry["drawn"])  # they share what the base drew
    rate = min(rates, key=rates.get, default=row.settings["rates"][0])

    def report(seed: int) -> dict:
        folder, spent = train(bench, settings, rate, seed)
        sampling = {key: row.settings[key] for key in ("scales", "guided") if key in row.settings}
        numbers = measure(bench, sampling | {"lora": folder})
        numbers |= {} if rate is None else {"rate": rate}
        numbers |= {"spent": BACKWARD * spent["trained"] + spent["drawn"]}
        return numbers | ({"tuning": tuning} if rates else {})

    for seed in range(bench.args.seeds):
        finished(bench, results, row.settings | {"seed": seed}, functools.partial(report, seed), row)


def measure_row(bench: Bench, results: dict, row: Row) -> str | None:
    """Measure a row, unless it is there; return the reason where this script or this pipeline has no such row."""
    if "train" in row.settings:
        try:
            flags = with_captions(bench.args, row.settings["train"])
            train_glance_lora.parse_args(["--config", bench.args.train_config, *flags])
        except (InputError, argparse.ArgumentError) as error:
            return str(error)
        return measure_trained(bench, results, row)
    try:
        finished(bench, results, row.settings, functools.partial(measure, bench, row.settings), row)
    except (ValueError, AttributeError, TypeError, AssertionError, ImportError) as error:
        if not {"scheduler", "cache", "cache_dit"} & set(row.settings):
            raise
        return first_line(error)


def finished(bench: Bench, results: dict, settings: dict, measure, row: Row | None = None) -> dict:
    """Return the numbers of these settings: those of results.json, or measured now and written there."""
    for entry in results["rows"]:
        if entry["settings"] == settings:
            return entry["numbers"]
    entry = {"name": row and row.name, "kind": row and row.kind, "settings": settings, "numbers": measure()}
    results["rows"].append(entry)
    text = json.dumps(results, indent=1) + "\n"
    replace_file(Path(bench.args.output_dir, "results.json"), lambda path: path.write_text(text))
    logger.info(f"{entry['name'] or settings}: error {entry['numbers']['error']:.4f}")
    return entry["numbers"]


# --------------------------------------------------------------------------------------------------------------------
# The command line


def name_and_folder(text: str) -> tuple[str, str]:
    """Return (name, folder) of NAME=FOLDER; an argparse type."""
    name, _, folder = text.partition("=")
    if not folder:
        raise ValueError(text)
    return name, folder


def parse_args(argv: list[str] | None = None):
    parser = cli.Parser(description="Quality of few steps: base, LoRA pairs and training-free rivals.")
    add = parser.add_argument
    add("--pretrained_model_name_or_path", help="a diffusers pipeline; that of --train_config by default")
    add("--train_config", help="train pairs with these settings; configs/demo.yaml if no pipeline is given")
    add("--lora", type=name_and_folder, action="append", default=[], help="NAME=FOLDER with slow/ and fast/")
    add("--prompts_file", help="captions, one a line; with --train_config half choose rates; the demo's by default")
    add("--instance_prompt", help="the caption that was trained on, if not that of --train_config")
    add("--num_prompts", type=cli.positive(int), help="report only so many")
    add("--height", type=cli.positive(int, MAX_SIDE))
    add("--width", type=cli.positive(int, MAX_SIDE))
    add("--guidance_scale", type=cli.finite)
    add("--pipeline_kwargs", type=cli.json_object, default={}, help="JSON: further arguments of the pipeline's call")
    add("--dtype", choices=tuple(infer_glance.DTYPES), default="float32")
    add("--batch_size", type=cli.positive(int), default=1, help="pictures at once; 32 for the demo model")
    add("--rows", default="", help="regular expression: measure only rows whose names match")
    add("--seeds", type=cli.positive(int), default=3, help="training runs a row")
    add("--diversity_captions", type=cli.positive(int), default=4)
    add("--diversity_seeds", type=cli.positive(int), default=6, help="pictures of each of them")
    add("--training_seeds", type=cli.positive(int), default=16, help="pictures of the training caption")
    add("--scorer", action="append", default=[], help="FILE.py:function(images, prompts) -> list of floats")
    add("--clip", help="folder of a transformers CLIPModel: cosine of picture and caption")
    add("--output_dir", default="output/quality")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse(argv)
    args.lora = dict(args.lora)
    if not args.pretrained_model_name_or_path:
        args.train_config = args.train_config or str(ROOT / "configs/demo.yaml")
        args.batch_size = max(args.batch_size, 32)
    trained = {}
    if args.train_config:
        config = train_glance_lora.parse_args(["--config", args.train_config])
        _, caption, (height, width) = load_pair(config, functools.partial(own_size, config))
        trained = vars(config) | {"instance_prompt": caption, "height": height, "width": width}
    elif args.lora:
        recipe = read_recipe(lora_file(next(iter(args.lora.values())), "slow"), required=False)
        trained = recipe.as_dict() if recipe else {}
    for key in ("pretrained_model_name_or_path", "instance_prompt", "height", "width", "guidance_scale"):
        setattr(args, key, trained.get(key) if getattr(args, key) is None else getattr(args, key))
    args.pipeline_kwargs = trained.get("pipeline_kwargs", {}) | args.pipeline_kwargs
    return args


def captions_of(args) -> dict[str, list[str]]:
    """Return the captions of each set, one a picture: reported, to choose rates on, the training one, repeated ones.

    Raise InputError where one would be trained on, or choose a rate, and be reported.
    """
    if args.prompts_file:
        reported, further = cli.read_prompts(args.prompts_file), []
        half = len(reported) // 2 if args.train_config else len(reported)
        reported, validation = reported[:half], reported[half:]
    else:
        further, held_out = ([caption_of(scene) for scene in scenes] for scenes in split_scenes())
        further, validation, reported = further[: max(CAPTIONS) - 1], held_out[:VALIDATION], held_out[64:160]
    reported = reported[: args.num_prompts]
    training = args.instance_prompt or reported[0]
    diverse = [caption for caption in reported[: args.diversity_captions] for _ in range(args.diversity_seeds)]
    if args.train_config:
        for count in CAPTIONS:
            Path(args.output_dir, f"captions-{count - 1}.txt").write_text("\n".join(further[: count - 1]))
        if shared := {training, *further} & {*validation, *reported} or {*validation} & {*reported}:
            raise InputError(f"{shared.pop()!r} would be trained on, or choose a rate, and be reported; leave it out")
    sets = {"reported": reported, "training": [training] * args.training_seeds, "diversity": diverse}
    return sets | ({"validation": validation} if args.train_config else {})


def load_scorers(args) -> dict:
    """Return {name: function(images, prompts) -> list of floats} of --scorer and --clip."""
    scorers = {}
    for text in args.scorer:
        file, _, name = text.rpartition(":")
        if not Path(file).is_file():
            raise InputError(f"--scorer {text}: {file or 'it'} is no file; write FILE.py:function")
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        scorers[name] = getattr(module, name)
    if args.clip:
        from transformers import CLIPModel, CLIPProcessor

        model = CLIPModel.from_pretrained(args.clip, local_files_only=True).eval()
        processor = CLIPProcessor.from_pretrained(args.clip, local_files_only=True)

        def clip(images, prompts) -> list[float]:
            inputs = processor(text=prompts, images=images, return_tensors="pt", padding=True, truncation=True)
            output = model(**inputs)
            return torch.cosine_similarity(output.image_embeds, output.text_embeds).tolist()

        scorers["CLIP"] = clip
    return scorers


def make_bench(args, sets: dict[str, list[str]]) -> Bench:
    """Load the pipeline and ask it what every row needs."""
    path = args.pretrained_model_name_or_path
    ask.find_denoiser(path)
    with ask.loading(path):
        dtype = infer_glance.DTYPES[args.dtype]
        pipe = diffusers.DiffusionPipeline.from_pretrained(path, dtype=dtype, use_safetensors=True).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    call = ask.call_arguments(
        pipe, sets["training"][0], args.height, args.width, args.guidance_scale, args.pipeline_kwargs
    )
    timesteps = ask_timesteps(pipe, BASE_STEPS, **call)
    if len(timesteps) != BASE_STEPS:
        raise InputError(f"{path}: it has its own {len(timesteps)} steps; the rows are of a base's {BASE_STEPS}")
    bench = Bench(
        args=args,
        pipe=pipe,
        call=call,
        single=ask_single_branch(pipe, **call),
        timesteps=timesteps,
        timestep_table=ask_timestep_table(pipe, BASE_STEPS, **call),
        layout=ask_latents.ask_layout(pipe, **call),
        counter=Counter(pipe),
        sets=sets,
        scorers=load_scorers(args),
    )
    with contextlib.suppress(ValueError):  # captions that are not the demo's scenes have no judge
        scenes = [scene_of(caption) for caption in sets["reported"]]
        if len(scenes) > 1 and args.height == args.width == RESOLUTION:
            bench.judge = load_judge()
    return bench


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    cli.set_up_logging()
    faults.check_writable(args.output_dir, "--output_dir")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    same = ("pretrained_model_name_or_path", "height", "width", "guidance_scale", "pipeline_kwargs", "dtype", "scorer")
    same += ("clip", "diversity_captions", "diversity_seeds", "training_seeds")
    protocol = {key: getattr(args, key) for key in same}
    sets = captions_of(args)
    protocol["captions"] = hashlib.sha256(json.dumps(sets).encode()).hexdigest()
    results = {"protocol": protocol, "rows": []}
    if (folder / "results.json").exists():
        results = json.loads((folder / "results.json").read_text())
        if results["protocol"] != protocol:
            raise InputError(f"--output_dir {folder}: its rows were measured otherwise; give another folder")
    rows, bench = all_rows(args), make_bench(args, sets)
    for row in rows:
        if not row.settings.get("guided", True) and not bench.single:
            continue  # it has no guidance to leave out
        if not re.search(args.rows, row.name):
            continue
        if reason := measure_row(bench, results, row):
            logger.warning(f"{row.name}: left out, {reason}")
        (folder / "table.md").write_text(make_table(results, rows))
    plot(results, rows, folder / "quality.png")
    print(f"{folder}: {len(by_name(results, rows))} of {len(rows)} rows")


if __name__ == "__main__":
    cli.run(main)
