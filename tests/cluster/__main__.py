"""`python -m tests.cluster`: a cluster until Ctrl-C."""

import signal
import sys
import time

from . import ClusterFailed, running


def main() -> None:
    """Start a cluster, say how to talk to it, and stop it when asked to."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    begun = time.monotonic()
    with running() as cluster:
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
        print(f"ready after {time.monotonic() - begun:.1f} s, Ctrl-C stops it", file=sys.stderr)
        signal.pause()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
    except ClusterFailed as error:
        sys.exit(str(error))
