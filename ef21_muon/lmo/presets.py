"""Parameter groups for EF21Muon by what parameters are: roles, and a norm and a radius for each.

Roles are "hidden" (weights of linear and convolutional layers), "embedding" (tables and output
heads, tied or not) and "vector" (biases, gains). configs/norm has the same presets for Hydra.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn import Parameter

from ef21_muon.lmo.norms import AdaptiveRadius, BiasRMS, Sign, Spectral
from ef21_muon.messages.compressors import Identity

PRESETS = {
    # Scion (arXiv:2502.07529): the head's radius is 60 times that of hidden layers in its NanoGPT
    # runs (3000 / 50), that of biases the same in its DeiT and CIFAR runs (LIONS-EPFL/scion).
    "scion": {
        "hidden": {"norm": Spectral(), "radius": 1.0},
        "embedding": {"norm": Sign(), "radius": 60.0},
        "vector": {"norm": BiasRMS(), "radius": 1.0},
    },
    # Muon has AdamW for all but hidden matrices, which is no LMO; the sign step is the nearest one.
    "muon": {
        "hidden": {"norm": Spectral(scaling="muon"), "radius": 1.0},
        "embedding": {"norm": Sign(), "radius": 60.0},
        "vector": {"norm": BiasRMS(), "radius": 1.0},
    },
    # Gluon (arXiv:2505.13416) fits L0 = 0 and L1 = 70 to hidden layers of a NanoGPT with scion's
    # norms, L1 = 1.3 to its tied head, and to biases of a CNN the L1 of its hidden layers. In units
    # of 70 here, so that lr is that of scion; 1/70 = 0.014 is the step of the theory, 0.018 the
    # tuned one. With l0 = 0 radii are constant: give an l0 for steps that shrink with gradients.
    "gluon": {
        "hidden": {"norm": Spectral(), "radius": AdaptiveRadius(l0=0.0, l1=1.0)},
        "embedding": {"norm": Sign(), "radius": AdaptiveRadius(l0=0.0, l1=0.0186)},
        "vector": {"norm": BiasRMS(), "radius": AdaptiveRadius(l0=0.0, l1=1.0)},
    },
    # The Euclidean norm over sqrt(entries), so that a radius is the RMS of the step.
    "euclidean": {
        "hidden": {"norm": BiasRMS(), "radius": 0.036},
        "embedding": {"norm": BiasRMS(), "radius": 0.078},
        "vector": {"norm": BiasRMS(), "radius": 1.0},
    },
}
# Nothing but scion's radii was tuned: on 768 x 768 matrices the steps of all presets have the RMS
# of scion's, 1 / sqrt(768) = 0.036 for hidden, 60 / 768 = 0.078 for embedding layers.

TABLES = (nn.Embedding, nn.EmbeddingBag)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def param_groups(
    model: nn.Module,
    preset: str | Mapping[str, Mapping] = "scion",
    *,
    roles: Mapping[str, str] | None = None,
    transposed: Sequence[str] = (),
) -> list[dict]:
    """Groups {"name": role, "params": [(name, parameter), ...], "norm", "radius", ...} of a model.

    Every trained parameter is in one group, once, under the first of its names; those that do not
    require a gradient are left out. A role has two groups where some weights are `transposed`.

    preset: "scion", "muon", "gluon", "euclidean", or rules of your own for the roles: {"hidden":
    {"norm": Spectral(), "radius": 1.0}, ...}, with w2s, s2w and whatever else EF21Muon takes for a
    group. What a rule leaves out is the optimizer's default, but w2s and s2w of vectors are the
    identity: compressing a few numbers saves nothing.

    Roles follow from module types. Up to one dimension: vector. An embedding's weight: embedding,
    positions too, which are looked up like tokens (Scion's NanoGPT has rotary ones). The weight of
    a convolution or linear layer: hidden, but that of a linear output head: embedding. A head is
    tied to a table, or is the last linear layer and has the shape of one. With the preset "scion"
    steps of convolutions are Scion's (`kernels`).

    A norm sees (d_out, d_in). The weights of transformers' Conv1D, which are stored as (d_in,
    d_out), are turned, as are parameters whose name matches a pattern of `transposed`.

    roles: name patterns (fnmatch) to roles; they go first, and the first that matches counts. They
    are needed where types do not tell: for other parameters of two or more dimensions, for linear
    layers that might be a head (with as many outputs as a table has entries, where no head was
    found, or the shape of the head that was), and for the last linear layer of a model without
    tables. Any other head, such as a classifier on top of a language model, counts as hidden.

    Raises ValueError for a parameter whose role is unclear, a pattern that matches nothing, a role
    without a rule, and an unknown preset.
    """
    rules = _rules(preset)
    names = defaultdict(list)  # tied parameters have several
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names[parameter].append(name)
    found = {p: role for p, role in _roles_by_type(model).items() if p in names}
    found |= _roles_by_name(names, roles or {})
    unclear = [parameter for parameter, role in found.items() if role is None]
    if unclear:
        name, shape = names[unclear[0]][0], tuple(unclear[0].shape)
        more = f" (and of {len(unclear) - 1} more)" if len(unclear) > 1 else ""
        raise ValueError(
            f"the role of {name} {shape} is unclear{more}: pass roles={{{name!r}: 'hidden'}}, or "
            "'embedding' for a table or an output head, and if its dimensions are not (d_out, d_in)"
            f" as torch.nn.Linear has them, transposed=[{name!r}] too"
        )
    groups = {}
    turned = _turned(model) | set(_matching(names, transposed, "transposed"))
    convolutions = _weights(model, CONVOLUTIONS) if preset == "scion" else {}
    for parameter, role in found.items():
        name = names[parameter][0]
        if role not in rules:
            raise ValueError(
                f"the role {role!r} of {name} has no rule in the preset: it has {', '.join(rules)}"
            )
        exact = {"w2s": Identity(), "s2w": Identity()} if role == "vector" else {}
        stored = {"transposed": True} if parameter in turned else {}
        new = {"name": role, "params": [], **exact, **rules[role], **stored}
        group = groups.setdefault((role, parameter in turned), new)
        group["params"].append((name, parameter))
        if role == "hidden" and parameter in convolutions:
            group["kernels"] = True
    return list(groups.values())


def _turned(model: nn.Module) -> set[Parameter]:
    """Weights of transformers' Conv1D, or of others of this name, stored as (d_in, d_out)."""
    named = (m for m in model.modules() if any(c.__name__ == "Conv1D" for c in type(m).__mro__))
    weights = (getattr(module, "weight", None) for module in named)
    return {weight for weight in weights if weight is not None and weight.ndim == 2}


def _weights(model: nn.Module, kinds: type | tuple[type, ...]) -> dict[Parameter, None]:
    """Of the modules of these kinds, in order, as a set."""
    return dict.fromkeys(m.weight for m in model.modules() if isinstance(m, kinds))


def _rules(preset: str | Mapping[str, Mapping]) -> Mapping[str, Mapping]:
    if isinstance(preset, Mapping):
        return preset
    if preset not in PRESETS:
        raise ValueError(
            f"preset={preset!r} is not known: choose {', '.join(PRESETS)}, "
            "or give a rule for each role"
        )
    return PRESETS[preset]


def _roles_by_name(
    names: Mapping[Parameter, list[str]], patterns: Mapping[str, str]
) -> dict[Parameter, str]:
    """The roles that `patterns` give to parameters of any of these names."""
    given = {}
    for pattern, role in patterns.items():
        given = dict.fromkeys(_matching(names, [pattern], "roles"), role) | given
    return given


def _matching(
    names: Mapping[Parameter, list[str]], patterns: Sequence[str], option: str
) -> list[Parameter]:
    """Parameters of which any name matches a pattern. Raises ValueError where none does."""
    found = []
    for pattern in patterns:
        matching = [p for p, of_p in names.items() if any(fnmatchcase(n, pattern) for n in of_p)]
        if not matching:
            raise ValueError(
                f"{option} has {pattern!r}, which matches no trained parameter: give patterns of "
                f"names like {next(iter(names.values()), ['none'])[0]}"
            )
        found += matching
    return found


def _roles_by_type(model: nn.Module) -> dict[Parameter, str | None]:
    """The role of every parameter, in the model's order; None where types do not tell."""
    tables, linears = _weights(model, TABLES), _weights(model, nn.Linear)
    heads, perhaps_heads = _heads(list(linears), list(tables))
    roles = dict.fromkeys(model.parameters())
    roles |= dict.fromkeys(_turned(model), "hidden")
    roles |= dict.fromkeys(_weights(model, CONVOLUTIONS) | linears, "hidden")
    roles |= dict.fromkeys(perhaps_heads)
    roles |= dict.fromkeys([*tables, *heads], "embedding")
    return roles | {parameter: "vector" for parameter in roles if parameter.ndim < 2}


def _heads(
    linears: list[Parameter], tables: list[Parameter]
) -> tuple[list[Parameter], list[Parameter]]:
    """Of the weights of linear layers, those of output heads, and those that might be one."""
    if not tables:
        return [], linears[-1:]
    tied = set(linears) & set(tables)
    if tied:
        return list(tied), []
    if linears and linears[-1].shape in {table.shape for table in tables}:
        *others, head = linears
        return [head], [weight for weight in others if weight.shape == head.shape]
    entries = {len(table) for table in tables}
    return [], [weight for weight in linears if len(weight) in entries]
