# SPDX-License-Identifier: Apache-2.0
"""What synthetic images are worth: classifiers trained on them, distances in feature space, nearest real neighbours.

``wavedp evaluate`` is the command; docs/evaluation.md has the definitions. Every figure here is computed from real
images without noise: none of them is private.
"""

from wavedp.evaluation.classifiers import ARCHITECTURES, Classifier, build_classifier
from wavedp.evaluation.distances import (
    DensityCoverage,
    PrecisionRecall,
    density_coverage,
    frechet_distance,
    gaussian_statistics,
    nearest,
    precision_recall,
)
from wavedp.evaluation.features import (
    FeatureNetwork,
    compare,
    load_feature_network,
    load_inception_features,
    train_feature_network,
)
from wavedp.evaluation.fitting import FittedClassifier, LabelledImages, accuracy, fit_classifier, predictions
from wavedp.evaluation.neighbours import Neighbours, copying, draw_neighbours, find_neighbours
from wavedp.evaluation.protocol import (
    ClassifierResult,
    label_source,
    protocol_delta,
    real_split,
    run_classifiers,
    summarise_results,
    synthetic_split,
    write_results,
)
from wavedp.evaluation.recipes import QUICK, ClassifierRecipe, dpimagebench_recipes
from wavedp.evaluation.small import classifier_accuracy, evaluate_synthetic

__all__ = [
    "ARCHITECTURES",
    "QUICK",
    "Classifier",
    "ClassifierRecipe",
    "ClassifierResult",
    "DensityCoverage",
    "FeatureNetwork",
    "FittedClassifier",
    "LabelledImages",
    "Neighbours",
    "PrecisionRecall",
    "accuracy",
    "build_classifier",
    "classifier_accuracy",
    "compare",
    "copying",
    "density_coverage",
    "dpimagebench_recipes",
    "draw_neighbours",
    "evaluate_synthetic",
    "find_neighbours",
    "fit_classifier",
    "frechet_distance",
    "gaussian_statistics",
    "label_source",
    "load_feature_network",
    "load_inception_features",
    "nearest",
    "precision_recall",
    "predictions",
    "protocol_delta",
    "real_split",
    "run_classifiers",
    "summarise_results",
    "synthetic_split",
    "train_feature_network",
    "write_results",
]
