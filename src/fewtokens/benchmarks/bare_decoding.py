"""The decoders' own calls, as their documentation has them: what the input speed of this package is compared with."""

from typing import Any

import av
import numpy as np

from fewtokens.data.video import decoders
from fewtokens.data.video.records import UnreadableError, VideoInfo
from fewtokens.data.video.sampling import Plan


def read(decoder: str, path: str, plan: Plan, info: VideoInfo) -> object:
    """What a decoder's documentation says to do for some frames of a size."""
    indices, (width, height) = plan.needed(), info.size(plan.short_side)
    if decoder == "decord":
        decord = decoders.load(decoder)
        reader = decord.VideoReader(path, decord.cpu(0), width, height, num_threads=1)
        return reader.get_batch(indices).asnumpy()
    if decoder == "torchcodec":
        package = decoders.load(decoder)
        resize = [package.transforms.Resize((height, width))]
        video = package.decoders.VideoDecoder(path, num_ffmpeg_threads=1, transforms=resize)
        return video.get_frames_at(indices.tolist()).data
    return _by_pyav(path, set(indices.tolist()), width, height)


def _by_pyav(path: str, wanted: set[int], width: int, height: int) -> object:
    frames, last = [], max(wanted)
    scaled: Any = {"format": "rgb24", "width": width, "height": height, "interpolation": "BILINEAR", "threads": 1}
    with av.open(path) as container:
        stream: Any = container.streams.video[0]
        stream.codec_context.thread_count = 1
        rate, start = stream.average_rate * stream.time_base, stream.start_time or 0
        container.seek(start + int(min(wanted) / rate), stream=stream)
        for frame in container.decode(stream):
            number = round((frame.pts - start) * rate)
            if number in wanted:
                frames.append(frame.to_ndarray(**scaled))
            if number >= last:
                return np.stack(frames)
    raise UnreadableError(path, "it ends too early")
