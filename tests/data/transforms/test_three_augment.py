"""3-Augment: its three changes and its jitter are torchvision's, chosen for each image."""

import pytest
import torch
from torchvision.transforms.v2 import functional

from fewtokens.data.seeding import generator
from fewtokens.data.transforms.three_augment import ThreeAugment
from fewtokens.errors import FewtokensError


def pictures(count: int, low: int = 0, high: int = 256, *frames: int) -> torch.Tensor:
    torch.manual_seed(0)
    small = torch.randint(low, high, (count, *frames, 3, 5, 6), dtype=torch.uint8)
    return functional.resize_image(small.flatten(0, -4), [20, 24]).view(count, *frames, 3, 20, 24)


def test_every_image_is_gray_solarized_or_blurred() -> None:
    images = pictures(60)
    done = ThreeAugment(jitter=0.0, sigma=(1.5, 1.5))(images, generator(0))
    candidates = [
        functional.rgb_to_grayscale(images, 3),
        functional.solarize(images, 128),
        functional.gaussian_blur(images, [13, 13], [1.5, 1.5]),
    ]
    inside = (..., slice(6, -6), slice(6, -6))  # torchvision mirrors at the border, Pillow and we repeat it
    near = torch.stack([(done.int() - x.int()).abs()[inside].amax((1, 2, 3)) <= 1 for x in candidates])
    assert near.any(dim=0).all()
    assert (near.sum(dim=1) >= 5).all()


def test_jitter_is_torchvisions() -> None:
    images = pictures(12, 90, 120)
    jittered = ThreeAugment(jitter=0.3)(images, generator(1))
    plain = ThreeAugment(jitter=0.0)(images, generator(1))
    factors = 1 + (2 * torch.rand(5, 12, generator=generator(1))[1:4] - 1) * 0.3
    for number, (brightness, contrast, saturation) in enumerate(factors.T.tolist()):
        # Solarizing changes nothing below 128, so that no value is clipped.
        expected = functional.adjust_saturation(plain[number].float() / 255, saturation)
        expected = functional.adjust_contrast(functional.adjust_brightness(expected, brightness), contrast)
        assert (jittered[number].float() - 255 * expected).abs().max() <= 2


def test_frames_are_treated_alike_and_settings_checked() -> None:
    clips = pictures(6, 0, 256, 1).expand(-1, 3, -1, -1, -1)
    done = ThreeAugment()(clips, generator(2))
    assert done.shape == clips.shape
    assert torch.equal(done[:, 0], done[:, 2])
    assert not torch.equal(done[:, 0], clips[:, 0])
    with pytest.raises(FewtokensError, match="needs 3 channels, got 1"):
        ThreeAugment()(clips[:, 0, :1], generator(0))
    with pytest.raises(FewtokensError, match=r"`ThreeAugment\.sigma` must be"):
        ThreeAugment(sigma=(0.0, 1.0))
