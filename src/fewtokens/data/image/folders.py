"""Files in class folders, `<part>/<class>/<file>`: listing them, and reading and fitting pictures."""

import hashlib
import io
import logging
import math
import os
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional

from fewtokens.data import seeding
from fewtokens.data.cache import Tensors, cached
from fewtokens.errors import FewtokensError, first_line, listed

log = logging.getLogger(__name__)
_LARGE = 50_000  # files from which a list is kept in a cache
_RACY = 2_000_000_000  # ns in which a folder may change twice without another modification time
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")  # Pillow knows others that start programs, such as EPS


class UnreadablePictureError(FewtokensError):
    """A picture that cannot be read or decoded. `path` and `reason` say which one and why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"Cannot read the picture {path}: {reason}. Replace it with an intact copy, or remove it.")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple:
        return UnreadablePictureError, (self.path, self.reason)


@dataclass(frozen=True)
class ClassFolders:
    """The files of one part of a data set.

    Attributes:
        root: The folder of the part.
        classes: Names of the class folders, sorted.
        files: Paths relative to `root` as bytes, sorted by class and name. An array, because a list of a million Python
            strings would be copied into every worker process as their reference counts change.
        targets: Index of the class of each file.
    """

    root: Path
    classes: list[str]
    files: np.ndarray
    targets: Int64[Tensor, " n"]

    def path(self, index: int) -> Path:
        """Return the path of file `index`."""
        return self.root / os.fsdecode(self.files[index])

    def read(self, index: int) -> UInt8[Tensor, " bytes"]:
        """Return the content of file `index`.

        Raises:
            UnreadablePictureError: The file is missing, empty or unreadable.
        """
        return read_bytes(self.path(index))

    def take(self, indices: Int64[Tensor, " k"]) -> "ClassFolders":
        """Return the files with these indices."""
        return replace(self, files=self.files[indices.numpy()], targets=self.targets[indices])

    def subset(self, share: float, classes: int | None, seed: int) -> "ClassFolders":
        """Return a random share of the files of each class, at least one, of all or the first classes.

        Of two shares with the same seed, the smaller one is part of the larger one.
        """
        chosen = []
        for label, name in enumerate(self.classes[:classes]):
            members = (self.targets == label).nonzero().flatten()
            order = torch.randperm(
                len(members), generator=seeding.generator(seeding.SPLIT, seed, zlib.crc32(os.fsencode(name)))
            )
            chosen.append(members[order[: max(1, round(share * len(members)))]].sort().values)
        return replace(self.take(torch.cat(chosen)), classes=self.classes[:classes])

    def fingerprint(self) -> str:
        """Hash the names, sizes and modification times of the files, as a cache key."""
        digest = hashlib.sha256()
        for name in self.files:
            stat = os.stat(os.path.join(os.fsencode(self.root), name))
            digest.update(b"%s\0%d\0%d\n" % (name, stat.st_size, stat.st_mtime_ns))
        return digest.hexdigest()


def class_names(root: Path) -> list[str]:
    """Return the names of the class folders in `root`, sorted and without hidden ones."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def scan(root: Path, advice: str, suffixes: tuple[str, ...] = PICTURES) -> ClassFolders:
    """List the files in the class folders of `root`.

    Args:
        root: Folder that holds one folder per class.
        advice: Sentence without its period for error messages: how the data should be stored, or where to get them.
        suffixes: Endings of the files to list, in lower case.

    Raises:
        FewtokensError: `root` does not exist or has no class folder, or a class folder has no such file.
    """
    classes = class_names(root) if root.is_dir() else []
    if not classes:
        problem = f"There are no class folders in {root}" if root.is_dir() else f"The folder {root} does not exist"
        raise FewtokensError(f"{problem}; expected files like {root}/<class>/*{suffixes[0]}. {advice}.")
    files: list[bytes] = []
    counts, inner = [], list[str]()
    for name in classes:
        entries = list(os.scandir(root / name))
        found = sorted(entry.name for entry in entries if entry.name.lower().endswith(suffixes))
        if len(found) < len(entries):
            inner += [os.path.join(name, entry.name) for entry in entries if entry.is_dir() and entry.name not in found]
        if not found:
            raise FewtokensError(
                f"Every class folder must contain files that end in {', '.join(suffixes)}, but there are none in "
                f"{root / name}. Remove the folder or fill it. {advice}."
            )
        files += [os.fsencode(os.path.join(name, file)) for file in found]
        counts.append(len(found))
    if inner:
        log.warning("Folders inside of the class folders of %s are not read: %s", root, listed(sorted(inner)))
    targets = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor(counts))
    return ClassFolders(root, classes, np.array(files), targets)


def scan_cached(root: Path, advice: str) -> ClassFolders:
    """Do the same as `scan`, but keep the list of a large part in a cache, since listing a million files takes minutes.

    The cache is `.fewtokens-files.safetensors` in `root` or, if that is not writable, in `~/.cache/fewtokens`. It is
    not used when a class folder was added, removed or changed, which its modification time tells.
    """
    states = [(name, os.stat(root / name).st_mtime_ns) for name in (class_names(root) if root.is_dir() else ())]
    if not states or max(changed for _, changed in states) > time.time_ns() - _RACY:
        return scan(root, advice)
    path, key = (
        root / ".fewtokens-files.safetensors",
        hashlib.sha256(repr((PICTURES, states)).encode(errors="replace")).hexdigest(),
    )
    if not os.access(root, os.W_OK):
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fewtokens"
        path = home / f"files-{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.safetensors"
    if path.exists():
        tensors = cached(path, key, lambda: _tensors(scan(root, advice)))
        names = tensors["files"].numpy()
        files = names.view(f"S{names.shape[1]}")[:, 0]
        return ClassFolders(root, [name for name, _ in states], files, tensors["targets"])
    found = scan(root, advice)
    if len(found.files) >= _LARGE:
        with suppress(OSError):  # then `cached` warns
            path.parent.mkdir(parents=True, exist_ok=True)
        cached(path, key, lambda: _tensors(found))
    return found


def _tensors(found: ClassFolders) -> Tensors:
    return {
        "files": torch.from_numpy(found.files.view(np.uint8).reshape(len(found.files), -1)),
        "targets": found.targets,
    }


def read_bytes(path: Path) -> UInt8[Tensor, " bytes"]:
    """Return the content of a file.

    Raises:
        UnreadablePictureError: The file is missing, empty or unreadable.
    """
    try:
        if not path.is_file() and path.exists():
            raise OSError("it is no file")  # reading a pipe would wait
        content = np.fromfile(path, np.uint8)  # torchvision's read_file needs a name in UTF-8
    except OSError as error:
        raise UnreadablePictureError(str(path), error.strerror or str(error)) from error
    if not len(content):
        raise UnreadablePictureError(str(path), "the file is empty")
    return torch.from_numpy(content)


def decode_pil(data: UInt8[Tensor, " bytes"], path: Path) -> Image.Image:
    """Decode a picture of any color mode as RGB.

    Args:
        data: Content of the file.
        path: Its name in errors.

    Raises:
        UnreadablePictureError: It is not a readable picture.
    """
    try:
        with Image.open(io.BytesIO(data.numpy().data), formats=_FORMATS) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "it is no picture" if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise UnreadablePictureError(str(path), reason) from error


def decode_tensor(data: UInt8[Tensor, " bytes"], path: Path) -> UInt8[Tensor, "3 h w"]:
    """Decode a picture as RGB: JPEG with torchvision's decoder, 1.2 times as fast as Pillow, and others with Pillow.

    Pillow also reads what torchvision refuses: ImageNet holds JPEG files in CMYK, and a PNG file with a JPEG name.

    Args:
        data: Content of the file.
        path: Its name in errors.

    Raises:
        UnreadablePictureError: It is not a readable picture.
    """
    pixels = _jpeg_pixels(data.numpy().data)
    if pixels is not None and pixels <= 2 * (Image.MAX_IMAGE_PIXELS or math.inf):  # else Pillow raises an error
        try:
            return decode_jpeg(data, mode=ImageReadMode.RGB)
        except RuntimeError:
            pass
    return functional.pil_to_tensor(decode_pil(data, path))


def _jpeg_pixels(content: memoryview) -> int | None:
    """Return the number of pixels in the header of a JPEG, or None if it is no JPEG of the usual structure."""
    at = 2
    while bytes(content[:2]) == b"\xff\xd8" and at + 9 <= len(content) and content[at] == 0xFF:
        kind, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4])
        if kind in (0xC0, 0xC1, 0xC2):  # start of frame: baseline, extended, progressive
            return int.from_bytes(content[at + 5 : at + 7]) * int.from_bytes(content[at + 7 : at + 9])
        if not (kind == 0xC4 or (kind >= 0xDB and kind != 0xFF)):  # others than tables and comments
            return None
        at += 2 + length
    return None


def read_pil(path: Path) -> Image.Image:
    """Read a file with `decode_pil`."""
    return decode_pil(read_bytes(path), path)


def fit(picture: Image.Image, shape: tuple[int, ...]) -> UInt8[Tensor, "c h w"]:
    """Cut the largest window of the model's shape out of the middle of a picture, and scale it to its size.

    Args:
        picture: A picture of any size.
        shape: Channels (1 or 3), height and width.
    """
    channels, height, width = shape
    picture = picture.convert("RGB" if channels == 3 else "L")
    if picture.size != (width, height):
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
    array = np.array(picture).reshape(height, width, channels)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def read_tensor(path: Path) -> UInt8[Tensor, "3 h w"]:
    """Read a file with `decode_tensor`."""
    return decode_tensor(read_bytes(path), path)


def decode_all(folders: ClassFolders) -> UInt8[Tensor, "n 3 h w"]:
    """Read all pictures into one tensor.

    Raises:
        FewtokensError: A picture is unreadable, or its size differs from that of the first.
    """
    first = read_tensor(folders.path(0))
    images = torch.empty(len(folders.files), *first.shape, dtype=torch.uint8)
    for index in range(len(images)):  # not in threads, which took 1.4 times as long: they wait for the interpreter
        image = read_tensor(folders.path(index))
        if image.shape != first.shape:
            raise FewtokensError(
                f"All pictures must have the size of the first, {first.shape[-1]} x {first.shape[-2]} pixels, but "
                f"{folders.path(index)} has {image.shape[-1]} x {image.shape[-2]} pixels. Scale them to one size."
            )
        images[index] = image
    return images
