"""The compiled CPU backend: layouts, threads, processes, compilation. Its numbers are in test_selective_scan."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from storm_vlm.ops import available_backends, selective_scan
from tests.numerics import assert_matches
from tests.ops.test_selective_scan import make_inputs, run

pytestmark = pytest.mark.skipif("cpu" not in available_backends(), reason="numba is not installed")


def python(code, **environment):
    """Runs code in a fresh interpreter and returns what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def results(inputs, **kwargs):
    return run(inputs, backend="cpu", dtype=torch.float32, **kwargs)


def assert_identical(got, want):
    assert all(torch.equal(got[name], value) for name, value in want.items())


@pytest.fixture
def threads():
    """Restores the number of threads."""
    number = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(number)


@pytest.mark.parametrize("d", [1, 17, 64, 100])
@pytest.mark.parametrize("length", [15, 16, 50])
@pytest.mark.parametrize("order", ["channels adjacent", "steps adjacent", "mixed", "neither adjacent"])
def test_memory_orders(d, length, order):
    """Tiles and chunks that are cut short, read and written in each memory order."""
    inputs = {name: value.float() for name, value in make_inputs(length, d=d).items()}
    want = selective_scan(**{k: v.double() for k, v in inputs.items()}, delta_softplus=True, backend="torch")
    for name in ("u", "delta", "z"):
        if order == "channels adjacent" or (order == "mixed" and name != "u"):
            inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
        elif order == "neither adjacent":
            inputs[name] = torch.stack([inputs[name], inputs[name]], dim=-1)[..., 1]
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    out = selective_scan(**leaves, delta_softplus=True, backend="cpu")
    assert_matches("output", out, want, dtype=torch.float32)
    gradients = torch.autograd.grad(out.square().sum(), list(leaves.values()))
    doubles = {name: value.detach().double().requires_grad_() for name, value in leaves.items()}
    expected = torch.autograd.grad(
        selective_scan(**doubles, delta_softplus=True, backend="torch").square().sum(), list(doubles.values())
    )
    for name, got, value in zip(leaves, gradients, expected, strict=True):
        assert_matches(f"gradient of {name}", got, value, dtype=torch.float32)


def test_output_has_the_memory_order_of_delta():
    inputs = {name: value.float() for name, value in make_inputs(40).items()}
    assert selective_scan(**inputs, backend="cpu").is_contiguous()
    inputs["delta"] = inputs["delta"].transpose(1, 2).contiguous().transpose(1, 2)
    assert selective_scan(**inputs, backend="cpu").transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_different_groups_of_input_and_output_weights(reverse):
    inputs = make_inputs(50, d=12, groups=2)
    inputs["C"] = make_inputs(50, d=12, groups=3, seed=1)["C"]
    inputs = {name: value.float().double() for name, value in inputs.items()}
    want = run(inputs | {name: inputs[name].repeat_interleave(6 // inputs[name].shape[1], 1) for name in "BC"},
               backend="reference", reverse=reverse)  # fmt: skip
    got = results(inputs, reverse=reverse)
    for name in ("output", "gradient of u", "gradient of A"):
        assert_matches(name, got[name], want[name], dtype=torch.float32)
    for name, groups in (("gradient of B", 2), ("gradient of C", 3)):
        summed = want[name].unflatten(1, (groups, -1)).sum(dim=2)
        assert_matches(name, got[name], summed, dtype=torch.float32)


def test_results_on_large_pages():
    """Outputs large enough for the hint to the system, on several threads."""
    inputs = {name: value.float() for name, value in make_inputs(1100, b=1, d=1000, n=4).items()}
    want = run({name: value.double() for name, value in inputs.items()}, backend="torch")
    for name, value in results(inputs).items():
        assert_matches(name, value, want[name], dtype=torch.float32)


def test_mixed_dtypes():
    """What autocast gives: projections in bfloat16, parameters in float32."""
    inputs = make_inputs(70, dtype=torch.bfloat16)
    leaves = {
        name: value.to(torch.bfloat16 if name in ("delta", "z", "B", "C") else torch.float32)
        for name, value in inputs.items()
    }
    want = selective_scan(**inputs, delta_softplus=True, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = selective_scan(**leaves, delta_softplus=True, return_last_state=True, backend="cpu")
    assert out.dtype == state.dtype == torch.float32
    assert_matches("output", out, want)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["u", "delta", "z", "B", "C"])
def test_what_is_not_finite_is_not_hidden(name, value):
    inputs = {key: x.float() for key, x in make_inputs(40).items()}
    inputs[name].view(-1)[200] = value
    want = selective_scan(**inputs, delta_softplus=True, backend="reference")
    got = selective_scan(**inputs, delta_softplus=True, backend="cpu")
    assert torch.equal(got.isfinite(), want.isfinite())


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_growing_states_overflow_to_infinity(reverse):
    inputs = {key: x.float() for key, x in make_inputs(300, without=("z",)).items()}
    inputs["A"] = -3 * inputs["A"]
    want = selective_scan(**inputs, delta_softplus=True, reverse=reverse, backend="reference")
    got = selective_scan(**inputs, delta_softplus=True, reverse=reverse, backend="cpu")
    assert not want.isfinite().all()
    assert torch.equal(got.isfinite(), want.isfinite())


def test_results_do_not_depend_on_the_number_of_threads(threads):
    inputs = make_inputs(300, b=3, d=300, n=16, groups=2)
    threads(1)
    want = results(inputs)
    for number in (2, 3, 7):
        threads(number)
        assert_identical(results(inputs), want)


def test_own_threads_give_what_those_of_torch_give(threads, monkeypatch):
    """Where torch has no OpenMP threads, or a fork has lost them."""
    from storm_vlm.ops import _cpu_threads

    inputs = make_inputs(300, b=3, d=300, n=16)
    threads(3)
    want = results(inputs)
    monkeypatch.setattr(_cpu_threads, "_openmp", lambda: None)
    assert_identical(results(inputs), want)


def test_under_torch_compile():
    inputs = {name: value.float() for name, value in make_inputs(40).items()}
    want = selective_scan(**inputs, delta_softplus=True, backend="cpu")
    compiled = torch.compile(selective_scan, backend="eager")
    assert torch.equal(compiled(**inputs, delta_softplus=True, backend="cpu"), want)


def test_calls_from_several_threads():
    inputs = make_inputs(200, d=200, n=16)
    want, got = results(inputs), [None] * 6

    def work(i):
        got[i] = results(inputs)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(got))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for one in got:
        assert_identical(one, want)


class _Scans(torch.utils.data.Dataset):
    """A data set whose items are the results of a scan."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return results(make_inputs(100, d=100, n=16, seed=index))["gradient of u"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("workers_threads", [1, 2])
def test_in_forked_workers_of_a_parent_that_used_it(workers_threads):
    want = [_Scans()[i] for i in range(4)]
    loader = torch.utils.data.DataLoader(
        _Scans(),
        batch_size=None,
        num_workers=2,
        multiprocessing_context="fork",
        timeout=120,
        worker_init_fn=lambda _: torch.set_num_threads(workers_threads),
    )
    for got, expected in zip(loader, want, strict=True):
        assert torch.equal(got, expected)


def test_importing_the_package_does_not_import_the_compiler():
    code = "import sys, storm_vlm.ops; storm_vlm.ops.backend_choice('cpu'); print('llvmlite' in sys.modules)"
    assert python(code).strip() == "False"


SCAN_ONCE = """
import logging, sys
logging.basicConfig(level="WARNING", stream=sys.stdout)
import torch
from storm_vlm.ops import selective_scan
x = torch.ones(1, 3, 5)
y = selective_scan(x, x, -torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 2), backend="cpu")
print(y.sum().item(), "numba" in sys.modules)
"""


def test_machine_code_is_kept_and_loaded_without_the_compiler(tmp_path):
    first = python(SCAN_ONCE, STORM_CACHE=str(tmp_path)).split()
    assert first[1] == "True"
    (file,) = tmp_path.rglob("scan_forward-*.o")
    written = file.stat().st_mtime_ns
    assert python(SCAN_ONCE, STORM_CACHE=str(tmp_path)).split() == [first[0], "False"]
    file.write_bytes(file.read_bytes()[:5000])
    assert python(SCAN_ONCE, STORM_CACHE=str(tmp_path)).split() == first, "a cut file is made again"
    assert file.stat().st_mtime_ns > written


def test_no_folder_to_keep_machine_code_in(tmp_path):
    """The scan is compiled anew in each process, and says so."""
    (tmp_path / "file").touch()
    printed = python(SCAN_ONCE, STORM_CACHE=str(tmp_path / "file"))
    assert "compiled again in each process" in printed
    assert printed.split()[-1] == "True"
