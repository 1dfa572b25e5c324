"""The named motions are what is seen, and no single frame tells them apart."""

import pytest
import torch
from scipy.stats import kstest
from sklearn.datasets import load_digits
from torch import Tensor

from fewtokens.data import seeding
from fewtokens.data.video import motion
from fewtokens.data.video.motion import MOTIONS

NAMES = list(MOTIONS)


def spot(row: int, column: int) -> Tensor:
    """A picture of one light field."""
    pictures = torch.zeros(1, 8, 8, dtype=torch.uint8)
    pictures[0, row, column] = 255
    return pictures


def place(frames: Tensor, axis: int) -> Tensor:
    """Centre of the light of every frame along an axis, in rounds of the torus."""
    light = frames.double().sum(dim=1 if axis else 2)
    waves = torch.polar(light, (torch.arange(motion.SIDE).double() + 0.5) / motion.SIDE * 2 * torch.pi)
    return (waves.sum(dim=1).angle() / (2 * torch.pi)) % 1


@pytest.mark.parametrize(("name", "axis", "sign"), [("left", 1, -1), ("right", 1, 1), ("up", 0, -1), ("down", 0, 1)])
def test_digits_go_where_the_class_says(name: str, axis: int, sign: int) -> None:
    phases = motion.phases(torch.tensor([NAMES.index(name)]), 16, torch.Generator().manual_seed(1))
    frames = motion.draw(spot(3, 4), phases)[0]
    steps = (place(frames, axis).diff() * sign) % 1
    assert ((steps > 0.045) & (steps < 0.105)).all()
    assert (place(frames, 1 - axis).diff().abs() < 0.01).all()


@pytest.mark.parametrize(("name", "sign"), [("clockwise", 1), ("counterclockwise", -1)])
def test_digits_turn_as_the_class_says(name: str, sign: int) -> None:
    phases = motion.phases(torch.tensor([NAMES.index(name)]), 16, torch.Generator().manual_seed(1))
    phases[..., :2] = 0.5
    frames = motion.draw(spot(1, 4), phases)[0]  # above the centre, about which it turns
    right, down = place(frames, 1) - 0.5, place(frames, 0) - 0.5
    turns = torch.atan2(down, right).diff() / (2 * torch.pi)  # rows go down: from right to down is clockwise
    assert (((turns * sign) % 1 > 0.04) & ((turns * sign) % 1 < 0.11)).all()


@pytest.mark.parametrize(("name", "sign"), [("grow", 1), ("shrink", -1)])
def test_digits_change_size_as_the_class_says(name: str, sign: int) -> None:
    phases = motion.phases(torch.tensor([NAMES.index(name)]), 16, torch.Generator().manual_seed(1))
    light = motion.draw(spot(3, 4), phases)[0].double().sum(dim=(1, 2))
    changes = light.diff() * sign
    rounds = (phases[0, :, 3].diff() * sign < 0).tolist()  # from the largest size to the smallest, or back
    assert 0 < sum(rounds) < 3
    assert all((change < 0) == again for change, again in zip(changes.tolist(), rounds, strict=True))


@pytest.mark.parametrize("frame", [0, 7, 15])
def test_a_frame_has_the_same_distribution_in_every_class(frame: int) -> None:
    labels = torch.arange(len(NAMES)).repeat_interleave(1000)
    phases = motion.phases(labels, 16, seeding.generator(0))[:, frame]
    for label in range(len(NAMES)):
        drawn = phases[labels == label]
        assert all(kstest(drawn[:, phase].numpy(), "uniform").pvalue > 1e-3 for phase in range(4))
        # Independent, too: 4 standard errors, of phases and of waves, which see what goes round.
        for values in (drawn, (drawn * 2 * torch.pi).cos(), (drawn * 2 * torch.pi).sin()):
            assert (torch.corrcoef(values.T) - torch.eye(4)).abs().max() < 4 / 1000**0.5


def test_drawn_frames_of_all_classes_look_alike() -> None:
    digits = torch.from_numpy(load_digits().images * (255 / 16)).to(torch.uint8)
    labels = torch.arange(len(NAMES)).repeat(800 // len(NAMES))
    frames = motion.draw(digits[:800], motion.phases(labels, 9, seeding.generator(1)))[:, 8].double() / 255
    overall = frames.mean(dim=0)
    for label in range(len(NAMES)):
        errors = frames.std(dim=0) / (labels == label).sum() ** 0.5
        assert ((frames[labels == label].mean(dim=0) - overall) / errors).abs().max() < 5  # of 1024 pixels


def test_drawing_on_the_torus_is_even_everywhere() -> None:
    phases = torch.tensor([[0.25, 0.25, 0.3, 0.4], [0.25 + 9 / 32, 0.25 + 23 / 32, 0.3, 0.4]], dtype=torch.float64)
    first, second = motion.draw(spot(2, 5), phases[None])[0]
    assert torch.equal(first.roll((23, 9), (0, 1)), second)
    assert first.float().std() > 1
