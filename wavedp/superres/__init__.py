# SPDX-License-Identifier: Apache-2.0
"""Super-resolution after the private stage: one adapter per public model, chosen by name.

It sees coarse images that are already differentially private and weights trained on public images, so by
post-processing it costs no privacy.
"""

from wavedp.superres.base import BatchedSuperResolver, SuperResolver
from wavedp.superres.chain import Chain, Resized
from wavedp.superres.espcn import Espcn, EspcnConfig, EspcnResolver
from wavedp.superres.interpolation import Bicubic, Haar
from wavedp.superres.registry import available, describe, from_pretrained, load
from wavedp.superres.sizing import to_size

__all__ = [
    "BatchedSuperResolver",
    "Bicubic",
    "Chain",
    "Espcn",
    "EspcnConfig",
    "EspcnResolver",
    "Haar",
    "Resized",
    "SuperResolver",
    "available",
    "describe",
    "from_pretrained",
    "load",
    "to_size",
]
