"""Which timesteps, captions, trajectories and noises does a phase train on? Every random choice of it is made here.

All processes make the choices of all of them, from one seed, and each takes its own rows: a run comes out the same
however many processes share it. Change the order of the draws, and every seed gives another LoRA than before.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from glance_utils import timestep_order


@dataclass(frozen=True)
class Draw:
    """The samples of one micro-step of one process, `timesteps_per_step` times `batch_size` of them.

    The samples of a timestep lie side by side: sample i is at positions[i // batch_size].
    """

    positions: list[int]  # (timesteps_per_step,), each an index into the phase's timesteps
    noise: torch.Tensor | None = None  # (timesteps_per_step * batch_size, ...) float32, standard normal
    caption: int = 0  # an index into the captions
    trajectories: tuple[int, ...] = (0,)  # (batch_size,), each an index into the caption's trajectories
    seed: int = 0  # of what else is random in the micro-step on this process, which is dropout


class Draws:
    """An iterator over the draws of one process: what a phase's micro-steps are trained on, one after the other.

    `micro_steps` of them in all, each at `timesteps_per_step` of the phase's `timesteps`, in the order that
    glance_utils.timestep_order gives for `mode`; captions and trajectories in shuffled rounds. Noise has the shape
    (timesteps_per_step, processes, batch_size, *sample_shape) for all processes, of which a draw holds this one's
    rows; `sample_shape` is None where no noise is trained on, and none is drawn.
    """

    def __init__(
        self,
        *,
        seed: int,
        mode: str,
        micro_steps: int,
        timesteps: int,
        timesteps_per_step: int = 1,
        batch_size: int = 1,
        captions: int = 1,
        trajectories: int = 1,
        sample_shape: tuple[int, ...] | None = None,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)
        chooser = torch.Generator().manual_seed(seed)  # of captions and trajectories
        order = timestep_order(timesteps, micro_steps * timesteps_per_step, mode, self.generator)
        self.positions = order.reshape(micro_steps, timesteps_per_step).tolist()
        self.captions = timestep_order(captions, micro_steps, "stratified", chooser).tolist()
        rows = (micro_steps, num_processes, batch_size)
        chosen = timestep_order(trajectories, micro_steps * num_processes * batch_size, "stratified", chooser)
        self.trajectories = chosen.reshape(rows)[:, process_index].tolist()
        self.noise_shape = None
        if sample_shape is not None:
            self.noise_shape = (timesteps_per_step, num_processes, batch_size, *sample_shape)
        self.process_index = process_index
        self.next_index = 0

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[Draw]:
        while self.next_index < len(self):
            index = self.next_index
            self.next_index += 1
            yield Draw(
                positions=self.positions[index],
                noise=self._noise(),
                caption=self.captions[index],
                trajectories=tuple(self.trajectories[index]),
                seed=random.Random(f"{self.seed} {self.process_index} {index}").getrandbits(63),
            )

    def _noise(self) -> torch.Tensor | None:
        if self.noise_shape is None:
            return None
        of_all_processes = torch.randn(self.noise_shape, generator=self.generator)
        return of_all_processes[:, self.process_index].flatten(0, 1)

    def state(self) -> torch.Tensor:
        """Return the generator's state, uint8 (N,): with the number of draws taken, all that `restore` needs."""
        return self.generator.get_state()

    def restore(self, taken: int, state: torch.Tensor) -> None:
        """Go on after the first `taken` draws, as the Draws of the same arguments did whose `state` it was then."""
        self.next_index = taken
        self.generator.set_state(state)
