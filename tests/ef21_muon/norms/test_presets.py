"""Parameter groups by role, and that the presets are those of configs/norm."""

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from run import ROOT
from torch import nn

from ef21_muon import EF21Muon, param_groups
from ef21_muon.compressors import Identity, RankK
from ef21_muon.norms import AdaptiveRadius, BiasRMS, Sign, Spectral
from ef21_muon.norms.presets import PRESETS
from model import GPT, GPTConfig

CONFIGS = ROOT / "configs"


class Block(nn.Module):
    """Of nanoGPT: pre-norm, one matrix for queries, keys and values, biases everywhere."""

    def __init__(self, width):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        query, key, value = self.c_attn(self.ln_1(x))[:, None].chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.c_proj(mixed[:, 0])
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """In the style of nanoGPT, with learned positions."""

    def __init__(self, vocabulary=50, context=16, width=32, layers=2, tied=True):
        super().__init__()
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(context, width)
        self.h = nn.ModuleList(Block(width) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.wte.weight = self.lm_head.weight
        for table in (self.wte, self.wpe):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def names(groups):
    return {group["name"]: [name for name, _ in group["params"]] for group in groups}


def role_of(model, parameter, **options):
    (role,) = {
        group["name"]
        for group in param_groups(model, **options)
        for _, one in group["params"]
        if one is parameter
    }
    return role


GPT2_BLOCK_VECTORS = [
    *("ln_1.weight", "ln_1.bias", "c_attn.bias", "c_proj.bias"),
    *("ln_2.weight", "ln_2.bias", "mlp.0.bias", "mlp.2.bias"),
]
GPT2_ROLES = {
    "embedding": ["wte.weight", "wpe.weight"],
    "hidden": [
        f"h.{layer}.{name}.weight"
        for layer in range(2)
        for name in ("c_attn", "c_proj", "mlp.0", "mlp.2")
    ],
    "vector": [
        *(f"h.{layer}.{name}" for layer in range(2) for name in GPT2_BLOCK_VECTORS),
        "ln_f.weight",
        "ln_f.bias",
    ],
}


def test_a_gpt_2_is_split_by_role():
    assert names(param_groups(GPT2())) == GPT2_ROLES


def test_an_untied_head_is_an_embedding():
    expected = GPT2_ROLES | {"embedding": ["wte.weight", "wpe.weight", "lm_head.weight"]}
    assert names(param_groups(GPT2(tied=False))) == expected


@pytest.mark.parametrize("tied", [True, False])
def test_a_context_as_long_as_the_model_is_wide_makes_no_heads(tied):
    """GPT-2 medium: 1024 positions, width 1024, so that projections have the shape of a table."""
    groups = names(param_groups(GPT2(context=32, width=32, tied=tied)))
    assert groups["hidden"] == GPT2_ROLES["hidden"]
    assert ("lm_head.weight" in groups["embedding"]) == (not tied)


def test_a_tied_head_leaves_no_other_layer_unclear():
    assert names(param_groups(GPT2(vocabulary=32, width=32))) == GPT2_ROLES


@pytest.mark.parametrize("name", ["tiny", "gpt2-124m"])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_split_of_the_projects_gpt_is_its_own(name, preset):
    config = instantiate(OmegaConf.load(CONFIGS / "model" / f"{name}.yaml"))
    with torch.device("meta"):
        model = GPT(config)
    found = {group["name"]: group["params"] for group in param_groups(model, preset)}
    expected = {
        "embedding": [("embedding.weight", model.embedding.weight)],
        "hidden": [(f"blocks.{name}", p) for name, p in model.blocks.named_parameters()],
    }
    assert list(found) == list(expected)
    for role, parameters in expected.items():
        assert [name for name, _ in found[role]] == [name for name, _ in parameters]
        assert all(a is b for (_, a), (_, b) in zip(found[role], parameters, strict=True))


def test_a_table_used_as_the_head_leaves_layers_of_its_size_unclear():
    """Of 256 bytes and width 64, where 4 * 64 = 256: types do not show that there is no head."""
    model = GPT(GPTConfig(layers=2, width=64, heads=2, context=8, vocab_size=256))
    message = r"the role of blocks\.0\.mlp\.expand\.weight \(256, 64\) is unclear \(and of 1 more\)"
    with pytest.raises(ValueError, match=message):
        param_groups(model)
    found = {g["name"]: g["params"] for g in param_groups(model, roles={"blocks.*": "hidden"})}
    assert names([{"name": role, "params": p} for role, p in found.items()]) == {
        "embedding": ["embedding.weight"],
        "hidden": [f"blocks.{name}" for name, _ in model.blocks.named_parameters()],
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_a_gpt_2_trains(preset):
    torch.manual_seed(0)
    model = GPT2()
    optimizer = EF21Muon(param_groups(model, preset), lr=0.02, w2s=RankK(0.3), seed=1)
    tokens = torch.randint(50, (8, 17))
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    assert model.wte.weight is model.lm_head.weight


def test_compressors_of_vectors_are_the_identity_and_others_the_optimizers():
    optimizer = EF21Muon(param_groups(GPT2()), w2s=RankK(0.3), s2w=RankK(0.5))
    by_role = {group["name"]: group for group in optimizer.param_groups}
    for key, expected in (("w2s", "rank 30%"), ("s2w", "rank 50%")):
        assert isinstance(by_role["vector"][key], Identity)
        assert str(by_role["hidden"][key]) == str(by_role["embedding"][key]) == expected


def test_every_trained_parameter_is_in_one_group():
    model = GPT2(tied=False)
    grouped = [parameter for group in param_groups(model) for _, parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(model.parameters())


def test_frozen_parameters_are_left_out():
    model = GPT2()
    model.wte.weight.requires_grad_(False)
    model.h[0].requires_grad_(False)
    groups = names(param_groups(model))
    assert groups["embedding"] == ["wpe.weight"]
    assert groups["hidden"] == [name for name in GPT2_ROLES["hidden"] if name.startswith("h.1.")]
    with pytest.raises(ValueError, match=r"'wte\.weight', which matches no trained parameter"):
        param_groups(model, roles={"wte.weight": "hidden"})


def test_a_rule_of_ones_own():
    fast = RankK(0.05)
    rules = {
        "hidden": {"norm": Spectral(steps=3), "radius": 2.0, "w2s": fast},
        "embedding": {"norm": Sign(), "radius": 9.0, "momentum": 0.5},
        "vector": {"norm": BiasRMS(), "radius": 0.1, "w2s": fast},
    }
    groups = {group.pop("name"): group for group in param_groups(GPT2(), rules)}
    for role, group in groups.items():
        assert group.pop("params")
        exact = group.pop("s2w", None)
        assert isinstance(exact, Identity) == (role == "vector")
        assert group == rules[role]
    assert "w2s" not in PRESETS["scion"]["vector"], "presets stay as they are"


def test_convolutions_are_hidden_and_a_last_linear_layer_is_unclear():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 6), nn.Linear(6, 4)
    )
    with pytest.raises(
        ValueError, match=r"the role of 4\.weight \(4, 6\) is unclear: give param_groups roles="
    ):
        param_groups(model)
    assert names(param_groups(model, roles={"4.weight": "embedding"})) == {
        "hidden": ["0.weight", "3.weight"],
        "vector": ["0.bias", "1.weight", "1.bias", "3.bias", "4.bias"],
        "embedding": ["4.weight"],
    }
    assert names(param_groups(nn.Conv1d(2, 3, 3)))["hidden"] == ["weight"]


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(9, 4)
        self.positions = nn.Parameter(torch.zeros(1, 5, 4))
        self.temperature = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (Bare(), "positions"),
        (nn.Bilinear(2, 3, 4), "weight"),
        (nn.MultiheadAttention(8, 2), "in_proj_weight"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), "parametrizations.weight.orig"),
    ],
)
def test_other_matrices_are_unclear(module, name):
    with pytest.raises(ValueError, match=f"the role of {name}.* is unclear"):
        param_groups(module)


def test_a_scalar_is_a_vector():
    model = Bare()
    assert role_of(model, model.temperature, roles={"positions": "embedding"}) == "vector"
    assert role_of(model, model.positions, roles={"positions": "embedding"}) == "embedding"


def test_heads_that_are_not_last_or_not_alone_are_unclear():
    first = nn.ModuleList([nn.Linear(8, 50), nn.Embedding(50, 8), nn.Linear(8, 8)])
    with pytest.raises(ValueError, match=r"the role of 0\.weight \(50, 8\) is unclear: "):
        param_groups(first)
    two = nn.ModuleList([nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 50), nn.Linear(8, 50)])
    with pytest.raises(ValueError, match=r"the role of 2\.weight \(50, 8\) is unclear: "):
        param_groups(two)
    narrow = nn.ModuleList([nn.Embedding(50, 4), nn.Linear(4, 8), nn.Linear(8, 50)])
    with pytest.raises(ValueError, match=r"the role of 2\.weight \(50, 8\) is unclear: "):
        param_groups(narrow)
    for model, name in ((first, "0.weight"), (two, "2.weight"), (narrow, "2.weight")):
        assert name in names(param_groups(model, roles={name: "embedding"}))["embedding"]


def test_an_embedding_bag_is_a_table():
    model = nn.ModuleList([nn.EmbeddingBag(50, 8), nn.Linear(8, 3)])
    assert names(param_groups(model))["embedding"] == ["0.weight"]


def test_roles_by_name_go_first():
    model = GPT2()
    roles = {"h.*.c_attn.weight": "embedding", "h.0.c_attn.bias": "hidden", "*.bias": "vector"}
    roles |= {"h.*.ln_?.weight": "vector", "h.*": "hidden"}
    assert role_of(model, model.h[0].c_attn.weight, roles=roles) == "embedding"
    assert role_of(model, model.h[0].c_attn.bias, roles=roles) == "hidden", "an exact name"
    assert role_of(model, model.h[1].c_attn.bias, roles=roles) == "vector"
    assert role_of(model, model.ln_f.bias, roles=roles) == "vector"
    assert role_of(model, model.wte.weight, roles=roles) == "embedding"


def test_a_tied_parameter_answers_to_all_its_names():
    model = GPT2()
    for name in ("wte.weight", "lm_head.weight"):
        assert role_of(model, model.wte.weight, roles={name: "hidden"}) == "hidden"


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (
            {"*.weight": "hidden"},
            r"wte\.weight \(50, 32\) of Embedding \(and 6 more\) too, by type",
        ),
        ({"*": "hidden"}, r"wte\.weight .* put 'wte\.weight': 'embedding', or a pattern for all"),
        ({"h.*": "hidden"}, r"h\.0\.ln_1\.weight \(32,\) of LayerNorm \(and 15 more\) too, by"),
        ({"*bias": "hidden"}, r"h\.0\.ln_1\.bias \(32,\) of LayerNorm"),
        ({"*.bias": "vector", "h.[0]*": "hidden"}, r"h\.0\.ln_1\.weight .* \(and 1 more\) too, by"),
        ({"*ln*": "embedding"}, r"h\.0\.ln_1\.weight \(32,\) .* its exact name with 'embedding'"),
        ({"w?e.weight": "vector"}, r"wte\.weight .* \(and 1 more\) too, by type 'embedding'"),
        ({"*mlp*": "vector"}, r"h\.0\.mlp\.0\.weight \(128, 32\) of Linear \(and 3 more\) too, by"),
    ],
)
def test_a_wildcard_does_not_take_what_has_another_role_by_type(roles, message):
    with pytest.raises(ValueError, match=rf"^roles has .*, which takes .*{message}"):
        param_groups(GPT2(), roles=roles)


def test_what_a_wildcard_may_take():
    """Layers that might be a head, roles of one's own, and what an earlier pattern took."""
    model = GPT2()
    roles = {"*ln*": "vector", "*.bias": "vector", "w?e.*": "embedding", "*.weight": "hidden"}
    assert names(param_groups(model, roles=roles)) == GPT2_ROLES
    rules = {**PRESETS["scion"], "bias": PRESETS["scion"]["vector"]}
    own = names(param_groups(model, rules, roles={"*.bias": "bias"}))
    assert len(own["bias"]) == 13 and own["hidden"] == GPT2_ROLES["hidden"]


def test_gains_of_several_dimensions_are_vectors():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm((4, 6, 6)), nn.RMSNorm((6, 6)))
    assert names(param_groups(model)) == {
        "hidden": ["0.weight"],
        "vector": ["0.bias", "1.weight", "1.bias", "2.weight"],
    }
    with pytest.raises(
        ValueError, match=r"takes 1\.weight \(4, 6, 6\) of LayerNorm \(and 1 more\)"
    ):
        param_groups(model, roles={"0.bias": "vector", "*.weight": "hidden"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"roles": {"*.wait": "hidden"}},
            "roles has '*.wait', which matches no trained parameter: "
            "give patterns of names like wte.weight",
        ),
        (
            {"roles": {"h.*.c_*.weight": "hidden", "h.0.c_attn.weight": "embedding"}},
            "roles has 'h.0.c_attn.weight' after patterns that take all that it matches: the first "
            "that matches counts, put it before them",
        ),
        (
            {"transposed": ["h.*"]},
            "transposed has 'h.*', which takes h.0.c_attn.weight (96, 32) of Linear (and 7 more) "
            "too, stored as (d_out, d_in): give a pattern that leaves it out, or its exact name if "
            "it is meant",
        ),
        (
            {"roles": {"wpe.weight": "position"}},
            "the role 'position' of wpe.weight has no rule in the preset: "
            "it has hidden, embedding, vector",
        ),
        (
            {"preset": {"hidden": {}, "embedding": {}}},
            "the role 'vector' of h.0.ln_1.weight has no rule in the preset: "
            "it has hidden, embedding",
        ),
        (
            {"preset": "adam"},
            "preset='adam' is not known: choose scion, muon, gluon, euclidean, "
            "or give a rule for each role",
        ),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError) as error:
        param_groups(GPT2(), **options)
    assert str(error.value) == message


def test_configurations_and_presets_agree():
    for name, preset in PRESETS.items():
        rules = instantiate(OmegaConf.load(CONFIGS / "norm" / f"{name}.yaml"))
        assert list(rules) == list(preset)
        for role, rule in preset.items():
            assert set(rules[role]) == set(rule) == {"norm", "radius"}
            for key in rule:
                assert type(rules[role][key]) is type(rule[key]), (name, role, key)
                assert repr(rules[role][key]) == repr(rule[key]), (name, role, key)


@pytest.mark.parametrize("preset", PRESETS)
def test_steps_are_of_the_size_of_scions(preset):
    """On 768 x 768 matrices: 1 / sqrt(768) and 60 / 768, within what is lost by Newton-Schulz."""
    sizes = {"hidden": 768**-0.5, "embedding": 60 / 768, "vector": 1.0}
    gradient = torch.randn(1, 768, 768, generator=torch.Generator().manual_seed(0))
    for role, rule in PRESETS[preset].items():
        g = gradient[:, :, :1] if role == "vector" else gradient
        radius = rule["radius"]
        if isinstance(radius, AdaptiveRadius):
            radius = radius(rule["norm"].dual(g))
        size = (radius * rule["norm"].lmo(g)).square().mean().sqrt().item()
        assert size == pytest.approx(sizes[role], rel=0.15)


def test_gluons_radii_are_the_published_ones_over_70():
    """1/70 and 1/1.3 are the steps of its theory, for NanoGPT (arXiv:2505.13416)."""
    dual, rules = torch.tensor([1e-3, 1.0, 1e3]), PRESETS["gluon"]
    assert torch.allclose(rules["hidden"]["radius"](dual) / 70, torch.full((3,), 1 / 70))
    assert torch.allclose(rules["embedding"]["radius"](dual) / 70, torch.full((3,), 1 / 1.3), 2e-3)
