"""Parameter groups for EF21Muon by what parameters are: roles, and a norm and a radius for each.

Roles are "hidden" (weights of linear and convolutional layers), "embedding" (tables and output
heads, tied or not) and "vector" (biases, gains). configs/norm has the same presets for Hydra.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn import Parameter

from ef21_muon.lmo.blocks import Blocks
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
DECONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)  # (d_in, d_out, ...)
NORMALISATIONS = (nn.LayerNorm, nn.RMSNorm)  # of which gains may have several dimensions
# By type, and the roles that a pattern with wildcards does not make of it.
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
    """Groups {"name": role, "params": [(name, parameter), ...], "norm", "radius", ...} of a model.

    Every trained parameter is in one group, once, under the first of its names; those that do not
    require a gradient are left out. A role has a group each for weights that are `transposed`, and
    for grouped convolutions.

    preset: "scion", "muon", "gluon", "euclidean", or rules of your own for the roles: {"hidden":
    {"norm": Spectral(), "radius": 1.0}, ...}, with w2s, s2w and whatever else EF21Muon takes for a
    group. What a rule leaves out is the optimizer's default, but w2s and s2w of vectors are the
    identity: compressing a few numbers saves nothing.

    Roles follow from module types. Up to one dimension, and gains of normalisations: vector. An
    embedding's weight: embedding, positions too, which are looked up like tokens (Scion's NanoGPT
    has rotary ones). The weight of a convolution or linear layer: hidden, but that of a linear
    output head: embedding. A head is tied to a table, or is the last linear layer and has the shape
    of one. With the preset "scion" steps of convolutions are Scion's (`kernels`).

    A norm sees (d_out, d_in). The weights of transposed convolutions and of transformers' Conv1D,
    which are stored as (d_in, d_out), are turned, as are parameters whose name matches a pattern of
    `transposed`. Where the norm is Spectral, it is that of every group of a grouped convolution
    (`Blocks`), so that steps are those of as many convolutions side by side.

    roles: name patterns (fnmatch) to roles; they go first, and the first that matches counts. They
    are needed where types do not tell: for other parameters of two or more dimensions, for linear
    layers that might be a head (with as many outputs as a table has entries, where no head was
    found, or the shape of the head that was), and for the last linear layer of a model without
    tables. Any other head, such as a classifier on top of a language model, counts as hidden.

    Raises ValueError for a parameter whose role is unclear, a role without a rule, an unknown
    preset, a pattern that matches nothing or comes after others that take all of it, and a pattern
    with wildcards that takes what has another role, or orientation, by its type; an exact name is
    taken as it is given.
    """
    rules = _rules(preset)
    names = defaultdict(list)  # tied parameters have several
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names[parameter].append(name)
    found = {p: role for p, role in _roles_by_type(model).items() if p in names}
    found |= _roles_by_name(model, names, roles or {}, found)
    _require_roles(names, found)
    groups = {}
    turned = _turned(model) | _turned_by_name(model, names, transposed)
    convolutions = _weights(model, CONVOLUTIONS + DECONVOLUTIONS) if preset == "scion" else {}
    blocks = _blocks(model)
    for parameter, role in found.items():
        name = names[parameter][0]
        if role not in rules:
            raise ValueError(
                f"the role {role!r} of {name} has no rule in the preset: it has {', '.join(rules)}"
            )
        exact = {"w2s": Identity(), "s2w": Identity()} if role == "vector" else {}
        stored = {"transposed": True} if parameter in turned else {}
        norm = rules[role].get("norm", Spectral())
        its_blocks = blocks.get(parameter) if isinstance(norm, Spectral) else None
        if its_blocks:
            stored["norm"] = Blocks(norm, *its_blocks)
        new = {"name": role, "params": [], **exact, **rules[role], **stored}
        group = groups.setdefault((role, parameter in turned, its_blocks), new)
        group["params"].append((name, parameter))
        if role == "hidden" and parameter in convolutions:
            group["kernels"] = True
    return list(groups.values())


def _require_roles(
    names: Mapping[Parameter, list[str]], found: Mapping[Parameter, str | None]
) -> None:
    """Raise ValueError for a parameter whose role is unclear."""
    unclear = [parameter for parameter, role in found.items() if role is None]
    if unclear:
        name, shape = names[unclear[0]][0], tuple(unclear[0].shape)
        more = f" (and of {len(unclear) - 1} more)" if len(unclear) > 1 else ""
        raise ValueError(
            f"the role of {name} {shape} is unclear{more}: pass roles={{{name!r}: 'hidden'}}, or "
            "'embedding' for a table or an output head, and if its dimensions are not (d_out, d_in)"
            f" as torch.nn.Linear has them, transposed=[{name!r}] too"
        )


def _turned(model: nn.Module) -> set[Parameter]:
    """Weights that are stored as (d_in, d_out).

    Of transposed convolutions, and of transformers' Conv1D or others of this name.
    """
    named = (m for m in model.modules() if any(c.__name__ == "Conv1D" for c in type(m).__mro__))
    weights = (getattr(module, "weight", None) for module in named)
    of_conv1d = {weight for weight in weights if weight is not None and weight.ndim == 2}
    return of_conv1d | set(_weights(model, DECONVOLUTIONS))


def _turned_by_name(
    model: nn.Module, names: Mapping[Parameter, list[str]], patterns: Sequence[str]
) -> set[Parameter]:
    """Those that `patterns` name. Raises ValueError for a wildcard that takes a layer of torch."""
    turned = set()
    known = _weights(model, (nn.Linear, *CONVOLUTIONS, *TABLES))
    for pattern in patterns:
        matching = _matching(names, [pattern], "transposed")
        wrong = [p for p in matching if p in known and pattern not in names[p]]
        if wrong:
            raise ValueError(
                f"transposed has {pattern!r}, which takes {_described(model, names, wrong)} too, "
                "stored as (d_out, d_in): give a pattern that leaves it out, or its exact name if "
                "it is meant"
            )
        turned |= set(matching)
    return turned


def _blocks(model: nn.Module) -> dict[Parameter, tuple[int, bool]]:
    """Of the weights of grouped convolutions the number of blocks, and whether blocks are columns.

    That is where the groups of a matrix (d_out, d_in) are in d_in, as of transposed convolutions.
    """
    kinds = CONVOLUTIONS + DECONVOLUTIONS
    return {
        module.weight: (module.groups, isinstance(module, DECONVOLUTIONS))
        for module in model.modules()
        if isinstance(module, kinds) and module.groups > 1
    }


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
    model: nn.Module,
    names: Mapping[Parameter, list[str]],
    patterns: Mapping[str, str],
    by_type: Mapping[Parameter, str | None],
) -> dict[Parameter, str]:
    """The roles that `patterns` give to parameters of any of these names.

    Raises ValueError for a pattern that never counts, and for a wildcard that contradicts types.
    """
    given = {}
    for pattern, role in patterns.items():
        matching = _matching(names, [pattern], "roles")
        new = [p for p in matching if p not in given]
        if not new and any(given[p] != role for p in matching):
            raise ValueError(
                f"roles has {pattern!r} after patterns that take all that it matches: the first "
                "that matches counts, put it before them"
            )
        wrong = [
            p
            for p in new
            if pattern not in names[p] and role in NOT_BY_WILDCARD.get(by_type[p], ())
        ]
        if wrong:
            its_role, its_name = by_type[wrong[0]], names[wrong[0]][0]
            raise ValueError(
                f"roles has {pattern!r}: {role!r}, which takes {_described(model, names, wrong)} "
                f"too, by type {its_role!r}: put {its_name!r}: {its_role!r}, or a pattern for all "
                f"of these, before it, or its exact name with {role!r} if that is meant"
            )
        given |= dict.fromkeys(new, role)
    return given


def _described(
    model: nn.Module, names: Mapping[Parameter, list[str]], parameters: Sequence[Parameter]
) -> str:
    """The first by name, shape and module, and how many more."""
    first = parameters[0]
    name = names[first][0]
    kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
    more = f" (and {len(parameters) - 1} more)" if len(parameters) > 1 else ""
    return f"{name} {tuple(first.shape)} of {kind}{more}"


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
    roles |= dict.fromkeys(_weights(model, CONVOLUTIONS + DECONVOLUTIONS) | linears, "hidden")
    roles |= dict.fromkeys(perhaps_heads)
    roles |= dict.fromkeys([*tables, *heads], "embedding")
    norms = (module for module in model.modules() if isinstance(module, NORMALISATIONS))
    gains = {parameter for norm in norms for parameter in norm.parameters(recurse=False)}
    return roles | {p: "vector" for p in roles if p.ndim < 2 or p in gains}


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
