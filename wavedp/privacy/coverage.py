# SPDX-License-Identifier: Apache-2.0
"""Which models can be trained privately: what is refused before the start, and what is watched during it."""

import logging
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from wavedp.errors import InvalidValueError, StateError
from wavedp.privacy.layers import LayerRule
from wavedp.privacy.layers_fallback import FallbackRule
from wavedp.privacy.rules import SUPPORTED_LAYERS, fallback_for, rule_for

_log = logging.getLogger("wavedp.privacy")


class BookedLayer(NamedTuple):
    """A layer with trainable parameters."""

    layer: nn.Module
    rule: LayerRule
    names: dict[str, str]  # what the rule calls a trainable parameter -> the model's name; tied ones share it


def booked_layers(model: nn.Module) -> dict[str, BookedLayer]:
    """Return the layers of ``model`` that own trainable parameters, by name, with their rules.

    A parameter that several layers own is booked in each of them, under its first name. Parameters of a layer without
    a rule are booked by running it record by record, with all below it, as :mod:`wavedp.privacy.layers_fallback`
    says, and those of a module without a forward (a ParameterList) by so running the nearest module around it; a
    warning is logged for each.

    Raises:
        ValueError: a module computes across records, no module runs with a trainable parameter, a layer's settings
            are not supported, or nothing is trainable. The message names the module, its type, and what to do.
    """
    names = {id(parameter): name for name, parameter in trainable_parameters(model).items()}
    if not names:
        raise InvalidValueError("the model has no trainable parameter: nothing requires a gradient")
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        _refuse_cross_record(path, module)
        _refuse_derived_weights(path, module)
    rules: dict[str, LayerRule] = {}
    for path, module in modules.items():
        if _covering(path, rules) is not None:
            continue
        rule = rule_for(module)
        trainable = _trainable_of(module, rule, names)
        if not trainable:
            continue
        if rule is None or not (rule.parameters is None or trainable.keys() <= rule.parameters):
            path = _runner(path, modules, sorted(trainable))
            rule = fallback_for(path, modules[path])
        rules[path] = rule
    layers: dict[str, BookedLayer] = {}
    for path, rule in rules.items():
        module = modules[path]
        # One module may have two names; a layer may lie below one that was found later to cover it.
        known = any(module is booked.layer for booked in layers.values())
        if known or _covering(path, rules) is not None:
            continue
        _check_layer(path, module, rule)
        layers[path] = BookedLayer(module, rule, _trainable_of(module, rule, names))
        if isinstance(rule, FallbackRule):
            _log_fallback(path, layers[path], rule)
    return layers


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of ``model`` that require a gradient, by name; each once, by its first."""
    found: dict[str, nn.Parameter] = {}
    known = set()
    for path, module in _modules_of(model):
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and id(parameter) not in known:
                known.add(id(parameter))
                found[f"{path}.{key}" if path else key] = parameter
    return found


def _modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What ``model.named_modules()`` yields, in a fifth of the time: every step asks for it."""
    found: list[tuple[str, nn.Module]] = []
    known = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if module in known:
            continue
        known.add(module)
        found.append((path, module))
        children = module._modules
        if children:
            prefix = f"{path}." if path else ""
            waiting += [(prefix + key, child) for key, child in reversed(children.items()) if child is not None]
    return found


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
        raise InvalidValueError(f"trainable parameters {missing} are in no optimizer group; add or freeze them")
    foreign = sum(p.requires_grad and id(p) not in names for p in grouped)
    if foreign or sum(p.requires_grad for p in grouped) != len(names):
        raise InvalidValueError(
            f"the optimizer holds {foreign} trainable tensors that are not parameters of the model, or "
            f"holds one twice; every trainable parameter belongs to exactly one group"
        )
    held = sum(p.grad is not None and id(p) not in names for p in grouped)
    if held:
        raise StateError(
            f"{held} tensors in the optimizer are not trained and hold a .grad, which a step would apply without "
            f"clipping and noise; set it to None, and run no backward but PrivateOptimizer.backward()"
        )


def saved_buffers(model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """Return every buffer that a state_dict would hold, with its version counter."""
    buffers = {}
    for prefix, module in _modules_of(model):
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                buffers[f"{prefix}.{key}" if prefix else key] = (buffer, buffer._version)
    return buffers


def saved_tensors(model: nn.Module, recurse: bool = True) -> dict[str, Tensor]:
    """Return every parameter and buffer that a state_dict would hold, by name."""
    tensors: dict[str, Tensor] = {}
    for prefix, module in _modules_of(model) if recurse else [("", model)]:
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and key not in module._non_persistent_buffers_set:
                tensors[f"{prefix}.{key}" if prefix else key] = tensor
    return tensors


def _trainable_of(module: nn.Module, rule: LayerRule | None, names: Mapping[int, str]) -> dict[str, str]:
    """The trainable parameters that a rule has to differentiate: its name for each, and the model's."""
    whole = rule is not None and rule.covers_children
    owned = module.named_parameters(recurse=whole, remove_duplicate=False)
    return {key: names[id(parameter)] for key, parameter in owned if parameter.requires_grad}


def _covering(path: str, rules: Mapping[str, LayerRule]) -> str | None:
    """The layer above ``path`` whose rule stands for its subtree, if there is one."""
    for above in _paths_above(path):
        if above in rules and rules[above].covers_children:
            return above
    return None


def _paths_above(path: str) -> Iterator[str]:
    """The names of the modules around a module, from the nearest to the model."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _runner(path: str, modules: Mapping[str, nn.Module], trainable: list[str]) -> str:
    """The nearest module, itself or around it, that has a forward."""
    for name in (path, *_paths_above(path)):
        if type(modules[name]).forward is not nn.Module.forward:
            return name
    raise InvalidValueError(
        f"module {path!r} of type {type(modules[path]).__name__} owns trainable parameters {trainable}, and neither it "
        f"nor a module around it has a forward that uses them: move them into the module that does, or freeze them "
        f"with requires_grad_(False)"
    )


def _log_fallback(path: str, booked: BookedLayer, rule: FallbackRule) -> None:
    size = sum(parameter.numel() for parameter in booked.layer.parameters() if parameter.requires_grad)
    _log.warning(
        "module %r of type %s has no rule of its own: %s, and the gradients of its %d parameters (%s) take batch size "
        "x %d numbers of memory; there are rules for %s",
        path,
        type(booked.layer).__name__,
        rule.how,
        size,
        _abbreviated(list(booked.names)),
        size,
        SUPPORTED_LAYERS,
    )


def _abbreviated(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _check_layer(name: str, module: nn.Module, rule: LayerRule) -> None:
    title = f"module {name!r} of type {type(module).__name__}"
    if "forward" in vars(module):
        raise InvalidValueError(
            f"{title} has a forward of its own (another GradientBook or a hook library is attached); detach it"
        )
    refusal = rule.refusal(module)
    if refusal is not None:
        raise InvalidValueError(f"{title} is not supported: {refusal}")


def _refuse_derived_weights(name: str, module: nn.Module) -> None:
    """Refuse weights that are computed from the trainable parameters outside of any layer's forward."""
    title = f"module {name!r} of type {type(module).__name__}"
    if any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters(recurse=False)):
        raise InvalidValueError(f"{title} has parameters without a shape: run the model once before it is made private")
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    kinds = {type(hook).__name__ for hook in hooks} & {"WeightNorm", "SpectralNorm"}
    if is_parametrized(module):
        derived = sorted(module.parametrizations)  # type: ignore[arg-type]
        steps = (step for key in derived for step in module.parametrizations[key])  # type: ignore[index]
        kinds |= {type(step).__name__.lstrip("_") for step in steps}
        remedy = "torch.nn.utils.parametrize.remove_parametrizations"
    else:
        remedy = "torch.nn.utils.remove_weight_norm or remove_spectral_norm"
    if kinds and any(parameter.requires_grad for parameter in module.parameters()):
        raise InvalidValueError(
            f"{title} has weights that are computed from its parameters by {', '.join(sorted(kinds))}, outside of its "
            f"forward, so their per-record gradients are not known: take it away with {remedy}, or freeze the module"
        )


def _refuse_cross_record(name: str, module: nn.Module) -> None:
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise InvalidValueError(f"module {name!r} is a {type(module).__name__}: pass the model itself, on one device")
    tracks = isinstance(module, _InstanceNorm) and module.track_running_stats
    named = any("BatchNorm" in kind.__name__ for kind in type(module).__mro__)
    if isinstance(module, _BatchNorm) or named or tracks:
        raise InvalidValueError(
            f"module {name!r} of type {type(module).__name__} mixes the records of a batch or keeps "
            f"statistics of them, frozen or not: replace it with LayerNorm, RMSNorm or GroupNorm"
        )
