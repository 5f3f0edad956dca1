"""`python -m tests.suites`: timm's and transformers' own tests, plain and with every model accelerated, compared.

Each suite is a checkout of the library's repository, at the version installed; where that is another one,
PYTHONPATH=CHECKOUT/src (timm: CHECKOUT) takes the library from there too. The tests run twice, in processes of their
own. What passes in one and not in the other is listed, and fails the command unless a reason for it stands here. Tests
that fail both times (they want the network) say nothing about the kernels. Other options go to pytest.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Suite:
    """files: in the checkout. keywords: pytest's -k. differs: part of a test's name -> why it may differ."""

    files: tuple[str, ...]
    keywords: str = ""
    differs: dict[str, str] = field(default_factory=dict)


SUITES = {
    "timm": Suite(
        ("tests/test_models.py",),
        "(deit_tiny or deit3_small or vit_tiny_patch16_224 or test_vit) and not load_pretrained",
        {
            "test_model_forward_fx[": "it asks for equality in every bit of a traced graph, which is PyTorch's own "
            "operations, and of the model, which sums in another order",
        },
    ),
    "transformers": Suite(
        ("tests/models/vit/test_modeling_vit.py", "tests/models/deit/test_modeling_deit.py"),
        differs={
            "test_training_gradient_checkpointing": "it asks which gradients are not zero, with checkpoints and "
            "without; those of key biases are zero but for rounding, which is another where the last block computes "
            "class tokens alone",
        },
    ),
}

QUIET = ("-p", "plugin", "-p", "no:cacheprovider", "--noconftest", "-q", "--tb=line", "-W", "ignore")


def run(library: str, checkout: Path, accelerate: bool, options: list[str], keywords: str) -> dict[str, Any]:
    """Outcomes by test, messages, counts, what was left alone and the version, of one run of a library's tests."""
    with tempfile.TemporaryDirectory(prefix="deitfast-suite-") as folder:
        results = Path(folder) / "results.json"
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
            "DEITFAST_SUITE_RESULTS": str(results),
            "DEITFAST_SUITE_LIBRARY": library,
            "DEITFAST_SUITE_ACCELERATE": "1" if accelerate else "",
            "HF_HUB_OFFLINE": "1",  # what needs the network fails at once, both times
        }
        command = [sys.executable, "-m", "pytest", *QUIET, *options, *(["-k", keywords] if keywords else [])]
        done = subprocess.run(
            [*command, *SUITES[library].files], cwd=checkout, env=environment, capture_output=True, text=True
        )
        if not results.exists() or done.returncode > 1:
            raise SystemExit(f"error: pytest ended with {done.returncode}\n{(done.stdout + done.stderr)[-2000:]}")
        return json.loads(results.read_text())


def differences(plain: dict[str, str], accelerated: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Test -> outcome plain and accelerated, where these are not the same."""
    tests = sorted(plain.keys() | accelerated.keys())
    pairs = {test: (plain.get(test, "absent"), accelerated.get(test, "absent")) for test in tests}
    return {test: pair for test, pair in pairs.items() if pair[0] != pair[1]}


def counted(outcomes: dict[str, str]) -> str:
    counts = collections.Counter(outcomes.values())
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))


def compare(library: str, checkout: Path, options: list[str], keywords: str | None) -> bool:
    """Run a suite twice, print what differs; whether nothing differs but what may."""
    suite = SUITES[library]
    chosen = suite.keywords if keywords is None else keywords
    plain = run(library, checkout, False, options, chosen)
    print(f"{library} {plain['version']}, tests of {checkout}\n  plain        {counted(plain['outcomes'])}", flush=True)
    accelerated = run(library, checkout, True, options, chosen)
    counts = accelerated["counts"]
    fused = ", ".join(f"{counts.get(what, 0)} {what}" for what in ("blocks replaced", "fused calls"))
    print(f"  accelerated  {counted(accelerated['outcomes'])}; {fused}")
    for reason, number in accelerated["left"].items():
        print(f"  {number} blocks left alone: {reason}")
    for test, message in plain["messages"].items():
        if test in accelerated["messages"]:
            print(f"  fails both times: {test}: {message}")
    unexplained = 0
    for test, (before, after) in differences(plain["outcomes"], accelerated["outcomes"]).items():
        reason = next((why for part, why in suite.differs.items() if part in test), None)
        unexplained += reason is None
        print(f"  differs: {test}: {before} plain, {after} accelerated: {accelerated['messages'].get(test, '')}")
        print(f"    {'NO REASON KNOWN' if reason is None else f'may differ: {reason}'}")
    if not counts.get("fused calls"):
        print("  no fused block ran: these tests say nothing")
    print(f"  {unexplained} tests differ without a reason", flush=True)
    return not unexplained and bool(counts.get("fused calls"))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.suites", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in SUITES:
        parser.add_argument(f"--{name}", type=Path, metavar="CHECKOUT", help=f"a checkout of {name}'s repository")
    parser.add_argument("-k", dest="keywords", help="these tests alone, as pytest's -k")
    args, options = parser.parse_known_args()
    asked = {name: checkout for name in SUITES if (checkout := getattr(args, name))}
    if not asked:
        parser.error("name a checkout: --timm FOLDER, --transformers FOLDER, or both")
    right = [compare(name, checkout, options, args.keywords) for name, checkout in asked.items()]
    raise SystemExit(not all(right))


if __name__ == "__main__":
    main()
