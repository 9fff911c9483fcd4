"""Which linear layers are what they look like."""

from torch import nn


def is_plain(*layers: nn.Module) -> bool:
    """Whether the layers' weights and biases, read as they are, say what the layers compute.

    They do not where a layer was quantised, adapted (LoRA), offloaded or given a hook: such a layer has to be called.
    """
    return all(type(layer) is nn.Linear and not layer.weight.is_meta and not _hooked(layer) for layer in layers)


def _hooked(layer: nn.Module) -> bool:
    """Whether something else runs when the layer is called: a hook, or a `forward` of its own, as accelerate sets."""
    hooks = layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks
    return any(hooks) or "forward" in vars(layer)
