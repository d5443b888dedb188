"""A backbone with blocks, recorded at one size, does at others what it does in eager mode."""

import io

import pytest
import torch
from detectron2.modeling import build_backbone

from nl_detectron.config import build_config
from tests.export.acting import make_act, run_acting
from tests.random_model import QUICK_START

# Plain FPN, too, can't be exported by torch.export at a size whose last feature map is 1 wide.
RECORDED, *OTHERS = SIZES = [(128, 160), (160, 128), (192, 256)]


def image(size):
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(size[1]))


@pytest.fixture(scope="module")
def backbone():
    stages = "['res2','res3','res4','res5']"
    overrides = [
        *("MODEL.DEVICE", "cpu", "MODEL.NONLOCAL.BACKBONE", "build_resnet_fpn_backbone"),
        *("MODEL.RESNETS.OUT_FEATURES", stages, "MODEL.FPN.IN_FEATURES", stages),
        *("MODEL.NONLOCAL.AFTER_BLOCKS_PER_STAGE", "[[],[],[0],[]]"),
    ]
    cfg = build_config(QUICK_START, overrides)
    torch.manual_seed(1)
    return make_act(build_backbone(cfg)).eval()


def assert_same(recorded, backbone, sizes):
    for size in sizes:
        expected = run_acting(backbone, image(size))
        with torch.no_grad():
            features = recorded(image(size))
        assert list(features) == list(expected) == ["p2", "p3", "p4", "p5", "p6"]
        for name in expected:
            torch.testing.assert_close(features[name], expected[name], rtol=1e-4, atol=1e-4)


def test_torchscript(backbone):
    recorded = torch.jit.trace(backbone, image(RECORDED), strict=False, check_trace=False)
    file = io.BytesIO()
    torch.jit.save(recorded, file)
    file.seek(0)
    assert_same(torch.jit.load(file), backbone, SIZES)


@pytest.mark.slow
def test_torch_export_and_onnx(backbone, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    sizes = {
        2: 32 * torch.export.Dim("height", min=3, max=64),
        3: 32 * torch.export.Dim("width", min=3, max=64),
    }
    program = torch.export.export(backbone, (image(RECORDED),), dynamic_shapes=(sizes,))
    assert_same(program.module(), backbone, SIZES)

    file = str(tmp_path / "backbone.onnx")
    names = ["p2", "p3", "p4", "p5", "p6"]
    torch.onnx.export(program, (), file, dynamo=True, output_names=names, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (input_name,) = (x.name for x in session.get_inputs())

    def run(x):
        features = session.run(names, {input_name: x.numpy()})
        return dict(zip(names, map(torch.from_numpy, features)))

    assert_same(run, backbone, OTHERS)


@pytest.mark.slow
def test_compiles_without_graph_breaks(backbone):
    torch.compiler.reset()
    # A graph break is an error with fullgraph.
    compiled = torch.compile(backbone, fullgraph=True, dynamic=True, backend="eager")
    assert_same(compiled, backbone, OTHERS)
