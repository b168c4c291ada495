"""The top rows of every layer, found as those of the massive layer are; only that layer's rows are massive weights."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from macdrop.scan.find import largest_state, ranked
from macdrop.scan.states import bos_states
from macdrop.weights import MassiveWeights


def layer_weights(model: nn.Module, weights: MassiveWeights) -> list[MassiveWeights]:
    """The scan of each layer that has an FFN: its own rows by descending |intermediate state| at bos.

    weights: the scan of this model; it stands in the list as it is. Of routed experts and a shared one, the part with
    the largest entry is taken. Layers whose FFN is silent at bos are left out: none of their rows comes first.
    """
    found = []
    for layer, parts in enumerate(bos_states(model, weights.bos_token_id).intermediates):
        part = largest_state(parts)
        if layer == weights.layer:
            found.append(weights)
        elif part is not None and float(part.state.abs().max()) > 0:
            magnitudes, order = ranked(part)
            own = replace(
                weights,
                layer=layer,
                path=part.ffn.path,
                kind=part.ffn.kind,
                expert=part.expert,
                intermediate_size=part.ffn.intermediate_size,
                hidden_size=part.ffn.hidden_size,
                indices=tuple(order.tolist()),
                magnitudes=tuple(magnitudes.tolist()),
            )
            found.append(own)
    return found
