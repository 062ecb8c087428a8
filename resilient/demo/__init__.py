"""The demo: order processing against four services that misbehave on a seeded schedule, with guards and without.

Everything runs on this machine: the services are processes of their own, on loopback, and end with the demo. Needs the
extra `demo` (`pip install 'resilient-kit[demo]'`). Start it with `resilient demo`; `docs/tutorial/demo.md` reads its
report. `schedule`, `orders`, `trades` and `audit` are pure; `services` runs in the children; `client` holds the guards,
and `saga` the order as it is placed with them.
"""
