"""The rendezvous of a job's launchers: before jax starts, and for as long as the job lasts.

jax aborts a process whose peers are missing and names none of them, and runs on where processes got
different configs. So the launcher of rank 0 (the server) listens at an address that all launchers
can derive, waits with a timeout for the others (the clients), compares their hellos, and names a
free port for jax's coordinator. The connections stay open: a failure anywhere ends the job
everywhere, with one root cause. Messages are lines of JSON; an unknown message is ignored, and a
malformed one ends its connection. Before anything else both sides prove that they know the secret
of the job (`secret`, `handshake`); strangers are turned away and counted. `open_rendezvous` makes
the `Rendezvous` of one attempt, which reports to a `Listener`; `root_cause.RootCause` decides which
of several failures came first, and `late.Late` which rank the others wait for.
"""

from launcher.rendezvous.late import Idle
from launcher.rendezvous.open import open_rendezvous
from launcher.rendezvous.protocol import Listener, Rendezvous, Start

__all__ = ["Idle", "Listener", "Rendezvous", "Start", "open_rendezvous"]
