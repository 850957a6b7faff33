"""All targets over their corpus and some changed inputs, for the tests: JSON on stdout."""

from __future__ import annotations

import json
import sys
import tempfile
from random import Random

from tests.fuzz.child import changed
from tests.fuzz.harness import Watch, load_targets, prepare


def main(runs: int) -> None:
    """Try ``runs`` changed inputs of each target, the same ones each time."""
    targets = load_targets()
    prepare()
    results = {}
    with tempfile.TemporaryDirectory(prefix="envstore-fuzz-") as scratch:
        tempfile.tempdir = scratch
        for target in targets.values():
            watch = Watch(target)
            random = Random(f"short {target.name}")
            inputs = target.inputs() or target.seeds()
            changes = (changed(target, random.choice(inputs), random, inputs) for _ in range(runs))
            findings = [watch.run(data) for data in (*inputs, *changes)]
            results[target.name] = {
                "executions": watch.executions,
                "findings": [found.text for found in findings if found is not None],
            }
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]))
