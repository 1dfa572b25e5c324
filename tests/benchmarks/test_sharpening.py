from functools import partial

import pytest
import torch

from fewtokens.analysis.cost import tokens_per_block
from fewtokens.benchmarks.sharpening import sharpen
from fewtokens.errors import FewtokensError
from fewtokens.tokenizers.ats import ATS

IMAGES = torch.randn(6, 3, 8, 12, generator=torch.Generator().manual_seed(0))


def test_ats_keeps_what_the_profile_says(make):
    model = make(pool="token")  # 24 patches and a class token
    kept = sharpen(model, IMAGES, [16.0, 8.0])
    assert kept == pytest.approx([16.0, 8.0], abs=1.0)
    adaptive = make(partial(ATS), at=[1, 2], pool="token")
    adaptive.load_state_dict(model.state_dict())
    assert tokens_per_block(adaptive, IMAGES) == [25.0, *kept]


@pytest.mark.parametrize("profile", [[26.0], [10.0, 12.0], [9.0, 8.0, 7.0, 6.0], [0.0]])
def test_invalid_profiles(make, profile):
    with pytest.raises(FewtokensError, match="`sharpen` must be at most 3 numbers that decrease from 25"):
        sharpen(make(pool="token"), IMAGES, profile)


def test_it_needs_a_class_token(make):
    with pytest.raises(FewtokensError, match="class token"):
        sharpen(make(pool="avg"), IMAGES, [10.0])
