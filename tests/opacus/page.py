# SPDX-License-Identifier: Apache-2.0
"""Writes docs/opacus.md: ``python tests/opacus/page.py`` measures everything, in some minutes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.metadata import version

import findings as f

from wavedp.benchmarks import precision
from wavedp.selftest import run_selftest

PAGE = f.ROOT / "docs" / "opacus.md"


@dataclass(frozen=True)
class Row:
    finding: str
    theirs: str
    ours: str
    more: str  # a page, a command
    holds: bool  # whether this package is free of it


HEAD = """# Ten findings about private training, here and in Opacus

Ten things that are wrong, or that one would not expect, in libraries for private training, each tried on Opacus
{opacus} and on this package. Written by `python tests/opacus/page.py`, which measures all of it on this machine's CPU;
`tests/opacus` holds what is said of this package, and fails if a row changes its verdict.

| | finding | Opacus {opacus} | here | more |
|---|---|---|---|---|
"""

NONE = """\
Of the eight faults, 1 to 4 and 6 to 9, this package shows none; what 5 and 10 say can be done is done in it."""

TAIL = """
## What is not as good as it sounds

* **1, 2.** Noise of the mode `standard` is on a public grid, which removes these events: a hardening, and no proof. For
  `strict` there is one, under the assumptions in [privacy.md](privacy.md). A parameter of bfloat16 is still rounded to
  bfloat16, after the noise and from the grid: post-processing.
* **4.** `insecure_seed=` makes noise from a seed, for debugging; such a run reports no epsilon and gets no statement.
* **5.** The cipher is not free on a CPU, where it takes more time than the rest of the optimizer's step. On a GPU
  nothing is measured; [the kernel report](../benchmarks/results/kernels.txt) says how many registers a step takes, and
  that none is spilled.
* **6.** Two runs on the same data cost two epsilons, here as there: [faults.md](faults.md) has the ledger that adds
  them up.
* **7.** `sample_rate` and `expected_batch_size` are the caller's. If a program counts them from the private data before
  it passes them, nothing here can see that.
* **8.** Poisson batches have no fixed size, and a pass over the data is no epoch: a third of the records is left out.
  The figures for shuffling are lower bounds for the worst data set, not attacks on a given one.
* **9.** Opacus' default is the PRV accountant, which does not understate here; it says of "gdp" that it may.
* **10.** The bugs are known ones. What nobody has thought of is not in the table.

## Reported of JAX, and not measured here

jax_privacy 2.0.0 with jax 0.7.2, on a CPU. Row 2: the noise of `gaussian_privatizer` follows the gradient's type; in
bfloat16 it had 128 values, from -2.89 to 2.52, and with a record of norm C 6.25 % of the outputs were above all that
were seen without it. Row 3: normals of float32 stayed within 5.42. Row 4: the default key has 31 bits, which can be
searched in minutes. None of these was repeated for this page.
"""


def percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share else "0"


def bits_row(trials: int) -> Row:
    found = {
        name: precision.events(one, trials)
        for name, one in precision.mechanisms().items()
        if name in (*precision.ours(), "Opacus", "Opacus, secure mode")
    }
    seen = {name: next(e for e in events if e.exponent == 24) for name, events in found.items()}
    plain, secure = seen["Opacus"], seen["Opacus, secure mode"]
    allowed = precision.gaussian_delta(precision.EPSILON)
    own = [event for name in precision.ours() for event in found[name]]
    holds = all(e.shown <= allowed for e in own) and not any(
        seen[name].without or seen[name].with_record for name in precision.ours()
    )
    return Row(
        "The last bits of a noisy sum tell whether a record is there: it is no multiple of 2^-24",
        f"{percent(plain.without / trials)} of the outputs without the record, {percent(plain.with_record / trials)} "
        f"with it; secure mode's arithmetic {percent(secure.without / trials)} and "
        f"{percent(secure.with_record / trials)}",
        "0 and 0, and no power of two shows more than the Gaussian mechanism does" if holds else "it tells",
        "[noise.md](noise.md#the-precision-test), `wavedp precision-test`",
        holds,
    )


def dtype_row(count: int) -> Row:
    theirs, ours = f.their_values(count), f.our_values(count)
    return Row(
        "Noise has the type of the parameters: for bfloat16 it has few values",
        f"{theirs.distinct:,} values among {count:,}",
        f"{ours.distinct:,} values: multiples of the grid, which depends on the deviation alone",
        "[noise.md](noise.md#what-it-is)",
        ours.distinct > 5 * theirs.distinct,
    )


def tail_row(count: int) -> Row:
    theirs, ours = f.their_tail(count), f.our_tail(count)
    expected, end = f.expected_beyond(count), f.our_end()
    return Row(
        "The noise ends early, and an output beyond is impossible without the record: a delta that nobody counts",
        f"{theirs.beyond} of {count:,} draws beyond {f.LIMIT:.2f}, where {expected:.1f} are expected, the largest "
        f"{theirs.largest:.2f}; a radius of 24 bits adds {f.truncation_delta(f.LIMIT):.1e} to delta in 10 uses",
        f"{ours.beyond} beyond it, the largest {ours.largest:.2f}; it ends at {end:.2f}, which adds "
        f"{f.truncation_delta(end):.0e} in 10 uses",
        "[noise.md](noise.md#the-law-tested), `wavedp noise-law`",
        f.truncation_delta(end) < 1e-12,
    )


def seed_row() -> Row:
    repeats, bits = f.our_noise_repeats(), f.our_key_bits()
    theirs = "the same noise" if f.their_noise_repeats() else "other noise"
    return Row(
        "Noise comes from a seed that can be searched: torch's CPU generator keeps 32 bits",
        f"{theirs} under the seeds 5 and 5 + 2^32",
        f"a key of {bits} bits from the operating system for every release; "
        f"{'torch.manual_seed decides' if repeats else 'torch.manual_seed changes nothing about'} it",
        "[decisions/0006-noise.md](decisions/0006-noise.md)",
        bits == 256 and not repeats,
    )


def cost_row() -> Row:
    times = f.step_times()

    def on_all(provider: str) -> str:
        return " and ".join(f"{of[provider]:.1f}" for of in times.values())

    return Row(
        "A cipher in registers is affordable",
        f"a step of AdamW with noise of a statistical generator takes {on_all('Opacus')} times as long as one "
        f"without noise ({on_all('Opacus, fused')} with torch's fused AdamW), on {' and '.join(times)}",
        f"{on_all('wavedp')} times as long, with ChaCha20; {on_all('wavedp, strict')} strict",
        "[noise.md](noise.md#what-it-costs), `wavedp bench noise`",
        all(of["wavedp"] < of["Opacus, fused"] for of in times.values()),
    )


def replay_row() -> Row:
    theirs, ours = f.their_replay(), f.our_replay()
    return Row(
        "A run that is started again under its seed makes the same noise: the difference of the two is a record",
        f"a withdrawn record's clipped gradient comes out with a relative error of {theirs.error:.0e}; epsilon "
        f"reported: {theirs.epsilon:.2f}",
        f"relative error {ours.error:.0f}: fresh noise in both; epsilon reported: {ours.epsilon:.2f}",
        "[faults.md](faults.md)",
        ours.error > 10,
    )


def constants_row() -> Row:
    (rate, size), (other_rate, other_size) = f.their_constants(2560), f.their_constants(2561)
    ours = f.our_constants(2560), f.our_constants(2561)
    return Row(
        "Sampling rate and denominator are computed from the number of records, which is private",
        f"2,560 records: {rate:.4f} and {size:g}; 2,561 records: {other_rate:.4f} and {other_size:g}",
        f"{ours[0][0]:.4f} and {ours[0][1]:g}, as they are given; 2,561 records: {ours[1][0]:.4f} and {ours[1][1]:g}",
        "[private_training.md](private_training.md#moving-from-opacus)",
        ours[0] == ours[1] == (0.1, 256),
    )


def shuffle_row(steps: int, sigma: float) -> Row:
    theirs, ours = f.their_epoch(steps, sigma), f.our_epoch(steps, sigma)
    true = f.shuffled_epsilon(steps, sigma)
    return Row(
        "Shuffled batches are charged as if they were Poisson samples",
        f"with `poisson_sampling=False` {percent(theirs.once)} of the records are in one batch of an epoch each; "
        f"epsilon {theirs.epsilon:.3f} is reported at noise {sigma:g} and {steps:,} steps; it is at least {true:.2f}",
        f"a loader with `shuffle=True` gets Poisson batches: {percent(ours.once)} of the records in one batch; epsilon "
        f"{ours.epsilon:.3f}. There is no way to shuffle",
        "[accounting.md](accounting.md#assumptions)",
        ours.once < 0.5,
    )


def accountant_row() -> Row:
    lower, upper = f.our_bounds()
    gdp, prv, rdp = (f.their_epsilon(name) for name in ("gdp", "prv", "rdp"))
    return Row(
        'The central-limit accountant ("gdp") understates',
        f"{gdp:.4f} at rate 0.01, noise 1, 1,000 steps, where {lower:.4f} is proven; PRV {prv:.4f}, RDP {rdp:.4f}",
        f"{upper:.4f}, an upper bound, with the lower one beside it; there is no such accountant",
        "[accounting.md](accounting.md)",
        lower <= upper and gdp < lower,
    )


def selftest_row(seeds: int, bugs: list[str] | None = None) -> Row:
    report = run_selftest(seeds=seeds, bugs=bugs, processes=2)
    caught = sum(one.caught for one in report.bugs)
    return Row(
        "Tests that know of privacy bugs are cheap, and are not shipped",
        "none to run on an installation",
        f"`wavedp selftest`: {caught} of {len(report.bugs)} planted bugs caught, {len(report.false_alarms)} false "
        f"alarms in {seeds} seeds",
        "[selftest.md](selftest.md)",
        report.passed,
    )


def rows() -> list[Row]:
    return [
        bits_row(2_000_000),
        dtype_row(1 << 20),
        tail_row(1_000_000_000),
        seed_row(),
        cost_row(),
        replay_row(),
        constants_row(),
        shuffle_row(1000, 0.7),
        accountant_row(),
        selftest_row(60),
    ]


def page(found: list[Row]) -> str:
    lines = [f"| {k} | {row.finding} | {row.theirs} | {row.ours} | {row.more} |" for k, row in enumerate(found, 1)]
    shown = [k for k, row in enumerate(found, 1) if not row.holds]
    verdict = f"This package fails in {shown}." if shown else NONE
    return HEAD.format(opacus=version("opacus")) + "\n".join(lines) + f"\n\n{verdict}\n" + TAIL


if __name__ == "__main__":
    found = rows()
    PAGE.write_text(page(found), encoding="utf-8")
    sys.exit(not all(row.holds for row in found))
