"""How many examples hypothesis tries, and whether they are the same each time.

By default 24 per database, the same in every run: a red build must be red again. With
``TIDYROWS_EXAMPLES=1000`` that many, and new ones each time; a failure then prints the
``@reproduce_failure`` line that brings it back.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

VARIABLE = "TIDYROWS_EXAMPLES"
WANTED = os.environ.get(VARIABLE, "")

settings.register_profile(
    "tidyrows",
    max_examples=int(WANTED or 24),
    stateful_step_count=40,
    deadline=None,  # a server on a busy machine keeps none
    derandomize=not WANTED,
    database=None,  # examples are not kept: the same code must give the same answer everywhere
    print_blob=True,
    phases=[Phase.explicit, Phase.generate, Phase.target, Phase.shrink],  # explaining takes minutes
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,  # each example cleans the database itself
        HealthCheck.too_slow,  # making tables takes longer than drawing them
        HealthCheck.data_too_large,  # a story of a whole test is long
    ],
)
settings.load_profile("tidyrows")
