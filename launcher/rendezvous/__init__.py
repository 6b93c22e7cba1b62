"""Where the launchers of a job meet: before jax is asked to, and for as long as the job lasts.

jax aborts a process whose peers do not come and names nobody, and lets a job whose processes were
told different things run on. So the launcher of rank 0 listens at an address that all can derive,
waits for the others with a timeout, compares what they bring, and names a free port for jax. The
connections stay: through them a failure anywhere ends the job everywhere, with one story.

Messages are lines of JSON. What arrives is data: an unknown message is ignored, a malformed one
ends its connection.
"""

from launcher.rendezvous.open import open_rendezvous
from launcher.rendezvous.protocol import Listener, Rendezvous, Start

__all__ = ["Listener", "Rendezvous", "Start", "open_rendezvous"]
