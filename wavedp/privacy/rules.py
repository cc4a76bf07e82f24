# SPDX-License-Identifier: Apache-2.0
"""Which rule a layer has: the one place where layer types and rules meet."""

from torch import nn

from wavedp.privacy.layers import EmbeddingRule, LayerNormRule, LayerRule, LinearRule, RMSNormRule

SUPPORTED_LAYERS = "Linear, Embedding, LayerNorm, RMSNorm"

# Looked up by forward function: a subclass that keeps its parent's forward keeps its rule, and one that
# changes it has none.
_RULES: dict[object, LayerRule] = {
    nn.Linear.forward: LinearRule(),
    nn.Embedding.forward: EmbeddingRule(),
    nn.LayerNorm.forward: LayerNormRule(),
    nn.RMSNorm.forward: RMSNormRule(),
}


def rule_for(layer: nn.Module) -> LayerRule | None:
    """Return the rule for a layer, or ``None`` where its type has none."""
    return _RULES.get(type(layer).forward)
