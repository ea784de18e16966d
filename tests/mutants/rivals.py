"""Faults of the model, and of the baselines that EF21-Muon is compared with."""

from tests.mutants.mutation import Mutation

DEMO = "baselines/demo.py"
DION = "baselines/dion.py"
LORE = "baselines/greedylore.py"
ALLREDUCE = "baselines/allreduce.py"
COLLECTIVES = "baselines/collectives.py"
MODEL = "model.py"

OF_BASELINES = [
    Mutation(
        "DeMo keeps what it sent in its momentum",
        DEMO,
        "                momentum -= chunks.inverse(chunks.mean(message[None]))\n",
        "",
        "baselines/test_demo.py",
    ),
    Mutation(
        "DeMo's coefficients are averaged over all workers, not over those that sent them",
        DEMO,
        "(total / senders.clamp_min_(1))",
        "(total / len(of_workers))",
        "baselines/test_demo.py",
    ),
    Mutation(
        "DeMo's constant cosine is too long by sqrt(2)",
        DEMO,
        "    basis[0] /= 2**0.5\n",
        "",
        "baselines/test_demo.py",
    ),
    Mutation(
        "DeMo's momentum decays after the gradient is added",
        DEMO,
        '                momentum *= self.param_groups[batch.group]["decay"]\n'
        "                torch._foreach_add_(list(momentum.unbind()),"
        " gradients_of(batch, self.steps + 1))\n",
        "                torch._foreach_add_(list(momentum.unbind()),"
        " gradients_of(batch, self.steps + 1))\n"
        '                momentum *= self.param_groups[batch.group]["decay"]\n',
        "baselines/test_demo.py",
    ),
    Mutation(
        "Dion takes the part mu out of its momentum, not 1 - mu",
        DION,
        'alpha=group["mu"] - 1)',
        'alpha=-group["mu"])',
        "baselines/test_dion.py",
    ),
    Mutation(
        "Dion's steps are scaled by d_in / d_out",
        DION,
        "(m / n) ** 0.5)",
        "(n / m) ** 0.5)",
        "baselines/test_dion.py",
    ),
    Mutation(
        "Lion's two betas are exchanged",
        DION,
        'of_step, of_momentum = group["lion_betas"]',
        'of_momentum, of_step = group["lion_betas"]',
        "baselines/test_dion.py",
    ),
    Mutation(
        "Dion's rank is rounded down",
        DION,
        "ceil(self.rank_fraction * min(m, n) - 1e-9)",
        "int(self.rank_fraction * min(m, n))",
        "baselines/test_dion.py",
    ),
    Mutation(
        "GreedyLore keeps its error when gradients are sent whole",
        LORE,
        "                state[p][ERROR].zero_()\n",
        "",
        "baselines/test_greedylore.py",
    ),
    Mutation(
        "GreedyLore takes the directions of largest signed estimates",
        LORE,
        "mean.square().topk(self.rank)",
        "mean.topk(self.rank)",
        "baselines/test_greedylore.py",
    ),
    Mutation(
        "GreedyLore's probes are the same in every step",
        LORE,
        'f"{step}/{self.places[parameter]}"',
        'f"{self.places[parameter]}"',
        "baselines/test_greedylore.py",
    ),
    Mutation(
        "float16 gradients are counted as float32",
        ALLREDUCE,
        'size = 4 if self.hook == "float32" else 2',
        "size = 4",
        "baselines/test_allreduce.py",
    ),
    Mutation(
        "PowerSGD's whole gradients are counted for a step too long",
        ALLREDUCE,
        "whole = powersgd.iter < powersgd.start_powerSGD_iter",
        "whole = powersgd.iter <= powersgd.start_powerSGD_iter",
        "baselines/test_allreduce.py",
    ),
    Mutation(
        "a ring is taken to send the whole buffer twice",
        ALLREDUCE,
        "return 2 * self.reduced_bytes * (ranks - 1) // ranks",
        "return 2 * self.reduced_bytes",
        "baselines/test_allreduce.py",
    ),
    Mutation(
        "after a state is loaded, schedulers act on groups that nobody steps",
        ALLREDUCE,
        "        self.stepper.load_state_dict(state_dict)\n        self._take_over()\n",
        "        self.stepper.load_state_dict(state_dict)\n",
        "baselines/test_allreduce.py",
    ),
    Mutation(
        "baselines add their workers' numbers up instead of averaging",
        COLLECTIVES,
        "            buffer /= self.ranks\n",
        "",
        "baselines/test_dion.py",
    ),
    Mutation(
        "the weight decay of Dion and DeMo does not follow the learning rate",
        COLLECTIVES,
        '1 - group["lr"] * group["weight_decay"])',
        '1 - group["weight_decay"])',
        "baselines/test_dion.py baselines/test_demo.py",
    ),
]

OF_THE_MODEL = [
    Mutation(
        "rotary embeddings have the wrong base",
        MODEL,
        "ROTARY_BASE = 10_000",
        "ROTARY_BASE = 1_000",
        "test_model.py",
    ),
    Mutation(
        "rotary embeddings turn a pair's second channel the wrong way",
        MODEL,
        "second * cosine + first * sine",
        "second * cosine - first * sine",
        "test_model.py",
    ),
    Mutation(
        "attention is scaled by 1 / D",
        MODEL,
        "value.transpose(1, 2), is_causal=True",
        "value.transpose(1, 2), is_causal=True, scale=1 / query.shape[-1]",
        "test_model.py",
    ),
    Mutation(
        "the ReLU is not scaled",
        MODEL,
        "(math.sqrt(2) * F.relu(self.expand(x))).square()",
        "F.relu(self.expand(x)).square()",
        "test_model.py",
    ),
    Mutation(
        "embeddings start as hidden matrices do",
        MODEL,
        "power = 1 if weight is self.embedding.weight else 0.5",
        "power = 0.5",
        "test_model.py",
    ),
    Mutation(
        "the token 0 does not count in the loss",
        MODEL,
        "targets.flatten())",
        "targets.flatten(), ignore_index=0)",
        "test_model.py training/test_what_is_logged.py",
    ),
    Mutation(
        "weights do not depend on the seed",
        MODEL,
        'generator = torch.Generator("cpu").manual_seed(seed)',
        'generator = torch.Generator("cpu").manual_seed(0)',
        "test_model.py",
    ),
]

MUTATIONS = [*OF_BASELINES, *OF_THE_MODEL]
