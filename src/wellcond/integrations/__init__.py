"""Callbacks for training frameworks; each needs its own, so import its module: ``wellcond.integrations.lightning``."""
