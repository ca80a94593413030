"""Train Glance's Slow-LoRA and Fast-LoRA (arXiv 2512.02899) on one image and its caption.

    python train_glance_lora.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev \\
        --instance_image data/glance.png --output_dir output/glance --mixed_precision bf16 --gradient_checkpointing
    python train_glance_lora.py --config configs/demo.yaml

The caption is --instance_prompt or the .txt beside the image. One run trains both phases and writes
OUTPUT/slow/pytorch_lora_weights.safetensors and OUTPUT/fast/..., each with its recipe in the header; infer_glance.py
reads the base and the schedule from there. The last line is the command that draws with what was written. Any
diffusers text-to-image pipeline with a flow-matching transformer will do: the schedule, the latents and the velocity
are asked of the pipeline itself (glance/ask/).
"""

from glance import start
from glance.training import flags, summary


if __name__ == "__main__":
    settings = start.as_script("not while training, so no checkpoint was written", flags.parse)
    summary.begin(settings)

import contextlib
import functools
import logging
import signal
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from tqdm.auto import tqdm

from glance import base as load_base
from glance import command_line as cli
from glance.adapters import fresh_lora
from glance.ask import latents as ask_latents
from glance.ask.components import denoiser_name
from glance.ask.velocity import PipelineVelocity
from glance.files import faults
from glance.files.checkpoints import save_checkpoint, with_run
from glance.files.comfyui_export import write_for_comfyui
from glance.files.instance_data import load_clip, load_pair
from glance.files.lora import save_lora
from glance.files.pictures import save_png
from glance.training import distribution, launcher, losses, out_of_memory, own_defaults, stages, trackers, trajectories
from glance.training.draw_command import draw_command
from glance.training.dry_run import dry_run
from glance.training.endpoint import train_together
from glance.training.fit import estimate_settings, resolve
from glance.training.log import LossLog, check_finite, join_losses, read_losses, write_losses
from glance.training.model_card import Written, write_model_card
from glance.training.objective import make_draws, make_objective
from glance.training.optimizer import TrainingState, make_optimizer
from glance.training.phases import Phase, find_source, folders, plan_phases, write_sampler_of
from glance.training.prepare import Prepared, needs_drawing, prepare_pipeline
from glance.training.preview import draw_preview
from glance.training.push import create_hub_repo, push_to_hub
from glance.training.settings import complete
from glance.training.validation import Validation
from glance_utils import denoiser


logger = logging.getLogger(__name__)

ADAPTER = "glance"


def parse_args(argv: list[str] | None = None) -> cli.Settings:
    """Return the run's settings; raise ArgumentError or InputError where the command line has mistakes."""
    return complete(flags.parse(argv))


def fresh_adapter(args, accelerator, transformer, layers: list[str]) -> list[torch.nn.Parameter]:
    """Return the parameters of a float32 LoRA on these layers, as at the beginning of a phase.

    Both phases train in the same adapter, which is added once, so that nothing is compiled twice.
    """
    first = not hasattr(transformer, "peft_config")
    shape = {"r": args.rank, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
    fresh_lora(transformer, ADAPTER, layers, accelerator.device, args.seed, **shape)
    if args.compile and first:
        load_base.compile_blocks(transformer)
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def train_phase(args, accelerator, prepared: Prepared, phase: Phase, validation: Validation) -> Path | None:
    """Train one LoRA for --max_train_steps and leave it in the transformer, drawing validation pictures on the way.

    Where a signal asked to stop, return the folder of the checkpoint that was written instead of going on.
    """
    name, timesteps = phase.recipe.phase, phase.recipe.timesteps
    answers = prepared.answers
    pipe, transformer = prepared.models.pipe, denoiser(prepared.models.pipe)
    parameters = fresh_adapter(args, accelerator, transformer, answers.layers)
    optimizer, lr_scheduler = make_optimizer(args, parameters)
    model = PipelineVelocity(pipe, answers.timestep_table, answers.takes_timesteps, answers.takes_batches)
    model, optimizer = distribution.prepare(args, accelerator, model, parameters, optimizer)
    objective, draws = make_objective(args, prepared, name), make_draws(args, accelerator, prepared, name)
    log = LossLog(name, timesteps)
    state = TrainingState(transformer, ADAPTER, draws, optimizer, lr_scheduler, accelerator.scaler)
    step = 0
    if phase.checkpoint is not None:
        step = phase.checkpoint["step"]
        state.restore(phase.checkpoint, step * args.gradient_accumulation_steps)
        log.restore(phase.checkpoint["losses"])
        logger.info(f"Resuming from {phase.checkpoint['folder']} ({name}, step {step} of {args.max_train_steps})")
    distribution.copy_from_first(accelerator, parameters)

    hidden = not accelerator.is_local_main_process
    progress = tqdm(total=args.max_train_steps, initial=step, desc=name, delay=0, disable=hidden)
    checkpointing = args.gradient_checkpointing or not transformer._supports_gradient_checkpointing
    stage = out_of_memory.in_training(args, "training", lambda: f"training {name}, step {step + 1}", checkpointing)
    with progress, stage:
        for draw in draws:
            chosen = [timesteps[position] for position in draw.positions]
            torch.manual_seed(draw.seed)  # so dropout goes on after a checkpoint as it would have
            with accelerator.accumulate(model):
                loss, by_timestep = losses.step_losses(model, objective, draw)
                by_timestep = accelerator.gather(by_timestep.detach()[None]).mean(0).tolist()
                mean_loss = log.add(step + 1, draw.positions, by_timestep)
                check_finite(mean_loss, "loss", name, step + 1, max(chosen))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    distribution.average_gradients(accelerator, parameters)
                    norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                    if norm is not None and accelerator.scaler is None:  # fp16's scaler leaves such a step out
                        check_finite(float(norm), "gradients' norm", name, step + 1, max(chosen))
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            step += 1
            lr_scheduler.step()
            progress.update()
            trained_on = ",".join(f"{timestep:.0f}" for timestep in chosen)
            shown = {} if log.last_round() is None else {"loss": f"{log.last_round():.4f}"}
            progress.set_postfix(**shown, timestep=trained_on, refresh=False)
            total = phase.steps_before + step
            newest = log.newest | {"lr": lr_scheduler.get_last_lr()[0]} | trackers.memory(accelerator)
            newest |= {} if norm is None else {f"{name}/grad_norm": float(norm)}
            trackers.log(accelerator, newest, total)
            stop = accelerator.check_trigger()  # on every process, where a signal reached any
            due = args.checkpointing_steps and step % args.checkpointing_steps == 0
            if stop or due:
                folder = write_checkpoint(args, accelerator, phase, state, log, step)
            if stop:
                return folder
            validation.on_the_way(name, step, total)
    logger.info(f"  {name}: loss of each timestep, first round -> last: {log.first_and_last()}")
    if accelerator.is_main_process:  # before the LoRA, by which a resumed run knows that the phase is finished
        with faults.one_line_errors(args.output_dir):
            write_losses(args.output_dir, read_losses(args.output_dir, phase.earlier) + log.rows())
    accelerator.free_memory()
    return None


def write_checkpoint(args, accelerator, phase: Phase, state, log: LossLog, step: int) -> Path:
    """Write, from the main process, what the phase goes on from after `step` of its own steps; return its folder.

    `state` is a TrainingState or an endpoint.Training.
    """
    total = phase.steps_before + step
    folder = Path(args.output_dir) / f"checkpoint-{total}"
    if accelerator.is_main_process:
        content = state.content() | {"settings": phase.compared, "step": step, "losses": log.state()}
        with faults.one_line_errors(args.output_dir):
            save_checkpoint(args.output_dir, content, total, args.checkpoints_total_limit)
        logger.info(f"Saved {folder}")
    return folder


def train_phases(args, accelerator, prepared: Prepared, phases: list[Phase], validation: Validation) -> None:
    """Train every phase that is not finished and write its LoRA; end the process where a signal asked to stop."""
    # DeepSpeed's optimizer is in parts, which no checkpoint holds: there a signal ends the run at once.
    resumable = not distribution.is_deepspeed(accelerator)
    name, transformer = denoiser_name(prepared.models.pipe.config), denoiser(prepared.models.pipe)
    with faults.signals_noted(accelerator.set_trigger) if resumable else contextlib.nullcontext([]) as noted:
        for phase in phases:
            if phase.finished:
                logger.info(f"  {phase.recipe.phase}: finished before")
                continue
            stages.enter(f"training {phase.recipe.phase}")
            timesteps = ", ".join(f"{timestep:.4f}" for timestep in phase.recipe.timesteps)
            logger.info(f"  {phase.recipe.phase}: {timesteps}")
            stopped = train_phase(args, accelerator, prepared, phase, validation)
            if stopped:
                leave_with(accelerator, stopped, noted)
            if accelerator.is_main_process:
                recipe = with_run(phase.recipe, phase.compared, phase.asked)
                with faults.one_line_errors(args.output_dir):
                    logger.info(f"Saved {save_lora(transformer, ADAPTER, phase.folder, recipe, name)}")
    if accelerator.check_trigger():  # after the last step
        hint = "its LoRAs are there; --resume_from_checkpoint latest writes the rest"
        faults.leave(*(noted or [signal.SIGTERM]), hint=hint)
    if ADAPTER in getattr(transformer, "peft_config", ()):
        transformer.unload_lora()  # the base is as it was
    accelerator.wait_for_everyone()


def leave_with(accelerator, checkpoint: Path, noted: list[int]) -> None:
    """End the process, as a signal asked, and say from where a run goes on."""
    end(accelerator)
    hint = f"go on with --resume_from_checkpoint {checkpoint}" if accelerator.is_main_process else None
    faults.leave(*(noted or [signal.SIGTERM]), hint=hint)


def main(argv: list[str] | None = None, settings: cli.Settings | None = None):
    """Train as the command line says; `settings` are what flags.parse made of it, if it was asked before."""
    args = complete(settings or flags.parse(argv))
    if args.dry_run:
        cli.set_up_logging()
        print(dry_run(args))
        return
    faults.check_writable(args.output_dir, "--output_dir")
    halves, args = distribution.split(args) if args.parallel_phases else (None, args)
    with launcher.begun():
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(args.output_dir, str(Path(args.output_dir, args.logging_dir))),
            # Base, activations and the LoRA's products run in --mixed_precision's dtype, as at inference: the model is
            # not prepared, so there is no autocast. Accelerate still brings fp16's loss scaling.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=distribution.PATIENCE)],
        )
    cli.set_up_logging(accelerator.is_main_process, f"{halves.phase}: " if halves else "")
    if args.allow_tf32:
        torch.set_float32_matmul_precision("high")
    distribution.check_combination(args, accelerator)
    locks, output_dir = accelerator.is_main_process, args.output_dir
    if halves is not None:
        locks, output_dir = locks and halves.phase == "slow", halves.output_dir
    with faults.signals_handled(), faults.locked(output_dir) if locks else contextlib.nullcontext():
        with stages.measured(accelerator.device) as measurement:
            train(args, accelerator, measurement, halves)


def end(accelerator) -> None:
    """Let trackers and processes go."""
    trackers.end(accelerator)
    accelerator.end_training()
    distribution.leave()


def finish_sampler(args, accelerator, measurement, prepared: Prepared, size: tuple[int, int], repo_id) -> None:
    """Write the sampler that was found, where no LoRA is trained for it, and say what to run next."""
    output_dir = Path(args.output_dir)
    if accelerator.is_main_process:
        faults.sweep(output_dir)
        with faults.one_line_errors(output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
            if not args.max_train_steps:  # else they were written before training
                trajectories.save(output_dir, prepared.trajectories)
            sampler = write_sampler_of(args, prepared, size, output_dir)
            written = Written({}, sampler, [], None, repo_id or str(output_dir))
            write_model_card(args, output_dir, prepared, written)
        summary.say_steps(prepared.steps, prepared.answers.timesteps)
        if sampler.error is not None and not args.max_train_steps:  # else training has said it
            summary.say_error(sampler)
        push_to_hub(output_dir, repo_id, written)
        summary.say_done(measurement.report(), output_dir, [])
    end(accelerator)
    if accelerator.is_main_process:
        print(draw_command(args, output_dir, []))


def train(args, accelerator, measurement, halves=None):
    """Do the whole run, or with --parallel_phases its half, in an output folder that no other run writes to."""
    args = own_defaults.with_one_frame(args)
    image, caption, size = load_pair(args, functools.partial(own_defaults.own_size, args))
    captions = own_defaults.all_captions(args, caption)
    args = own_defaults.with_trajectories(args, captions)
    frames = [] if image is None else load_clip(args, image, own_defaults.frames_learned(args))
    args = resolve(args, accelerator, frames, captions, size, halves)
    source = find_source(args, accelerator.num_processes, frames, captions, size)
    for folder in folders(args).values():
        faults.check_writable(folder, "--output_dir")

    draws, checkpointing = needs_drawing(args, frames), [args.gradient_checkpointing]
    needs = functools.partial(estimate_settings, args, captions, size, draws, checkpointing, logger.debug)
    compared = functools.partial(out_of_memory.compared, needs, args, accelerator.device)
    repo_id = create_hub_repo(args) if args.push_to_hub and accelerator.is_main_process else None
    with trackers.begun(args, accelerator), compared():
        prepared = prepare_pipeline(args, accelerator, source.base, frames, captions, size)
        args = prepared.settings
        if not args.max_train_steps:
            return finish_sampler(args, accelerator, measurement, prepared, size, repo_id)
        phases = plan_phases(args, accelerator.num_processes, prepared, source, size)
        if image is None and prepared.answers.layout:
            with faults.explained("the image that the base draws, to be trained on"):
                layout = prepared.answers.layout
                image = ask_latents.decode(prepared.models.vae, prepared.latents.cpu(), layout)
    output_dir = Path(args.output_dir)
    if accelerator.is_main_process:
        faults.sweep(output_dir)
        with faults.one_line_errors(output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
            if prepared.trajectories is not None:
                trajectories.save(output_dir, prepared.trajectories)
            if halves is None and image is not None:
                save_png(image, output_dir / "instance.png")

    summary.say_training(args, accelerator.num_processes, prepared, size)
    validation = Validation(args, accelerator, prepared, ADAPTER, halves.output_dir if halves else output_dir)
    with compared():
        if args.loss == "endpoint":
            save = functools.partial(write_checkpoint, args, accelerator)
            leave = functools.partial(leave_with, accelerator)
            prepared, phases = train_together(args, accelerator, prepared, phases, save, leave)
            validation.prepared = prepared
        else:
            train_phases(args, accelerator, prepared, phases, validation)
    if args.train_coefficients_only:
        return finish_sampler(args, accelerator, measurement, prepared, size, repo_id)
    recipes = {phase.recipe.phase: phase.recipe for phase in phases}

    if halves is not None:
        recipes, output_dir = halves.meet(accelerator, recipes), halves.output_dir
    preview = None
    drawn = len(recipes) == 2 or recipes and validation.jobs
    if drawn and (accelerator.is_main_process or distribution.is_sharded()):
        stages.enter("preview")
        with compared(), out_of_memory.in_preview():
            preview = draw_preview(prepared, recipes, output_dir, args.seed, validation)
    finishes = accelerator.is_main_process and recipes
    if finishes:
        with faults.one_line_errors(output_dir):
            if halves is not None:
                faults.sweep(output_dir)
                join_losses(output_dir)
                if image is not None:
                    save_png(image, output_dir / "instance.png")
            if preview is not None:
                save_png(preview, output_dir / "glance.png")
            sampler, exported = None, []
            if len(recipes) == 2:
                sampler = write_sampler_of(args, prepared, size, output_dir)
                exported = write_for_comfyui(args, output_dir, recipes, caption)
            drawn = prepared.answers.layout is not None
            written = Written(recipes, sampler, exported, validation.last, repo_id or str(output_dir), drawn)
            write_model_card(args, output_dir, prepared, written)
    end(accelerator)
    if finishes:
        push_to_hub(output_dir, repo_id, written)
        summary.say_done(measurement.report(), output_dir, list(recipes))
        print(draw_command(args, output_dir, list(recipes)))


if __name__ == "__main__":
    cli.run(functools.partial(main, settings=settings))
