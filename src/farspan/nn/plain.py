"""Which linear layers are what they look like."""

from torch import nn


def is_plain(*layers: nn.Module) -> bool:
    """Whether the layers' weights and biases, read as they are, say what the layers compute.

    They do not where a layer was quantised, adapted (LoRA) or offloaded: such a layer has to be called.
    """
    return all(type(layer) is nn.Linear and not layer.weight.is_meta for layer in layers)
