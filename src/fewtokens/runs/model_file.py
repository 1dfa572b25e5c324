"""A model as a file that runs without this package: traced by torch.export, and saved as torch's own format or as ONNX.

A tokenizer can be exported if its shapes do not depend on values. An adaptive one needs a mode with static shapes, used
while `torch.compiler.is_compiling()`, as `fewtokens.tokenizers.ats` has: it then keeps its padding.
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

from fewtokens.analysis.evaluation import evaluating
from fewtokens.errors import FewtokensError, first_line

Format = Literal["onnx", "torch_export"]
Forward = Callable[[Float[Tensor, "b c *t h w"]], Float[Tensor, "b classes"]]
SUFFIXES: dict[str, str] = {"onnx": ".onnx", "torch_export": ".pt2"}
INT32, INT64 = 6, 7  # ONNX's numbers of these types
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# Operations in which a tokenizer chooses tokens by comparing scores.
COMPARISONS = ("topk", "sort", "argsort", "argmax", "argmin", "max.dim", "min.dim", "searchsorted", "bucketize")


def check_packages(formats: list[Format]) -> None:
    """Raise an error if a package for one of the formats is missing.

    Raises:
        FewtokensError: ONNX is among the formats, and one of its packages is not installed.
    """
    for name in PACKAGES if "onnx" in formats else ():
        try:
            import_module(name)
        except ImportError as error:
            raise FewtokensError(
                f"ONNX files need {', '.join(PACKAGES)}, but there is no {name} ({error}). Install them with "
                "pip install -e '.[export]', or set export.format=torch_export."
            ) from error


@torch.no_grad()
def trace(model: nn.Module, images: Float[Tensor, "b c *t h w"], any_batch: bool) -> ExportedProgram:
    """Trace a model in evaluation mode, from images to logits.

    Args:
        model: The model, on the CPU and in float32.
        images: At least two images or clips. Only their shape matters.
        any_batch: Whether the program accepts batches of any size, or only of the size of `images`.

    Raises:
        FewtokensError: The model uses random numbers, its shapes depend on values, or it cannot be traced.
    """
    shapes = {"images": {0: Dim("batch", min=1)}} if any_batch else None
    with evaluating(model):
        once, again = model(images), model(images)  # outside of torch.export, which hides the model's own errors
        if not torch.allclose(once, again, rtol=0, atol=1e-3, equal_nan=True):
            raise FewtokensError(
                f"The logits of a second forward pass differ with {_tokenizers(model)}, but an exported file always "
                "computes the same. Choose a tokenizer without random numbers in evaluation, or with a fixed seed, as "
                "random_drop has."
            )
        try:
            program = torch.export.export(model, (torch.zeros_like(images),), dynamic_shapes=shapes)
        except Exception as error:  # torch has many types
            batch = " or set export.batch_size to a number," if any_batch else ""
            raise FewtokensError(
                f"torch.export fails with {_tokenizers(model)}: {type(error).__name__}: {first_line(error)}. Choose a "
                f"tokenizer whose shapes do not depend on values,{batch} or give it a mode with static shapes for "
                "torch.compiler.is_compiling(), as ats has."
            ) from error
    for node in _nodes(program):
        node.meta.pop("stack_trace", None)  # it contains paths of this machine
    return program


def compares_scores(program: ExportedProgram) -> bool:
    """Return whether a program chooses by comparing scores, so that rounding can change the choice."""
    operations = {str(node.target).removeprefix("aten.") for node in _nodes(program) if node.op == "call_function"}
    return any(operation.startswith(COMPARISONS) for operation in operations)


def write(program: ExportedProgram, path: Path) -> None:
    """Write a program in the format of the path's suffix.

    An ONNX file contains its weights up to 2 GB. Larger ones are in `<name>.data` beside it, as the format requires.

    Raises:
        FewtokensError: ONNX has no equivalent of an operation in the model.
    """
    if path.suffix == SUFFIXES["torch_export"]:
        torch.export.save(program, path)
        return
    for name in ("onnxscript", "onnx_ir"):  # they log every constant that they fold
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
        reason = next((line for line in str(error).splitlines() if "No ONNX function" in line), first_line(error))
        raise FewtokensError(
            f"The model contains an operation that ONNX does not have: {reason}. Set export.format=torch_export, "
            "choose another tokenizer, or add the operation to fewtokens.runs.model_file._translations."
        ) from error
    assert written is not None
    written.save(path)


def read(path: Path) -> Forward:
    """Return the function that a file computes, in onnxruntime on the CPU or in torch.

    Raises:
        FewtokensError: onnxruntime does not accept the file.
    """
    if path.suffix == SUFFIXES["torch_export"]:
        return torch.export.load(path).module()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base
        raise FewtokensError(
            f"onnxruntime does not accept the file: {first_line(error)}. Set export.format=torch_export, or choose "
            "another tokenizer."
        ) from error
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def publish(folder: Path, target: Path) -> list[Path]:
    """Move all files of a folder to the folder of `target`. Each move is atomic, and `target` itself comes last.

    Args:
        folder: A folder on the same file system, which contains a file of the target's name.
        target: Where this file goes.
    """
    names = sorted((path.name for path in folder.iterdir()), key=lambda name: name == target.name)
    for name in names:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
        (folder / name).replace(target.with_name(name))
    return [target.with_name(name) for name in names]


def _nodes(program: ExportedProgram) -> list[torch.fx.Node]:
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    return [node for graph in graphs for node in graph.nodes]


def _translations() -> dict[Callable, Callable]:
    """Return translations of operations that torch.onnx lacks (onnxscript 0.7) or onnxruntime gets wrong (1.31)."""
    from onnxscript import opset18

    op: Any = opset18  # its type hints accept tensors only, though numbers work

    def stable_sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        size = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
        # The standard requires TopK to put the lower index first among equal values, as a stable sort does.
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
            # On a CPU, ReduceMin and ReduceMax of int64 are wrong for some values of 2^31 and more.
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
