"""The fused reflections equal the definition; run by test_kernels.py in a process with TRITON_INTERPRET=1.

Triton chooses its interpreter when it is imported, so these tests cannot share a process with the others.
"""

import functools
import itertools

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from triton.runtime import interpreter

from lit_gpt.kernels import BACKWARD, FORWARD, _plan
from lit_gpt.reflections import _try_kernels, reflect, use_form

SIZES = [(2, 2), (150, 2), (3, 7), (2, 33), (5, 64), (1, 128), (1, 344), (2, 1000), (1, 4096)]
"""Blocks n of size b: 2 to 4096, powers of two and not, more than one group of blocks, a group that is not full."""
PRECISION = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest relative difference. In 16 bits a unit in the last place, not half of one: the interpreter truncates bf16."""

CHECKS = ("test_schema", "test_faketensor")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    with np.errstate(all="ignore"):  # blocks between n and the next power of two hold 0 / 0; they are not stored
        yield


def inputs(n: int, b: int, dtype: torch.dtype, *, vectors: int, lead: tuple[int, ...] = (2, 3)) -> list[torch.Tensor]:
    """x (*lead, n, b) and vectors (n, b), all with gradients."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(*lead, n, b).to(dtype)
    return [t.requires_grad_() for t in (x, *(torch.randn(n, b, dtype=wide) for _ in range(vectors)))]


def options(n: int, b: int, dtype: torch.dtype, *, centered: bool, dropped: bool) -> dict[str, torch.Tensor | None]:
    """A center, and blocks of which every second one is left as it is."""
    block_mask = (torch.arange(n) % 2).float()[:, None] if dropped else None
    return dict(center=torch.randn(n, b).to(dtype) if centered else None, block_mask=block_mask)


def fused(x: torch.Tensor, *vectors: torch.Tensor, **given) -> torch.Tensor:
    """R x by the kernels: ETHER's of one vector, ETHER+'s of two."""
    with use_form("triton"):
        y = reflect(x, *vectors, **given)
    assert y.grad_fn.fused
    return y


def results(y: torch.Tensor, tensors: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    """y and the gradients, in fp64."""
    return [t.detach().double() for t in (y, *torch.autograd.grad(y, tensors, grad))]


def check(tensors: list[torch.Tensor], *, save_output: bool, **given: torch.Tensor | None) -> None:
    """Compare the kernels with the definition in fp64."""
    grad = torch.randn_like(tensors[0])
    ours = results(fused(*tensors, save_output=save_output, **given), tensors, grad)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    given = {name: None if t is None else t.double() for name, t in given.items()}
    theirs = results(reflect(*wide, **given), wide, grad.double())
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= PRECISION[tensors[0].dtype] * other.abs().max()


@pytest.mark.parametrize(("n", "b"), SIZES)
def test_forward_and_every_gradient_equal_the_definition(n, b):
    for vectors, save_output, full in itertools.product((1, 2), (False, True), (False, True)):
        tensors = inputs(n, b, torch.float64, vectors=vectors)
        given = options(n, b, torch.float64, centered=full, dropped=full and n > 1)
        check(tensors, save_output=save_output, **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_in_every_dtype_of_the_activations(dtype):
    for vectors, save_output in itertools.product((1, 2), (False, True)):
        tensors = inputs(3, 40, dtype, vectors=vectors)
        check(tensors, save_output=save_output, **options(3, 40, dtype, centered=True, dropped=True))


def test_the_sums_of_many_programs_are_added_in_one_order():
    tensors = inputs(3, 40, torch.float32, vectors=2, lead=(9, 10))
    assert _plan(90, 3, 40, **BACKWARD)[0] == (6, 1)
    check(tensors, save_output=True)
    first, second = (results(fused(*tensors), tensors, torch.ones_like(tensors[0])) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("lead", [(5,), (2, 3), (2, 1, 3), ()], ids=str)
def test_any_leading_dimensions(lead):
    check(inputs(2, 6, torch.float64, vectors=2, lead=lead), save_output=False)


def test_an_empty_batch_has_an_empty_result_and_zero_gradients():
    tensors = inputs(2, 6, torch.float32, vectors=2, lead=(2, 0))
    y = fused(*tensors)
    y.sum().backward()
    assert y.shape == (2, 0, 2, 6) and tensors[0].grad.shape == y.shape
    assert all((vector.grad == 0).all() and vector.grad.shape == (2, 6) for vector in tensors[1:])


def test_inputs_that_are_not_contiguous():
    """Columns of a weight, every second position, an expanded gradient, sliced vectors and center."""
    weight = torch.randn(12, 9, dtype=torch.float64, requires_grad=True)
    wide = torch.randn(4, 6, dtype=torch.float64)
    given = dict(center=wide[::2], block_mask=torch.ones(2, 2)[:, :1])
    vectors = [wide[1::2].clone().requires_grad_(), wide.T[:, :2].reshape(6, 2).T.clone().requires_grad_()]
    for view in (weight.T.unflatten(-1, (2, 6)), weight.T[::2].unflatten(-1, (2, 6)), weight.T[:8].view(2, 4, 2, 6)):
        pairs = []
        for function in (fused, reflect):
            y = function(view, vectors[0], vectors[1].T.contiguous().T, **given)
            pairs.append([y, *torch.autograd.grad(y.sum(), [weight, *vectors])])
        for one, other in zip(*pairs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_starts_as_the_identity_bit_for_bit(dtype):
    x, u = inputs(5, 37, dtype, vectors=1)
    for given in (dict(), options(5, 37, dtype, centered=True, dropped=True)):
        y = fused(x, u, -u, **given)
        assert torch.equal(y, x)
        assert torch.equal(torch.autograd.grad(y, x, x)[0], x)  # R^T = R


def test_gradients_are_those_of_finite_differences():
    for vectors, save_output in itertools.product((1, 2), (False, True)):
        tensors = inputs(2, 3, torch.float64, vectors=vectors, lead=(2,))
        given = options(2, 3, torch.float64, centered=True, dropped=True)
        one = functools.partial(fused, save_output=save_output, **given)
        assert torch.autograd.gradcheck(one, tensors, fast_mode=True)


def test_operators_on_tensors_without_data_return_what_they_return_on_others():
    """Check shapes, strides and that there are no aliases: torch.compile and the memory estimate rely on them."""
    x, u, v = (t.detach() for t in inputs(2, 3, torch.bfloat16, vectors=2, lead=(2, 3)))
    turned = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for saved, save_output in ((x, False), (turned, True)):
        given = (*options(2, 3, torch.bfloat16, centered=True, dropped=True).values(), save_output)
        torch.library.opcheck(torch.ops.ether.reflect, (saved, *given, [u, v]), test_utils=CHECKS)
        y, projections = torch.ops.ether.reflect(saved, *given, [u, v])
        arguments = (y, saved, projections, *given, not save_output, [u, v])
        torch.library.opcheck(torch.ops.ether.reflect_backward, arguments, test_utils=CHECKS)


def test_a_step_on_tensors_without_data_takes_the_kernels_too():
    """The estimate of a step's memory comes first: whether Triton runs is tried while no tensor has data."""
    _try_kernels.cache_clear()
    with FakeTensorMode():
        tensors = inputs(2, 6, torch.float32, vectors=2)
        fused(*tensors, save_output=True).sum().backward()
    assert all(t.grad.shape == t.shape for t in tensors)


def test_the_first_layers_input_needs_no_gradient():
    x, u, v = inputs(2, 6, torch.float64, vectors=2)
    whole = torch.autograd.grad(fused(x, u, v).square().sum(), (u, v))
    alone = torch.autograd.grad(fused(x.detach(), u, v).square().sum(), (u, v))
    assert all(torch.equal(one, other) for one, other in zip(whole, alone, strict=True))


def test_compiled_without_a_graph_break_and_under_checkpointing():
    x, u, v = inputs(2, 6, torch.float32, vectors=2)

    def step(x, u, v):
        x = checkpoint(lambda x: reflect(x.sin(), u, v, save_output=True), x, use_reentrant=False)
        return reflect(x, v).square().sum()

    with use_form("triton"):
        assert reflect(x, u).grad_fn.fused
        plain = torch.autograd.grad(step(x, u, v), (x, u, v))
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for one, other in zip(torch.autograd.grad(compiled(x, u, v), (x, u, v)), plain, strict=True):
            torch.testing.assert_close(one, other)


class Traffic:
    """Notes the address of every element that the kernels load or store, masked lanes aside."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.addresses: dict[str, list[np.ndarray]] = {"read": [], "written": []}
        self.bytes = {"read": 0, "written": 0}
        builder = interpreter.InterpreterBuilder
        load, store = builder.create_masked_load, builder.create_masked_store
        patch.setattr(
            builder, "create_masked_load", lambda b, p, m, *a: (self.note("read", p, m), load(b, p, m, *a))[1]
        )
        patch.setattr(
            builder,
            "create_masked_store",
            lambda b, p, v, m, *a: (self.note("written", p, m), store(b, p, v, m, *a))[1],
        )

    def note(self, direction: str, pointers: interpreter.TensorHandle, mask: interpreter.TensorHandle) -> None:
        """Add one load or store."""
        lanes = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        self.addresses[direction].append(lanes)
        self.bytes[direction] += lanes.size * pointers.get_element_ty().primitive_bitwidth // 8

    def take(self, direction: str, *tensors: torch.Tensor) -> tuple[set[int], int]:
        """Return how often the tensors' elements were touched (as a set) and the bytes that went elsewhere; forget."""
        addresses, elsewhere = np.concatenate([*self.addresses[direction], []]), self.bytes[direction]
        times = set()
        for tensor in tensors:
            first, size = tensor.data_ptr(), tensor.element_size()
            own = addresses[(addresses >= first) & (addresses < first + tensor.nbytes)]
            times |= set(np.bincount(((own - first) // size).astype(int), minlength=tensor.numel()).tolist())
            elsewhere -= own.size * size
        self.addresses[direction].clear()
        self.bytes[direction] = 0
        return times, elsewhere


@pytest.mark.parametrize("save_output", [False, True])
@pytest.mark.parametrize("vectors", [1, 2])
def test_an_activation_is_read_once_and_written_once(vectors, save_output, monkeypatch):
    """Backward: read the gradient and what was saved once, write x's gradient once. Prints bytes an element."""
    n, b, M, k = 4, 96, 40, vectors
    x, *rest = inputs(n, b, torch.bfloat16, vectors=k, lead=(M,))
    traffic = Traffic(monkeypatch)
    y = fused(x, *rest, save_output=save_output)
    projections = M * n * k * 4 * save_output  # written by the forward pass, read by the backward pass
    programs, _ = _plan(M, n, b, **FORWARD)[0]
    assert traffic.take("read", x) == ({1}, programs * k * n * b * 4)
    assert traffic.take("written", y) == ({1}, projections)
    grad = torch.randn_like(y)
    grad_x, *_ = torch.autograd.grad(y, (x, *rest), grad)
    programs, _ = _plan(M, n, b, **BACKWARD)[0]
    sums = programs * k * n * b * 4
    assert traffic.take("read", grad, y if save_output else x) == ({1}, sums + projections)
    assert traffic.take("written", grad_x) == ({1}, sums)

    M, n, b = 2048, 32, 128  # the same sums for the size that matters
    forward, backward = (_plan(M, n, b, **fill)[0][0] for fill in (FORWARD, BACKWARD))
    projections = save_output * k * 4 / b
    print(
        f"{'ETHER' if k == 1 else 'ETHER+'}, save_output={save_output}, bytes an element of x in bf16, "
        f"(M, n, b) = {M, n, b}: forward 2 read + 2 written + {forward * k * 4 / M + projections:.2f} for vectors "
        f"and projections; backward 4 read + 2 written + {3 * backward * k * 4 / M + projections:.2f}, sums included"
    )
