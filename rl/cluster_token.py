"""Makes the token of the Ray cluster that a run starts. `import rl` sets this token in every process of a run.

A cluster on this machine listens on 127.0.0.1, where every user of the machine can reach it. Ray refuses requests
without the token, so other users cannot run code in the cluster. The token stays in the environment of the run's
processes. Without RAY_AUTH_TOKEN, Ray would write a token to the home folder, and all clusters that the user starts
later would require that token.
"""

import secrets
from collections.abc import MutableMapping

CHOICES = {"RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
"""If the user has set one of these variables, the user has chosen a cluster or a token."""


def set_token(environment: MutableMapping[str, str]) -> None:
    """Sets a random token in the environment of this process, from which child processes inherit it. Does nothing if
    the user has set one of CHOICES.

    Ray reads these variables when it is imported, so this function must run before that.
    """
    if not CHOICES & environment.keys():
        environment.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
