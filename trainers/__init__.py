"""Staged training of small modules on frozen backbones, and the pipelines that run them."""
