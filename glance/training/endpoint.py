"""How are the weights of mixed branches and both LoRAs trained together? On where a picture ends, through all calls.

The other losses train one step at a time, towards where the base would go from there. Here the whole walk of
--num_model_calls is drawn, and the loss is its distance from where the base's own trajectory ends. Every call is
computed once more in the backward pass, so that the memory is that of one call and of a few latents for each. A part
of the trajectories is not trained on; on it is measured what came of it.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from tqdm.auto import tqdm

from glance.adapters import fresh_lora
from glance.ask.components import denoiser_name
from glance.ask.mixed import count_calls, walk_branches
from glance.ask.velocity import PipelineVelocity
from glance.files import faults
from glance.files.checkpoints import check_lora, with_run
from glance.files.lora import check_loaded, save_lora
from glance.files.recipe import WEIGHT_NAME, read_recipe
from glance.files.sampler import read_sampler
from glance.training import distribution, out_of_memory, stages, trackers
from glance.training.calls_chart import write_curve
from glance.training.draws import Draw, Draws
from glance.training.log import LossLog, check_finite, write_losses
from glance.training.optimizer import make_optimizer
from glance.training.phases import Phase
from glance.training.prepare import Prepared
from glance_utils import PHASES, InputError, Schedule, activate_adapter, denoiser, timesteps_to_sigmas, velocity_loss


logger = logging.getLogger(__name__)

WEIGHTS_RATE = 10  # how much faster than the LoRAs the steps' weights are trained: eight numbers a step, not millions
NAME = "both phases"  # of what is trained, in logs


def left_out(captions: int, seeds: int) -> torch.Tensor:
    """Return which trajectories are not trained on, (captions, seeds) bool: a quarter of the captions where there are
    four or more, else a quarter of each one's trajectories, as far as there are four."""
    rows = torch.arange(captions) >= captions - captions // 4
    if rows.any():
        return rows[:, None].expand(-1, seeds)
    return (torch.arange(seeds) >= seeds - seeds // 4).expand(captions, -1)


class Ends(torch.nn.Module):
    """Where a schedule of mixed branches ends, as a function of the start, with gradients to weights and LoRAs."""

    def __init__(self, model: PipelineVelocity, schedule: Schedule, calls: dict[str, dict], switch: Callable):
        """`calls` are branch_calls'; switch(phase) lets the LoRA of a phase act."""
        super().__init__()
        self.model, self.schedule, self.calls, self.switch = model, schedule, calls, switch
        self.sigmas = [*timesteps_to_sigmas(schedule.timesteps), 0.0]
        self.weights = torch.nn.Parameter(torch.tensor(schedule.coefficients, dtype=torch.float32))

    def forward(self, start: torch.Tensor, caption: str, recompute: bool = True) -> torch.Tensor:
        """Return the final latents (B, ...) float32 of pictures of a caption that begin at `start` (B, ...).

        Without `recompute` all calls are kept for the backward pass, which then is faster and takes their memory.
        """
        phases = self.schedule.phase_of_steps

        def velocity(index: int, branch: str, latents: torch.Tensor) -> torch.Tensor:
            call = self.calls[branch] | ({"prompt": caption} if branch == "prompt" else {})

            def predict(latents: torch.Tensor) -> torch.Tensor:
                self.switch(phases[index])  # in the backward pass, too, where it is called last step first
                return self.model(latents, self.sigmas[index], **call).float()

            if not recompute:
                return predict(latents)
            with set_checkpoint_early_stop(False):  # which is an exception, and would look like the pipeline's own
                return checkpoint(predict, latents, use_reentrant=False)

        return walk_branches(
            velocity, start, self.sigmas, self.schedule.branches, lambda index, terms: self.weights[index]
        )

    def coefficients(self) -> list[list[float]]:
        """Return the weights of each step, as a Schedule has them."""
        return [[round(weight, 9) for weight in step] for step in self.weights.tolist()]


class Training:
    """All that changes while both phases are trained together."""

    def __init__(self, args, accelerator, prepared: Prepared):
        pipe, answers, steps = prepared.models.pipe, prepared.answers, prepared.steps
        self.transformer, self.layers, self.rank = denoiser(pipe), answers.layers, args.rank
        self.phases = [] if args.train_coefficients_only else list(PHASES)
        shape = {"r": args.rank, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
        for number, phase in enumerate(self.phases):
            fresh_lora(self.transformer, phase, answers.layers, accelerator.device, args.seed + number, **shape)
        names = [f".{phase}." for phase in self.phases]
        named = self.transformer.named_parameters()
        self.loras = [parameter for name, parameter in named if any(part in name for part in names)]
        model = PipelineVelocity(pipe, answers.timestep_table, takes_batches=answers.takes_batches)
        schedule = Schedule(steps.whole, answers.timestep_table, steps.coefficients, branches=steps.branches)
        self.ends = Ends(model, schedule, answers.branch_calls, self.switch).to(accelerator.device)
        self.parameters = [*self.loras, self.ends.weights]
        self.switch("slow")  # all of them are trained
        rate = args.learning_rate * WEIGHTS_RATE
        groups = [{"params": [self.ends.weights], "lr": rate, "weight_decay": 0.0}]
        groups = ([{"params": self.loras}] if self.loras else []) + groups
        optimizer, self.lr_scheduler = make_optimizer(args, groups)
        _, self.optimizer = distribution.prepare(args, accelerator, self.ends, self.parameters, optimizer)
        trained = ~left_out(len(prepared.captions), args.num_trajectories)
        self.draws = Draws(
            seed=args.seed,
            mode="stratified",
            micro_steps=args.max_train_steps * args.gradient_accumulation_steps,
            timesteps=1,
            batch_size=args.train_batch_size,
            captions=int(trained.any(1).sum()),
            trajectories=int(trained.any(0).sum()),
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        self.scaler = accelerator.scaler
        self.log = LossLog(NAME, [0.0])
        self.error_before = measured_error(self.ends, prepared, accelerator.device)

    def switch(self, phase: str) -> None:
        """Let the LoRA of a phase act alone; all of them go on being trained."""
        if self.phases:
            activate_adapter(self.transformer, phase)
            for parameter in self.loras:
                parameter.requires_grad_(True)

    def content(self) -> dict:
        """Return it as a checkpoint holds it."""
        lora = {
            f"{phase}.{name}": value
            for phase in self.phases
            for name, value in get_peft_model_state_dict(self.transformer, adapter_name=phase).items()
        }
        content = {"optimizer": self.optimizer.state_dict(), "lr_scheduler": self.lr_scheduler.state_dict()}
        content |= {"scaler": self.scaler.state_dict()} if self.scaler is not None else {}
        return content | {"lora": lora, "weights": self.ends.weights.detach().cpu(), "generator": self.draws.state()}

    def restore(self, content: dict, draws_taken: int) -> None:
        """Go on from a checkpoint's content; raise InputError where its LoRAs are not what this run trains."""
        for phase in self.phases:
            lora = {name: value for name, value in content["lora"].items() if name.startswith(f"{phase}.")}
            lora = {name.removeprefix(f"{phase}."): value for name, value in lora.items()}
            check_lora(lora, self.transformer, self.layers, self.rank)
            set_peft_model_state_dict(self.transformer, lora, adapter_name=phase)
            check_loaded(self.transformer, phase, lora)
        with torch.no_grad():
            self.ends.weights.copy_(content["weights"])
        self.draws.restore(draws_taken, content["generator"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.lr_scheduler.load_state_dict(content["lr_scheduler"])
        if self.scaler is not None:
            self.scaler.load_state_dict(content["scaler"])


def endpoint_loss(ends: Ends, prepared: Prepared, draw: Draw, device: torch.device) -> torch.Tensor:
    """Return the mean squared distance of where the draw's pictures end from where the base's end, () float32."""
    rows = draw.caption, torch.tensor(draw.trajectories)
    start, exact = (
        part[rows][:, 0].to(device) for part in (prepared.trajectories.starts, prepared.trajectories.targets)
    )
    return velocity_loss(ends(start, prepared.captions[draw.caption]), exact)


@torch.no_grad()
def measured_error(ends: Ends, prepared: Prepared, device: torch.device) -> float | None:
    """Return how far pictures end from where the base's end, relative to these, over the trajectories that were not
    trained on; None where there are none."""
    starts, targets = prepared.trajectories.starts, prepared.trajectories.targets
    off = size = 0.0
    for caption, seed in left_out(*starts.shape[:2]).nonzero().tolist():
        end = ends(starts[caption, seed].to(device), prepared.captions[caption], recompute=False).cpu()
        off += float((end - targets[caption, seed]).double().square().sum())
        size += float(targets[caption, seed].double().square().sum())
    return (off / size) ** 0.5 if size else None


def train_endpoint(args, accelerator, prepared: Prepared, state: dict | None, save: Callable) -> Training | Path:
    """Train both LoRAs, or with --train_coefficients_only none, and the steps' weights; return what was trained.

    `state` is a checkpoint's to go on from. save(training, log, step) writes one and returns its folder, which is
    returned in place of the training where a signal asked to stop.
    """
    training = Training(args, accelerator, prepared)
    log, step = training.log, 0
    if state is not None:
        step = state["step"]
        training.restore(state, step * args.gradient_accumulation_steps)
        log.restore(state["losses"])
        logger.info(f"Resuming from {state['folder']} (step {step} of {args.max_train_steps})")
    distribution.copy_from_first(accelerator, training.parameters)
    hidden = not accelerator.is_local_main_process
    progress = tqdm(total=args.max_train_steps, initial=step, desc=NAME, delay=0, disable=hidden)
    stage = out_of_memory.in_training(args, "training", lambda: f"training {NAME}, step {step + 1}")
    with progress, stage:
        for draw in training.draws:
            torch.manual_seed(draw.seed)  # so dropout goes on after a checkpoint as it would have
            with accelerator.accumulate(training.ends):
                loss = endpoint_loss(training.ends, prepared, draw, accelerator.device)
                mean_loss = accelerator.gather(loss.detach()[None]).mean().item()
                log.add(step + 1, [0], [mean_loss])
                check_finite(mean_loss, "loss", NAME, step + 1, 0.0)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    distribution.average_gradients(accelerator, training.parameters)
                    norm = accelerator.clip_grad_norm_(training.parameters, args.max_grad_norm)
                    if accelerator.scaler is None:  # fp16's scaler leaves such a step out
                        check_finite(float(norm), "gradients' norm", NAME, step + 1, 0.0)
                training.optimizer.step()
                training.optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            step += 1
            training.lr_scheduler.step()
            progress.update()
            progress.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
            newest = log.newest | {"lr": training.lr_scheduler.get_last_lr()[0], "grad_norm": float(norm)}
            trackers.log(accelerator, newest | trackers.memory(accelerator), step)
            stop = accelerator.check_trigger()  # on every process, where a signal reached any
            due = args.checkpointing_steps and step % args.checkpointing_steps == 0
            if stop or due:
                folder = save(training, log, step)
            if stop:
                return folder
    logger.info(f"  {NAME}: loss {log.first_and_last()}")
    return training


def say_errors(before: float | None, error: float | None, captions: int) -> None:
    """Say what training changed, and warn where that is for the worse."""
    if error is None:
        return
    measured = "captions" if captions >= 4 else "noises"
    logger.info(f"  Error = {error:.4f}, before training {before:.4f}, on {measured} that were not trained on")
    if error > before:
        logger.warning(
            f"training made it worse, {before:.4f} to {error:.4f}: the sampler alone is nearer (--max_train_steps 0); "
            "or give a smaller --learning_rate, more --max_train_steps or more captions"
        )


def earlier_error(output_dir: str, coefficients: list[list[float]]) -> float | None:
    """Return the error that a finished run measured with these weights, None where it did not come to write it."""
    with contextlib.suppress(InputError):
        sampler = read_sampler(output_dir)
        return sampler.error if sampler.coefficients == coefficients else None
    return None


def train_together(
    args, accelerator, prepared: Prepared, phases: list[Phase], save: Callable, leave: Callable
) -> tuple[Prepared, list[Phase]]:
    """Train both phases by the endpoint loss and write their LoRAs; return the steps with the weights that came of it.

    What an earlier run finished is read instead. save(phase, training, log, step) writes a checkpoint and returns its
    folder; leave(folder, signals) ends the process where a signal asked to stop.
    """
    transformer, name = denoiser(prepared.models.pipe), denoiser_name(prepared.models.pipe.config)
    finished = all(phase.finished for phase in phases)
    if finished:
        recipes = [read_recipe(phase.folder / WEIGHT_NAME) for phase in phases]
        coefficients = sum((recipe.coefficients for recipe in recipes), [])
        error = earlier_error(args.output_dir, coefficients)
        before = None if error is None else Training(args, accelerator, prepared).error_before  # for the card
        logger.info("  both phases: finished before")
    else:
        stages.enter("training both phases")
        save_both = functools.partial(save, phases[0])
        with faults.signals_noted(accelerator.set_trigger) as noted:
            trained = train_endpoint(args, accelerator, prepared, phases[0].checkpoint, save_both)
            if isinstance(trained, Path):
                leave(trained, noted)
        coefficients = trained.ends.coefficients()
        error = measured_error(trained.ends, prepared, accelerator.device)
        before = trained.error_before
        say_errors(before, error, len(prepared.trajectories.starts))
    steps = dataclasses.replace(prepared.steps, coefficients=coefficients)
    measured = dataclasses.replace(prepared.trajectories, error=error)
    prepared = dataclasses.replace(prepared, steps=steps, trajectories=measured, untrained_error=before)
    recipes = [
        dataclasses.replace(phase.recipe, coefficients=steps.coefficients_of(phase.recipe.phase)) for phase in phases
    ]
    if accelerator.is_main_process and not finished:
        with faults.one_line_errors(args.output_dir):
            write_losses(args.output_dir, trained.log.rows())
            for phase, recipe in zip(phases, recipes):
                if recipe.phase in trained.phases:
                    recipe = with_run(recipe, phase.compared, phase.asked)
                    logger.info(f"Saved {save_lora(transformer, recipe.phase, phase.folder, recipe, name)}")
    if accelerator.is_main_process and error is not None and not args.train_coefficients_only:
        with faults.one_line_errors(args.output_dir):
            write_curve(Path(args.output_dir), measured.curve, (count_calls(steps.branches), error))
    if hasattr(transformer, "peft_config"):
        transformer.unload_lora()  # the base is as it was
    accelerator.wait_for_everyone()
    return prepared, [dataclasses.replace(phase, recipe=recipe) for phase, recipe in zip(phases, recipes)]
