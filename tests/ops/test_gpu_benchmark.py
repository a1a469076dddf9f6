"""The GPU benchmark's other implementations and its page, as far as they need no GPU."""

import importlib
import json
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from deform3d import deform_conv3d
from tolerances import assert_near

NETWORK_ROW = {"checkpointing": False, "ms": 80.0, "peak_gb": 21.0, "operator_ms": 8.0, "share": 0.1}


@pytest.fixture
def load() -> Callable[[str], ModuleType]:
    """Import one of the benchmarks' shared modules."""
    pytest.importorskip("tabulate", reason="the benchmarks' pages need tabulate")
    return lambda name: importlib.import_module(f"benchmarks.common.{name}")


@pytest.mark.parametrize("peer", ["published algorithm", "grid_sample", "tvdcn"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_peers_compute_the_same(load, make_problem, peer, channels_last):
    peers = load("gpu_peers")
    ones = (1, 1, 1)
    p = make_problem(
        channels=4, batch=2, size=(4, 2, 5), kernel=(3, 3, 3), stride=ones, padding=ones, dilation=ones, mask=False
    )
    if channels_last:
        p = p.map(lambda t: t.contiguous(memory_format=torch.channels_last_3d) if t.dim() == 5 else t)
    if peer == "tvdcn":
        try:
            run = peers.tvdcn_operator()
        except ImportError as error:
            pytest.skip(str(error))
    else:
        run = peers.im2col_gemm() if peer == "published algorithm" else peers.grid_samples
    leaves = p.map(lambda t: t.detach().requires_grad_()).tensors()
    exact = p.oracle().map(lambda t: t.requires_grad_()).tensors()
    grad = torch.randn(p.input.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    output, expected = run(*leaves.values()), deform_conv3d(*exact.values(), padding=1, backend="reference")
    assert_near(output.detach(), expected.detach())
    gradients = torch.autograd.grad(output, list(leaves.values()), grad.to(output))
    for name, ours, theirs in zip(
        exact, gradients, torch.autograd.grad(expected, list(exact.values()), grad), strict=True
    ):
        assert_near(ours, theirs, name)


def row(results, implementation: str, dtype: str, forward: float, training: float, **more):
    values = {"batch": 2, "channels": 48, "size": 48, "layout": "channels-last", "sigma": 1.0, "floor_ms": 0.25}
    return vars(
        results.Row(implementation, dtype=dtype, forward_ms=forward, training_ms=training, **{**values, **more})
    )


def test_page_lists_targets_beside_measurements(load, tmp_path):
    results = load("gpu_results")
    first = results.Results.resume(tmp_path, ["date: today", "card: A"])
    assert {target.verdict for target in results.targets({})} == {"not measured"}
    first.keep("operator", [row(results, "deform3d", "float32", 0.5, 3.0)])
    first.keep("deterministic", [row(results, "deform3d", "float32", 0.5, 6.0)])
    peers = [
        row(results, f"{results.IM2COL}{end}", "float32", ms, 5 * ms, layout="")
        for end, ms in (("", 9), (", compiled", 4))
    ]
    first.keep("peers", peers)
    first.keep("network", {"what": "A step.", "rows": [NETWORK_ROW, {**NETWORK_ROW, "checkpointing": True}]})
    verdicts = {target.name: target.verdict for target in results.targets(first.parts)}
    assert verdicts["forward, float32"] == "missed"
    assert verdicts["forward, bfloat16"] == "not measured"
    assert verdicts[f"forward, float32, times faster than the best of {results.IM2COL}"] == "missed"
    assert verdicts[f"forward + backward, float32, times faster than the best of {results.IM2COL}"] == "met"
    assert verdicts["forward + backward over forward, float32, offsets of 1"] == "missed"
    assert verdicts["deterministic forward + backward over the default, float32"] == "met"
    assert verdicts["training step of the base network: operator"] == "met"
    assert verdicts["training step of the base network: peak memory"] == "missed"
    page = (tmp_path / "operator_gpu.md").read_text()
    assert "| forward, float32 | ≤ 0.44 ms | 0.5 ms | missed |" in page
    assert "| 2×48×48³ | float32 | channels-last | 1 | 0.500 | 0.250 | 2.00 | 3.000 | 6.0 |" in page
    assert "| 2×48×48³ | float32 | im2col + GEMM per group, compiled | 4.000 | 8.0× | 20.000 | 6.7× |" in page
    assert "| off | 80.0 | 21.00 | 8.0 | 10.0 % |" in page


def test_unloadable_peer_says_why(load, tmp_path, monkeypatch):
    peers, results = load("gpu_peers"), load("gpu_results")
    monkeypatch.setitem(sys.modules, "tvdcn", None)
    with pytest.raises(ImportError, match="tvdcn is not installed") as caught:
        peers.tvdcn_operator()
    package = tmp_path / "tvdcn" / "__init__.py"
    package.parent.mkdir()
    # The errors of its wheel when built for another PyTorch and for another CUDA.
    for source, reason in (
        ("__version__ = '1.1.0'\ndef has_ops(): return False", "its compiled library was not built for PyTorch"),
        ("raise RuntimeError('PyTorch and Extension were compiled with different CUDA versions')", "different CUDA"),
    ):
        package.write_text(source)
        monkeypatch.delitem(sys.modules, "tvdcn", raising=False)
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(ImportError, match=reason):
            peers.tvdcn_operator()
    kept = results.Results.resume(tmp_path, ["date: today"])
    kept.keep("tvdcn", {"skipped": str(caught.value)})
    assert "Not measured: tvdcn is not installed." in (tmp_path / "operator_gpu.md").read_text()
    rows = [row(results, results.TVDCN, "float32", 12.0, 50.0, layout="")]
    kept.keep("tvdcn", {"rows": rows})
    kept.keep("operator", [row(results, "deform3d", "float32", 0.5, 3.0)])
    page = (tmp_path / "operator_gpu.md").read_text()
    assert "| 2×48×48³ | float32 | tvdcn | 12.000 | 24.0× | 50.000 | 16.7× |" in page
    assert "Not measured" not in page


def test_earlier_results_are_kept_only_on_the_same_machine(load, tmp_path):
    results = load("gpu_results")
    kernels = {"float32": [{"kernel": "deform_forward", "calls": 1.0, "us": 300.0}]}
    results.Results.resume(tmp_path, ["date: yesterday", "card: A"]).keep("kernels", kernels)
    again = results.Results.resume(tmp_path, ["date: today", "card: A"])
    again.keep("tuning", {"forward": [{"tuning": "default", "ratio": 1.0}]})
    assert set(json.loads((tmp_path / "data" / "deform_conv3d_gpu.json").read_text())["parts"]) == {"kernels", "tuning"}
    page = (tmp_path / "operator_gpu.md").read_text()
    assert "| `deform_forward` | 1 | 300.0 |" in page
    assert "| default | 1.000 |" in page
    assert results.Results.resume(tmp_path, ["date: today", "card: B"]).parts == {}
