"""What a server is told at its start."""

from dataclasses import dataclass, field
from ipaddress import ip_address

LOCALHOST = "localhost"


@dataclass(frozen=True)
class Settings:
    """Checked when made; raises ValueError.

    Attributes:
        model_name: as clients name the model.
        host: the address that it listens on.
        api_key: asked of clients; None: of nobody.
        max_queue: requests that may wait beside the one that runs.
        max_body_bytes: of a request.
        max_tokens_limit: the largest `max_tokens` of a request.
    """

    model_name: str
    host: str = "127.0.0.1"
    api_key: str | None = field(default=None, repr=False)
    max_queue: int = 32
    max_body_bytes: int = 4 * 2**20
    max_tokens_limit: int = 4096

    def __post_init__(self) -> None:
        for option, least in (("max_queue", 0), ("max_body_bytes", 1), ("max_tokens_limit", 1)):
            if getattr(self, option) < least:
                raise ValueError(f"{option}={getattr(self, option)}, allowed is an integer >= {least}")
        key = self.api_key
        if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
            raise ValueError(
                "the API key is not usable: allowed are printable ASCII characters, at least one, no space"
            )

    @property
    def is_local(self) -> bool:
        """Only this machine reaches it."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == LOCALHOST

    @property
    def allowed_hosts(self) -> frozenset[str] | None:
        """What a request's Host header may name, without the port; None: anything.

        A server for this machine alone is asked for by these names. Another name means that a page elsewhere has let
        its own name point here (DNS rebinding).
        """
        return frozenset({LOCALHOST, "127.0.0.1", "::1", self.host.lower()}) if self.is_local else None
