"""Bad files, environments and gradients, each with what it is answered, for test_bad_input.py.

An answer is one line; " ... " stands for text that is left out. SCENE is a folder with the data, an
earlier run that was killed after its checkpoint of step 2 (`killed`), one that came to its end
(`completed`); where it has a copy of configs/, that is used in place of it.
"""

import json
import os
import random
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from checkpoints import rewrite_facts

from data.shards import HEADER_ENTRIES, MAGIC, write_shard
from model import GPT
from training.checkpoint import Checkpoints
from training.config import CONFIGS
from training.gradients import GradientComputation
from training.workers import Workers


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def header(path: Path, place: int, entry: int) -> None:
    """Overwrite an entry of a shard's header."""
    with path.open("r+b") as file:
        file.seek(4 * place)
        file.write(np.int32(entry).tobytes())


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def without_tokens(path: Path) -> None:
    path.write_bytes(np.array([MAGIC, 1, 0] + [0] * (HEADER_ENTRIES - 3), dtype="<i4").tobytes())


REBUILD = "rebuild with: python data/shakespeare.py --rebuild"
SHARDS = {  # what is done to SCENE/data/train.bin
    "missing": (Path.unlink, "0 matching files, expected 1; " + REBUILD),
    "a folder": (make_folder, "train.bin: cannot be read (Is a directory); " + REBUILD),
    "unreadable": (lambda path: path.chmod(0), "cannot be read (Permission denied); " + REBUILD),
    "empty": (lambda path: os.truncate(path, 0), "0 bytes, shorter than the header ... " + REBUILD),
    "no tokens": (without_tokens, "0 tokens, expected at least 1; " + REBUILD),
    "cut": (lambda path: os.truncate(path, 9999), "9999 bytes, expected 21024 for ... " + REBUILD),
    "other magic": (
        lambda path: header(path, 0, 7),
        "magic number 7, expected 20240520; " + REBUILD,
    ),
    "other version": (lambda path: header(path, 1, 2), "format version 2, expected 1; " + REBUILD),
    "other length": (
        lambda path: header(path, 2, -5),
        "for the -5 tokens of its ... " + REBUILD,
    ),
    "foreign tokens": (
        lambda path: write_shard(path, np.full(10000, 256)),
        "train.bin: token 256 is outside the vocabulary of 256; " + REBUILD,
    ),
}
WHILE_RUNNING = {
    "vanished": (Path.unlink, "train.bin: vanished during the run (No such file ... " + REBUILD),
    "cut": (lambda path: os.truncate(path, 21022), "21022 bytes, 21024 when ... " + REBUILD),
}


def other_tensors(checkpoint: Path) -> None:
    """A checkpoint with the right facts and other tensors."""
    facts = json.loads((checkpoint / "checkpoint.json").read_text())
    shutil.rmtree(checkpoint)
    tensors = {"parameter.embedding.weight": torch.zeros(2, 2)}
    Checkpoints(checkpoint.parent, Workers(), keep=1).save(2, tensors, facts)


def no_folder(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.write_text("nothing")


def cut_log(checkpoint: Path) -> None:
    os.truncate(checkpoint.parent.parent / "metrics.jsonl", 10)


NOT_WHOLE = (
    "every checkpoint in SCENE/killed/checkpoints is damaged: remove the folder to start anew"
)
CHECKPOINTS = {  # what is done to the only one of SCENE/killed, and other overrides
    **{
        f"without {name}": (
            lambda path, name=name: (path / name).unlink(),
            "",
            f"step-00000002/{name} ... {NOT_WHOLE}",
        )
        for name in ("__0_0.distcp", ".metadata", "checkpoint.json")
    },
    **{
        f"a bit of {name} flipped": (
            lambda path, name=name: flip(path / name),
            "",
            f"step-00000002/{name} is ... {NOT_WHOLE}",
        )
        for name in ("__0_0.distcp", ".metadata", "checkpoint.json")
    },
    "cut": (
        lambda path: os.truncate(path / "__0_0.distcp", 100),
        "",
        f"__0_0.distcp is not what was written ... {NOT_WHOLE}",
    ),
    "unreadable": (
        lambda path: (path / "__0_0.distcp").chmod(0),
        "",
        f"Permission denied: ... __0_0.distcp ... {NOT_WHOLE}",
    ),
    "no folder": (no_folder, "", f"Not a directory: ... step-00000002 ... {NOT_WHOLE}"),
    "of a later schema": (
        lambda path: rewrite_facts(path, schema=2),
        "",
        f"has schema 2, this version reads 1: use the version that wrote it ... {NOT_WHOLE}",
    ),
    "of another number of workers": (
        lambda path: rewrite_facts(path, workers=2),
        "",
        "step-00000002 is of 2 workers, this run has 1: start as many, or give resume=elastic",
    ),
    "of another model": (
        lambda path: None,
        "model.layers=2",
        "was made with another configuration: model.layers=2 (it has 1); give the same values",
    ),
    "of another compressor": (
        lambda path: None,
        "compressor@w2s=identity",
        "w2s._target_='ef21_muon.compressors.Identity' (it has 'ef21_muon. ... give the same",
    ),
    "with other tensors": (
        other_tensors,
        "",
        "step-00000002 does not fit this run: Missing key ... give this run's own directory",
    ),
    "with a log that was cut": (cut_log, "", "is shorter than the ... bytes ... put it back, or"),
}


def config_file(content: bytes) -> Callable[[Path], None]:
    def prepare(scene: Path) -> None:
        shutil.copytree(CONFIGS, scene / "configs")
        (scene / "configs/compressor/mine.yaml").write_bytes(content)

    return prepare


def file_in_place_of_runs(scene: Path) -> None:
    (scene / "file").write_text("nothing")


def folder_without_rights(scene: Path) -> None:
    (scene / "closed").mkdir()
    (scene / "closed").chmod(0o500)


def damaged_log(scene: Path) -> None:
    (scene / "killed/metrics.jsonl").unlink()
    (scene / "killed/metrics.jsonl").mkdir()


FILES = {  # what is done to SCENE, and overrides
    "broken YAML": (
        config_file(b"_target_: [1\nfraction: {"),
        "compressor@w2s=mine",
        "compressor/mine.yaml ... line 1, column 11 ... correct that file",
    ),
    "a key twice": (
        config_file(
            b"_target_: ef21_muon.compressors.Identity\n_target_: ef21_muon.compressors.Quantize"
        ),
        "compressor@w2s=mine",
        "mine.yaml ... found duplicate key _target_ ... line 2, column 1: correct that file",
    ),
    "bytes": (config_file(b"\xff\x00"), "compressor@w2s=mine", "decode byte 0xff ... w2s=mine"),
    "nothing": (
        config_file(b""),
        "compressor@w2s=mine",
        "w2s describes no class: give w2s=SPEC",
    ),
    "a list": (config_file(b"[1, 2]"), "compressor@w2s=mine", "w2s describes no class: give "),
    "an unheard class": (
        config_file(b"_target_: nowhere.Compressor"),
        "compressor@w2s=mine",
        "w2s: Error loading 'nowhere.Compressor': give the dotted name of a class that can be",
    ),
    "an unheard default": (
        config_file(b"defaults:\n  - nothing\n_target_: ef21_muon.compressors.Identity"),
        "compressor@w2s=mine",
        "In 'compressor/mine': Could not load 'compressor/nothing'. ... w2s=mine",
    ),
    "runs= is a file": (
        file_in_place_of_runs,
        "runs=SCENE/file",
        "the run directory SCENE/file/ ... cannot be written (Not a directory): give another with",
    ),
    "directory= is a file": (
        file_in_place_of_runs,
        "directory=SCENE/file resume=auto",
        "directory=SCENE/file is a file: give a folder",
    ),
    "directory= is below a file": (
        file_in_place_of_runs,
        "directory=SCENE/file/run",
        "the run directory SCENE/file/run cannot be written (Not a directory): give another with",
    ),
    "directory= is closed": (
        folder_without_rights,
        "directory=SCENE/closed/run",
        "the run directory SCENE/closed/run cannot be written (Permission denied): give another",
    ),
    "the log is a folder": (
        damaged_log,
        "directory=SCENE/killed resume=auto",
        "Is a directory: ... SCENE/killed/metrics.jsonl",
    ),
}

# Environment


def free_port() -> str:
    """Below those that a system gives to all who ask for any (ip(7)), so nobody takes it first."""
    while True:
        with socket.socket() as listening, suppress(OSError):
            listening.bind(("", random.randrange(20_000, 32_000)))
            return str(listening.getsockname()[1])


MEET = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
ENVIRONMENTS = {  # variables beside MEET and a free MASTER_PORT; None is not set
    "RANK=first": ({"RANK": "first"}, "RANK=first is not a whole number: launch with torchrun"),
    "RANK=2 of 2": (
        {"RANK": "2", "WORLD_SIZE": "2"},
        "RANK=2 does not go with WORLD_SIZE=2: launch with torchrun, or unset both",
    ),
    "WORLD_SIZE=2 alone": (
        {"RANK": None, "WORLD_SIZE": "2"},
        "RANK= does not go with WORLD_SIZE=2: launch with torchrun, or unset both",
    ),
    "no MASTER_ADDR": ({"MASTER_ADDR": None}, "environment variable MASTER_ADDR expected, but not"),
    "MASTER_PORT=x": ({"MASTER_PORT": "x"}, "MASTER_PORT=x is not a whole number: launch with"),
    "MASTER_PORT=99999": ({"MASTER_PORT": "99999"}, "port must have value from 0 to 65535 but was"),
    "port taken": (
        {"MASTER_PORT": "TAKEN"},
        "rank 0: the port is taken: give a free --master-port, and start rank 0 once",
    ),
    "no network interface": (
        {"GLOO_SOCKET_IFNAME": "nowhere0"},
        "no such network interface: set GLOO_SOCKET_IFNAME to one that is up ( ... nowhere0)",
    ),
    "an unheard host": (
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere.invalid"},
        "rank 1: no meeting at nowhere.invalid: ... start all 2 ranks, where they reach",
    ),
    "rank 1 did not start": (
        {"WORLD_SIZE": "2"},
        "rank 0: no meeting at localhost: ... start all 2 ranks, ... or give a longer --timeout",
    ),
}
WAIT_IN_VAIN = ("an unheard host", "rank 1 did not start")  # these end with the --timeout

# Gradients


def nan(parameter: torch.nn.Parameter) -> None:
    parameter.grad[0, 0] = torch.nan


def infinity(parameter: torch.nn.Parameter) -> None:
    parameter.grad[-1, -1] = -torch.inf


def none(parameter: torch.nn.Parameter) -> None:
    parameter.grad = None


def other_shape(parameter: torch.nn.Parameter) -> None:
    parameter.grad.data = parameter.grad[1:].clone()


def transposed(parameter: torch.nn.Parameter) -> None:
    parameter.grad.data = parameter.grad.mT.clone()


def other_parameter(parameter: torch.nn.Parameter) -> None:
    """Both have another shape than the optimizer was built for."""
    parameter.data = parameter[1:].detach().clone()
    parameter.grad = torch.zeros_like(parameter)


NAME = "blocks.0.mlp.expand.weight"
NOT_FINITE = f"the gradient of {NAME} was not finite at step 2: lower the learning rate or look at"
LEFT_OUT = f"rank 0: {NAME} has no gradient: every parameter given to ... leave out parameters that"
NO_FIT = f"rank 0: the gradient of {NAME} has shape ... and type torch.float32: give ... the shape"
GRADIENTS = {
    "NaN": (nan, "", NOT_FINITE),
    "infinity": (infinity, "", NOT_FINITE),
    "NaN for Dion": (nan, "optimizer=dion", NOT_FINITE),
    "none": (none, "", LEFT_OUT),
    "none for DeMo": (none, "optimizer=demo", LEFT_OUT),
    "other shape": (other_shape, "", NO_FIT),
    "transposed": (transposed, "", NO_FIT),
    "other parameter": (other_parameter, "", NO_FIT),
    "far too large a step": (
        lambda parameter: None,
        "optimizer.lr=1e38",
        "was not finite at step 2: lower the learning rate or look at that step's data",
    ),
}


def after_backward(step: int, deed: Callable[[GPT], None]):
    """A `gradient` of Passes that does it to the model with this step's gradients."""
    original = GradientComputation.compute

    def gradient(passes: GradientComputation, batch: list) -> torch.Tensor:
        loss = original(passes, batch)
        if passes.optimizer.steps + 1 == step:
            deed(passes.raw_model)
        return loss

    return gradient
