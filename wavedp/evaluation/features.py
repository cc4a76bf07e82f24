# SPDX-License-Identifier: Apache-2.0
"""The features that distances are taken in: of a network trained on the real training split, or of Inception-v3."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wavedp.errors import BadFileError, InvalidValueError, MissingFileError
from wavedp.evaluation.classifiers import Classifier, build_classifier
from wavedp.evaluation.distances import density_coverage, frechet_distance, gaussian_statistics, precision_recall
from wavedp.evaluation.fitting import LabelledImages, fit_classifier, remove_checkpoint, scaled
from wavedp.evaluation.inception import load_inception
from wavedp.evaluation.recipes import QUICK, ClassifierRecipe
from wavedp.storage import CONFIG_FILE, load_folder, load_weights, save_folder, write_bytes

INCEPTION = "Inception-v3"
PRIVATE_NOTE = "NOT PRIVATE: computed from real images without noise. Do not publish it if they are sensitive.\n"


@dataclass(frozen=True)
class FeatureNetwork:
    """Images to vectors.

    Attributes:
        name: what a distance in these features says about them.
        embed: 8-bit images ``[n, C, S, S]`` to features ``[n, D]``.
        accuracy: on the images that were held out while it learned; None for Inception.
    """

    name: str
    embed: Callable[[Tensor], Tensor]
    device: torch.device
    accuracy: float | None = None

    def features(self, images: Tensor, *, batch_size: int = 256, progress: bool = False) -> Tensor:
        """Features, float32 ``[N, D]`` on the CPU, of 8-bit images ``[N, C, S, S]``."""
        from tqdm import tqdm

        parts = []
        with torch.no_grad(), tqdm(total=len(images), desc="features", unit="image", disable=not progress) as bar:
            for part in images.split(batch_size):
                parts.append(self.embed(part.to(self.device)).float().cpu())
                bar.update(len(part))
        return torch.cat(parts)


def train_feature_network(
    train: LabelledImages,
    validation: LabelledImages,
    *,
    num_classes: int,
    folder: Path,
    recipe: ClassifierRecipe = QUICK,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> FeatureNetwork:
    """Trains a classifier on real images and takes its penultimate layer; what is already in ``folder`` is loaded.

    The weights are computed from real images without privacy: ``folder`` says so in NOT_PRIVATE.txt.

    Args:
        train, validation: the real training split, and what chooses the epoch.
        num_classes: number of labels.
        folder: for the weights, and checkpoints meanwhile.

    Raises:
        ValueError: when ``folder`` has a network of other images or another recipe.
    """
    trained_on = {"recipe": recipe.to_dict(), "seed": seed, "images": train.fingerprint()}
    if not (folder / CONFIG_FILE).is_file():
        fit = fit_classifier(
            recipe, train, validation, num_classes=num_classes, seed=seed, folder=folder, device=device,
            title="feature network", progress=progress,
        )  # fmt: skip
        config = {
            **trained_on,
            "channels": train.images.shape[1],
            "num_classes": num_classes,
            "validation_accuracy": fit.validation_accuracy,
        }
        write_bytes(folder / "NOT_PRIVATE.txt", PRIVATE_NOTE.encode())
        save_folder(folder, config, fit.model.state_dict(), private=True)
        remove_checkpoint(folder)
    config, _ = load_folder(folder)
    changed = [key for key, value in trained_on.items() if config.get(key) != value]
    if changed:
        raise InvalidValueError(
            f"{folder} holds a feature network with other {' and '.join(changed)}; use another folder"
        )
    return load_feature_network(folder, device)


def load_feature_network(folder: Path, device: torch.device | str = "cpu") -> FeatureNetwork:
    """What :func:`train_feature_network` left in ``folder``.

    Raises:
        FileNotFoundError: if there is none.
        BadFileError: if it is damaged, or no feature network.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise MissingFileError(f"{folder} holds no feature network; give the features/ of an earlier evaluation")
    config, tensors = load_folder(folder)
    model, architecture = _untrained(config, folder)
    load_weights(model, tensors, folder)
    model.to(device).eval()
    return FeatureNetwork(
        f"the {architecture} CNN trained on the real training split",
        lambda images: model.embed(scaled(images)),
        torch.device(device),
        float(config["validation_accuracy"]),
    )


def load_inception_features(path: Path | str, device: torch.device | str = "cpu") -> FeatureNetwork:
    """Inception-v3's 2,048 pooled features, with weights of a safetensors file; a distance in them is an FID.

    Grey images are repeated in three channels; all are scaled to 299 x 299 (bilinear, as pytorch-fid).

    Raises:
        FileNotFoundError, BadFileError: as :func:`wavedp.evaluation.inception.load_inception`.
    """
    model = load_inception(path, device)
    return FeatureNetwork(
        INCEPTION,
        lambda images: model((images.to(torch.float32) / 255).expand(-1, 3, -1, -1)),
        torch.device(device),
    )


def compare(
    features_of: str, real: Tensor, synthetic: Tensor, *, num_neighbourhoods: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """Distances between two sets of images, given by their features.

    Args:
        features_of: :attr:`FeatureNetwork.name`; the Frechet distance is called FID for Inception's alone.
        real, synthetic: features ``[N, D]`` and ``[M, D]``; all of them give the Frechet distance.
        num_neighbourhoods: vectors of each set, drawn with ``seed``, for what compares every pair: precision and
            recall (k = 3), density and coverage (k = 5).

    Returns:
        A dictionary that JSON can hold, with the numbers of images used.

    Raises:
        ValueError: for fewer than six vectors in a set, or values that are not finite.
    """
    few = min(num_neighbourhoods, len(real), len(synthetic))
    generator = torch.Generator().manual_seed(seed)
    x, y = (part[torch.randperm(len(part), generator=generator)[:few]] for part in (real, synthetic))
    pr = precision_recall(x, y)
    dc = density_coverage(x, y)
    return {
        "name": "FID" if features_of == INCEPTION else f"FD (features of {features_of})",
        "frechet_distance": frechet_distance(*gaussian_statistics(real), *gaussian_statistics(synthetic)),
        "num_real": len(real),
        "num_synthetic": len(synthetic),
        "precision": pr.precision,
        "recall": pr.recall,
        "density": dc.density,
        "coverage": dc.coverage,
        "num_neighbourhoods": few,
        "private": False,
    }


def _untrained(config: Mapping[str, Any], folder: Path) -> tuple[Classifier, str]:
    try:
        recipe = config["recipe"]
        architecture = str(recipe["architecture"])
        channels, classes = int(config["channels"]), int(config["num_classes"])
        sizes = {str(name): value for name, value in recipe["sizes"].items()}
        if not 1 <= channels <= 3 or not 1 <= classes <= 2**16:
            raise InvalidValueError(f"{channels} channels and {classes} classes")
        return build_classifier(architecture, channels, classes, **sizes), architecture
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadFileError(
            f"{folder} holds no feature network ({error}); give the features/ of an evaluation"
        ) from error
