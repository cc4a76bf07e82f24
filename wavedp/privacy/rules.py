# SPDX-License-Identifier: Apache-2.0
"""Which rule a layer has: the one place where layer types and rules meet."""

from torch import nn

from wavedp.privacy.layers import EmbeddingRule, LayerNormRule, LayerRule, LinearRule, RMSNormRule
from wavedp.privacy.layers_attention import MultiheadAttentionRule
from wavedp.privacy.layers_bag import EmbeddingBagRule
from wavedp.privacy.layers_conv import ConvolutionRule
from wavedp.privacy.layers_fallback import FallbackRule, RecurrentRule
from wavedp.privacy.layers_huggingface import TransposedLinearRule
from wavedp.privacy.layers_norm import GroupNormRule, InstanceNormRule

SUPPORTED_LAYERS = (
    "Linear, Embedding, EmbeddingBag, LayerNorm, RMSNorm, GroupNorm, InstanceNorm, Conv1d to Conv3d, "
    "MultiheadAttention, and Hugging Face's Conv1D"
)

_CONVOLUTION = ConvolutionRule()

# Looked up by forward function: a subclass that keeps its parent's forward keeps its rule, and one that
# changes it has none.
_RULES: dict[object, LayerRule] = {
    nn.Linear.forward: LinearRule(),
    nn.Embedding.forward: EmbeddingRule(),
    nn.EmbeddingBag.forward: EmbeddingBagRule(),
    nn.LayerNorm.forward: LayerNormRule(),
    nn.RMSNorm.forward: RMSNormRule(),
    nn.GroupNorm.forward: GroupNormRule(),
    nn.InstanceNorm1d.forward: InstanceNormRule(),
    nn.Conv1d.forward: _CONVOLUTION,
    nn.Conv2d.forward: _CONVOLUTION,
    nn.Conv3d.forward: _CONVOLUTION,
    nn.MultiheadAttention.forward: MultiheadAttentionRule(),
}

# What these forwards call on their layer: a subclass that changes it has no rule either.
_PARTS = {
    nn.Conv1d.forward: ("_conv_forward", nn.Conv1d._conv_forward),
    nn.Conv2d.forward: ("_conv_forward", nn.Conv2d._conv_forward),
    nn.Conv3d.forward: ("_conv_forward", nn.Conv3d._conv_forward),
    nn.InstanceNorm1d.forward: ("_apply_instance_norm", nn.InstanceNorm1d._apply_instance_norm),
}

# Of packages that are not imported for it: module and name of the forward function.
_FOREIGN_RULES: dict[tuple[str, str], LayerRule] = {
    ("transformers.pytorch_utils", "Conv1D.forward"): TransposedLinearRule(),
}


def rule_for(layer: nn.Module) -> LayerRule | None:
    """Return the rule for a layer, or ``None`` where its type has none."""
    run = type(layer).forward
    name, part = _PARTS.get(run, ("", None))
    if part is not None and getattr(type(layer), name) is not part:
        return None
    return _RULES.get(run) or _FOREIGN_RULES.get((run.__module__, run.__qualname__))


def fallback_for(name: str, layer: nn.Module) -> LayerRule:
    """Return a rule that runs a layer of any type, and all below it, by ``torch.func``."""
    return RecurrentRule(name) if isinstance(layer, nn.RNNBase) else FallbackRule(name)
