"""A block, recorded at one size, does at others what it does in eager mode."""

import io
import itertools
import shutil

import pytest
import torch

from nl_detectron import GlobalContextBlock
from nl_detectron.layers import PAIRWISE, SUBSAMPLE
from tests.export.acting import make_acting_block, run_acting

C = 8
GRIDS = {1: [(30,), (17,), (41,)], 2: [(8, 6), (13, 10), (5, 12)], 3: [(2, 4, 6), (3, 7, 8)]}
RECORDED, *OTHERS = GRIDS[2]
GLOBAL_CONTEXT = {"block_class": GlobalContextBlock, "reduction": 2}
# Exporting and compiling take seconds: each pairwise function and each subsampling once.
VARIANTS = [
    {"pairwise": "gaussian", "subsample": "none"},
    {"pairwise": "dot_product", "subsample": "input"},
    {"pairwise": "concatenation", "subsample": "embeddings"},
    {"pairwise": "embedded_gaussian", "subsample": "pyramid"},
    {"pairwise": "disentangled", "subsample": "none"},
    GLOBAL_CONTEXT,
]


def image(grid, batch=2):
    return torch.randn(batch, C, *grid, generator=torch.Generator().manual_seed(sum(grid)))


def assert_same(recorded, block, grids):
    for grid in grids:
        expected = run_acting(block, image(grid))
        torch.testing.assert_close(recorded(image(grid)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        *({"pairwise": f, "subsample": s} for f, s in itertools.product(PAIRWISE, SUBSAMPLE)),
        GLOBAL_CONTEXT,
    ],
    ids=str,
)
@pytest.mark.parametrize("dims", GRIDS)
def test_torchscript(dims, options):
    block = make_acting_block(C, dims=dims, **options).eval()
    recorded = torch.jit.trace(block, image(GRIDS[dims][0]), check_trace=False)
    file = io.BytesIO()
    torch.jit.save(recorded, file)
    file.seek(0)
    assert_same(torch.jit.load(file), block, GRIDS[dims])


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "GN", "LN", ""])
def test_trace_with_norm(norm):
    block = make_acting_block(32, norm=norm).eval()
    traced = torch.jit.trace(block, torch.randn(2, 32, 5, 5), check_trace=False)
    x = torch.randn(2, 32, 4, 6)
    torch.testing.assert_close(traced(x), run_acting(block, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_trace_of_half_precision(options, dtype):
    block = make_acting_block(C, **options).eval().to(dtype)
    traced = torch.jit.trace(block, image(RECORDED).to(dtype), check_trace=False)
    x = image(OTHERS[0]).to(dtype)
    torch.testing.assert_close(traced(x), block(x), rtol=0.02, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_torch_export_and_onnx(options, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    block = make_acting_block(C, **options).eval()
    # Sizes of which half is 1 are a case of their own for torch.export.
    sizes = {
        2: torch.export.Dim("height", min=4, max=2048),
        3: torch.export.Dim("width", min=4, max=2048),
    }
    program = torch.export.export(block, (image(RECORDED),), dynamic_shapes=(sizes,))
    assert_same(program.module(), block, GRIDS[2])

    file = str(tmp_path / "block.onnx")
    torch.onnx.export(program, (), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (name,) = (x.name for x in session.get_inputs())
    assert_same(lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), block, OTHERS)


@pytest.mark.slow
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_compiles_without_graph_breaks_with_its_gradients(options):
    torch.compiler.reset()
    block = make_acting_block(C, **options)
    # A graph break is an error with fullgraph.
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for grid in (RECORDED, OTHERS[0]):
        expected = forward_and_backward(block, image(grid))
        torch.testing.assert_close(
            forward_and_backward(compiled, image(grid)), expected, rtol=1e-4, atol=1e-4
        )


def forward_and_backward(block, x):
    x.requires_grad_()
    z = block(x)
    return z, torch.autograd.grad(z.square().mean(), [x, *block.parameters()])


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_inductor():
    torch.compiler.reset()
    block = make_acting_block(C, pairwise="concatenation").eval()
    x = image(RECORDED)
    with torch.no_grad():
        z = torch.compile(block, fullgraph=True)(x)
    torch.testing.assert_close(z, run_acting(block, x), rtol=1e-4, atol=1e-4)
