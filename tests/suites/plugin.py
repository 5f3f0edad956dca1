"""A pytest plugin for the tests of timm and transformers: every model accelerated, if asked, and results as JSON.

It runs in a process whose package `tests` is theirs, so it imports nothing of ours but deitfast. Environment:
DEITFAST_SUITE_RESULTS, the file for the results; DEITFAST_SUITE_LIBRARY, whose version is told;
DEITFAST_SUITE_ACCELERATE, set to accelerate every model.
"""

from __future__ import annotations

import collections
import functools
import importlib
import importlib.util
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import deitfast
from deitfast.model import acceleration

FITTING = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
"""What transformers' testers make small models of, both times: their own have heads of 8 channels, and dropout."""

_outcomes: dict[str, str] = {}
_messages: dict[str, str] = {}
_counts: collections.Counter[str] = collections.Counter()
_left: collections.Counter[str] = collections.Counter()


def pytest_configure() -> None:
    _make_torchvision_import()
    if os.environ.get("DEITFAST_SUITE_ACCELERATE"):
        {"timm": _accelerate_timm, "transformers": _accelerate_transformers}[os.environ["DEITFAST_SUITE_LIBRARY"]]()
        _count_fused_calls()


def _make_torchvision_import() -> None:
    reference = Path(__file__).parent.parent / "reference.py"
    spec = importlib.util.spec_from_file_location("deitfast_tests_reference", reference)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.import_torchvision()


# Every model --------------------------------------------------------------------------------------------------------


def _accelerated(model: nn.Module) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a model whose blocks are all left alone: counted here
            report = deitfast.accelerate(model, verbose=False)
    except deitfast.DeitfastError:
        return model  # no transformer: a convnet, an embedding alone
    _counts["blocks replaced"] += len(report.replaced)
    _left.update(report.left.values())
    return model


def _accelerate_timm() -> None:
    import timm

    original = timm.create_model

    @functools.wraps(original)
    def create_model(*args: Any, **kwargs: Any) -> nn.Module:
        return _accelerated(original(*args, **kwargs))

    for place in (timm, timm.models, timm.models._factory):
        place.create_model = create_model


def _accelerate_transformers() -> None:
    from transformers import PreTrainedModel

    original = PreTrainedModel.post_init

    @functools.wraps(original)
    def post_init(self: Any) -> None:
        original(self)
        _accelerated(self)

    PreTrainedModel.post_init = post_init


def _count_fused_calls() -> None:
    original = acceleration._verified_forward

    @functools.wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        _counts["fused calls"] += 1
        return original(*args, **kwargs)

    acceleration._verified_forward = counted


def pytest_collection_finish(session: pytest.Session) -> None:
    modules = {item.module for item in session.items if isinstance(item, pytest.Function)}
    testers = {value for module in modules for name, value in vars(module).items() if name.endswith("ModelTester")}
    for tester in testers:
        known = tester.__init__.__code__.co_varnames
        fitting = {name: value for name, value in FITTING.items() if name in known}
        tester.__init__ = functools.partialmethod(tester.__init__, **fitting)


# Results -------------------------------------------------------------------------------------------------------------


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test's outcome is the worst of its parts, subtests included."""
    order = ("passed", "skipped", "failed")
    before = _outcomes.get(report.nodeid, "passed")
    _outcomes[report.nodeid] = max(before, report.outcome, key=order.index)
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash else report.longreprtext
        _messages.setdefault(report.nodeid, message.strip().splitlines()[0] if message.strip() else "")


def pytest_sessionfinish() -> None:
    library = importlib.import_module(os.environ["DEITFAST_SUITE_LIBRARY"])
    results = {"outcomes": _outcomes, "messages": _messages, "counts": _counts, "left": _left}
    results["version"] = library.__version__
    Path(os.environ["DEITFAST_SUITE_RESULTS"]).write_text(json.dumps(results))
