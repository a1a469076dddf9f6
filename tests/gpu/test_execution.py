"""The operator with PyTorch's ways to run work: graphs, streams, devices, compilation, autocast, training."""

import pytest
import torch
from gpu_layers import assert_all_near, leaves_on, make_grad, make_layer, oracle, run
from torch.nn import functional as F

from deform3d import DeformConv3d, deform_conv3d
from tolerances import assert_near

LAST = torch.channels_last_3d


@pytest.mark.parametrize("dense", [False, True], ids=["depthwise", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_replays_with_new_data(device, dense, dtype):
    """After one warm call and one capture, each replay starts from the buffers that the previous one left."""
    layer = make_layer(16, (9, 10, 11), dtype=dtype, dense=dense)
    leaves, grad = leaves_on(device, layer), make_grad(layer).to(device)
    with torch.cuda.device(device):
        # PyTorch needs the warm call on its own stream, so that autograd's streams are those of the capture.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run(leaves, grad)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            results = run(leaves, grad)
        for seed in (2, 3, 4):
            fresh = make_layer(16, (9, 10, 11), dtype=dtype, dense=dense, seed=seed)
            fresh_grad = make_grad(fresh, seed + 10)
            with torch.no_grad():
                for name, leaf in leaves.items():
                    leaf.copy_(fresh[name])
                grad.copy_(fresh_grad)
            for result in results.values():
                result.detach().fill_(torch.nan)
            graph.replay()
            torch.cuda.synchronize()
            assert_all_near(results, oracle(fresh, fresh_grad))


def test_work_runs_on_the_current_stream(device):
    """The data arrives late on a side stream: a kernel on another stream would read the old data."""
    layer = make_layer(16, (12, 13, 14), dtype=torch.float64)
    grad = make_grad(layer).to(device)
    source = leaves_on(device, layer)
    with torch.cuda.device(device):
        buffers = {name: torch.full_like(t, torch.nan).requires_grad_() for name, t in source.items()}
        late_grad = torch.full_like(grad, torch.nan)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            run(source, grad)  # compiles and allocates: from here on nothing makes the host wait
            side.synchronize()
            torch.cuda._sleep(10**9)  # cycles: about half a second
            with torch.no_grad():
                for name, buffer in buffers.items():
                    buffer.copy_(source[name])
                late_grad.copy_(grad)
            results = run(buffers, late_grad)
        side.synchronize()
    assert_all_near(results, oracle(layer, grad))


def test_device_other_than_the_current_one(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    layer = make_layer(16, (7, 8, 9), dtype=torch.float64)
    grad = make_grad(layer)
    expected = oracle(layer, grad)
    for index in (1, 0, 1):
        with torch.cuda.device(1 - index):
            results = run(leaves_on(f"cuda:{index}", layer), grad.to(f"cuda:{index}"))
            assert torch.cuda.current_device() == 1 - index
        assert all(result.device.index == index for result in results.values())
        assert_all_near(results, expected)


class Block(torch.nn.Module):
    """A convolution that makes offsets, then the deformable convolution, as in the network."""

    def __init__(self, channels: int = 16, backend: str | None = "cuda") -> None:
        super().__init__()
        self.offset = torch.nn.Conv3d(channels, 81, 1)
        self.sample = DeformConv3d(channels, channels, 3, padding=1, groups=channels, backend=backend)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.sample(x, self.offset(x))) + x


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format], ids=["channels-last", "contiguous"])
def test_inductor(device, layout):
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = Block().to(device, torch.float64)
    compiled = torch.compile(block, fullgraph=True)
    for size in ((8, 9, 10), (7, 12, 9)):
        x = torch.randn(2, 16, *size, device=device, dtype=torch.float64).to(memory_format=layout).requires_grad_()
        results = []
        for call in (block, compiled):
            output = call(x)
            results.append((output, *torch.autograd.grad(output.square().sum(), [x, *block.parameters()])))
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_compiled_with_graphs(device):
    """`reduce-overhead` captures CUDA graphs of the compiled code."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = Block().to(device, torch.float64)
    compiled = torch.compile(block, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        x = torch.randn(2, 16, 8, 9, 10, device=device, dtype=torch.float64)
        expected = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
        torch.compiler.cudagraph_mark_step_begin()
        actual = torch.autograd.grad(compiled(x).square().sum(), list(block.parameters()))
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_the_rounded_operator(device, dtype):
    """With half inputs and float32 parameters the result is float32 arithmetic, rounded once."""
    layer = make_layer(48, (8, 9, 7), dtype=dtype)
    grad = make_grad(layer)
    mixed = leaves_on(device, layer)
    mixed.update({name: mixed[name].detach().float().requires_grad_() for name in ("weight", "bias")})
    with torch.autocast("cuda", dtype=dtype):
        output = deform_conv3d(*mixed.values(), padding=1, backend="cuda")
    assert output.dtype == dtype
    gradients = torch.autograd.grad(output, list(mixed.values()), grad.to(device))
    expected = oracle(layer, grad)
    assert_near(output.detach(), expected["output"].detach())
    for (name, leaf), gradient in zip(mixed.items(), gradients, strict=True):
        assert gradient.dtype == leaf.dtype
        assert_near(gradient, expected[name], name)


def test_block_learns_under_autocast(device):
    """Train like the network, with bfloat16 autocast and fused AdamW; compare with the CPU in float64."""
    losses = {}
    for where, dtype, backend in ((device, torch.float32, "cuda"), ("cpu", torch.float64, "reference")):
        torch.manual_seed(0)
        block = Block(8, backend).to(where, dtype)
        x, target = (torch.randn(2, 8, 6, 7, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
        optimizer = torch.optim.AdamW(block.parameters(), lr=1e-2, fused=where != "cpu")
        losses[where] = []
        for _ in range(20):
            optimizer.zero_grad()
            with torch.autocast(torch.device(where).type, dtype=torch.bfloat16, enabled=where != "cpu"):
                loss = F.mse_loss(block(x.to(where, dtype)), target.to(where, dtype))
            loss.backward()
            optimizer.step()
            losses[where].append(loss.item())
    ours, exact = losses[device], losses["cpu"]
    assert exact[-1] < 0.95 * exact[0]
    assert ours == pytest.approx(exact, rel=0.02)


def test_threads_with_a_stream_each(device):
    """Several threads, each with its own stream, compile and launch without interfering."""
    from concurrent.futures import ThreadPoolExecutor

    layers = [make_layer(channels, (7, 8, 9), dtype=torch.float64) for channels in (3, 4, 6, 10)]
    grads = [make_grad(layer) for layer in layers]

    def work(layer, grad):
        leaves, late = leaves_on(device, layer), grad.to(device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            results = run(leaves, late)
        stream.synchronize()
        return results

    with ThreadPoolExecutor(4) as pool:
        for layer, grad, results in zip(layers, grads, pool.map(work, layers, grads), strict=True):
            assert_all_near(results, oracle(layer, grad))
