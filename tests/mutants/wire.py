"""Faults of what travels between ranks: owners, order of messages, bytes, meshes, and fleets."""

from tests.mutants.mutation import Mutation

FIXED = "ef21_muon/transport/fixed.py"
LAYERS = "ef21_muon/layers.py"
MESH = "ef21_muon/transport/mesh.py"
BUFFERS = "ef21_muon/transport/buffers.py"
AGREEMENT = "ef21_muon/transport/agreement.py"
GUARDS = "ef21_muon/checks/guards.py"
FLEET = "ef21_muon/fleet/fleet.py"

OF_PLACEMENTS = [
    Mutation(
        "layers are assigned to ranks smallest first",
        LAYERS,
        "key=lambda layer: -costs[layer]",
        "key=lambda layer: costs[layer]",
        "ef21_muon/transport/test_alone.py ef21_muon/test_placement.py",
    ),
    Mutation(
        "the last layer of a rank belongs to the next one",
        LAYERS,
        "bounds = [sum(owner < rank for owner in assigned) for rank in range(ranks + 1)]",
        "bounds = [max(0, sum(owner < rank for owner in assigned) - (0 < rank < ranks))"
        " for rank in range(ranks + 1)]",
        "ef21_muon/test_placement.py",
    ),
    Mutation(
        "buckets are cut one layer early",
        LAYERS,
        "if done * parts >= total * (len(ends) + 1):",
        "if done * parts > total * len(ends):",
        "ef21_muon/test_placement.py",
    ),
    Mutation(
        "rows of a transposed weight are its inputs",
        LAYERS,
        "rows = parameter.shape[int(transposed)] if",
        "rows = parameter.shape[0] if",
        "ef21_muon/norms/test_orientation.py",
    ),
    Mutation(
        "the load of a placement forgets what a rank receives",
        "ef21_muon/transport/load.py",
        "max_traffic = max(max_traffic, sent, received)",
        "max_traffic = max(max_traffic, sent)",
        "ef21_muon/transport/test_alone.py ef21_muon/test_placement.py training/test_overlap.py"
        " training/test_plan.py",
    ),
    Mutation(
        "a byte on a CPU's link takes as long as ten times as many multiplications",
        "ef21_muon/transport/load.py",
        '{"cpu": 3_000,',
        '{"cpu": 30_000,',
        "ef21_muon/test_placement.py training/test_overlap.py training/test_plan.py",
    ),
]

OF_BYTES = [
    Mutation(
        "a worker's message counts once for every server",
        FIXED,
        "self.traffic += Traffic(w2s_bytes=size)",
        "self.traffic += Traffic(w2s_bytes=self.ranks * size)",
        "ef21_muon/test_placement.py",
    ),
    Mutation(
        "a replicated server counts its own message as received",
        FIXED,
        "self.traffic += Traffic(received_bytes=(self.ranks - 1) * size)",
        "self.traffic += Traffic(received_bytes=self.ranks * size)",
        "ef21_muon/transport/test_alone.py ef21_muon/test_placement.py",
    ),
    Mutation(
        "what servers send back counts by batches, not by layers",
        FIXED,
        "size += len(batch.params) * batch.down.size",
        "size += batch.down.size",
        "ef21_muon/transport/test_alone.py ef21_muon/test_placement.py ef21_muon/test_optimizer.py"
        " training/test_plan.py",
    ),
    Mutation(
        "messages that are sent again after a restart are counted again",
        FIXED,
        "        self.traffic = counted\n",
        "",
        "ef21_muon/test_by_hand.py ef21_muon/test_local_steps_alone.py ef21_muon/test_moments.py"
        " ef21_muon/test_local_steps.py training/test_resume.py",
    ),
    Mutation(
        "bytes handed to the network and bytes taken from it are exchanged",
        FIXED,
        "self._count_wire(sum(map(len, outgoing)), sum(map(len, incoming)))",
        "self._count_wire(sum(map(len, incoming)), sum(map(len, outgoing)))",
        "ef21_muon/test_placement.py",
    ),
    Mutation(
        "an all-gather counts a message to itself",
        FIXED,
        "self._count_wire((self.ranks - 1) * len(message), (self.ranks - 1) * len(message))",
        "self._count_wire(self.ranks * len(message), self.ranks * len(message))",
        "ef21_muon/transport/test_alone.py ef21_muon/test_placement.py"
        " ef21_muon/test_local_steps.py ef21_muon/test_algorithm.py test_train.py",
    ),
    Mutation(
        "averaged buffers are not counted as received",
        BUFFERS,
        "return Traffic(mine.nbytes, 0, others, others)",
        "return Traffic(mine.nbytes, 0, 0, others)",
        "ef21_muon/test_buffers.py",
    ),
]

OF_MESSAGES = [
    Mutation(
        "every owner is sent the layers of rank 0",
        FIXED,
        "packed([p[b.owned_by[owner]] for b, p in both]) for owner in owners]",
        "packed([p[b.owned_by[0]] for b, p in both]) for owner in owners]",
        "ef21_muon/test_placement.py ef21_muon/test_two_ranks.py",
    ),
    Mutation(
        "messages of the batches of a bucket arrive in reverse order",
        FIXED,
        "parts = part.split(_lengths(batches, sizes, owner))",
        "parts = part.split(_lengths(batches, sizes, owner))[::-1]",
        "ef21_muon/transport/test_alone.py ef21_muon/test_two_ranks.py ef21_muon/test_algorithm.py",
    ),
    Mutation(
        "a message by way of the host is not copied, so that it may change under way",
        "ef21_muon/transport/host.py",
        "return {key: tensor.clone() for key, tensor in tensors.items()}, lambda: None",
        "return tensors, lambda: None",
        "ef21_muon/transport/test_alone.py ef21_muon/transport/test_host.py",
    ),
    Mutation(
        "a short gradient is made as long as the clipping norm",
        "ef21_muon/transport/clipping.py",
        ".clamp_(max=1.0)",
        "",
        "training/test_clipping.py",
    ),
    Mutation(
        "the ranks of a worker clip to norms of their own",
        "ef21_muon/transport/clipping.py",
        "        dist.all_reduce(square, group=group)\n",
        "        pass\n",
        "ef21_muon/transport/test_alone.py ef21_muon/transport/test_mesh.py"
        " ef21_muon/test_hierarchy.py",
    ),
    Mutation(
        "the ranks of a worker add their gradients up",
        MESH,
        "                torch._foreach_div_(received[0], self.ranks_per_worker)\n",
        "",
        "ef21_muon/transport/test_mesh.py",
    ),
    Mutation(
        "all workers take rank 0's running statistics",
        BUFFERS,
        "of_ranks[0], of_ranks.mean(0))",
        "of_ranks[0], of_ranks[0])",
        "ef21_muon/test_buffers.py",
    ),
    Mutation(
        "where buffers and W change places, the worker's own are lost",
        BUFFERS,
        "before = own.clone()",
        "before = own",
        "ef21_muon/test_buffers.py",
    ),
    Mutation(
        "a worker's state may be lost unnoticed",
        AGREEMENT,
        "(error > 1e-3 * norms)",
        "(error > 1e3 * norms)",
        "ef21_muon/transport/test_alone.py training/test_elastic.py ef21_muon/test_two_ranks.py",
    ),
    Mutation(
        "a fingerprint does not see two entries that change places",
        AGREEMENT,
        "(chunk * weights[: len(chunk)]).sum()",
        "(chunk * weights[0]).sum()",
        "ef21_muon/test_fingerprint.py",
    ),
    Mutation(
        "a worker steps where another one's gradients have overflowed",
        GUARDS,
        "        dist.all_reduce(found_inf, group=group)\n",
        "",
        "ef21_muon/test_algorithm.py",
    ),
]

OF_FLEETS = [
    Mutation(
        "a fleet may keep the history of a worker that is not finite",
        "ef21_muon/fleet/verdict.py",
        "(one in finite, one[0], histories.count(one), one)",
        "(one[0], histories.count(one), one)",
        "ef21_muon/test_admission.py ef21_muon/test_fleet_refusals.py",
    ),
    Mutation(
        "the last local step of a round does not count as synced",
        FLEET,
        "shared.synced_steps += len(messages) * (place + 1)",
        "shared.synced_steps += len(messages) * place",
        "ef21_muon/test_fleet.py",
    ),
    Mutation(
        "a worker that took no step is averaged with the others",
        "ef21_muon/fleet/members.py",
        "if header.history == history and header.counts",
        "if header.history == history",
        "ef21_muon/test_fleet.py",
    ),
    Mutation(
        "a worker that joins keeps the error of messages that were lost",
        "ef21_muon/fleet/shared.py",
        "                batch.up.buffer.zero_()\n",
        "                pass\n",
        "ef21_muon/test_by_hand.py ef21_muon/test_inner.py ef21_muon/test_fleet.py",
    ),
    Mutation(
        "the end of a run sends its last round twice",
        "ef21_muon/transport/schedule.py",
        "        just_sent = self.due(step)\n",
        "        just_sent = []\n",
        "ef21_muon/test_by_hand.py",
    ),
]

MUTATIONS = [*OF_PLACEMENTS, *OF_BYTES, *OF_MESSAGES, *OF_FLEETS]
