"""Adapters into other things: merged into a base."""
