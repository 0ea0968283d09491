"""The fused reflections: equal to the definition (in Triton's interpreter), compiled for cards that are not here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_gpt import reflections
from lit_gpt.reflections import reflect, use_form

triton = pytest.importorskip("triton", reason="Triton has no package for this platform")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lit_gpt import kernels

HERE = Path(__file__).parent


def test_kernels_equal_the_definition_in_the_interpreter():
    """In a process of its own, as Triton chooses the interpreter when it is imported; prints the bytes that move."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rP", "-p", "no:logging", str(HERE / "interpreted_kernels.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    counts = re.findall(r"^ETHER.* bytes an element .*", done.stdout, re.M)
    print(*counts, sep="\n")
    assert len(counts) == 4


def compiled(kernel, pointers: str, *, b: int, capability: int, **flags: bool) -> dict[str, str | bytes]:
    """A kernel's code for ETHER+ on a contiguous bf16 x of 32 blocks of b, with every option."""
    example = torch.empty(32, b)
    arguments = kernels._arguments(example, example, [example, example], torch.float32)
    _, tile = kernels._plan(2048, 32, b, **kernels.BACKWARD)
    constants = {**arguments, **tile, **flags, **{s: 1 for s in kernel.arg_names if s.endswith("_element")}}
    options = dict(num_warps=constants.pop("num_warps"), enable_fp_fusion=constants.pop("enable_fp_fusion"))
    types = dict.fromkeys(pointers.split(), "*bf16") | dict.fromkeys(
        "PROJECTIONS PARTIALS U V BLOCK_MASK".split(), "*fp32"
    )
    types = {name: types.get(name, "i32") for name in kernel.arg_names}
    constants = {name: value for name, value in constants.items() if types[name] == "i32" and name != "n"}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = {(k,): [["tt.divisibility", 16]] for k, name in enumerate(types) if name not in ("M", *constants)}
    constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, types, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm


@pytest.mark.parametrize(("b", "capability"), [(128, 90), (344, 80), (4096, 90)])
def test_kernels_compile_for_a_card(b, capability):
    """Without the card: loads of 16 bytes, and products and sums that stay apart, so that they cancel at v = -u."""
    forward = compiled(kernels._forward, "X Y CENTER", b=b, capability=capability, SAVE_OUTPUT=True)
    backward = compiled(
        kernels._backward, "GRAD SAVED GRAD_X CENTER", b=b, capability=capability, SAVE_OUTPUT=True, NEED_GRAD_X=True
    )
    for code in (forward, backward):
        assert len(code["cubin"]) > 1000
        assert re.search(r"ld\.global\S*\.v4\.b32", code["ptx"]) and re.search(r"st\.global\S*\.v4\.b32", code["ptx"])
        assert "mul" in code["ptx"] and "fma" not in code["ptx"]


@pytest.mark.parametrize("missing", [False, True])
def test_where_triton_cannot_run_products_take_its_place_and_one_line_says_so(missing, capsys, monkeypatch):
    reflections._try_kernels.cache_clear()
    if missing:
        monkeypatch.setitem(sys.modules, "lit_gpt.kernels", None)  # importing it raises ImportError
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: raise_error("no driver"))  # also where there is a GPU
    assert [reflections._kernels_run_on(torch.device("cuda", 0)) for _ in range(2)] == [False, False]
    (line,) = capsys.readouterr().err.splitlines()
    reason = "import of lit_gpt.kernels halted; None in sys.modules" if missing else "no driver"
    assert line == f"no Triton kernels on cuda:0 ({reason}): reflections are taken as thin products"
    reflections._try_kernels.cache_clear()


def raise_error(text: str):
    raise RuntimeError(text)


def test_on_a_cpu_products_are_taken_and_nothing_is_said(capsys):
    x, u, v = torch.randn(4, 2, 6), torch.randn(2, 6), torch.randn(2, 6)
    with use_form("products"):
        products = reflect(x, u, v)
    assert torch.equal(reflect(x, u, v), products)
    assert capsys.readouterr().err == ""
