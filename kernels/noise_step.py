# SPDX-License-Identifier: Apache-2.0
"""A private step of SGD or Adam over all parameters in one launch; ``wavedp.reference.noise_step`` defines it.

The elements of all tensors are one row, of which a program takes those of its 128 blocks: a group of the stream that
lies across small tensors is made once. A table on the device says where tensors begin, where their memory is and what
they are multiplied by; a program finds its first tensor by bisection, and goes through those that follow until its
elements end. The sum, the moments and the parameter are read once and written once, and the noise never leaves the
registers: 28 bytes an element for Adam in float32, as without noise.

What occurs in a launch (types, moments, averages) is compiled in, so that nothing is asked of each element that all
tensors answer alike; sizes, the key, steps and constants are not.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from wavedp.kernels.haar import on_device
from wavedp.kernels.noise_mean import BLOCK, GROUP_BLOCKS, LAUNCH, device_key, group_normals, scales
from wavedp.kernels.noise_normals import (
    COLUMNS,
    NARROW,
    ROUNDING_DOMAIN,
    ROUNDING_ROWS,
    STRICT,
    WIDE,
    lane_places,
    mean_of,
    narrowed,
    noise_block,
    noisy_sum,
    pair_of_normals,
    rows_of,
    stream_block,
    within,
)

# A row of the table: the first element of a tensor, addresses (0: there is none), types and flags.
FIELDS = tl.constexpr(9)
PARAM = tl.constexpr(1)
TOTAL = tl.constexpr(2)
FIRST = tl.constexpr(3)
SECOND = tl.constexpr(4)
LARGEST = tl.constexpr(5)
AVERAGE = tl.constexpr(6)
MASTER = tl.constexpr(7)
TYPES = tl.constexpr(8)  # of the parameter; 16 times that of the sum; 256 where rounded at random
_MEMORY = ("param", "total", "first", "second", "largest", "average", "master")

FLOAT32 = tl.constexpr(1)
FLOAT64 = tl.constexpr(2)
BFLOAT16 = tl.constexpr(4)
FLOAT16 = tl.constexpr(8)
ABSENT = tl.constexpr(16)  # among those that occur: some tensors have none
CODES = {torch.float32: 1, torch.float64: 2, torch.bfloat16: 4, torch.float16: 8}

# A row of the second table: StepConstants, and the square of the scale of the root.
SIGN, L2, RATE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
KEEP_FIRST, NEW_FIRST = tl.constexpr(3), tl.constexpr(4)
NESTEROV, FROM_FIRST = tl.constexpr(5), tl.constexpr(6)
KEEP, KEEP_SECOND, NEW_SECOND = tl.constexpr(7), tl.constexpr(8), tl.constexpr(9)
ROOT_SCALE, EPS = tl.constexpr(10), tl.constexpr(11)
NOISE_SQUARE, LEAST_SQUARE = tl.constexpr(12), tl.constexpr(13)
AVERAGE_WEIGHT = tl.constexpr(14)
SQUARE_SCALE = tl.constexpr(15)
CONSTANTS = tl.constexpr(16)
SGD = tl.constexpr(0)
NONE, SOME, ALL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # of a launch's tensors have something


@triton.jit
def _field(table_ptr, tensor, FIELD: tl.constexpr):
    return tl.load(table_ptr + (tensor * FIELDS + FIELD))


@triton.jit
def _numbers(ptr, first, COUNT: tl.constexpr):
    """Those at ``first`` and behind it; what is not used is not loaded."""
    out = ()
    for k in tl.static_range(COUNT):
        out = out + (tl.load(ptr + (first + k)),)  # noqa: RUF005 (Triton has no `*`)
    return out


@triton.jit
def _holder(table_ptr, tensors, element):
    """The tensor that holds an element."""
    low, high = tl.full((), 0, tl.int64), tensors - 1
    while low < high:
        middle = (low + high) // 2
        behind = _field(table_ptr, middle + 1, 0) <= element
        low, high = tl.where(behind, middle + 1, low), tl.where(behind, high, middle)
    return low


@triton.jit
def _load_of(address, offsets, mask, code, OCCUR: tl.constexpr, TYPE: tl.constexpr, dtype: tl.constexpr, value):
    """What lies at ``address`` if that is of ``TYPE``, else ``value``."""
    if TYPE & OCCUR:
        of_type = mask if OCCUR == TYPE else mask & (code == TYPE)
        loaded = tl.load(address.to(tl.pointer_type(dtype)) + offsets, mask=of_type, other=0.0).to(value.dtype)
        value = loaded if OCCUR == TYPE else tl.where(code == TYPE, loaded, value)
    return value


@triton.jit
def _load_any(address, offsets, mask, code, OCCUR: tl.constexpr, REAL: tl.constexpr):
    """One of the types that occur, as ``REAL``; zeros for none."""
    value = tl.full(offsets.shape, 0.0, REAL)
    value = _load_of(address, offsets, mask, code, OCCUR, FLOAT32, tl.float32, value)
    value = _load_of(address, offsets, mask, code, OCCUR, FLOAT64, tl.float64, value)
    value = _load_of(address, offsets, mask, code, OCCUR, BFLOAT16, tl.bfloat16, value)
    return _load_of(address, offsets, mask, code, OCCUR, FLOAT16, tl.float16, value)


@triton.jit
def _store_of(address, offsets, mask, types, OCCUR: tl.constexpr, TYPE: tl.constexpr, value):
    if TYPE & OCCUR:
        of_type = mask if OCCUR == TYPE else mask & ((types & TYPE) != 0)
        tl.store(address.to(tl.pointer_type(value.dtype)) + offsets, value, mask=of_type)


@triton.jit
def _load(address, offsets, mask, PRESENT: tl.constexpr, REAL: tl.constexpr):
    """Moments and the like."""
    if PRESENT == NONE:
        return tl.full(offsets.shape, 0.0, REAL)
    else:
        there = mask if PRESENT == ALL else mask & (address != 0)
        return tl.load(address.to(tl.pointer_type(REAL)) + offsets, mask=there, other=0.0)


@triton.jit
def _store(address, offsets, mask, PRESENT: tl.constexpr, value):
    if PRESENT != NONE:
        there = mask if PRESENT == ALL else mask & (address != 0)
        tl.store(address.to(tl.pointer_type(value.dtype)) + offsets, value, mask=there)


@triton.jit
def _shifted(words, far, N: tl.constexpr, BY: tl.constexpr):
    """The first ``N`` of ``words``, or where ``far`` those that are ``BY`` further."""
    out = ()
    for i in tl.static_range(N):
        out = out + (tl.where(far, words[i + BY], words[i]),)  # noqa: RUF005
    return out


@triton.jit
def _rounding_words(key_ptr, groups, columns, step, ROWS: tl.constexpr):
    """The words whose halves round the numbers of a lane, those of rows 2 k and 2 k + 1 in word k. A lane's rows lie in
    one block of 32, or in two."""
    first_row = groups * ROWS
    number = first_row // ROUNDING_ROWS
    place = (first_row % ROUNDING_ROWS // 2).to(tl.int32)
    words = stream_block(key_ptr, number * COLUMNS + columns, step, ROUNDING_DOMAIN)
    if ROUNDING_ROWS % ROWS == 0:
        words = _shifted(words, (place & 8) != 0, 8, 8)
        return _shifted(words, (place & 4) != 0, 4, 4)
    else:
        words = words + stream_block(key_ptr, (number + 1) * COLUMNS + columns, step, ROUNDING_DOMAIN)
        words = _shifted(words, (place & 8) != 0, 12, 8)
        words = _shifted(words, (place & 4) != 0, 8, 4)
        words = _shifted(words, (place & 2) != 0, 6, 2)
        return _shifted(words, (place & 1) != 0, 5, 1)


@triton.jit
def _rounded_at_random(x, word, nearest, stochastic):
    """float32 to bfloat16 by adding the lower 16 bits of ``word`` below those that are kept, and cutting off: where the
    tensor asks for it and x is finite."""
    raw = (x.to(tl.int32, bitcast=True) + (word & 0xFFFF).to(tl.int32)) >> 16
    return tl.where((tl.abs(x) < float("inf")) & stochastic, raw.to(tl.int16).to(tl.bfloat16, bitcast=True), nearest)


@triton.jit
def _load_row(
    memory,  # addresses
    types,
    offsets,
    mask,
    REAL: tl.constexpr,
    LOADS: tl.constexpr,
):
    """Parameter, sum, moments and average of a row."""
    PARAMS: tl.constexpr = LOADS[0]
    TOTALS: tl.constexpr = LOADS[1]
    HAS_FIRST: tl.constexpr = LOADS[2]
    HAS_SECOND: tl.constexpr = LOADS[3]
    HAS_LARGEST: tl.constexpr = LOADS[4]
    HAS_AVERAGE: tl.constexpr = LOADS[5]
    HAS_MASTER: tl.constexpr = LOADS[6]
    x = _load(memory[MASTER], offsets, mask, HAS_MASTER, REAL)
    if HAS_MASTER != ALL:
        mine = mask if HAS_MASTER == NONE else mask & (memory[MASTER] == 0)
        param = _load_any(memory[PARAM], offsets, mine, types & 15, PARAMS, REAL)
        x = param if HAS_MASTER == NONE else tl.where(memory[MASTER] == 0, param, x)
    return (
        x,
        _load_any(memory[TOTAL], offsets, mask, (types >> 4) & 15, TOTALS, tl.float64),
        _load(memory[FIRST], offsets, mask, HAS_FIRST, REAL),
        _load(memory[SECOND], offsets, mask, HAS_SECOND, REAL),
        _load(memory[LARGEST], offsets, mask, HAS_LARGEST, REAL),
        _load(memory[AVERAGE], offsets, mask, HAS_AVERAGE, REAL),
    )


@triton.jit
def _sgd(x, g, m, c, has_first, HAS_FIRST: tl.constexpr):
    """As torch.optim.SGD, with momentum, dampening and Nesterov's direction."""
    direction = g
    if HAS_FIRST != NONE:
        # m = keep m + new g;  x -= rate (nesterov g + from_first m)
        m = c[KEEP_FIRST] * m + c[NEW_FIRST] * g
        ahead = c[NESTEROV] * g + c[FROM_FIRST] * m
        direction = ahead if HAS_FIRST == ALL else tl.where(has_first, ahead, g)
    return x - c[RATE] * direction, m


@triton.jit
def _adam(x, g, m, v, most, c, has_largest, HAS_LARGEST: tl.constexpr, CORRECTED: tl.constexpr):
    """As torch.optim.Adam and AdamW (Kingma and Ba, arXiv 1412.6980; Loshchilov and Hutter, arXiv 1711.05101), with the
    largest second moment where it is kept (Reddi et al., arXiv 1904.09237), and where it is CORRECTED without the
    noise's part (Tang et al., arXiv 2312.14334)."""
    # m += new (g - m);  v = keep v + new g^2;  x = keep x - rate m / (root + eps). Root and quotient of float32 are
    # Triton's, within 2 units in the last place: those that are rounded cost 30 instructions an element more.
    m = m + (g - m) * c[NEW_FIRST]
    v = c[KEEP_SECOND] * v + c[NEW_SECOND] * (g * g)
    square = v
    if HAS_LARGEST != NONE:
        most = tl.where(v <= most, most, v)
        square = most if HAS_LARGEST == ALL else tl.where(has_largest, most, v)
    if CORRECTED != ALL:
        root = tl.sqrt(square) * c[ROOT_SCALE]
    if CORRECTED != NONE:
        signal = square * c[SQUARE_SCALE] - c[NOISE_SQUARE]
        corrected = tl.sqrt(tl.where(signal < c[LEAST_SQUARE], c[LEAST_SQUARE], signal))
        root = corrected if CORRECTED == ALL else tl.where(c[LEAST_SQUARE] > 0.0, corrected, root)
    return c[KEEP] * x - c[RATE] * m / (root + c[EPS]), m, v, most


@triton.jit(do_not_specialize=["step", "first_group", "skipped", "tensors"])
def _noise_step_kernel(
    table_ptr,  # [tensors + 1, FIELDS] int64
    constants_ptr,  # [tensors, CONSTANTS] float32, or float64 for parameters of float64
    key_ptr,  # [8] int32
    step: tl.int64,
    first_group: tl.int64,  # the one that holds the first element
    skipped: tl.int64,  # its numbers before that
    tensors: tl.int64,
    std: tl.float64,
    grid: tl.float64,
    per_grid: tl.float64,
    std_per_grid: tl.float64,
    divisor: tl.float64,
    reciprocal: tl.float64,
    RULE: tl.constexpr,
    KIND: tl.constexpr,
    NOISE: tl.constexpr,
    GRID: tl.constexpr,
    LOADS: tl.constexpr,  # types of parameters and of sums that occur, added up; then NONE, SOME or ALL for the others
    STOCHASTIC: tl.constexpr,
    CORRECTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    REAL: tl.constexpr = constants_ptr.dtype.element_ty
    PARAMS: tl.constexpr = LOADS[0]
    HAS_FIRST: tl.constexpr = LOADS[2]
    HAS_SECOND: tl.constexpr = LOADS[3]
    HAS_LARGEST: tl.constexpr = LOADS[4]
    HAS_AVERAGE: tl.constexpr = LOADS[5]
    HAS_MASTER: tl.constexpr = LOADS[6]
    ROWS: tl.constexpr = rows_of(KIND)
    SIZE: tl.constexpr = ROWS * BLOCK
    program = tl.program_id(0).to(tl.int64)
    origin = program * SIZE - skipped  # element at place 0
    places = lane_places(ROWS, BLOCK)
    lanes = tl.arange(0, BLOCK)
    if NOISE:
        words = noise_block(key_ptr, first_group * COLUMNS + program * BLOCK + lanes, step, KIND)
        numbers = ()
        for pair in tl.static_range(ROWS // 2):
            numbers = numbers + pair_of_normals(words, pair, KIND)
    if STOCHASTIC:
        groups = first_group + program * (BLOCK // COLUMNS) + lanes // COLUMNS
        rounding = _rounding_words(key_ptr, groups, lanes % COLUMNS, step, ROWS)

    tensor = _holder(table_ptr, tensors, tl.maximum(origin, 0))
    start = _field(table_ptr, tensor, 0)
    while (tensor < tensors) & (start < origin + SIZE):
        stop = _field(table_ptr, tensor + 1, 0)
        memory = _numbers(table_ptr, tensor * FIELDS, FIELDS)
        c = _numbers(constants_ptr, tensor * CONSTANTS, CONSTANTS)
        types = memory[TYPES].to(tl.int32)
        # Tensors of the other arithmetic have a launch of their own.
        mine = (types & PARAMS) != 0
        begin = tl.maximum(start - origin, 0).to(tl.int32)
        end = tl.where(mine, tl.minimum(stop - origin, SIZE).to(tl.int32), begin)
        offsets = (origin - start) + places
        # Rows are loaded two ahead of the stores, which the compiler cannot know to be elsewhere.
        mask, next_mask = within(places, begin, end), within(places + COLUMNS, begin, end)
        row = _load_row(memory, types, offsets, mask, REAL, LOADS)
        next_row = _load_row(memory, types, offsets + COLUMNS, next_mask, REAL, LOADS)
        for k in tl.static_range(ROWS):
            x, total, m, v, most, mean = row
            at, inside = offsets + COLUMNS * k, mask
            row, mask = next_row, next_mask
            if k + 2 < ROWS:
                next_mask = within(places + COLUMNS * (k + 2), begin, end)
                next_row = _load_row(memory, types, offsets + COLUMNS * (k + 2), next_mask, REAL, LOADS)
            if NOISE:
                total = noisy_sum(total, numbers[k], std, grid, per_grid, std_per_grid, KIND, GRID)
            g = c[SIGN] * mean_of(total, divisor, reciprocal, REAL) + c[L2] * x
            if RULE == SGD:
                x, m = _sgd(x, g, m, c, memory[FIRST] != 0, HAS_FIRST)
            else:
                x, m, v, most = _adam(x, g, m, v, most, c, memory[LARGEST] != 0, HAS_LARGEST, CORRECTED)
            _store(memory[FIRST], at, inside, HAS_FIRST, m)
            _store(memory[SECOND], at, inside, HAS_SECOND, v)
            _store(memory[LARGEST], at, inside, HAS_LARGEST, most)
            _store(memory[AVERAGE], at, inside, HAS_AVERAGE, mean + c[AVERAGE_WEIGHT] * (x - mean))
            _store(memory[MASTER], at, inside, HAS_MASTER, x)
            if tl.float64 == REAL:
                _store_of(memory[PARAM], at, inside, types, PARAMS, FLOAT64, x)
            else:
                half = narrowed(x, tl.bfloat16)
                if STOCHASTIC:
                    half = _rounded_at_random(x, rounding[k // 2] >> (16 * (k % 2)), half, types >= 256)
                _store_of(memory[PARAM], at, inside, types, PARAMS, FLOAT32, x)
                _store_of(memory[PARAM], at, inside, types, PARAMS, FLOAT16, x.to(tl.float16))
                _store_of(memory[PARAM], at, inside, types, PARAMS, BFLOAT16, half)
        tensor += 1
        start = stop


def _presence(items: Sequence[bool]) -> int:
    return (ALL if all(items) else SOME if any(items) else NONE).value


def _table(tensors: Sequence[Any]) -> np.ndarray:
    """``[tensors + 1, FIELDS]``; the last row has but the place where the elements end."""
    table = np.zeros((len(tensors) + 1, FIELDS.value), dtype=np.int64)
    start = 0
    for row, one in zip(table, tensors):
        memory = [getattr(one, name) for name in _MEMORY]
        total = 0 if one.total is None else CODES[one.total.dtype]
        types = CODES[one.param.dtype] + 16 * total + 256 * bool(one.stochastic)
        row[:] = (start, *(0 if x is None else x.data_ptr() for x in memory), types)
        start += one.param.numel()
    table[-1, 0] = start
    return table


def _constants(tensors: Sequence[Any], dtype: np.dtype[Any]) -> np.ndarray:
    rows = [(*one.constants, one.constants.root_scale**2) for one in tensors]
    return np.array(rows, dtype=np.float64).astype(dtype)


def _on(device: torch.device, numbers: np.ndarray) -> torch.Tensor:
    host = torch.from_numpy(numbers)
    # From pinned memory the copy is queued, and the caller goes on.
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def noise_step_forward(
    rule: int,
    tensors: Sequence[Any],  # wavedp.reference.noise_step.StepTensor, contiguous, on one device
    std: float,
    grid: float,
    divisor: float,
    key: torch.Tensor,  # [32] uint8
    step: int,
    offset: int,
    strict: bool,
) -> None:
    """The step of ``wavedp.reference.noise_step.noise_step_forward``: one launch, and one for parameters of float64."""
    count = sum(one.param.numel() for one in tensors)
    if count == 0:
        return
    device = tensors[0].param.device
    with on_device(tensors[0].param), device_key(key, device) as memory:
        table = _on(device, _table(tensors))
        for real, dtype in ((torch.float32, np.dtype(np.float32)), (torch.float64, np.dtype(np.float64))):
            mine = [one for one in tensors if (one.param.dtype == torch.float64) == (real == torch.float64)]
            if not mine:
                continue
            kind = (STRICT if strict else WIDE if real == torch.float64 else NARROW).value
            first_group, skipped = divmod(offset, group_normals(kind))
            programs = triton.cdiv(skipped + count, group_normals(kind) * (BLOCK // GROUP_BLOCKS))
            _noise_step_kernel[(programs,)](
                table, _on(device, _constants(tensors, dtype)), memory, step, first_group, skipped, len(tensors),
                *scales(std, grid, divisor), RULE=rule, KIND=kind, NOISE=std > 0.0, GRID=grid > 0.0,
                **_occurring(mine), **LAUNCH,
            )  # fmt: skip


def _occurring(tensors: Sequence[Any]) -> dict[str, Any]:
    """What occurs in a launch. An address of 0 says that a tensor has none of what some have."""
    params = functools.reduce(operator.or_, (CODES[one.param.dtype] for one in tensors))
    totals = [ABSENT.value if one.total is None else CODES[one.total.dtype] for one in tensors]
    others = (_presence([getattr(one, name) is not None for one in tensors]) for name in _MEMORY[2:])
    return {
        "LOADS": (params, functools.reduce(operator.or_, totals), *others),
        "STOCHASTIC": any(one.stochastic for one in tensors),
        "CORRECTED": _presence([one.constants.least_square > 0.0 for one in tensors]),
    }
