"""Whole models: built from a case's configuration and loaded with its parameters as `farspan convert` would."""

from torch import Tensor

import farspan.models
from farspan.models.convert import families
from farspan.models.convert.families import Family, Published
from farspan.models.convert.names import AnyEntry, Copy, to_ours, to_published
from farspan.models.modeling import FarspanPreTrainedModel
from tests.golden.case import Case


def published_model(case: Case, family: str) -> tuple[FarspanPreTrainedModel, list[AnyEntry]]:
    """The model of a case in evaluation mode and the map of its parameters; the family has to be found out."""
    published = Published(case.config, {name: tuple(x.shape) for name, x in case.params.items()})
    found = families.detect(published)
    assert found.name == family, f"{case.name}: taken for {found.name}"
    return build(case, found, published)


def build(case: Case, family: Family, published: Published) -> tuple[FarspanPreTrainedModel, list[AnyEntry]]:
    """The model of a case of a known family."""
    config = family.read_config(published)
    entries = family.entries(config)
    model: FarspanPreTrainedModel = getattr(farspan.models, config.architectures[0])(config).eval()
    state = to_ours(case.params, entries)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, f"{case.name}: parameters of no module: {unexpected}"
    assert set(missing) <= set(model.all_tied_weights_keys), f"{case.name}: not loaded: {missing}"
    back = to_published(state, entries)
    for name, x in case.params.items():
        if name in back:
            assert back[name].equal(x), f"{case.name}: {name} does not come back as it was"
    return model, entries


def gradients(model: FarspanPreTrainedModel, entries: list[AnyEntry]) -> dict[str, Tensor]:
    """Published name → gradient, of every parameter that has one."""
    found = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    partial = [entry for entry in entries if (held := _held(entry)) and all(name in found for name in held)]
    return to_published({name: found[name] for entry in partial for name in entry.our_names()}, partial)


def _held(entry: AnyEntry) -> tuple[str, ...]:
    """Our parameters whose values the published tensor shows; a repeated one has the same gradient."""
    return (entry.ours,) if isinstance(entry, Copy) else entry.our_names()
