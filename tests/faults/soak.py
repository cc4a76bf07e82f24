# SPDX-License-Identifier: Apache-2.0
"""`make soak`: the private stage of the demo, killed with SIGKILL again and again at random moments, and continued.

After every kill: what was released is charged, no key of noise came twice, the newest checkpoint is whole and within
what the ledger charged, and no key is in any file of the run. Prints points tried and failures; exits with 1 if there
is one. A run that has spent its steps is followed by another, every second in a ledger that runs share.

The public models are untrained, batches are a fifth of the demo's and checkpoints come every second step: what is
private, charged and written does not depend on the first, and more kills find something to break.
"""

import argparse
import hashlib
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from wavedp.cli.demo import DemoSizes
from wavedp.data import load_digits_dataset
from wavedp.functional import NoiseKey
from wavedp.models import AutoregressiveTransformer, SpectralTokenizer
from wavedp.privacy import PrivacyBudget, PrivacyLedger, PrivacySpec, PrivateOptimizer, read_ledger
from wavedp.training import private as private_stage
from wavedp.training.checkpoints import load_newest
from wavedp.training.public import autoregressive_config

KEY, RELEASED = b"K", b"R"
BUDGET = PrivacyBudget(epsilon=1e6, delta=4e-4)


class Soak:
    """One folder of runs, the keys seen in them, and what went wrong."""

    def __init__(self, root: Path, longest: float) -> None:
        sizes = DemoSizes.default()
        torch.manual_seed(0)
        self.root, self.longest = root, longest
        self.dataset = load_digits_dataset(sizes.tokenizer.image_size, split="train")
        self.tokenizer = SpectralTokenizer(sizes.tokenizer).eval()
        self.model = AutoregressiveTransformer(
            autoregressive_config(
                self.tokenizer,
                classes=self.dataset.classes,
                num_scales=1,
                width=sizes.width,
                depth=sizes.depth,
                heads=4,
            )
        )
        self.config = replace(sizes.finetuning, save_every=2)
        self.spec = PrivacySpec(
            sample_rate=sizes.sample_rate / 5,
            steps=sizes.steps,
            noise_multiplier=2.0,
            max_grad_norm=sizes.max_grad_norm,
            expected_batch_size=sizes.expected_batch_size / 5,
            delta=sizes.delta,
            dataset_size_bound=sizes.max_records,
        )
        # What every life would compute again before its first step is computed once, and children remember it.
        self.spec.epsilon_bounds()
        tokens = private_stage.tokenize(self.tokenizer, self.dataset, self.model.config.num_scales)
        private_stage.tokenize = lambda *_: tokens
        self.hashes: set[bytes] = set()
        self.points = self.keys = self.steps = self.finished = self.runs = 0
        self.failures: list[str] = []

    def start_run(self) -> None:
        """Another run's folder; every second one is charged in the ledger that they share."""
        self.runs += 1
        self.folder = self.root / f"run-{self.runs}"
        self.shared = self.runs % 2 == 0
        self.ledger = self.root / "shared.jsonl" if self.shared else self.folder / "ledger.jsonl"
        self.released = 0
        self.secrets: list[bytes] = []

    def child(self, journal: int) -> None:
        """Train, and write every key and every release into the journal before going on."""
        from_os, step = NoiseKey.from_os.__func__, PrivateOptimizer.step

        def drawn(cls: type[NoiseKey]) -> NoiseKey:
            key = from_os(cls)
            os.write(journal, KEY + bytes(key._bytes().tolist()))
            return key

        def stepped(private: PrivateOptimizer) -> None:
            step(private)
            os.write(journal, RELEASED + bytes(32))

        NoiseKey.from_os, PrivateOptimizer.step = classmethod(drawn), stepped
        run = str(self.folder.name)
        ledger = PrivacyLedger(self.ledger, self.spec, budget=BUDGET, run=run) if self.shared else None
        private_stage.finetune_private(
            self.dataset, self.tokenizer, self.model, self.spec, self.config, self.folder, ledger=ledger, progress=False
        )

    def point(self, after: float, from_birth: bool) -> None:
        """One life of the run, killed ``after`` seconds from its birth or its first key on, and what must hold then."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(reader)
                self.child(writer)
                os._exit(0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
        os.close(writer)
        heard = b"" if from_birth else os.read(reader, 1 << 16)
        deadline, ended = time.monotonic() + after, False
        while time.monotonic() < deadline and not ended:
            ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
            if ready:
                part = os.read(reader, 1 << 16)
                heard, ended = heard + part, not part
        if not ended:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        self.expect(not ended or status == 0, "the run broke off by itself")
        while part := os.read(reader, 1 << 16):
            heard += part
        os.close(reader)
        self.points += 1
        self.check(heard, ended)

    def check(self, heard: bytes, ended: bool) -> None:
        records = [heard[i : i + 33] for i in range(0, len(heard), 33)]
        keys = [record[1:] for record in records if record[:1] == KEY]
        self.secrets += keys
        self.released += sum(record[:1] == RELEASED for record in records)
        self.steps += sum(record[:1] == RELEASED for record in records)
        self.keys += len(keys)
        for key in keys:
            digest = hashlib.sha256(key).digest()
            self.expect(digest not in self.hashes, "a key came twice")
            self.hashes.add(digest)
        charged = 0
        if self.ledger.exists():
            recorded = read_ledger(self.ledger).runs.get(self.folder.name if self.shared else "")
            charged = 0 if recorded is None else recorded.charged
        self.expect(len(self.secrets) <= charged, f"{len(self.secrets)} keys drawn, {charged} steps charged")
        self.expect(self.released <= charged, f"{self.released} steps released, {charged} charged")
        if (self.folder / "checkpoint").exists():
            try:
                found = load_newest(self.folder / "checkpoint")
            except ValueError as error:
                self.expect(False, str(error))
                found = None
            if found is not None:
                self.expect(not found.skipped, "; ".join(found.skipped))
                self.expect(found.config["released"] <= charged, "a checkpoint holds more steps than were charged")
        for path in self.root.rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                hits = [key for key in self.secrets if key in content or key.hex().encode() in content]
                self.expect(not hits, f"{path} holds a key")
        if ended:
            self.expect(charged == self.spec.steps, f"it ended with {charged} steps charged")
            self.expect((self.folder / "model" / "config.json").exists(), "it ended and left no model")
            self.expect((self.folder / "privacy.json").exists(), "it ended and left no statement")
            self.finished += 1
            shutil.rmtree(self.root / f"run-{self.runs - 1}", ignore_errors=True)
            self.start_run()

    def expect(self, holds: bool, complaint: str) -> None:
        if not holds:
            self.failures.append(f"point {self.points}, {self.folder.name}: {complaint}")
            print(f"FAILED: {self.failures[-1]}", flush=True)

    def report(self) -> str:
        return (
            f"{self.points} points tried, {len(self.failures)} failures; {self.steps} steps released, "
            f"{self.keys} keys, {self.finished} runs finished of {self.runs}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--longest", type=float, default=1.5, help="seconds that a life lasts at most")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chance, end = random.Random(), time.monotonic() + 60.0 * arguments.minutes
    with tempfile.TemporaryDirectory(prefix="wavedp-soak-") as root:
        soak = Soak(Path(root), arguments.longest)
        soak.start_run()
        said = time.monotonic()
        while time.monotonic() < end:
            soak.point(chance.uniform(0.0, soak.longest), from_birth=chance.random() < 0.3)
            if time.monotonic() - said > 60.0:
                said = time.monotonic()
                print(soak.report(), flush=True)
    print(soak.report())
    return 1 if soak.failures or not soak.steps else 0


if __name__ == "__main__":
    sys.exit(main())
