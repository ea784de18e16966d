"""The compressors of parameter groups, given for all at once or by name."""

from collections.abc import Mapping

from ef21_muon.checks import check_compressors
from ef21_muon.messages.compressors import Compressor
from ef21_muon.messages.switch import Switch, starts

# One for all parameter groups, or one for each by its name.
W2S = Compressor | Switch | Mapping[str, Compressor | Switch]
S2W = Compressor | Mapping[str, Compressor]


def starts_of(w2s: W2S) -> set[int]:
    """The rounds from which on phases are, also those of groups that another lane holds."""
    given = w2s.values() if isinstance(w2s, Mapping) else [w2s]
    return set().union(*(starts(one) for one in given))


def rule_of(group: dict, w2s: W2S, s2w: S2W) -> dict:
    """The compressors of a parameter group, beside its parameters."""
    entries = ("params", "param_names", "name", "transposed")
    rule = {key: group[key] for key in entries if key in group}
    for direction, given in (("w2s", w2s), ("s2w", s2w)):
        if isinstance(given, Mapping):
            if group.get("name") not in given:
                raise ValueError(
                    f"{direction} has compressors for {', '.join(given)}, and none for the group "
                    f"{group.get('name')!r}: give one for the name of every group"
                )
            given = given[group["name"]]
        rule[direction] = given
    check_compressors(rule)
    return rule
