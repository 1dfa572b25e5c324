"""Pictures that visitors give to the demo, with limits, and the examples that it offers."""

import logging
from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule
from PIL import Image, ImageOps, UnidentifiedImageError

from fewtokens.analysis.evaluation import load_test_images
from fewtokens.benchmarks.gallery import PHOTOGRAPHS
from fewtokens.data.transforms.normalize import Pipeline
from fewtokens.errors import FewtokensError

log = logging.getLogger(__name__)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # no others, since each is a decoder that strangers can feed
NUM_EXAMPLES = 12


def read_picture(path: Path, megapixels: float | int) -> Image.Image:
    """Read a picture from somebody else, upright and as RGB. Its size is checked before it is decoded.

    Args:
        path: The file.
        megapixels: Largest number of pixels, in millions.

    Raises:
        FewtokensError: It is too large, damaged, or in none of the formats.
    """
    known = ", ".join(FORMATS)
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > megapixels * 1e6:
                raise FewtokensError(
                    f"The picture has {image.width} x {image.height} pixels, and at most {megapixels:g} million pixels "
                    "are allowed. Scale it down and try again."
                )
            return ImageOps.exif_transpose(image).convert("RGB")
    except FewtokensError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit comes first if `megapixels` is set above it
        raise FewtokensError(f"The picture has more pixels than Pillow reads. {error}") from error
    except UnidentifiedImageError as error:
        raise FewtokensError(f"This file is no picture that can be read. Use one of {known}.") from error
    except Exception as error:  # the decoders raise many kinds of errors for damaged files
        raise FewtokensError(f"The picture is damaged and cannot be read. Use another file: {known}.") from error


def photographs() -> list[Image.Image]:
    """Return scikit-learn's two sample photographs, see docs/pictures/README.md for their license."""
    return [read_picture(path, megapixels=1) for path in PHOTOGRAPHS]


def examples(task: LightningModule, data: LightningDataModule, pipeline: Pipeline) -> list[Image.Image]:
    """Return the first test images as the model gets them, or two photographs if the data set is not there.

    Args:
        task: The task, for whose model they are.
        data: The datamodule.
        pipeline: The normalization, which is undone.
    """
    try:
        data.prepare_data()
        data.setup("test")
        images = pipeline.undo(load_test_images(task, data, NUM_EXAMPLES))
    except (FewtokensError, OSError) as error:
        log.info("The examples are photographs, since the test set cannot be read: %s", error)
        return photographs()
    arrays = images.permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array) for array in arrays]
