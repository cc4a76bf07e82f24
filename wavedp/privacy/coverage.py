# SPDX-License-Identifier: Apache-2.0
"""Which models can be trained privately: what is refused before the start, and what is watched during it."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from wavedp.privacy.layers import LayerRule
from wavedp.privacy.rules import SUPPORTED_LAYERS, rule_for


class BookedLayer(NamedTuple):
    """A layer with trainable parameters."""

    layer: nn.Module
    rule: LayerRule
    names: dict[str, str]  # what the rule calls a trainable parameter -> the model's name; tied ones share it


def booked_layers(model: nn.Module) -> dict[str, BookedLayer]:
    """Return the layers of ``model`` that own trainable parameters, by name, with their rules.

    A parameter that several layers own is booked in each of them, under its first name.

    Raises:
        ValueError: a module computes across records, a trainable parameter belongs to a module without a rule, a
            layer's settings are not supported, or nothing is trainable. The message names the module, its type, and
            what to do.
    """
    names = {id(parameter): name for name, parameter in trainable_parameters(model).items()}
    if not names:
        raise ValueError("the model has no trainable parameter: nothing requires a gradient")
    layers: dict[str, BookedLayer] = {}
    covered: str | None = None  # beginning of the names below the last layer whose rule stands for its subtree
    for path, module in model.named_modules(remove_duplicate=False):
        _refuse_cross_record(path, module)
        if covered is not None and path.startswith(covered):
            continue
        if any(module is booked.layer for booked in layers.values()):
            continue  # one module under two names
        rule = rule_for(module)
        whole = rule is not None and rule.covers_children
        owned = module.named_parameters(recurse=whole, remove_duplicate=False)
        trainable = {key: names[id(p)] for key, p in owned if p.requires_grad}
        if trainable:
            layers[path] = BookedLayer(module, _checked(path, module, rule, set(trainable)), trainable)
            if whole:
                covered = f"{path}." if path else ""
    return layers


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of ``model`` that require a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_groups(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Check that ``optimizer`` trains exactly ``parameters`` and would apply no gradient but theirs.

    Raises:
        ValueError: a parameter is missing or comes twice, or another tensor requires a gradient.
        RuntimeError: another tensor holds a ``.grad``.
    """
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    names = {id(parameter): name for name, parameter in parameters.items()}
    missing = sorted(set(names.values()) - {names.get(id(p), "") for p in grouped})
    if missing:
        raise ValueError(f"trainable parameters {missing} are in no optimizer group; add or freeze them")
    foreign = sum(p.requires_grad and id(p) not in names for p in grouped)
    if foreign or sum(p.requires_grad for p in grouped) != len(names):
        raise ValueError(
            f"the optimizer holds {foreign} trainable tensors that are not parameters of the model, or "
            f"holds one twice; every trainable parameter belongs to exactly one group"
        )
    held = sum(p.grad is not None and id(p) not in names for p in grouped)
    if held:
        raise RuntimeError(
            f"{held} tensors in the optimizer are not trained and hold a .grad, which a step would apply without "
            f"clipping and noise; set it to None, and run no backward but PrivateOptimizer.backward()"
        )


def saved_buffers(model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """Return every buffer that a state_dict would hold, with its version counter."""
    buffers = {}
    for prefix, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if key not in module._non_persistent_buffers_set:
                buffers[f"{prefix}.{key}" if prefix else key] = (buffer, buffer._version)
    return buffers


def saved_tensors(model: nn.Module, recurse: bool = True) -> dict[str, Tensor]:
    """Return every parameter and buffer that a state_dict would hold, by name."""
    tensors: dict[str, Tensor] = {}
    for prefix, module in model.named_modules() if recurse else [("", model)]:
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if key not in module._non_persistent_buffers_set:
                tensors[f"{prefix}.{key}" if prefix else key] = tensor
    return tensors


def _checked(name: str, module: nn.Module, rule: LayerRule | None, trainable: set[str]) -> LayerRule:
    title = f"module {name!r} of type {type(module).__name__}"
    if rule is None or (rule.parameters is not None and not trainable <= rule.parameters):
        raise ValueError(
            f"{title} owns trainable parameters {sorted(trainable)} whose per-record gradients are not "
            f"known; supported are {SUPPORTED_LAYERS}: move the parameters into one of these, or freeze "
            f"them with requires_grad_(False)"
        )
    if "forward" in vars(module):
        raise ValueError(
            f"{title} has a forward of its own (another GradientBook or a hook library is attached); detach it"
        )
    refusal = rule.refusal(module)
    if refusal is not None:
        raise ValueError(f"{title} is not supported: {refusal}")
    return rule


def _refuse_cross_record(name: str, module: nn.Module) -> None:
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ValueError(f"module {name!r} is a {type(module).__name__}: pass the model itself, on one device")
    tracks = isinstance(module, _InstanceNorm) and module.track_running_stats
    named = any("BatchNorm" in kind.__name__ for kind in type(module).__mro__)
    if isinstance(module, _BatchNorm) or named or tracks:
        raise ValueError(
            f"module {name!r} of type {type(module).__name__} mixes the records of a batch or keeps "
            f"statistics of them, frozen or not: replace it with LayerNorm, RMSNorm or GroupNorm"
        )
