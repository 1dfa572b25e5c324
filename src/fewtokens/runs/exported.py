"""A model as a file that runs without this package: one graph by torch.export, kept as torch's own file or as ONNX.

A tokenizer is exported where its shapes depend on no values. An adaptive one needs a static-shape mode that
`torch.compiler.is_compiling()` switches on, as that of `fewtokens.tokenizers.ats` does: its padding then stays.
"""

import logging
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fewtokens.analysis.cost import evaluating
from fewtokens.errors import FewtokensError

Format = Literal["onnx", "torch_export"]
Forward = Callable[[Float[Tensor, "b c *t h w"]], Float[Tensor, "b classes"]]
SUFFIXES: dict[str, str] = {"onnx": ".onnx", "torch_export": ".pt2"}
INT32, INT64 = 6, 7  # of ONNX
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_packages(formats: list[Format]) -> None:
    """Refuse what cannot be written here, before anything is computed.

    Raises:
        FewtokensError: ONNX is asked for, and one of its packages is not installed.
    """
    for name in PACKAGES if "onnx" in formats else ():
        try:
            import_module(name)
        except ImportError as error:
            raise FewtokensError(
                "ONNX files are written and checked by packages of the extra `export`",
                expected=", ".join(PACKAGES),
                got=f"no {name} ({error})",
                fix="pip install -e '.[export]', or set export.format=torch_export",
            ) from error


@torch.no_grad()
def trace(model: nn.Module, images: Float[Tensor, "b c *t h w"], any_batch: bool) -> ExportedProgram:
    """The model in evaluation mode as one graph, images to logits.

    Args:
        model: On the CPU, in float32.
        images: Or clips, of the right size, at least two; their values are of no consequence, none goes into the graph.
        any_batch: Whether the graph takes batches of any size, or only of the size of `images`.

    Raises:
        FewtokensError: The model draws random numbers, shapes depend on values, or else it cannot be traced.
    """
    shapes = {"images": {0: Dim("batch", min=1)}} if any_batch else None
    with evaluating(model):
        once, again = model(images), model(images)  # and what the model refuses, it says best itself
        if not torch.allclose(once, again, rtol=0, atol=1e-3, equal_nan=True):
            raise FewtokensError(
                "A file computes the same each time",
                expected="a tokenizer that draws nothing in evaluation, or what it draws from a seed, as random_drop",
                got=f"{_tokenizers(model)}, which gives other logits the second time",
                fix="take another tokenizer, or let this one compute what it draws from a seed",
            )
        try:
            program = torch.export.export(model, (torch.zeros_like(images),), dynamic_shapes=shapes)
        except Exception as error:  # torch has many
            raise FewtokensError(
                "torch.export takes a model whose shapes depend on no values",
                expected="tokenizers with fixed shapes, or with a static-shape mode, as tokenizer=ats has",
                got=f"{_tokenizers(model)}, where it stops with {type(error).__name__}: {_first_line(error)}",
                fix="take another tokenizer, or give this one fixed shapes while torch.compiler.is_compiling()"
                + (", or set export.batch_size to a number" if any_batch else ""),
            ) from error
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def write(program: ExportedProgram, path: Path) -> None:
    """Write the graph, as ONNX or as torch's own file, by the suffix of the path.

    An ONNX file is whole by itself up to 2 GB; beyond, as the format wants it, the weights lie in `<name>.data`.

    Raises:
        FewtokensError: ONNX cannot express an operation of the model.
    """
    if path.suffix == SUFFIXES["torch_export"]:
        torch.export.save(program, path)
        return
    for name in ("onnxscript", "onnx_ir"):  # they tell of each constant that they fold or do not fold
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        written = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            custom_translation_table=_translations(),
        )
    except torch.onnx.OnnxExporterError as error:
        reason = next((line for line in str(error).splitlines() if "No ONNX function" in line), _first_line(error))
        raise FewtokensError(
            "ONNX has a fixed set of operations",
            expected="a model whose operations torch.onnx translates",
            got=reason,
            fix="set export.format=torch_export, take another tokenizer, or add the operation to "
            "fewtokens.runs.exported._translations",
        ) from error
    assert written is not None
    written.save(path)


def read(path: Path) -> Forward:
    """What a file computes: ONNX in onnxruntime on the CPU, torch's own file in torch.

    Raises:
        FewtokensError: onnxruntime does not take the file.
    """
    if path.suffix == SUFFIXES["torch_export"]:
        return torch.export.load(path).module()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base
        raise FewtokensError(
            "onnxruntime runs the ONNX file",
            expected="operations and types that it has kernels for",
            got=_first_line(error),
            fix="set export.format=torch_export, or take another tokenizer",
        ) from error
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def publish(folder: Path, target: Path) -> list[Path]:
    """Move what lies in a folder to where the target is to be, the target itself last; each move is atomic.

    Args:
        folder: On the same file system; holds a file of the target's name.
        target: The file; others come to lie beside it.
    """
    names = sorted((path.name for path in folder.iterdir()), key=lambda name: name == target.name)
    for name in names:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
        (folder / name).replace(target.with_name(name))
    return [target.with_name(name) for name in names]


def _translations() -> dict[Callable, Callable]:
    """Operations that torch.onnx lacks (onnxscript 0.7) or onnxruntime gets wrong (1.31), built from others of ONNX."""
    from onnxscript import opset18

    op: Any = opset18  # its types know tensors only, and Python's numbers will do

    def stable_sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        size = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
        # The standard lets TopK put the lower index first among equals, which makes it a stable sort.
        return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)

    def searchsorted(
        levels: Any, x: Any, out_int32: bool = False, right: bool = False, side: str | None = None, sorter: Any = None
    ) -> Any:
        assert sorter is None
        less = op.LessOrEqual if right or side == "right" else op.Less
        below = less(op.Unsqueeze(levels, [-2]), op.Unsqueeze(x, [-1]))
        return op.ReduceSum(op.Cast(below, to=INT32 if out_int32 else INT64), [-1], keepdims=0)

    def extreme(largest: int, reduce: Any) -> Callable:
        def build(x: Any, dim: list[int], keepdim: bool = False) -> Any:
            if x.dtype != INT64 or len(dim) != 1:
                return reduce(x, dim, keepdims=int(keepdim))
            # ReduceMin and ReduceMax of int64 are wrong, on a CPU, for some values of 2^31 and more.
            found, _ = op.TopK(x, op.Constant(value_ints=[1]), axis=dim[0], largest=largest, sorted=1)
            return found if keepdim else op.Squeeze(found, dim)

        return build

    aten = torch.ops.aten
    return {
        aten.sort.stable: stable_sort,
        aten.searchsorted.Tensor: searchsorted,
        aten.amin.default: extreme(0, op.ReduceMin),
        aten.amax.default: extreme(1, op.ReduceMax),
    }


def _tokenizers(model: nn.Module) -> str:
    encoder: Any = getattr(model, "encoder", None)
    names = {type(tokenizer).__name__ for tokenizer in getattr(encoder, "tokenizers", ())}
    return ", ".join(sorted(names - {"Tokenizer"})) or type(model).__name__


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
