"""Limits how long OpenMP threads spin while they wait for work. `import rl` sets these limits in every process of a
run.

Engine, policy, critic and judges share the cores of a machine, with each other and with other programs. A thread that
spins takes a core from a thread that has work. By default, threads of GNU's OpenMP library spin for some milliseconds
after each parallel loop, and threads of Intel's library for 200 ms.
"""

from collections.abc import MutableMapping

LIMITS = {
    "GOMP_SPINCOUNT": "1000",  # GNU's library (torch, vLLM): 1000 iterations of an empty loop, about 40 microseconds
    "KMP_BLOCKTIME": "0",  # Intel's library, which a user can preload; the unit is milliseconds
}
CHOICES = {"OMP_WAIT_POLICY", *LIMITS}  # variables with which a user chooses how threads wait


def limit_spinning(environment: MutableMapping[str, str]) -> None:
    """Sets LIMITS in the environment of this process, from which child processes inherit them. Does nothing if the user
    has set one of CHOICES.

    An OpenMP library reads these variables when it is loaded, so this function must run before torch is imported.
    """
    if not CHOICES & environment.keys():
        environment.update(LIMITS)
