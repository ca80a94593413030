"""Every random choice of a phase: its shapes, its rounds, its shares among processes, and where a resumed run goes
on."""

from collections import Counter

import pytest
import torch

from glance.training.draws import Draws


PLAIN = {"seed": 3, "mode": "stratified", "micro_steps": 12, "timesteps": 5}
FULL = PLAIN | {"timesteps_per_step": 2, "batch_size": 4, "captions": 3, "trajectories": 4, "sample_shape": (6, 2)}


def assert_same(one, other):
    for name in ("positions", "caption", "trajectories", "seed"):
        assert getattr(one, name) == getattr(other, name), name
    assert torch.equal(one.noise, other.noise)


def test_a_draw_has_a_row_for_each_sample():
    draws = list(Draws(**FULL))
    assert len(draws) == len(Draws(**FULL)) == 12
    for draw in draws:
        assert len(draw.positions) == 2 and set(draw.positions) <= set(range(5))
        assert draw.caption in range(3) and len(draw.trajectories) == 4 and set(draw.trajectories) <= set(range(4))
        assert draw.noise.shape == (2 * 4, 6, 2) and draw.noise.dtype == torch.float32
    noise = torch.cat([draw.noise for draw in draws])
    assert len(noise.unique()) > 0.99 * noise.numel() and abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    assert [draw.noise for draw in Draws(**PLAIN)] == [None] * 12


def test_each_micro_step_of_each_process_has_a_seed_of_its_own():
    phases = [
        [Draws(**PLAIN | {"seed": seed}, num_processes=2, process_index=index) for index in (0, 1)] for seed in (3, 4)
    ]
    seeds = [draw.seed for processes in phases for draws in processes for draw in draws]
    assert len(set(seeds)) == 48 and all(0 <= seed < 2**63 for seed in seeds)


def test_each_round_has_every_choice_once():
    draws = list(Draws(**FULL | {"micro_steps": 15, "batch_size": 2}))
    positions = [position for draw in draws for position in draw.positions]
    trajectories = [index for draw in draws for index in draw.trajectories]
    captions = [draw.caption for draw in draws]
    for choices, count in ((positions, 5), (trajectories, 4), (captions, 3)):
        rounds = [choices[start : start + count] for start in range(0, len(choices) - count + 1, count)]
        assert all(sorted(choices) == list(range(count)) for choices in rounds)
        assert len({tuple(choices) for choices in rounds}) > 1  # shuffled anew


def test_with_replacement_some_timesteps_come_more_often():
    counts = Counter(draw.positions[0] for draw in Draws(**PLAIN | {"mode": "random", "micro_steps": 60}))
    assert set(counts) == set(range(5)) and max(counts.values()) > min(counts.values())


@pytest.mark.parametrize("processes", [2, 4])
def test_the_rows_of_all_processes_are_those_of_one(processes):
    split = FULL | {"batch_size": 4 // processes, "num_processes": processes}
    shares = zip(*(Draws(**split, process_index=index) for index in range(processes)))
    for whole, parts in zip(Draws(**FULL), shares):
        assert all((part.positions, part.caption) == (whole.positions, whole.caption) for part in parts)
        assert sum((part.trajectories for part in parts), ()) == whole.trajectories
        rows = [part.noise.unflatten(0, (2, -1)) for part in parts]  # (timestep, sample of it, ...)
        assert torch.equal(torch.cat(rows, dim=1).flatten(0, 1), whole.noise)


def test_a_restored_one_goes_on_where_the_other_was():
    uninterrupted, draws = list(Draws(**FULL)), Draws(**FULL)
    for _, draw in zip(range(5), draws):
        last = draw
    assert_same(last, uninterrupted[4])
    restored = Draws(**FULL)
    restored.restore(5, draws.state())
    rest = list(restored)
    assert len(rest) == 7
    for one, other in zip(rest, uninterrupted[5:]):
        assert_same(one, other)


def test_the_seed_decides_and_nothing_else():
    torch.manual_seed(0)
    first = list(Draws(**FULL))
    torch.manual_seed(1)
    for one, other in zip(first, Draws(**FULL)):
        assert_same(one, other)
    assert not torch.equal(first[0].noise, next(iter(Draws(**FULL | {"seed": 4}))).noise)
