"""Submits a training run to SLURM, with a snapshot of code and settings in its run folder; prints the job's number.

python tools/launch_slurm.py examples/slurm/launch.yaml
python tools/launch_slurm.py examples/slurm/launch.yaml --dry-run optimizer.lr=2e-4
"""

from __future__ import annotations

import argparse
import sys

from megatron_ultramem.errors import UserError
from megatron_ultramem.redaction import redact
from megatron_ultramem.slurm import plan_launch, submit


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after printing what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("launch", help="YAML file with the sections job, environment and train")
    parser.add_argument("overrides", nargs="*", metavar="section.setting=value", help="settings of the run")
    parser.add_argument("--dry-run", action="store_true", help="check everything and show the command; submit nothing")
    options = parser.parse_args(arguments)
    try:
        launch = plan_launch(options.launch, options.overrides)
        if options.dry_run:
            print(f"snapshot: {launch.folder}\n{redact(launch.shown())}")
        else:
            print(submit(launch))
    except UserError as error:
        print(f"launch_slurm: {redact(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
