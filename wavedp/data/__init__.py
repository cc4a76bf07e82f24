# SPDX-License-Identifier: Apache-2.0
"""Labelled images: real digits, public drawings, IDX files, image folders and archives."""

from wavedp.data.dataset import ImageDataset, TensorImageDataset, to_unit_range
from wavedp.data.digits import load_digits_dataset, native_digits
from wavedp.data.glyphs import render_glyphs
from wavedp.data.idx import IdxError, load_idx, read_idx
from wavedp.data.npz import NpzError, load_npz
from wavedp.data.picture_file import BadImageError
from wavedp.data.silhouettes import render_silhouettes
from wavedp.data.sources import NAMED_SOURCES, open_dataset

__all__ = [
    "NAMED_SOURCES",
    "BadImageError",
    "IdxError",
    "ImageDataset",
    "NpzError",
    "TensorImageDataset",
    "load_digits_dataset",
    "load_idx",
    "load_npz",
    "native_digits",
    "open_dataset",
    "read_idx",
    "render_glyphs",
    "render_silhouettes",
    "to_unit_range",
]
