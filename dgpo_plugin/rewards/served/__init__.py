"""Rewards on the other side of a wire: our server and its client, judges behind an endpoint."""
