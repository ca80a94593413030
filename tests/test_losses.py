"""What a micro-step computes: which samples, at which noise levels, how much each counts."""

import torch

from glance.training.draws import Draw
from glance.training.losses import Flow, Objective, Trajectory, segment_weights, step_losses
from glance_utils import add_noise, flow_matching_loss, velocity_loss


SIGMAS = [1.0, 0.75, 0.5]


def make_model(seen: list):
    """A model whose velocity is half of its input, and which notes what it was asked."""

    def model(noisy, sigmas, **call):
        seen.append((noisy, sigmas, call))
        return noisy / 2

    return model


def test_the_flow_loss_is_that_of_each_sample_at_its_own_noise_level():
    latents, noise, seen = torch.randn(1, 4, 2), torch.randn(6, 4, 2), []
    flow, draw = Flow(latents, noise_scale=3.0, call={"guidance_scale": 1.0}), Draw([2, 0], noise)
    loss, by_timestep = step_losses(make_model(seen), Objective(SIGMAS, flow), draw)
    ((noisy, sigmas, call),) = seen
    assert sigmas == [0.5] * 3 + [1.0] * 3 and call == {"guidance_scale": 1.0}
    for index, sigma in enumerate((0.5, 1.0)):
        part = 3 * noise[3 * index : 3 * index + 3]
        assert torch.equal(noisy[3 * index : 3 * index + 3], add_noise(latents, part, sigma))
        expected = flow_matching_loss(add_noise(latents, part, sigma) / 2, latents.expand(3, 4, 2), part)
        torch.testing.assert_close(by_timestep[index], expected)
    torch.testing.assert_close(loss, by_timestep.mean())


def test_the_trajectory_loss_is_on_the_points_that_were_drawn_and_weighted_by_step():
    starts, targets, seen = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5), []
    trajectory = Trajectory(starts, targets, ["a ring", "a disc"], {"height": 32})
    weights = segment_weights([0.1, 0.3, 0.2], "length")
    torch.testing.assert_close(weights, torch.tensor([0.5, 1.5, 1.0]))
    draw = Draw([1, 2], caption=1, trajectories=(3, 0))
    objective = Objective(SIGMAS, trajectory=trajectory, weights=weights)
    loss, by_timestep = step_losses(make_model(seen), objective, draw)
    ((points, sigmas, call),) = seen
    assert sigmas == [0.75, 0.75, 0.5, 0.5] and call == {"height": 32, "prompt": "a disc"}
    rows = [(1, 3, 1), (1, 0, 1), (1, 3, 2), (1, 0, 2)]
    assert torch.equal(points, torch.stack([starts[row] for row in rows]))
    expected = [
        velocity_loss(points[part] / 2, torch.stack([targets[row] for row in rows[part]]))
        for part in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(by_timestep, torch.stack(expected))
    torch.testing.assert_close(loss, (1.5 * expected[0] + 1.0 * expected[1]) / 2)


def test_the_flow_loss_beside_the_trajectory_loss_counts_by_its_weight():
    starts, noise, losses = torch.randn(1, 1, 3, 5), torch.randn(1, 5), []
    flow, trajectory = Flow(torch.randn(1, 5), weight=0.25), Trajectory(starts, -starts, ["a ring"])
    draw = Draw([0], noise)
    for objective in (
        Objective(SIGMAS, flow, trajectory),
        Objective(SIGMAS, flow),
        Objective(SIGMAS, None, trajectory),
    ):
        losses.append(step_losses(make_model([]), objective, draw)[0])
    torch.testing.assert_close(losses[0], losses[1] + losses[2])
