# SPDX-License-Identifier: Apache-2.0
"""How far rounding may move a clipped sum, and which records may share one float32 product for it.

A float32 sum of several records rounds each of them in a way that depends on the others, so taking one away
moves the sum by a little more than that record's contribution. Sums of one record alone do not: whatever
their rounding, it belongs to the record.
"""

import math

from wavedp.privacy.validation import check_integer

MAX_BLOCK_RECORDS = 64
"""Most records that one float32 product may add up; blocks of records add up in float64."""

MAX_BLOCK_ROWS = 8192
"""Most token rows, over all its records, that one float32 product may add up, unless they are one record's."""

SUM_ROUNDING_ALLOWANCE = 2.0**-9
"""Share of C by which rounding may move a clipped sum when a record is added or removed.

Sums over blocks are float64, where n of them move by less than ``n^2 2^-53``. What counts is the float32 sum
inside a block of m records with T rows each. In any order of summation, ``K = m T`` terms are off by at most
``(K - 1) u`` times the sum of their absolute values (Higham 2002, eq. 4.6, to first order; u = 2^-24), so by
``m T u m C`` in norm, if a record's terms do not cancel each other. With and without the record together::

    moved beyond its own contribution  <=  2 m^2 T 2^-24 C

which is 2^-9 C for the blocks of :func:`records_per_block`. It is a worst case that exists: half of the records,
C each, come first, and the others bring rows just below half a unit in the last place of the sum, which are all
lost or all counted depending on one record more or less. Measured with float32 ``torch.matmul`` (MKL), the worst of
some thousand such batches, in units of C:

====================  ==================  ========================  =================================
block (records, T)    product             one record removed        every block shifted by one record
====================  ==================  ========================  =================================
64, 128               1 x 1, 1 x 64       2^-7.0                    2^-7.3 a block
64, 128               16 x 16, 256 x 64   2^-14.9                   2^-13.5 a block
64, 1                 256 x 64            2^-14.0                   2^-14.0 a block
11, 128               1 x 1, 1 x 64       2^-12.2                   2^-12.2 a block
11, 128               16 x 16, 256 x 64   2^-17.9                   2^-15.3 a block
====================  ==================  ========================  =================================

Batched products (``torch.bmm``), by which the blocks of a layer are taken together, gave the same as single ones.

So the allowance holds by proof for one block of :func:`records_per_block`, and by measurement, with a margin of
2^5, for one of :data:`MAX_BLOCK_RECORDS` and :data:`MAX_BLOCK_ROWS` whose product has at least 16 rows and columns;
not for a narrower product of that size, which libraries add up one row after the other (wider ones sum runs of
some hundred rows first), so that roundings of one sign pile up.

It does not cover everything. A removed record shifts all that follow by one place. Roundings of many blocks then
change at once: ``sqrt(blocks)`` times some 2^-18 for data that was not made for it, but up to the last column times
the number of blocks, 2^-9.5 for a thousand records in blocks of 64, for data whose order was. And a record whose
terms cancel to 1/r of their absolute sum multiplies the rounding it causes by up to r, which the share added to
norms keeps below 2^10; measured at r = 2^10, beside aligned records: 2^-12.7.
"""

_MAX_SQUARE_RECORDS_TIMES_ROWS = 2**14  # m^2 T, from 2 m^2 T 2^-24 <= SUM_ROUNDING_ALLOWANCE


def records_per_block(
    rows: int,  # T, of every record
) -> int:
    """Return how many records of ``rows`` token rows may share a float32 sum: at least 1, at most 64.

    The most for which ``2 m^2 T 2^-24`` stays within :data:`SUM_ROUNDING_ALLOWANCE`, whatever the order of summation:
    64 records of up to 4 rows, 16 of 64, 11 of 128, 4 of 1,024, one of more than 4,096.

    Raises:
        TypeError, ValueError: ``rows`` is not an integer, or negative.
    """
    rows = max(1, check_integer("rows", rows))
    by_rounding = math.isqrt(_MAX_SQUARE_RECORDS_TIMES_ROWS // rows)
    return max(1, min(by_rounding, MAX_BLOCK_RECORDS, MAX_BLOCK_ROWS // rows))
