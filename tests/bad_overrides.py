"""Bad command lines, each with what it is answered, for test_bad_input.py.

An answer is one line; " ... " stands for text that is left out. SCENE is as in bad_inputs.py.
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
    "+unheard=3": "unheard is not a key of this configuration: see train.py --cfg",
    "~steps": "steps has no value: give steps=VALUE",
    "~unheard": "Could not delete from config. 'unheard' does not exist.: see ... ~unheard)",
    "lr=0.1": "lr is not a key of this configuration: did you mean optimizer.lr?",
    "steps.more=1": "steps.more is not a key of this configuration: steps has no keys",
    "model.bias=3": "model.bias is not a key of this configuration: model has layers, width",
    "+model.depth=3": "model: ... unexpected keyword argument 'depth': give what that class takes",
    "~model.layers": "model: ... missing 1 required positional argument: 'layers': give what",
    "optimizer.unheard=1": "optimizer.unheard is not a key of this configuration: optimizer has lr",
    "optimizer=adamw optimizer.beta=1": "optimizer.beta is not a key of ... mean optimizer.betas?",
    "+optimizer.seed=1": "optimizer.seed is not allowed: EF21Muon has beta, buckets, feedback",
    "w2s.fractoin=0.1": "w2s.fractoin is not a key of ... : did you mean w2s.fraction?",
    "s2w.fraction=0.1": "s2w.fraction is not a key of this ... did you mean w2s.fraction?",
    "compressor@w2s=natural w2s.fraction=0.1": "w2s.fraction is not a key of ... w2s has values;",
    "compressor@w2s=identity w2s.values=int4": "w2s.values is not a key of ... w2s has no keys",
    "+w2s.k=3": "w2s: ... unexpected keyword argument 'k': give what that class takes",
    "norm.hidden.norm.method=svd": "is not a key ... has steps; ... +norm.hidden.norm.method=VALUE",
    "+norm.other.radius=1": "norm.other lacks a norm or a radius: give norm.other.norm and",
    "+norm.hidden.lr=1": "norm.hidden.lr is not allowed: a role has norm, radius, w2s, s2w",
    "+norm.hidden.w2s=topk": "w2s='topk' is not allowed: give a Compressor or Switch of ef21_muon",
    "~norm.hidden": "the role 'hidden' of blocks.0 ... has no rule in the preset: it has embedding",
}

TYPES = {
    "steps=abc": "steps=abc is not allowed: give a whole number",
    "steps=1e3": "steps=1000.0 is not allowed: give a whole number",
    "steps=null": "steps=None is not allowed: give a whole number",
    "batch.sequences=1.5": "batch.sequences=1.5 is not allowed: give a whole number",
    "batch=32": "batch=32 is not allowed: give its keys batch.sequences, batch.per_forward",
    "wandb=offline": "wandb=offline is not allowed: give its keys wandb.mode, wandb.project",
    "schedule.warmup=long": "schedule.warmup=long is not allowed: give a number",
    "compile=maybe": "compile=maybe is not allowed: give true or false",
    "label=[1,2]": "label=[1, 2] is not allowed: give text or null",
    "data.train=null": "data.train=None is not allowed: give text",
    "data.train=???": "data.train has no value: give data.train=VALUE",
    "model.width=wide": "model.width is 'wide'; it must be a positive integer: change it",
    "model.vocab_size=many": "model.vocab_size is 'many'; it must be a positive integer: change it",
    "model.layers=1.5": "model.layers is 1.5; it must be a positive integer: change it",
    "optimizer.lr=fast": "lr=fast is not allowed: give a number of at least 0",
    "optimizer.lr=true": "lr=True is not allowed: give a number of at least 0",
    "optimizer.error_decay=1.5": "error_decay=1.5 is not allowed: give a number of at least 0, at",
    "optimizer.server_momentum=1": "server_momentum=1 is not allowed: give a number of at least 0",
    "optimizer.nesterov=1": "nesterov=1 is not allowed: give True or False",
    "optimizer.buckets=1.5": "buckets=1.5 is not allowed: give a whole number above 0",
    "norm.hidden=null": "norm.hidden lacks a norm or a radius: give norm.hidden.norm and",
    "norm.hidden.norm=null": "norm=None is not allowed: give a Norm of ef21_muon (group hidden)",
    "norm.hidden.radius=null": "radius=None is not allowed: give a number above 0 ... group hidden",
    "w2s.fraction=many": "w2s: RankK got fraction=many: give a number above 0, at most 1",
    "w2s=topk": "w2s describes no class: give compressor@w2s=NAME, one of damping, dropout",
    "s2w=null": "s2w describes no class: give compressor@s2w=NAME, one of damping, dropout",
    "~optimizer._target_": "optimizer describes no class: give optimizer=NAME, one of adamw, demo",
    "optimizer=null": "Config group override must be a string ... see ... optimizer=null)",
    "steps=${nope}": "Interpolation key 'nope' not found: see train.py ... steps=${nope})",
}

RANGES = {
    "steps=0": "steps=0 is not allowed: give a whole number of at least 1",
    "batch.sequences=0": "batch.sequences=0 is not allowed: give a whole number of at least 1",
    "batch.per_forward=0": "batch.per_forward=0 is not allowed: give a whole number of at least 1",
    "log_every=0": "log_every=0 is not allowed: give a whole number of at least 1",
    "eval.every=-5": "eval.every=-5 is not allowed: give a whole number of at least 1",
    "checkpoint.keep=0": "checkpoint.keep=0 is not allowed: give a whole number of at least 1",
    "checkpoint.every=-1": "checkpoint.every=-1 is not allowed: give a whole number of at least 0",
    "worker_size=0": "worker_size=0 is not allowed: give a whole number of at least 1",
    "seed=-1": "seed=-1 is not allowed: give a whole number of at least 0",
    "seed=9223372036854775808": "seed=9223372036854775808 is not allowed: give ... below 2^63",
    "schedule.warmup=nan": "schedule.warmup=nan is not allowed: give a share of the steps, 0 to 1",
    "schedule.cooldown=2": "schedule.cooldown=2.0 is not allowed: give a share of the steps",
    "eval.tokens=1": "1 test tokens wanted in windows of 32 from a test set of 2000: use 32 to",
    "eval.tokens=100000": "100000 test tokens wanted ... from a test set of 2000: use 32 to 1984",
    "model.context=100000": "fewer than one window of 100001: use a context below 10000",
    "model.heads=3": "model.width is 32 with 3 heads; width must be a multiple of 2 * heads = 6",
    "model.width=1000000000000000": "the memory does not suffice: give a smaller model",
    "model.vocab_size=255": "smaller than the 256 tokens of data=shakespeare: set model.vocab",
    "data.vocab_size=8": "train.bin: token ... is outside the vocabulary of 8; rebuild with",
    "optimizer.buckets=0": "buckets=0 is not allowed: give a whole number above 0",
    "optimizer.lr=-1": "lr=-1 is not allowed: give a number of at least 0",
    "optimizer.lr=nan": "lr=nan is not allowed: give a number of at least 0",
    "optimizer.beta=0": "beta=0 is not allowed: give a number above 0, at most 1",
    "optimizer.weight_decay=-1": "weight_decay=-1 is not allowed: give a number of at least 0",
    "norm.hidden.radius=0": "radius=0 is not allowed: give a number above 0 ... group hidden",
    "norm.hidden.norm.steps=0": "norm.hidden.norm: Spectral got steps=0: give at least 1",
    "norm=gluon norm.hidden.radius.l0=-1": "norm.hidden.radius: AdaptiveRadius got l0=-1: give a",
    "w2s.fraction=0": "w2s: RankK got fraction=0: give a number above 0, at most 1",
    "w2s.fraction=2": "w2s: RankK got fraction=2: give a number above 0, at most 1",
    "compressor@w2s=dropout w2s.probability=2": "w2s: Dropout got probability=2: give a number",
    "data.vocab_size=0": "data.vocab_size=0 is not allowed: give a whole number of at least 1",
    "data.train_shards=0": "data.train_shards=0 is not allowed: give a whole number of at least 1",
}

CHOICES = {
    "optimizer=sgd": "Could not find 'optimizer/sgd': choose from adamw, demo, dion, ef21_muon",
    "model=large": "Could not find 'model/large': choose from gpt2-124m, tiny",
    "compressor@w2s=unheard": "choose from damping, dropout, fitted_rank, identity",
    "compressor=topk": "Could not override 'compressor'. Did you mean ... compressor@s2w, compress",
    "experiment=thesis": "Could not find 'experiment/thesis': choose from paper",
    "resume=yes": "resume=yes is not allowed: choose none, auto or elastic",
    "wandb.mode=on": "wandb.mode=on is not allowed: choose disabled, offline or online",
    "data.train=/nowhere/*.bin": "/nowhere/*.bin: 0 matching files, expected 1; rebuild",
    "data.train_shards=2": "train.bin: 1 matching files, expected 2; rebuild with: python data/",
    "w2s.values=float8": "values=float8 is not a value format: choose from float32, bfloat16",
    "w2s.values=int4@0": "w2s: Integer got block=0: give row, message or a number",
    "optimizer.server=moon": "server='moon' is not a placement: choose rank0, sharded, replicated",
    "optimizer.feedback=ef22": "feedback='ef22' is not allowed: choose ef21, ef14, none",
    "+norm.hidden.norm.method=qr": "norm.hidden.norm: Spectral got method='qr': choose jordan",
    "w2s._target_=nowhere.Nope": "w2s: Error loading 'nowhere.Nope': give the dotted name of a",
    "optimizer._target_=torch.optim.SGD": "SGD is not allowed: give ef21_muon.EF21Muon, a class of",
}

CONTRADICTIONS = {
    "optimizer.server=replicated compressor@s2w=topk": (
        "server='replicated' sends nothing back to compress with s2w=top 15% natural: use s2w="
    ),
    "-m directory=SCENE/new seed=0,1": "directory= names a single run: use runs= for the folder of",
    "-m seed=0,1 steps=0": "steps=0 is not allowed: give a whole number ... (in seed=0 model",
    "directory=SCENE/completed": "SCENE/completed exists already: go on with resume=auto, or give",
    "directory=SCENE/completed resume=auto optimizer.lr=1": (
        "SCENE/completed was made with another configuration: optimizer.lr=1 (it has 0.02); give"
    ),
    "resume=elastic": "resume=elastic needs directory=: say which run goes on",
    "resume=elastic directory=SCENE/new optimizer.feedback=ef14": (
        "resume=elastic is not allowed for rank 15% natural, EF14: it needs optimizer=ef21_muon"
    ),
    "compressor@w2s=switch": "w2s.start=240 is not below steps=4: give a round of the run, or the",
    "compressor@w2s=switch w2s.start=0": "w2s: Switch got start=0: give a round, a whole number",
    "compressor@s2w=switch": "is not allowed: give a Compressor of ef21_muon (group ",
    "worker_size=2": "worker_size=2 needs a process group: use torchrun",
    "optimizer.error_decay=0.9 optimizer.feedback=none": (
        "error_decay=0.9 is not allowed with feedback='none': leave it at 1, or use feedback='ef14'"
    ),
    "optimizer.server_momentum=0.7": (
        "server_momentum=0.7 is not allowed with feedback='ef21': leave it at 0, or use feedback="
    ),
    "dry_run=true optimizer=adamw": "dry_run=true plans EF21-Muon alone: give optimizer=ef21_muon",
    "data=fineweb10b": "model.vocab_size=256 is smaller than the 50257 ... set model.vocab_size to",
    "optimizer=adamw": "an all-reduce needs a process group: launch with torchrun",
    "wandb.mode=online": "wandb.mode=online does not start (No API key ... give wandb.mode=offline",
}

IN_A_PROCESS_GROUP = {  # of one process
    "optimizer=adamw worker_size=2": "worker_size=2 needs optimizer=ef21_muon: set it to 1",
    "worker_size=2": "worker_size=2 does not divide 1 ranks: give a divisor",
    "optimizer=dion diagnostics_every=1": "diagnostics_every=1 needs optimizer=ef21_muon: ... to 0",
    "optimizer=muon_powersgd": "checkpoint.every=100 is not allowed with hook=powersgd: ... to 0",
    "optimizer=adamw optimizer.hook=bfloat16": "hook='bfloat16' is not allowed on gloo: use float",
    "optimizer=adamw optimizer.hook=zip": "hook='zip' is not allowed: choose float32, float16",
    "optimizer=adamw optimizer.lr=fast": "lr=fast is not allowed: give a number of at least 0",
    "optimizer=adamw optimizer.betas=0.9": "betas=0.9 is not allowed: give two numbers",
    "optimizer=adamw optimizer.betas=[0.9,2]": "betas=2 is not allowed: give a number ... below 1",
    "optimizer=muon optimizer.rank=0": "rank=0 is not allowed: give a whole number above 0",
    "optimizer=dion optimizer.rank_fraction=0": "rank_fraction=0 is not allowed: give a number",
    "optimizer=demo optimizer.k=0": "k=0 is not allowed: give a whole number above 0",
    "optimizer=demo resume=elastic directory=SCENE/new": "resume=elastic is not allowed for DeMo",
}
