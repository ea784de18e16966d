"""Faults of optimizers' steps: error feedback, momentum, correction, and norms."""

from tests.mutants.mutation import Mutation

CHANNEL = "ef21_muon/channel.py"
OPTIMIZER = "ef21_muon/optimizer.py"
LAYERS = "ef21_muon/layers.py"
LMO = "ef21_muon/norms/lmo.py"
NEWTON_SCHULZ = "ef21_muon/norms/newton_schulz.py"

OF_CHANNELS = [
    Mutation(
        "a worker sends its momentum, not what the servers lack",
        CHANNEL,
        "difference = target - self.buffer",
        "difference = target",
        "ef21_muon/test_optimizer.py ef21_muon/test_options.py",
    ),
    Mutation(
        "a worker remembers what it wanted to send, not what it sent",
        CHANNEL,
        "self.buffer += sent",
        "self.buffer += difference",
        "ef21_muon/test_optimizer.py ef21_muon/test_options.py",
    ),
    Mutation(
        "EF14's error is of the target alone: what was lost before is dropped",
        CHANNEL,
        "self.buffer.copy_(difference).sub_(sent)",
        "self.buffer.copy_(target).sub_(sent)",
        "ef21_muon/test_options.py ef21_muon/test_local_steps_alone.py",
    ),
    Mutation(
        "EF14's error does not decay",
        CHANNEL,
        "torch.add(target, self.buffer, alpha=decay)",
        "torch.add(target, self.buffer)",
        "ef21_muon/test_options.py",
    ),
    Mutation(
        "servers of averaged gradients and of local steps add messages up instead of averaging",
        CHANNEL,
        "self.decode(message) * (1 / len(messages))",
        "self.decode(message)",
        "ef21_muon/test_senders.py ef21_muon/test_local_steps.py ef21_muon/test_strangers.py",
    ),
    Mutation(
        "a layer that is not finite is sent all the same",
        CHANNEL,
        "        if source is not None:\n            still_where_broken(difference, source)\n",
        "",
        "ef21_muon/test_not_finite.py",
    ),
    Mutation(
        "the last message that was not finite is noted, not the first",
        CHANNEL,
        "at.masked_fill_(broken & (at == 0), step)",
        "at.masked_fill_(broken, step)",
        "ef21_muon/test_optimizer.py ef21_muon/test_local_steps_alone.py"
        " ef21_muon/test_not_finite.py",
    ),
]

OF_EF21_MUON = [
    Mutation(
        "the server adds messages up: G is as many times too long as there are workers",
        OPTIMIZER,
        "batch.up.decode(message) * (1 / len(messages))",
        "batch.up.decode(message)",
        "ef21_muon/test_two_ranks.py ef21_muon/test_algorithm.py",
    ),
    Mutation(
        "weights of the new gradient and of the old momentum are exchanged",
        OPTIMIZER,
        'beta = 1.0 if first else 1 - group["momentum"]',
        'beta = 1.0 if first else group["momentum"]',
        "ef21_muon/test_options.py ef21_muon/test_api.py",
    ),
    Mutation(
        "an optimizer that begins anew after some steps does not begin with the gradient",
        OPTIMIZER,
        "first = not self.begun and",
        "first = self.steps == 0 and",
        "ef21_muon/test_inner.py ef21_muon/test_fleet.py",
    ),
    Mutation(
        "Nesterov's momentum mixes the wrong way round",
        OPTIMIZER,
        "lerp_(momentum, 1 - beta)",
        "lerp_(momentum, beta)",
        "ef21_muon/test_options.py",
    ),
    Mutation(
        "what was lost on the way back is never sent",
        OPTIMIZER,
        "            shift = model - batch.models(batch.owned).float()\n",
        "",
        "ef21_muon/test_optimizer.py ef21_muon/test_options.py",
    ),
    Mutation(
        "weight decay is of W, not of X",
        OPTIMIZER,
        "model = batch.models(batch.owned).float() if model is None else model",
        "model = batch.models(batch.owned).float()",
        "ef21_muon/test_by_hand.py ef21_muon/test_options.py ef21_muon/test_optimizer.py"
        " ef21_muon/test_recovered.py ef21_muon/test_algorithm.py",
    ),
    Mutation(
        "weight decay does not follow the learning rate",
        OPTIMIZER,
        'step -= lr * group["weight_decay"] * model',
        'step -= group["weight_decay"] * model',
        "ef21_muon/test_options.py",
    ),
    Mutation(
        "a server steps where its gradient is not finite",
        OPTIMIZER,
        "return still_where_broken(step, source)",
        "return step",
        "ef21_muon/test_by_hand.py ef21_muon/test_optimizer.py ef21_muon/test_options.py"
        " ef21_muon/test_not_finite.py",
    ),
    Mutation(
        "after a state is loaded, X becomes the W that is there",
        OPTIMIZER,
        "            batch.written = None  # X belongs to whatever W is there now",
        "            pass",
        "ef21_muon/test_optimizer.py ef21_muon/test_states.py ef21_muon/test_moments.py",
    ),
    Mutation(
        "messages without feedback are added up for ever",
        OPTIMIZER,
        'if self.feedback != "ef21":',
        'if self.feedback == "ef14":',
        "ef21_muon/test_options.py",
    ),
    Mutation(
        "the second message is sent in full, too",
        OPTIMIZER,
        "rule = Identity() if self.steps == 0",
        "rule = Identity() if self.steps <= 1",
        "ef21_muon/test_options.py",
    ),
    Mutation(
        "a model that is loaded later is not noticed by the servers",
        LAYERS,
        "(always or self.written not in (None, self._now()))",
        "always",
        "ef21_muon/test_optimizer.py ef21_muon/test_as_given.py ef21_muon/test_moments.py",
    ),
    Mutation(
        "corrections of gradients do not grow with 1 / beta",
        "ef21_muon/correction.py",
        "self.gamma * momentum / (1 - momentum)",
        "self.gamma * momentum",
        "ef21_muon/test_correction.py",
    ),
    Mutation(
        "the difference over a tenth of the way is not multiplied by 10",
        "ef21_muon/correction.py",
        "d = (gradient - other.to(gradient.dtype)) / part",
        "d = gradient - other.to(gradient.dtype)",
        "ef21_muon/test_correction.py",
    ),
    Mutation(
        "corrections look back on the first W, not on the last one",
        "ef21_muon/correction.py",
        "                before.copy_(model)",
        "                before.copy_(model) if first else None",
        "ef21_muon/test_correction.py",
    ),
]

OF_NORMS = [
    Mutation(
        "steps go up the hill",
        "ef21_muon/norms/base.py",
        "mul_(-self.scale(*gradient.shape[-2:]))",
        "mul_(self.scale(*gradient.shape[-2:]))",
        "ef21_muon/norms/test_norms.py",
    ),
    Mutation(
        "two digits of Jordan's second coefficient are exchanged",
        NEWTON_SCHULZ,
        "JORDAN = (3.4445, -4.7750, 2.0315)",
        "JORDAN = (3.4445, -4.7570, 2.0315)",
        "ef21_muon/norms/test_newton_schulz.py ef21_muon/norms/test_norms.py",
    ),
    Mutation(
        "the first Polar Express step has the margin once, not twice",
        NEWTON_SCHULZ,
        "SHRUNK_BY = (1.01**2, *6 * (1.01,), 1)",
        "SHRUNK_BY = (*7 * (1.01,), 1)",
        "ef21_muon/norms/test_newton_schulz.py",
    ),
    Mutation(
        "with Gram matrices some steps of Newton-Schulz are taken twice",
        NEWTON_SCHULZ,
        "polynomials[first + 1 : first + gram_steps]",
        "polynomials[first + 1 : first + gram_steps + 1]",
        "ef21_muon/norms/test_newton_schulz.py",
    ),
    Mutation(
        "a gradient of zeros becomes NaN",
        NEWTON_SCHULZ,
        "keepdim=True).clamp_min(1e-30)",
        "keepdim=True)",
        "ef21_muon/norms/test_norms.py",
    ),
    Mutation(
        "Scion's radius is of (d_in, d_out)",
        LMO,
        '"scion": lambda d_out, d_in: sqrt(d_out / d_in)',
        '"scion": lambda d_out, d_in: sqrt(d_in / d_out)',
        "ef21_muon/norms/test_norms.py",
    ),
    Mutation(
        "Moonlight's radius is of the shorter side",
        LMO,
        "0.2 * sqrt(max(d_out, d_in))",
        "0.2 * sqrt(min(d_out, d_in))",
        "ef21_muon/norms/test_norms.py",
    ),
    Mutation(
        "columns and rows are exchanged in the column norm's step",
        LMO,
        "return unit_length(gradient, -2)",
        "return unit_length(gradient, -1)",
        "ef21_muon/norms/test_norms.py",
    ),
    Mutation(
        "weights start from a norm with the default radius",
        LMO,
        'return Spectral("svd", scaling=self.scaling)',
        'return Spectral("svd")',
        "ef21_muon/norms/test_norms.py",
    ),
    Mutation(
        "Gluon's two constants are exchanged",
        LMO,
        "dual / (self.l0 + self.l1 * dual)",
        "dual / (self.l1 + self.l0 * dual)",
        "ef21_muon/norms/test_norms.py",
    ),
    Mutation(
        "an adaptive radius is that of the step's first layer",
        LMO,
        'step.mul_(group["radius"](dual)[:, None, None])',
        'step.mul_(group["radius"](dual)[:1, None, None])',
        "ef21_muon/test_options.py",
    ),
    Mutation(
        "steps of convolutions are divided by the kernel's entries, not by their root",
        LMO,
        "step /= sqrt(kernel)",
        "step /= kernel",
        "ef21_muon/norms/test_orientation.py",
    ),
    Mutation(
        "error feedback of steps forgets that a step was taken",
        LMO,
        "    error += step\n",
        "",
        "ef21_muon/test_lmo_feedback.py",
    ),
    Mutation(
        "Gluon's radius of embeddings is ten times too long",
        "ef21_muon/norms/presets.py",
        "AdaptiveRadius(l0=0.0, l1=0.0186)",
        "AdaptiveRadius(l0=0.0, l1=0.186)",
        "ef21_muon/norms/test_presets.py",
    ),
    Mutation(
        "a square matrix that is stored transposed is stepped as if it were not",
        LAYERS,
        "shaped.append(_turned(matrix.view(_turned(parameter).shape)))",
        "shaped.append(matrix.reshape(parameter.shape))",
        "ef21_muon/norms/test_orientation.py",
    ),
]

MUTATIONS = [*OF_CHANNELS, *OF_EF21_MUON, *OF_NORMS]
