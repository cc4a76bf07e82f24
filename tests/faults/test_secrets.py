# SPDX-License-Identifier: Apache-2.0
"""Nothing that a run writes, prints or pickles holds the key of a step's noise or the bits that drew its batches."""

import base64
import io
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from wavedp.data import TensorImageDataset
from wavedp.functional import NoiseKey
from wavedp.models import (
    AutoregressiveConfig,
    AutoregressiveTransformer,
    SpectralTokenizer,
    SpectralTokenizerConfig,
)
from wavedp.optim import DPAdam
from wavedp.privacy import (
    Entropy,
    PoissonSampler,
    PrivacyLedger,
    PrivacySpec,
    PrivacyStatement,
    PrivateOptimizer,
    physical_batches,
)
from wavedp.training.private import PrivateTrainingConfig, export_model, finetune_private, save_private_checkpoint

MakeSpec = Callable[..., PrivacySpec]
WINDOW = 8  # bytes of a secret that are looked for together


class Secrets:
    """All keys and sampling words that were drawn while it was installed."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.words: list[bytes] = []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        from_os, read = NoiseKey.from_os.__func__, Entropy.read

        def drawn(cls: type[NoiseKey]) -> NoiseKey:
            key = from_os(cls)
            self.keys.append(bytes(key._bytes().tolist()))
            return key

        def words(entropy: Entropy, size: int) -> bytes:
            self.words.append(read(entropy, size))
            return self.words[-1]

        patch.setattr(NoiseKey, "from_os", classmethod(drawn))
        patch.setattr(Entropy, "read", words)

    def found_in(self, content: bytes) -> list[str]:
        """What of them is in ``content``: any eight bytes in a row of a key, any aligned word of the sampling."""
        found = []
        for kind, secrets, stride in (("key", self.keys, 1), ("sampling", self.words, WINDOW)):
            for secret in secrets:
                windows = [secret[i : i + WINDOW] for i in range(0, len(secret) - WINDOW + 1, stride)]
                # As text: in hexadecimal, in base64 of the whole, and as a list of numbers.
                texts = [secret.hex(), base64.b64encode(secret).decode(), str(list(secret))[1:-1]]
                forms = [*windows, *(window.hex().encode() for window in windows), *(text.encode() for text in texts)]
                found += [kind] * any(form in content for form in forms)
        return found


@pytest.fixture
def secrets() -> Iterator[Secrets]:
    found = Secrets()
    with pytest.MonkeyPatch.context() as patch:
        found.install(patch)
        yield found


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.name, path.read_bytes()


def test_a_planted_secret_is_found(secrets: Secrets) -> None:
    NoiseKey.from_os()
    Entropy().words(40)
    (key,), (words,) = secrets.keys, secrets.words
    for planted in (key, key[5:13], key.hex().encode(), base64.b64encode(key), str(list(key)).encode()):
        assert secrets.found_in(b"before" + planted + b"after") == ["key"]
    assert secrets.found_in(b"." + words[64:72]) == ["sampling"]
    assert secrets.found_in(pickle.dumps({"state": words})) == ["sampling"]
    assert secrets.found_in(bytes(1000)) == []


@pytest.mark.parametrize("batch", range(5))
def test_50_runs_write_no_secret(
    tmp_path: Path, spec: MakeSpec, secrets: Secrets, capfd: pytest.CaptureFixture[str], batch: int
) -> None:
    """Ten each: checkpoints after every step, all that can be pickled, printed or stated, and the ledger."""
    made = spec(steps=4, sample_rate=0.3)
    records = torch.randn(60, 5)
    for run in range(10):
        folder = tmp_path / str(run)
        folder.mkdir()
        model = torch.nn.Linear(5, 3)
        inner = DPAdam(model.parameters(), ema_decay=0.9)
        sampler = PoissonSampler.for_spec(made, len(records))
        with (
            PrivacyLedger(folder / "ledger.jsonl", made) as ledger,
            PrivateOptimizer(model, inner, made, sampler=sampler, ledger=ledger) as private,
        ):
            for released, indices in enumerate(sampler, start=1):
                for chunk in physical_batches(indices, 16):
                    private.backward(model(records[chunk]).square().sum(1), records=chunk)
                private.step()
                save_private_checkpoint(folder / "checkpoint", model, inner, released, ledger)
                pickled = io.BytesIO()
                torch.save([private.state_dict(), model.state_dict(), [p.grad for p in model.parameters()]], pickled)
                (folder / f"{released}.pickle").write_bytes(pickled.getvalue())
            print(private, sampler, ledger, vars(private), vars(sampler), private.privacy_spent())
            statement = PrivacyStatement.from_run(private)
        (folder / "privacy").write_text(statement.to_json() + statement.to_text() + repr(statement))
        for secret in (private, ledger):
            with pytest.raises(TypeError, match="cannot be copied or pickled"):
                pickle.dumps(secret)
    assert len(secrets.keys) == len({*secrets.keys}) == 40
    assert sum(map(len, secrets.words)) >= 10 * 4 * 60 * 8
    printed = "".join(capfd.readouterr()).encode()
    assert b"PrivateOptimizer object" in printed
    searched = [("stdout", printed), *contents(tmp_path)]
    assert len(searched) == 1 + 10 * (1 + 2 * 3 + 4 + 1)
    assert [name for name, content in searched if secrets.found_in(content)] == []


TINY = AutoregressiveConfig(2, 4, 1, 256, 256, width=16, depth=1, heads=2)


def test_the_pipeline_writes_no_secret_and_publishes_only_its_tensors(
    tmp_path: Path, spec: MakeSpec, secrets: Secrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped and continued; its losses and its checkpoints are its owner's, and what is published is listed here."""
    torch.manual_seed(0)
    tokenizer = SpectralTokenizer(SpectralTokenizerConfig(image_size=16, levels=2, grid=2, width=16, heads=2)).eval()
    images = torch.randint(256, (20, 1, 16, 16), dtype=torch.uint8)
    dataset = TensorImageDataset(images, torch.arange(20) % 2, classes=("a", "b"), name="tiny")
    made = spec(steps=6, sample_rate=0.3, label_noise_multiplier=4.0)
    config = PrivateTrainingConfig(save_every=2)
    step, calls = PrivateOptimizer.step, 0

    def interrupting(self: PrivateOptimizer, *arguments: object) -> None:
        nonlocal calls
        calls += 1
        step(self, *arguments)
        if calls == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(PrivateOptimizer, "step", interrupting)
    with pytest.raises(KeyboardInterrupt):
        finetune_private(dataset, tokenizer, AutoregressiveTransformer(TINY), made, config, tmp_path, progress=False)
    model = AutoregressiveTransformer(TINY)
    finetune_private(dataset, tokenizer, model, made, config, tmp_path, progress=False)
    assert len(secrets.keys) == len({*secrets.keys}) == 7  # six steps and the histogram
    assert [name for name, content in contents(tmp_path) if secrets.found_in(content)] == []
    owners = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if not path.stat().st_mode & 0o077}
    assert owners == {"ledger.jsonl", "checkpoint", "log.csv"}
    assert sorted(path.suffix for path in (tmp_path / "model").iterdir()) == [".json", ".safetensors"]
    (written,) = (safetensors.torch.load_file(path) for path in (tmp_path / "model").glob("*.safetensors"))
    assert written.keys() == AutoregressiveTransformer(TINY).state_dict().keys()


def test_what_is_not_of_the_configuration_is_not_published(tmp_path: Path) -> None:
    model = AutoregressiveTransformer(TINY)
    model.register_buffer("seen", torch.zeros(3))
    with pytest.raises(ValueError, match=r"not published: \['seen'\]"):
        export_model(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    del model.seen
    model.norm.weight = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match=r"not published: \['norm\.weight'\]"):
        export_model(model, tmp_path / "model")


def test_state_of_unknown_origin_is_not_checkpointed(tmp_path: Path, spec: MakeSpec) -> None:
    model = torch.nn.Linear(2, 2)
    inner = DPAdam(model.parameters(), ema_decay=0.9)
    inner.state[model.weight]["grad_sample"] = torch.zeros(2)
    with (
        PrivacyLedger(tmp_path / "ledger", spec()) as ledger,
        pytest.raises(ValueError, match=r"\['grad_sample'\] is not known to stem from released steps"),
    ):
        save_private_checkpoint(tmp_path / "checkpoint", model, inner, 1, ledger)
    assert not (tmp_path / "checkpoint").exists()
