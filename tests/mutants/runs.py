"""Faults of the data, of training, of what is logged, and of how runs resume."""

from tests.mutants.mutation import Mutation

LOADER = "data/loader.py"
GRADIENTS = "training/gradients.py"
SCHEDULE = "training/schedule.py"
RESUME = "training/resume.py"
PROGRESS = "training/progress.py"
RENAMED = "training/renamed.py"
PLAN = "training/plan.py"

OF_DATA = [
    Mutation(
        "the parts of workers overlap",
        LOADER,
        "self.start = worker * part\n",
        "self.start = worker * window\n",
        "data/test_loader.py",
    ),
    Mutation(
        "the last window of a worker's part is never drawn",
        LOADER,
        "self.generator.integers(self.start, self.stop - self.context, size=sequences)",
        "self.generator.integers(self.start, max(self.start + 1, self.stop - self.context - 1),"
        " size=sequences)",
        "data/test_loader.py",
    ),
    Mutation(
        "a worker's windows reach into the next worker's part",
        LOADER,
        "self.generator.integers(self.start, self.stop - self.context, size=sequences)",
        "self.generator.integers(self.start, self.stop - self.context + 1, size=sequences)",
        "data/test_loader.py",
    ),
    Mutation(
        "worker 1 of seed 0 draws what worker 0 of seed 1 draws",
        LOADER,
        "self.seed = [seed, worker]",
        "self.seed = [seed + worker]",
        "data/test_windows_apart.py data/test_loader.py training/test_what_is_logged.py",
    ),
    Mutation(
        "after an elastic restart workers draw the windows of the beginning",
        LOADER,
        "np.random.SeedSequence([*self.seed, step])",
        "np.random.SeedSequence(self.seed)",
        "data/test_windows_apart.py data/test_loader.py training/test_elastic.py",
    ),
    Mutation(
        "test windows are the beginning of the test set",
        LOADER,
        "self.stride = (len(stream) - 1) // self.count",
        "self.stride = context",
        "data/test_loader.py",
    ),
    Mutation(
        "a window that is read again for company counts",
        LOADER,
        "yield inputs, targets, targets.numel() if starts else 0",
        "yield inputs, targets, targets.numel()",
        "data/test_loader.py",
    ),
    Mutation(
        "a window that begins with a shard is read from the one before",
        LOADER,
        'np.searchsorted(self.bounds, start, side="right")',
        'np.searchsorted(self.bounds, start, side="left")',
        "data/test_loader.py",
    ),
    Mutation(
        "a checkpoint counts a batch that was read ahead as used",
        LOADER,
        "        self._forget()\n        return self.batches.state_dict()\n",
        "        return self.batches.state_dict()\n",
        "data/test_loader.py",
    ),
    Mutation(
        "more training shards are read than asked for",
        LOADER,
        "_matching(train, train_shards, rebuild, root)[:train_shards]",
        "_matching(train, train_shards, rebuild, root)",
        "data/test_loader.py",
    ),
    Mutation(
        "shards are written big-endian",
        "data/shards.py",
        'np.ascontiguousarray(tokens, dtype="<u2")',
        'np.ascontiguousarray(tokens, dtype=">u2")',
        "data/test_shards.py",
    ),
    Mutation(
        "bytes between the two parts of a play are lost",
        "data/shakespeare.py",
        "play[: len(play) * 9 // 10]",
        "play[: len(play) // 10 * 9]",
        "data/test_shakespeare.py",
    ),
    Mutation(
        "plays are in the order of the archive",
        "data/shakespeare.py",
        "names = sorted(",
        "names = list(",
        "data/test_shakespeare.py",
    ),
    Mutation(
        "a document ends with the end-of-text token instead of beginning with it",
        "data/tokenize_fineweb.py",
        "        tokens.append(encoding.eot_token)\n"
        "        tokens.extend(encoding.encode_ordinary(text))\n",
        "        tokens.extend(encoding.encode_ordinary(text))\n"
        "        tokens.append(encoding.eot_token)\n",
        "data/test_tokenize_fineweb.py",
    ),
    Mutation(
        "a tokenisation that goes on doubles the beginning of a batch",
        "data/tokenize_fineweb.py",
        "used = min(skip, len(tokens))",
        "used = 0",
        "data/test_tokenize_fineweb.py",
    ),
]

OF_TRAINING = [
    Mutation(
        "the gradients of forward passes are added up",
        GRADIENTS,
        "                loss.backward()\n",
        "                (loss * passes).backward()\n",
        "training/test_what_is_counted.py training/test_clipping.py"
        " training/test_what_is_logged.py",
    ),
    Mutation(
        "every forward pass all-reduces its gradients",
        GRADIENTS,
        "sync = nullcontext() if number == passes else self.without_sync()",
        "sync = nullcontext()",
        "training/test_what_is_counted.py training/test_gradients.py training/test_clipping.py"
        " training/test_sharding.py training/test_what_is_logged.py",
    ),
    Mutation(
        "test losses are weighted by the tokens that were read, not by those that count",
        GRADIENTS,
        "self.model(inputs, targets).double() * counted",
        "self.model(inputs, targets).double() * targets.numel()",
        "training/test_sharding.py training/test_what_is_logged.py",
    ),
    Mutation(
        "the test loss is of a worker's own parameters, not of W",
        GRADIENTS,
        "        with self.global_params():\n",
        "        with nullcontext():\n",
        "training/test_resume.py training/test_what_is_logged.py",
    ),
    Mutation(
        "the warm-up begins at a learning rate of zero",
        SCHEDULE,
        "rising = (step + 1) / warmup",
        "rising = step / warmup",
        "training/test_schedule.py",
    ),
    Mutation(
        "a resumed schedule is one step ahead",
        SCHEDULE,
        "last_epoch=steps - 1)",
        "last_epoch=steps)",
        "training/test_schedule.py",
    ),
    Mutation(
        "the cosine falls as if there were no warm-up",
        SCHEDULE,
        'if own.shape == "trapezoid" else 1 - own.warmup',
        'if own.shape == "trapezoid" else 1.0',
        "training/test_schedule.py",
    ),
    Mutation(
        "what is left at the end of a run is not sent",
        "train.py",
        "            self.optimizer.final_sync()\n",
        "            pass\n",
        "training/test_what_is_counted.py training/test_records_of_a_run.py"
        " training/test_what_is_logged.py training/test_resume.py test_train.py",
    ),
]

OF_LOGS = [
    Mutation(
        "the logged learning rate is that of the next step",
        "train.py",
        "            lr = self.scheduler.get_last_lr()[0]\n"
        "            step = self.watched_step()\n",
        "            step = self.watched_step()\n"
        "            lr = self.scheduler.get_last_lr()[0]\n",
        "training/test_what_is_counted.py training/test_what_is_logged.py test_train.py",
    ),
    Mutation(
        "uncompressed bytes are counted both ways twice",
        "train.py",
        "self.config.steps * 4 * self.raw_model",
        "self.config.steps * 8 * self.raw_model",
        "training/test_what_is_counted.py training/test_records_of_a_run.py test_train.py",
    ),
    Mutation(
        "bytes are those of a rank, not of the worker",
        PROGRESS,
        "own = optimizer.mesh.total(*own) if optimizer.mesh else own",
        "own = tuple(own)",
        "training/test_what_is_counted.py training/test_sharding.py",
    ),
    Mutation(
        "bytes received and bytes of servers' messages are exchanged in logs",
        PROGRESS,
        'BYTES = ("w2s_bytes", "s2w_bytes", "received_bytes", "wire_tx_bytes")',
        'BYTES = ("w2s_bytes", "received_bytes", "s2w_bytes", "wire_tx_bytes")',
        "training/test_what_is_counted.py training/test_progress.py test_train.py"
        " training/test_what_is_logged.py",
    ),
    Mutation(
        "the logged loss is the sum of the workers' losses",
        PROGRESS,
        "self.workers.start_sum(mean / self.workers.count, problem is not None)",
        "self.workers.start_sum(mean, problem is not None)",
        "training/test_progress.py",
    ),
    Mutation(
        "losses of earlier records stay in the mean",
        PROGRESS,
        "        self.loss_sum.zero_()\n",
        "",
        "training/test_progress.py",
    ),
    Mutation(
        "records behind a checkpoint stay in the log of a resumed run",
        "training/log.py",
        "    file.truncate(size)\n    file.seek(size)\n",
        "    file.seek(0, 2)\n",
        "training/test_resume.py",
    ),
    Mutation(
        "an old log's beta is taken for its momentum",
        RENAMED,
        'new["momentum"] = float(_less_than_one(value))',
        'new["momentum"] = float(value)',
        "training/test_renamed.py",
    ),
    Mutation(
        "the two kinds of rounding are exchanged in old logs",
        RENAMED,
        '"stochastic" if stochastic else "nearest"',
        '"nearest" if stochastic else "stochastic"',
        "training/test_renamed.py",
    ),
    Mutation(
        "a plan leaves out the last round of a run",
        PLAN,
        "of(config.steps - 1)[0] + 1",
        "of(config.steps - 1)[0]",
        "training/test_plan.py",
    ),
    Mutation(
        "a plan's memory is without the gradients",
        PLAN,
        "memory = 2 * whole +",
        "memory = whole +",
        "training/test_plan.py",
    ),
    Mutation(
        "a delay that is said to hide a message is a step too short",
        "training/overlap.py",
        "min(math.ceil(one_way / step), self.longest_delay)",
        "max(1, min(math.floor(one_way / step), self.longest_delay))",
        "training/test_overlap.py",
    ),
]

OF_RESUMED_RUNS = [
    Mutation(
        "after a resume every worker goes on in the first worker's data",
        RESUME,
        'load_state_dict(facts["data"][run.workers.rank])',
        'load_state_dict(facts["data"][0])',
        "training/test_resume.py",
    ),
    Mutation(
        "after a resume random numbers start anew",
        RESUME,
        "        generator.set_state(state)\n",
        "        pass\n",
        "training/test_resume.py",
    ),
    Mutation(
        "a checkpoint lacks what inner optimizers remember",
        RESUME,
        '        tensors[f"{worker}.{names[parameter]}.inner.{key}"] = tensor\n',
        "        pass\n",
        "training/test_resume.py",
    ),
    Mutation(
        "bytes start at zero after a resume",
        RESUME,
        "    run.progress.resume_byte_counts(position)\n    run.scheduler",
        "    run.scheduler",
        "training/test_resume.py",
    ),
    Mutation(
        "an elastic restart adds the workers' momenta up",
        RESUME,
        "tensor.copy_(total / len(names))",
        "tensor.copy_(total)",
        "training/test_elastic.py",
    ),
    Mutation(
        "after a resume every worker has the first worker's losses",
        PROGRESS,
        "losses[self.workers.rank] if own",
        "losses[0] if own",
        "training/test_progress.py",
    ),
    Mutation(
        "a rank checks one file of a checkpoint, however few ranks there are",
        "training/checkpoint.py",
        "[self.workers.rank :: self.workers.count]",
        "[self.workers.rank : self.workers.rank + 1]",
        "training/test_checkpoint.py",
    ),
    Mutation(
        "the oldest checkpoints are kept, not the newest",
        "training/checkpoint.py",
        "difference(whole[-self.keep :])",
        "difference(whole[: self.keep])",
        "training/test_checkpoint.py",
    ),
]

MUTATIONS = [*OF_DATA, *OF_TRAINING, *OF_LOGS, *OF_RESUMED_RUNS]
