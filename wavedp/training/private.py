# SPDX-License-Identifier: Apache-2.0
"""The private stage: DP-Adam fine-tuning of the autoregressive model on coarse tokens. All of epsilon is spent here."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wavedp.data import ImageDataset
from wavedp.errors import InvalidValueError, StateError
from wavedp.models import AutoregressiveTransformer, SpectralTokenizer, TextEmbeddings, check_compatible, save_model
from wavedp.models.lora import merge_lora
from wavedp.optim import DPAdam
from wavedp.privacy import (
    PoissonSampler,
    PrivacyLedger,
    PrivacySpec,
    PrivacyStatement,
    PrivateOptimizer,
    physical_batches,
    release_label_histogram,
)
from wavedp.privacy.entropy import unpredictable_draws
from wavedp.privacy.histogram import HISTOGRAM_FILE
from wavedp.privacy.spec import LABEL_HISTOGRAM
from wavedp.privacy.validation import check_integer, check_real
from wavedp.storage import make_folder, write_bytes
from wavedp.training.augmentation import Augmentation, ImageVersions
from wavedp.training.checkpoints import load_newest, save_generation
from wavedp.training.interrupt import DeferredInterrupt
from wavedp.training.loop import SCHEDULES, optimizer_tensors, restore_optimizer, scheduled
from wavedp.training.public import check_text, tokenize
from wavedp.training.runs import CsvLog
from wavedp.training.trainable import choose_trainable

ASSUMPTIONS = (
    "The list of classes is public.",
    "This covers this run alone; other runs on the same images, restarts in another folder included, add to it.",
)


SHARED_ASSUMPTIONS = (
    "The list of classes is public.",
    "The ledger holds every run on these images; others add to it.",
)
TEXT_ASSUMPTION = "A record is an image with its class and its caption."
NEW_CLASSES = (
    "give the model these (--new-classes, AutoregressiveTransformer.with_classes), whose class embedding is then "
    "trained from nothing, on the private budget"
)
OPTIMIZER_STATE = frozenset({"step", "exp_avg", "exp_avg_sq", "average", "average_step"})
"""What a checkpoint may hold of an optimizer."""


@dataclass(frozen=True)
class PrivateTrainingConfig(Augmentation):
    """What may be chosen without touching the guarantee; everything that makes the guarantee is in `PrivacySpec`."""

    learning_rate: float = 1e-3
    schedule: str = "constant"  # of the learning rate over the charged steps, or "cosine": it ends near 0
    warmup_steps: int = 0  # over which the learning rate rises
    ema_decay: float = 0.95  # of the released weights, per step; 0 takes the last weights
    trainable: str = ".*"  # 'all', 'last-K-blocks', 'heads', or an expression that names of parameters match
    lora_rank: int | None = None  # of adapters that are trained in place of layers, and merged into the model
    lora_alpha: float | None = None  # their factor is alpha / rank; None: 1
    lora_targets: str | None = None  # expression that names of adapted layers match; None: all layers of all blocks
    physical_batch_size: int = 256  # images, every version counted; bounds memory, not the logical batch
    save_every: int = 10  # steps; a crash loses the paid steps since the last checkpoint

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real("learning_rate", self.learning_rate, above=0.0)
        check_real("ema_decay", self.ema_decay, at_least=0.0, below=1.0)
        check_integer("warmup_steps", self.warmup_steps, at_least=0)
        for name in ("physical_batch_size", "save_every"):
            check_integer(name, getattr(self, name), at_least=1)
        if self.schedule not in SCHEDULES:
            raise InvalidValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.physical_batch_size < self.augmentations:
            raise InvalidValueError(
                f"physical_batch_size={self.physical_batch_size} has no room for the {self.augmentations} versions of "
                "one image, which are clipped together"
            )

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of ``step`` of ``steps``, counted from 0: public constants, whatever the data."""
        return self.learning_rate * scheduled(self.schedule, step, steps, self.warmup_steps)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def finetune_private(
    dataset: ImageDataset,
    tokenizer: SpectralTokenizer,
    model: AutoregressiveTransformer,
    spec: PrivacySpec,
    config: PrivateTrainingConfig,
    folder: Path,
    *,
    text: TextEmbeddings | None = None,
    assumptions: Sequence[str] = (),
    ledger: PrivacyLedger | None = None,
    progress: bool = True,
) -> PrivacyStatement:
    """Fine-tunes ``model`` in place on the coarse tokens of ``dataset`` under ``spec``; returns the statement.

    Only the model's ``num_scales`` coarsest scales are ever computed from the images. A record is an image with its
    class and its row of ``text``, the embedding of its caption, in as many versions as ``config`` says: its gradient is
    the mean over them, clipped once, so that they cost nothing. LoRA adapters are merged into the model.

    Writes ``log.csv`` (whose losses are NOT private), ``ledger.jsonl`` (unless ``ledger`` is given, as where runs share
    a budget; it stays open), ``checkpoint/``, ``model/`` (the averaged weights), ``privacy.json`` and ``privacy.txt``
    in ``folder``, and ``label_histogram.json`` where ``spec`` charges one, released before the first step. A run that
    Ctrl-C stopped leaves all of them, and the same call continues it; steps that were charged and lost in a crash stay
    charged, and the statement says how many.

    Raises ValueError when data, tokenizer, model and specification do not fit, before anything is charged.
    """
    _check_inputs(dataset, tokenizer, model, spec)
    check_text(model, text, len(dataset), dataset.name)
    device = model.class_embedding.weight.device
    versions, labels = config.augmentations, dataset.labels
    tokens = tokenize(tokenizer, ImageVersions(dataset, config), model.config.num_scales)  # [N * versions, T]
    tokens = tokens.unflatten(0, (len(dataset), versions))
    choose_trainable(
        model,
        config.trainable,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_targets=config.lora_targets,
    )
    model.zero_grad(set_to_none=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = DPAdam(trained, lr=config.learning_rate, ema_decay=config.ema_decay)
    make_folder(folder)

    from tqdm import tqdm

    with contextlib.nullcontext(ledger) if ledger else PrivacyLedger(folder / "ledger.jsonl", spec) as ledger:
        ledger.check_spec(spec)
        lost_labels = _release_labels(dataset, spec, ledger, folder / HISTOGRAM_FILE)
        released, skipped = load_private_checkpoint(folder / "checkpoint", model, optimizer, ledger)
        start = ledger.charged
        sampler = PoissonSampler.for_spec(spec, len(dataset), steps=ledger.remaining)
        log = CsvLog(folder / "log.csv", ("step", "loss_not_private"), resume_before=start, private=True)
        bar = tqdm(total=spec.steps, initial=start, desc="finetune", unit="step", disable=not progress)
        model.train()
        with (
            bar,
            PrivateOptimizer(model, optimizer, spec, sampler=sampler, ledger=ledger, reserve_steps=1) as private,
            DeferredInterrupt() as interrupt,
            unpredictable_draws(device) as draw_anew,
        ):
            whole = True  # the weights are those after a step, not inside one
            try:
                for step, indices in enumerate(sampler, start=start):
                    total = 0.0
                    draw_anew()
                    for chunk in physical_batches(indices, config.physical_batch_size // versions):
                        rows = chunk.repeat_interleave(versions)  # a version has its record's class and text
                        given = () if text is None else text.rows(rows, device)
                        losses = model.loss(tokens[chunk].flatten(0, 1).to(device), labels[rows].to(device), *given)
                        private.backward(losses, records=chunk, sample_id=rows.to(device) if versions > 1 else None)
                        total += float(losses.detach().sum()) / versions
                    for group in optimizer.param_groups:
                        group["lr"] = config.rate(step, spec.steps)
                    whole = False
                    private.step()
                    released, whole = released + 1, True
                    if released % config.save_every == 0:
                        save_private_checkpoint(folder / "checkpoint", model, optimizer, released, ledger)
                    log.append(step=step, loss_not_private=total / max(len(indices), 1))
                    bar.update()
                    if interrupt.requested:
                        break
            finally:
                # Whatever stopped the run, the steps that were paid for are kept.
                model.eval()
                if released and whole:
                    save_private_checkpoint(folder / "checkpoint", model, optimizer, released, ledger)
            if not released:
                raise StateError(
                    f"all {ledger.charged} charged steps were lost before a checkpoint; there is no fine-tuned model"
                )
            covered: tuple[str, ...] = ASSUMPTIONS if ledger.budget is None else SHARED_ASSUMPTIONS
            covered = covered if text is None else (*covered, TEXT_ASSUMPTION)
            statement = PrivacyStatement.from_run(private, assumptions=[*covered, *assumptions])
            statement = replace(statement, warnings=(*statement.warnings, *skipped))
            if released < ledger.charged:
                lost = f"{ledger.charged - released} charged steps are not in the model: a crash lost them."
                statement = replace(statement, warnings=(*statement.warnings, lost))
            if lost_labels:
                statement = replace(statement, warnings=(*statement.warnings, lost_labels))
            private.close()
            with torch.no_grad():
                for parameter in trained:
                    parameter.copy_(optimizer.state[parameter]["average"])
            merge_lora(model)
            model.config = replace(model.config, privately_trained=True)
            export_model(model, folder / "model")
            write_statement(statement, folder)
    return statement


def _release_labels(dataset: ImageDataset, spec: PrivacySpec, ledger: PrivacyLedger, file: Path) -> str | None:
    """Releases and saves the label histogram, if there is one and it was not released; what to say if it was lost."""
    if LABEL_HISTOGRAM not in spec.releases:
        return None
    if LABEL_HISTOGRAM not in ledger.released:
        release_label_histogram(dataset.labels, len(dataset.classes), spec, ledger=ledger, path=file)
    elif not file.is_file():
        return f"The charged label histogram is not in {file.name}: a crash lost it, and it is not drawn again."
    return None


def _check_inputs(
    dataset: ImageDataset, tokenizer: SpectralTokenizer, model: AutoregressiveTransformer, spec: PrivacySpec
) -> None:
    check_compatible(tokenizer, model.config)
    if model.config.privately_trained:
        raise InvalidValueError(
            "this model was already fine-tuned on sensitive images, and a new budget would not cover that; start from "
            "the public model that 'wavedp pretrain' wrote"
        )
    if len(dataset.classes) != model.config.num_classes:
        raise InvalidValueError(
            f"{dataset.name} has {len(dataset.classes)} classes, the model {model.config.num_classes}; if they are the "
            f"model's, name all of those (--classes); if not, pre-train on the same classes, or {NEW_CLASSES}"
        )
    if model.config.class_names and dataset.classes != model.config.class_names:
        raise InvalidValueError(
            f"the classes of {dataset.name}, {list(dataset.classes)}, are not the model's, "
            f"{list(model.config.class_names)}; if they are the same, name them alike and in the same order "
            f"(--classes); if not, {NEW_CLASSES}"
        )
    if not math.isfinite(spec.epsilon()):
        raise InvalidValueError(f"noise_multiplier={spec.noise_multiplier:g} gives no finite epsilon; raise it")


def write_statement(statement: PrivacyStatement, folder: Path) -> None:
    """``privacy.json`` for programs and ``privacy.txt`` for people."""
    write_bytes(folder / "privacy.json", (statement.to_json() + "\n").encode())
    write_bytes(folder / "privacy.txt", statement.to_text().encode())


def export_model(model: AutoregressiveTransformer, folder: Path) -> None:
    """Writes what may be published: the tensors that a model of this configuration consists of, and no others.

    Raises ValueError where the model has others, such as buffers that were put into it; nothing is written.
    """
    with torch.device("meta"):
        allowed = AutoregressiveTransformer(model.config).state_dict()
    shapes, expected = ({k: v.shape for k, v in t.items()} for t in (model.state_dict(), allowed))
    other = sorted(k for k in {*shapes, *expected} if shapes.get(k) != expected.get(k))
    if other:
        raise InvalidValueError(
            f"not published: {other[:5]} of the model are not what its configuration says; remove them"
        )
    save_model(model, folder)


def save_private_checkpoint(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    released: int,
    ledger: PrivacyLedger,
) -> None:
    """Weights, Adam's moments, and the weights' average among them: all of it post-processing of released steps,
    none of it secret. An optimizer that holds anything else is refused with a ValueError."""
    scalars, states = optimizer_tensors(optimizer)
    other = {key.split(".", 1)[1] for key in [*scalars, *states]} - OPTIMIZER_STATE
    if other:
        raise InvalidValueError(f"the optimizer's state {sorted(other)} is not known to stem from released steps")
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"optimizer.{k}": v for k, v in states.items()}
    config = {
        "released": released,
        "run": ledger.run,
        "ledger_head": ledger.head,
        "ledger_lines": ledger.lines,
        "optimizer": scalars,
    }
    save_generation(folder, config, tensors)


def load_private_checkpoint(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ledger: PrivacyLedger,
) -> tuple[int, tuple[str, ...]]:
    """Restores the newest intact `save_private_checkpoint`; returns how many released steps the weights hold, 0 without
    a checkpoint, and a sentence for each newer one that was damaged.

    Raises ValueError when the checkpoint's spending is not in ``ledger``: it belongs to another run, or the ledger was
    replaced by an older one or continued from a copy.
    """
    found = load_newest(folder)
    if found is None:
        return 0, ()
    config, tensors = found.config, found.tensors
    try:
        released = int(config["released"])
        if "ledger_lines" not in config and not ledger.contains(config["ledger_head"]):
            raise InvalidValueError(f"its spending is not in {ledger.path}")
        if "ledger_lines" in config:
            ledger.check_history(config["ledger_head"], config["ledger_lines"])
        if config.get("run", "") != ledger.run or released > ledger.charged:
            raise InvalidValueError(
                f"it holds {released} steps of the run {config.get('run', '')!r}, and {ledger.path} charged "
                f"{ledger.charged} to {ledger.run!r}"
            )
        model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        states = {k[10:]: v for k, v in tensors.items() if k.startswith("optimizer.")}
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        if {key for key in states if key.endswith(".average")} != {f"{i}.average" for i in range(count)}:
            raise InvalidValueError("it trained other parameters, or was written by an earlier version")
        restore_optimizer(optimizer, config["optimizer"], states)
        return released, found.skipped
    except (KeyError, RuntimeError, ValueError) as error:
        raise InvalidValueError(f"the checkpoint in {found.path} does not fit this run: {error}") from error
