"""What does a phase say of its losses: in the progress bar, to trackers, at its end, and where they are no numbers?

Losses can be compared within a timestep alone: late timesteps have larger ones, and another order of the timesteps
would look like progress.
"""

import math


def check_finite(value: float, name: str, phase: str, step: int, timestep: float) -> None:
    """Raise FloatingPointError where a loss or a norm is NaN or infinite: the run has diverged."""
    if not math.isfinite(value):
        raise FloatingPointError(
            f"{phase}: the {name} is {value} at step {step}, timestep {timestep:g}; no {phase} LoRA was written. "
            "Try a lower --learning_rate, or --mixed_precision bf16 instead of fp16"
        )


class LossLog:
    """The losses of a phase, by the timestep (0..1000) at which they were measured."""

    def __init__(self, phase: str, timesteps: list[float]):
        self.phase, self.timesteps = phase, timesteps
        self.losses = {timestep: [] for timestep in timesteps}
        self.newest = {}

    def add(self, positions: list[int], losses: list[float]) -> float:
        """Note a micro-step's losses, one for each of its positions among the timesteps; return their mean."""
        chosen = [self.timesteps[position] for position in positions]
        for timestep, loss in zip(chosen, losses):
            self.losses[timestep].append(loss)
        mean = sum(losses) / len(losses)
        self.newest = {f"{self.phase}/loss": mean}
        self.newest |= {f"{self.phase}/loss_at_{timestep:.0f}": loss for timestep, loss in zip(chosen, losses)}
        return mean

    def means(self) -> str:
        """Return each timestep's mean loss, as "0.1234 at 1000, ...", of those that were trained on."""
        parts = [(sum(losses) / len(losses), timestep) for timestep, losses in self.losses.items() if losses]
        return ", ".join(f"{mean:.4f} at {timestep:.0f}" for mean, timestep in parts)
