"""`fewtokens.reduce`, `cost`, `trace` and `methods`: methods in models of the user, outside of Hydra."""

import copy
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fewtokens
from conftest import CONFIGS, ROOT, environment, run_without_type_checks
from fewtokens.backbones.encoder import EncoderLayer
from fewtokens.backbones.vit import ViT, vit
from fewtokens.errors import FewtokensError
from fewtokens.runs.config import instantiate
from fewtokens.tokenizers.base import Selector, Tokenizer
from fewtokens.tokenizers.token_learner import TokenLearner
from fewtokens.tokenizers.tome import ToMe
from test_methods import HOOKED, both_ranks, process_group

METHODS = sorted(path.stem for path in (CONFIGS / "tokenizer").glob("*.yaml"))
TINY = "vit_tiny_patch16_224"
IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def timm_model(name: str = TINY, size: int = 64, **options: Any) -> Any:
    """Return timm's own model with four blocks, concentrated attention, and the same weights every time."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, img_size=size, **{"depth": 4, "num_classes": 5, **options}).eval()
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(10)
    return model


def as_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of a model that `reduce` changed, with the names of the config route."""

    def ours(name: str) -> str:
        group, _, rest = name.partition(".")
        index, _, parameter = rest.partition(".")
        if group != "blocks":
            return f"vit.{name}"
        return f"encoder.layers.{index}.{'' if parameter.startswith('tokenizer.') else 'block.'}{parameter}"

    return {ours(name): value for name, value in state.items()}


# --- the same as the config route


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_logits_equal_those_of_the_config_route_bit_for_bit(composed, method: str) -> None:
    cfg = composed(
        "backbone=timm", f"backbone.name={TINY}", f"tokenizer={method}", "+backbone.options.depth=4",
        "data=cifar10", "data.image_size=64", "data.num_classes=5",
    )  # fmt: skip
    by_config, model = instantiate(cfg.backbone).eval(), timm_model()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    reduced = fewtokens.reduce(model, method)
    assert reduced is model
    by_config.load_state_dict(as_ours(model.state_dict()))
    assert torch.equal(model(IMAGES), by_config(IMAGES))
    after = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert before.items() <= after.items(), "the same parameters under the same names"
    assert all(re.match(r"blocks\.\d\.tokenizer\.", name) for name in after.keys() - before.keys())
    contexts = [(t.context, type(t)) for t in by_config.encoder.tokenizers]
    assert [(t.context, type(t)) for t in reduced.encoder.tokenizers] == contexts


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("deit_tiny_distilled_patch16_224", 64, {}),
        ("deit3_small_patch16_224", 64, {}),
        ("vit_small_patch14_reg4_dinov2", 56, {}),
        ("vit_tiny_r_s16_p8_224", 64, {}),
        (TINY, 64, {"global_pool": "map", "class_token": False, "reg_tokens": 2}),
        (TINY, 64, {"global_pool": "avg", "class_token": False, "pre_norm": True, "act_layer": "quick_gelu"}),
        (TINY, 64, {"dynamic_img_size": True, "global_pool": "avgmax", "drop_path_rate": 0.1}),
        (TINY, 64, {"qk_norm": True, "scale_attn_norm": True, "num_classes": 0}),
    ],
    ids=str,
)
def test_every_family_of_timm(name: str, size: int, options: dict[str, Any]) -> None:
    model = timm_model(name, size, **options)
    images = IMAGES[..., :size, :size]
    dense = model(images)
    assert torch.equal(fewtokens.reduce(model, "none")(images), dense)
    reduced = fewtokens.reduce(model, "tome", r=1)(images)
    assert reduced.shape == dense.shape
    assert not torch.equal(reduced, dense)


@torch.no_grad()
def test_arguments_and_blocks() -> None:
    model = fewtokens.reduce(timm_model(), "evit", at=(1, 2), keep_rate=(0.5, 0.25), fuse=False)
    assert [type(t).__name__ for t in model.encoder.tokenizers] == ["Tokenizer", "EViT", "EViT", "Tokenizer"]
    assert fewtokens.cost(model, IMAGES).tokens == [17, 17, 9, 3, 3]
    fewtokens.reduce(model, "token_fuser", at=2, inner="pool")
    assert type(model.encoder.tokenizers[2].inner).__name__ == "Pool"
    fewtokens.reduce(model, "token_fuser", at=2, inner=partial(TokenLearner, num_tokens=3))
    assert model.encoder.tokenizers[2].inner.num_tokens == 3
    assert not any(isinstance(tokenizer, ToMe) for tokenizer in model.encoder.tokenizers)


class Shortest(Selector):
    """A method of the user."""

    def forward(self, tokens, block):
        return block(self.keep_highest(tokens, -tokens.patches.norm(dim=2)))


def test_a_class_of_the_user() -> None:
    model = fewtokens.reduce(timm_model(), Shortest, at=[1], keep_rate=0.5)
    assert fewtokens.cost(model, IMAGES).tokens == [17, 17, 9, 9, 9]
    assert fewtokens.trace(model, IMAGES)[0].method == "Shortest"


def test_models_of_ours() -> None:
    sizes = {"image_size": 16, "patch_size": 2, "num_classes": 5, "dim": 16, "depth": 4, "heads": 2}
    model = vit(**sizes, tokenizer={"at": [], "build": Tokenizer})
    assert fewtokens.reduce(model, "tome", r=3) is model
    assert fewtokens.cost(model, IMAGES[..., :16, :16]).tokens == [65, 62, 59, 56, 53]


# --- what a script that fine-tunes a timm model does


def test_the_model_is_still_timms() -> None:
    model: Any = timm_model()
    calls: list[Any] = []
    model.blocks[1].register_forward_hook(lambda module, inputs, output: calls.append(output.x.shape[1]))
    pretrained = copy.deepcopy(model.state_dict())
    fewtokens.reduce(model, "tome", r=3)
    assert isinstance(model, VisionTransformer)
    assert isinstance(model, ViT)
    assert all(isinstance(layer, EncoderLayer) for layer in model.blocks)
    model.load_state_dict(pretrained)
    assert model.state_dict().keys() == pretrained.keys()
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)
    model.head = nn.Linear(model.num_features, 7)
    assert model(IMAGES).shape == (3, 7)
    assert calls == [11]
    model.reset_classifier(3)
    assert model.get_classifier().out_features == 3
    features = model.forward_features(IMAGES)
    assert features.shape == (3, 5, 192)
    assert torch.equal(model.forward_head(features), model(IMAGES))
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    assert sorted({group["lr_scale"] for group in groups}) == [0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0]
    fewtokens.reduce(model, "none")
    assert torch.equal(timm_copy(model)(IMAGES), model(IMAGES))


def timm_copy(model: Any) -> nn.Module:
    copied = timm_model()
    copied.reset_classifier(3)
    copied.load_state_dict(model.state_dict())
    return copied


@torch.no_grad()
def test_features_with_padding_and_pooling() -> None:
    model: Any = fewtokens.reduce(timm_model(), "ats", at="0:")
    tokens = model.encoder(model.embed(IMAGES))
    assert tokens.mask is not None, "the images keep different numbers of patches"
    features = model.forward_features(IMAGES)
    assert features[~tokens.mask].eq(0).all()
    assert torch.equal(model.forward_head(features), model(IMAGES))
    pooled: Any = fewtokens.reduce(timm_model(global_pool="avg", class_token=False), "tome", r=2)
    with pytest.raises(FewtokensError, match="represent different numbers of patches"):
        pooled.forward_features(IMAGES)
    with pytest.raises(FewtokensError, match=r"Call set_input_size before reduce\.$"):
        pooled.set_input_size((128, 128))
    for name in ("forward_intermediates", "get_intermediate_layers", "prune_intermediate_layers"):
        with pytest.raises(FewtokensError, match=r"form no feature maps\. Use fewtokens\.trace"):
            getattr(pooled, name)(IMAGES)


class Adapted(nn.Linear):
    """A linear layer with something added, as a low-rank adapter does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * x.repeat(1, 1, 3)


@torch.no_grad()
def test_adapters_in_the_attention_count_with_every_method() -> None:
    dense = timm_model()
    for block in dense.blocks:
        block.attn.qkv.__class__ = Adapted
    expected = dense(IMAGES)
    model = fewtokens.reduce(dense, "ats", at="0:", budget=1000)
    for tokenizer in model.encoder.tokenizers:
        tokenizer.sample = lambda scores, valid, probes: (valid.long().cumsum(1) - 1, valid)  # keeps all
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["token_fuser", "ats"])
def test_copies_and_pickles_are_complete(method: str) -> None:
    model: Any = fewtokens.reduce(timm_model(), method)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IMAGES), model(IMAGES))
        for parameter in other.parameters():
            nn.init.zeros_(parameter)
        other.blocks[0].mlp = nn.Identity()
        assert isinstance(other.blocks[0].block.mlp, nn.Identity)
        assert not torch.equal(other(IMAGES), model(IMAGES))


def test_type_device_and_mode_are_those_of_the_model() -> None:
    model = fewtokens.reduce(timm_model().bfloat16().eval(), "token_learner")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in model.modules())
    with torch.device("meta"):
        built = timm.create_model(TINY, img_size=64, depth=4)
    assert all(parameter.is_meta for parameter in fewtokens.reduce(built, "token_learner").parameters())


@torch.no_grad()
def test_padding_is_skipped_only_outside_of_training() -> None:
    model: Any = fewtokens.reduce(timm_model(), "ats", at=1, budget=0.5)
    shapes: list[torch.Size] = []
    model.blocks[1].mlp.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[:-1]))
    tokens = model.eval().encoder(model.embed(IMAGES))
    assert tokens.mask is not None
    assert not tokens.mask.all()
    assert shapes == [(1, int(tokens.mask.sum()))]
    model.train()(IMAGES)
    assert shapes[1:] == [tokens.x.shape[:2]]


def test_it_trains_also_with_activation_checkpointing() -> None:
    dense = timm_model()
    dense.set_grad_checkpointing()
    model: Any = fewtokens.reduce(dense.train(), "dynamic_vit")
    assert model.encoder.grad_checkpointing
    calls: list[int] = []
    model.blocks[2].register_forward_pre_hook(lambda *_: calls.append(1))
    losses = [tokenizer.loss() for tokenizer in model.encoder.tokenizers]
    assert losses == [None] * 4, "before a forward pass"
    loss = model(IMAGES).square().sum()
    losses = [tokenizer.loss() for tokenizer in model.encoder.tokenizers]
    assert [part is not None for part in losses] == [False, True, True, True]
    (loss + sum(part for part in losses if part is not None)).backward()
    assert len(calls) == 2
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.set_grad_checkpointing(False)
    assert not model.encoder.grad_checkpointing


def training_step(model: nn.Module, images: Tensor) -> Tensor:
    loss = model(images).square().mean()
    loss.backward()
    return loss.detach()


def distributed_step(rank: int, folder: str) -> None:
    """Train a method with parameters and one without under DDP and FSDP, and compare with one process."""
    with process_group(rank, folder):
        for method in ("ats", "token_learner"):
            reference: Any = fewtokens.reduce(timm_model().train(), method)
            parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(reference))
            sharded: Any = copy.deepcopy(reference)
            for block in sharded.blocks:
                fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
            fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
            halves = IMAGES[:2].chunk(2)
            losses = [training_step(reference, half) for half in halves]
            torch.testing.assert_close(training_step(parallel, halves[rank]), losses[rank])
            torch.testing.assert_close(training_step(sharded, halves[rank]), losses[rank])
            for name, parameter in reference.named_parameters():
                expected = parameter.grad / 2
                for found in (parallel.module.get_parameter(name).grad, sharded.get_parameter(name).grad.full_tensor()):
                    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=f"{method}: {name}")
            assert fewtokens.cost(parallel, IMAGES[:1]).gmacs < fewtokens.cost(parallel, IMAGES[:1]).gmacs_dense
            print(f"rank {rank}: {method}", flush=True)


@pytest.mark.skipif(HOOKED, reason="runs in a process of its own, see the last test of this part")
def test_distributed(tmp_path: Path) -> None:
    both_ranks(distributed_step, tmp_path)


@pytest.mark.skipif(HOOKED, reason="runs in a process of its own, see the next test")
@pytest.mark.parametrize("method", ["ats", "token_fuser"])
def test_compiled_and_exported(method: str) -> None:
    model = fewtokens.reduce(timm_model(), method)
    expected = model(IMAGES)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(IMAGES)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert fewtokens.cost(compiled, IMAGES).gmacs == fewtokens.cost(model, IMAGES).gmacs
    with torch.no_grad():
        program = torch.export.export(model, (IMAGES,))
        torch.testing.assert_close(program.module()(IMAGES), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow  # the layers that this reuses are compiled and distributed in every run
@pytest.mark.skipif(not HOOKED, reason="nothing to do: the tests above ran")
def test_compiled_and_distributed_without_type_checks() -> None:
    printed = run_without_type_checks(
        __file__, "-s", "-k", "test_distributed or test_compiled_and_exported or test_wrong_types"
    )
    assert all(f"rank {rank}: {method}" in printed for rank in range(2) for method in ("ats", "token_learner"))
    assert "4 passed" in printed


# --- cost and trace


def test_cost_of_an_adaptive_method() -> None:
    model: Any = fewtokens.reduce(timm_model(), "ats", at="0:")
    cost = fewtokens.cost(model, IMAGES)
    assert cost.gmacs_min < cost.gmacs < cost.gmacs_max < cost.gmacs_dense
    assert cost.params == sum(parameter.numel() for parameter in model.parameters())
    assert cost.params_method == 0
    assert [stage.num_tokens.float().mean().item() + 1 for stage in fewtokens.trace(model, IMAGES)] == pytest.approx(
        cost.tokens[1:]
    )
    assert re.fullmatch(
        r"0\.\d\d GMACs per image \(0\.\d\d to 0\.\d\d\), 0\.\d\d without the method\n"
        r"1,9\d\d,\d\d\d parameters, 0 of them of the method\ntokens: 17 [\d. ]+",
        str(cost),
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_patch_is_kept_merged_or_dropped(method: str) -> None:
    model = fewtokens.reduce(timm_model(), method)
    stages = fewtokens.trace(model, IMAGES)
    assert [stage.block for stage in stages] == [
        block for block, tokenizer in enumerate(model.encoder.tokenizers) if type(tokenizer) is not Tokenizer
    ]
    for stage in stages:
        assert stage.grid == (4, 4)
        fates = torch.stack([stage.kept, stage.merged, stage.dropped]).int()
        assert fates.shape == (3, 3, 16)
        assert fates.sum(dim=0).eq(1).all()
        assert stage.owner.eq(-1).equal(stage.dropped)
        assert (stage.owner < stage.num_tokens[:, None]).all()
        if method in ("ats", "top_k", "random_drop", "fixed_pattern"):
            assert stage.kept.sum(dim=1).equal(stage.num_tokens)
            assert not stage.merged.any()
        if method in ("tome", "token_learner"):
            assert not stage.dropped.any()
            assert stage.merged.any()


# --- the list of methods, and a light import


def test_methods_are_the_files_in_configs() -> None:
    assert list(fewtokens.methods()) == METHODS
    assert fewtokens.methods()["tome"].startswith("ToMe (Bolya et al. 2023): ")
    assert all(line.endswith(".") and not line.startswith("#") for line in fewtokens.methods().values())


def test_the_import_is_light_and_public_names_exist() -> None:
    heavy = "torch timm lightning hydra omegaconf yaml numpy matplotlib"
    program = (
        "import sys, fewtokens; "
        f"assert not (set(sys.modules) & set({heavy.split()})), sys.modules; "
        "print(*dir(fewtokens))"
    )
    run = partial(subprocess.run, capture_output=True, text=True, check=True, cwd=ROOT, env=environment())
    assert run([sys.executable, "-c", program]).stdout.split() == fewtokens.__all__
    with pytest.raises(AttributeError, match="has no attribute 'redcue'"):
        fewtokens.redcue
    assert fewtokens.FewtokensError is FewtokensError


BLOCK = r"^```python\n(.*?)^```\n\n```text\n(.*?)^```"


def test_the_code_in_the_docs_prints_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    page, names = (ROOT / "docs" / "python.md").read_text(), dict[str, Any]()
    blocks = re.findall(BLOCK, page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for code, printed in blocks:
        exec(code, names)
        assert capsys.readouterr().out == printed


# --- the package


@pytest.mark.slow
def test_an_installed_wheel_has_its_configs_and_types(tmp_path: Path) -> None:
    """The source is copied, since setuptools builds in it."""
    pytest.importorskip("setuptools", minversion="77")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("configs", "src"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    run = partial(subprocess.run, capture_output=True, text=True, check=True, cwd=tmp_path)
    run([sys.executable, "-c", "from setuptools.build_meta import build_wheel; build_wheel('.')"], env=environment())
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "installed")
    installed = environment(PYTHONPATH=str(tmp_path / "installed"))
    program = "import fewtokens; print(fewtokens.__file__); print(*fewtokens.methods())"
    place, names = run([sys.executable, "-c", program], env=installed).stdout.splitlines()
    assert place.startswith(str(tmp_path / "installed"))
    assert names.split() == METHODS
    (tmp_path / "user.py").write_text(
        "import fewtokens, timm, torch\n"
        "model = fewtokens.reduce(timm.create_model('vit'), 'tome', r=13)\n"
        "reveal_type(fewtokens.cost(model, torch.zeros(1)).gmacs)\n"
        "reveal_type(fewtokens.trace(model, torch.zeros(1))[0].kept)\n"
        "reveal_type(fewtokens.methods())\n"
    )
    command = [sys.executable, "-m", "mypy", "--ignore-missing-imports", "user.py", "--config-file", os.devnull]
    revealed = run(command, env=installed | {"MYPYPATH": ""}).stdout
    assert [line.partition('"')[2].rstrip('"') for line in revealed.splitlines() if "Revealed" in line] == [
        "float",
        "torch._tensor.Tensor",
        "dict[str, str]",
    ]


# --- errors


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


def wrong(model: Callable[[], Any], method: Any, said: str, **arguments: Any) -> Any:
    return pytest.param(model, method, arguments, said, id=f"{method} {said[:30]}")


@pytest.mark.parametrize(
    ("build", "method", "arguments", "said"),
    [
        wrong(timm_model, "tmoe", r"^`method` must be 'ats' or .*, got 'tmoe'\. Did you mean 'tome'\?$"),
        wrong(timm_model, Shortest, r"^`at` must be given for a class", keep_rate=0.5),
        wrong(timm_model, "tome", r"^`keep_rate`: tome has no .* It accepts inflection, ", keep_rate=1),
        wrong(timm_model, "evit", r"^`keep_rat`: evit has no .* Did you mean `keep_rate`\?", keep_rat=1),
        wrong(timm_model, "tome", r"^`r` must be an int or a list of ints, got '13'\.$", r="13"),
        wrong(timm_model, "tome", r"^`r` must be an int or a list of ints, got \['a'\]\.$", r=["a"]),
        wrong(timm_model, "evit", r"^`keep_rate` must be above 0 and at most 1, got 1\.5\.$", keep_rate=1.5),
        wrong(timm_model, "evit", r"^`keep_rate` must be .* of the 3 blocks in `at`, got", keep_rate=[0.5]),
        wrong(timm_model, "tome", r"^`at` must be a block index from 0 to 3, .*, got 7\.$", at=7),
        wrong(timm_model, "token_fuser", r"Did you mean 'pool'\?$", inner="poool"),
        wrong(timm_model, "token_fuser", r"^TokenFuser wraps tokenizers that make a fixed number", inner="tome"),
        *(
            wrong(
                partial(timm_model, global_pool="avg", class_token=False),
                method,
                r"scores patches by the attention of the class token, but the backbone has none\. Choose a backbone "
                r"with a class token, or a tokenizer that needs none, such as tome\.$",
            )
            for method in ("ats", "top_k", "evit")
        ),
        wrong(
            partial(timm_model, global_pool="", depth=4),
            "tome",
            r"^timm's pooling '' cannot be applied to reduced tokens\. Use a model with global_pool=token or avg",
        ),
        *(
            wrong(
                partial(on_meta, name),
                "tome",
                rf"but the model is a {kind}\. Choose another model, such as deit_small_patch16_224\.$",
            )
            for name, kind in (
                ("swin_tiny_patch4_window7_224", "SwinTransformer"),
                ("convnext_atto", "ConvNeXt"),
                ("eva02_tiny_patch14_224", "Eva"),
                ("vit_small_patch16_18x2_224", "VisionTransformer with blocks of type ParallelThingsBlock"),
            )
        ),
        wrong(lambda: torch.compile(timm_model()), "tome", r"got a OptimizedModule around it\. Call reduce first, and"),
        wrong(lambda: nn.DataParallel(timm_model()), "tome", r"got a DataParallel around it\. Call reduce first, and"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_an_error_and_changes_nothing(
    build: Callable[[], Any], method: Any, arguments: dict[str, Any], said: str
) -> None:
    model = build()
    before = type(model), list(model.modules()) if isinstance(model, nn.Module) else []
    with pytest.raises(FewtokensError, match=said):
        fewtokens.reduce(model, method, **arguments)
    assert (type(model), list(model.modules()) if before[1] else []) == before


@pytest.mark.skipif(
    HOOKED, reason="runs in a process of its own, see test_compiled_and_distributed_without_type_checks"
)
def test_wrong_types_are_an_error() -> None:
    model: Any = timm_model()
    with pytest.raises(FewtokensError, match=r"^`method` must be a name from fewtokens\.methods\(\), or a subclass of"):
        fewtokens.reduce(model, 7)  # type: ignore[arg-type]
    with pytest.raises(
        FewtokensError, match=r"^`model` must be a timm VisionTransformer, as timm\.create_model returns"
    ):
        fewtokens.reduce("deit_small_patch16_224", "tome")  # type: ignore[arg-type]
    with pytest.raises(FewtokensError, match=r"^`images` must be a tensor of .*, got \[\]\.$"):
        fewtokens.cost(fewtokens.reduce(model, "tome"), [])  # type: ignore[arg-type]
    with pytest.raises(
        FewtokensError, match=r"^`images` must be a tensor of .* on cpu, got torch\.uint8 \(3, 3, 64, 64\)"
    ):
        fewtokens.cost(model, IMAGES.byte())


def test_cost_and_trace_need_a_reduced_model_and_images() -> None:
    model = timm_model()
    for function in (fewtokens.cost, fewtokens.trace):
        with pytest.raises(
            FewtokensError, match=r'got a VisionTransformer\. For a .* fewtokens\.reduce\(model, "none"\)'
        ):
            function(model, IMAGES)
    fewtokens.reduce(model, "tome")
    for images in (IMAGES[:0], IMAGES.to("meta")):
        with pytest.raises(FewtokensError, match=r"^`images` must be a tensor of at least one normalized"):
            fewtokens.cost(model, images)
    with pytest.raises(FewtokensError, match=r"= \(B, 3, 64, 64\), got \(3, 3, 32, 32\)\. Resize the images"):
        fewtokens.trace(model, IMAGES[..., :32, :32])
