"""Bad command lines, each with its error, for test_bad_input.py.

An error is one line; " ... " stands for text that is left out. SCENE is as in bad_inputs.py.
"""

COMMAND_LINES = {
    "--timeout=0": "0 s is not allowed: give a number above 0, at most 1000000",
    "--timeout=-1": "-1 s is not allowed: give a number above 0",
    "--timeout=nan": "nan s is not allowed: give a number above 0",
    "--timeout=1e300": "1e300 s is not allowed: give a number above 0, at most 1000000",
    "--timeout=soon": "--timeout: invalid seconds value: 'soon': see train.py --help",
    "--timeout": "--timeout: expected one argument: see train.py --help",
    "--resume": "unrecognized arguments: --resume: see train.py --help",
    "steps": "'steps' cannot be read (missing EQUAL at '<EOF>'): write KEY=VALUE",
    "steps=[1": "'steps=[1' cannot be read (no viable alternative ... ): write KEY=VALUE, a list",
    "steps='3": '"steps=\'3" cannot be read ... text with other signs in quotes',
    "steps=1,2": "'steps=1,2': add -m to sweep over it, or write a list as [a,b]",
    "-m steps=1,2 seed=(": "'seed=(' cannot be read ... write KEY=VALUE",
    "=3": "Got int: see train.py --help (in ... =3)",
    "hydra.run.dir=x": "hydra.run.dir=x has no effect here: give runs= or directory=",
}

KEYS = {
    "stepz=3": "stepz is not a key of this configuration: did you mean steps?",
    "+qqq=3": "qqq is not a key of this configuration: see train.py --cfg",
    "~steps": "steps has no value: give steps=VALUE",
    "~unheard": "Could not delete from config. 'unheard' does not exist.: see ... ~unheard)",
    "lr=0.1": "lr is not a key of this configuration: did you mean optimizer.lr?",
    "steps.more=1": "steps.more is not a key of this configuration: steps has no keys",
    "model.bias=3": "model.bias is not a key of this configuration: model has layers, width",
    "+model.depth=3": "model: ... unexpected keyword argument 'depth': give what that class takes",
    "~model.layers": "model: ... missing 1 required positional argument: 'layers': give what",
    "optimizer.unheard=1": "optimizer.unheard is not a key of this configuration: optimizer has lr",
    "optimizer=adamw optimizer.momentum=0": "optimizer.momentum is not a key ... has lr, betas",
    "+optimizer.seed=1": "optimizer.seed is not allowed: EF21Muon has buckets, error_decay",
    "w2s.fractoin=0.1": "w2s.fractoin is not a key of ... : did you mean w2s.fraction?",
    "s2w.fraction=0.1": "s2w.fraction is not a key of this ... did you mean w2s.fraction?",
    "compressor@w2s=natural w2s.fraction=0.1": "w2s.fraction is not a key of ... w2s has values;",
    "compressor@w2s=identity w2s.values=int4": "w2s.values is not a key of ... w2s has no keys",
    "+w2s.k=3": "w2s: ... unexpected keyword argument 'k': give what that class takes",
    "norm.hidden.norm.method=svd": "is not a key ... has steps; ... +norm.hidden.norm.method=VALUE",
    "+norm.other.radius=1": "norm.other lacks a norm or a radius: give norm.other.norm and",
    "+norm.hidden.lr=1": "norm.hidden.lr is not allowed: a role has norm, radius, lmo_feedback, w2",
    "+norm.hidden.w2s=topk": "norm.hidden.w2s='topk' lacks its fraction: write topk:FRACTION",
    "+norm.hidden.s2w.fraction=0.5": "norm.hidden.s2w describes no class: give +norm.hidden.s2w=",
    "+compressor@norm.hidden.w2s=topk norm.hidden.w2s.fracton=1": "mean norm.hidden.w2s.fraction?",
    "~norm.hidden": "the role 'hidden' of blocks.0 ... has no rule in the preset: it has embedding",
}

TYPES = {
    "steps=abc": "steps=abc is not allowed: give a whole number",
    "steps=1e3": "steps=1000.0 is not allowed: give a whole number",
    "steps=null": "steps=None is not allowed: give a whole number",
    "batch.global_size=1.5": "batch.global_size=1.5 is not allowed: give a whole number",
    "batch=32": "batch=32 is not allowed: give its keys batch.global_size, batch.micro_size",
    "wandb=offline": "wandb=offline is not allowed: give its keys wandb.mode, wandb.project",
    "schedule.warmup=long": "schedule.warmup=long is not allowed: give a number",
    "clip_grad_norm=tight": "clip_grad_norm=tight is not allowed: give a number or null",
    "clip_grad_norm=true": "clip_grad_norm=True is not allowed: give a number or null",
    "plan=100": "plan=100 is not allowed: give its keys plan.step_seconds, plan.mbit, plan.latency",
    "plan.mbit=fast": "plan.mbit=fast is not allowed: give a number or null",
    "plan.latency_ms=null": "plan.latency_ms=None is not allowed: give a number",
    "compile=maybe": "compile=maybe is not allowed: choose auto, true or false",
    "precision=float16": "precision=float16 is not allowed: choose auto, float32 or bfloat16",
    "label=[1,2]": "label=[1, 2] is not allowed: give text or null",
    "data.train=null": "data.train=None is not allowed: give text",
    "data.train=???": "data.train has no value: give data.train=VALUE",
    "model.width=wide": "model.width is 'wide'; it must be a positive integer: change it",
    "model.vocab_size=many": "model.vocab_size is 'many'; it must be a positive integer: change it",
    "model.layers=1.5": "model.layers is 1.5; it must be a positive integer: change it",
    "optimizer.lr=fast": "lr='fast' is not allowed: give a number of at least 0",
    "optimizer.lr=true": "lr=True is not allowed: give a number of at least 0",
    "optimizer.error_decay=1.5": "error_decay=1.5 is not allowed: give a number of at least 0, at",
    "optimizer.server_momentum=1": "server_momentum=1 is not allowed: give a number of at least 0",
    "optimizer.nesterov=1": "nesterov=1 is not allowed: give True or False",
    "optimizer.buckets=1.5": "buckets=1.5 is not allowed: give a whole number above 0",
    "norm.hidden=null": "norm.hidden lacks a norm or a radius: give norm.hidden.norm and",
    "norm.hidden.norm=null": "norm.hidden.norm describes no class: give norm.hidden.norm._target_=",
    "norm.hidden.radius=null": "radius=None is not allowed: give a number above 0 ... group hidden",
    "w2s.fraction=many": "w2s: QuantizedRank got fraction=many: give a number above 0, at most 1",
    "w2s=3": "w2s describes no class: give w2s=SPEC, such as rank:0.15:natural, or compressor@w2s=",
    "s2w=null": "s2w describes no class: give s2w=SPEC ... or compressor@s2w=NAME, one of bern",
    "~optimizer._target_": "optimizer describes no class: give optimizer=NAME, one of adamw, demo",
    "optimizer=null": "Config group override must be a string ... see ... optimizer=null)",
    "steps=${nope}": "Interpolation key 'nope' not found: see train.py ... steps=${nope})",
}

FLEET = "membership=torchft membership.workers=2 membership.worker=0 optimizer=local"
RANGES = {
    "steps=0": "steps=0 is not allowed: give a whole number of at least 1",
    "batch.global_size=0": "batch.global_size=0 is not allowed: give a whole number of at least 1",
    "batch.micro_size=0": "batch.micro_size=0 is not allowed: give a whole number of at least 1",
    "log_every=0": "log_every=0 is not allowed: give a whole number of at least 1",
    "eval.every=-5": "eval.every=-5 is not allowed: give a whole number of at least 1",
    "checkpoint.keep=0": "checkpoint.keep=0 is not allowed: give a whole number of at least 1",
    "checkpoint.every=-1": "checkpoint.every=-1 is not allowed: give a whole number of at least 0",
    "ranks_per_worker=0": "ranks_per_worker=0 is not allowed: give a whole number of at least 1",
    "seed=-1": "seed=-1 is not allowed: give a whole number of at least 0",
    "seed=9223372036854775808": "seed=9223372036854775808 is not allowed: give ... below 2^63",
    "plan.step_seconds=0 plan.mbit=100": "plan.step_seconds=0 is not allowed: give a number above",
    "plan.step_seconds=1 plan.mbit=-1": "plan.mbit=-1 is not allowed: give a number above 0",
    "plan.step_seconds=nan plan.mbit=1": "plan.step_seconds=nan is not allowed: give a number",
    "plan.step_seconds=1 plan.mbit=inf": "plan.mbit=inf is not allowed: give a number above 0",
    "plan.latency_ms=-1": "plan.latency_ms=-1 is not allowed: give a number of at least 0",
    "schedule.warmup=nan": "schedule.warmup=nan is not allowed: give a share of the steps, 0 to 1",
    "schedule.cooldown=2": "schedule.cooldown=2.0 is not allowed: give a share of the steps",
    "schedule.floor=-0.1": "schedule.floor=-0.1 is not allowed: give a share of the lr, 0 to 1",
    "steps=1000 schedule.warmup=50": (
        "schedule.warmup=50.0 is not allowed: give a share of the steps, 0 to 1 (0.05 for 50 of 10"
    ),
    **{
        f"clip_grad_norm={value}": f"clip_grad_norm={float(value)} is not allowed: give a number"
        for value in ("0", "-1", "nan", "inf")
    },
    "optimizer=local optimizer.mean=median": "mean='median' is not allowed: choose all, senders",
    "optimizer=sparseloco optimizer.feedback=ef21 optimizer.error_decay=1": (
        "mean='senders' is not allowed with feedback='ef21', whose servers add up means"
    ),
    "eval.tokens=1": "1 test tokens wanted in windows of 32 from a test set of 2000: use 32 to",
    "eval.tokens=100000": "100000 test tokens wanted ... from a test set of 2000: use 32 to 1984",
    "model.context=100000": "fewer than one window of 100001: use a context below 10000",
    "model.heads=3": "model.width is 32 with 3 heads; width must be a multiple of 2 * heads = 6",
    "model.width=1000000000000000": "the memory does not suffice: give a smaller model",
    "model.vocab_size=255": "smaller than the 256 tokens of data=shakespeare: set model.vocab",
    "data.vocab_size=8": "train.bin: token ... is outside the vocabulary of 8; rebuild with",
    "optimizer=local optimizer.sync_every=0": "every=0 is not allowed: give a whole number above 0",
    "optimizer=local optimizer.sync_every=2.5": "every=2.5 is not allowed: give a whole number",
    "optimizer=local optimizer.sync_delay=30": "delay=30 is not allowed with sync_every=30: ",
    "optimizer=local optimizer.sync_delay=-1": "delay=-1 is not allowed: give a whole number of at",
    "optimizer=local optimizer.outer_lr=0": "outer_lr=0 is not allowed: give a number above 0",
    "optimizer=local optimizer.outer_momentum=1": "outer_momentum=1 is not allowed: give a number",
    "optimizer=local optimizer.error_decay=2": "error_decay=2 is not allowed: give a number of",
    "optimizer=local optimizer.streaming=1": "streaming=1 is not allowed: give True or False",
    "optimizer=local optimizer.feedback=ef22": "feedback='ef22' is not allowed: choose ef21, ef14",
    "optimizer=local optimizer.inner.lr=-1": "optimizer.inner: lr=-1 is not allowed: give a number",
    "optimizer=local optimizer.inner=null": "optimizer.inner describes no optimizer: give",
    "optimizer=diloco optimizer.inner.lr=-1": "optimizer.inner: Invalid learning rate: -1",
    "optimizer=diloco optimizer.inner._target_=torch.optim.LBFGS": "optimizer.inner: LBFGS",
    "optimizer=local optimizer.server=replicated compressor@s2w=topk": "sends nothing back to",
    "optimizer=local resume=elastic directory=x optimizer.sync_delay=1": "=elastic is not allowed",
    f"{FLEET} membership.worker=2": "membership.worker=2 is not allowed: give one of 0 to 1, each",
    f"{FLEET} membership.workers=0": "membership.workers=0 is not allowed: give a whole number of",
    f"{FLEET} resume=none": "resume=none is not allowed with membership=torchft: a worker that",
    f"{FLEET} optimizer=muon": "membership=torchft needs local steps, Muon cannot continue without",
    f"{FLEET} optimizer=ef21_muon": "membership=torchft needs local steps, EF21Muon cannot",
    f"{FLEET} optimizer.sync_delay=1": "delay=1 is not allowed for workers that come and go: they",
    f"{FLEET} optimizer.server=rank0": "server='rank0' is not allowed for workers that come and",
    f"{FLEET} optimizer.feedback=ef21": "feedback='ef21' is not allowed for workers that come and",
    f"{FLEET} compressor@s2w=topk": "sends nothing back to",
    f"{FLEET} batch.global_size=3": "batch.global_size=3 cannot be split over 2 workers: give a",
    f"{FLEET} ranks_per_worker=2": "has a torchrun for each worker, of ranks_per_worker=2",
    "membership=torchft": "membership.workers has no value: give membership.workers=VALUE",
    "membership.worker=1": "membership.worker=1 is not allowed with membership=fixed: workers",
    "optimizer.buckets=0": "buckets=0 is not allowed: give a whole number above 0",
    "optimizer.lr=-1": "lr=-1 is not allowed: give a number of at least 0",
    "optimizer.lr=nan": "lr=nan is not allowed: give a number of at least 0",
    "optimizer.momentum=1": "momentum=1 is not allowed: give a number of at least 0, below 1",
    "optimizer.weight_decay=-1": "weight_decay=-1 is not allowed: give a number of at least 0",
    "norm.hidden.radius=0": "radius=0 is not allowed: give a number above 0 ... group hidden",
    "norm.hidden.norm.steps=0": "norm.hidden.norm: Spectral got steps=0: give at least 1",
    "norm=gluon norm.hidden.radius.l0=-1": "norm.hidden.radius: AdaptiveRadius got l0=-1: give a",
    "w2s.fraction=0": "w2s: QuantizedRank got fraction=0: give a number above 0, at most 1",
    "w2s.fraction=2": "w2s: QuantizedRank got fraction=2: give a number above 0, at most 1",
    "compressor@w2s=bernoulli w2s.probability=2": "w2s: Bernoulli got probability=2: give a number",
    "data.vocab_size=0": "data.vocab_size=0 is not allowed: give a whole number of at least 1",
    "data.train_shards=0": "data.train_shards=0 is not allowed: give a whole number of at least 1",
}

CHOICES = {
    "optimizer=sgd": "Could not find 'optimizer/sgd': choose from adamw, demo, diloco, dion",
    "model=large": "Could not find 'model/large': choose from gpt2-124m, tiny",
    "compressor@w2s=unheard": "choose from bernoulli, chunk_topk, identity, natural",
    "compressor=topk": "Could not override 'compressor'. Did you mean ... compressor@s2w, compress",
    "experiment=thesis": "Could not find 'experiment/thesis': choose from paper",
    "fsdp=true": "fsdp=true needs workers of several ranks: give ranks_per_worker=2 or more",
    "transport=nccl": "transport=nccl is not allowed: choose device or host",
    "schedule.shape=linear": "schedule.shape=linear is not allowed: choose trapezoid or cosine",
    "resume=yes": "resume=yes is not allowed: choose none, auto or elastic",
    "wandb.mode=on": "wandb.mode=on is not allowed: choose disabled, offline or online",
    "data.train=/nowhere/*.bin": "/nowhere/*.bin: 0 matching files, expected 1; rebuild",
    "data.train_shards=2": "train.bin: 1 matching files, expected 2; rebuild with: python data/",
    "w2s.values=float8": "values=float8 is not a value format: choose from float32, bfloat16",
    "w2s.values=int4@0": "w2s: Integer got block=0: give row, tensor, a number of values above 0",
    "optimizer.server=moon": "server='moon' is not a placement: choose auto, rank0, sharded",
    "optimizer.feedback=ef22": "feedback='ef22' is not allowed: choose ef21, ef14, none",
    "+norm.hidden.norm.method=qr": "norm.hidden.norm: Spectral got method='qr': choose jordan",
    "w2s._target_=nowhere.Nope": "w2s: Error loading 'nowhere.Nope': give the dotted name of a",
    "optimizer._target_=torch.optim.SGD": "SGD is not allowed: give ef21_muon.EF21Muon, a class of",
}

SPECS = {
    "w2s=topk": "w2s='topk' lacks its fraction: write topk:FRACTION[:VALUES]",
    "w2s=rnk:0.1": "w2s='rnk:0.1' is not a compressor: choose from identity, quantize",
    "s2w=topk:2": "s2w='topk:2' is not allowed: TopK got fraction=2.0: give a number above 0",
    "w2s=topk:0.1:float9": "w2s='topk:0.1:float9' is not allowed: values=float9 is not a",
    "w2s=rank:0.1:natural:4": "w2s='rank:0.1:natural:4' has '4' left over: write rank:FRACTION",
    "optimizer=local optimizer.sync_every=2 w2s=nothing": "w2s='nothing' is not a compressor",
    "dry_run=true w2s=topk:0": "w2s='topk:0' is not allowed: TopK got fraction=0.0",
    "-m w2s=sign,topk:7": "w2s='topk:7' is not allowed: TopK got ... (in w2s=topk:7 ",
    "+norm.embedding.w2s=randk": "norm.embedding.w2s='randk' lacks its fraction: write randk:FRACT",
    "norm.embedding.w2s=sign": "norm.embedding.w2s is not a key ... write +norm.embedding.w2s=SPEC",
    **{
        f"{first} {second}": f"{other} is not allowed beside w2s=topk:0.1, which describes the"
        for other in ("w2s.fraction=0.3", "+w2s.values=int4", "compressor@w2s=topk")
        for first, second in ((other, "w2s=topk:0.1"), ("w2s=topk:0.1", other))
    },
    "+norm.hidden.w2s=sign norm.hidden.w2s.values=int4": (
        "norm.hidden.w2s.values=int4 is not allowed beside norm.hidden.w2s=sign, which describes"
    ),
}

CONTRADICTIONS = {
    "schedule.shape=cosine schedule.cooldown=0.2": (
        "schedule.cooldown=0.2 has no effect with schedule.shape=cosine, which falls from the end"
    ),
    "+optimizer.mean=senders": "optimizer.mean is not allowed: EF21Muon has buckets",
    "optimizer.server=replicated compressor@s2w=topk": (
        "server='replicated' sends nothing back to compress with s2w=top 15% natural: use s2w="
    ),
    "-m directory=SCENE/new seed=0,1": "directory= names a single run: use runs= for the folder of",
    "-m seed=0,1 steps=0": "steps=0 is not allowed: give a whole number ... (in seed=0 model",
    "directory=SCENE/completed": "SCENE/completed exists already: resume with resume=auto, or give",
    "directory=SCENE/completed resume=auto optimizer.lr=1": (
        "SCENE/completed was made with another configuration: optimizer.lr=1 (it has 0.02); give"
    ),
    "resume=elastic": "resume=elastic needs directory=: say which run to resume",
    "resume=elastic directory=SCENE/new optimizer.feedback=ef14": (
        "resume=elastic is not allowed for quantized rank 30% ... EF14: it needs optimizer="
    ),
    "diagnostics_every=5": "diagnostics_every=5 is longer than steps=4, which leaves no record of",
    "optimizer=diloco": "optimizer.sync_every=500 is longer than steps=4: give optimizer.",
    "optimizer=local": "optimizer.sync_every=30 is longer than steps=4: give optimizer.",
    "optimizer=muloco optimizer.sync_every=5": "every=5 is longer than steps=4: ... steps=5 or",
    "optimizer=local optimizer.sync_every=400 dry_run=true": "every=400 is longer than steps=4",
    "optimizer=local optimizer.sync_every=9 optimizer.sync_delay=2": "every=9 is longer than",
    "optimizer=local optimizer.sync_every={0:2,2:600}": (
        "has rounds of 600 steps from step 3 on, where steps=4 leaves 2: give rounds of 2"
    ),
    "optimizer=local optimizer.sync_every={0:1,3:2}": "of 2 steps from step 4 on, where steps=4 ",
    "optimizer=local optimizer.sync_every={0:1,4:2}": "from step 5 on, which steps=4 does not",
    f"{FLEET} optimizer.sync_every=5": "optimizer.sync_every=5 is longer than steps=4: give",
    "ranks_per_worker=2": "ranks_per_worker=2 needs a process group: use torchrun",
    "optimizer.error_decay=0.9 optimizer.feedback=none": (
        "error_decay=0.9 is not allowed with feedback='none': leave it at 1, or use feedback='ef14'"
    ),
    "optimizer.server_momentum=0.7": (
        "server_momentum=0.7 is not allowed with feedback='ef21': leave it at 0, or use feedback="
    ),
    "plan.mbit=100": "plan.mbit=100 needs plan.step_seconds: give a step's seconds and the link's",
    "plan.step_seconds=1 plan.mbit=9": "plan.step_seconds=1 plan.mbit=9 needs dry_run=true: add it",
    "plan.latency_ms=50": "plan.latency_ms=50 needs plan.step_seconds and plan.mbit: give a step's",
    "dry_run=true optimizer=adamw": "dry_run=true plans EF21-Muon and local steps: give",
    "data=fineweb10b": "model.vocab_size=256 is smaller than the 50257 ... set model.vocab_size to",
    "optimizer=adamw": "an all-reduce needs a process group: launch with torchrun",
    "wandb.mode=online": "wandb.mode=online does not start (No API key ... give wandb.mode=offline",
}

IN_A_PROCESS_GROUP = {  # of one process
    "optimizer=adamw ranks_per_worker=2": "ranks_per_worker=2 needs optimizer=ef21_muon or loc",
    "ranks_per_worker=2": "ranks_per_worker=2 does not divide 1 ranks: give a divisor",
    "optimizer=dion diagnostics_every=1": "diagnostics_every=1 needs optimizer=ef21_muon or local",
    "optimizer=muon_powersgd": "checkpoint.every=100 is not allowed with hook=powersgd: ... to 0",
    "optimizer=muon_greedylore optimizer.refresh_every=0": "every=0 is not allowed: give a whole",
    "optimizer=adamw optimizer.hook=bfloat16": "hook='bfloat16' is not allowed on gloo: use float",
    "optimizer=adamw optimizer.hook=zip": "hook='zip' is not allowed: choose float32, float16",
    "optimizer=adamw optimizer.lr=fast": "lr='fast' is not allowed: give a number of at least 0",
    "optimizer=adamw optimizer.betas=0.9": "betas=0.9 is not allowed: give two numbers",
    "optimizer=adamw optimizer.betas=[0.9,2]": "betas=2 is not allowed: give a number ... below 1",
    "optimizer=muon optimizer.rank=0": "rank=0 is not allowed: give a whole number above 0",
    "optimizer=dion optimizer.rank_fraction=0": "rank_fraction=0 is not allowed: give a number",
    "optimizer=demo optimizer.k=0": "k=0 is not allowed: give a whole number above 0",
    "optimizer=demo resume=elastic directory=SCENE/new": "resume=elastic is not allowed for DeMo",
}
