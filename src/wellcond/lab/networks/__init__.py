"""How the networks that methods are compared on are built."""
