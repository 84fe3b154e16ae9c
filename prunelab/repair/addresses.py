"""Names for what a repair computes: two selections that give something the same address give it the same content.

A corrected weight is addressed by all that its equations are made of, so that addresses are known before anything is
computed: what an earlier selection left in memory is found, and only what comes after the first change is done again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prunelab.program.incremental import Address, digest, digest_of, state_address
from prunelab.program.run import checked_masks, rebound_args
from prunelab.repair.places import Cut, Place


def of_states(cut: Cut) -> dict[int, Address]:
    """Of every parameter and buffer as the cut leaves it, by node."""
    program = cut.program
    masks = {name: digest_of(mask) for name, mask in checked_masks(program, cut.selection).items()}
    return {
        at: state_address(program, name, cut.gone, masks.get(name, b"")) for name, at in program.state_nodes.items()
    }


def of_values(
    cut: Cut, how: str, order: Iterable[int], places: Mapping[int, Place], norms: Iterable[int]
) -> dict[int, Address]:
    """Of every node's value in the repaired network, and of the repaired states, by node.

    Args:
        order: in which the network is walked; ``places``: what is solved, and ``norms`` what is estimated on the way.
    """
    nodes, found, args = cut.program.nodes, of_states(cut), rebound_args(cut.program, cut.selection)
    norms = set(norms)
    for i in order:
        node = nodes[i]
        if node.kind == "state":
            continue
        if i in places:
            place = places[i]
            after = [place.shortcut] if place.shortcut is not None else []
            after += [j for j in nodes[place.norm].inputs if nodes[j].kind == "state"] if place.norm is not None else []
            key = digest(f"{how} {place}".encode(), *(found[j] for j in (*node.inputs, *after)))
            found.update({j: digest(key, str(j).encode()) for j in changed_by(cut, place, how)})
        if i in norms:
            key = digest(b"statistics", found[node.inputs[0]])
            found.update({j: digest(key, str(j).encode()) for j in statistics(cut, i)})
        own = f"{i} {node.opname} {args.get(i, '')}".encode()
        found[i] = digest(own, *(found[j] for j in node.inputs))
    return found


def changed_by(cut: Cut, place: Place, how: str) -> list[int]:
    """The states that the repair of a layer changes, by node."""
    weight = [] if how == "bias" else [place.weight]
    return [*weight, *([] if (shift := shifted(cut, place)) is None else [shift])]


def shifted(cut: Cut, place: Place) -> int | None:
    """The state that takes a number added to each output: the layer's bias, else the mean of the norm after it."""
    if place.bias is not None or place.norm is None:
        return place.bias
    index: int = cut.program.nodes[place.norm].args["running_mean"].index
    return index


def statistics(cut: Cut, norm: int) -> list[int]:
    """Running mean and variance of a norm, by node."""
    return [cut.program.nodes[norm].args[name].index for name in ("running_mean", "running_var")]
