"""Builds the networks that methods are compared on."""
