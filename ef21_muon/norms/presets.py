"""Parameter groups for EF21Muon: roles of parameters, and a norm and a radius for each role.

Roles are "hidden" (weights of linear and convolutional layers), "embedding" (tables and output
heads, tied or not) and "vector" (biases, gains). configs/norm has the same presets for Hydra.
"""

import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim.optimizer import ParamsT

from ef21_muon.compressors.base import Identity
from ef21_muon.norms.lmo import AdaptiveRadius, BiasRMS, Blocks, Norm, Sign, Spectral


def _rules(hidden: tuple, embedding: tuple, vector: tuple) -> dict[str, dict]:
    """Make rules from pairs of a norm and a radius."""
    pairs = {"hidden": hidden, "embedding": embedding, "vector": vector}
    return {role: {"norm": norm, "radius": radius} for role, (norm, radius) in pairs.items()}


# Only scion's radii were tuned. On 768 x 768 matrices the steps of all presets have the RMS of
# scion's: 1 / sqrt(768) = 0.036 for hidden layers, 60 / 768 = 0.078 for embeddings.
PRESETS = {
    # arXiv:2502.07529: the head's radius is 60 times that of hidden layers in its NanoGPT runs
    # (3000 / 50), that of biases the same in its DeiT and CIFAR runs (LIONS-EPFL/scion).
    "scion": _rules((Spectral(), 1.0), (Sign(), 60.0), (BiasRMS(), 1.0)),
    # Muon has AdamW for all but hidden matrices, which is no LMO; the sign step is the nearest one.
    "muon": _rules((Spectral(scaling="muon"), 1.0), (Sign(), 60.0), (BiasRMS(), 1.0)),
    # Gluon (arXiv:2505.13416) fits L0 = 0 and L1 = 70 to hidden layers of a NanoGPT with scion's
    # norms, L1 = 1.3 to its tied head, and to biases of a CNN the L1 of its hidden layers; here in
    # units of 70, so that lr is scion's. Give an l0 above 0 for steps that shrink with gradients.
    "gluon": _rules(
        (Spectral(), AdaptiveRadius(l0=0.0, l1=1.0)),
        (Sign(), AdaptiveRadius(l0=0.0, l1=0.0186)),
        (BiasRMS(), AdaptiveRadius(l0=0.0, l1=1.0)),
    ),
    # The Euclidean norm over sqrt(entries), so that a radius is the RMS of the step.
    "euclidean": _rules((BiasRMS(), 0.036), (BiasRMS(), 0.078), (BiasRMS(), 1.0)),
}
TABLES = (nn.Embedding, nn.EmbeddingBag)
DECONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)  # (d_in, d_out, ...)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *DECONVOLUTIONS)
# By which a table or an output head is recognised where there is no module: parts of its name, and
# sides whose ratio no hidden matrix of a transformer has (a fused gate and up projection has 5.4).
TABLE_WORDS = {"emb", "embd", "embed", "embedding", "embeddings", "wte", "wpe", "head", "vocab"}
TABLE_RATIO = 8
NORMALISATIONS = (nn.LayerNorm, nn.RMSNorm)  # their gains may have several dimensions
# By role that follows from the type: roles that a pattern with wildcards may not give it.
NOT_BY_WILDCARD = {
    "vector": ("hidden", "embedding"),
    "embedding": ("hidden", "vector"),
    "hidden": ("vector",),
}


def param_groups(
    model: nn.Module,
    preset: str | Mapping[str, Mapping] = "scion",
    *,
    roles: Mapping[str, str] | None = None,
    transposed: Sequence[str] = (),
) -> list[dict]:
    """Sort a model's parameters by role, and give each role its norm and radius.

    Roles follow from module types. Parameters with up to one dimension, and gains of
    normalisations, are a "vector". The weight of an embedding is an "embedding", and so is a linear
    output head: one that is tied to a table, or the last linear layer if it has the shape of a
    table. Weights of other linear layers and of convolutions are "hidden". With the preset "scion"
    convolutions take Scion's steps (conv_scaling=True). Where the norm is `Spectral`, a grouped
    convolution takes the steps of convolutions side by side (`Blocks`).

    Args:
        model: whose parameters that require a gradient are sorted, each under the first of its
            names.
        preset: "scion" (hidden: Spectral() of radius 1, embedding: Sign() of 60, vector: BiasRMS()
            of 1), "muon" (Spectral("muon")), "gluon" (adaptive radii) or "euclidean"; or a rule for
            each role, {"hidden": {"norm": Spectral(), "radius": 1.0}, ...}, with w2s, s2w and what
            else groups of `EF21Muon` take. What a rule leaves out is the default, but vectors are
            not compressed.
        roles: name patterns (fnmatch) to roles. They go before types, and the first that matches
            counts. They are needed for other parameters of two or more dimensions, for linear
            layers that might be a head, and for the last linear layer of a model without tables.
        transposed: name patterns of weights that are stored as (d_in, d_out), beside those of
            transposed convolutions and of transformers' Conv1D: a norm sees (d_out, d_in).

    Returns:
        Groups {"name": role, "params": [(name, parameter), ...], "norm": ..., "radius": ...}. A
        role has groups of its own for transposed weights, and for grouped convolutions.

    Raises:
        ValueError: for an unclear role, a role without a rule, an unknown preset, a pattern that
            never counts, and a pattern with wildcards that takes what has another role or
            orientation by type.

    Example:
        >>> model = nn.Sequential(nn.Embedding(64, 8), nn.Linear(8, 8), nn.Linear(8, 64))
        >>> [(group["name"], len(group["params"])) for group in param_groups(model)]
        [('embedding', 2), ('hidden', 1), ('vector', 2)]

    References:
        Scion: arXiv:2502.07529. Gluon: arXiv:2505.13416.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={type(model).__name__} is not allowed: give the torch.nn.Module")
    rules, layers = _rules_of(preset), _Layers(model)
    found = layers.roles(roles or {})
    turned = layers.turned(transposed)
    convolutions = {m.weight: m for m in model.modules() if isinstance(m, CONVOLUTIONS)}
    groups: dict[tuple, dict] = {}
    for parameter, role in found.items():
        name = layers.names[parameter][0]
        if role not in rules:
            given = f"the role {role!r} of {name} has no rule in the preset"
            raise ValueError(f"{given}: it has {', '.join(rules)}")
        exact = {"w2s": Identity(), "s2w": Identity()} if role == "vector" else {}
        new = {"name": role, "params": [], **exact, **rules[role]}
        if parameter in turned:
            new["transposed"] = True
        convolution = convolutions.get(parameter)
        blocks = _take_blocks(new, convolution) if convolution else None
        group = groups.setdefault((role, parameter in turned, blocks), new)
        group["params"].append((name, parameter))
        if convolution and role == "hidden" and preset == "scion":
            group["conv_scaling"] = True
    return list(groups.values())


def _rules_of(preset: str | Mapping[str, Mapping]) -> Mapping[str, Mapping]:
    rules = preset if isinstance(preset, Mapping) else PRESETS.get(preset)
    if rules is None:
        known = f"{', '.join(PRESETS)}, or give a rule for each role"
        raise ValueError(f"preset={preset!r} is not known: choose {known}")
    return rules


def _take_blocks(group: dict, convolution: _ConvNd) -> tuple[int, bool] | None:
    """Give a grouped convolution the steps of its convolutions, if they are spectral."""
    norm = group.get("norm", Spectral())
    if convolution.groups == 1 or not isinstance(norm, Spectral):
        return None
    # The blocks of a matrix (d_out, d_in) are in d_in where the convolution is transposed.
    blocks = (convolution.groups, isinstance(convolution, DECONVOLUTIONS))
    group["norm"] = Blocks(norm, *blocks)
    return blocks


def groups_of(
    params: nn.Module | ParamsT,
    norm: Norm | None,
    radius: float | AdaptiveRadius | None,
    rank: int = 0,
) -> ParamsT:
    """What EF21Muon is given, as torch's optimizers take it: a model gives groups by role.

    Warns on rank 0 where parameters without a norm look like embeddings, output heads or biases:
    they would take the spectral steps of hidden matrices.

    Args:
        params: model, or parameters or groups, which are returned as a list.
        norm: norm that is given beside it; None if none is.
        radius: likewise.
        rank: of this process.

    Raises:
        ValueError: for a norm or a radius beside a model.
    """
    if isinstance(params, nn.Module):
        if norm is not None or radius is not None:
            raise ValueError(
                f"norm={norm} and radius={radius} are not allowed with a model, whose roles have "
                "their own: give param_groups(model, {role: {'norm': ..., 'radius': ...}})"
            )
        return param_groups(params)
    listed: list = [  # an iterator is read but once
        {**one, "params": list(one["params"])}
        if isinstance(one, dict) and isinstance(one.get("params"), Iterator)
        else one
        for one in params
    ]
    if norm is None and rank == 0 and (odd := _not_hidden(listed)):
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        warnings.warn(
            f"no norm is given, and {', '.join(odd[:3])}{more} take Spectral() steps, which are "
            "for hidden matrices: give EF21Muon(model), groups of param_groups(model), or "
            "norm=Spectral() if it is meant",
            stacklevel=4,
        )
    return listed


def _not_hidden(params: Sequence) -> list[str]:
    """The parameters without a norm that look like embeddings, output heads or biases, by name."""
    found, number = [], 0
    for group in params:
        members = group["params"] if isinstance(group, dict) else [group]
        for one in [members] if isinstance(members, Tensor) else members:
            name, parameter = one if isinstance(one, tuple) else (f"parameter {number}", one)
            number += 1
            if isinstance(group, dict) and "norm" in group:
                continue
            if kind := _looks_like(name, parameter.shape):
                found.append(f"{name} {tuple(parameter.shape)} ({kind})")
    return found


def _looks_like(name: str, shape: Sequence[int]) -> str:
    """What a parameter is by its name and shape, if it is no hidden matrix; else nothing."""
    if len(shape) < 2:
        return "a bias or gain"
    words = set(re.split(r"[._\d]+", name.lower()))
    long = len(shape) == 2 and max(shape) >= TABLE_RATIO * min(shape)
    return "an embedding or head" if long or words & TABLE_WORDS else ""


class _Layers:
    """The trained parameters of a model, by all of their names, and their roles by module type."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.names: defaultdict[Tensor, list[str]] = defaultdict(list)  # several of tied ones
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.requires_grad:
                self.names[parameter].append(name)

    def weights(self, *kinds: type) -> dict[Tensor, None]:
        """Of the modules of these kinds, in order."""
        found = (m.weight for m in self.model.modules() if isinstance(m, kinds))
        return {weight: None for weight in found if isinstance(weight, Tensor)}

    def stored_transposed(self) -> set[Tensor]:
        """Weights of transposed convolutions, and of transformers' Conv1D or others so named."""
        modules = self.model.modules()
        named = [m for m in modules if "Conv1D" in {kind.__name__ for kind in type(m).__mro__}]
        weights = [getattr(module, "weight", None) for module in named]
        matrices = {w for w in weights if isinstance(w, Tensor) and w.ndim == 2}
        return {*self.weights(*DECONVOLUTIONS), *matrices}

    def turned(self, patterns: Sequence[str]) -> set[Tensor]:
        """Weights that are stored as (d_in, d_out), by type or by `patterns`."""
        turned = self.stored_transposed()
        known = self.weights(nn.Linear, *CONVOLUTIONS, *TABLES).keys() - turned
        for pattern in patterns:
            matching = self.matching(pattern, "transposed")
            if wrong := [p for p in matching if p in known and pattern not in self.names[p]]:
                raise ValueError(
                    f"transposed has {pattern!r}, which takes {self.described(wrong)} too, "
                    "stored as (d_out, d_in): give a pattern that leaves it out, or its exact name "
                    "if it is meant"
                )
            turned.update(matching)
        return turned

    def roles(self, patterns: Mapping[str, str]) -> dict[Tensor, str]:
        """The role of every parameter, by `patterns` for its names first, then by type."""
        by_type = self.roles_by_type()
        given: dict[Tensor, str] = {}
        for pattern, role in patterns.items():
            matching = self.matching(pattern, "roles")
            new = [p for p in matching if p not in given]
            if not new and any(given[p] != role for p in matching):
                raise ValueError(
                    f"roles has {pattern!r} after patterns that take all that it matches: the "
                    "first that matches counts, put it before them"
                )
            by_wildcard = [p for p in new if pattern not in self.names[p]]
            if wrong := [
                p for p in by_wildcard if role in NOT_BY_WILDCARD.get(by_type[p] or "", ())
            ]:
                its_role, its_name = by_type[wrong[0]], self.names[wrong[0]][0]
                raise ValueError(
                    f"roles has {pattern!r}: {role!r}, which takes {self.described(wrong)} too, by "
                    f"type {its_role!r}: put {its_name!r}: {its_role!r}, or a pattern for all of "
                    f"these, before it, or its exact name with {role!r} if that is meant"
                )
            given |= dict.fromkeys(new, role)
        found = by_type | given
        if unclear := [parameter for parameter, role in found.items() if role is None]:
            name, shape = self.names[unclear[0]][0], tuple(unclear[0].shape)
            more = f" (and of {len(unclear) - 1} more)" if len(unclear) > 1 else ""
            raise ValueError(
                f"the role of {name} {shape} is unclear{more}: give param_groups "
                f"roles={{{name!r}: 'hidden'}}, or 'embedding' for a table or an output head, "
                "and if its dimensions are not (d_out, d_in) as torch.nn.Linear has them, "
                f"transposed=[{name!r}] too"
            )
        return {parameter: role for parameter, role in found.items() if role is not None}

    def roles_by_type(self) -> dict[Tensor, str | None]:
        """The role of each parameter by its type; None where the type does not decide."""
        linears, tables = self.weights(nn.Linear), self.weights(*TABLES)
        heads, perhaps_heads = _heads(list(linears), list(tables))
        hidden = {*linears, *self.weights(*CONVOLUTIONS), *self.stored_transposed()} - perhaps_heads
        norms = [module for module in self.model.modules() if isinstance(module, NORMALISATIONS)]
        gains = {gain for norm in norms for gain in norm.parameters(recurse=False)}
        vectors = gains | {parameter for parameter in self.names if parameter.ndim < 2}
        found: dict[Tensor, str | None] = dict.fromkeys(self.names)  # to the last role of these
        kinds: dict[str, Collection[Tensor]] = {
            "hidden": hidden,
            "embedding": {*tables, *heads},
            "vector": vectors,
        }
        for role, kind in kinds.items():
            found |= {parameter: role for parameter in self.names if parameter in kind}
        return found

    def matching(self, pattern: str, option: str) -> list[Tensor]:
        """Find parameters with a matching name. Raises ValueError where there is none."""
        found = [p for p, own in self.names.items() if any(fnmatchcase(n, pattern) for n in own)]
        if not found:
            raise ValueError(
                f"{option} has {pattern!r}, which matches no trained parameter: give patterns of "
                f"names like {next(iter(self.names.values()), ['none'])[0]}"
            )
        return found

    def described(self, parameters: Sequence[Tensor]) -> str:
        """Name the first parameter with its shape and module, and count the others."""
        name, shape = self.names[parameters[0]][0], tuple(parameters[0].shape)
        kind = type(self.model.get_submodule(name.rpartition(".")[0])).__name__
        more = f" (and {len(parameters) - 1} more)" if len(parameters) > 1 else ""
        return f"{name} {shape} of {kind}{more}"


def _heads(linears: list[Tensor], tables: list[Tensor]) -> tuple[set[Tensor], set[Tensor]]:
    """Of the weights of linear layers, those of output heads, and those that might be one."""
    if not tables:
        return set(), set(linears[-1:])
    if tied := set(linears) & set(tables):
        return tied, set()
    if linears and linears[-1].shape in {table.shape for table in tables}:
        *others, head = linears
        return {head}, {weight for weight in others if weight.shape == head.shape}
    entries = {len(table) for table in tables}
    return set(), {weight for weight in linears if len(weight) in entries}
