"""Faults of local steps, of when their messages travel, and of what is saved and loaded."""

from tests.mutants.mutation import Mutation

LAYERS = "ef21_muon/layers.py"
LOCAL = "ef21_muon/local_steps.py"
SCHEDULE = "ef21_muon/transport/schedule.py"
STATE = "ef21_muon/state.py"

OF_LOCAL_STEPS = [
    Mutation(
        "Nesterov's outer step adds the whole outer momentum",
        LOCAL,
        "direction = mean + self.outer_momentum * momentum",
        "direction = mean + momentum",
        "ef21_muon/test_local_steps_alone.py ef21_muon/test_local_steps.py",
    ),
    Mutation(
        "with a delay a worker moves by the servers' shift and keeps its drift",
        "ef21_muon/local_state.py",
        "batch.as_parameters(model - departure))",
        "batch.as_parameters(-shift))",
        "ef21_muon/test_by_hand.py ef21_muon/test_local_steps_alone.py"
        " ef21_muon/test_local_steps.py",
    ),
    Mutation(
        "a message that is under way is not in the state",
        LOCAL,
        '            batch.state["message"].copy_(message)\n',
        "",
        "ef21_muon/test_local_steps_alone.py ef21_muon/test_moments.py",
    ),
    Mutation(
        "a message back that is under way is not in the state",
        LOCAL,
        "            kept.copy_(message)\n",
        "            pass\n",
        "ef21_muon/test_local_steps.py",
    ),
    Mutation(
        "after a state is loaded, messages from before it still arrive",
        LOCAL,
        "        self.unsent.steps = 0\n        self.schedule.discard()\n",
        "        self.unsent.steps = 0\n",
        "ef21_muon/test_by_hand.py ef21_muon/test_local_steps_alone.py ef21_muon/test_moments.py",
    ),
    Mutation(
        "a step whose round fails is counted",
        LOCAL,
        "self.steps -= 1  # the next step takes this round",
        "pass",
        "ef21_muon/test_moments.py",
    ),
    Mutation(
        "within global_params() a worker's own parameters are lost",
        LAYERS,
        "local_model = parameter.clone()",
        "local_model = parameter",
        "ef21_muon/test_local_steps_alone.py",
    ),
    Mutation(
        "a stretch of rounds begins one step late",
        SCHEDULE,
        "bisect_right(self.stretches, step, key=itemgetter(0)) - 1",
        "max(0, bisect_right(self.stretches, step - 1, key=itemgetter(0)) - 1)",
        "ef21_muon/transport/test_schedule.py",
    ),
    Mutation(
        "streaming buckets send earlier than their bytes say",
        SCHEDULE,
        "ceil(length * one / sent[-1]) - 1 if streaming",
        "max(0, int(length * one / sent[-1]) - 1) if streaming",
        "ef21_muon/test_by_hand.py ef21_muon/test_local_steps_alone.py"
        " ef21_muon/test_local_steps.py",
    ),
    Mutation(
        "messages take two ways where nothing is sent back",
        SCHEDULE,
        "back = step - self.directions * self.sync_delay",
        "back = step - 2 * self.sync_delay",
        "ef21_muon/test_local_steps_alone.py ef21_muon/test_local_steps.py",
    ),
    Mutation(
        "the last message under way is not waited for at the end",
        SCHEDULE,
        "range(step + 1, step + 1 + self.directions * self.sync_delay)",
        "range(step + 1, step + self.directions * self.sync_delay)",
        "ef21_muon/test_by_hand.py ef21_muon/test_local_steps_alone.py"
        " ef21_muon/test_local_steps.py",
    ),
    Mutation(
        "what is in flight does not count as unsent",
        SCHEDULE,
        "return place + in_flight",
        "return place",
        "ef21_muon/test_by_hand.py ef21_muon/test_local_steps_alone.py ef21_muon/test_moments.py"
        " ef21_muon/test_api.py",
    ),
    Mutation(
        "after final_sync() delivered layers count as under way",
        SCHEDULE,
        "range(max(steps - self.sync_delay, self._flushed + 1), steps)",
        "range(max(steps - self.sync_delay, 0), steps)",
        "ef21_muon/test_by_hand.py ef21_muon/test_local_steps_alone.py ef21_muon/test_two_ranks.py",
    ),
    Mutation(
        "averaged gradients without feedback pile up at the servers",
        "ef21_muon/averaged.py",
        "                mean.zero_()\n",
        "                pass\n",
        "ef21_muon/test_by_hand.py ef21_muon/test_api.py ef21_muon/test_strangers.py",
    ),
    Mutation(
        "an inner optimizer that begins anew forgets the schedule's lr",
        "ef21_muon/inner.py",
        'if k not in ("params", "lr", "initial_lr")}',
        'if k not in ("params", "initial_lr")}',
        "ef21_muon/test_by_hand.py ef21_muon/test_inner.py",
    ),
]

OF_STATES = [
    Mutation(
        "random numbers do not resume",
        STATE,
        'generator.set_state(saved["generators"][purpose].cpu())',
        "pass",
        "ef21_muon/test_optimizer.py ef21_muon/test_states.py",
    ),
    Mutation(
        "bytes start at zero after a state is loaded",
        STATE,
        '    optimizer.transport.traffic = saved["traffic"]\n',
        "",
        "ef21_muon/test_by_hand.py ef21_muon/test_optimizer.py ef21_muon/test_states.py",
    ),
    Mutation(
        "averaged buffers are not loaded",
        STATE,
        '    optimizer.buffers.load(saved["buffers"])\n',
        "",
        "ef21_muon/test_buffers.py ef21_muon/test_states.py",
    ),
    Mutation(
        "a saved state changes with later steps",
        STATE,
        "{holder: tensor.clone()}",
        "{holder: tensor}",
        "ef21_muon/test_states.py",
    ),
    Mutation(
        "the step after a loaded state is a first step again",
        "ef21_muon/communicating.py",
        "self.steps, self.begun = steps, steps > 0",
        "self.steps = steps",
        "ef21_muon/test_optimizer.py ef21_muon/test_states.py",
    ),
    Mutation(
        "fractions of a byte are dropped from a saved count",
        "ef21_muon/transport/fixed.py",
        "Fraction(count).as_integer_ratio()",
        "(int(count), 1)",
        "ef21_muon/transport/test_alone.py ef21_muon/test_states.py ef21_muon/test_placement.py"
        " baselines/test_local_baselines.py",
    ),
    Mutation(
        "a GradScaler's scale is not undone",
        "ef21_muon/checks/guards.py",
        "torch._foreach_mul_(gradients, 1 / scale)",
        "pass",
        "ef21_muon/transport/test_alone.py ef21_muon/test_optimizer.py ef21_muon/test_gradients.py"
        " ef21_muon/test_dtypes.py ef21_muon/test_algorithm.py",
    ),
]

MUTATIONS = [*OF_LOCAL_STEPS, *OF_STATES]
