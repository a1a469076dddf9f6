"""The operator inside PyTorch: registration, compilation, autocast, threads, processes, the choice of backend."""

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from deform3d import DeformConv3d, _dispatch, deform_conv3d
from tolerances import assert_near

LAYERS = [{"channels": 6}, {"channels": 4, "out_channels": 6, "groups": 2, "offset_groups": 2}]


def arguments(p, backend):
    convolution = [list(p.options[name]) for name in ("stride", "padding", "dilation")]
    return p.input, p.offset, p.weight, p.bias, p.mask, *convolution, backend


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck_forward(make_problem, backend, layer, optional, channels_last):
    p = make_problem(**layer, batch=2, bias=optional, mask=optional)
    if channels_last:
        p = p.map(lambda t: t.contiguous(memory_format=torch.channels_last_3d) if t.dim() == 5 else t)
    p = p.map(lambda t: t.detach().requires_grad_())
    torch.library.opcheck(torch.ops.deform3d.deform_conv3d.default, arguments(p, backend))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("needs", [[True] * 5, [True, False, False, False, False], [False, True, True, True, False]])
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck_backward(make_problem, backend, layer, needs, channels_last):
    p = make_problem(**layer, batch=2)
    if channels_last:
        p = p.map(lambda t: t.contiguous(memory_format=torch.channels_last_3d) if t.dim() == 5 else t)
    grad = torch.randn_like(p.run(backend=backend))
    input, offset, weight, _, mask, *rest = arguments(p, backend)
    torch.library.opcheck(
        torch.ops.deform3d.deform_conv3d_backward.default, (grad, input, offset, weight, mask, *rest, needs)
    )


class Block(torch.nn.Module):
    """A convolution that makes offsets, then the deformable convolution, as in a network."""

    def __init__(self, backend):
        super().__init__()
        self.offset = torch.nn.Conv3d(6, 81, 1)
        self.sample = DeformConv3d(6, 6, 3, padding=1, groups=6, backend=backend)

    def forward(self, x):
        return F.gelu(self.sample(x, self.offset(x))) + x


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_compile(backend, device, dynamic, memory_format):
    torch._dynamo.reset()
    block = Block(backend).to(device, torch.float64)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for size in ((4, 5, 6), (5, 4, 7)):
        x = torch.randn(2, 6, *size, device=device, dtype=torch.float64)
        x = x.contiguous(memory_format=memory_format).requires_grad_()
        results = [(run(x), *torch.autograd.grad(run(x).sum(), [x, *block.parameters()])) for run in (block, compiled)]
        for actual, expected in zip(*reversed(results), strict=True):
            torch.testing.assert_close(actual, expected)
            assert actual.stride() == expected.stride()


def test_compiled_shape_error_is_readable(backend, device):
    def run(x, offset, weight):
        return deform_conv3d(x, offset, weight, padding=1, backend=backend)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"offset: got shape .*expected \(1, 81, 4, 4, 4\)"):
        compiled(*(torch.zeros(s, device=device) for s in ((1, 2, 4, 4, 4), (1, 81, 4, 4, 5), (2, 1, 3, 3, 3))))


def test_fake_tensors_compute_nothing(backend, make_problem):
    from torch._subclasses.fake_tensor import FakeTensorMode

    p = make_problem()
    expected = p.run(backend=backend)
    with FakeTensorMode() as mode:
        fake = p.map(mode.from_tensor).run(backend=backend)
    assert fake.shape == expected.shape
    assert fake.stride() == expected.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(make_problem, backend, device, dtype):
    """Half input and offsets, as from convolutions under autocast, meet float32 parameters."""
    p = make_problem(dtype=torch.float32)
    mixed = replace(p, input=p.input.to(dtype), offset=p.offset.to(dtype), mask=p.mask.to(dtype))
    rounded = replace(p, input=mixed.input.float(), offset=mixed.offset.float(), mask=mixed.mask.float())
    with torch.autocast(torch.device(device).type, dtype=dtype):
        output = mixed.run(backend=backend)
        gradients = mixed.run_with_gradients(backend=backend)
        whole = p.run(backend=backend)
    assert output.dtype == dtype
    assert whole.dtype == torch.float32
    assert torch.equal(output, rounded.run(backend=backend).to(dtype))
    assert torch.equal(whole, p.run(backend=backend))
    for name, tensor in mixed.tensors().items():
        assert gradients[name].dtype == tensor.dtype
    expected = mixed.oracle().run_with_gradients(backend="reference")
    for name in expected:
        assert_near(gradients[name], expected[name], name)


def test_autocast_network_trains(backend, device):
    block = Block(backend).to(device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        block(torch.randn(1, 6, 4, 5, 6, device=device)).square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in block.parameters())


class Named(TorchDispatchMode):
    """A mode that lists the called operators of this package."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "deform3d":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


def test_mode_sees_forward_and_backward(make_problem, backend):
    """Eager calls bypass the dispatcher only if nothing observes them."""
    p = make_problem().map(lambda t: t.requires_grad_())
    with Named() as mode:
        p.run(backend=backend).sum().backward()
    assert mode.names == ["deform_conv3d", "deform_conv3d_backward"]
    output = p.run(backend=backend).sum()
    with Named() as mode:
        output.backward()
    assert mode.names == ["deform_conv3d_backward"]


def test_profile_names_forward_and_backward(make_problem, backend):
    p = make_problem().map(lambda t: t.requires_grad_())
    with torch.profiler.profile() as profile:
        p.run(backend=backend).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"deform3d::deform_conv3d", "deform3d::deform_conv3d_backward"} <= names


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_several_gradients_at_once(make_problem, backend):
    """`vmap` over the backward, as in `torch.autograd.functional.jacobian(vectorize=True)`, runs one after another."""
    p = make_problem().map(lambda t: t.requires_grad_())
    inputs = list(p.tensors().values())
    output = p.run(backend=backend)
    directions = torch.randn(2, *output.shape, dtype=output.dtype, device=output.device)
    together = torch.autograd.grad(output, inputs, directions, retain_graph=True, is_grads_batched=True)
    for i, direction in enumerate(directions):
        alone = torch.autograd.grad(output, inputs, direction, retain_graph=True)
        for one, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(one[i], expected, rtol=1e-9, atol=1e-9)


def test_several_python_threads_at_once(make_problem, backend):
    """The server infers from several threads, and each call uses several itself."""
    torch.set_num_threads(2)
    problems = [make_problem(channels=channels, size=(7, 9, 8), stride=(1, 1, 1)) for channels in (17, 33, 48, 6)]
    expected = [p.run_with_gradients(backend=backend) for p in problems]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for results, wanted in zip(
                pool.map(lambda p: p.run_with_gradients(backend=backend), problems), expected, strict=True
            ):
                for name, value in wanted.items():
                    torch.testing.assert_close(results[name], value, rtol=1e-12, atol=1e-12)


FORKED = """
import os, sys, torch
from deform3d import deform_conv3d
torch.set_num_threads(2)
arguments = torch.randn(1, 16, 9, 9, 9), torch.randn(1, 81, 9, 9, 9), torch.randn(16, 1, 3, 3, 3)
def run():
    return deform_conv3d(*arguments, padding=1, backend="cpu")
expected = run()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(run(), expected) else 3)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status) or not torch.equal(run(), expected))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_a_fork():
    """A child that is forked after the parent has started threads computes, too."""
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=120)


def test_import_loads_no_backend():
    code = "import sys, deform3d; print(*{'numba', 'cupy', 'monai', 'llvmlite'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert loaded.stdout.strip() == ""


@pytest.mark.parametrize("folder", ["/proc/none", ""])
def test_without_a_writable_cache_folder(folder):
    """Numba cannot cache without a writable folder; the backend then compiles for this process alone."""
    code = (
        "import torch\nfrom deform3d import deform_conv3d\n"
        "print(deform_conv3d(torch.ones(1, 1, 1, 1, 1), torch.zeros(1, 3, 1, 1, 1), torch.ones(1, 1, 1, 1, 1),"
        " backend='cpu').item())"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": folder, "NUMBA_CACHE_LOCATOR_CLASSES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.stdout.strip() == "1.0"


@pytest.fixture
def fresh_choice(monkeypatch):
    """Forget earlier choices, and any override in the environment of the test run."""
    monkeypatch.delenv(_dispatch.ENVIRONMENT, raising=False)
    for cached in (_dispatch._choose, _dispatch._warn_of_fallback):
        cached.cache_clear()
    yield monkeypatch
    for cached in (_dispatch._choose, _dispatch._warn_of_fallback):
        cached.cache_clear()


def test_choice_is_logged_with_its_reason(fresh_choice, caplog):
    with caplog.at_level(logging.INFO, logger="deform3d"):
        assert _dispatch.choose_backend(torch.device("cpu"), torch.float32) == "cpu"
        assert _dispatch.choose_backend(torch.device("cpu"), torch.float32) == "cpu"
    (record,) = caplog.records
    assert "backend 'cpu': CPU tensors, and Numba works" in record.getMessage()


def test_environment_overrides(fresh_choice, make_problem, caplog):
    fresh_choice.setenv("DEFORM3D_BACKEND", "reference")
    with caplog.at_level(logging.INFO, logger="deform3d"):
        make_problem().run()
    assert "backend 'reference': asked for by DEFORM3D_BACKEND" in caplog.text
    fresh_choice.setenv("DEFORM3D_BACKEND", "fastest")
    with pytest.raises(ValueError, match="DEFORM3D_BACKEND: got 'fastest', expected one of 'cpu', 'cuda', 'reference'"):
        make_problem().run()
    assert _dispatch.choose_backend(torch.device("cpu"), torch.float32, "cpu") == "cpu"


def test_backend_that_cannot_run(fresh_choice, make_problem):
    with pytest.raises(RuntimeError, match=r"backend: got 'cuda', which cannot run.*needs CUDA tensors, got cpu"):
        make_problem().map(torch.Tensor.cpu).run(backend="cuda")
    with pytest.raises(RuntimeError, match=r"backend: got 'cpu', which cannot run.*needs CPU tensors, got cuda"):
        _dispatch.choose_backend(torch.device("cuda"), torch.float32, "cpu")


WITHOUT_CUPY = """
import sys, torch
sys.modules["cupy"] = None
from deform3d import _dispatch
for dtype in (torch.float32, torch.float16, torch.float32):
    print(_dispatch.choose_backend(torch.device("cuda:1"), dtype))
"""


def test_cuda_falls_back_with_one_warning():
    done = subprocess.run([sys.executable, "-Walways", "-c", WITHOUT_CUPY], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["reference"] * 3, done.stderr
    assert done.stderr.count("slow PyTorch reference on cuda") == 1
    assert "pip install cupy-cuda13x" in done.stderr


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("raise ImportError('libnvrtc.so.13: cannot open shared object file')", "ImportError: libnvrtc.so.13"),
        ("raise RuntimeError('two CuPy packages are installed')", "RuntimeError: two CuPy packages"),
        ("", "CuPy cannot run a kernel"),
    ],
)
def test_broken_cupy_falls_back(tmp_path, module, reason):
    """With a broken CuPy the operator imports, the CPU works, and CUDA says what to do."""
    (tmp_path / "cupy").mkdir()
    (tmp_path / "cupy" / "__init__.py").write_text(module)
    code = (
        "import warnings, torch\nfrom deform3d import deform_conv3d, _dispatch\nwarnings.simplefilter('always')\n"
        "one = torch.ones(1, 1, 1, 1, 1)\nprint(deform_conv3d(one, torch.zeros(1, 3, 1, 1, 1), one).item())\n"
        "for dtype in (torch.float32, torch.float16):\n"
        "    print(_dispatch.choose_backend(torch.device('cuda'), dtype))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    assert done.stdout.split() == ["1.0", "reference", "reference"]
    assert done.stderr.count("slow PyTorch reference on cuda") == 1
    assert reason in done.stderr
    assert "pip install cupy-cuda1" in done.stderr


def test_broken_numba_falls_back(fresh_choice):
    """Numba may be installed and still fail to import; the warning gives the reason."""
    code = (
        "import sys, warnings, torch\nsys.modules['numba'] = None\nfrom deform3d import deform_conv3d\n"
        "warnings.simplefilter('always')\n"
        "print(deform_conv3d(torch.ones(1, 1, 1, 1, 1), torch.zeros(1, 3, 1, 1, 1), torch.ones(1, 1, 1, 1, 1)).item())"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "1.0"
    assert "Numba cannot be loaded" in done.stderr
    assert "pip install numba" in done.stderr
