"""Disks over the network: the server's side of the NBD protocol, and nothing about images."""
