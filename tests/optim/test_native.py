"""The compiled kernels, and the noise that they share with torch's operations."""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from optim.ivon_helpers import make, run, same, snapshot, values
from reference.noise import fill_normal
from torch import Tensor, nn

from varlora.optim import bucket, native
from varlora.optim.ivon import IVON
from varlora.optim.noise import TILE, Piece, philox

SIZES = (1, 63, 64, 65, 5_000, 0, 70_001)
"""Of parameters: less than a tile, a tile, more; and enough for several threads."""


@pytest.fixture(autouse=True)
def _arithmetic() -> None:
    """Each test says itself what it is about: nothing here runs twice."""


@pytest.fixture
def _only_with_kernels() -> None:
    if native.library() is None:
        pytest.skip("the kernels were not built: there was no C compiler")


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [  # of the authors' test suite, kat_vectors of Random123
        (0, [0] * 4, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (2**64 - 1, [2**32 - 1] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            0x299F31D0_A4093822,
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_its_authors_numbers(key: int, counter: list[int], words: list[int]) -> None:
    assert [int(word) for word in philox(key, [torch.tensor(word) for word in counter])] == words


def test_noise_is_box_and_muller_of_philox() -> None:
    """Number by number, with the standard library's logarithm and angles."""
    x = torch.empty(200)
    fill_normal(77, [(x, 5, 0)])
    for i in range(200):
        counter = [i // 64 * 16 + i % 16, 0, 5, 0]
        words = [int(word) for word in philox(77, [torch.tensor(word) for word in counter])]
        a, b = words[2 * (i // 32 % 2) :][:2]
        r = math.sqrt(-2 * math.log((a // 2 + 0.5) / 2**31))
        turn, rest = divmod(b, 2**30)
        rest = (rest + 2**29) % 2**30 - 2**29  # of a quarter turn, in both directions
        sine, cosine = math.sin(rest / 2**30 * math.pi / 2), math.cos(rest / 2**30 * math.pi / 2)
        pair = [(cosine, sine), (sine, -cosine), (-cosine, -sine), (-sine, cosine)][turn]
        assert x[i].item() == pytest.approx(r * pair[i // 16 % 2], rel=1e-5, abs=1e-6)


def test_a_part_of_a_parameter_has_its_part_of_the_noise() -> None:
    whole = torch.empty(3_000)
    fill_normal(9, [(whole, 4, 0)])
    for first, count in ((0, 64), (64, 100), (1_037, 1_900), (2_999, 1), (30, 0)):
        part = torch.empty(count)
        fill_normal(9, [(torch.empty(5), 0, 0), (part, 4, first), (torch.empty(70), 1, 0)])
        assert torch.equal(part, whole[first : first + count])


def kernels(sizes: tuple[int, ...] = SIZES) -> tuple[native.Kernels, list[Tensor], list[Tensor]]:
    """Kernels on a random state, with parameters and gradients."""
    source = torch.Generator().manual_seed(0)
    n, ends = sum(sizes), torch.tensor(sizes).cumsum(0).tolist()
    mean, momentum, hess, gradients = torch.randn(4, n, generator=source).unbind()
    spans = list(zip([0, *ends], ends))
    pieces = [[Piece(lo, hi - lo, 3 + i, 0)] for i, (lo, hi) in enumerate(spans)]
    made = native.Kernels(native.Flat(mean.clone(), momentum.clone(), hess.square() + 0.1, pieces))
    return made, [torch.empty(size) for size in sizes], [gradients[lo:hi] for lo, hi in spans]


SETTINGS = {
    **{"ess": 50.0, "delta": 0.1, "beta1_less": 0.1, "beta2_less": 0.05, "half_square": 0.00125},
    **{"lr_over_bias": 0.3, "clip_times_bias": 0.7, "delta_times_bias": 0.05},
}


def all_results(widest: int = 512) -> list[Tensor]:
    found = []
    for batch_size in (0.0, 8.0):
        made, out, gradients = kernels()
        made.widest = widest
        every, settings = range(len(SIZES)), native.Settings(batch_size=batch_size, **SETTINGS)
        made.normal(2**63 + 1, every, out)
        found += [x.clone() for x in out]
        made.draw(12, every, out, settings)
        found += [x.clone() for x in out]
        made.update(12, every, gradients, out, settings)
        found += [x.clone() for x in (*out, *made.flat[:3])]
    return found


@pytest.mark.usefixtures("_only_with_kernels")
def test_neither_processor_nor_threads_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = all_results()
    for widest in (0, 256):
        assert same(all_results(widest), wanted)
    for threads, openmp in itertools.product((2, 3, 7), (native._openmp, lambda: None)):
        torch.set_num_threads(threads)
        monkeypatch.setattr(native, "_openmp", openmp)
        assert same(all_results(), wanted)


FORK = """
import os, torch
from varlora import IVON
torch.set_num_threads(2)
p = torch.nn.Parameter(torch.zeros(1 << 18))
optimizer = IVON([p], lr=0.1, ess=1.0, hess_init=1.0, seed=0)
optimizer.train()
p.grad = torch.ones_like(p.detach())
child = os.fork()
if child == 0:  # where torch's own parallel operations would wait for ever, so there are none
    optimizer.step()
    os._exit(0 if p[-1].item() != 0 else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.usefixtures("_only_with_kernels")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_does_not_wait_for_its_parents_threads() -> None:
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60)


@pytest.mark.usefixtures("_only_with_kernels")
def test_the_kernels_noise_is_that_of_torch_to_rounding() -> None:
    made, out, _ = kernels((100_000,))
    made.normal(2**64 - 5, [0], out)
    want = torch.empty(100_000)
    fill_normal(2**64 - 5, [(want, 3, 0)])
    torch.testing.assert_close(out[0], want, rtol=1e-6, atol=1e-6)
    assert not torch.equal(out[0], want)  # or this compares one with itself


@pytest.mark.usefixtures("_only_with_kernels")
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_share_everything_out_once(threads: int) -> None:
    made, _, _ = kernels()
    for indices in (range(len(SIZES)), [6], [1, 4, 6]):
        segments, of_segment, starts, shares, _ = made.segments(tuple(indices), threads)
        assert shares[0] == 0
        assert shares[-1] == len(segments)
        assert shares == sorted(shares)
        assert len(shares) == threads + 1
        got = [(at + k, i) for (at, n, *_), i in zip(segments.tolist(), of_segment.tolist()) for k in range(n)]
        spans = [(at, at + count) for ((at, count, *_),) in made.flat.pieces]
        assert got == [(k, which) for which, i in enumerate(indices) for k in range(*spans[i])]
        for (at, _, position, first, *_), start in zip(segments.tolist(), starts.tolist()):
            assert first % TILE == 0
            assert start == 4 * first
            assert at == spans[position - 3][0] + first
        sizes = [int(segments[lo:hi, 1].sum()) for lo, hi in itertools.pairwise(shares)]
        assert max(sizes) - min(sizes) <= 2 * TILE


@pytest.mark.usefixtures("_only_with_kernels")
def test_what_is_kept_of_gradients_that_come_and_go_is_bounded() -> None:
    made, _, gradients = kernels(tuple(range(1, 10)))
    for chosen in itertools.islice(itertools.combinations(range(9), 4), 100):
        assert made.finite(chosen, [gradients[i] for i in chosen])
    assert made.segments.cache_info().currsize < 100


@pytest.mark.usefixtures("_only_with_kernels")
@pytest.mark.parametrize("threads", [1, 3])
def test_a_parameter_in_pieces_is_worked_off_as_a_whole_one_is(threads: int) -> None:
    """Columns 10 to 60 of a matrix of 900 rows: a run of neighbours for each row."""
    torch.set_num_threads(threads)
    whole, out, _ = kernels((90_000,))
    settings = native.Settings(**SETTINGS)
    whole.draw(5, [0], out, settings)
    matrix = [x.view(900, 100)[:, 10:60].contiguous().view(-1) for x in (*whole.flat[:3], out[0])]
    pieces = [Piece(50 * row, 50, 3, 100 * row + 10) for row in range(900)]
    part, found = native.Kernels(native.Flat(*matrix[:3], [pieces])), torch.empty(45_000)
    part.draw(5, [0], [found], settings)
    assert torch.equal(found, matrix[3])


@pytest.mark.usefixtures("_only_with_kernels")
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_number_that_is_not_finite_is_found_anywhere(bad: float) -> None:
    made, _, gradients = kernels()
    every = range(len(SIZES))
    assert made.finite(every, [x.clone().fill_(torch.finfo(torch.float32).max) for x in gradients])
    for at in (0, 63, 69_999, 70_000):
        found = [x.clone() for x in gradients]
        found[-1][at] = bad
        assert not made.finite(every, found)
        assert made.finite(every[:-1], found[:-1])


@pytest.mark.usefixtures("_only_with_kernels")
@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.3, "debias": False}, {"rescale_lr": True}], ids=str)
@pytest.mark.parametrize("approx", ["price", "gradsq"])
def test_with_and_without_kernels_agree_to_rounding(approx: str, settings: dict[str, Any]) -> None:
    found = []
    for fused in (True, False):
        parameters, optimizer = make(fused=fused, hess_approx=approx, batch_size=4, **settings)
        run(optimizer, parameters, range(20), way="train")
        assert [bucket.kernels is not None for bucket in optimizer._buckets or []] == [fused]
        with optimizer.sampled_params():
            drawn = values(parameters)
        found.append([*snapshot(parameters, optimizer), *drawn])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_only_with_kernels")
@pytest.mark.parametrize("drawn", [False, True])
def test_an_interrupt_while_addresses_are_noted_leaves_none_that_is_wrong(
    drawn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    every, settings = range(len(SIZES)), native.Settings(**SETTINGS)
    made, out, _ = kernels()
    wanted = [torch.empty_like(x) for x in out]
    kernels()[0].draw(5, every, wanted, settings)
    made.segments(tuple(every), torch.get_num_threads())
    before = [torch.zeros_like(x) for x in out]
    if drawn:
        made.draw(5, every, before, settings)
    values = [x.clone() for x in before]

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "tensor", interrupt)
        with pytest.raises(KeyboardInterrupt):
            made.draw(6, every, out, settings)
    made.draw(5, every, out, settings)
    assert same(out, wanted)
    assert same(before, values)


@pytest.mark.usefixtures("_only_with_kernels")
def test_gradients_of_any_layout_are_read() -> None:
    found = []
    for transposed in (False, True):
        p = nn.Parameter(torch.ones(30, 50))
        optimizer = IVON([p], lr=0.1, ess=100.0, hess_init=1.0, seed=0)
        for key in range(3):
            optimizer.train()
            gradient = torch.randn(50, 30, generator=torch.Generator().manual_seed(key)).T
            p.grad = gradient if transposed else gradient.contiguous()
            assert p.grad.is_contiguous() != transposed
            optimizer.step()
        found.append(snapshot([p], optimizer))
    assert same(*found)


@pytest.mark.parametrize("kind", ["kernels", "torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_gradients_that_torch_negates_or_makes_lazily_are_read(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of complex arithmetic: their memory has the other sign, or there is none."""
    if kind == "triton":
        pytest.importorskip("triton")
        monkeypatch.setattr(bucket, "kernels_for", lambda device: "triton")
    found = []
    for lazy in (False, True):
        parameters = [nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(70))]
        optimizer = IVON(parameters, lr=0.1, ess=100.0, hess_init=1.0, seed=0, fused=False if kind == "torch" else None)
        for _ in range(3):
            optimizer.train()
            z = torch.complex(torch.zeros(()), parameters[0])
            ((z.conj() * 1j).real - 3).square().backward()
            gradient = parameters[0].grad
            assert gradient is not None
            assert gradient.is_neg()
            parameters[0].grad = gradient if lazy else gradient.resolve_neg()
            parameters[1].grad = torch._efficientzerotensor(70) if lazy else torch.zeros(70)
            optimizer.step()
            optimizer.zero_grad()
        found.append(snapshot(parameters, optimizer))
    assert same(*found)


@pytest.mark.parametrize("fused", [None, False])
def test_a_parameter_that_is_negated_lazily_is_refused(fused: bool | None) -> None:
    """By torch, which does not write to several of these at once."""
    p = nn.Parameter(torch._neg_view(torch.ones(70)))
    optimizer = IVON([p], lr=0.1, ess=100.0, hess_init=1.0, seed=0, fused=fused)
    with pytest.raises(RuntimeError, match="negation"):
        optimizer.train()


@pytest.mark.parametrize("fused", [None, False])
def test_a_draw_between_forward_and_backward_is_noticed(fused: bool | None) -> None:
    """As torch notices any change of what a backward pass needs."""
    p = nn.Parameter(torch.ones(5))
    optimizer = IVON([p], lr=0.1, ess=100.0, hess_init=1.0, fused=fused)
    optimizer.train()
    loss = p.square().sum()
    optimizer.eval()
    optimizer.train()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_fused_is_refused_where_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(RuntimeError, match="Install a C compiler"):
        make(fused=True)
    with pytest.raises(ValueError, match=r"`fused` to be True, False or None, but got 'yes'\. Leave it out"):
        make(fused="yes")
    parameters, optimizer = make(fused=None)
    run(optimizer, parameters, range(1))


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_where_there_is_a_compiler_there_are_kernels() -> None:
    """The installation goes on without them, and would not say so."""
    assert native.library() is not None, "install the package again: pip install -e ."


@pytest.mark.usefixtures("_only_with_kernels")
def test_a_build_that_is_absent_damaged_or_of_another_version_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find = native.library.__wrapped__
    assert find() is not None
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    assert find() is None
    suffix = native.sysconfig.get_config_var("EXT_SUFFIX")
    (tmp_path / f"_native{suffix}").write_bytes(b"not a library")
    assert find() is None
    monkeypatch.undo()
    monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
    assert find() is None


@pytest.mark.usefixtures("_only_with_kernels")
@pytest.mark.parametrize("share", [0.01, 0.999, 1.001, 100.0])
def test_gradients_are_clipped_as_torch_does(share: float) -> None:
    gradients = [torch.randn(size) for size in SIZES]
    exact = torch.cat(gradients).double().norm().item()
    before, versions = [gradient.clone() for gradient in gradients], [gradient._version for gradient in gradients]
    parameters = [nn.Parameter(torch.empty_like(gradient)) for gradient in gradients]
    for p, gradient in zip(parameters, before):
        p.grad = gradient.clone()
    nn.utils.clip_grad_norm_(parameters, share * exact)
    assert native.clip(gradients, share * exact) == pytest.approx(exact, rel=1e-12)
    for p, gradient in zip(parameters, gradients):
        assert p.grad is not None
        torch.testing.assert_close(gradient, p.grad, rtol=1e-6, atol=0)
    unchanged, seen = same(gradients, before), [gradient._version for gradient in gradients] != versions
    assert (unchanged, seen) == (share > 1, share < 1)


@pytest.mark.usefixtures("_only_with_kernels")
@pytest.mark.parametrize(("value", "norm"), [(1e30, 1e30), (math.inf, math.inf), (-math.inf, math.inf)])
def test_a_norm_beyond_float32_is_the_right_one(value: float, norm: float) -> None:
    gradients = [torch.zeros(70), torch.tensor([[0.0, value]])]
    assert native.clip(gradients, 1.0) == pytest.approx(norm, rel=1e-6)
    assert math.isinf(value) or gradients[1].tolist() == [[0.0, pytest.approx(1.0)]]
    assert math.isnan(native.clip([torch.tensor([math.nan, 1.0])], 1.0) or 0.0)


def test_what_kernels_cannot_read_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    one = torch.ones(4, 4)
    lazy = torch._neg_view(one), torch._efficientzerotensor(4, 4)
    for other in (one.half(), torch.ones(4, 4).T[:2], torch.ones(4).expand(4, 4), one.to_sparse(), *lazy):
        assert native.clip([one, other], 0.1) is None
    monkeypatch.setattr(native, "library", lambda: None)
    assert native.clip([one], 0.1) is None
    assert torch.equal(one, torch.ones(4, 4))


def test_the_structures_are_those_of_the_source() -> None:
    text = re.sub(r"/\*.*?\*/", "", (Path(native.__file__).parent / "native.c").read_text(), flags=re.DOTALL)
    for structure, fields in (("Settings", native.Settings._fields_), ("Work", native._Work._fields_)):
        body = re.search(rf"typedef struct {{([^}}]*)}} {structure};", text)
        assert body is not None
        declared = re.findall(r"(\w+)[,;]", body[1])
        assert declared == [name for name, _ in fields]
    assert f"VERSION = {native.VERSION}," in text


@pytest.mark.parametrize("fused", [None, False])
def test_another_default_device_changes_nothing(fused: bool | None) -> None:
    """Tables of addresses are the processor's, wherever new tensors would go."""
    found = []
    for device in ("cpu", "meta"):
        p = torch.nn.Parameter(torch.arange(40.0))
        optimizer = IVON([("p", p)], lr=0.1, ess=100.0, hess_init=1.0, seed=0, fused=fused)
        p.grad = torch.ones(40)
        with torch.device(device):
            optimizer.train()
            optimizer.step()
        found.append(p.detach().clone())
    assert torch.equal(*found)


def test_a_group_without_kernels_is_refused_whole() -> None:
    _, optimizer = make(fused=True)
    extra = torch.nn.Parameter(torch.ones(2, device="meta"))
    with pytest.raises(RuntimeError, match="fused"):
        optimizer.add_param_group({"params": [("extra", extra)]})
    assert len(optimizer.param_groups) == 1
