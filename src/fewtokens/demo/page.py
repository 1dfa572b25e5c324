"""The page of the demo: Gradio's components around `Predictor`, and the limits on what a visitor may send."""

import base64
import html
import io
import os
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import asdict
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from PIL import Image

from fewtokens.demo.images import read_picture
from fewtokens.demo.inference import TOP, Predictor, Result, Side
from fewtokens.demo.methods import DEFAULT_BUDGET, Method
from fewtokens.errors import FewtokensError

# Gradio reads these when it is imported: no usage statistics, no questions to other servers.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
import gradio as gr
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

# The browser loads nothing from other hosts. Gradio's own page needs inline scripts.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'"
)
SMALL = 64  # pixels; pictures up to this size are shown with square pixels
CSS = """
.gradio-container {max-width: 1180px !important; margin: auto}
#numbers table {width: 100%; border: 0 !important; border-collapse: collapse; font-variant-numeric: tabular-nums}
#numbers th, #numbers td {padding: 4px 10px 4px 0 !important; text-align: left; border: 0 !important;
  border-bottom: 1px solid var(--border-color-primary) !important}
#numbers tr {border: 0 !important}
#numbers th {font-weight: 600}
#numbers .bars {display: flex; align-items: flex-end; gap: 3px; height: 72px; margin-top: 14px}
#numbers .bars span {flex: 1; max-width: 40px; background: var(--border-color-primary); display: flex;
  align-items: flex-end; border-radius: 3px 3px 0 0}
#numbers .bars i {display: block; width: 100%; background: var(--color-accent); border-radius: 3px 3px 0 0}
#examples, #examples .grid-wrap, #stages, #stages .grid-wrap {height: auto !important; min-height: 0 !important}
#examples .grid-container {grid-template-columns: repeat(6, minmax(0, 1fr)) !important;
  grid-template-rows: auto !important; grid-auto-rows: auto !important; height: auto !important}
#examples .gallery-item, #examples button {min-width: 0 !important; width: 100%; height: auto !important;
  aspect-ratio: 1}
#stages .caption-label {position: static; display: block; max-width: none; width: 100%; border: 0; text-align: center;
  font-size: var(--text-sm); overflow: visible; white-space: normal; background: none; padding: 2px 0}
#stages .thumbnail-lg, #stages .gallery-item {aspect-ratio: auto; height: auto}
#stages .grid-container {grid-template-columns: repeat(auto-fill, minmax(min(170px, 40%), 1fr)) !important}
#legend p {margin: 2px 0} #legend img {display: inline-block; height: 1em; margin: 0 .5em 0 0; vertical-align: -.1em}
#numbers p {margin: 4px 0; font-size: var(--text-sm); color: var(--body-text-color-subdued)}
"""
PIXELATED = """
#picture img, #examples img {image-rendering: pixelated}
#picture img {width: 100% !important; height: 100% !important; object-fit: contain !important}
"""
Messages = MutableMapping[str, Any]
# Of events that only change the page: they need no model, and no place in its queue.
QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}


class Guard:
    """ASGI middleware that refuses requests with a large body, and keeps the page from loading from other hosts.

    Args:
        app: The application.
        max_bytes: Largest body in bytes.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(
        self,
        scope: Messages,
        receive: Callable[[], Awaitable[Messages]],
        send: Callable[[Messages], Awaitable[None]],
    ) -> None:
        """Answer a request."""
        received = 0

        async def counted() -> Messages:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise HTTPException(413, f"A request may have at most {self.max_bytes} bytes.")
            return message

        async def guarded(message: Messages) -> None:
            if message["type"] == "http.response.start":
                more = {"content-security-policy": POLICY, "referrer-policy": "no-referrer"}
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in more.items())]
            await send(message)

        await self.app(scope, counted, guarded) if scope["type"] == "http" else await self.app(scope, receive, send)


def serve(cfg: DictConfig, predictor: Predictor, pictures: list[Image.Image], about: str) -> None:
    """Serve the page until Ctrl-C. Uploads are kept in a temporary folder, which is removed at the end.

    Args:
        cfg: The composed config, see configs/demo.yaml.
        predictor: The model.
        pictures: The examples.
        about: A description of the model.

    Raises:
        FewtokensError: The port is taken.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the context below, as Ctrl-C does
    with tempfile.TemporaryDirectory(prefix="fewtokens-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build(predictor, pictures, about, cfg.max_megapixels, cfg.max_waiting)
        launch(page, cfg.host, cfg.port, cfg.max_megabytes)
        print(f"The demo is at http://{cfg.host}:{cfg.port} until Ctrl-C.", flush=True)
        try:
            page.block_thread()
        finally:
            page.close(verbose=False)


def launch(page: gr.Blocks, host: str, port: int | None, max_megabytes: float | int) -> None:
    """Start the server in a thread.

    Args:
        page: The page.
        host: The address to listen on. If it is this machine only, requests for other names are refused, so that a page
            elsewhere cannot reach the demo through a name that it points to this machine.
        port: The port, or None for a free one.
        max_megabytes: Largest size of an uploaded file.

    Raises:
        FewtokensError: The port is taken.
    """
    max_bytes = round(max_megabytes * 2**20)
    middleware = [Middleware(Guard, max_bytes=2 * max_bytes + 2**20)]
    if _is_loopback(host):
        middleware.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"]))
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            allowed_paths=[],
            blocked_paths=[str(Path.cwd()), str(Path.home())],
            max_file_size=max_bytes,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            footer_links=[],
            theme=gr.themes.Default(**fonts),
            css=page.fewtokens_css,
            app_kwargs={"middleware": middleware, "docs_url": None, "redoc_url": None, "openapi_url": None},
        )
    except OSError as error:
        raise FewtokensError(f"The demo cannot listen on {host}:{port}. Set a free port with port=<number>.") from error


def build(
    predictor: Predictor,
    pictures: list[Image.Image],
    about: str,
    max_megapixels: float | int = 25,
    max_waiting: int = 20,
) -> gr.Blocks:
    """Return the page.

    Args:
        predictor: The model.
        pictures: The examples.
        about: A description of the model.
        max_megapixels: Largest number of pixels of a picture, in millions.
        max_waiting: Largest number of waiting calls. One runs at a time.
    """
    found, small = predictor.methods.found, max(predictor.model.sample_shape[1:]) <= SMALL
    with gr.Blocks(title="fewtokens", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# fewtokens\nWhich tokens does a vision transformer need? {about}.")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture = _picture_input(pictures, max_megapixels)
                method, budget = _method_inputs(found)
            with gr.Column(scale=3, min_width=320):
                prediction = _prediction_outputs(predictor.names is not None)
        stages = _stage_outputs()
        if predictor.methods.skipped:
            with gr.Accordion("Methods that this model cannot show", open=False):
                gr.Markdown("\n".join(f"- `{name}`: {why}" for name, why in predictor.methods.skipped.items()))
        gr.on(
            [page.load, picture.change, method.change, budget.release],
            partial(_answer, predictor),
            inputs=[picture, method, budget],
            outputs=[*prediction, *stages],
            api_name="predict",
            concurrency_limit=1,
            trigger_mode="always_last",
            show_progress="minimal",
        )
    page.queue(max_size=max_waiting, api_open=False)
    page.fewtokens_css = CSS + (PIXELATED if small else "")
    return page


def _picture_input(pictures: list[Image.Image], max_megapixels: float | int) -> gr.Image:
    """Add the picture, and the examples that can be put in its place."""
    picture = gr.Image(
        pictures[0] if pictures else None,
        label="Picture",
        format="png",
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        height=260,
        buttons=[],
        elem_id="picture",
    )
    # Gradio would decode it before its size is known to be acceptable.
    setattr(picture, "preprocess", partial(_uploaded, max_megapixels))  # noqa: B010
    examples = gr.Gallery(
        pictures,
        label="Examples",
        show_label=False,
        format="png",
        columns=6,
        height="auto",
        allow_preview=False,
        interactive=False,
        buttons=[],
        object_fit="cover",
        elem_id="examples",
    )

    def chosen(event: gr.SelectData) -> Image.Image:  # Gradio finds the event by its type, but not in a partial
        return pictures[event.index]

    examples.select(chosen, outputs=picture, **QUIET)
    return picture


def _method_inputs(found: Mapping[str, Method]) -> tuple[gr.Dropdown, gr.Slider]:
    """Add the choice of the method, and its budget, which methods without one ignore."""
    first = next(iter(found))
    method = gr.Dropdown(list(found), value=first, label="Method", filterable=False)
    title = gr.Markdown(found[first].title)
    budget = gr.Slider(
        0.05,
        1.0,
        value=DEFAULT_BUDGET,
        step=0.05,
        label="Budget",
        info="Share of the patches that is left after the last block",
        buttons=[],
        interactive=found[first].argument is not None,
    )

    def describe(name: str) -> tuple[str, Any]:
        return found[name].title, gr.update(interactive=found[name].argument is not None)

    method.change(describe, inputs=method, outputs=[title, budget], **QUIET)
    return method, budget


def _prediction_outputs(has_classes: bool) -> list[gr.components.Component]:
    """Add the setting, both predictions, and the numbers."""
    setting = gr.Markdown()
    with gr.Row(visible=has_classes):
        top = gr.Label(label="With the method", num_top_classes=TOP, min_width=200)
        dense = gr.Label(label="With all tokens", num_top_classes=TOP, min_width=200)
    return [setting, top, dense, gr.HTML(elem_id="numbers")]


def _stage_outputs() -> list[gr.components.Component]:
    """Add the pictures of the tokens at every stage, their legend, and the numbers as data."""
    stages = gr.Gallery(
        label="Tokens",
        format="png",
        columns=5,
        height="auto",
        object_fit="contain",
        interactive=False,
        buttons=["fullscreen"],
        elem_id="stages",
    )
    legend = gr.HTML(elem_id="legend")
    with gr.Accordion("The numbers as data", open=False):
        record = gr.JSON(show_label=False)
    return [stages, legend, record]


def numbers_table(result: Result) -> str:
    """Return the table of an answer, and the tokens after every block as bars, as HTML."""
    reduced, dense = result.reduced, result.dense
    rows = [
        (
            "Tokens after the last block",
            reduced.tokens[-1],
            dense.tokens[-1],
            _share(reduced.tokens[-1], dense.tokens[-1]),
        ),
        ("GMACs", f"{reduced.gmacs:.3g}", f"{dense.gmacs:.3g}", _share(reduced.gmacs, dense.gmacs)),
        (
            "Milliseconds, one picture",
            f"{reduced.milliseconds:.3g}",
            f"{dense.milliseconds:.3g}",
            f"{dense.milliseconds / reduced.milliseconds:.2f} times as fast",
        ),
    ]
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    bars = "".join(
        f'<span style="height:{100 * full / max(dense.tokens):.0f}%" title="block {block}: {left} of {full} tokens">'
        f'<i style="height:{100 * left / full:.0f}%"></i></span>'
        for block, (left, full) in enumerate(zip(reduced.tokens[1:], dense.tokens[1:], strict=True))
    )
    left = ", ".join(map(str, reduced.tokens[1:]))
    return (
        f"<table><tr><th></th><th>with the method</th><th>all tokens</th><th></th></tr>{cells}</table>"
        f'<div class="bars">{bars}</div><p>Tokens after every block: {left}. Class and register tokens are counted.</p>'
    )


def legend_html(result: Result) -> str:
    """Return the legend of the stages, with a swatch of each color, as HTML."""
    return "".join(f"<p>{_swatch(swatch)}{html.escape(text)}</p>" for text, swatch in result.legend)


def _swatch(picture: Image.Image | None) -> str:
    if picture is None:
        return ""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _answer(predictor: Predictor, picture: Image.Image | None, method: str, budget: float | int) -> Any:
    """Return the values of all outputs for a picture."""
    if picture is None:
        return [gr.skip()] * 7
    try:
        result = predictor.predict(picture, method, budget)
    except FewtokensError as error:
        raise gr.Error(str(error), print_exception=False) from error
    record = {name: asdict(side) for name, side in (("reduced", result.reduced), ("dense", result.dense))}
    unknown = "" if predictor.names else " The weights have no trained head, so that nothing is predicted."
    return [
        f"`{result.setting}`{unknown}",
        _label(result.reduced),
        _label(result.dense),
        numbers_table(result),
        result.stages,
        legend_html(result),
        {"setting": result.setting, **record},
    ]


def _label(side: Side) -> dict[str, float] | None:
    return dict(side.top) or None


def _uploaded(max_megapixels: float | int, payload: Any) -> Image.Image | None:
    """Return an uploaded picture. Gradio has checked before that the file is an upload."""
    if payload is None:
        return None
    if not payload.path:
        raise gr.Error("Upload the picture as a file.", print_exception=False)
    try:
        return read_picture(Path(payload.path), max_megapixels)
    except FewtokensError as error:
        raise gr.Error(str(error), print_exception=False) from error


def _share(part: float | int, whole: float | int) -> str:
    return f"{part / whole:.0%}"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
