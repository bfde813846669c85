"""States as values: forked, reordered, moved, saved, continued more than once; and buffers that are written into."""

import copy
import subprocess

import pytest
import torch
from agreement import assert_close
from block_cases import VARIANTS, D, make, sequences
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torchrun import torchrun

from seqzoo.blocks import BLOCKS
from seqzoo.blocks.cache import KeyValueCache

CACHED = [
    ("softmax_attention", {}),
    ("softmax_attention", {"num_kv_heads": 2, "entropy_length": 64}),
    ("softmax_attention", {"window": 4}),
    ("gau", {"attention": "relu2_ns", "key_dim": 7}),
    ("gau", {"attention": "softmax", "key_dim": 8}),
]
CASES = [(name, VARIANTS[name][0]) for name in BLOCKS if name != "softmax_attention"] + CACHED
every = pytest.mark.parametrize(("name", "options"), CASES)
cached = pytest.mark.parametrize(("name", "options"), CACHED)
written_into = pytest.mark.parametrize(("name", "options"), [case for case in CACHED if "window" not in case[1]])


def parts(state):
    return dict(zip(state._fields, state, strict=True))


@every
@torch.no_grad()
def test_any_state_can_be_continued_at_any_time(name, options):
    """A tree of continuations, older states and forks among them, each of which gives what the whole sequence gives."""
    block = make(name, options, True)
    x = sequences(3, 12)
    others = [sequences(3, 12, seed=seed) for seed in (5, 6)]
    rows = torch.tensor([2, 0])

    def check(y, state, *pieces):
        whole = torch.cat(pieces, 1)
        assert_close(y, block(whole)[:, -y.shape[1] :], 1e-10)
        assert state.position.tolist() == [whole.shape[1]] * len(whole)
        return state

    root = check(*block.extend(x[:, :5], None), x[:, :5])
    before = copy.deepcopy(parts(root))
    fork = root.fork()
    first = check(*block.extend(x[:, 5:6], root), x[:, :6])
    second = check(*block.extend(others[0][:, :1], fork), x[:, :5], others[0][:, :1])
    chosen = root.select(rows)
    check(*block.extend(others[1][rows, :3], chosen), x[rows, :5], others[1][rows, :3])
    twice = first.repeat(2)
    step = sequences(6, 1, seed=7)
    check(*block.extend(step, twice), x[:, :6].repeat_interleave(2, 0), step)
    third = check(*block.extend(x[:, 6:], first), x)
    check(*block.extend(others[1][:, :2], second), x[:, :5], others[0][:, :1], others[1][:, :2])
    check(*block.extend(others[0][:, :1], root), x[:, :5], others[0][:, :1])
    check(*block.extend(others[0][:, :1], third), x, others[0][:, :1])
    for key, part in parts(root).items():
        if key in ("keys", "values"):  # what is behind the entries may have been written
            assert torch.equal(part[:, :5], before[key][:, :5])
        elif key != "written":
            assert torch.equal(part, before[key])


@every
def test_a_state_is_saved_moved_and_taken_apart(name, options, tmp_path):
    block = make(name, options, True, dtype=torch.float32)
    with torch.no_grad():
        _, state = block.extend(sequences(3, 9, dtype=torch.float32), None)
        torch.save(state, tmp_path / "state.pt")
        loaded = torch.load(tmp_path / "state.pt", weights_only=True)
        assert type(loaded) is type(state)
        assert all(torch.equal(a, b) for a, b in zip(loaded, state, strict=True))
        step = sequences(3, 1, dtype=torch.float32)
        expected, _ = block.extend(step, state)
        assert torch.equal(block.extend(step, loaded)[0], expected)
        for rows, indices in ([1], [1]), (slice(1, 3), [1, 2]), (torch.tensor([True, False, True]), [0, 2]), ([], []):
            for key, part in parts(state.select(rows)).items():
                assert torch.equal(part, parts(state)[key][torch.tensor(indices, dtype=torch.int64)])
    half = state.to(torch.bfloat16)
    begun = make(name, options, True, dtype=torch.bfloat16).initial_state(3)
    assert [part.dtype for part in half] == [part.dtype for part in begun]
    assert all(part.device.type == "meta" for part in state.to("meta"))
    assert half.to(dtype=torch.float64).position.dtype == torch.int64
    with pytest.raises(ValueError, match=r"floating point, got torch\.int32; valid"):
        state.to(torch.int32)


@written_into
@torch.no_grad()
def test_buffers_are_written_into(name, options):
    block = make(name, options, True)
    _, state = block.extend(sequences(2, 5), block.initial_state(2, max_length=12))
    places = [(part.data_ptr(), part.shape) for part in (state.keys, state.values)]
    assert state.keys.shape[1] == 12
    for _ in range(7):
        _, state = block.extend(sequences(2, 1), state)
    assert [(part.data_ptr(), part.shape) for part in (state.keys, state.values)] == places
    _, longer = block.extend(sequences(2, 1), state)
    assert longer.keys.shape[1] == 24
    idle = longer
    for _ in range(30):
        _, idle = block.extend(sequences(2, 1), idle, lengths=torch.tensor([0, 0]))
    assert (idle.position.tolist(), idle.keys.shape[1]) == ([13, 13], 24)
    for wrong in (-1, 2.0, True):
        with pytest.raises(ValueError, match=r"max_length=.*; valid"):
            block.initial_state(1, max_length=wrong)


@cached
def test_gradients_and_other_modes_meet(name, options):
    """A state with a graph, one of inference mode and one of neither, each continued in each of them."""
    block, x = make(name, options, True), sequences(2, 10)
    modes = (torch.enable_grad, torch.no_grad, torch.inference_mode)
    whole = block(x)
    for begin in modes:
        with begin():
            y, state = block.extend(x[:, :6], None)
        for go_on in modes:
            with go_on():
                z, after = block.extend(x[:, 6:9], state)
                last, _ = block.extend(x[:, 9:], after)
                assert_close(z, whole[:, 6:9], 1e-10)
                assert_close(last, whole[:, 9:], 1e-10)
        if begin is torch.enable_grad:
            y.sum().backward()


@cached
@torch.no_grad()
def test_ragged_steps_are_written_where_they_belong(name, options):
    block, x = make(name, options, True), sequences(3, 12)
    whole = block(x)
    position, state = torch.zeros(3, dtype=torch.int64), block.initial_state(3, max_length=4)
    for lengths in ([3, 0, 1], [1, 1, 1], [0, 5, 2], [1, 1, 1], [0, 0, 0], [4, 0, 3]):
        piece = torch.full((3, 5, D), torch.nan, dtype=torch.float64)
        for b, n in enumerate(lengths):
            piece[b, :n] = x[b, position[b] : position[b] + n]
        y, state = block.extend(piece, state, lengths=torch.tensor(lengths))
        for b, n in enumerate(lengths):
            assert_close(y[b, :n], whole[b, position[b] : position[b] + n], 1e-10)
        position += torch.tensor(lengths)
    assert state.position.tolist() == position.tolist()
    at = position.tolist()
    step = torch.stack([x[b, n : n + 1] for b, n in enumerate(at)])
    y, _ = block.extend(step, state)
    for b, n in enumerate(at):
        assert_close(y[b], whole[b, n : n + 1], 1e-10)


def test_hooks_see_what_extends():
    block, seen = make("lru", {}, True), []
    block.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    block.register_forward_hook(lambda _, given, found: seen.append(type(found[1])))
    x = sequences(2, 5)
    _, state = block.extend(x[:, :4], None)
    z, after = block(x[:, 4:], state=state)
    assert seen == [(2, 4, D), type(state), (2, 1, D), type(state)]
    assert torch.equal(z, block.extend(x[:, 4:], state)[0])
    assert after.position.tolist() == [5, 5]


SCRIPT = """
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from seqzoo import build_block
from seqzoo.blocks import Wide

torch.distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
for name, policies in (("lru", 2), ("rwkv7", 2), ("softmax_attention", 1)):  # its weights are rounded by their number
    for policy in (MixedPrecisionPolicy(), half)[:policies]:
        torch.manual_seed(0)
        block = build_block(name, 16, causal=True).eval()
        for part in (*(part for part in block.modules() if isinstance(part, Wide)), block):
            fully_shard(part, mesh=mesh, mp_policy=policy if part is block else MixedPrecisionPolicy())
        x = torch.randn(2, 60, 16, dtype=policy.param_dtype)
        with torch.no_grad():
            whole, state, parts = block(x), None, []
            for piece in x.split(3, 1):
                y, state = block.extend(piece, state)
                parts.append(y)
        error = (torch.cat(parts, 1) - whole).float().norm() / whole.float().norm()
        assert error < 1e-3, (name, policy, error)  # 4e-3 where sums are rounded
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_a_block_in_shards_extends_as_it_is_and_sums_are_not_rounded(tmp_path):
    subprocess.run(**torchrun(SCRIPT, tmp_path), check=True, timeout=300)


class _Waits(TorchFunctionMode):
    """Counts what waits for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        self.count += function in (Tensor.tolist, Tensor.item, Tensor.__int__, Tensor.__bool__, Tensor.nonzero)
        return function(*arguments, **(keywords or {}))


@torch.no_grad()
def test_a_cache_waits_for_the_device_once_a_step():
    cache = KeyValueCache.empty(2, 8, (1, 4), (1, 4), device=None, dtype=torch.float32)
    k = torch.randn(2, 1, 1, 4)
    for lengths, waits in ((None, 1), (None, 1), (torch.tensor([1, 0]), 2), (None, 2)):
        with _Waits() as found:
            *_, cache = cache.append(k, k, lengths, None)
        assert found.count == waits
    assert cache.position.tolist() == [4, 3]
