"""What holds for every test: no network, one thread, no window, and run folders that vanish with the session."""

import os
import shutil
import tempfile

import pytest
from filelock import FileLock

# Read when torch and the hub client are imported, so they are set before any test file is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors only lose by more, and tests run in two processes
for name in ("DISTILL_NOTEBOOK_RUN", "DISTILL_NOTEBOOKS"):
    os.environ.pop(name, None)


def pytest_configure(config):
    """Keep the user's run folders out of the tests; processes that tests start inherit the folder."""
    config.distill_runs = tempfile.mkdtemp(prefix="distill-tests-")
    if not hasattr(config, "workerinput"):  # the process that starts the others: what all of them share lies there
        os.environ["DISTILL_TESTS_SHARED"] = config.distill_runs
    os.environ["DISTILL_RUNS"] = config.distill_runs


def pytest_unconfigure(config):
    """Remove the session's run folders."""
    shutil.rmtree(config.distill_runs, ignore_errors=True)


@pytest.fixture(scope="module")
def corpus():
    """Build `pydocs` once for all processes of the tests: it takes two minutes."""
    from distill_utils.data.loading import corpus_folder

    shared = os.environ["DISTILL_TESTS_SHARED"]
    with pytest.MonkeyPatch.context() as patch, FileLock(f"{shared}/corpus.lock"):
        patch.setenv("DISTILL_RUNS", shared)
        folder = corpus_folder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILL_CORPUS", str(folder))
        yield folder


def pytest_collection_modifyitems(items):
    """Start with the notebooks, the longest file: the other process has time for all the rest meanwhile."""
    items.sort(key=lambda item: item.path.stem != "test_smoke")
